"""What a table's cells hold, in the dtype that the fit knows: labels and values.

JSON has no dates and one kind of number, a spreadsheet writes 2005 as 2005.0. A draw is
addressed by its label's value and kind, so labels are turned into the fit's own kind, and
what cannot be turned without a guess is refused.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.errors import DtypeError, LabelError

__all__ = ["labels_like", "values_like"]

_DATE = re.compile(
    r"([+-]?\d{4,})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?)?Z?"
)
# Of what pandas reads: "2005" or "20050101" might be a number, and "5" are nanoseconds to it.
_DASHED = re.compile(r"\s*[+-]?\d{4,}-")
_UNIT = re.compile(r".*[a-zA-Z:]")
_AS_TEXT = {"M": "; as text with dashes, '2000-01-31'", "m": "; as text with a unit, '5 days'"}
_SHOWN = 3


def labels_like(column: str, values: pd.Series, like: pd.Index | None) -> pd.Index:
    """A column's labels, of the kind that the fit's index has.

    Parameters
    ----------
    column : str
    values : Series
    like : Index, optional
        The fit's. Without it labels stay as they are.

    Raises
    ------
    LabelError
        A missing label, or one that is of another kind.
    """
    empty = np.flatnonzero(values.isna().to_numpy())
    if len(empty):
        raise LabelError(
            f"column {column!r} has no label in rows {empty[:_SHOWN].tolist()!r}; give each row "
            "one"
        )
    if like is None:
        return pd.Index(values.to_numpy() if values.dtype != object else values.tolist())
    if isinstance(like, pd.CategoricalIndex):
        like = like.categories
    found = _converted(column, values, like)
    if found is None:
        raise LabelError(
            f"column {column!r} holds {values.tolist()[0]!r} ({values.dtype}), and the labels of "
            f"{column!r} were {_named(like)} at the fit, such as {like.tolist()[0]!r}; give those"
            f"{_AS_TEXT.get(getattr(like.dtype, 'kind', 'O'), '')}"
        )
    return found


def _converted(column: str, values: pd.Series, like: pd.Index) -> pd.Index | None:
    kind = getattr(like.dtype, "kind", "O")
    if kind in "fiu":
        return _numbers(values, like)
    if kind == "b":
        return pd.Index(values.to_numpy(bool)) if values.dtype == bool else None
    if kind in "mM":
        return _times(column, values, like)
    if len(like) and type(like[0]).__module__.startswith("cftime"):
        return _cftime(column, values, like[0])
    strings = all(isinstance(value, str) for value in values)
    return pd.Index(values.to_numpy(object), dtype=like.dtype) if strings else None


def _numbers(values: pd.Series, like: pd.Index) -> pd.Index | None:
    numbers = _as_numbers(values)
    if numbers is None or numbers.dtype.kind == "b":
        return None
    cast = numbers.astype(np.dtype(str(like.dtype)))
    return pd.Index(cast) if cast.dtype.kind == "f" or (cast == numbers).all() else None


def _as_numbers(values: pd.Series) -> np.ndarray | None:
    """An array of a number's dtype; None if there is anything but numbers."""
    if values.dtype != object:
        array = values.to_numpy()
        return array if getattr(array.dtype, "kind", "O") in "fiub" else _of_nullable(values)
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind == "boolean" and not values.isna().any():
        return values.to_numpy(bool)
    if kind not in ("integer", "floating", "mixed-integer-float", "decimal", "empty"):
        return None
    if kind == "integer" and not values.isna().any():
        small = all(-(2**63) <= value < 2**63 for value in values)
        return values.to_numpy(np.int64 if small else np.float64)
    return values.to_numpy(np.float64, na_value=np.nan)


def _of_nullable(values: pd.Series) -> np.ndarray | None:
    """Of pandas' own numbers with a place for the missing."""
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return None
    if values.isna().any():
        return values.to_numpy(np.float64, na_value=np.nan)
    kind = {"i": np.int64, "u": np.uint64, "b": np.bool_}
    return values.to_numpy(kind.get(getattr(values.dtype, "kind", "f"), np.float64))


def _times(column: str, values: pd.Series, like: pd.Index) -> pd.Index | None:
    dates = like.dtype.kind == "M"
    if getattr(values.dtype, "kind", "O") in "fiub" or _as_numbers(values) is not None:
        # 2005: a year, or nanoseconds since 1970?
        return None
    given = values.tolist()
    clear = _DASHED if dates else _UNIT
    if not all(clear.match(value) for value in given if isinstance(value, str)):
        # The same guess, as text.
        return None
    try:
        read: Any = pd.to_datetime(given, format="ISO8601") if dates else pd.to_timedelta(given)
    except (ValueError, TypeError):
        return None
    if dates and read.tz is not None:
        read = read.tz_convert("UTC").tz_localize(None)
    unit = np.datetime_data(np.dtype(str(like.dtype)))[0]
    # A unit that is too coarse for a label would make another one of it.
    coarse = read.as_unit(unit)
    return coarse if (coarse == read).all() else read


def _cftime(column: str, values: pd.Series, one: Any) -> pd.Index | None:
    if all(isinstance(value, type(one)) for value in values):
        return pd.Index(values.tolist())
    made = []
    for value in values:
        # Dates of another calendar are other days.
        match = _DATE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return None
        numbers = [int(n or 0) for n in match.groups()[:-1]]
        fraction = (match[7] or "").ljust(6, "0")
        try:
            made.append(_date(one, numbers, int(fraction)))
        except ValueError as error:
            raise LabelError(
                f"column {column!r} holds {value!r}, and there is no such day in the calendar "
                f"{one.calendar!r} of the fit: {error}"
            ) from None
    return pd.Index(made)


def _date(one: Any, numbers: list[int], fraction: int) -> Any:
    """A date of the same calendar; subclasses of ``cftime.datetime`` fix theirs."""
    if type(one).__name__ != "datetime":
        return type(one)(*numbers, fraction)
    calendar = {"calendar": one.calendar, "has_year_zero": one.has_year_zero}
    return type(one)(*numbers, fraction, **calendar)


def _named(like: pd.Index) -> str:
    return type(like[0]).__name__ if like.dtype == object and len(like) else str(like.dtype)


def values_like(column: str, values: pd.Series, dtype: np.dtype | None) -> np.ndarray:
    """A column's numbers, in the kind that the fit had: floats, ints or bools.

    A missing value is NaN in a column of floats, and refused in any other.

    Raises
    ------
    DtypeError
        What is no number, or no whole one where the fit had those.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        odd = next((v for v in values if not isinstance(v, int | float | np.number)), None)
        raise DtypeError(
            f"column {column!r} holds {odd!r} ({values.dtype}); the model takes "
            f"{'numbers' if dtype is None else dtype} there: convert the column"
        )
    if dtype is None:
        return numbers
    if dtype.kind == "f":
        return numbers.astype(np.float64)
    kept = np.nan_to_num(numbers).astype(dtype)
    other = np.flatnonzero(kept != numbers)
    if len(other):
        raise DtypeError(
            f"column {column!r} holds {numbers[other[0]].item()!r} in row {int(other[0])}; it was "
            f"{dtype} at the fit, which has no such value: convert the column"
        )
    return kept
