"""Run Markov chain Monte Carlo with NumPyro's ``MCMC``, the chains in parallel where possible.

Deterministic sites are hidden while chains run: NumPyro would store every draw of them,
and a site that spans the data takes more memory than the posterior. They are computed after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import HMC, MCMC, NUTS, init_to_uniform, init_to_value
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.errors import ModelError, OptionError
from xr_aimz.inference.problem import InferenceProblem, PosteriorDraws, SamplerState
from xr_aimz.tracing import trace_lock

# NumPyro's names of statistics, and ArviZ's names for them.
_STAT_NAMES = {
    "diverging": "diverging",
    "energy": "energy",
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "adapt_state.step_size": "step_size",
}
_EXTRA_FIELDS = (*_STAT_NAMES, "potential_energy")


def kernel_for(model: Callable, init: Any) -> MCMCKernel:
    """Make NUTS with NumPyro's defaults, started from ``init``."""
    return NUTS(model, init_strategy=init_strategy(init))


def init_strategy(init: Any) -> Callable:
    """Return NumPyro's initialization strategy for ``init=``: a strategy, or values by site."""
    if init is None:
        return init_to_uniform
    if callable(init):
        return init
    if isinstance(init, dict):
        return init_to_value(values=init)
    raise OptionError(
        f"init={init!r}: give values by site name, a dict, or a strategy of numpyro.infer "
        "such as init_to_median"
    )


def sampler_for(
    kernel: MCMCKernel, *, draws: int, chains: int, warmup: int, progress: bool
) -> MCMC:
    """Make an ``MCMC`` whose chains run at the same time wherever the backend allows it."""
    sampled_kernel = without_deterministics(kernel)
    if kernel.is_ensemble_kernel:
        if chains % 2:
            raise OptionError(
                f"chains={chains!r}: {type(kernel).__name__} moves each half of its chains by the "
                "other, so their number is even"
            )
        chain_method = "vectorized"
    elif chains == 1:
        chain_method = "sequential"
    elif jax.local_device_count() >= chains:
        chain_method = "parallel"
    else:
        # Among kernels that are not ensembles, only HMC and NUTS take several keys at once.
        chain_method = "vectorized" if isinstance(kernel, HMC) else "sequential"
    return MCMC(
        sampled_kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method=chain_method,
        progress_bar=progress,
    )


def run_mcmc(problem: InferenceProblem, sampler: MCMC, *, seed: int) -> PosteriorDraws:
    """Run the chains and return their posterior draws, ``(chain, draw, ...)`` by latent site.

    Raises
    ------
    ModelError
        The model has ``param`` sites, which MCMC would leave at their initial values.
    """
    param_sites = [
        name for name in problem.named("param") if problem.sites[name].has_initial_value
    ]
    if param_sites:
        raise ModelError(
            f"sites {param_sites!r} are params, which MCMC does not move from their initial "
            "values; give them priors (numpyro.sample, random_nnx_module), or fit with "
            "method='svi'"
        )
    if not problem.named("latent"):
        raise ModelError("the model has no latent sites: there is nothing for MCMC to draw")
    return _run_sampler(problem, sampler, seed)


def _run_sampler(problem: InferenceProblem, sampler: MCMC, seed: int) -> PosteriorDraws:
    fields = _EXTRA_FIELDS if isinstance(sampler.sampler, HMC) else ()
    with trace_lock(problem.block):
        sampler.run(jax.random.key(seed), extra_fields=fields, **problem.arguments)
        samples = sampler.get_samples(group_by_chain=True)
        extra = sampler.get_extra_fields(group_by_chain=True)
    latent = set(problem.named("latent"))
    if not isinstance(samples, dict):
        raise OptionError(f"{type(sampler.sampler).__name__} does not sample the model's sites")
    return PosteriorDraws(
        samples={name: np.asarray(v) for name, v in samples.items() if name in latent},
        shape=(sampler.num_chains, sampler.num_samples // sampler.thinning),
        stats=_extract_stats(extra),
        method=f"{type(sampler.sampler).__name__}, {count_noun(sampler.num_chains, 'chain')}, "
        f"{count_noun(sampler.num_warmup, 'warmup step')}",
        continue_=continuation(problem, sampler, sampler.last_state),
        origin=_build_state(sampler),
        max_tree_depth=max_tree_depth(sampler.sampler),
    )


def _build_state(sampler: MCMC) -> SamplerState | None:
    if type(sampler.sampler) not in (HMC, NUTS):
        return None
    settings = {
        "chains": sampler.num_chains,
        "warmup": sampler.num_warmup,
        "thinning": sampler.thinning,
    }
    return SamplerState("chains", settings, sampler.last_state, sampler.sampler)


def continuation(
    problem: InferenceProblem, sampler: MCMC, state: Any
) -> Callable[[int, int], PosteriorDraws]:
    """Make the function that draws more from the chains, starting at their last ``state``."""
    # A copy, since the caller may run an MCMC of their own again.
    snapshot = copy.copy(sampler)
    snapshot.post_warmup_state = state

    def draw_more(draws: int, seed: int) -> PosteriorDraws:
        resumed = copy.copy(snapshot)
        resumed.num_samples = draws * resumed.thinning
        return _run_sampler(problem, resumed, seed)

    return draw_more


def max_tree_depth(kernel: MCMCKernel) -> int | None:
    """Return how often a tree of NUTS may double after warmup; None for other kernels."""
    if not isinstance(kernel, NUTS):
        return None
    depth = kernel._max_tree_depth
    return int(depth[1] if isinstance(depth, tuple) else depth)


def count_noun(count: int, what: str) -> str:
    """Format a count with its noun, which is in the plural unless the count is 1."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def without_deterministics(kernel: MCMCKernel) -> MCMCKernel:
    """Copy the kernel onto the model without deterministic sites, if the kernel can be copied."""

    def hide_deterministics(model: Callable) -> Callable:
        return handlers.block(model, hide_fn=lambda message: message["type"] == "deterministic")

    try:
        return kernel.wrap_model(hide_deterministics)
    except NotImplementedError:
        # A kernel that cannot be copied samples with deterministic sites: that only costs memory.
        return kernel


def _extract_stats(extra: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rename the statistics of each draw to ArviZ's names; HMC has all, other kernels few."""
    stats = {_STAT_NAMES[name]: np.asarray(v) for name, v in extra.items() if name in _STAT_NAMES}
    if "potential_energy" in extra:
        stats["lp"] = -np.asarray(extra["potential_energy"])
    if "num_steps" in extra:
        steps = np.asarray(extra["num_steps"])
        stats["tree_depth"] = np.asarray(jnp.ceil(jnp.log2(steps + 1)), np.int64)
    return stats
