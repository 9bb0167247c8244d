"""The state of a fit on disk: named arrays in one file, whole or not there.

The file is NumPy's own ``npz``, without pickles. It is written beside its place and moved
there, so that a run killed while writing leaves the file before it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from xr_aimz.errors import StoreError

__all__ = ["Checkpoint", "read", "write"]

# Not more often than each second, nor so often that writing takes a twentieth of the time.
_SECONDS, _SHARE = 1.0, 20.0


class Checkpoint:
    """A file written now and then.

    Parameters
    ----------
    path : path, optional
        Without one nothing is ever due.

    Raises
    ------
    StoreError
        No file can be written there.
    """

    def __init__(self, path: str | Path | None) -> None:
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise StoreError(
                f"checkpoint={str(path)!r} is not the path of a file in a directory that exists; "
                "make the directory, or choose another path"
            )
        self._path = path
        self._next = monotonic() + _SECONDS

    @property
    def due(self) -> bool:
        return self._path is not None and monotonic() >= self._next

    def read(self) -> dict[str, np.ndarray] | None:
        """What was written there, if anything."""
        return None if self._path is None else read(self._path)

    def write(self, state: Mapping[str, Any]) -> None:
        """Write, where there is a path."""
        if self._path is None:
            return
        start = monotonic()
        write(self._path, state)
        self._next = monotonic() + max(_SECONDS, _SHARE * (monotonic() - start))


def write(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write named arrays, so that a reader finds all of them or the file before."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.savez(file, **state)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | Path) -> dict[str, np.ndarray] | None:
    """The arrays of a checkpoint; None where there is no file.

    Raises
    ------
    StoreError
        The file is no checkpoint.
    """
    if not Path(path).exists():
        return None
    try:
        # Opened here: of a damaged file NumPy would leave its own open.
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"checkpoint={str(path)!r} is not a file that a fit has written ({error}); choose "
            "another path"
        ) from error
