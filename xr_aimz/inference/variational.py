"""Run variational inference on data in memory, by SVI or Stein, and check the guides.

A guide must have the model's latent sites and no others. Draws from it are one chain of
independent draws.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.contrib.einstein import SteinVI
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from tqdm.auto import tqdm

from xr_aimz.errors import ModelError, OptionError
from xr_aimz.inference.mcmc import init_strategy
from xr_aimz.inference.problem import LEARNING_RATE, InferenceProblem, PosteriorDraws, SamplerState
from xr_aimz.inference.reflection import order_leaves
from xr_aimz.tracing import trace_lock


def check_guide(problem: InferenceProblem, guide: Callable, params: Mapping[str, Any]) -> None:
    """Check that a guide has the latent sites of the model and no others, before the first step.

    Raises
    ------
    ModelError
        The guide lacks a latent site, or has a site that the model lacks.
    """
    guide_sites: set[str] = set()

    def collect_sites(params: Any) -> None:
        seeded = handlers.seed(handlers.substitute(guide, data=params), jax.random.key(0))
        trace = handlers.trace(seeded).get_trace(**problem.arguments)
        guide_sites.update(
            n
            for n, m in trace.items()
            if m["type"] == "sample" and not _is_observed_or_auxiliary(m)
        )

    jax.eval_shape(collect_sites, dict(params))
    latent = problem.named("latent")
    name = getattr(guide, "__name__", type(guide).__name__)
    absent = [n for n in latent if n not in guide_sites]
    if absent:
        raise ModelError(
            f"the guide {name} does not cover the latent sites {absent!r} of the model; it has "
            f"{sorted(guide_sites)!r}. Sample them in the guide, or take method='svi', whose "
            "guide covers all"
        )
    extra_sites = sorted(guide_sites - set(latent))
    if extra_sites:
        raise ModelError(
            f"the guide {name} samples {extra_sites!r}, which are no latent sites of the model; "
            f"it has {latent!r}. Rename them, or mark helper sites of the guide "
            'infer={"is_auxiliary": True}'
        )


def _is_observed_or_auxiliary(message: Mapping[str, Any]) -> bool:
    return bool(message["is_observed"]) or bool(message["infer"].get("is_auxiliary", False))


FULL_RATE, LAST_RATE = 0.7, 1e-3
_PROGRESS_UPDATES = 50


def svi_for(
    model: Callable, guide: Any, optimizer: Any, init: Any, steps: int, last: float = LAST_RATE
) -> SVI:
    """Make an ``SVI`` from an autoguide (class or instance) and an optimizer.

    ``last`` is the final learning rate of the default optimizer, as a share of the full rate.
    """
    if guide is None or (inspect.isclass(guide) and issubclass(guide, AutoGuide)):
        guide_class: Any = AutoNormal if guide is None else guide
        guide_instance = guide_class(model, init_loc_fn=init_strategy(init))
    elif init is not None:
        raise OptionError(
            "init= goes with an autoguide class; this guide has its own initial values"
        )
    else:
        guide_instance = guide
    return SVI(
        model, guide_instance, _make_optimizer(optimizer, steps, last), order_leaves(Trace_ELBO())
    )


def _make_optimizer(optimizer: Any, steps: int, last_share: float) -> Any:
    """Make Adam from a rate, which decays at the end; return another optimizer unchanged."""
    # With a constant step the iterates scatter around the optimum as widely as the step; the
    # sds of a guide are wrong by as much. A step that shrinks from the start stops anywhere,
    # and the loss would look as converged there as at the optimum.
    if optimizer is None or isinstance(optimizer, (int, float)):
        rate = LEARNING_RATE if optimizer is None else float(optimizer)
        full_steps = int(FULL_RATE * steps)

        def schedule(step: Any) -> Any:
            descent = jax.numpy.clip((step - full_steps) / max(steps - full_steps, 1), 0, 1)
            return rate * last_share**descent

        return numpyro.optim.Adam(schedule)
    return optimizer


def run_svi(
    problem: InferenceProblem,
    svi: SVI,
    *,
    steps: int,
    draws: int,
    seed: int,
    progress: bool,
    full_rate: float = 1.0,
) -> PosteriorDraws:
    """Optimize a guide, then draw from it: samples ``(1, draw, ...)``, independent, as one chain.

    ``full_rate`` is the share of the steps before the rate of the default optimizer decays:
    the loss of these steps shows whether it has converged.
    """
    init_key, sample_key = jax.random.split(jax.random.key(seed))
    arrays = {n: v for n, v in problem.arguments.items() if isinstance(v, jax.Array)}
    constants = {n: v for n, v in problem.arguments.items() if n not in arrays}
    with trace_lock(problem.block):
        state = svi.init(init_key, **problem.arguments)
        check_guide(problem, svi.guide, svi.get_params(state))
        state, losses = _optimize(svi, state, arrays, constants, steps, progress)
        params = svi.get_params(state)
        samples = sample_guide(svi.guide, problem, params, sample_key, draws)

    def draw_more(draws: int, seed: int) -> dict[str, np.ndarray]:
        with trace_lock(problem.block):
            return sample_guide(svi.guide, problem, params, jax.random.key(seed), draws)

    param_names = {*problem.named("param")}
    final_params = {name: value for name, value in params.items() if name in param_names}
    if state.mutable_state is not None:
        final_params |= dict(state.mutable_state)
    return PosteriorDraws(
        samples=samples,
        shape=(1, draws),
        method=f"SVI, {type(svi.guide).__name__}, {steps} steps",
        params=jax.tree.map(np.asarray, final_params),
        losses=losses,
        full_rate_steps=int(full_rate * steps),
        continue_=draw_more,
        origin=None if svi.static_kwargs else SamplerState("guide", {}, params, svi.guide),
    )


def restore_guide(
    problem: InferenceProblem, guide: Any, params: Mapping[str, Any]
) -> Callable[[int, int], dict[str, np.ndarray]]:
    """Make the function that draws more from a guide with params of an earlier fit."""
    svi = SVI(problem.model, guide, numpyro.optim.SGD(0.0), Trace_ELBO())
    with trace_lock(problem.block):
        # An autoguide has its sites only after it has traced the model.
        check_params(svi.get_params(svi.init(jax.random.key(0), **problem.arguments)), params)

    def draw_more(draws: int, seed: int) -> dict[str, np.ndarray]:
        with trace_lock(problem.block):
            return sample_guide(guide, problem, params, jax.random.key(seed), draws)

    return draw_more


def check_params(like: Any, params: Any) -> None:
    """Check that params have the names and shapes of the guide's own params, ``like``."""
    guide_shapes, stored_shapes = (
        {jax.tree_util.keystr(k): np.shape(v) for k, v in jax.tree_util.tree_leaves_with_path(x)}
        for x in (like, params)
    )
    if guide_shapes != stored_shapes:
        raise OptionError(
            f"the guide has params {guide_shapes!r}, and the stored ones are {stored_shapes!r}; "
            "give the guide of the fit"
        )


def _optimize(
    svi: SVI, state: Any, arrays: dict, constants: dict, steps: int, progress: bool
) -> tuple[Any, np.ndarray]:
    chunk_size = max(1, steps // _PROGRESS_UPDATES)

    def advance(state: Any, arrays: dict, length: int) -> tuple[Any, Any]:
        return jax.lax.scan(
            lambda s, _: svi.update(s, **arrays, **constants), state, None, length=length
        )

    advance = jax.jit(advance, static_argnames="length")
    losses: list[np.ndarray] = []
    with tqdm(total=steps, desc="SVI", disable=not progress) as bar:
        while (completed := sum(map(len, losses))) < steps:
            state, chunk_losses = advance(state, arrays, length=min(chunk_size, steps - completed))
            losses.append(np.asarray(chunk_losses))
            bar.update(len(chunk_losses))
            bar.set_postfix(loss=f"{losses[-1].mean():.6g}")
    return state, np.concatenate(losses)


def sample_guide(
    guide: Any, problem: InferenceProblem, params: Any, key: Any, draws: int
) -> dict[str, np.ndarray]:
    """Draw from a guide with those params: arrays ``(1, draw, ...)`` by latent site, one chain."""
    latent = problem.named("latent")
    if not latent:
        return {}
    # If the loss is not finite, neither are the draws: a warning reports this later, and
    # NumPyro's checks would raise before it.
    with numpyro.validation_enabled(False):
        if isinstance(guide, AutoGuide):
            samples = guide.sample_posterior(key, params, sample_shape=(draws,))
        else:
            predictive = Predictive(guide, params=params, num_samples=draws)
            samples = predictive(key, **problem.arguments)
    absent = [name for name in latent if name not in samples]
    if absent:
        raise ModelError(f"the guide does not cover the latent sites {absent!r} of the model")
    return {name: np.asarray(samples[name])[None] for name in latent}


def run_stein(
    problem: InferenceProblem, stein: SteinVI, *, steps: int, draws: int, seed: int, progress: bool
) -> PosteriorDraws:
    """Move the particles, then draw from their mixture: samples ``(1, draw, ...)`` by latent site.

    The force on the particles is not a loss, so no losses are returned, and the number of steps
    is the only evidence for or against convergence.
    """
    init_key, sample_key = jax.random.split(jax.random.key(seed))
    with trace_lock(problem.block):
        if not isinstance(stein.guide, AutoGuide):
            check_guide(problem, stein.guide, {})
        params = stein.run(init_key, steps, progress_bar=progress, **problem.arguments).params
        samples = _sample_mixture(problem, stein, params, sample_key, draws)

    def draw_more(draws: int, seed: int) -> dict[str, np.ndarray]:
        with trace_lock(problem.block):
            return _sample_mixture(problem, stein, params, jax.random.key(seed), draws)

    final_params = {name: params[name] for name in problem.named("param") if name in params}
    return PosteriorDraws(
        samples=samples,
        shape=(1, draws),
        method=f"{type(stein).__name__}, {type(stein.guide).__name__}, "
        f"{stein.num_stein_particles} particles, {steps} steps",
        params=jax.tree.map(np.asarray, final_params),
        continue_=draw_more,
        concerns=(few_steps_concern(steps),) if steps < LEAST_STEPS else (),
    )


def _sample_mixture(
    problem: InferenceProblem, stein: SteinVI, params: Any, key: Any, draws: int
) -> dict[str, np.ndarray]:
    latent = problem.named("latent")
    particle_params = {
        n: v for n, v in params.items() if n in stein.guide_sites and not _is_shared(stein, n)
    }

    def sample_particle(key: Any) -> dict[str, jax.Array]:
        particle_key, draw_key = jax.random.split(key)
        particle = jax.random.randint(particle_key, (), 0, stein.num_stein_particles)
        guide_params = params | jax.tree.map(lambda x: x[particle], particle_params)
        guide = handlers.seed(handlers.substitute(stein.guide, data=guide_params), draw_key)
        sites = handlers.trace(guide).get_trace(**problem.arguments)
        return {name: sites[name]["value"] for name in latent}

    samples = jax.jit(jax.vmap(sample_particle))(jax.random.split(key, draws))
    return {name: np.asarray(value)[None] for name, value in samples.items()}


def _is_shared(stein: SteinVI, name: str) -> bool:
    return bool(stein.non_mixture_params_fn(name))


# With fewer steps convergence cannot be judged: a line fitted to three tenths of them falls by
# four of its standard errors by chance too often, and at a rate of 0.05 they do not get far. With
# more steps the line must show a fall of half a nat per latent value in a tenth of them: a mean
# that is one posterior sd off costs half a nat.
LEAST_STEPS, VISIBLE_NATS = 100, 0.5


def few_steps_concern(count: int) -> str:
    """Return the concern of a fit whose steps are too few to judge its convergence."""
    return (
        f"{count} steps are too few to see whether the fit has settled: take {LEAST_STEPS} or more"
    )
