"""What speaks against the fits of many cells: counts of cells, in one warning.

Each cell is judged as a fit of its own would be, by :mod:`xr_aimz.diagnostics`. Among
thousands of cells some fall beyond any limit by chance, so how many is what counts, and
which one is worst.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from xr_aimz.diagnostics import (
    DEEP_SHARE,
    DIVERGED,
    ESS_PER_CHAIN,
    FALLING_ERRORS,
    FALLING_NATS,
    LEAST_STEPS,
    RHAT_LIMIT,
    VISIBLE_NATS,
    at_greatest_depth,
    below,
    deeper,
    few_steps,
    summarize,
)

__all__ = ["cell_concerns"]


def cell_concerns(
    posterior: xr.Dataset,
    sample_stats: xr.Dataset,
    losses: xr.DataArray | None,
    per: tuple[str, ...],
) -> list[str]:
    """What speaks against the fits of cells, in sentences with counts; empty if nothing does.

    Parameters
    ----------
    posterior : Dataset
        With dims ``(chain, draw, *per, ...)``; read block by block where it is lazy.
    sample_stats : Dataset
        With ``status``.
    losses : DataArray, optional
    per : tuple of str
    """
    status = sample_stats.status
    fitted = status == 0
    found = _failures(status)
    if "diverging" in sample_stats:
        diverged = (sample_stats.diverging.sum(("chain", "draw")) > 0) & fitted
        if count := int(diverged.sum()):
            found.append(f"{count} of {status.size} cells have draws that diverged: {DIVERGED}")
    found += _depth_concerns(sample_stats, fitted)
    if losses is not None:
        one = dict.fromkeys(("chain", "draw", *per), 0)
        latents = sum(a.isel(one).size for a in posterior.values())
        found += _loss_concerns(losses, fitted, latents)
    elif "diverging" in sample_stats:
        # Chains only: draws of a Gaussian are independent, however few.
        found += _chain_concerns(summarize(posterior), posterior.sizes["chain"], fitted)
    return found


def _failures(status: xr.DataArray) -> list[str]:
    """How many cells failed, by the flags of the status; no data is no failure."""
    flags = dict(enumerate(status.attrs["flag_meanings"].split()))
    counts = {flag: int((status == i).sum()) for i, flag in flags.items()}
    failed = {f: n for f, n in counts.items() if n and f not in ("ok", "no_data")}
    if not failed:
        return []
    return [
        f"the fit of {sum(failed.values())} of {status.size} cells failed, {failed!r}, and their "
        "draws are NaN: see fit.sample_stats.status"
    ]


def _chain_concerns(table: xr.Dataset, chains: int, fitted: xr.DataArray) -> list[str]:
    high = (f"R-hat above {RHAT_LIMIT}", "run longer chains")
    low = {f"{kind} {below(chains)}": kind for kind in ("ess_bulk", "ess_tail")}
    found = _beyond(table, "rhat", lambda a: a > RHAT_LIMIT, fitted, *high)
    for what, kind in low.items():
        found += _beyond(
            table, kind, lambda a: a < ESS_PER_CHAIN * chains, fitted, what, "draw more"
        )
    return found


def _beyond(
    table: xr.Dataset,
    kind: str,
    is_beyond: Callable[[xr.DataArray], xr.DataArray],
    fitted: xr.DataArray,
    what: str,
    remedy: str,
) -> list[str]:
    """In how many cells a diagnostic is beyond its limit, and the variables that are, at worst."""
    bad, worst = xr.zeros_like(fitted), {}
    for name, array in table.items():
        values = array.sel(diagnostic=kind).where(fitted)
        own = is_beyond(values)
        if own.any():
            bad = bad | own.any([d for d in own.dims if d not in fitted.dims])
            worst[name] = round(float(values.max() if kind == "rhat" else values.min()), 4)
    if not worst:
        return []
    count = int(bad.sum())
    return [f"{what} in {count} of {fitted.size} cells, at worst {worst!r}; {remedy}"]


def _depth_concerns(sample_stats: xr.Dataset, fitted: xr.DataArray) -> list[str]:
    """In how many cells trees end at the greatest depth too often."""
    if (draws := at_greatest_depth(sample_stats)) is None:
        return []
    deep, depth = draws
    share = deep.mean(("chain", "draw")).where(fitted)
    if not (count := int((share > DEEP_SHARE).sum())):
        return []
    return [
        f"in {count} of {fitted.size} cells more than {DEEP_SHARE:.0%} of the draws ended at the "
        f"greatest tree depth, {depth}, at worst {float(share.max()):.0%}: {deeper(depth)}"
    ]


def _loss_concerns(losses: xr.DataArray, fitted: xr.DataArray, latents: int) -> list[str]:
    """In how many cells the loss was still falling, by the trend that a single fit has too."""
    steps = losses.step.values
    # Where the step size shrinks, any loss levels off: what counts is before.
    full = losses.values[steps <= losses.attrs["full_rate_steps"]]
    tail = full[-max(3 * len(steps) // 10, 3) :]
    if steps[-1] < LEAST_STEPS:
        return [few_steps(int(steps[-1]))]
    slope, error = _trend(tail.reshape(len(tail), -1))
    drop, error = (x * len(steps) / 10 for x in (-slope, FALLING_ERRORS * error))
    falling = (drop > FALLING_NATS * latents) & (drop > error)
    unclear = ~falling & (error > VISIBLE_NATS * max(latents, 1))
    kinds = {
        "the loss was still falling at the full learning rate": falling,
        "the noise of the loss hides whether it has settled": unclear,
    }
    counts = {
        what: int((cells & fitted.values.reshape(-1)).sum()) for what, cells in kinds.items()
    }
    return [
        f"{what} in {count} of {fitted.size} cells: take more than {steps[-1]} steps"
        for what, count in counts.items()
        if count
    ]


def _trend(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slope of each column, and its standard error."""
    count = len(values)
    x = np.arange(count) - (count - 1) / 2
    centred = values - values.mean(axis=0)
    slope = x @ centred / (x @ x)
    rest = centred - x[:, None] * slope
    return slope, np.sqrt((rest**2).sum(axis=0) / max(count - 2, 1) / (x @ x))
