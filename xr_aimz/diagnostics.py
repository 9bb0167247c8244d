"""Whether a fit should be trusted: R-hat, effective sample sizes, divergences, losses.

R-hat and both effective sample sizes are the rank-normalized ones that ArviZ reports,
on split chains; the autocorrelation beneath them is NumPyro's.

References
----------
Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-normalization, folding, and
localization: an improved R-hat, Bayesian Analysis 16 (2).
"""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import xarray as xr
from numpyro.diagnostics import effective_sample_size, gelman_rubin
from scipy.special import ndtri
from scipy.stats import linregress, rankdata

__all__ = ["concerns", "ess_bulk", "ess_tail", "few_steps", "rhat", "summarize"]

RHAT_LIMIT = 1.01
ESS_PER_CHAIN = 100
# A loss is still falling when a line through three tenths of its steps, the last at the full
# learning rate, falls by this many standard errors, and over a tenth of the steps by this
# many nats a latent value: a guide whose sd is 10 % off loses half of that by it. Both are
# guesses, tried on converged and unconverged fits (docs/decisions/fits.md).
FALLING_ERRORS, FALLING_NATS = 4.0, 0.01
# Fewer steps are too few to judge: a line through three tenths of them falls by four of its
# standard errors by chance too often, and at a rate of 0.05 they do not get far. Of more steps the
# line is to show a fall of half a nat a latent value in a tenth of them: a mean that is one
# posterior sd off costs half a nat.
LEAST_STEPS, VISIBLE_NATS = 100, 0.5
# The share of draws at the greatest tree depth that is a concern: a few cost time, many are a
# chain that hardly moves.
DEEP_SHARE = 0.01
DIVERGED = "method=NUTS(model, target_accept_prob=0.95), or reparameterize"
# Losses of batches are averaged over epochs where there are so many: a line through fewer
# means has no standard error to rely on.
EPOCHS = 20


def rhat(x: np.ndarray) -> np.ndarray:
    """Rank-normalized split R-hat of draws ``(chain, draw, ...)``: the worse of bulk and tail."""
    halves = _split(x)
    folded = np.abs(halves - np.median(halves, axis=(0, 1)))
    return np.maximum(gelman_rubin(_rank_normal(halves)), gelman_rubin(_rank_normal(folded)))


def ess_bulk(x: np.ndarray) -> np.ndarray:
    """Effective sample size of the center of draws ``(chain, draw, ...)``."""
    return _ess(_rank_normal(_split(x)))


def ess_tail(x: np.ndarray) -> np.ndarray:
    """Effective sample size of the 5 % and 95 % quantiles, the smaller of the two."""
    halves = _split(x)
    low, high = np.quantile(halves, (0.05, 0.95), axis=(0, 1))
    return np.minimum(*(_ess((halves <= edge).astype(float)) for edge in (low, high)))


def summarize(posterior: xr.Dataset) -> xr.Dataset:
    """R-hat and effective sample sizes of every variable of a posterior.

    Returns
    -------
    Dataset
        With the posterior's dims less ``chain`` and ``draw``, and a dimension
        ``diagnostic`` of ``rhat``, ``ess_bulk`` and ``ess_tail``. A variable that never
        moves, or a single chain for R-hat, gives NaN.
    """
    found = {name: _summarize(a) for name, a in posterior.items() if a.dtype.kind in "fiub"}
    return xr.Dataset(found)


def _summarize(array: xr.DataArray) -> xr.DataArray:
    ordered = array.transpose("chain", "draw", ...)
    if ordered.chunks is not None:
        return _summarize_blocks(ordered)
    x = ordered.values.astype(float)
    template = ordered.isel(chain=0, draw=0, drop=True)
    enough = x.shape[1] >= 4
    with np.errstate(all="ignore"):
        values = [f(x) if enough else np.full(template.shape, np.nan) for f in _MEASURES.values()]
    if len(ordered.chain) == 1:
        values[0] = np.full(template.shape, np.nan)
    parts = [template.copy(data=value).astype(float) for value in values]
    labels = xr.Variable("diagnostic", list(_MEASURES))
    return xr.concat(parts, dim=labels).rename(None)


def _summarize_blocks(ordered: xr.DataArray) -> xr.DataArray:
    """The same of a lazy array, of which one block at a time is in memory."""
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
    """What speaks against a fit, in sentences with figures; empty when nothing does."""
    found = []
    if "diverging" in sample_stats and (count := int(sample_stats.diverging.sum())):
        found.append(f"{count} of {sample_stats.diverging.size} draws diverged: {DIVERGED}")
    found += _depth_concerns(sample_stats)
    if losses is not None:
        found += _loss_concerns(losses, _latent_count(posterior))
    elif posterior.sizes.get("chain", 0):
        found += _chain_concerns(summarize(posterior), posterior.sizes["chain"])
    return found


def at_greatest_depth(sample_stats: xr.Dataset) -> tuple[xr.DataArray, int] | None:
    """Mask of the draws whose tree has the greatest depth that NUTS allows, and that depth."""
    steps = sample_stats.get("n_steps")
    if steps is None or "max_tree_depth" not in steps.attrs:
        return None
    depth = int(steps.attrs["max_tree_depth"])
    return steps >= 2**depth - 1, depth


def deeper(depth: int) -> str:
    """The remedy for trees that end at the greatest depth."""
    return f"method=NUTS(model, max_tree_depth={depth + 2}), or scale inputs to order 1"


def _depth_concerns(sample_stats: xr.Dataset) -> list[str]:
    if (draws := at_greatest_depth(sample_stats)) is None:
        return []
    deep, depth = draws
    share = float(deep.mean())
    if share <= DEEP_SHARE:
        return []
    return [
        f"{share:.0%} of {deep.size} draws ended at the greatest tree depth, {depth} (limit "
        f"{DEEP_SHARE:.0%}): {deeper(depth)}"
    ]


def _chain_concerns(table: xr.Dataset, chains: int) -> list[str]:
    found = []
    worst = {name: float(a.sel(diagnostic="rhat").max()) for name, a in table.items()}
    high = {name: round(r, 4) for name, r in worst.items() if r > RHAT_LIMIT}
    if high:
        found.append(f"R-hat above {RHAT_LIMIT}: {high!r}; run longer chains")
    for kind in ("ess_bulk", "ess_tail"):
        least = {name: float(a.sel(diagnostic=kind).min()) for name, a in table.items()}
        low = {name: int(n) for name, n in least.items() if n < ESS_PER_CHAIN * chains}
        if low:
            found.append(f"{kind} {below(chains)}: {low!r}; draw more")
    return found


def below(chains: int) -> str:
    """The limit of an effective sample size, in words."""
    return f"below {ESS_PER_CHAIN} a chain ({chains} chains: {ESS_PER_CHAIN * chains})"


def _latent_count(posterior: xr.Dataset) -> int:
    return sum(a.isel(chain=0, draw=0).size for a in posterior.values())


def _loss_concerns(losses: xr.DataArray, latents: int) -> list[str]:
    bad = int((~np.isfinite(losses)).sum())
    if bad:
        return [f"{bad} of {losses.size} losses are not finite: lower the learning rate"]
    count = losses.size * _every(losses)
    steps, tail = _tail(losses)
    if count < LEAST_STEPS or len(tail) < EPOCHS:
        full = losses.attrs.get("full_rate_steps", count)
        return [few_steps(count if count < LEAST_STEPS else full)]
    trend = linregress(steps, tail)
    drop, error = (x * count / 10 for x in (-trend.slope, FALLING_ERRORS * trend.stderr))
    if drop > FALLING_NATS * latents and drop > error:
        return [
            f"the loss was still falling at the full learning rate, by {drop:.3g} a tenth of the "
            f"{count} steps: take more"
        ]
    # Losses of batches are noise many times over, whatever the guide.
    batches = losses.attrs.get("epoch_steps", 1.0) > 1
    if not batches and error > VISIBLE_NATS * max(latents, 1):
        return [
            f"{count} steps are too few to see whether the loss has settled: its noise hides a "
            f"fall of {error:.3g} a tenth of them (limit {VISIBLE_NATS} a latent value): take more"
        ]
    return []


def few_steps(count: int) -> str:
    """The concern of a fit by too few steps to judge it."""
    return (
        f"{count} steps are too few to see whether the fit has settled: take {LEAST_STEPS} or more"
    )


def _every(losses: xr.DataArray) -> int:
    """How many steps are behind each loss."""
    if "step" not in losses.coords or losses.size < 2:
        return 1
    return int(losses.step[1] - losses.step[0])


def _tail(losses: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses that show whether the loss has settled: the last at the full rate."""
    every = _every(losses)
    # Where the step size shrinks, any loss levels off: what counts is before.
    full = losses.values[: losses.attrs.get("full_rate_steps", losses.size * every) // every]
    tail = full[-max(3 * losses.size // 10, 3) :]
    # Over a whole pass all data are seen, and which of them were in which batch is no noise.
    run = round(losses.attrs.get("epoch_steps", 1.0) / every)
    if run > 1 and len(tail) >= EPOCHS * run:
        tail = tail[len(tail) % run :].reshape(-1, run).mean(axis=1)
        every *= run
    return np.arange(len(tail)) * every, tail


def _split(x: np.ndarray) -> np.ndarray:
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def _rank_normal(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(x.shape[0] * x.shape[1], -1)
    ranks = rankdata(flat, axis=0)
    return ndtri((ranks - 0.375) / (len(flat) + 0.25)).reshape(x.shape)


def _ess(x: np.ndarray) -> np.ndarray:
    # Antithetic chains can estimate more draws than there are many times over: Stan and
    # ArviZ bound the estimate so.
    count = x.shape[0] * x.shape[1]
    return np.minimum(effective_sample_size(x), count * np.log10(count))


_MEASURES = {"rhat": rhat, "ess_bulk": ess_bulk, "ess_tail": ess_tail}
