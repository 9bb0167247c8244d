"""Results of a fit as a table, in the order of the rows that were asked for.

A column is called what ``predict(..., summary=...)`` calls the variable, followed by the
labels of the dimensions that no row has: ``tas_mean``, ``tas_quantile[0.05]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import OptionError
from xr_aimz.flavour.columns import entry, same_name
from xr_aimz.flavour.pieces import Piece

__all__ = ["draws_table", "summary_table"]

_DRAWS = ("chain", "draw")
_NUMBERS = ("row", *_DRAWS)


def summary_table(results: Iterable[tuple[Piece, xr.Dataset]], index: pd.Index) -> pd.DataFrame:
    """A row for each row that was asked for, with its index.

    A column that the piece of a row has not, an entry of a series that is longer elsewhere, is
    NaN there.

    Parameters
    ----------
    results : iterable of (Piece, Dataset)
        Each with the statistics of the cells of a piece, computed.
    index : Index
        Of the table that was asked with.

    Raises
    ------
    LabelError
        Two columns would have the same name.
    """
    found = _Gathered((len(index),))
    for piece, ds in results:
        found.put(piece.rows, _columns(ds, piece))
    return pd.DataFrame(found.columns(), index=index)


def draws_table(results: Iterable[tuple[Piece, xr.Dataset]], rows: int) -> pd.DataFrame:
    """A row for each draw of each row: columns ``row``, ``chain``, ``draw`` and the variables.

    Parameters
    ----------
    results : iterable of (Piece, Dataset)
        Each with the draws of the cells of a piece, computed.
    rows : int
        How many were asked for; ``row`` counts them from 0.

    Raises
    ------
    LabelError
        Two columns would have the same name.
    OptionError
        A variable is called as one of the three columns is.
    """
    found: _Gathered | None = None
    numbers: dict[str, np.ndarray] = {}
    for piece, ds in results:
        numbers = {d: ds[d].to_numpy() for d in _DRAWS}
        found = found or _Gathered((rows, *(len(n) for n in numbers.values())))
        found.put(piece.rows, _columns(ds, piece, _DRAWS))
    columns = {} if found is None else found.columns()
    _check_free(columns)
    grid = np.meshgrid(np.arange(rows), *numbers.values(), indexing="ij")
    named = dict(zip(_NUMBERS, grid, strict=True)) | columns
    return pd.DataFrame({column: values.ravel() for column, values in named.items()})


def _check_free(columns: Iterable[str]) -> None:
    if taken := [c for c in columns if c in _NUMBERS]:
        raise OptionError(
            f"returns='draws' makes columns {list(_NUMBERS)!r} of its own, and the fit has "
            f"{taken!r} too; ask for a summary or other sites, or call it otherwise at the fit"
        )


class _Gathered:
    """Columns that pieces of rows are put into, each of which may lack some."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._values: dict[str, np.ndarray] = {}
        self._there: dict[str, np.ndarray] = {}

    def put(self, rows: np.ndarray, columns: Iterable[tuple[str, np.ndarray]]) -> None:
        own: set[str] = set()
        for column, values in columns:
            if column in own:
                raise same_name([column])
            own.add(column)
            if column not in self._values:
                self._values[column] = np.zeros(self._shape, values.dtype)
                self._there[column] = np.zeros(self._shape[0], bool)
            self._values[column][rows] = values
            self._there[column][rows] = True

    def columns(self) -> dict[str, np.ndarray]:
        return {name: _holed(v, self._there[name]) for name, v in self._values.items()}


def _holed(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The values, and NaN in rows that have none, for which ints and bools become floats."""
    if there.all():
        return values
    found = values if values.dtype.kind == "f" else values.astype(np.float64)
    found[~there] = np.nan
    return found


def _columns(
    ds: xr.Dataset, piece: Piece, kept: tuple[str, ...] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of each variable: an entry for each row, and after it the dims ``kept``."""
    for name, array in ds.data_vars.items():
        cell = [d for d in piece.places if d in array.dims]
        more = [d for d in kept if d in array.dims]
        rest = [str(d) for d in array.dims if d not in (*cell, *more)]
        values = array.transpose(*cell, *more, *rest).to_numpy()
        values = values[tuple(piece.places[d] for d in cell)] if cell else values[None]
        lengths = (len(piece.rows), *(ds.sizes[d] for d in kept))
        ends = values.shape[1 + len(more) :]
        if len(more) < len(kept):
            values = values.reshape(len(values), *(1,) * len(kept), *ends)
        values = np.broadcast_to(values, (*lengths, *ends))
        labels: list[list[Any]] = [list(array[d].to_numpy()) for d in rest]
        for place, own in zip(np.ndindex(*ends), product(*labels), strict=True):
            yield entry(str(name), own), values[(..., *place)]
