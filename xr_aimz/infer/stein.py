"""Stein variational inference, by NumPyro's own ``SteinVI``: a mixture of guides.

Each draw picks a component of the mixture, a Stein particle, and draws from the guide with
that particle's params. The draws are independent: they make one chain. Of ``SVGD`` and
``ASVGD``, whose guides are points, they are the particles themselves, again and again.

NumPyro's ``SteinVI`` and ``ASVGD`` sum the force of the data over the particles, where ``SVGD``
divides it by their number: their posteriors come out too narrow, by more than a factor of two
with four particles. ``loss_temperature=`` is the caller's to set.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from numpyro import handlers
from numpyro.contrib.einstein import SteinVI
from numpyro.infer.autoguide import AutoGuide

from xr_aimz.diagnostics import LEAST_STEPS, few_steps
from xr_aimz.infer.coverage import check_guide
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.model import tracing

__all__ = ["run"]


def run(
    problem: Problem, stein: SteinVI, *, steps: int, draws: int, seed: int, progress: bool
) -> Draws:
    """Move the particles, then draw from their mixture.

    The force on the particles is no loss, so none is kept, and nothing but the number of
    steps speaks for or against the fit.
    """
    start, sample = jax.random.split(jax.random.key(seed))
    with tracing(problem.block):
        if not isinstance(stein.guide, AutoGuide):
            check_guide(problem, stein.guide, {})
        params = stein.run(start, steps, progress_bar=progress, **problem.arguments).params
        samples = _mixture(problem, stein, params, sample, draws)

    def more(draws: int, seed: int) -> dict[str, np.ndarray]:
        with tracing(problem.block):
            return _mixture(problem, stein, params, jax.random.key(seed), draws)

    kept = {name: params[name] for name in problem.named("param") if name in params}
    return Draws(
        samples=samples,
        shape=(1, draws),
        method=f"{type(stein).__name__}, {type(stein.guide).__name__}, "
        f"{stein.num_stein_particles} particles, {steps} steps",
        params=jax.tree.map(np.asarray, kept),
        more=more,
        concerns=(few_steps(steps),) if steps < LEAST_STEPS else (),
    )


def _mixture(
    problem: Problem, stein: SteinVI, params: Any, key: Any, draws: int
) -> dict[str, np.ndarray]:
    latent = problem.named("latent")
    each = {n: v for n, v in params.items() if n in stein.guide_sites and not _shared(stein, n)}

    def one(key: Any) -> dict[str, jax.Array]:
        pick, draw = jax.random.split(key)
        particle = jax.random.randint(pick, (), 0, stein.num_stein_particles)
        mine = params | jax.tree.map(lambda x: x[particle], each)
        guide = handlers.seed(handlers.substitute(stein.guide, data=mine), draw)
        sites = handlers.trace(guide).get_trace(**problem.arguments)
        return {name: sites[name]["value"] for name in latent}

    found = jax.jit(jax.vmap(one))(jax.random.split(key, draws))
    return {name: np.asarray(value)[None] for name, value in found.items()}


def _shared(stein: SteinVI, name: str) -> bool:
    return bool(stein.non_mixture_params_fn(name))
