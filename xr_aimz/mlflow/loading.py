"""Load a fit from an MLflow model, as a Fit or for pyfunc; read and write its zip file."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import zarr
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.model_utils import _add_code_from_conf_to_system_path, _get_flavor_configuration
from zarr.storage import ZipStore

from xr_aimz.errors import AimzError, DamagedStoreError, ModelError
from xr_aimz.fits import Fit, load_fit
from xr_aimz.mlflow.serving import PyfuncModel

FLAVOUR = "xr_aimz"
LOADER = "xr_aimz.mlflow"
STORE = "fit.zarr.zip"
TRUST = "trust_import"


def write_archive(fit: Fit, path: Path) -> None:
    """Save a fit into a new zip file."""
    with TemporaryDirectory(dir=path.parent) as folder:
        store = Path(folder, "fit.zarr")
        fit.save(store)
        # Chunks are compressed already.
        with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
            for file in sorted(f for f in store.rglob("*") if f.is_file()):
                archive.write(file, file.relative_to(store))


def read_archive(path: Path, model: Callable | None, *, trust_import: bool) -> Fit:
    """Read the fit in a zip file, with the checks of :func:`xr_aimz.load_fit`.

    Raises
    ------
    DamagedStoreError
        It is no zip file, has no saved fit, or one that was changed.
    ModelError
        No model is given, or its source differs from that of the fit.
    """
    if not zipfile.is_zipfile(path):
        raise DamagedStoreError(f"{str(path)!r} is no zip file of a saved fit")
    with zipfile.ZipFile(path) as archive:
        counts = Counter(archive.namelist())
    odd = [n for n in counts if ".." in n.split("/") or n.startswith("/") or counts[n] > 1]
    if odd:
        raise DamagedStoreError(
            f"{str(path)!r} has entries {odd[:3]!r}, which lead out of it or occur twice; no "
            "saved fit has such entries"
        )
    store = ZipStore(path, mode="r")
    try:
        # Zarr opens a ZipStore at its first use, and it must be open before it is listed.
        zarr.open_group(store, mode="r")
    except (FileNotFoundError, ValueError) as error:
        raise DamagedStoreError(f"{str(path)!r} holds no Zarr group: {error}") from error
    return load_fit(store, model, trust_import=trust_import)


def load_model(
    model_uri: str | Path,
    model: Callable | None = None,
    *,
    trust_import: bool = False,
    dst_path: str | None = None,
) -> Fit:
    """Load the fit of an MLflow model.

    Parameters
    ----------
    model_uri : str
        ``models:/melt@champion``, ``runs:/<run_id>/model``, a folder, as MLflow takes it.
    model : callable, optional
        The NumPyro model. The saved code is then not imported.
    trust_import : bool, default False
        Import the model from the code saved with it, or from the module in which it was defined.
        This runs code of the person who saved it. The saved setting of trust is ignored.
    dst_path : str, optional
        A folder to download to.

    Returns
    -------
    Fit
        The fit, ready to predict, with the run that logged it in its lineage.

    Raises
    ------
    ModelError, DamagedStoreError
        As in :func:`xr_aimz.load_fit`.

    Examples
    --------
    >>> fit = xr_aimz.mlflow.load_model("models:/melt@champion", melting)  # doctest: +SKIP
    >>> ds.aimz.predict(fit)  # doctest: +SKIP
    """
    folder = Path(_download_artifact_from_uri(str(model_uri), output_path=dst_path))
    flavour = _get_flavor_configuration(str(folder), FLAVOUR)
    if trust_import and model is None:
        # This puts a saved folder first on sys.path, so it is done only with trust.
        _add_code_from_conf_to_system_path(str(folder), flavour)
    fit = read_archive(folder / STORE, model, trust_import=trust_import)
    run = Model.load(str(folder)).run_id
    return fit if run is None else replace(fit, lineage={"mlflow_run_id": run, **fit.lineage})


class _RequestErrorsForMlflow(PyfuncModel):
    """Model for pyfunc that raises MLflow's own exception for errors of a request."""

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        try:
            return super().predict(model_input, params)
        except AimzError as error:
            # For any other exception the scoring server returns a traceback, not the message.
            raise MlflowException.invalid_parameter_value(
                f"{type(error).__name__}: {error}"
            ) from error


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyfuncModel:
    """Load the model for ``mlflow.pyfunc.load_model``, which calls this function.

    ``model_config`` has the key ``trust_import``: whether saved code may be imported.
    """
    # Only True counts as trust: the text "false" is truthy.
    if (model_config or {}).get(TRUST) is not True:
        raise ModelError(
            "this model was saved without trust_import=True, and serving it imports its code. If "
            "you trust whoever saved it, say so: mlflow.pyfunc.load_model(uri, model_config="
            "{'trust_import': True}), or for a server the environment variable "
            "MLFLOW_PYFUNC_INFERENCE_CONFIG='{\"trust_import\": true}'"
        )
    return _RequestErrorsForMlflow(read_archive(Path(path), None, trust_import=True))
