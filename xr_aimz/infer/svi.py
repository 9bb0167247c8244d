"""Variational inference on all the data at once, by NumPyro's own ``SVI``.

Steps run inside ``lax.scan``, a few hundred to a call, so that the loop costs nothing
and progress can still be shown. The draws of a guide are independent: they make one
chain.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpyro
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from tqdm.auto import tqdm

from xr_aimz.defaults import LEARNING_RATE
from xr_aimz.errors import ModelError, OptionError
from xr_aimz.further import Origin
from xr_aimz.infer.coverage import check_guide
from xr_aimz.infer.mcmc import init_strategy
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.infer.repeatable import ordered
from xr_aimz.model import tracing

__all__ = ["FULL_RATE", "check_params", "reopened", "run", "sample_guide", "svi_for"]

FULL_RATE, LAST_RATE = 0.7, 1e-3
_PIECES = 50


def svi_for(
    model: Callable, guide: Any, optimizer: Any, init: Any, steps: int, last: float = LAST_RATE
) -> SVI:
    """An ``SVI`` from an autoguide (class or instance) and an optimizer.

    ``last`` is what an optimizer of our own shrinks its rate to, as a share of the full one.
    """
    if guide is None or (inspect.isclass(guide) and issubclass(guide, AutoGuide)):
        kind: Any = AutoNormal if guide is None else guide
        made = kind(model, init_loc_fn=init_strategy(init))
    elif init is not None:
        raise OptionError("init= goes with an autoguide class; this guide has its own start")
    else:
        made = guide
    return SVI(model, made, _optimizer(optimizer, steps, last), ordered(Trace_ELBO()))


def _optimizer(optimizer: Any, steps: int, last: float) -> Any:
    """Adam from a learning rate, which shrinks to a share of it at the end; else as given."""
    # A constant step ends in a cloud around the optimum as wide as the step; the sds of a
    # guide are wrong by as much. One that shrinks from the start stops anywhere, and the
    # loss would look as settled there as at the optimum.
    if optimizer is None or isinstance(optimizer, (int, float)):
        rate = LEARNING_RATE if optimizer is None else float(optimizer)
        full = int(FULL_RATE * steps)

        def schedule(step: Any) -> Any:
            descent = jax.numpy.clip((step - full) / max(steps - full, 1), 0, 1)
            return rate * last**descent

        return numpyro.optim.Adam(schedule)
    return optimizer


def run(
    problem: Problem,
    svi: SVI,
    *,
    steps: int,
    draws: int,
    seed: int,
    progress: bool,
    full_rate: float = 1.0,
) -> Draws:
    """Optimize a guide, then draw from it: one chain of independent draws.

    ``full_rate`` is the share of the steps before a step size of our own shrinks: there
    the loss shows whether it has settled.
    """
    start, sample = jax.random.split(jax.random.key(seed))
    arrays = {n: v for n, v in problem.arguments.items() if isinstance(v, jax.Array)}
    rest = {n: v for n, v in problem.arguments.items() if n not in arrays}
    with tracing(problem.block):
        state = svi.init(start, **problem.arguments)
        check_guide(problem, svi.guide, svi.get_params(state))
        state, losses = _optimize(svi, state, arrays, rest, steps, progress)
        params = svi.get_params(state)
        samples = sample_guide(svi.guide, problem, params, sample, draws)

    def more(draws: int, seed: int) -> dict[str, np.ndarray]:
        with tracing(problem.block):
            return sample_guide(svi.guide, problem, params, jax.random.key(seed), draws)

    names = {*problem.named("param")}
    kept = {name: value for name, value in params.items() if name in names}
    if state.mutable_state is not None:
        kept |= dict(state.mutable_state)
    return Draws(
        samples=samples,
        shape=(1, draws),
        method=f"SVI, {type(svi.guide).__name__}, {steps} steps",
        params=jax.tree.map(np.asarray, kept),
        losses=losses,
        full_rate_steps=int(full_rate * steps),
        more=more,
        origin=None if svi.static_kwargs else Origin("guide", {}, params, svi.guide),
    )


def reopened(
    problem: Problem, guide: Any, params: Mapping[str, Any]
) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Further draws of a guide that was trained before."""
    svi = SVI(problem.model, guide, numpyro.optim.SGD(0.0), Trace_ELBO())
    with tracing(problem.block):
        # An autoguide knows its sites once it has seen the model.
        check_params(svi.get_params(svi.init(jax.random.key(0), **problem.arguments)), params)

    def more(draws: int, seed: int) -> dict[str, np.ndarray]:
        with tracing(problem.block):
            return sample_guide(guide, problem, params, jax.random.key(seed), draws)

    return more


def check_params(like: Any, params: Any) -> None:
    """Refuse params that are not of the guide."""
    ours, theirs = (
        {jax.tree_util.keystr(k): np.shape(v) for k, v in jax.tree_util.tree_leaves_with_path(x)}
        for x in (like, params)
    )
    if ours != theirs:
        raise OptionError(
            f"the guide has params {ours!r}, and those that are kept are {theirs!r}; give the "
            "guide of the fit"
        )


def _optimize(
    svi: SVI, state: Any, arrays: dict, rest: dict, steps: int, progress: bool
) -> tuple[Any, np.ndarray]:
    piece = max(1, steps // _PIECES)

    def advance(state: Any, arrays: dict, length: int) -> tuple[Any, Any]:
        return jax.lax.scan(
            lambda s, _: svi.update(s, **arrays, **rest), state, None, length=length
        )

    advance = jax.jit(advance, static_argnames="length")
    losses: list[np.ndarray] = []
    with tqdm(total=steps, desc="SVI", disable=not progress) as bar:
        while (done := sum(map(len, losses))) < steps:
            state, found = advance(state, arrays, length=min(piece, steps - done))
            losses.append(np.asarray(found))
            bar.update(len(found))
            bar.set_postfix(loss=f"{losses[-1].mean():.6g}")
    return state, np.concatenate(losses)


def sample_guide(
    guide: Any, problem: Problem, params: Any, key: Any, draws: int
) -> dict[str, np.ndarray]:
    """Draws of a guide with those params, as one chain."""
    latent = problem.named("latent")
    if not latent:
        return {}
    # Where the loss is not finite, neither are the draws: a warning will say so, where
    # NumPyro's checks would raise before it.
    with numpyro.validation_enabled(False):
        if isinstance(guide, AutoGuide):
            found = guide.sample_posterior(key, params, sample_shape=(draws,))
        else:
            drawer = Predictive(guide, params=params, num_samples=draws)
            found = drawer(key, **problem.arguments)
    absent = [name for name in latent if name not in found]
    if absent:
        raise ModelError(f"the guide does not cover the latent sites {absent!r} of the model")
    return {name: np.asarray(found[name])[None] for name in latent}
