"""The errors of xr_aimz, one class for each thing the caller would do about it.

Every class is also a standard one (``ValueError``, ``KeyError`` ...), so code that
knows nothing of this package can catch it. A message names what does not hold, what
was found and what would work.
"""

import contextlib
import os
import sys
import warnings

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

# Frames of these are no caller's: a context of ours is left by way of contextlib.
_OURS = (os.path.dirname(__file__) + os.sep, contextlib.__file__)


class AimzError(Exception):
    """Anything that xr_aimz refuses."""


class MissingVariableError(AimzError, KeyError):
    """A name is not in the Dataset: add or rename the variable."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote a whole sentence.
        return str(self.args[0]) if self.args else ""


class MissingValueError(AimzError, ValueError):
    """A missing value (NaN) cannot be left out: fill it, or drop its labels."""


class MemoryLimitError(AimzError, MemoryError):
    """What would be loaded does not fit in memory: take it in batches, or take less."""


class BindingError(AimzError, ValueError):
    """An argument and a variable do not fit together: change ``variables=``."""


class DimensionError(AimzError, ValueError):
    """A dimension is missing, empty or unknown: change the Dataset's dimensions."""


class LabelError(AimzError, ValueError):
    """Labels are duplicated, missing or unusable: change the coordinate."""


class ChunkError(AimzError, ValueError):
    """A dimension is chunked where it must be whole: rechunk the Dataset."""


class BlockSizeError(AimzError, MemoryError):
    """The least that a task must hold is more than it may: allow more, or ask for less."""


class UnitsError(AimzError, ValueError):
    """Units differ from those of the fit: convert the variable."""


class DtypeError(AimzError, TypeError):
    """A variable's dtype has no place in a model: convert the variable."""


class SupportError(AimzError, ValueError):
    """An outcome has values that its distribution cannot take: correct them, or change it."""


class IndexRangeError(AimzError, IndexError):
    """A value is no position on the axis that it indexes: leave it out, or fit with it."""


class InterventionError(AimzError, ValueError):
    """An intervention cannot be made, or cannot act: change ``do=``."""


class ModelError(AimzError, ValueError):
    """The model itself cannot be used like this: change the model."""


class OptionError(AimzError, TypeError):
    """An option does not exist, or is not one that this method takes: change the call."""


class RandomnessError(AimzError, NotImplementedError):
    """A site cannot be drawn by label: change its distribution."""


class StoreError(AimzError, FileExistsError):
    """The store cannot be written as asked: choose another path or mode."""


class DamagedStoreError(AimzError, ValueError):
    """A store is not as it was written, or holds what no fit does: take another copy."""


class StoreKindError(DamagedStoreError):
    """A store is of another kind than is read here: open it by what it was made for."""


class IncompleteStoreError(AimzError, FileNotFoundError):
    """A store lacks blocks: write the same results to it again."""


class SpaceError(AimzError, OSError):
    """The disk has less space than the results need: write less, or elsewhere."""


class WriteError(AimzError, OSError):
    """Writing failed on the way: mend the cause and call again; what is written stays."""


class MissingExtraError(AimzError, ModuleNotFoundError):
    """A package that only some need is not installed: install the extra."""


class ConvergenceWarning(UserWarning):
    """A fit's own diagnostics say that it should not be trusted."""


class TrackingWarning(UserWarning):
    """A fit is whole, and what a tracking server has of it is not: log it again."""


class ResumeWarning(UserWarning):
    """A write that is cut short could not be taken up by another process."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called this package, by whichever of its functions."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
