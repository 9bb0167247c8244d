"""Approximate a posterior by Laplace's method: its mode, and a Gaussian with the curvature there.

The mode is found on the unconstrained space by Newton's method, damped by a ridge that
grows whenever a step does not descend (Levenberg and Marquardt). Draws of the Gaussian
are mapped back through the constraints of the model; they are independent and form one chain.
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
from xr_aimz.inference.mcmc import init_strategy
from xr_aimz.inference.problem import InferenceProblem, PosteriorDraws
from xr_aimz.tracing import trace_lock

STEPS = 100
# In posterior sds: the distance at which the search stops, and the largest one that is a mode.
_STOP_DISTANCE, _MODE_DISTANCE = 1e-3, 0.05
_FIRST_RIDGE, _LEAST_RIDGE, _RIDGE_FACTOR = 1e-2, 1e-7, 8.0
_MAX_VALUES = 4096


class Approximation(NamedTuple):
    """Draws ``(draw, ...)`` by site, whether a mode was found, and the distance that remains.

    ``distance`` is the length of the remaining Newton step, in posterior sds; NaN if the curvature
    is not positive.
    """

    samples: dict[str, jax.Array]
    is_mode: jax.Array
    distance: jax.Array


class _Point(NamedTuple):
    place: jax.Array
    value: jax.Array
    gradient: jax.Array
    curvature: jax.Array


class _Search(NamedTuple):
    at: _Point
    distance: jax.Array
    ridge: jax.Array
    step: jax.Array


def check_laplace_model(problem: InferenceProblem) -> None:
    """Refuse a model whose posterior has no mode with a curvature.

    Raises
    ------
    ModelError
        The model has discrete latent sites, or more latent values than fit in a dense
        curvature matrix.
    """
    latent = [problem.sites[name] for name in problem.named("latent")]
    discrete = [s.name for s in latent if np.dtype(s.dtype).kind != "f"]
    if discrete:
        raise ModelError(
            f"latent sites {discrete!r} are discrete: a Laplace approximation needs a curvature. "
            "Sum them out, or sample them with a kernel of NumPyro's"
        )
    count = sum(prod(s.shape) for s in latent)
    if count > _MAX_VALUES:
        raise ModelError(
            f"the model has {count} latent values, and method='laplace' holds a matrix of that "
            f"by that; at most {_MAX_VALUES}. Use method='svi', or per=... for a fit per cell"
        )


def approximate(
    problem: InferenceProblem,
    key: jax.Array,
    arguments: Mapping[str, Any],
    *,
    draws: int,
    init: Any,
) -> Approximation:
    """Approximate the posterior for one set of arguments: draws ``(draw, ...)`` by site.

    JAX can trace it, with ``arguments`` and ``key`` as inputs.

    Parameters
    ----------
    problem : InferenceProblem
        Its ``arguments`` are not used.
    key : PRNG key
    arguments : mapping
        The model's arguments, outcomes included.
    draws : int
    init : optional
        As in :func:`xr_aimz.fit`; by default the prior's median.
    """
    init_key, noise_key = jax.random.split(key)
    strategy = init_to_median if init is None else init_strategy(init)
    start, potential, constrain, _ = initialize_model(
        init_key,
        _hide_deterministics(problem.model),
        model_kwargs=dict(arguments),
        init_strategy=strategy,
    )
    position, unravel = ravel_pytree(start.z)
    search = _find_mode(lambda z: potential(unravel(z)), position)
    factor = jnp.linalg.cholesky(search.at.curvature)
    noise = jax.random.normal(noise_key, (draws, position.size), position.dtype)
    offsets = jax.vmap(lambda e: solve_triangular(factor, e, trans="T", lower=True))(noise)
    values = jax.vmap(lambda z: constrain(unravel(z)))(search.at.place + offsets)
    samples = {name: values[name] for name in problem.named("latent")}
    return Approximation(samples, search.distance < _MODE_DISTANCE, search.distance)


def _hide_deterministics(model: Callable) -> Callable:
    return handlers.block(model, hide_fn=lambda message: message["type"] == "deterministic")


def _find_mode(potential: Callable, start: jax.Array) -> _Search:
    """Find the mode by Newton's method from ``start``: at most STEPS steps, each descends."""

    def evaluate(position: jax.Array) -> _Point:
        value, gradient = jax.value_and_grad(potential)(position)
        return _Point(position, value, gradient, jax.hessian(potential)(position))

    def is_unfinished(search: _Search) -> jax.Array:
        # A distance of NaN does not stop the search.
        return (search.step < STEPS) & ~(search.distance < _STOP_DISTANCE)

    def advance(search: _Search) -> _Search:
        point, ridge = search.at, search.ridge
        candidate = evaluate(point.place - _compute_damped_step(point, ridge))
        # Near the mode a step may raise the value by rounding: that much is accepted.
        tolerance = 4 * jnp.finfo(point.value.dtype).eps * jnp.abs(point.value)
        is_better = _is_finite(candidate) & (
            (candidate.value <= point.value + tolerance) | ~_is_finite(point)
        )
        next_point = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), candidate, point
        )
        next_ridge = jnp.where(is_better, ridge / _RIDGE_FACTOR, ridge * _RIDGE_FACTOR)
        return _Search(
            next_point,
            _measure_distance(next_point),
            jnp.maximum(next_ridge, _LEAST_RIDGE),
            search.step + 1,
        )

    point = evaluate(start)
    initial = _Search(
        point, _measure_distance(point), jnp.asarray(_FIRST_RIDGE, start.dtype), jnp.asarray(0)
    )
    return jax.lax.while_loop(is_unfinished, advance, initial)


def _is_finite(point: _Point) -> jax.Array:
    parts = (point.value, point.gradient, point.curvature)
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in parts]))


def _compute_damped_step(point: _Point, ridge: jax.Array) -> jax.Array:
    """Compute the Newton step with a ridge on the diagonal; all NaN unless it is finite."""
    diagonal = jnp.abs(jnp.diagonal(point.curvature))
    floor = 1e-6 * jnp.max(diagonal)
    damped_curvature = point.curvature + jnp.diag(ridge * jnp.maximum(diagonal, floor))
    step = cho_solve((jnp.linalg.cholesky(damped_curvature), True), point.gradient)
    return jnp.where(jnp.all(jnp.isfinite(step)), step, jnp.nan)


def _measure_distance(point: _Point) -> jax.Array:
    """Measure the undamped Newton step in posterior sds; NaN without a positive curvature."""
    factor = jnp.linalg.cholesky(point.curvature)
    return jnp.linalg.norm(solve_triangular(factor, point.gradient, lower=True))


def run_laplace(problem: InferenceProblem, *, draws: int, seed: int, init: Any) -> PosteriorDraws:
    """Run one Laplace approximation on all the data; return samples ``(1, draw, ...)`` by site.

    Raises
    ------
    ModelError
        No mode was found.
    """
    check_laplace_model(problem)
    arrays = {n: v for n, v in problem.arguments.items() if isinstance(v, jax.Array)}
    constants = {n: v for n, v in problem.arguments.items() if n not in arrays}

    @jax.jit
    def approximation(key: jax.Array, arrays: dict) -> Approximation:
        return approximate(problem, key, {**arrays, **constants}, draws=draws, init=init)

    with trace_lock(problem.block):
        result = approximation(jax.random.key(seed), arrays)
    if not result.is_mode:
        raise ModelError(
            f"no mode was found in {STEPS} Newton steps; the last was "
            f"{float(result.distance):.3g} posterior sds long (nan: the curvature is not "
            "positive). Start elsewhere, init=, scale inputs to order 1, or use method='svi' or "
            "'nuts'"
        )
    return PosteriorDraws(
        samples={name: np.asarray(v)[None] for name, v in result.samples.items()},
        shape=(1, draws),
        method="Laplace approximation",
    )
