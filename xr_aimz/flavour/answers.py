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

from xr_aimz.flavour.columns import entry
from xr_aimz.flavour.pieces import Piece

__all__ = ["draws_table", "summary_table"]

_DRAWS = ("chain", "draw")


def summary_table(results: Iterable[tuple[Piece, xr.Dataset]], index: pd.Index) -> pd.DataFrame:
    """A row for each row that was asked for, with its index.

    Parameters
    ----------
    results : iterable of (Piece, Dataset)
        Each with the statistics of the cells of a piece, computed.
    index : Index
        Of the table that was asked with.
    """
    found: dict[str, np.ndarray] = {}
    for piece, ds in results:
        for column, values in _columns(ds, piece):
            found.setdefault(column, np.empty(len(index), values.dtype))[piece.rows] = values
    return pd.DataFrame(found, index=index)


def draws_table(results: Iterable[tuple[Piece, xr.Dataset]], rows: int) -> pd.DataFrame:
    """A row for each draw of each row: columns ``row``, ``chain``, ``draw`` and the variables.

    Parameters
    ----------
    results : iterable of (Piece, Dataset)
        Each with the draws of the cells of a piece, computed.
    rows : int
        How many were asked for; ``row`` counts them from 0.
    """
    found: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    for piece, ds in results:
        numbers = {d: ds[d].to_numpy() for d in _DRAWS}
        shape = (rows, *(len(n) for n in numbers.values()))
        for column, values in _columns(ds, piece, _DRAWS):
            found.setdefault(column, np.empty(shape, values.dtype))[piece.rows] = values
    grid = np.meshgrid(np.arange(rows), *numbers.values(), indexing="ij")
    named = dict(zip(("row", *_DRAWS), grid, strict=True)) | found
    return pd.DataFrame({column: values.ravel() for column, values in named.items()})


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
