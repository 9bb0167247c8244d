"""Rows of a table, sorted into pieces that are grids or nearly so.

A model sees a grid, and rows are cells of one. A table may have any of them: all, in any
order, or a few that lie far apart. Its rows are halved until the grid around each piece has
not many more cells than the piece has rows. What a dimension of ``core_dim`` couples stays
together, in the order of the fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import pandas as pd

from xr_aimz.errors import LabelError
from xr_aimz.flavour.columns import LabelColumn

__all__ = ["Piece", "pieces"]

# Below so many cells, or up to so many times the rows, one grid is cheaper than two.
_FEW = 1024
_SPARE = 4


@dataclass(frozen=True)
class Piece:
    """Some rows of a table and the grid that they are in.

    Parameters
    ----------
    rows : array of int
        Their positions in the table.
    labels : mapping of dim to pandas.Index
        Of the grid.
    places : mapping of dim to array of int
        Where each row is in it.
    """

    rows: np.ndarray
    labels: dict[str, pd.Index]
    places: dict[str, np.ndarray]


def pieces(
    labels: dict[str, pd.Index], columns: Sequence[LabelColumn], core_dims: Sequence[str]
) -> Iterator[Piece]:
    """The rows of a table in pieces.

    Parameters
    ----------
    labels : mapping of dim to pandas.Index
        The labels of each row.
    columns : sequence of LabelColumn
    core_dims : sequence of str

    Raises
    ------
    LabelError
        Two rows with the same labels; rows of a core dimension that make no grid, or labels
        there whose order the fit does not tell.
    """
    like = {column.dim: column.like for column in columns}
    uniques, codes = {}, {}
    for dim, own in labels.items():
        grid = _ordered(dim, own.unique(), like[dim], dim in core_dims)
        uniques[dim], codes[dim] = grid, grid.get_indexer(own)
    table = pd.DataFrame(codes)
    _check_distinct(table, labels)
    for rows in _together(table, core_dims):
        for part in _halves(table, rows, [d for d in labels if d not in core_dims]):
            yield _piece(part, table, uniques)


def _ordered(dim: str, own: pd.Index, like: pd.Index | None, core: bool) -> pd.Index:
    """The labels of a grid; along a core dim in the order that the fit had them in."""
    if core and like is not None and own.isin(like).all():
        return like[like.isin(own)]
    try:
        rising = own.sort_values()
    except TypeError:
        rising = own
    if core and like is not None and not like.is_monotonic_increasing:
        if not like.is_monotonic_decreasing:
            new = own.difference(like, sort=False)
            raise LabelError(
                f"column {dim!r} has labels that the fit never saw, {list(new[:3])!r} among them, "
                f"along a core_dim whose labels are in no order there: {list(like[:5])!r}. Where "
                "they belong cannot be told; give labels of the fit"
            )
        return rising[::-1]
    return rising


def _check_distinct(table: pd.DataFrame, labels: dict[str, pd.Index]) -> None:
    twice = table.duplicated(keep=False).to_numpy()
    if twice.any():
        first = int(np.flatnonzero(twice)[0])
        same = (table == table.iloc[first]).all(axis=1).to_numpy()
        shown = {dim: own[[first]].tolist()[0] for dim, own in labels.items()}
        raise LabelError(
            f"rows {np.flatnonzero(same)[:3].tolist()!r} have the same labels, {shown!r}: a draw "
            "is addressed by them, so two rows would be one cell. Drop one, or give one a label "
            "of its own"
        )


def _together(table: pd.DataFrame, core_dims: Sequence[str]) -> Iterator[np.ndarray]:
    """Rows that may share a grid: all, or those whose series have the same labels."""
    if not core_dims:
        yield np.arange(len(table))
        return
    others = [d for d in table.columns if d not in core_dims]
    everything = [np.arange(len(table))]
    series = map(np.asarray, table.groupby(others).indices.values()) if others else everything
    alike: dict[bytes, list[np.ndarray]] = {}
    core = table[list(core_dims)].to_numpy()
    for rows in series:
        own = core[rows]
        if prod(len(np.unique(c)) for c in own.T) != len(rows):
            raise LabelError(
                f"rows {rows[:3].tolist()!r} and {len(rows) - min(len(rows), 3)} more have labels "
                f"of core_dim {list(core_dims)!r} that make no whole grid; the model couples "
                "them, so give all of them"
            )
        alike.setdefault(own[np.lexsort(own.T)].tobytes(), []).append(rows)
    for group in alike.values():
        yield np.concatenate(group)


def _halves(table: pd.DataFrame, rows: np.ndarray, dims: Sequence[str]) -> Iterator[np.ndarray]:
    """The rows, halved along the longest dimension while their grid is mostly empty."""
    codes = table.to_numpy()[rows]
    lengths = [len(np.unique(c)) for c in codes.T]
    free = [i for i, d in enumerate(table.columns) if d in dims and lengths[i] > 1]
    if prod(lengths) <= max(_SPARE * len(rows), _FEW) or not free:
        yield rows
        return
    along = codes[:, max(free, key=lambda i: lengths[i])]
    upper = along >= np.unique(along)[len(np.unique(along)) // 2]
    yield from _halves(table, rows[~upper], dims)
    yield from _halves(table, rows[upper], dims)


def _piece(rows: np.ndarray, table: pd.DataFrame, uniques: dict[str, pd.Index]) -> Piece:
    rows = np.sort(rows)
    labels, places = {}, {}
    for dim, index in uniques.items():
        kept, places[dim] = np.unique(table[dim].to_numpy()[rows], return_inverse=True)
        labels[dim] = index[kept]
    return Piece(rows, labels, places)
