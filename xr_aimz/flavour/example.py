"""The first rows of a fit's own data, as a table to ask it with."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.flavour.columns import Columns, Variable, columns_of
from xr_aimz.posterior import Fit

__all__ = ["input_example"]


def input_example(fit: Fit, rows: int = 5) -> pd.DataFrame:
    """A table with the first cells of the data that a fit was made on.

    Parameters
    ----------
    fit : Fit
    rows : int
        About how many; a series along ``core_dim`` is whole.

    Returns
    -------
    pandas.DataFrame
        Labels that MLflow has no type for, cftime's dates and timedeltas, are text. Variables
        of which the fit holds no data are 0.

    Examples
    --------
    >>> input_example(fit)  # doctest: +SKIP
    """
    columns = columns_of(fit)
    places = _first_cells({d: _size(fit, d) for d in columns.dims}, columns, rows)
    table: dict[str, Any] = {
        label.dim: places[label.dim]
        if label.like is None
        else _written(label.like[places[label.dim]])
        for label in columns.labels
        if label.required
    }
    for variable in (v for v in columns.variables if not v.held):
        table |= dict(zip(variable.columns, _values(fit, variable, places), strict=True))
    return pd.DataFrame(table)


def _size(fit: Fit, dim: str) -> int:
    held = (fit.observed_data, fit.constant_data, fit.posterior)
    return next((ds.sizes[dim] for ds in held if dim in ds.sizes), 1)


def _first_cells(sizes: dict[str, int], columns: Columns, rows: int) -> dict[str, np.ndarray]:
    """The positions of cells: those of core dims whole, of the others the first."""
    core = prod(n for d, n in sizes.items() if d in columns.core_dims)
    free = {d: n for d, n in sizes.items() if d not in columns.core_dims}
    count = min(max(rows // core, 1), prod(free.values()))
    first = np.unravel_index(np.arange(count), tuple(free.values())) if free else ()
    along = {d: n for d, n in sizes.items() if d in columns.core_dims}
    series = np.unravel_index(np.arange(core), tuple(along.values())) if along else ()
    found = {d: np.repeat(p, core) for d, p in zip(free, first, strict=True)}
    found |= {d: np.tile(p, count) for d, p in zip(along, series, strict=True)}
    return {d: found[d] for d in sizes}


def _written(labels: pd.Index) -> Any:
    kind = getattr(labels.dtype, "kind", "O")
    if kind == "m" or type(labels[0]).__module__.startswith("cftime"):
        return [label.isoformat() if kind == "O" else str(label) for label in labels]
    return labels


def _values(fit: Fit, variable: Variable, places: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The values in each column of a variable."""
    count = len(next(iter(places.values())))
    if variable.name not in fit.constant_data:
        return [np.zeros(count, variable.dtype or float) for _ in variable.columns]
    array = fit.constant_data[variable.name].transpose(*variable.dims, *variable.extra)
    # As far as the cells go, and no farther: the rest may be large, and on disk.
    near = array.isel({d: slice(0, int(places[d].max()) + 1) for d in variable.dims}).to_numpy()
    cells = near[tuple(places[d] for d in variable.dims)] if variable.dims else near[None]
    ends = cells.reshape(len(cells), -1)
    return [np.broadcast_to(column, (count,)) for column in ends.T]
