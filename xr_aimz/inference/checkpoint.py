"""Write and read the state of a fit: named arrays in one file, which is replaced atomically.

The file is NumPy's ``npz``, without pickles. It is written under a temporary name in the same
directory and then renamed, so that a run killed while writing leaves the previous file.
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

# At least a second between writes, and 20 times as long as a write takes: writing takes at most
# a twentieth of the time.
_MIN_SECONDS, _MIN_RATIO = 1.0, 20.0


class Checkpoint:
    """Checkpoint file that is written at intervals.

    Parameters
    ----------
    path : path, optional
        Without a path no write is ever due.

    Raises
    ------
    StoreError
        The path is a directory, or its directory does not exist.
    """

    def __init__(self, path: str | Path | None) -> None:
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise StoreError(
                f"checkpoint={str(path)!r} is not the path of a file in a directory that exists; "
                "make the directory, or choose another path"
            )
        self._path = path
        self._next = monotonic() + _MIN_SECONDS

    @property
    def due(self) -> bool:
        return self._path is not None and monotonic() >= self._next

    def read(self) -> dict[str, np.ndarray] | None:
        """Read the arrays of the file; None if there is no path or no file."""
        return None if self._path is None else read_checkpoint(self._path)

    def write(self, state: Mapping[str, Any]) -> None:
        """Write named arrays, if there is a path."""
        if self._path is None:
            return
        start = monotonic()
        write_checkpoint(self._path, state)
        self._next = monotonic() + max(_MIN_SECONDS, _MIN_RATIO * (monotonic() - start))


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write named arrays so that a reader finds all of them, or else the previous file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **state)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray] | None:
    """Read the arrays of a checkpoint by name; None if there is no file.

    Raises
    ------
    StoreError
        The file is no checkpoint.
    """
    if not Path(path).exists():
        return None
    try:
        # Opened explicitly: NumPy would leave a damaged file open.
        with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"checkpoint={str(path)!r} is not a file that a fit has written ({error}); choose "
            "another path"
        ) from error
