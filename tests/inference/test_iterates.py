"""Optimizers that record their iterates: what the record is of, written out step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.optim import optax_to_numpyro

from xr_aimz.inference.iterates import LAST_RATE, AverageOptimizer, SpreadOptimizer, adam

STEPS = 60
START = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(5.0)}


def walked(optim, start=START, steps=STEPS, first=0, state=None):
    """The state after so many noisy steps; the params before each and at the end; the slopes."""

    def loss(params, number):
        leaves, key = jax.tree.leaves(params), jax.random.key(number)
        noise = [jax.random.normal(key, leaf.shape) for leaf in leaves]
        return sum(jnp.sum((x - 1 + e) ** 2) / 2 for x, e in zip(leaves, noise, strict=True)), None

    def step(state, number):
        before = optim.get_params(state)
        slope, _ = jax.grad(loss, has_aux=True)(before, number)
        _, state = optim.eval_and_update(lambda params: loss(params, number), state)
        return state, (optim.get_params(state), slope)

    state = optim.init(start) if state is None else state
    begin = jax.tree.map(lambda x: x[None], optim.get_params(state))
    state, (after, slopes) = jax.jit(lambda s, n: jax.lax.scan(step, s, n))(
        state, jnp.arange(first, steps)
    )
    return state, jax.tree.map(lambda x, y: np.concatenate([x, y]), begin, after), slopes


def same(one, two, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5), one, two)


@pytest.mark.slow
def test_the_iterates_are_those_of_the_optimizer():
    inner = numpyro.optim.Adam(0.1)
    _, expected, _ = walked(inner)
    for optim in (AverageOptimizer(inner, 40), SpreadOptimizer(inner)):
        same(walked(optim)[1], expected, rtol=0)


def test_an_average_is_the_mean_of_the_iterates_from_its_start_on():
    optim = AverageOptimizer(numpyro.optim.Adam(0.1), 40)
    state, iterates, slopes = walked(optim)
    # The 20 iterates that steps 40 to 59 lead to.
    same(optim.result(state), jax.tree.map(lambda x: x[41:].mean(0), iterates))
    for name, record in state[1][1].items():
        assert (record.count == STEPS - 40).all()
        same(record.slope, slopes[name][40:].sum(0))
        same(record.square, (slopes[name][40:] ** 2).sum(0))


def test_before_its_start_the_average_is_the_last_iterate():
    optim = AverageOptimizer(numpyro.optim.Adam(0.1), 1000)
    state, iterates, _ = walked(optim)
    same(optim.result(state), jax.tree.map(lambda x: x[-1], iterates), rtol=0)


def test_the_spread_is_that_of_the_last_iterates():
    optim = SpreadOptimizer(optax_to_numpyro(optax.sgd(0.3)))
    state, iterates, _ = walked(optim)
    # Each iterate counts for 17 parts in 16 more than the number of steps so far, and those
    # before it for the rest.
    share = 17 / (np.arange(1, STEPS + 1) + 16)
    weights = share * np.append(np.cumprod((1 - share)[:0:-1])[::-1], 1)
    assert weights.sum() == pytest.approx(1)
    for name, record in state[1][1].items():
        own = iterates[name][1:]
        mean = np.tensordot(weights, own, 1)
        variance = np.tensordot(weights, (own - mean) ** 2, 1)
        same(record.lag, mean - own[-1])
        same(record.variance, variance, rtol=1e-4)
        assert (record.count == STEPS).all()
    same(optim.result(state), jax.tree.map(lambda x: x[-1], iterates), rtol=0)


def test_the_rate_falls_before_the_last_quarter_and_stays():
    optim = adam(0.05, 1000)
    assert optim.start == 750

    def step(state, _):
        before = optim.get_params(state)
        _, state = optim.eval_and_update(lambda x: (x, None), state)
        return state, before - optim.get_params(state)

    # Of a slope of one, a step of Adam is its rate.
    _, rates = jax.lax.scan(step, optim.init(jnp.array(0.0)), length=1000)
    np.testing.assert_allclose(rates[:700], 0.05, rtol=1e-2)
    np.testing.assert_allclose(rates[750:], 0.05 * LAST_RATE, rtol=1e-2)
    assert (np.diff(rates[700:751]) < 1e-6).all()


@pytest.mark.slow
def test_a_longer_fit_has_no_averages_of_a_shorter_one():
    inner = numpyro.optim.Adam(0.1)
    state, *_ = walked(AverageOptimizer(inner, 20), steps=30)
    longer = AverageOptimizer(inner, 40)
    state, iterates, _ = walked(longer, first=30, state=longer.restarted(state))
    same(longer.result(state), jax.tree.map(lambda x: x[11:].mean(0), iterates))
    # A fit that was averaging already goes on.
    again = AverageOptimizer(inner, 20)
    state, *_ = walked(again, steps=30)
    whole, iterates, _ = walked(again)
    state, *_ = walked(again, first=30, state=again.restarted(state))
    same(again.result(state), again.result(whole), rtol=0)
    same(again.result(whole), jax.tree.map(lambda x: x[21:].mean(0), iterates))
