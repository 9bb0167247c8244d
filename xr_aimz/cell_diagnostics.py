"""What speaks against the fits of many cells: counts of cells, in one warning.

Each cell is judged as a fit of its own would be, by :mod:`xr_aimz.diagnostics`. Among
thousands of cells some fall beyond any limit by chance, so how many is what counts, and
which one is worst.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from xr_aimz.diagnostics import (
    ESS_PER_CHAIN,
    FALLING_ERRORS,
    FALLING_NATS,
    RHAT_LIMIT,
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
            found.append(
                f"{count} of {status.size} cells have draws that diverged: raise "
                "target_accept_prob, or reparameterize"
            )
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
    limits = {
        "rhat": (lambda a: a > RHAT_LIMIT, f"R-hat above {RHAT_LIMIT}", "run longer chains"),
        "ess_bulk": (lambda a: a < ESS_PER_CHAIN * chains, "ess_bulk", "draw more"),
        "ess_tail": (lambda a: a < ESS_PER_CHAIN * chains, "ess_tail", "draw more"),
    }
    found = []
    for kind, (beyond, what, remedy) in limits.items():
        bad, worst = xr.zeros_like(fitted), {}
        for name, array in table.items():
            values = array.sel(diagnostic=kind)
            own = [d for d in values.dims if d not in fitted.dims]
            bad = bad | beyond(values).any(own)
            worst[name] = float(values.max() if kind == "rhat" else values.min())
        if count := int((bad & fitted).sum()):
            under = "" if kind == "rhat" else f" below {ESS_PER_CHAIN} a chain ({chains} chains)"
            figures = {name: round(x, 3) for name, x in worst.items()}
            found.append(
                f"{what}{under} in {count} of {fitted.size} cells, at worst {figures!r}; {remedy}"
            )
    return found


def _loss_concerns(losses: xr.DataArray, fitted: xr.DataArray, latents: int) -> list[str]:
    """In how many cells the loss was still falling, by the trend that a single fit has too."""
    steps = losses.step.values
    # Where the step size shrinks, any loss levels off: what counts is before.
    full = losses.values[steps <= losses.attrs["full_rate_steps"]]
    tail = full[-max(3 * len(steps) // 10, 3) :]
    if len(tail) < 3:
        return []
    slope, error = _trend(tail.reshape(len(tail), -1))
    drop = -slope * len(steps) / 10
    falling = (drop > FALLING_NATS * latents) & (-slope > FALLING_ERRORS * error)
    count = int((falling & fitted.values.reshape(-1)).sum())
    if not count:
        return []
    return [
        f"the loss was still falling at the full learning rate in {count} of {fitted.size} cells: "
        f"take more than {steps[-1]} steps"
    ]


def _trend(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The slope of each column, and its standard error."""
    count = len(values)
    x = np.arange(count) - (count - 1) / 2
    centred = values - values.mean(axis=0)
    slope = x @ centred / (x @ x)
    rest = centred - x[:, None] * slope
    return slope, np.sqrt((rest**2).sum(axis=0) / max(count - 2, 1) / (x @ x))
