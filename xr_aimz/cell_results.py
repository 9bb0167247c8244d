"""Predictions from a fit of each cell, as the outcome's own variable has them.

A kernel gives the cells' dims first; a result has the order of the outcome's variable. A
cell whose fit has no draws has no prediction either: it is NaN, whatever the model does
with the NaN of its latents.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from xr_aimz.inputs import Inputs
from xr_aimz.posterior import Fit

__all__ = ["drawn_cells", "in_cells"]


def in_cells(result: xr.Dataset, fit: Fit, inputs: Inputs, leading: tuple[str, ...]) -> xr.Dataset:
    """Results in the outcome's order, NaN in cells without draws; lazy.

    Parameters
    ----------
    result : Dataset
        With dims ``(chain, draw, *per, ...)``, without coordinates.
    leading : tuple of str
        Dims that stay in front, where a result has them: chains and draws, scenarios.
    fit : Fit
    inputs : Inputs
        Of the Dataset that is predicted; its labels are among the fit's.

    Notes
    -----
    Where the fit has cells without draws, ints and bools become floats, as they do in
    ``DataArray.where``: there is no NaN among them. It does not matter whether such cells
    are among those predicted, so a prediction of a selection has the dtype of the whole.
    """
    per = fit.binding.per
    if not per:
        return result
    ordered = {name: a.transpose(*_order(a, fit, leading)) for name, a in result.items()}
    drawn = drawn_cells(fit, inputs)
    if drawn is None:
        return result.assign(ordered)
    return result.assign({name: _floats(a).where(drawn) for name, a in ordered.items()})


def drawn_cells(fit: Fit, inputs: Inputs) -> xr.DataArray | None:
    """Which cells of the inputs have draws; None if all of the fit's have."""
    per = fit.binding.per
    if not per or not (fit.sample_stats.status != 0).any():
        return None
    status = fit.sample_stats.status
    here = {d: inputs.labels[d] for d in per if d in inputs.labels}
    return (status.sel(here) == 0).drop_vars(list(status.coords))


def _order(array: xr.DataArray, fit: Fit, leading: tuple[str, ...]) -> tuple[str, ...]:
    # An int or a site that lacks some of the outcome's dims keeps the rest at the end.
    own = [d for a in fit.binding.outcomes for s in a.sources for d in s.dims]
    front = [d for d in leading if d in array.dims]
    first = [d for d in dict.fromkeys(own) if d in array.dims]
    last = [str(d) for d in array.dims if d not in (*front, *first)]
    return (*front, *first, *last)


def _floats(array: xr.DataArray) -> xr.DataArray:
    # A bool would become an object, which no file can hold.
    return array.astype(np.float32) if array.dtype.kind == "b" else array
