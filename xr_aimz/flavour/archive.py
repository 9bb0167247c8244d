"""A saved fit as one file: the Zarr store that ``fit.save`` writes, zipped.

A store is a tree of small files. MLflow fetches them one by one, and over HTTP takes a folder
whose only file bears the folder's name, as a chunk ``c/0/0`` does, for a file that is empty:
https://github.com/mlflow/mlflow/blob/v3.17.2/mlflow/store/artifact/http_artifact_repo.py
(``list_artifacts``). From a zip nothing is unpacked: Zarr reads it as it is.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import zarr
from zarr.storage import ZipStore

from xr_aimz.errors import DamagedStoreError
from xr_aimz.loading import load_fit
from xr_aimz.posterior import Fit

__all__ = ["read", "write"]


def write(fit: Fit, path: Path) -> None:
    """Save a fit into a zip file that is not there yet."""
    with TemporaryDirectory(dir=path.parent) as folder:
        store = Path(folder, "fit.zarr")
        fit.save(store)
        # Chunks are compressed already.
        with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
            for file in sorted(f for f in store.rglob("*") if f.is_file()):
                archive.write(file, file.relative_to(store))


def read(path: Path, model: Callable | None, *, trust_import: bool) -> Fit:
    """The fit in a zip file, checked as :func:`xr_aimz.load_fit` does.

    Raises
    ------
    DamagedStoreError
        It is no zip file, holds no saved fit, or one that was changed.
    ModelError
        No model is given, or its source is not that of the fit.
    """
    if not zipfile.is_zipfile(path):
        raise DamagedStoreError(f"{str(path)!r} is no zip file of a saved fit")
    with zipfile.ZipFile(path) as archive:
        counts = Counter(archive.namelist())
    odd = [n for n in counts if ".." in n.split("/") or n.startswith("/") or counts[n] > 1]
    if odd:
        raise DamagedStoreError(
            f"{str(path)!r} has entries {odd[:3]!r}, which lead out of it or are there twice; no "
            "saved fit has any"
        )
    store = ZipStore(path, mode="r")
    try:
        # A store of zarr's is opened by what first uses it, and must be before it is listed.
        zarr.open_group(store, mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise DamagedStoreError(f"{str(path)!r} holds no Zarr group: {error}") from error
    return load_fit(store, model, trust_import=trust_import)
