"""A table as the Datasets that a fit can be asked with.

A row is a cell: its labels say where it is, its values what the model takes there. A variable
that lacks a dimension, a year's forcing in a table of years and sites, is given in every row,
and must be the same in all that share its labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import DimensionError, MissingVariableError
from xr_aimz.flavour.columns import Columns, Variable
from xr_aimz.flavour.pieces import Piece, pieces
from xr_aimz.flavour.typed import labels_like, values_like

__all__ = ["datasets"]


def datasets(
    table: pd.DataFrame, columns: Columns, held: xr.Dataset
) -> Iterator[tuple[Piece, xr.Dataset]]:
    """A table's rows, in pieces, each with the Dataset of its grid.

    Cells of a grid that no row is for hold the values of a row: what comes out there is not
    looked at, and no cell sees another.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows in any order.
    columns : Columns
        Of the fit; others that the table has are left alone.
    held : Dataset
        Variables of the fit that vary with no cell, for those that the table leaves out.

    Raises
    ------
    MissingVariableError
        A column is missing.
    LabelError, DtypeError, DimensionError
        Labels that are missing, given twice or of another kind; what is no number; a value
        that differs where the fit had none of that dimension.
    """
    _check_columns(table, columns)
    labels = _labels(table, columns)
    values = {
        name: values_like(name, table[name], variable.dtype)
        for variable in columns.variables
        for name in variable.columns
        if name in table
    }
    for variable in columns.variables:
        for name in (c for c in variable.columns if c in values):
            _check_same(variable, name, values[name], labels)
    shared = {
        str(n): a
        for n, a in held.items()
        if n in {v.name for v in columns.variables if v.held} and not set(a.dims) & set(labels)
    }
    unlabelled = {c.dim for c in columns.labels if c.dim not in table}
    for piece in pieces(labels, columns.labels, columns.core_dims):
        made = {
            v.name: _variable(v, values, piece) for v in columns.variables if _given(v, values)
        }
        coords = {d: own for d, own in piece.labels.items() if d not in unlabelled}
        yield piece, xr.Dataset({**shared, **made}, coords=coords)


def _check_columns(table: pd.DataFrame, columns: Columns) -> None:
    there = [str(c) for c in table.columns]
    if twice := sorted({c for c in there if there.count(c) > 1}):
        raise MissingVariableError(f"the table has several columns called {twice!r}; keep one")
    if not len(table):
        raise DimensionError("the table has no rows: there is nothing to compute on")
    if absent := [c for c in columns.required if c not in table]:
        what = [f"{c!r} (labels of a dimension)" for c in absent if c in columns.dims]
        what += [f"{c!r} (a variable)" for c in absent if c not in columns.dims]
        raise MissingVariableError(
            f"the table lacks columns {', '.join(what)}; it has {there!r}. Add them: a row is a "
            "cell, with a column for each of its labels and each variable that the model takes"
        )


def _labels(table: pd.DataFrame, columns: Columns) -> dict[str, pd.Index]:
    found = {}
    for label in columns.labels:
        if label.dim in table:
            found[label.dim] = labels_like(label.dim, table[label.dim], label.like)
        else:
            # As in a Dataset without a coordinate: a row's label is its position.
            found[label.dim] = pd.RangeIndex(len(table))
    return found


def _given(variable: Variable, values: Mapping[str, np.ndarray]) -> bool:
    there = [c for c in variable.columns if c in values]
    if there and len(there) < len(variable.columns):
        absent = [c for c in variable.columns if c not in values]
        raise MissingVariableError(f"the table has columns {there!r} but lacks {absent!r}")
    return bool(there)


def _variable(variable: Variable, values: Mapping[str, np.ndarray], piece: Piece) -> xr.DataArray:
    """One variable on the grid of a piece."""
    shape = tuple(len(piece.labels[d]) for d in variable.dims)
    arrays = [_on_grid(variable, c, values[c][piece.rows], shape, piece) for c in variable.columns]
    ends = tuple(len(labels) for labels in variable.extra.values())
    stacked = np.stack(arrays, axis=-1).reshape(shape + ends)
    coords = {d: list(labels) for d, labels in variable.extra.items()}
    return xr.DataArray(stacked, coords, (*variable.dims, *variable.extra))


def _on_grid(
    variable: Variable, column: str, values: np.ndarray, shape: tuple[int, ...], piece: Piece
) -> np.ndarray:
    grid = np.full(shape, values[0], values.dtype)
    if variable.dims:
        grid[tuple(piece.places[d] for d in variable.dims)] = values
    return grid


def _check_same(
    variable: Variable, column: str, values: np.ndarray, labels: Mapping[str, pd.Index]
) -> None:
    """Rows that share the labels of a variable's dimensions hold one value of it."""
    if len(variable.dims) == len(labels):
        return
    first = _first_alike(variable.dims, labels, len(values))
    there = values[first]
    other = np.flatnonzero(~((there == values) | (np.isnan(values) & np.isnan(there))))
    if not len(other):
        return
    row = other[0]
    alike = {d: labels[d][row] for d in variable.dims}
    where = f"rows with {alike!r}" if alike else f"rows {first[row]} and {row}"
    raise DimensionError(
        f"column {column!r} has the values {values[row].item()!r} and {there[row].item()!r} "
        f"in {where}, where the fit had one: {variable.name!r} had dims "
        f"{variable.dims!r} there. Give those rows one value, or fit with the other "
        "dimensions too"
    )


def _first_alike(dims: Sequence[str], labels: Mapping[str, pd.Index], rows: int) -> np.ndarray:
    """For each row the first with the same labels along some dimensions."""
    if not dims:
        return np.zeros(rows, int)
    groups = pd.DataFrame({d: pd.factorize(labels[d])[0] for d in dims}).groupby(list(dims))
    _, first, group = np.unique(groups.ngroup(), return_index=True, return_inverse=True)
    return first[group]
