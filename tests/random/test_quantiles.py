"""Quantiles against SciPy's distribution functions, over the range of their parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st
from hypothesis import given
from hypothesis import strategies as hs

from xr_aimz.random import quantiles
from xr_aimz.random.quantiles import TailMass

COUNT = 40_000
# The shapes are those of all tests here, so that each quantile is compiled once.
normal = jax.jit(quantiles.normal_quantile)
log_gamma_ratio = jax.jit(quantiles.log_gamma_ratio)
poisson = jax.jit(quantiles.poisson_quantile)
binomial = jax.jit(quantiles.binomial_quantile)


def tails(seed: int = 0) -> TailMass:
    """Uniform numbers, half of them far out: masses down to 2**-64 in both tails."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**63, COUNT, dtype=np.uint64)
    words >>= np.where(rng.random(COUNT) < 0.5, 0, rng.integers(0, 58, COUNT)).astype(np.uint64)
    high = (words >> np.uint64(32)).astype(np.uint32)
    high |= rng.integers(0, 2, COUNT, dtype=np.uint32) << np.uint32(31)
    low = (words & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return quantiles.uniform_tails(jnp.asarray(high), jnp.asarray(low))


TAILS = tails()
UPPER, MASS = np.asarray(TAILS.upper), np.asarray(TAILS.mass, float)


def full(value: Any) -> jax.Array:
    return jnp.full(COUNT, value, jnp.float32)


def check_count(drawn: Any, law: Any, tolerance: float) -> None:
    """A count's probability below it, and up to it, hold the uniform number between them."""
    count = np.asarray(drawn).astype(float)
    beyond = np.where(UPPER, law.sf(count), law.cdf(count - 1))  # mass that is farther out
    within = np.where(UPPER, law.sf(count - 1), law.cdf(count))
    error = np.maximum(np.maximum(beyond - MASS, MASS - within), 0)
    assert error.max() < tolerance
    # Far out, masses are right to a fraction of themselves.
    far = (MASS < 1e-4) & (MASS > 1e-9)
    assert (error / MASS)[far].max() < 0.1


RATES = [0.0, 1e-6, 1e-3, 0.3, 3.0, 7.99, 8.0, 10.0, 20.0, 100.0, 1e4, 1e6, 1e7]


@pytest.mark.parametrize("rate", RATES)
def test_counts_of_a_poisson(rate):
    check_count(poisson(TAILS, full(rate)), st.poisson(np.float32(rate).astype(float)), 2e-6)


@pytest.mark.parametrize(
    ("tries", "p"),
    [
        (1, 0.5), (10, 0.1), (10, 0.9), (31, 0.5), (33, 0.5), (60, 0.3), (100, 0.97),
        (1000, 0.009), (1000, 0.2), (10_000, 0.7), (100_000, 1e-4), (10**7, 1e-6),
    ],
)  # fmt: skip
def test_counts_of_a_binomial(tries, p):
    drawn = binomial(TAILS, jnp.full(COUNT, tries), full(p))
    check_count(drawn, st.binom(tries, np.float32(p).astype(float)), 2e-6)


def test_a_mean_of_many_tries_is_held_to_the_digits_of_float32():
    # 300 000 000 is a multiple of 32 in float32, and the standard deviation is 14 491.
    law = st.binom(10**9, np.float32(0.3).astype(float))
    check_count(binomial(TAILS, jnp.full(COUNT, 10**9), full(0.3)), law, 32 / law.std() * 0.4)


def test_normal_numbers():
    z = np.asarray(normal(TAILS), float)
    assert (np.sign(z[MASS < 0.49]) == np.where(UPPER, 1, -1)[MASS < 0.49]).all()
    mass = st.norm.sf(np.abs(z))
    assert np.abs(mass - MASS).max() < 1e-6
    assert np.abs(mass / MASS - 1).max() < 1e-4  # down to 5e-20, nine standard deviations


@pytest.mark.parametrize("shape", [8.0, 12.3, 30.0, 1e3, 1e6, 1e7])
def test_gamma_numbers(shape):
    x = np.float32(shape).astype(float) * np.exp(
        np.asarray(log_gamma_ratio(TAILS, full(shape)), float)
    )
    law = st.gamma(np.float32(shape).astype(float))
    mass = np.where(UPPER, law.sf(x), law.cdf(x))
    assert np.abs(mass - MASS).max() < 2e-6
    far = (MASS < 1e-4) & (MASS > 1e-12)
    assert np.abs(mass / MASS - 1)[far].max() < 0.1


NUMBER = hs.integers(0, 2**64 - 1)


@given(NUMBER, hs.floats(1e-6, 1e6), hs.floats(1e-4, 3.0))
def test_law_14_a_count_rises_with_its_rate(number, rate, more):
    # By a ten-thousandth, for the distribution function is right to 2e-6.
    chosen = at(number)
    lower, higher = poisson(chosen, full(rate)), poisson(chosen, full(rate * (1 + more)))
    assert int(lower[0]) <= int(higher[0])


@given(NUMBER, hs.integers(1, 10**5), hs.floats(1e-6, 0.999), hs.floats(1e-4, 3.0))
def test_law_14_a_count_rises_with_its_probability(number, tries, p, more):
    chosen, tries = at(number), jnp.full(COUNT, tries)
    odds = p / (1 - p) * (1 + more)
    lower, higher = (
        binomial(chosen, tries, full(p)),
        binomial(chosen, tries, full(odds / (1 + odds))),
    )
    assert 0 <= int(lower[0]) <= int(higher[0]) <= int(tries[0])


def at(number: int) -> TailMass:
    high, low = np.uint32(number >> 32), np.uint32(number & 0xFFFFFFFF)
    return quantiles.uniform_tails(jnp.full(COUNT, high), jnp.full(COUNT, low))


def test_least_and_most_uniform_numbers_have_quantiles():
    words = jnp.asarray([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF] * (COUNT // 4), jnp.uint32)
    edges = quantiles.uniform_tails(words, words)
    assert np.isfinite(normal(edges)).all()
    for rate in RATES:
        drawn = np.asarray(poisson(edges, full(rate)))
        assert (drawn >= 0).all()
        assert (drawn <= rate + 12 * np.sqrt(rate) + 50).all()


def invalid(quantile: Callable, *parameters: float) -> int:
    return int(quantile(TAILS, *map(full, parameters))[0])


def test_parameters_out_of_support():
    assert [invalid(poisson, r) for r in (-1.0, np.nan, 1e12)] == [-1, -1, 2**31 - 1]
    assert [invalid(binomial, 10, p) for p in (-1.0, 0.0, 1.0, 2.0)] == [0, 0, 10, 10]
    assert [invalid(binomial, 10, p) for p in (np.nan, np.inf)] == [0, 0]
    assert [invalid(binomial, n, 0.5) for n in (-3, 0)] == [0, 0]
