"""Programs are named by what they compute, not by how they are written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xr_aimz.infer.repeatable import program_digest

X, Y = np.float32(2), np.float32(3)


def one(x, y):
    a, b = jnp.sin(x), jnp.cos(y)
    return a + b


def other_order(x, y):
    b = jnp.cos(y)
    a = jnp.sin(x)
    return a + b


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["bare", "nested"])
def test_the_order_of_independent_steps_is_no_difference(wrap):
    assert program_digest(wrap(one), X, Y) == program_digest(wrap(other_order), X, Y)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: jnp.sin(y) + jnp.cos(x),
        lambda x, y: jnp.cos(y) + jnp.sin(x),
        lambda x, y: jnp.sin(x) - jnp.cos(y),
        lambda x, y: jnp.sin(x) + jnp.cos(y) + 1,
        lambda x, y: jnp.sin(x) + jnp.cos(y) + np.arange(2.0),
    ],
)
def test_what_is_computed_is_a_difference(other):
    assert program_digest(one, X, Y) != program_digest(other, X, Y)


def test_a_constant_is_a_difference():
    def plus(values):
        return program_digest(lambda x: x + jnp.asarray(values), X)

    assert plus(np.arange(3.0)) != plus(np.arange(3.0) + 1)
