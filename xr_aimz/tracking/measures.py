"""A fit's diagnostics as single numbers, however many values and cells it has."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from xr_aimz.posterior import Fit
from xr_aimz.tracking.parameters import key

__all__ = ["diagnosed", "has_chains", "measures"]

_WORST: dict[str, Callable] = {"rhat": np.nanmax, "ess_bulk": np.nanmin, "ess_tail": np.nanmin}


def has_chains(fit: Fit) -> bool:
    """Whether draws are judged by R-hat and effective sample sizes, as the fit itself did."""
    return fit.losses is None and ("diverging" in fit.sample_stats or not fit.binding.per)


def diagnosed(fit: Fit) -> xr.Dataset:
    """R-hat and effective sample sizes of chains; an empty Dataset for other draws."""
    return fit.diagnostics() if has_chains(fit) else xr.Dataset()


def measures(fit: Fit, table: xr.Dataset) -> dict[str, float]:
    """Numbers for the fit as a whole, and for a fit in cells how many cells went how.

    Parameters
    ----------
    fit : Fit
    table : Dataset
        Of :func:`diagnosed`.

    Returns
    -------
    dict of str to float
        Finite numbers: ``rhat_max``, ``ess_bulk_min``, ``ess_tail_min``, ``divergences``,
        ``loss_last`` and ``concerns``, those that the method has; with ``per`` also ``cells``
        and ``cells_ok``, ``cells_no_data`` ... by status.
    """
    found = {"concerns": float(len(fit.concerns))} if fit.concerns is not None else {}
    found |= _worst(table)
    if "diverging" in fit.sample_stats:
        found["divergences"] = float(fit.sample_stats.diverging.sum())
    if fit.losses is not None and fit.losses.size:
        last = fit.losses.isel(step=-1).values
        found["loss_last"] = float(np.median(last[np.isfinite(last)])) if last.size else np.nan
    found |= _cells(fit)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _worst(table: xr.Dataset) -> dict[str, float]:
    names = {"rhat": "rhat_max", "ess_bulk": "ess_bulk_min", "ess_tail": "ess_tail_min"}
    found = {}
    for kind, worst in _WORST.items():
        arrays = [a.sel(diagnostic=kind).values for a in table.values() if "diagnostic" in a.dims]
        values = np.concatenate([a.ravel() for a in arrays]) if arrays else np.empty(0)
        if np.isfinite(values).any():
            found[names[kind]] = float(worst(values))
    return found


def _cells(fit: Fit) -> dict[str, float]:
    status = fit.sample_stats.get("status")
    if status is None:
        return {}
    flags = enumerate(status.attrs["flag_meanings"].split())
    counts = {key(f"cells_{flag}"): float((status == i).sum()) for i, flag in flags}
    return {"cells": float(status.size), **counts}
