"""Quantiles of distributions, elementwise: from the mass of a tail to a draw.

A draw by inversion is the quantile of one uniform number: nothing is rejected, and draws of a
count rise with its rate. The distribution function at a quantile is within 2e-6 of the
probability, which is about what float32 holds. A uniform number is kept as the mass of the nearer
tail, of 63 bits, so that tails are drawn down to a probability of 3e-20. Expansions lose digits
far out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from xr_aimz.random.coefficients import (
    COUNT,
    COUNT_HIGH,
    COUNT_LOW,
    GAMMA,
    GAMMA_HIGH,
    GAMMA_LOW,
    LEAST_VARIANCE,
    NORMAL_CENTER,
    NORMAL_END,
    NORMAL_SPLIT,
    NORMAL_TAIL,
)

# A count of a variance below LEAST_VARIANCE is over this with a probability below 2**-65.
_MOST_SMALL_COUNT = 46


class TailMass(NamedTuple):
    """Uniform numbers: ``mass`` in (0, 0.5] of the upper or the lower tail."""

    upper: Array
    mass: Array


def uniform_tails(high: Array, low: Array) -> TailMass:
    """Turn two uint32 words into a uniform number: one bit is the tail, 63 are its mass."""
    return TailMass(high >> 31 == 1, uniform_number(high & jnp.uint32(0x7FFFFFFF), low))


def uniform_number(high: Array, low: Array) -> Array:
    """Turn two uint32 words into a uniform number in (0, 1], of 64 bits near 0."""
    # Half a unit is added, so that no number is 0.
    dtype = jnp.result_type(float)
    return high.astype(dtype) * 2.0**-32 + (low.astype(dtype) + 0.5) * 2.0**-64


@jax.jit
def normal_quantile(tails: TailMass) -> Array:
    """Return the quantile of the standard normal distribution."""
    # Giles 2012, "Approximating the erfinv function", GPU Computing Gems 2: nearly linear in the
    # depth of a tail, and far out in its root.
    depth = -jnp.log(4.0 * tails.mass * (1.0 - tails.mass))
    root = jnp.sqrt(depth)
    center = (1.0 - 2.0 * tails.mass) * _series(NORMAL_CENTER, depth, 0.0, NORMAL_SPLIT)
    tail = root * _series(NORMAL_TAIL, root, NORMAL_SPLIT**0.5, NORMAL_END**0.5)
    size = jnp.where(depth < NORMAL_SPLIT, center, tail)
    return jnp.where(tails.upper, size, -size)


@jax.jit
def log_gamma_ratio(tails: TailMass, shape: Array) -> Array:
    """Return the logarithm of the quantile over the shape, of a gamma of a shape of 8 or more."""
    # By powers of 1 / shape (Temme 1992, Mathematics of Computation 58).
    s = normal_quantile(tails) * lax.rsqrt(shape)
    slope, *rest = (_series(powers, s, GAMMA_LOW, GAMMA_HIGH) for powers in GAMMA)
    return s * slope + _inverse_powers(rest, shape) / shape


@jax.jit
def poisson_quantile(tails: TailMass, rate: Array) -> Array:
    """Return the quantile of a Poisson distribution: an integer, -1 where the rate is none."""
    rate = _at_each(tails, rate)
    is_small = rate < LEAST_VARIANCE
    small_rate = jnp.where(is_small, rate, 0.0)
    small = _small_poisson(tails, small_rate)
    large_rate = jnp.maximum(rate, LEAST_VARIANCE)
    large = _large_count(tails, large_rate, large_rate, 0.0)
    return jnp.where(rate >= 0, jnp.where(is_small, small, large), -1)


def positive_tails(tails: TailMass, log_none: Array) -> TailMass:
    """Move uniform numbers above the probability of 0, whose logarithm is ``log_none``."""
    positive = -jnp.expm1(log_none)
    lower = jnp.exp(log_none) + tails.mass * positive
    upper = tails.upper | (lower > 0.5)
    beyond = jnp.where(tails.upper, tails.mass, 1.0 - tails.mass) * positive
    # A mass of 0 is no uniform number: the least float is in the tail of any count from 1 on.
    least = jnp.finfo(lower.dtype).tiny
    return TailMass(upper, jnp.maximum(jnp.where(upper, beyond, lower), least))


@jax.jit
def binomial_quantile(tails: TailMass, tries: Array, probability: Array) -> Array:
    """Return the quantile of a binomial distribution, an integer; 0 where there are no tries."""
    most = _as_integer(tries)
    tries = _at_each(tails, most.astype(jnp.result_type(float)))
    probability = _at_each(tails, probability)
    is_mirrored = probability > 0.5
    # Failures are counted where they are fewer, from the other tail.
    p = jnp.clip(jnp.where(is_mirrored, 1.0 - probability, probability), 0.0, 0.5)
    tails = TailMass(tails.upper ^ is_mirrored, tails.mass)
    variance = tries * p * (1.0 - p)
    is_small = variance < LEAST_VARIANCE
    small = _small_binomial(tails, jnp.where(is_small, tries, 0.0), p)
    large = _large_count(tails, tries * p, jnp.maximum(variance, LEAST_VARIANCE), 2.0 * p)
    count = jnp.clip(jnp.where(is_small, small, large), 0, most)
    count = jnp.where(is_mirrored, most - count, count)
    return jnp.where(jnp.isfinite(probability), count, 0)


def _at_each(tails: TailMass, parameter: Array) -> Array:
    """Return the parameter of each uniform number."""
    # Under vmap over draws, each function of a parameter that all draws share would be an array of
    # its own: a hundred kernels in place of one, seven times as long to compile.
    return jnp.where(tails.mass > 0, parameter, jnp.nan)


def _small_poisson(tails: TailMass, rate: Array) -> Array:
    """Count the counts from 1 on whose upper tail is over that of the uniform number."""
    # The lower tail of a small rate is a 0 of 3e-4 or more: what is above needs no more digits.
    above = jnp.where(tails.upper, tails.mass, 1.0 - tails.mass)
    ratios = [_times(rate, 1 / k) for k in range(1, _MOST_SMALL_COUNT + 1)]
    masses = _tail_masses(jnp.exp(-rate), ratios)
    return _count(lax.gt(upper, above) for _, upper in masses)


def _small_binomial(tails: TailMass, tries: Array, p: Array) -> Array:
    """Count as :func:`_small_poisson`, in the lower tail by the masses from 0 on."""
    odds = p / (1.0 - p)
    most_odds, zero = (tries + 1.0) * odds, jnp.zeros_like(odds)
    ratios = [
        lax.max(lax.sub(_times(most_odds, 1 / k), odds), zero)
        for k in range(1, _MOST_SMALL_COUNT + 1)
    ]
    none = jnp.exp(tries * jnp.log1p(-p))
    masses = _tail_masses(none, ratios)
    below = accumulate((mass for mass, _ in masses[:-1]), lax.add, initial=none)
    return _count(
        lax.select(tails.upper, lax.gt(upper, tails.mass), lax.lt(lower, tails.mass))
        for (_, upper), lower in zip(masses, below, strict=True)
    )


def _tail_masses(none: Array, ratios: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Return the mass at each k from 1 on, ``ratios[k - 1]`` times that before, and from k on."""
    # A loop of XLA would go through memory 46 times; written out, it stays in registers. The tail
    # from k on is the mass at k times a factor, which no small rate makes too small to hold.
    one = np.ones((), none.dtype)
    factors = [lax.full_like(none, 1.0)]
    for ratio in ratios[:0:-1]:
        factors.append(lax.add(lax.mul(ratio, factors[-1]), one))
    masses = [*accumulate(ratios, lax.mul, initial=none)][1:]
    return [(m, lax.mul(m, factor)) for m, factor in zip(masses, reversed(factors), strict=True)]


def _count(conditions: Iterable[Array]) -> Array:
    dtype = jnp.result_type(int)
    return reduce(lax.add, (lax.convert_element_type(c, dtype) for c in conditions))


def _large_count(tails: TailMass, mean: Array, variance: Array, u: Any) -> Array:
    """Count by powers of 1 / variance; ``u`` is twice the probability of a binomial."""
    # Temme 1992, "Asymptotic inversion of the incomplete beta function", J. Comput.
    # Appl. Math. 41.
    root = jnp.sqrt(variance)
    z = normal_quantile(tails)
    low, high = _polynomial(COUNT_LOW, u), _polynomial(COUNT_HIGH, u)
    square, shift, *rest = (_series(powers, z / root, low, high, u) for powers in COUNT)
    offset = root * z + (z * z * square + (shift + _inverse_powers(rest, variance) / variance))
    # A float32 holds no fraction beside a large mean: integers are added.
    floor_mean = jnp.floor(mean)
    return _as_integer(floor_mean, jnp.floor((mean - floor_mean) + offset))


def _as_integer(*parts: Array) -> Array:
    """Add integers, or floats that hold integers; return from 0 to the largest integer."""
    dtype = jnp.result_type(int)
    if jnp.issubdtype(parts[0].dtype, jnp.integer):
        return jnp.maximum(parts[0], 0).astype(dtype)
    most = jnp.iinfo(dtype).max
    half = most // 2
    total = sum(parts[1:], parts[0])
    # A float32 holds no integer above 2**24: parts are added as integers, while they are far from
    # the largest.
    exact = sum(jnp.clip(p, -half, half).astype(dtype) for p in parts)
    edge = np.nextafter(np.asarray(most, total.dtype), 0, dtype=total.dtype)
    saturated = jnp.where(total > edge, most, jnp.clip(total, 0, edge).astype(dtype))
    return jnp.where(total < half, jnp.maximum(exact, 0), saturated)


def _inverse_powers(terms: Sequence[Array], x: Array) -> Array:
    """Return the sum of ``terms[i] / x ** i``."""
    result = terms[-1]
    for term in terms[-2::-1]:
        result = term + result / x
    return result


def _series(
    powers: Sequence[Sequence[float]], x: Array, low: Any, high: Any, u: Any = 0.0
) -> Array:
    """Return a series at ``x``, by powers of its position on [low, high] and of ``u``."""
    t = jnp.clip((2.0 * x - (low + high)) / (high - low), -1.0, 1.0)
    return _polynomial([_polynomial(row, u) for row in powers], t)


def _polynomial(powers: Sequence[Any], x: Any) -> Any:
    if isinstance(x, float) and x == 0.0:
        return powers[0]
    if isinstance(x, float):
        return sum(c * x**i for i, c in enumerate(powers))
    # By functions of lax: an operator takes six times as long to trace, and here are hundreds.
    result = _as_array(powers[-1], x)
    for power in powers[-2::-1]:
        result = lax.add(lax.mul(result, x), _as_array(power, x))
    return result


def _times(x: Array, factor: float) -> Array:
    return lax.mul(x, np.asarray(factor, x.dtype))


def _as_array(number: Any, like: Array) -> Any:
    return np.asarray(number, like.dtype) if isinstance(number, float) else number
