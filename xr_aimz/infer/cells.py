"""One cell's inference as a pure function, to be mapped over cells.

Each function takes a key and the arguments of one cell, and gives one chain of draws and a
status. It has no Python state that outlives its trace and stops by itself, so that cells,
and the chains of a cell, can be lanes of one map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.errors import ModelError
from xr_aimz.infer import laplace, mcmc, svi
from xr_aimz.infer.problem import Problem

__all__ = [
    "FLAGS",
    "NO_DATA",
    "OK",
    "CellMethod",
    "Lane",
    "cell_status",
    "deterministics",
    "laplace_cells",
    "mcmc_cells",
    "svi_cells",
]

# The meanings of a status, in order of its values.
FLAGS = ("ok", "no_data", "not_finite", "diverged", "no_mode")
OK, NO_DATA, NOT_FINITE, DIVERGED, NO_MODE = range(len(FLAGS))
# A map steps on until its last cell is done, so few cells waste less on each other; but
# each step has a cost of its own. Measured: docs/decisions/cells.md.
_MCMC_LANES, _SVI_LANES, _LAPLACE_LANES = 48, 112, 240
_LOSSES = 500


class Lane(NamedTuple):
    """What the inference of one chain in one cell gives.

    ``samples`` and ``stats`` are arrays ``(draw, ...)`` by name, ``losses`` the mean loss of
    each run of steps, or None.
    """

    samples: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    losses: jax.Array | None
    status: jax.Array


@dataclass(frozen=True)
class CellMethod:
    """How each cell is fitted.

    Parameters
    ----------
    infer : callable
        From a problem, a chain's key and a cell's arguments to a :class:`Lane`; traceable.
    check : callable
        Refuses a problem that this method cannot take.
    shape : tuple of int
        The number of chains, and of draws a chain.
    lanes : int
        How many chains of cells are mapped over at once.
    name : str
    loss_steps : tuple of int
        After which step each loss was taken.
    full_rate : float
        The share of the steps at the optimizer's full rate.
    max_tree_depth : int, optional
        Of the trees of NUTS.
    """

    infer: Callable[[Problem, jax.Array, Mapping[str, Any]], Lane]
    check: Callable[[Problem], None]
    shape: tuple[int, int]
    lanes: int
    name: str
    loss_steps: tuple[int, ...] = ()
    full_rate: float = 1.0
    max_tree_depth: int | None = None


def mcmc_cells(
    make_kernel: Callable[[Callable], MCMCKernel], *, draws: int, chains: int, warmup: int
) -> CellMethod:
    """Chains in every cell; ``make_kernel`` makes a kernel anew for each trace."""

    def infer(problem: Problem, key: jax.Array, arguments: Mapping[str, Any]) -> Lane:
        sampler = MCMC(
            mcmc.without_deterministics(make_kernel(problem.model)),
            num_warmup=warmup,
            num_samples=draws,
            progress_bar=False,
        )
        sampler.run(key, extra_fields=("diverging", "potential_energy", "num_steps"), **arguments)
        found, extra = sampler.get_samples(), sampler.get_extra_fields()
        samples = {name: found[name] for name in problem.named("latent")}
        finite = _finite([*samples.values(), extra["potential_energy"]])
        lost = jnp.where(jnp.all(extra["diverging"]), DIVERGED, OK)
        stats = {
            "diverging": extra["diverging"],
            "lp": -extra["potential_energy"],
            "n_steps": extra["num_steps"],
        }
        return Lane(samples, stats, None, jnp.where(finite, lost, NOT_FINITE))

    kernel = make_kernel(lambda: None)
    counted = f"{mcmc.counted(chains, 'chain')}, {mcmc.counted(warmup, 'warmup step')}"
    name = f"{type(kernel).__name__} per cell, {counted}"
    depth = mcmc.max_tree_depth(kernel)
    return CellMethod(infer, _check, (chains, draws), _MCMC_LANES, name, max_tree_depth=depth)


def svi_cells(
    guide: Any, optimizer: Any, init: Any, *, draws: int, steps: int, full_rate: float
) -> CellMethod:
    """A guide in every cell: an autoguide's class, made anew for each trace."""
    stride = -(-steps // _LOSSES)
    first = steps % stride

    def infer(problem: Problem, key: jax.Array, arguments: Mapping[str, Any]) -> Lane:
        inference = svi.svi_for(problem.model, guide, optimizer, init, steps)
        start, sample = jax.random.split(key)
        state = inference.init(start, **arguments)

        def walk(state: Any, length: int) -> tuple[Any, jax.Array]:
            def step(state: Any, _: None) -> tuple[Any, jax.Array]:
                return inference.update(state, **arguments)

            state, losses = jax.lax.scan(step, state, None, length=length)
            return state, losses.mean()

        if first:
            state, _ = walk(state, first)
        state, losses = jax.lax.scan(
            lambda s, _: walk(s, stride), state, None, length=steps // stride
        )
        params = inference.get_params(state)
        found = inference.guide.sample_posterior(sample, params, sample_shape=(draws,))
        samples = {name: found[name] for name in problem.named("latent")}
        finite = _finite([*samples.values(), losses[-1]])
        return Lane(samples, {}, losses, jnp.where(finite, OK, NOT_FINITE))

    at = tuple(range(first + stride, steps + 1, stride))
    name = f"SVI per cell, {guide.__name__ if guide else 'AutoNormal'}, {steps} steps"
    return CellMethod(infer, _check, (1, draws), _SVI_LANES, name, at, full_rate)


def laplace_cells(init: Any, *, draws: int) -> CellMethod:
    """A mode and its curvature in every cell."""

    def infer(problem: Problem, key: jax.Array, arguments: Mapping[str, Any]) -> Lane:
        found = laplace.approximate(problem, key, arguments, draws=draws, init=init)
        finite = jnp.where(_finite(found.samples.values()), OK, NOT_FINITE)
        return Lane(found.samples, {}, None, jnp.where(found.found, finite, NO_MODE))

    def check(problem: Problem) -> None:
        _check(problem)
        laplace.check(problem)

    return CellMethod(infer, check, (1, draws), _LAPLACE_LANES, "Laplace per cell")


def deterministics(
    problem: Problem, arguments: Mapping[str, Any], samples: Mapping[str, jax.Array], names: Any
) -> dict[str, jax.Array]:
    """Deterministic sites ``(draw, ...)`` at draws of the latents; traceable."""

    def at(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        # Every site is known, so the key is used by nothing.
        model = handlers.substitute(handlers.seed(problem.model, jax.random.key(0)), values)
        trace = handlers.trace(model).get_trace(**arguments)
        return {name: trace[name]["value"] for name in names}

    with numpyro.validation_enabled(False):
        return jax.vmap(at)(dict(samples))


def _check(problem: Problem) -> None:
    trained = [name for name in problem.named("param") if problem.sites[name].trained]
    if trained:
        raise ModelError(
            f"sites {trained!r} are params, and a fit with per= has no place for one in each "
            "cell; give them priors (numpyro.sample, random_nnx_module)"
        )
    if not problem.named("latent"):
        raise ModelError("the model has no latent sites: there is nothing to fit")


def _finite(values: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(value)) for value in values]))


def cell_status(chains: jax.Array) -> jax.Array:
    """The status of cells from those of their chains ``(cell, chain)``.

    One chain without numbers spoils its cell; one that diverged shows in its R-hat, and only
    where all did is nothing left.
    """
    spoiled = ((chains != OK) & (chains != DIVERGED)).any(axis=1)
    worst = jnp.where(spoiled[:, None] & (chains == DIVERGED), OK, chains).max(axis=1)
    diverged = jnp.where((chains == DIVERGED).all(axis=1), DIVERGED, OK)
    return jnp.where(spoiled, worst, diverged).astype(jnp.int8)
