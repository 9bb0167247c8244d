"""Estimate how far a normal guide that was trained on batches is from its optimum.

Measured in the guide's own sds, the loss of a normal guide has the same curvature near the
optimum of every model: 1 in a mean, and 2 in the log of an sd. So the gradients of the averaged
steps give the distance: their mean how far the guide has still to go, their noise how far the
average may have strayed. With an optimizer of the caller's the last iterate counts, and the
spread of the last iterates gives its error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from xr_aimz.infer.iterates import AverageOptimizer, Spread, SpreadOptimizer

__all__ = ["MEAN_LIMIT", "SD_LIMIT", "noise_concerns"]

# The largest error of a mean, in posterior sds, and the largest factor between an sd and the
# posterior's that are no concern.
MEAN_LIMIT, SD_LIMIT = 0.3, 1.1
# The quantile over a variable's entries that is reported: among very many labels chance leaves
# some behind.
_QUANTILE = 0.95
# Beyond this an estimate is no estimate, and this is reported.
_LARGEST = 1000.0
# The least curvature in the guide's sds that is taken for one: below, the guide is too narrow by
# a factor of ten.
_FLATTEST = 1e-2
_REMEDIES = {
    AverageOptimizer: "take more steps, or larger batches",
    SpreadOptimizer: "take more steps and let the optimizer's rate shrink, or give optimizer= a "
    "rate such as 0.05, of whose steps the last quarter is averaged",
}


class _Errors(NamedTuple):
    """By entry: the error of the mean in posterior sds, and of the sd as a factor."""

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
    """List the variables whose means or sds may be off by more than a limit, in sentences.

    Parameters
    ----------
    guide : AutoGuide
        A normal one (:func:`xr_aimz.infer.reflection.is_normal`).
    optim : AverageOptimizer or SpreadOptimizer
    state : pytree
        The optimizer's.
    constrain : callable
        From unconstrained params to the guide's.
    names : mapping of site to variable
    scales : mapping of site to float
        By how much a batch scales the density of a site with an entry for each label.
    """
    records, params = state[1][1], optim.result(state)
    values = constrain(params)
    if type(guide) is AutoNormal:
        errors = _errors_by_site(guide, records, params, values, scales)
    else:
        errors = _errors_of_vector(guide, records, params, values)
    mean = {names[site]: _largest(e.mean) for site, e in errors.items()}
    sd = {names[site]: _largest(e.sd) for site, e in errors.items()}
    remedy, sentences = _REMEDIES[type(optim)], []
    if far := {n: x for n, x in mean.items() if x > MEAN_LIMIT}:
        sentences.append(f"means are off by {far!r} posterior sds (limit {MEAN_LIMIT}): {remedy}")
    if wide := {n: x for n, x in sd.items() if x > SD_LIMIT}:
        sentences.append(f"sds are off by factors of {wide!r} (limit {SD_LIMIT}): {remedy}")
    return tuple(sentences)


def _largest(errors: Any) -> float:
    """The error that all but one in twenty of the entries are within."""
    # An entry that no step trained has no record: NaN.
    errors = np.nan_to_num(np.asarray(errors, float), nan=_LARGEST)
    quantile = np.quantile(np.minimum(errors, _LARGEST), _QUANTILE, method="higher")
    return round(float(quantile), 2)


def _errors_by_site(
    guide: Any, records: Any, params: Any, values: Any, scales: Mapping[str, float]
) -> dict[str, _Errors]:
    """Errors of a guide with a loc and a scale for each site."""
    errors = {}
    for site in guide._init_locs:
        loc, scale = (f"{site}_{guide.prefix}_{part}" for part in ("loc", "scale"))
        variance, growth = values[scale] ** 2, _log_growth(guide.scale_constraint, params[scale])
        # The steps that train a site see its loss scaled, and its curvature.
        times = scales.get(site, 1.0)
        errors[site] = _errors(records[loc], records[scale], variance, variance, growth, times)
    return errors


def _errors_of_vector(guide: Any, records: Any, params: Any, values: Any) -> dict[str, _Errors]:
    """Errors of a guide with one vector of locs and one of scales, each that of an sd."""
    prefix, posterior = guide.prefix, guide.get_posterior(values)
    loc = records[f"{prefix}_loc"]
    if type(guide) is AutoMultivariateNormal:
        # Of a Cholesky factor the logs of the diagonal come last.
        name, count = f"{prefix}_scale_tril", loc.count.size
        growth = _log_growth(guide.scale_tril_constraint, params[name], jnp.diagonal)[-count:]
        scale = type(loc)(*(part[-count:] for part in records[name]))
    else:
        name = f"{prefix}_scale"
        growth, scale = _log_growth(guide.scale_constraint, params[name]), records[name]
    diagonal = type(guide) is AutoDiagonalNormal
    covariance = posterior.variance if diagonal else posterior.covariance_matrix
    errors = _errors(loc, scale, covariance, posterior.variance, growth)
    mean, sd = (guide._unpack_latent(part) for part in errors)
    return {site: _Errors(mean[site], sd[site]) for site in mean}


def _errors(
    loc: Any, scale: Any, covariance: Any, variance: Any, growth: Any, times: float = 1.0
) -> _Errors:
    """Errors from the records of locs and of unconstrained scales.

    ``growth`` is the derivative of the log of a scale by its unconstrained value, and ``times``
    the factor by which the loss was scaled.
    """
    sd = jnp.sqrt(variance)
    if isinstance(loc, Spread):
        return _Errors(jnp.sqrt(loc.variance) / sd, jnp.exp(jnp.sqrt(scale.variance) * growth))
    # The slope in the log of an sd is its square, over that of the posterior, less 1.
    steps = scale.count * times * growth
    curvature = jnp.maximum(1 + scale.slope / steps, _FLATTEST)
    strayed = jnp.sqrt(scale.square) / steps / curvature
    slope = loc.slope / loc.count / times
    newton = covariance * slope if covariance.ndim == slope.ndim else covariance @ slope
    far = jnp.abs(newton) / sd / jnp.sqrt(curvature)
    return _Errors(far, jnp.exp((jnp.abs(jnp.log(curvature)) + strayed) / 2))


def _log_growth(constraint: Any, values: Any, part: Callable = lambda x: x) -> Any:
    """The derivative of the log of each scale by its unconstrained value."""
    transform = biject_to(constraint)
    return jax.grad(lambda u: jnp.log(part(transform(u))).sum())(values)
