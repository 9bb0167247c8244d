"""Average the iterates of an optimizer, and estimate how far a guide is from its optimum.

Each optimizer stores a record for each param in its state, from which the errors of means and
sds are estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from numpyro.optim import _NumPyroOptim

from xr_aimz.inference.variational import FULL_RATE

# After the steps at the full rate the rate decays to the share LAST_RATE of it, and stays there
# for the last share AVERAGED of all steps. Measured: docs/decisions/minibatch.md.
AVERAGED, LAST_RATE = 0.25, 0.1
# An iterate of a caller's optimizer has as its weight the number of steps before it to this power:
# the last twentieth of all steps counts most, however many there will be (Shamir and Zhang 2013).
# After 8000 steps whose rate decays until their end, a power of 8 reported means as 0.5 sds off
# that were 0.01 off.
_WEIGHT_POWER = 16


class Average(NamedTuple):
    """Record of one param over the averaged steps, entry by entry.

    ``lag`` is the mean of the iterates minus the last iterate, ``slope`` and ``square`` are the
    sums of gradients and of their squares, and ``count`` is the number of steps.
    """

    lag: Any
    slope: Any
    square: Any
    count: Any


class Spread(NamedTuple):
    """Record of one param over its last iterates, entry by entry.

    ``lag`` is the weighted mean of the iterates minus the last iterate, ``variance`` their
    weighted variance, and ``count`` the number of all iterates.
    """

    lag: Any
    variance: Any
    count: Any


class _RecordOptimizer(_NumPyroOptim):  # type: ignore[misc] # NumPyro is untyped
    """Optimizer whose state is that of an inner optimizer, and a record for each param."""

    def __init__(self, inner: _NumPyroOptim) -> None:
        self._inner = inner

    def init(self, params: Any) -> Any:
        step, inner = self._inner.init(params)
        return step, (inner, jax.tree.map(self._initial_record, params))

    def get_params(self, state: Any) -> Any:
        return self._inner.get_params(_inner_state(state))

    def _initial_record(self, param: Any) -> Any:
        raise NotImplementedError


class AverageOptimizer(_RecordOptimizer):
    """Adam whose iterates are averaged, starting at a given step.

    Parameters
    ----------
    inner : numpyro.optim.Adam
    start : int
        The first step that is averaged.
    """

    def __init__(self, inner: _NumPyroOptim, start: int) -> None:
        super().__init__(inner)
        self.start = start

    def _initial_record(self, param: Any) -> Average:
        zero = jnp.zeros_like(param)
        return Average(zero, zero, zero, zero)

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> Any:
        step, (_, records) = state
        before = self.get_params(state)
        output, gradient = jax.value_and_grad(fn, has_aux=True)(before)
        new = self._inner.update(gradient, _inner_state(state), value=output[0])
        is_averaged = step >= self.start

        def record(x: Any, y: Any, g: Any, old: Average) -> Average:
            g, count = jnp.where(is_averaged, g, 0), old.count + is_averaged
            # The mean minus the last iterate: small numbers, and no large sum to lose them in.
            lag = jnp.where(
                is_averaged, old.count / jnp.maximum(count, 1) * (old.lag - (y - x)), 0
            )
            return Average(lag, old.slope + g, old.square + g**2, count)

        params = self._inner.get_params(new)
        return output, (new[0], (new[1], _map_params(record, before, params, gradient, records)))

    def result(self, state: Any) -> Any:
        """Return the mean of the iterates, or the last one of entries without averaged steps."""
        _, (_, records) = state
        return _map_params(lambda x, record: x + record.lag, self.get_params(state), records)

    def restarted(self, state: Any) -> Any:
        """Return the state with records of zero if no step of this optimizer was averaged yet."""
        step, (inner, records) = state
        if int(step) >= self.start:
            return state
        return step, (inner, jax.tree.map(jnp.zeros_like, records))


class SpreadOptimizer(_RecordOptimizer):
    """Optimizer of the caller's with a record of the spread of its last iterates."""

    def result(self, state: Any) -> Any:
        """Return the last iterate."""
        return self.get_params(state)

    def _initial_record(self, param: Any) -> Spread:
        zero = jnp.zeros_like(param)
        return Spread(zero, zero, zero)

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> Any:
        _, (_, records) = state
        before = self.get_params(state)
        output, new = self._inner.eval_and_update(
            fn, _inner_state(state), forward_mode_differentiation=forward_mode_differentiation
        )

        def record(x: Any, y: Any, old: Spread) -> Spread:
            # An entry that a step does not train keeps its value, and the step is not counted as
            # one of its iterates.
            count = old.count + 1
            share = (_WEIGHT_POWER + 1) / (count + _WEIGHT_POWER)
            deviation = old.lag - (y - x)
            variance = (1 - share) * (old.variance + share * deviation**2)
            return Spread((1 - share) * deviation, variance, count)

        params = self._inner.get_params(new)
        return output, (new[0], (new[1], _map_params(record, before, params, records)))


def adam(rate: float, steps: int) -> AverageOptimizer:
    """Make Adam for ``steps`` steps on batches, with the last quarter of them averaged."""
    full_steps, start = int(FULL_RATE * steps), steps - max(1, int(AVERAGED * steps))

    def schedule(step: Any) -> Any:
        descent = jnp.clip((step - full_steps) / max(start - full_steps, 1), 0, 1)
        return rate * LAST_RATE**descent

    return AverageOptimizer(numpyro.optim.Adam(schedule), start)


def _inner_state(state: Any) -> Any:
    step, (inner, _) = state
    return step, inner


def _map_params(fn: Callable, params: Any, *trees: Any) -> Any:
    """Map ``fn`` over the params and the subtrees of the other trees at the same positions."""
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    rows = zip(leaves, *(structure.flatten_up_to(tree) for tree in trees), strict=True)
    return jax.tree.unflatten(structure, [fn(*row) for row in rows])


# The largest error of a mean, in posterior sds, and the largest factor between an sd and the
# posterior's sd that raise no concern.
MEAN_LIMIT, SD_LIMIT = 0.3, 1.1
# The quantile over a variable's entries that is reported: among very many labels some are far off
# by chance.
_REPORTED_QUANTILE = 0.95
# Larger estimates are unreliable, and are reported as this.
_MAX_ERROR = 1000.0
# Estimates of the curvature in the guide's sds are raised to at least this, at which the guide is
# too narrow by a factor of ten.
_MIN_CURVATURE = 1e-2
_REMEDIES = {
    AverageOptimizer: "take more steps, or larger batches",
    SpreadOptimizer: "take more steps and let the optimizer's rate shrink, or give optimizer= a "
    "rate such as 0.05, of whose steps the last quarter is averaged",
}


class _Errors(NamedTuple):
    """Errors by entry: of the mean in posterior sds, and of the sd as a factor."""

    mean: Any
    sd: Any


def noise_concerns(
    guide: Any,
    optim: Any,
    state: Any,
    constrain: Callable,
    names: Mapping[str, str],
    scales: Mapping[str, float],
) -> tuple[str, ...]:
    """Report the variables whose means or sds may be off by more than a limit, as sentences.

    Parameters
    ----------
    guide : AutoGuide
        A normal guide (:func:`xr_aimz.inference.reflection.is_normal`).
    optim : AverageOptimizer or SpreadOptimizer
    state : pytree
        The state of the optimizer.
    constrain : callable
        Maps unconstrained params to those of the guide.
    names : mapping of site to variable
    scales : mapping of site to float
        The factor by which a batch scales the log density of a site with an entry per label.
    """
    records, params = state[1][1], optim.result(state)
    values = constrain(params)
    if type(guide) is AutoNormal:
        errors = _compute_site_errors(guide, records, params, values, scales)
    else:
        errors = _compute_vector_errors(guide, records, params, values)
    mean = {names[site]: _reduce_errors(e.mean) for site, e in errors.items()}
    sd = {names[site]: _reduce_errors(e.sd) for site, e in errors.items()}
    remedy, sentences = _REMEDIES[type(optim)], []
    if mean_errors := {n: x for n, x in mean.items() if x > MEAN_LIMIT}:
        sentences.append(
            f"means are off by {mean_errors!r} posterior sds (limit {MEAN_LIMIT}): {remedy}"
        )
    if sd_errors := {n: x for n, x in sd.items() if x > SD_LIMIT}:
        sentences.append(f"sds are off by factors of {sd_errors!r} (limit {SD_LIMIT}): {remedy}")
    return tuple(sentences)


def _reduce_errors(errors: Any) -> float:
    """Return the error that 95% of the entries do not exceed."""
    # An entry that no step trained has no record: NaN.
    errors = np.nan_to_num(np.asarray(errors, float), nan=_MAX_ERROR)
    quantile = np.quantile(np.minimum(errors, _MAX_ERROR), _REPORTED_QUANTILE, method="higher")
    return round(float(quantile), 2)


def _compute_site_errors(
    guide: Any, records: Any, params: Any, values: Any, scales: Mapping[str, float]
) -> dict[str, _Errors]:
    """Estimate the errors of a guide with a loc and a scale for each site."""
    errors = {}
    for site in guide._init_locs:
        loc, scale = (f"{site}_{guide.prefix}_{part}" for part in ("loc", "scale"))
        variance, growth = (
            values[scale] ** 2,
            _compute_log_growth(guide.scale_constraint, params[scale]),
        )
        # In the steps that train a site, its loss and its curvature are scaled.
        factor = scales.get(site, 1.0)
        errors[site] = _compute_errors(
            records[loc], records[scale], variance, variance, growth, factor
        )
    return errors


def _compute_vector_errors(
    guide: Any, records: Any, params: Any, values: Any
) -> dict[str, _Errors]:
    """Estimate the errors of a guide with a vector of locs and a vector of scales, one per sd."""
    prefix, posterior = guide.prefix, guide.get_posterior(values)
    loc = records[f"{prefix}_loc"]
    if type(guide) is AutoMultivariateNormal:
        # The last entries of a Cholesky factor's params are the logs of its diagonal.
        name, count = f"{prefix}_scale_tril", loc.count.size
        growth = _compute_log_growth(guide.scale_tril_constraint, params[name], jnp.diagonal)[
            -count:
        ]
        scale = type(loc)(*(part[-count:] for part in records[name]))
    else:
        name = f"{prefix}_scale"
        growth, scale = _compute_log_growth(guide.scale_constraint, params[name]), records[name]
    diagonal = type(guide) is AutoDiagonalNormal
    covariance = posterior.variance if diagonal else posterior.covariance_matrix
    errors = _compute_errors(loc, scale, covariance, posterior.variance, growth)
    mean, sd = (guide._unpack_latent(part) for part in errors)
    return {site: _Errors(mean[site], sd[site]) for site in mean}


def _compute_errors(
    loc: Any, scale: Any, covariance: Any, variance: Any, growth: Any, factor: float = 1.0
) -> _Errors:
    """Estimate errors from the records of locs and of unconstrained scales.

    ``growth`` is the derivative of the log of a scale by its unconstrained value, and ``factor``
    the factor by which the loss was scaled.
    """
    sd = jnp.sqrt(variance)
    if isinstance(loc, Spread):
        return _Errors(jnp.sqrt(loc.variance) / sd, jnp.exp(jnp.sqrt(scale.variance) * growth))
    # The slope in the log of an sd is its square, over the square of the posterior's, minus 1.
    steps = scale.count * factor * growth
    curvature = jnp.maximum(1 + scale.slope / steps, _MIN_CURVATURE)
    spread = jnp.sqrt(scale.square) / steps / curvature
    slope = loc.slope / loc.count / factor
    newton = covariance * slope if covariance.ndim == slope.ndim else covariance @ slope
    distance = jnp.abs(newton) / sd / jnp.sqrt(curvature)
    return _Errors(distance, jnp.exp((jnp.abs(jnp.log(curvature)) + spread) / 2))


def _compute_log_growth(constraint: Any, values: Any, part: Callable = lambda x: x) -> Any:
    """Compute the derivative of the log of each scale with respect to its unconstrained value."""
    transform = biject_to(constraint)
    return jax.grad(lambda u: jnp.log(part(transform(u))).sum())(values)
