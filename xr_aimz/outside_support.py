"""Which values of a site lie outside the support of its distribution; traceable.

NumPyro says so itself, ``fn.support(value)``, where a value is not missing and not infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from xr_aimz.blanks import is_float
from xr_aimz.kernel import Dims
from xr_aimz.model import Site

__all__ = ["mark_outside", "read_bounds", "read_value"]

_CENSORED = (dist.LeftCensoredDistribution, dist.RightCensoredDistribution)
# Of the last axis of the bounds, which is no dim of a Dataset's.
_BOUNDS = "\0bounds"
# By NumPyro's classes of constraints, what such a support has; {} stands for a bound.
_IN_WORDS = {
    "_Boolean": "0 and 1",
    "_Circular": "angles from -pi to pi",
    "_GreaterThan": "numbers above {}",
    "_GreaterThanEq": "numbers from {} up",
    "_IntegerGreaterThan": "whole numbers from {} up",
    "_IntegerInterval": "whole numbers from {} to {}",
    "_IntegerNonnegative": "whole numbers from 0 up",
    "_IntegerPositive": "whole numbers from 1 up",
    "_Interval": "numbers from {} to {}",
    "_LessThan": "numbers below {}",
    "_LessThanEq": "numbers up to {}",
    "_Multinomial": "counts that sum to {}",
    "_Nonnegative": "numbers from 0 up",
    "_OpenInterval": "numbers between {} and {}",
    "_OrderedVector": "numbers in rising order",
    "_Positive": "numbers above 0",
    "_Real": "finite numbers",
    "_Simplex": "numbers from 0 up that sum to 1",
    "_UnitInterval": "numbers from 0 to 1",
}


def mark_outside(
    site: Site, message: Mapping[str, Any], notes: dict[str, Any] | None = None
) -> tuple[Dims, Any]:
    """Whether the value of each cell lies outside the support; not where it is missing."""
    fn, support = message["fn"], _support_of(message["fn"])
    if _is_unchecked(fn):
        raise ValueError("the model asks for a density outside of the support, too")
    value, known = _value_of(message)
    outside = ~jnp.asarray(support(value))
    if is_float(value):
        # NumPyro has it among the numbers above 0, where no density is.
        outside = outside | _in_event(fn, jnp.isinf(value))
    outside = outside & ~_missing(fn, support, value)
    if known is not True:
        outside = outside & ~_in_event(fn, ~jnp.asarray(known))
    if outside.ndim > value.ndim - fn.event_dim and outside.ndim > len(fn.batch_shape):
        raise ValueError("the support says nothing of whole cells")
    if notes is not None:
        notes["words"] = _in_words(support)
        notes["traced"] = any(isinstance(b, jax.core.Tracer) for b in jax.tree.leaves(support))
        # A value that is given to a site is cast to the dtype of its draws.
        observed = message["given"] is None and is_float(value)
        notes["takes_ints"] = observed and support.is_discrete and _refuses(fn, value)
    return site.dims[: site.batch_ndim], outside


def _value_of(message: Mapping[str, Any]) -> tuple[jax.Array, Any]:
    """The values of an outcome, and the mask of the cells that have one."""
    value, known = message["given"] or (message["value"], True)
    return jnp.asarray(value), known


def _missing(fn: Any, support: Any, value: jax.Array) -> jax.Array:
    """Cells of which a value, or a bound of the support, is missing."""
    missing = jnp.isnan(value) if is_float(value) else jnp.zeros(value.shape, bool)
    missing, base = _in_event(fn, missing), _base(support)
    for bound in map(jnp.asarray, jax.tree.leaves(support)):
        if is_float(bound):
            # Bounds have the axes of a distribution that was made one event of.
            inner = min(fn.event_dim - base.event_dim, bound.ndim)
            missing = missing | jnp.isnan(bound).any(tuple(range(bound.ndim - inner, bound.ndim)))
    return missing


def _in_event(fn: Any, entries: jax.Array) -> jax.Array:
    """Whether any entry of a cell is marked."""
    return entries.any(tuple(range(max(entries.ndim - fn.event_dim, 0), entries.ndim)))


def _refuses(fn: Any, value: jax.Array) -> bool:
    try:
        fn.log_prob(value)
    except TypeError:
        return True
    return False


def read_value(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    """The value of a site, given or observed."""
    value, _ = _value_of(message)
    return site.dims, value


def read_bounds(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    """The bounds of the support at each cell, on a last axis, and a 0 after them."""
    fn, value = message["fn"], _value_of(message)[0]
    support = _support_of(fn)
    shape = jnp.broadcast_shapes(fn.batch_shape, value.shape[: value.ndim - fn.event_dim])
    inner = fn.event_dim - _base(support).event_dim
    bounds = []
    for bound in map(jnp.asarray, jax.tree.leaves(support)):
        # Of an event the first entry's.
        bounds.append(jnp.broadcast_to(bound[(..., *(0,) * min(inner, bound.ndim))], shape))
    stacked = jnp.stack([*bounds, jnp.zeros(shape)], -1)
    return (*site.dims[: site.batch_ndim], _BOUNDS), stacked


def _base(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _support_of(fn: Any) -> Any:
    """The support of a distribution, for values that may be censored with its ends."""
    support = fn.support
    if not isinstance(_without_wrappers(fn), _CENSORED):
        return support
    base = _base(support)
    # A life that was watched for no time at all is censored at 0, where no density is.
    closed = type(base) in (type(constraints.positive), constraints.greater_than)
    return constraints.greater_than_eq(base.lower_bound) if closed else support


def _without_wrappers(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _is_unchecked(fn: Any) -> bool:
    """Whether a model says ``validate_args=False``, and means the density outside as well."""
    fn = _without_wrappers(fn)
    # Of the instance: that of the class is NumPyro's default, which censored ones have at False.
    return vars(fn).get("_validate_args") is False and not isinstance(fn, _CENSORED)


def _in_words(support: Any) -> str:
    kind = type(_base(support)).__name__
    return _IN_WORDS.get(kind, f"{kind.lstrip('_')} of NumPyro's constraints")
