"""Error and warning classes, one for each remedy, and suggestions for misspelled names.

Each error class also derives from a standard exception.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AimzError",
    "BindingError",
    "BlockSizeError",
    "ChunkError",
    "ConvergenceWarning",
    "DamagedStoreError",
    "DimensionError",
    "DtypeError",
    "IncompleteStoreError",
    "IndexRangeError",
    "InterventionError",
    "LabelError",
    "MemoryLimitError",
    "MissingExtraError",
    "MissingValueError",
    "MissingVariableError",
    "ModelError",
    "OptionError",
    "RandomnessError",
    "ResumeWarning",
    "SpaceError",
    "StoreError",
    "StoreKindError",
    "SupportError",
    "TrackingWarning",
    "UnitsError",
    "WriteError",
    "warn",
]

# Frames of these files are not the caller's; contextlib is on the stack when a context manager
# of this package exits.
_INTERNAL_FILES = (os.path.dirname(__file__) + os.sep, contextlib.__file__)


class AimzError(Exception):
    """Base class of all errors that xr_aimz raises."""


class MissingVariableError(AimzError, KeyError):
    """A variable is not in the Dataset: add or rename it."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote a whole sentence.
        return str(self.args[0]) if self.args else ""


class MissingValueError(AimzError, ValueError):
    """A missing value (NaN) cannot be left out: fill it, or drop its labels."""


class MemoryLimitError(AimzError, MemoryError):
    """Arrays to load do not fit in memory: load them in batches, or load less."""


class BindingError(AimzError, ValueError):
    """An argument and a variable do not match: change ``variables=``."""


class DimensionError(AimzError, ValueError):
    """A dimension is missing, empty or unknown: change the Dataset's dimensions."""


class LabelError(AimzError, ValueError):
    """Labels are duplicated, missing or unusable: change the coordinate."""


class ChunkError(AimzError, ValueError):
    """A dimension has several chunks where it must have a single one: rechunk the Dataset."""


class BlockSizeError(AimzError, MemoryError):
    """The smallest possible block exceeds a limit on bytes: raise the limit, or request less."""


class UnitsError(AimzError, ValueError):
    """Units of a variable differ from those at the fit: convert the variable."""


class DtypeError(AimzError, TypeError):
    """A variable's dtype is not accepted by a model: convert the variable."""


class SupportError(AimzError, ValueError):
    """An outcome has values outside the support of its distribution: correct or change it."""


class IndexRangeError(AimzError, IndexError):
    """A value is not a valid position on the axis that it indexes: drop it, or fit with it."""


class InterventionError(AimzError, ValueError):
    """An intervention cannot be made, or has no effect: change ``do=``."""


class ModelError(AimzError, ValueError):
    """A model cannot be used in this way: change the model."""


class OptionError(AimzError, TypeError):
    """An option does not exist, or this method does not take it: change the call."""


class RandomnessError(AimzError, NotImplementedError):
    """A site cannot be sampled by label: change its distribution."""


class StoreError(AimzError, FileExistsError):
    """A store cannot be written with this path and mode: choose another path or mode."""


class DamagedStoreError(AimzError, ValueError):
    """A store is not as it was written, or has contents that no fit has: use another copy."""


class StoreKindError(DamagedStoreError):
    """A store is of another kind than the function reads: use the function for its kind."""


class IncompleteStoreError(AimzError, FileNotFoundError):
    """A store lacks blocks: write the same results to it again."""


class SpaceError(AimzError, OSError):
    """A disk has less space than the results need: write less, or to another disk."""


class WriteError(AimzError, OSError):
    """A write failed midway: remove the cause and call again; written blocks stay."""


class MissingExtraError(AimzError, ModuleNotFoundError):
    """An optional package is not installed: install the extra."""


class ConvergenceWarning(UserWarning):
    """Diagnostics of a fit indicate that it should not be trusted."""


class TrackingWarning(UserWarning):
    """A fit is complete, but its record on a tracking server is not: log it again."""


class ResumeWarning(UserWarning):
    """A write, if interrupted, could not be resumed by another process."""


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning at the line that called into this package, through any function."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL_FILES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


# difflib's own cutoff: of four letters one may differ, or two may be swapped.
_CUTOFF = 0.6


def find_closest(name: str, names: Iterable[str], cutoff: float = _CUTOFF) -> str | None:
    """
    Find the existing name that a misspelled name most likely means.

    Parameters
    ----------
    name : str
    names : iterable of str
        The existing names.
    cutoff : float
        The least similarity, from 0 to 1; case is ignored.

    Returns
    -------
    str or None
        None if no name is similar enough.
    """
    folded: dict[str, str] = {}
    for existing in names:
        folded.setdefault(existing.casefold(), existing)
    matches = get_close_matches(name.casefold(), folded, n=1, cutoff=cutoff)
    return folded[matches[0]] if matches else None


def list_names(names: Iterable[object], unknown: str | Iterable[object] = ()) -> str:
    """
    List existing names for an error message, with suggestions for unknown ones.

    Parameters
    ----------
    names : iterable
        The existing names, in the order in which to list them.
    unknown : str or iterable
        Names that do not exist. An object that is not a string has no suggestion.

    Returns
    -------
    str
        ``['co2', 'tas'] (did you mean 'co2' by 'co_2'?)``
    """
    return f"{list(map(str, names))!r}{suggest(names, unknown)}"


def suggest(names: Iterable[object], unknown: str | Iterable[object]) -> str:
    """Suggest existing names: `` (did you mean 'co2' by 'co_2'?)``, or an empty string."""
    existing = [str(n) for n in names]
    misspelled = [unknown] if isinstance(unknown, str) else unknown
    closest = {n: find_closest(n, existing) for n in misspelled if isinstance(n, str)}
    pairs = ", ".join(f"{right!r} by {name!r}" for name, right in closest.items() if right)
    return f" (did you mean {pairs}?)" if pairs else ""
