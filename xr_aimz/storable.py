"""Arrays of any dtype that labels and data have, as the few that a store holds.

Dates are counted, in integers and in the unit that they have, so that nothing is rounded;
CF attrs say so to other readers. Strings lose their fixed length, and objects must be
strings or cftime's dates. What an array was is written beside it, and is taken from a
closed list when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from xr_aimz.errors import DamagedStoreError, StoreError

__all__ = ["restored", "stored"]

_NUMBERS = re.compile(r"\|b1|[<>|][iu][1248]|[<>][f][248]|[<>]c(8|16)")
_STRINGS = re.compile(r"[<>]U\d{1,9}")
_TIMES = re.compile(r"[<>][mM]8\[(?P<unit>ns|us|ms|s|m|h|D)\]")
_WORDS = {
    "ns": "nanoseconds",
    "us": "microseconds",
    "ms": "milliseconds",
    "s": "seconds",
    "m": "minutes",
    "h": "hours",
    "D": "days",
}
_EPOCH = "since 1970-01-01"
_CALENDARS = (
    "360_day",
    "365_day",
    "366_day",
    "all_leap",
    "gregorian",
    "julian",
    "noleap",
    "proleptic_gregorian",
    "standard",
)


def stored(values: Any, what: str) -> tuple[np.ndarray, dict[str, str], dict[str, str]]:
    """An array as a store holds it, what it was, and attrs that say so to other readers.

    Parameters
    ----------
    values : array
    what : str
        Its name, for the error.

    Raises
    ------
    StoreError
        An array of a dtype that has no place, such as objects other than strings.
    """
    values = np.asarray(values)
    dtype = values.dtype.str
    if _NUMBERS.fullmatch(dtype):
        return values.astype(values.dtype.newbyteorder("=")), {"dtype": dtype}, {}
    if found := _TIMES.fullmatch(dtype):
        counted = values.astype(values.dtype.newbyteorder("=")).view(np.int64)
        return counted, {"dtype": dtype}, _units(values.dtype.kind, found["unit"])
    if _STRINGS.fullmatch(dtype):
        return values.astype(np.dtypes.StringDType()), {"dtype": dtype}, {}
    if isinstance(values.dtype, np.dtypes.StringDType):
        return values, {"dtype": "string"}, {}
    if values.dtype == jnp.bfloat16:
        return values.view(np.uint16), {"dtype": "bfloat16"}, {}
    if values.dtype.kind == "O":
        return _objects(values, what)
    raise StoreError(f"{what} has dtype {values.dtype}, which has no place in a store; convert it")


def _units(kind: str, unit: str) -> dict[str, str]:
    if kind == "M":
        return {"units": f"{_WORDS[unit]} {_EPOCH}", "calendar": "proleptic_gregorian"}
    return {"units": _WORDS[unit]}


def _objects(values: np.ndarray, what: str) -> tuple[np.ndarray, dict[str, str], dict[str, str]]:
    parts = values.ravel().tolist()
    if all(isinstance(x, str) for x in parts):
        return values.astype(np.dtypes.StringDType()), {"dtype": "object"}, {}
    calendars = {getattr(x, "calendar", None) for x in parts}
    (calendar,) = calendars if len(calendars) == 1 else (None,)
    if calendar not in _CALENDARS:
        strange = next(x for x in parts if not isinstance(x, str))
        raise StoreError(
            f"{what} holds objects, {strange!r} among them; a store keeps strings, and dates of "
            "cftime in one calendar. Convert it"
        )
    import cftime  # whose dates these are

    units = f"microseconds {_EPOCH}"
    counted = np.asarray(cftime.date2num(values, units, calendar=calendar))
    how = {"dtype": "cftime", "calendar": str(calendar)}
    if counted.dtype.kind != "i" or not np.array_equal(restored(counted, how), values):
        raise StoreError(f"{what} has dates that do not count in whole microseconds; round them")
    return counted.astype(np.int64), how, {"units": units, "calendar": str(calendar)}


def restored(values: np.ndarray, how: Mapping[str, str]) -> np.ndarray:
    """The array that :func:`stored` was given.

    Raises
    ------
    DamagedStoreError
        ``how`` is not one of its answers.
    """
    dtype = how.get("dtype")
    if dtype == "string":
        return values
    if dtype == "object":
        return values.astype(object)
    if dtype == "bfloat16" and values.dtype == np.uint16:
        return values.view(jnp.bfloat16)
    if dtype == "cftime" and how.get("calendar") in _CALENDARS and values.dtype == np.int64:
        import cftime

        units = f"microseconds {_EPOCH}"
        found = cftime.num2date(values, units, calendar=how["calendar"])
        return np.asarray(found, object)
    if isinstance(dtype, str) and _TIMES.fullmatch(dtype) and values.dtype == np.int64:
        return values.view(np.dtype(dtype).newbyteorder("=")).astype(dtype)
    if isinstance(dtype, str) and _is_plain(dtype, values.dtype):
        return values.astype(dtype)
    raise DamagedStoreError(f"an array of {values.dtype} cannot have been one of {dict(how)!r}")


def _is_plain(dtype: str, held: np.dtype) -> bool:
    """Whether the dtype is that of the array, or of strings of one length."""
    if _STRINGS.fullmatch(dtype):
        return isinstance(held, np.dtypes.StringDType)
    return bool(_NUMBERS.fullmatch(dtype)) and np.dtype(dtype).newbyteorder("=") == held
