"""Describe the columns of a request table, and cast their values to the dtypes of the fit.

A table has a column of labels for each observation dim, and a column for each variable, or for
each entry of a variable with other dims: ``rain[summer]``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.binding import VariableRef, extra_labels
from xr_aimz.errors import DtypeError, LabelError
from xr_aimz.fits import Fit


@dataclass(frozen=True)
class LabelColumn:
    """Column of labels of an observation dimension.

    ``like`` is the index of the fit, None if the fit had no labels; ``required`` is True if
    a table without the column would have no labels for its draws.
    """

    dim: str
    like: pd.Index | None
    required: bool


@dataclass(frozen=True)
class VariableColumns:
    """Columns of a variable that the model takes.

    Parameters
    ----------
    name : str
    dims : tuple of str
        The observation dimensions that it had at the fit.
    extra : mapping of dim to labels
        The labels along its other dimensions.
    dtype : numpy.dtype, optional
        The dtype at the fit; None if that is not known.
    held : bool
        The fit stores the values, and a table may leave them out.
    """

    name: str
    dims: tuple[str, ...]
    extra: dict[str, tuple[Any, ...]]
    dtype: np.dtype | None
    held: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column_name(self.name, labels) for labels in product(*self.extra.values()))


@dataclass(frozen=True)
class TableSchema:
    """Schema of a table: the columns that it may have; any other column is ignored."""

    labels: tuple[LabelColumn, ...]
    variables: tuple[VariableColumns, ...]
    core_dims: tuple[str, ...] = ()

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(label.dim for label in self.labels)

    @property
    def required(self) -> tuple[str, ...]:
        label_dims = [label.dim for label in self.labels if label.required]
        return (*label_dims, *(c for v in self.variables if not v.held for c in v.columns))


def column_name(name: str, labels: Iterable[Any]) -> str:
    """Return the column of one entry of a variable with other dimensions: ``rain[summer]``."""
    text = ", ".join(_label_text(label) for label in labels)
    return f"{name}[{text}]" if text else name


def duplicate_columns(columns: Iterable[str]) -> LabelError:
    """Make the error for several entries with the same column name."""
    return LabelError(
        f"the table would have several columns called {sorted(set(columns))!r}: labels are joined "
        "by ', ', and a variable may have the name of an entry of another one. Give other labels "
        "or names to the Dataset, and fit with those"
    )


def _label_text(label: Any) -> str:
    if isinstance(label, np.datetime64):
        return str(pd.Timestamp(label).isoformat())
    return str(label)


def table_schema(fit: Fit) -> TableSchema:
    """Return the schema of a table for this fit.

    Raises
    ------
    LabelError
        A dimension has a MultiIndex, which does not fit into a single column; or two columns
        would have the same name.
    """
    binding = fit.binding
    is_only_dim = len(binding.block_dims) == 1
    labels = []
    for dim in binding.block_dims:
        like = fitted_index(fit, dim)
        if isinstance(like, pd.MultiIndex):
            raise LabelError(
                f"dimension {dim!r} has a MultiIndex of {list(like.names)!r}, and a table has one "
                f"column for a dimension; fit with ds.unstack({dim!r}), or with other labels"
            )
        labels.append(LabelColumn(dim, like, required=like is not None or not is_only_dim))
    sources = {s.name: s for a in binding.inputs for s in a.sources}
    variables = tuple(
        _variable_columns(fit, s) for s in sources.values() if not _is_from_labels(fit, s)
    )
    names = Counter([*(c.dim for c in labels), *(c for v in variables for c in v.columns)])
    if duplicates := [name for name, count in names.items() if count > 1]:
        raise duplicate_columns(duplicates)
    core = tuple(d for d in binding.core_dims if d in binding.block_dims)
    return TableSchema(tuple(labels), variables, core)


def fitted_index(fit: Fit, dim: str) -> pd.Index | None:
    """Return the index of a dimension at the fit, or None."""
    for group in (fit.observed_data, fit.constant_data, fit.posterior):
        if dim in group.indexes:
            return group.indexes[dim]
    return None


def _is_from_labels(fit: Fit, source: VariableRef) -> bool:
    """Return whether a variable follows from a label column: ``time`` or ``time.dayofyear``."""
    return source.data is None and source.name.partition(".")[0] in fit.binding.block_dims


def _variable_columns(fit: Fit, source: VariableRef) -> VariableColumns:
    block_dims, labels_by_dim = fit.binding.block_dims, extra_labels(fit.binding)
    is_constant = source.name in fit.constant_data
    at_fit = fit.constant_data[source.name] if is_constant else None
    extra: dict[str, tuple[Any, ...]] = {}
    for dim in (d for d in source.dims if d not in block_dims):
        labels = labels_by_dim.get(dim)
        size = 0 if at_fit is None else at_fit.sizes[dim]
        extra[dim] = tuple(range(size)) if labels is None else tuple(labels)
    return VariableColumns(
        name=source.name,
        dims=tuple(d for d in block_dims if d in source.dims),
        extra=extra,
        dtype=None if at_fit is None else at_fit.dtype,
        # Variables without an observation dim belong to the model, and so do values that were
        # passed as data.
        held=source.data is not None or (is_constant and not set(source.dims) & set(block_dims)),
    )


_DATE = re.compile(
    r"([+-]?\d{4,})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?)?Z?"
)
# Stricter than pandas: "2005" or "20050101" might be a number, and pandas reads "5" as
# nanoseconds.
_ISO_DATE_START = re.compile(r"\s*[+-]?\d{4,}-")
_WITH_UNIT = re.compile(r".*[a-zA-Z:]")
_AS_TEXT = {"M": "; as text with dashes, '2000-01-31'", "m": "; as text with a unit, '5 days'"}
_ROWS_SHOWN = 3


def cast_labels(column: str, values: pd.Series, like: pd.Index | None) -> pd.Index:
    """Cast the labels of a column to the kind of the fit's index.

    Parameters
    ----------
    column : str
    values : Series
    like : Index, optional
        The index of the fit. Without it labels stay as they are.

    Raises
    ------
    LabelError
        A label is missing or of another kind.
    """
    missing = np.flatnonzero(values.isna().to_numpy())
    if len(missing):
        raise LabelError(
            f"column {column!r} has no label in rows {missing[:_ROWS_SHOWN].tolist()!r}; give "
            "each row one"
        )
    if like is None:
        return pd.Index(values.to_numpy() if values.dtype != object else values.tolist())
    if isinstance(like, pd.CategoricalIndex):
        like = like.categories
    result = _convert_labels(column, values, like)
    if result is None:
        raise LabelError(
            f"column {column!r} holds {values.tolist()[0]!r} ({values.dtype}), and the labels of "
            f"{column!r} were {_kind(like)} at the fit, such as {like.tolist()[0]!r}; give those"
            f"{_AS_TEXT.get(getattr(like.dtype, 'kind', 'O'), '')}"
        )
    return result


def _convert_labels(column: str, values: pd.Series, like: pd.Index) -> pd.Index | None:
    kind = getattr(like.dtype, "kind", "O")
    if kind in "fiu":
        return _cast_numbers(values, like)
    if kind == "b":
        return pd.Index(values.to_numpy(bool)) if values.dtype == bool else None
    if kind in "mM":
        return _cast_times(column, values, like)
    if len(like) and type(like[0]).__module__.startswith("cftime"):
        return _cast_cftime(column, values, like[0])
    strings = all(isinstance(value, str) for value in values)
    return pd.Index(values.to_numpy(object), dtype=like.dtype) if strings else None


def _cast_numbers(values: pd.Series, like: pd.Index) -> pd.Index | None:
    numbers = _as_numbers(values)
    if numbers is None or numbers.dtype.kind == "b":
        return None
    converted = numbers.astype(np.dtype(str(like.dtype)))
    return (
        pd.Index(converted)
        if converted.dtype.kind == "f" or (converted == numbers).all()
        else None
    )


def _as_numbers(values: pd.Series) -> np.ndarray | None:
    """Return an array of a numeric dtype, or None if there is any value that is no number."""
    if values.dtype != object:
        array = values.to_numpy()
        return array if getattr(array.dtype, "kind", "O") in "fiub" else _nullable_numbers(values)
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if kind == "boolean" and not values.isna().any():
        return values.to_numpy(bool)
    if kind not in ("integer", "floating", "mixed-integer-float", "decimal", "empty"):
        return None
    if kind == "integer" and not values.isna().any():
        small = all(-(2**63) <= value < 2**63 for value in values)
        return values.to_numpy(np.int64 if small else np.float64)
    return values.to_numpy(np.float64, na_value=np.nan)


def _nullable_numbers(values: pd.Series) -> np.ndarray | None:
    """Return a numpy array of pandas' nullable numbers, NaN where missing; None for others."""
    if not pd.api.types.is_numeric_dtype(values.dtype):
        return None
    if values.isna().any():
        return values.to_numpy(np.float64, na_value=np.nan)
    kind = {"i": np.int64, "u": np.uint64, "b": np.bool_}
    return values.to_numpy(kind.get(getattr(values.dtype, "kind", "f"), np.float64))


def _cast_times(column: str, values: pd.Series, like: pd.Index) -> pd.Index | None:
    is_date = like.dtype.kind == "M"
    if getattr(values.dtype, "kind", "O") in "fiub" or _as_numbers(values) is not None:
        # A number is ambiguous: 2005 is a year, or nanoseconds since 1970.
        return None
    items = values.tolist()
    pattern = _ISO_DATE_START if is_date else _WITH_UNIT
    if not all(pattern.match(value) for value in items if isinstance(value, str)):
        # As ambiguous, in text.
        return None
    try:
        parsed: Any = (
            pd.to_datetime(items, format="ISO8601") if is_date else pd.to_timedelta(items)
        )
    except (ValueError, TypeError):
        return None
    if is_date and parsed.tz is not None:
        parsed = parsed.tz_convert("UTC").tz_localize(None)
    unit = np.datetime_data(np.dtype(str(like.dtype)))[0]
    # Keep the finer unit where the coarser one would change a label.
    coarse = parsed.as_unit(unit)
    return coarse if (coarse == parsed).all() else parsed


def _cast_cftime(column: str, values: pd.Series, example: Any) -> pd.Index | None:
    if all(isinstance(value, type(example)) for value in values):
        return pd.Index(values.tolist())
    dates = []
    for value in values:
        # The same numbers in another calendar are another day, so only text is parsed.
        match = _DATE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            return None
        numbers = [int(n or 0) for n in match.groups()[:-1]]
        fraction = (match[7] or "").ljust(6, "0")
        try:
            dates.append(_make_date(example, numbers, int(fraction)))
        except ValueError as error:
            raise LabelError(
                f"column {column!r} holds {value!r}, and there is no such day in the calendar "
                f"{example.calendar!r} of the fit: {error}"
            ) from None
    return pd.Index(dates)


def _make_date(example: Any, numbers: list[int], fraction: int) -> Any:
    """Make a date of the same calendar; subclasses of ``cftime.datetime`` have a fixed one."""
    if type(example).__name__ != "datetime":
        return type(example)(*numbers, fraction)
    calendar = {"calendar": example.calendar, "has_year_zero": example.has_year_zero}
    return type(example)(*numbers, fraction, **calendar)


def _kind(like: pd.Index) -> str:
    return type(like[0]).__name__ if like.dtype == object and len(like) else str(like.dtype)


def cast_values(column: str, values: pd.Series, dtype: np.dtype | None) -> np.ndarray:
    """Cast the numbers of a column to the kind at the fit: floats, ints or bools.

    A missing value is NaN in a column of floats, and refused in any other.

    Raises
    ------
    DtypeError
        A value is no number, or no whole number where the fit had ints.
    """
    numbers = _as_numbers(values)
    if numbers is None:
        example = next((v for v in values if not isinstance(v, int | float | np.number)), None)
        raise DtypeError(
            f"column {column!r} holds {example!r} ({values.dtype}); the model takes "
            f"{'numbers' if dtype is None else dtype} there: convert the column"
        )
    if dtype is None:
        return numbers
    if dtype.kind == "f":
        return numbers.astype(np.float64)
    converted = np.nan_to_num(numbers).astype(dtype)
    changed = np.flatnonzero(converted != numbers)
    if len(changed):
        raise DtypeError(
            f"column {column!r} holds {numbers[changed[0]].item()!r} in row {int(changed[0])}; it "
            f"was {dtype} at the fit, which has no such value: convert the column"
        )
    return converted
