"""Markov chain Monte Carlo: NumPyro's own ``MCMC``, told which chains can run at once.

Deterministic sites are hidden while chains run: NumPyro would keep every draw of them,
and one that spans the data weighs more than the posterior. They are computed after.
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
from xr_aimz.further import Origin
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.model import tracing

__all__ = [
    "continuation",
    "counted",
    "init_strategy",
    "kernel_for",
    "max_tree_depth",
    "run",
    "sampler_for",
    "without_deterministics",
]

# NumPyro's names for what ArviZ calls otherwise.
_STATS = {
    "diverging": "diverging",
    "energy": "energy",
    "accept_prob": "acceptance_rate",
    "num_steps": "n_steps",
    "adapt_state.step_size": "step_size",
}
_FIELDS = (*_STATS, "potential_energy")


def kernel_for(model: Callable, init: Any) -> MCMCKernel:
    """NUTS with NumPyro's defaults, started from ``init``."""
    return NUTS(model, init_strategy=init_strategy(init))


def init_strategy(init: Any) -> Callable:
    """NumPyro's initialization strategy for ``init=``: a strategy, or values by site."""
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
    """An ``MCMC`` whose chains run at the same time wherever the backend allows it."""
    hidden = without_deterministics(kernel)
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
        # Of the kernels that are no ensembles only HMC and NUTS take several keys at once.
        chain_method = "vectorized" if isinstance(kernel, HMC) else "sequential"
    return MCMC(
        hidden,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method=chain_method,
        progress_bar=progress,
    )


def run(problem: Problem, sampler: MCMC, *, seed: int) -> Draws:
    """Run the chains.

    Raises
    ------
    ModelError
        The model has ``param`` sites, which MCMC would leave at their initial values.
    """
    trained = [name for name in problem.named("param") if problem.sites[name].trained]
    if trained:
        raise ModelError(
            f"sites {trained!r} are params, which MCMC does not move from their initial values; "
            "give them priors (numpyro.sample, random_nnx_module), or fit with method='svi'"
        )
    if not problem.named("latent"):
        raise ModelError("the model has no latent sites: there is nothing for MCMC to draw")
    return _drawn(problem, sampler, seed)


def _drawn(problem: Problem, sampler: MCMC, seed: int) -> Draws:
    fields = _FIELDS if isinstance(sampler.sampler, HMC) else ()
    with tracing(problem.block):
        sampler.run(jax.random.key(seed), extra_fields=fields, **problem.arguments)
        samples = sampler.get_samples(group_by_chain=True)
        extra = sampler.get_extra_fields(group_by_chain=True)
    latent = set(problem.named("latent"))
    if not isinstance(samples, dict):
        raise OptionError(f"{type(sampler.sampler).__name__} does not sample the model's sites")
    return Draws(
        samples={name: np.asarray(v) for name, v in samples.items() if name in latent},
        shape=(sampler.num_chains, sampler.num_samples // sampler.thinning),
        stats=_stats(extra),
        method=f"{type(sampler.sampler).__name__}, {counted(sampler.num_chains, 'chain')}, "
        f"{counted(sampler.num_warmup, 'warmup step')}",
        more=continuation(problem, sampler, sampler.last_state),
        origin=_origin(sampler),
        max_tree_depth=max_tree_depth(sampler.sampler),
    )


def _origin(sampler: MCMC) -> Origin | None:
    if type(sampler.sampler) not in (HMC, NUTS):
        return None
    settings = {
        "chains": sampler.num_chains,
        "warmup": sampler.num_warmup,
        "thinning": sampler.thinning,
    }
    return Origin("chains", settings, sampler.last_state, sampler.sampler)


def continuation(problem: Problem, sampler: MCMC, state: Any) -> Callable[[int, int], Draws]:
    """Further draws of chains that go on from a state."""
    # Of this moment: the caller may run an MCMC of their own again.
    there = copy.copy(sampler)
    there.post_warmup_state = state

    def more(draws: int, seed: int) -> Draws:
        further = copy.copy(there)
        further.num_samples = draws * further.thinning
        return _drawn(problem, further, seed)

    return more


def max_tree_depth(kernel: MCMCKernel) -> int | None:
    """How often a tree of NUTS may double after warmup; None of other kernels."""
    if not isinstance(kernel, NUTS):
        return None
    depth = kernel._max_tree_depth
    return int(depth[1] if isinstance(depth, tuple) else depth)


def counted(count: int, what: str) -> str:
    """A count with its noun, in the plural where it is one."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def without_deterministics(kernel: MCMCKernel) -> MCMCKernel:
    """The kernel on the model without its deterministic sites, where it can be copied."""

    def hide(model: Callable) -> Callable:
        return handlers.block(model, hide_fn=lambda message: message["type"] == "deterministic")

    try:
        return kernel.wrap_model(hide)
    except NotImplementedError:
        # A kernel that cannot be copied keeps its deterministics: only memory is lost.
        return kernel


def _stats(extra: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the kernel keeps of each draw, by ArviZ's names: of HMC all, of others little."""
    stats = {_STATS[name]: np.asarray(v) for name, v in extra.items() if name in _STATS}
    if "potential_energy" in extra:
        stats["lp"] = -np.asarray(extra["potential_energy"])
    if "num_steps" in extra:
        steps = np.asarray(extra["num_steps"])
        stats["tree_depth"] = np.asarray(jnp.ceil(jnp.log2(steps + 1)), np.int64)
    return stats
