"""Compute convergence diagnostics of one fit, or of the fits of many cells: R-hat, ESS, losses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import xarray as xr
from numpyro.diagnostics import effective_sample_size, gelman_rubin
from scipy.special import ndtri

from xr_aimz.inference import LEAST_STEPS, VISIBLE_NATS, few_steps_concern

RHAT_LIMIT = 1.01
ESS_PER_CHAIN = 100
# A loss is still falling when a line through three tenths of its steps, the last at the full
# learning rate, falls by this many standard errors, and over a tenth of the steps by this
# many nats a latent value: a guide whose sd is 10 % off loses half of that by it. Both are
# guesses, tried on converged and unconverged fits (docs/decisions/fits.md).
FALLING_ERRORS, FALLING_NATS = 4.0, 0.01
# The share of draws at the greatest tree depth above which there is a concern: a few cost
# time, many mean that a chain hardly moves.
DEEP_SHARE = 0.01
DIVERGED = "method=NUTS(model, target_accept_prob=0.95), or reparameterize"
# Losses of batches are averaged over epochs where there are so many: a line through fewer
# means has no standard error to rely on.
EPOCHS = 20


def rhat(x: np.ndarray) -> np.ndarray:
    """Rank-normalized split R-hat of draws ``(chain, draw, ...)``: the larger of bulk and tail."""
    halves = _split_chains(x)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(gelman_rubin(_rank_normalize(halves)), gelman_rubin(_rank_normalize(folded)))


def ess_bulk(x: np.ndarray) -> np.ndarray:
    """Effective sample size of the center of draws ``(chain, draw, ...)``."""
    return _ess(_rank_normalize(_split_chains(x)))


def ess_tail(x: np.ndarray) -> np.ndarray:
    """Effective sample size of the 5 % and 95 % quantiles of draws, the smaller of the two."""
    halves = _split_chains(x)
    low, high = np.quantile(halves, (0.05, 0.95), axis=(0, 1))
    return np.minimum(*(_ess((halves <= edge).astype(float)) for edge in (low, high)))


def summarize(posterior: xr.Dataset) -> xr.Dataset:
    """Compute R-hat and effective sample sizes of every variable of a posterior.

    Returns
    -------
    Dataset
        With the posterior's dims less ``chain`` and ``draw``, and a dimension
        ``diagnostic`` of ``rhat``, ``ess_bulk`` and ``ess_tail``. A variable that never
        moves, or a single chain for R-hat, gives NaN.
    """
    tables = {name: _summarize(a) for name, a in posterior.items() if a.dtype.kind in "fiub"}
    return xr.Dataset(tables)


def _summarize(array: xr.DataArray) -> xr.DataArray:
    ordered = array.transpose("chain", "draw", ...)
    if ordered.chunks is not None:
        return _summarize_blocks(ordered)
    x = ordered.values.astype(float)
    template = ordered.isel(chain=0, draw=0, drop=True)
    has_enough = x.shape[1] >= 4
    with np.errstate(all="ignore"):
        values = [
            f(x) if has_enough else np.full(template.shape, np.nan) for f in _MEASURES.values()
        ]
    if len(ordered.chain) == 1:
        values[0] = np.full(template.shape, np.nan)
    statistics = [template.copy(data=value).astype(float) for value in values]
    labels = xr.Variable("diagnostic", list(_MEASURES))
    return xr.concat(statistics, dim=labels).rename(None)


def _summarize_blocks(ordered: xr.DataArray) -> xr.DataArray:
    """Summarize a lazy array ``(chain, draw, ...)`` with one block at a time in memory."""
    shape = (len(_MEASURES), *ordered.shape[2:])
    values = np.empty(shape)
    edges = [np.cumsum((0, *chunks)) for chunks in (ordered.chunks or ())[2:]]
    for bounds in product(*(pairwise(e) for e in edges)):
        block = tuple(slice(*b) for b in bounds)
        values[(slice(None), *block)] = _summarize(ordered[(..., *block)].compute()).values
    template = ordered.isel(chain=0, draw=0, drop=True)
    dims = ("diagnostic", *template.dims)
    return xr.DataArray(values, {**template.coords, "diagnostic": list(_MEASURES)}, dims)


def concerns(
    posterior: xr.Dataset, sample_stats: xr.Dataset, losses: xr.DataArray | None
) -> list[str]:
    """Collect the concerns about a fit: sentences with figures; empty if there are none."""
    messages = []
    if "diverging" in sample_stats and (count := int(sample_stats.diverging.sum())):
        messages.append(f"{count} of {sample_stats.diverging.size} draws diverged: {DIVERGED}")
    messages += _depth_concerns(sample_stats)
    if losses is not None:
        messages += _loss_concerns(losses, _count_latents(posterior))
    elif posterior.sizes.get("chain", 0):
        messages += _chain_concerns(summarize(posterior), posterior.sizes["chain"])
    return messages


def at_maximum_tree_depth(sample_stats: xr.Dataset) -> tuple[xr.DataArray, int] | None:
    """Mask of the draws whose tree has the greatest depth that NUTS allows, and that depth."""
    steps = sample_stats.get("n_steps")
    if steps is None or "max_tree_depth" not in steps.attrs:
        return None
    depth = int(steps.attrs["max_tree_depth"])
    return steps >= 2**depth - 1, depth


def tree_depth_remedy(depth: int) -> str:
    """Return the remedy for trees that end at the greatest depth, as text."""
    return f"method=NUTS(model, max_tree_depth={depth + 2}), or scale inputs to order 1"


def _depth_concerns(sample_stats: xr.Dataset) -> list[str]:
    if (draws := at_maximum_tree_depth(sample_stats)) is None:
        return []
    deep_mask, depth = draws
    share = float(deep_mask.mean())
    if share <= DEEP_SHARE:
        return []
    return [
        f"{share:.0%} of {deep_mask.size} draws ended at the greatest tree depth, {depth} (limit "
        f"{DEEP_SHARE:.0%}): {tree_depth_remedy(depth)}"
    ]


def _chain_concerns(table: xr.Dataset, chains: int) -> list[str]:
    messages = []
    worst = {name: float(a.sel(diagnostic="rhat").max()) for name, a in table.items()}
    high = {name: round(r, 4) for name, r in worst.items() if r > RHAT_LIMIT}
    if high:
        messages.append(f"R-hat above {RHAT_LIMIT}: {high!r}; run longer chains")
    for kind in ("ess_bulk", "ess_tail"):
        least = {name: float(a.sel(diagnostic=kind).min()) for name, a in table.items()}
        low = {name: int(n) for name, n in least.items() if n < ESS_PER_CHAIN * chains}
        if low:
            messages.append(f"{kind} {ess_limit_text(chains)}: {low!r}; draw more")
    return messages


def ess_limit_text(chains: int) -> str:
    """Return the limit of an effective sample size, as text."""
    return f"below {ESS_PER_CHAIN} a chain ({chains} chains: {ESS_PER_CHAIN * chains})"


def _count_latents(posterior: xr.Dataset) -> int:
    return sum(a.isel(chain=0, draw=0).size for a in posterior.values())


def _loss_concerns(losses: xr.DataArray, latents: int) -> list[str]:
    bad_count = int((~np.isfinite(losses)).sum())
    if bad_count:
        return [f"{bad_count} of {losses.size} losses are not finite: lower the learning rate"]
    count = losses.size * _steps_per_loss(losses)
    steps, tail = _select_tail(losses)
    if count < LEAST_STEPS or len(tail) < EPOCHS:
        full_rate_steps = losses.attrs.get("full_rate_steps", count)
        return [few_steps_concern(count if count < LEAST_STEPS else full_rate_steps)]
    # Imported late: it takes half a second, which a prediction need not wait for.
    from scipy.stats import linregress

    trend = linregress(steps, tail)
    drop, error = (x * count / 10 for x in (-trend.slope, FALLING_ERRORS * trend.stderr))
    if drop > FALLING_NATS * latents and drop > error:
        return [
            f"the loss was still falling at the full learning rate, by {drop:.3g} a tenth of the "
            f"{count} steps: take more"
        ]
    # The noise of losses of batches is many times this limit, whatever the guide.
    has_batches = losses.attrs.get("epoch_steps", 1.0) > 1
    if not has_batches and error > VISIBLE_NATS * max(latents, 1):
        return [
            f"{count} steps are too few to see whether the loss has settled: its noise hides a "
            f"fall of {error:.3g} a tenth of them (limit {VISIBLE_NATS} a latent value): take more"
        ]
    return []


def _steps_per_loss(losses: xr.DataArray) -> int:
    """Return the number of steps that each loss is the mean of."""
    if "step" not in losses.coords or losses.size < 2:
        return 1
    return int(losses.step[1] - losses.step[0])


def _select_tail(losses: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Select the steps and losses of the trend: the last ones at the full learning rate."""
    every = _steps_per_loss(losses)
    # Any loss levels off while the learning rate shrinks: only the steps before are judged.
    full_rate = losses.values[: losses.attrs.get("full_rate_steps", losses.size * every) // every]
    tail = full_rate[-max(3 * losses.size // 10, 3) :]
    # A mean over an epoch has all data in it, and no noise from their split into batches.
    per_epoch = round(losses.attrs.get("epoch_steps", 1.0) / every)
    if per_epoch > 1 and len(tail) >= EPOCHS * per_epoch:
        tail = tail[len(tail) % per_epoch :].reshape(-1, per_epoch).mean(axis=1)
        every *= per_epoch
    return np.arange(len(tail)) * every, tail


def _split_chains(x: np.ndarray) -> np.ndarray:
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _rank_normalize(x: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata  # late, as above

    flat = x.reshape(x.shape[0] * x.shape[1], -1)
    ranks = rankdata(flat, axis=0)
    return ndtri((ranks - 0.375) / (len(flat) + 0.25)).reshape(x.shape)


def _ess(x: np.ndarray) -> np.ndarray:
    # For antithetic chains the estimate can be many times the number of draws: Stan and
    # ArviZ bound it like this.
    count = x.shape[0] * x.shape[1]
    return np.minimum(effective_sample_size(x), count * np.log10(count))


_MEASURES = {"rhat": rhat, "ess_bulk": ess_bulk, "ess_tail": ess_tail}


def cell_concerns(
    posterior: xr.Dataset,
    sample_stats: xr.Dataset,
    losses: xr.DataArray | None,
    per: tuple[str, ...],
) -> list[str]:
    """Collect the concerns about fits of cells: sentences with counts; empty if there are none.

    Parameters
    ----------
    posterior : Dataset
        With dims ``(chain, draw, *per, ...)``; read block by block where it is lazy.
    sample_stats : Dataset
        With ``status`` over the dims ``per``.
    losses : DataArray, optional
    per : tuple of str
    """
    status = sample_stats.status
    fitted_mask = status == 0
    messages = _failure_concerns(status)
    if "diverging" in sample_stats:
        diverged = (sample_stats.diverging.sum(("chain", "draw")) > 0) & fitted_mask
        if count := int(diverged.sum()):
            messages.append(f"{count} of {status.size} cells have draws that diverged: {DIVERGED}")
    messages += _cell_depth_concerns(sample_stats, fitted_mask)
    if losses is not None:
        first = dict.fromkeys(("chain", "draw", *per), 0)
        latents = sum(a.isel(first).size for a in posterior.values())
        messages += _cell_loss_concerns(losses, fitted_mask, latents)
    elif "diverging" in sample_stats:
        # For chains only: draws of a Gaussian are independent, however few.
        messages += _cell_chain_concerns(
            summarize(posterior), posterior.sizes["chain"], fitted_mask
        )
    return messages


def _failure_concerns(status: xr.DataArray) -> list[str]:
    """Count the failed cells by flag of the status; a cell without data has not failed."""
    flags = dict(enumerate(status.attrs["flag_meanings"].split()))
    counts = {flag: int((status == i).sum()) for i, flag in flags.items()}
    failed = {f: n for f, n in counts.items() if n and f not in ("ok", "no_data")}
    if not failed:
        return []
    return [
        f"the fit of {sum(failed.values())} of {status.size} cells failed, {failed!r}, and their "
        "draws are NaN: see fit.sample_stats.status"
    ]


def _cell_chain_concerns(table: xr.Dataset, chains: int, fitted_mask: xr.DataArray) -> list[str]:
    high = (f"R-hat above {RHAT_LIMIT}", "run longer chains")
    low = {f"{kind} {ess_limit_text(chains)}": kind for kind in ("ess_bulk", "ess_tail")}
    messages = _limit_concerns(table, "rhat", lambda a: a > RHAT_LIMIT, fitted_mask, *high)
    for what, kind in low.items():
        messages += _limit_concerns(
            table, kind, lambda a: a < ESS_PER_CHAIN * chains, fitted_mask, what, "draw more"
        )
    return messages


def _limit_concerns(
    table: xr.Dataset,
    kind: str,
    is_beyond: Callable[[xr.DataArray], xr.DataArray],
    fitted_mask: xr.DataArray,
    what: str,
    remedy: str,
) -> list[str]:
    """Count the cells with a diagnostic beyond its limit; name the variables with worst values."""
    bad_mask, worst = xr.zeros_like(fitted_mask), {}
    for name, array in table.items():
        values = array.sel(diagnostic=kind).where(fitted_mask)
        beyond_mask = is_beyond(values)
        if beyond_mask.any():
            bad_mask = bad_mask | beyond_mask.any(
                [d for d in beyond_mask.dims if d not in fitted_mask.dims]
            )
            worst[name] = round(float(values.max() if kind == "rhat" else values.min()), 4)
    if not worst:
        return []
    count = int(bad_mask.sum())
    return [f"{what} in {count} of {fitted_mask.size} cells, at worst {worst!r}; {remedy}"]


def _cell_depth_concerns(sample_stats: xr.Dataset, fitted_mask: xr.DataArray) -> list[str]:
    """Count the cells in which trees end at the greatest depth too often."""
    if (draws := at_maximum_tree_depth(sample_stats)) is None:
        return []
    deep_mask, depth = draws
    share = deep_mask.mean(("chain", "draw")).where(fitted_mask)
    if not (count := int((share > DEEP_SHARE).sum())):
        return []
    return [
        f"in {count} of {fitted_mask.size} cells more than {DEEP_SHARE:.0%} of the draws ended at "
        f"the greatest tree depth, {depth}, at worst {float(share.max()):.0%}: "
        f"{tree_depth_remedy(depth)}"
    ]


def _cell_loss_concerns(
    losses: xr.DataArray, fitted_mask: xr.DataArray, latents: int
) -> list[str]:
    """Count the cells whose loss was still falling, or too noisy, by the trend of a single fit."""
    steps = losses.step.values
    # Any loss levels off while the learning rate shrinks: only the steps before are judged.
    full_rate = losses.values[steps <= losses.attrs["full_rate_steps"]]
    tail = full_rate[-max(3 * len(steps) // 10, 3) :]
    if steps[-1] < LEAST_STEPS:
        return [few_steps_concern(int(steps[-1]))]
    slope, error = _fit_trend(tail.reshape(len(tail), -1))
    drop, error = (x * len(steps) / 10 for x in (-slope, FALLING_ERRORS * error))
    falling_mask = (drop > FALLING_NATS * latents) & (drop > error)
    unclear_mask = ~falling_mask & (error > VISIBLE_NATS * max(latents, 1))
    masks = {
        "the loss was still falling at the full learning rate": falling_mask,
        "the noise of the loss hides whether it has settled": unclear_mask,
    }
    counts = {
        what: int((mask & fitted_mask.values.reshape(-1)).sum()) for what, mask in masks.items()
    }
    return [
        f"{what} in {count} of {fitted_mask.size} cells: take more than {steps[-1]} steps"
        for what, count in counts.items()
        if count
    ]


def _fit_trend(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least-squares slope of each column, and its standard error."""
    count = len(values)
    x = np.arange(count) - (count - 1) / 2
    centred = values - values.mean(axis=0)
    slope = x @ centred / (x @ x)
    residuals = centred - x[:, None] * slope
    return slope, np.sqrt((residuals**2).sum(axis=0) / max(count - 2, 1) / (x @ x))
