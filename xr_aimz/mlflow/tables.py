"""Convert rows of a table to Datasets on grids of labels, and results back to rows.

Rows are split into groups whose grids are mostly full, since one sparse grid of all rows would
have many cells that no row asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import DimensionError, LabelError, MissingVariableError, OptionError
from xr_aimz.mlflow.columns import (
    LabelColumn,
    TableSchema,
    VariableColumns,
    cast_labels,
    cast_values,
    column_name,
    duplicate_columns,
)

# One grid is cheaper than two if it has at most _SMALL_GRID cells, or _MAX_SPARSITY cells for
# each of its rows.
_SMALL_GRID = 1024
_MAX_SPARSITY = 4


@dataclass(frozen=True)
class RowGroup:
    """Rows of a table with the grid of labels that contains them.

    Parameters
    ----------
    rows : array of int
        The positions of the rows in the table.
    labels : mapping of dim to pandas.Index
        The labels of the grid.
    places : mapping of dim to array of int
        The position of each row in the grid.
    """

    rows: np.ndarray
    labels: dict[str, pd.Index]
    places: dict[str, np.ndarray]


def group_rows(
    labels: dict[str, pd.Index], columns: Sequence[LabelColumn], core_dims: Sequence[str]
) -> Iterator[RowGroup]:
    """Split the rows of a table into groups, each with a grid of labels.

    Parameters
    ----------
    labels : mapping of dim to pandas.Index
        The labels of each row.
    columns : sequence of LabelColumn
    core_dims : sequence of str

    Raises
    ------
    LabelError
        Two rows have the same labels; rows along a core dimension make no grid, or have new
        labels whose order does not follow from the fit.
    """
    like = {column.dim: column.like for column in columns}
    uniques, codes = {}, {}
    for dim, row_labels in labels.items():
        grid = _order_labels(dim, row_labels.unique(), like[dim], dim in core_dims)
        uniques[dim], codes[dim] = grid, grid.get_indexer(row_labels)
    table = pd.DataFrame(codes)
    _check_distinct(table, labels)
    for rows in _groups_alike(table, core_dims):
        for part in _split_sparse(table, rows, [d for d in labels if d not in core_dims]):
            yield _make_row_group(part, table, uniques)


def _order_labels(dim: str, labels: pd.Index, like: pd.Index | None, core: bool) -> pd.Index:
    """Return the sorted labels of a grid; along a core dim, in the order of the fit."""
    if core and like is not None and labels.isin(like).all():
        return like[like.isin(labels)]
    try:
        ascending = labels.sort_values()
    except TypeError:
        ascending = labels
    if core and like is not None and not like.is_monotonic_increasing:
        if not like.is_monotonic_decreasing:
            new = labels.difference(like, sort=False)
            raise LabelError(
                f"column {dim!r} has new labels, {list(new[:3])!r} among them, along a core_dim "
                f"whose labels are in no order at the fit: {list(like[:5])!r}. The position of "
                "new labels is undefined; give labels of the fit"
            )
        return ascending[::-1]
    return ascending


def _check_distinct(table: pd.DataFrame, labels: dict[str, pd.Index]) -> None:
    duplicate_mask = table.duplicated(keep=False).to_numpy()
    if duplicate_mask.any():
        first = int(np.flatnonzero(duplicate_mask)[0])
        same = (table == table.iloc[first]).all(axis=1).to_numpy()
        shown = {dim: row_labels[[first]].tolist()[0] for dim, row_labels in labels.items()}
        raise LabelError(
            f"rows {np.flatnonzero(same)[:3].tolist()!r} have the same labels, {shown!r}: a draw "
            "is addressed by them, so two rows would be one cell. Drop one, or give one a label "
            "of its own"
        )


def _groups_alike(table: pd.DataFrame, core_dims: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield rows that may share a grid: all rows, or those whose series have the same labels."""
    if not core_dims:
        yield np.arange(len(table))
        return
    others = [d for d in table.columns if d not in core_dims]
    all_rows = [np.arange(len(table))]
    series = map(np.asarray, table.groupby(others).indices.values()) if others else all_rows
    alike: dict[bytes, list[np.ndarray]] = {}
    core = table[list(core_dims)].to_numpy()
    for rows in series:
        series_codes = core[rows]
        if prod(len(np.unique(c)) for c in series_codes.T) != len(rows):
            raise LabelError(
                f"rows {rows[:3].tolist()!r} and {len(rows) - min(len(rows), 3)} more have labels "
                f"of core_dim {list(core_dims)!r} that make no whole grid; the model couples "
                "them, so give all of them"
            )
        alike.setdefault(series_codes[np.lexsort(series_codes.T)].tobytes(), []).append(rows)
    for group in alike.values():
        yield np.concatenate(group)


def _split_sparse(
    table: pd.DataFrame, rows: np.ndarray, dims: Sequence[str]
) -> Iterator[np.ndarray]:
    """Yield the rows, halved along the longest dim as long as their grid is mostly empty."""
    codes = table.to_numpy()[rows]
    lengths = [len(np.unique(c)) for c in codes.T]
    free = [i for i, d in enumerate(table.columns) if d in dims and lengths[i] > 1]
    if prod(lengths) <= max(_MAX_SPARSITY * len(rows), _SMALL_GRID) or not free:
        yield rows
        return
    longest_codes = codes[:, max(free, key=lambda i: lengths[i])]
    upper_mask = longest_codes >= np.unique(longest_codes)[len(np.unique(longest_codes)) // 2]
    yield from _split_sparse(table, rows[~upper_mask], dims)
    yield from _split_sparse(table, rows[upper_mask], dims)


def _make_row_group(
    rows: np.ndarray, table: pd.DataFrame, uniques: dict[str, pd.Index]
) -> RowGroup:
    rows = np.sort(rows)
    labels, positions = {}, {}
    for dim, index in uniques.items():
        codes, positions[dim] = np.unique(table[dim].to_numpy()[rows], return_inverse=True)
        labels[dim] = index[codes]
    return RowGroup(rows, labels, positions)


def tables_to_datasets(
    table: pd.DataFrame, columns: TableSchema, held: xr.Dataset
) -> Iterator[tuple[RowGroup, xr.Dataset]]:
    """Yield groups of the rows of a table, each with the Dataset of its grid.

    Cells of a grid without a row have the values of some row: their results are not used, and
    no cell depends on another.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows in any order.
    columns : TableSchema
        The schema of the fit; other columns of the table are ignored.
    held : Dataset
        Variables of the fit without an observation dim, used if the table leaves them out.

    Raises
    ------
    MissingVariableError
        A column is missing.
    LabelError, DtypeError, DimensionError
        Labels are missing, duplicate or of another kind; a value is no number; values of a
        variable differ along a dimension that it did not have at the fit.
    """
    _check_columns(table, columns)
    labels = _read_labels(table, columns)
    values = {
        name: cast_values(name, table[name], variable.dtype)
        for variable in columns.variables
        for name in variable.columns
        if name in table
    }
    for variable in columns.variables:
        for name in (c for c in variable.columns if c in values):
            _check_constant(variable, name, values[name], labels)
    shared = {
        str(n): a
        for n, a in held.items()
        if n in {v.name for v in columns.variables if v.held} and not set(a.dims) & set(labels)
    }
    unlabelled = {c.dim for c in columns.labels if c.dim not in table}
    for group in group_rows(labels, columns.labels, columns.core_dims):
        arrays = {
            v.name: _make_variable(v, values, group)
            for v in columns.variables
            if _has_columns(v, values)
        }
        coords = {d: index for d, index in group.labels.items() if d not in unlabelled}
        yield group, xr.Dataset({**shared, **arrays}, coords=coords)


def _check_columns(table: pd.DataFrame, columns: TableSchema) -> None:
    names = [str(c) for c in table.columns]
    if duplicates := sorted({c for c in names if names.count(c) > 1}):
        raise MissingVariableError(
            f"the table has several columns called {duplicates!r}; keep one"
        )
    if not len(table):
        raise DimensionError("the table has no rows: there is nothing to compute on")
    if missing := [c for c in columns.required if c not in table]:
        described = [f"{c!r} (labels of a dimension)" for c in missing if c in columns.dims]
        described += [f"{c!r} (a variable)" for c in missing if c not in columns.dims]
        raise MissingVariableError(
            f"the table lacks columns {', '.join(described)}; it has {names!r}. Add them: a row "
            "is a cell, with a column for each of its labels and for each variable of the model"
        )


def _read_labels(table: pd.DataFrame, columns: TableSchema) -> dict[str, pd.Index]:
    labels = {}
    for label in columns.labels:
        if label.dim in table:
            labels[label.dim] = cast_labels(label.dim, table[label.dim], label.like)
        else:
            # As in a Dataset without a coordinate, the label of a row is its position.
            labels[label.dim] = pd.RangeIndex(len(table))
    return labels


def _has_columns(variable: VariableColumns, values: Mapping[str, np.ndarray]) -> bool:
    present = [c for c in variable.columns if c in values]
    if present and len(present) < len(variable.columns):
        missing = [c for c in variable.columns if c not in values]
        raise MissingVariableError(f"the table has columns {present!r} but lacks {missing!r}")
    return bool(present)


def _make_variable(
    variable: VariableColumns, values: Mapping[str, np.ndarray], group: RowGroup
) -> xr.DataArray:
    """Return one variable on the grid of a group of rows."""
    shape = tuple(len(group.labels[d]) for d in variable.dims)
    arrays = [_fill_grid(variable, values[c][group.rows], shape, group) for c in variable.columns]
    extra_sizes = tuple(len(labels) for labels in variable.extra.values())
    stacked = np.stack(arrays, axis=-1).reshape(shape + extra_sizes)
    coords = {d: list(labels) for d, labels in variable.extra.items()}
    return xr.DataArray(stacked, coords, (*variable.dims, *variable.extra))


def _fill_grid(
    variable: VariableColumns,
    values: np.ndarray,
    shape: tuple[int, ...],
    group: RowGroup,
) -> np.ndarray:
    grid = np.full(shape, values[0], values.dtype)
    if variable.dims:
        grid[tuple(group.places[d] for d in variable.dims)] = values
    return grid


def _check_constant(
    variable: VariableColumns, column: str, values: np.ndarray, labels: Mapping[str, pd.Index]
) -> None:
    """Check that a variable has one value in all rows with the same labels along its dims."""
    if len(variable.dims) == len(labels):
        return
    first = _first_equal_rows(variable.dims, labels, len(values))
    firsts = values[first]
    different_rows = np.flatnonzero(~((firsts == values) | (np.isnan(values) & np.isnan(firsts))))
    if not len(different_rows):
        return
    row = different_rows[0]
    alike = {d: labels[d][row] for d in variable.dims}
    where = f"rows with {alike!r}" if alike else f"rows {first[row]} and {row}"
    raise DimensionError(
        f"column {column!r} has the values {values[row].item()!r} and {firsts[row].item()!r} in "
        f"{where}, where the fit had one: {variable.name!r} had dims "
        f"{variable.dims!r} there. Give those rows one value, or fit with the other "
        "dimensions too"
    )


def _first_equal_rows(
    dims: Sequence[str], labels: Mapping[str, pd.Index], rows: int
) -> np.ndarray:
    """Return for each row, int ``(row,)``, the first row with the same labels along ``dims``."""
    if not dims:
        return np.zeros(rows, int)
    groups = pd.DataFrame({d: pd.factorize(labels[d])[0] for d in dims}).groupby(list(dims))
    _, first, group = np.unique(groups.ngroup(), return_index=True, return_inverse=True)
    return first[group]


_DRAWS = ("chain", "draw")
_INDEX_COLUMNS = ("row", *_DRAWS)


def summary_table(results: Iterable[tuple[RowGroup, xr.Dataset]], index: pd.Index) -> pd.DataFrame:
    """Return a table with a row for each row of the request, with the same index.

    A column is NaN in rows whose group lacks it, such as an entry of a series that is longer
    in other groups.

    Parameters
    ----------
    results : iterable of (RowGroup, Dataset)
        Groups of rows with the computed statistics of their cells.
    index : Index
        The index of the table of the request.

    Raises
    ------
    LabelError
        Two columns would have the same name.
    """
    buffer = _ColumnBuffer((len(index),))
    for group, ds in results:
        buffer.put(group.rows, _result_columns(ds, group))
    return pd.DataFrame(buffer.columns(), index=index)


def draws_table(results: Iterable[tuple[RowGroup, xr.Dataset]], rows: int) -> pd.DataFrame:
    """Return a row for each draw of each row: ``row``, ``chain``, ``draw`` and the variables.

    Parameters
    ----------
    results : iterable of (RowGroup, Dataset)
        Groups of rows with the computed draws of their cells.
    rows : int
        The number of rows of the request; ``row`` counts them from 0.

    Raises
    ------
    LabelError
        Two columns would have the same name.
    OptionError
        A variable has the name of one of the three columns.
    """
    buffer: _ColumnBuffer | None = None
    numbers: dict[str, np.ndarray] = {}
    for group, ds in results:
        numbers = {d: ds[d].to_numpy() for d in _DRAWS}
        buffer = buffer or _ColumnBuffer((rows, *(len(n) for n in numbers.values())))
        buffer.put(group.rows, _result_columns(ds, group, _DRAWS))
    columns = {} if buffer is None else buffer.columns()
    _check_column_names(columns)
    grid = np.meshgrid(np.arange(rows), *numbers.values(), indexing="ij")
    named = dict(zip(_INDEX_COLUMNS, grid, strict=True)) | columns
    return pd.DataFrame({column: values.ravel() for column, values in named.items()})


def _check_column_names(columns: Iterable[str]) -> None:
    if clashes := [c for c in columns if c in _INDEX_COLUMNS]:
        raise OptionError(
            f"returns='draws' makes columns {list(_INDEX_COLUMNS)!r} of its own, and the fit has "
            f"{clashes!r} too; ask for a summary or other sites, or rename it at the fit"
        )


class _ColumnBuffer:
    """Columns filled group by group; a group may lack some of them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._values: dict[str, np.ndarray] = {}
        self._there: dict[str, np.ndarray] = {}

    def put(self, rows: np.ndarray, columns: Iterable[tuple[str, np.ndarray]]) -> None:
        names: set[str] = set()
        for column, values in columns:
            if column in names:
                raise duplicate_columns([column])
            names.add(column)
            if column not in self._values:
                self._values[column] = np.zeros(self._shape, values.dtype)
                self._there[column] = np.zeros(self._shape[0], bool)
            self._values[column][rows] = values
            self._there[column][rows] = True

    def columns(self) -> dict[str, np.ndarray]:
        return {name: _mask_empty_rows(v, self._there[name]) for name, v in self._values.items()}


def _mask_empty_rows(values: np.ndarray, has_value: np.ndarray) -> np.ndarray:
    """Return the values with NaN in rows that have none; ints and bools then become floats."""
    if has_value.all():
        return values
    floats = values if values.dtype.kind == "f" else values.astype(np.float64)
    floats[~has_value] = np.nan
    return floats


def _result_columns(
    ds: xr.Dataset, group: RowGroup, axis_dims: tuple[str, ...] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the columns of each variable, ``(row, *axis_dims)``: one for each entry."""
    for name, array in ds.data_vars.items():
        cell = [d for d in group.places if d in array.dims]
        draw_dims = [d for d in axis_dims if d in array.dims]
        rest = [str(d) for d in array.dims if d not in (*cell, *draw_dims)]
        values = array.transpose(*cell, *draw_dims, *rest).to_numpy()
        values = values[tuple(group.places[d] for d in cell)] if cell else values[None]
        lengths = (len(group.rows), *(ds.sizes[d] for d in axis_dims))
        entry_sizes = values.shape[1 + len(draw_dims) :]
        if len(draw_dims) < len(axis_dims):
            values = values.reshape(len(values), *(1,) * len(axis_dims), *entry_sizes)
        values = np.broadcast_to(values, (*lengths, *entry_sizes))
        labels: list[list[Any]] = [list(array[d].to_numpy()) for d in rest]
        for entry, entry_labels in zip(np.ndindex(*entry_sizes), product(*labels), strict=True):
            yield column_name(str(name), entry_labels), values[(..., *entry)]
