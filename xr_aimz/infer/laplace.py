"""Laplace's approximation: the mode of a posterior, and a Gaussian of its curvature there.

The mode is found on the unconstrained space by Newton's method, damped by a ridge that
grows whenever a step does not descend (Levenberg and Marquardt). Draws of the Gaussian
are mapped back by the model's own constraints; they are independent, and make one chain.
The search stops when the next step would be a thousandth of a posterior sd.

References
----------
Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal
densities, Journal of the American Statistical Association 81.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_solve, solve_triangular
from numpyro import handlers
from numpyro.infer import init_to_median
from numpyro.infer.util import initialize_model

from xr_aimz.errors import ModelError
from xr_aimz.infer.mcmc import init_strategy
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.model import tracing

__all__ = ["Approximation", "approximate", "check", "run"]

STEPS = 100
# In posterior sds: where the search stops, and how far from the mode an end still is one.
_CLOSE, _NEAR = 1e-3, 0.05
_RIDGE, _LEAST_RIDGE, _FACTOR = 1e-2, 1e-7, 8.0
_MOST_VALUES = 4096


class Approximation(NamedTuple):
    """Draws ``(draw, ...)`` by site, whether a mode was found, and how far off it may be.

    ``gap`` is the length of the Newton step that is left, in posterior sds; NaN where the
    curvature is not positive.
    """

    samples: dict[str, jax.Array]
    found: jax.Array
    gap: jax.Array


class _Point(NamedTuple):
    place: jax.Array
    value: jax.Array
    gradient: jax.Array
    curvature: jax.Array


class _Search(NamedTuple):
    at: _Point
    gap: jax.Array
    ridge: jax.Array
    step: jax.Array


def check(problem: Problem) -> None:
    """Refuse what has no mode with a curvature.

    Raises
    ------
    ModelError
        Discrete latent sites, or more latent values than a dense curvature can hold.
    """
    latent = [problem.sites[name] for name in problem.named("latent")]
    discrete = [s.name for s in latent if np.dtype(s.dtype).kind != "f"]
    if discrete:
        raise ModelError(
            f"latent sites {discrete!r} are discrete: a Laplace approximation needs a curvature. "
            "Sum them out, or sample them with a kernel of NumPyro's"
        )
    count = sum(prod(s.shape) for s in latent)
    if count > _MOST_VALUES:
        raise ModelError(
            f"the model has {count} latent values, and method='laplace' holds a matrix of that "
            f"by that; at most {_MOST_VALUES}. Use method='svi', or per=... for a fit per cell"
        )


def approximate(
    problem: Problem, key: jax.Array, arguments: Mapping[str, Any], *, draws: int, init: Any
) -> Approximation:
    """The mode, the curvature and the draws, for one set of arguments; traceable.

    Parameters
    ----------
    problem : Problem
        Its ``arguments`` are not used.
    key : PRNG key
    arguments : mapping
        The model's arguments, outcomes included.
    draws : int
    init : optional
        As in :func:`xr_aimz.fit`; by default the prior's median.
    """
    first, last = jax.random.split(key)
    strategy = init_to_median if init is None else init_strategy(init)
    start, potential, constrain, _ = initialize_model(
        first, _bare(problem.model), model_kwargs=dict(arguments), init_strategy=strategy
    )
    place, unravel = ravel_pytree(start.z)
    search = _mode(lambda z: potential(unravel(z)), place)
    factor = jnp.linalg.cholesky(search.at.curvature)
    noise = jax.random.normal(last, (draws, place.size), place.dtype)
    away = jax.vmap(lambda e: solve_triangular(factor, e, trans="T", lower=True))(noise)
    values = jax.vmap(lambda z: constrain(unravel(z)))(search.at.place + away)
    samples = {name: values[name] for name in problem.named("latent")}
    return Approximation(samples, search.gap < _NEAR, search.gap)


def _bare(model: Callable) -> Callable:
    return handlers.block(model, hide_fn=lambda message: message["type"] == "deterministic")


def _mode(potential: Callable, start: jax.Array) -> _Search:
    """Newton's method from ``start``: at most STEPS steps, each of which descends."""

    def look(place: jax.Array) -> _Point:
        value, gradient = jax.value_and_grad(potential)(place)
        return _Point(place, value, gradient, jax.hessian(potential)(place))

    def going(search: _Search) -> jax.Array:
        # A gap that is not a number is no reason to stop.
        return (search.step < STEPS) & ~(search.gap < _CLOSE)

    def advance(search: _Search) -> _Search:
        at, ridge = search.at, search.ridge
        there = look(at.place - _damped(at, ridge))
        # Near the mode steps are lost in rounding; they may go up by that.
        slack = 4 * jnp.finfo(at.value.dtype).eps * jnp.abs(at.value)
        better = _usable(there) & ((there.value <= at.value + slack) | ~_usable(at))
        moved = jax.tree.map(lambda new, old: jnp.where(better, new, old), there, at)
        eased = jnp.where(better, ridge / _FACTOR, ridge * _FACTOR)
        return _Search(moved, _gap(moved), jnp.maximum(eased, _LEAST_RIDGE), search.step + 1)

    at = look(start)
    begin = _Search(at, _gap(at), jnp.asarray(_RIDGE, start.dtype), jnp.asarray(0))
    return jax.lax.while_loop(going, advance, begin)


def _usable(point: _Point) -> jax.Array:
    parts = (point.value, point.gradient, point.curvature)
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in parts]))


def _damped(at: _Point, ridge: jax.Array) -> jax.Array:
    """The Newton step against a curvature raised along its own diagonal; no step at worst."""
    diagonal = jnp.abs(jnp.diagonal(at.curvature))
    floor = 1e-6 * jnp.max(diagonal)
    raised = at.curvature + jnp.diag(ridge * jnp.maximum(diagonal, floor))
    step = cho_solve((jnp.linalg.cholesky(raised), True), at.gradient)
    return jnp.where(jnp.all(jnp.isfinite(step)), step, jnp.nan)


def _gap(at: _Point) -> jax.Array:
    """The length of the undamped step in posterior sds; NaN without a positive curvature."""
    factor = jnp.linalg.cholesky(at.curvature)
    return jnp.linalg.norm(solve_triangular(factor, at.gradient, lower=True))


def run(problem: Problem, *, draws: int, seed: int, init: Any) -> Draws:
    """One Laplace approximation, of all the data.

    Raises
    ------
    ModelError
        No mode was found.
    """
    check(problem)
    arrays = {n: v for n, v in problem.arguments.items() if isinstance(v, jax.Array)}
    rest = {n: v for n, v in problem.arguments.items() if n not in arrays}

    @jax.jit
    def approximation(key: jax.Array, arrays: dict) -> Approximation:
        return approximate(problem, key, {**arrays, **rest}, draws=draws, init=init)

    with tracing(problem.block):
        found = approximation(jax.random.key(seed), arrays)
    if not found.found:
        raise ModelError(
            f"no mode was found in {STEPS} Newton steps; the last was {float(found.gap):.3g} "
            "posterior sds long (nan: the curvature is not positive). Start elsewhere, init=, "
            "scale inputs to order 1, or use method='svi' or 'nuts'"
        )
    return Draws(
        samples={name: np.asarray(v)[None] for name, v in found.samples.items()},
        shape=(1, draws),
        method="Laplace approximation",
    )
