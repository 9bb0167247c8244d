"""A proof from two traces is never given where a cell looks at another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.linalg import solve_triangular

from xr_aimz.pointwise import proven

LENGTH, EVENT = 8, 3
HELD = np.arange(LENGTH * LENGTH * EVENT, dtype="f4").reshape(LENGTH, LENGTH, EVENT)
TABLE = jnp.linspace(-1, 1, 5)
MIXING = np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 1.0]], "f4")

# Of an array (lat, lon, event), both of the first split.
CELL_BY_CELL = {
    "a function": jnp.tanh,
    "of numbers": lambda x: 2 * x + 0.5,
    "a choice": lambda x: jnp.where(x > 0, x, -0.1 * x),
    "nested": lambda x: jax.jit(jax.nn.softplus)(x),
    "of its event": lambda x: x - x.mean(-1, keepdims=True),
    "ranks in its event": lambda x: jnp.sort(x, -1),
    "a sum along its event": lambda x: jnp.cumsum(x, -1),
    "a softmax": lambda x: jax.nn.softmax(x, -1),
    "a matrix": lambda x: x @ MIXING,
    "a table": lambda x: x + TABLE[(jnp.abs(x) * 10).astype(int) % 5],
    "a constant": lambda x: x * jnp.ones((*x.shape[:1], 1, 1)),
    "an event more": lambda x: jnp.stack([x, -x], -1).sum(-1) + x,
    "reshaped": lambda x: x.reshape(*x.shape[:2], 1, -1)[:, :, 0],
    "flattened and back": lambda x: jnp.tanh(x.reshape(-1, EVENT) + 1).reshape(x.shape),
    "all flattened and back": lambda x: jnp.tanh(x.ravel() * jnp.ones(x.size)).reshape(x.shape),
    "a diagonal": lambda x: jnp.diagonal(x[..., None] * jnp.eye(EVENT), axis1=-2, axis2=-1),
    "moved and back": lambda x: jnp.moveaxis(jnp.moveaxis(x, 0, -1) * 2, -1, 0),
}
COUPLED = {
    "a mean": lambda x: x - x.mean(0),
    "a running sum": lambda x: jnp.cumsum(x, 1),
    "backwards": lambda x: x[::-1],
    "a lag": lambda x: jnp.roll(x, 1, 0),
    "a lag by joining": lambda x: jnp.concatenate([x[:1], x[:-1]]),
    "the first": lambda x: x + x[:1],
    "ranks": lambda x: jnp.sort(x, 0),
    "how many": lambda x: x * x.shape[0],
    "how many, as a power": lambda x: (1 + x**2) ** (x.shape[0] / 4),
    "how many, by a sum": lambda x: x * jnp.ones_like(x[:, :1]).sum(),
    "how many, by a loop": lambda x: jax.lax.fori_loop(0, x.shape[0], lambda _, v: v * 0.9, x),
    "how many, by the last": lambda x: x + jnp.arange(x.shape[0]).max(),
    "how many, in a call": lambda x: jax.jit(lambda v: v / x.shape[1])(x),
    "positions": lambda x: x + jnp.arange(x.shape[1])[:, None],
    "positions in an array": lambda x: x + HELD[: x.shape[0], : x.shape[1]],
    "the other dim": lambda x: x + jnp.swapaxes(x, 0, 1),
    "neighbours by a product": lambda x: jnp.einsum("ijk,mjk->imk", x, x)[:, : x.shape[1]],
    "its own place": lambda x: x * jnp.eye(x.shape[0], x.shape[1])[..., None],
    "a table of cells": lambda x: x[(jnp.abs(x[:, 0, 0]) * 10).astype(int) % x.shape[0]],
    "a mean of the flattened": lambda x: x - x.reshape(-1, EVENT).mean(0),
    "ranks among the flattened": lambda x: jnp.sort(x.ravel()).reshape(x.shape),
    "flattened, and folded otherwise": lambda x: (
        x + x.reshape(-1, EVENT, x.shape[0]).sum(-1).reshape(x.shape[0], -1, EVENT)
    ),
    "halves": lambda x: (
        x.reshape(2, -1, *x.shape[1:]).mean(0, keepdims=True).repeat(2, 0).reshape(x.shape)
    ),
}


def cells(length):
    return jax.random.normal(jax.random.key(0), (LENGTH, LENGTH, EVENT))[:length, :length]


def is_proven(call, wanted=("lat", "lon", None)):
    whole, part = (jax.make_jaxpr(call)(cells(n)) for n in (LENGTH, LENGTH // 2))
    return proven(whole, part, [("lat", "lon", None)], [wanted])


def commutes(call):
    half, x = LENGTH // 2, cells(LENGTH)
    whole = call(x)
    return all(
        np.allclose(whole[i : i + half, j : j + half], call(x[i : i + half, j : j + half]), 1e-4)
        for i in (0, half)
        for j in (0, half)
    )


@pytest.mark.parametrize("name", CELL_BY_CELL)
def test_what_is_made_cell_by_cell_is_proven(name):
    assert commutes(CELL_BY_CELL[name])
    assert is_proven(CELL_BY_CELL[name])


@pytest.mark.parametrize("name", COUPLED)
def test_what_looks_further_is_not(name):
    assert not commutes(COUPLED[name])
    assert not is_proven(COUPLED[name])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*CELL_BY_CELL.items(), *COUPLED.items()]), min_size=1, max_size=4)
)
def test_nothing_is_proven_that_does_not_commute(steps):
    def call(x):
        for _, step in steps:
            x = step(x)
        return x

    if is_proven(call):
        assert commutes(call)
    assert is_proven(call) <= all(name in CELL_BY_CELL for name, _ in steps)


def test_a_result_that_nobody_reads_does_not_matter():
    def call(x):
        jnp.cumsum(x, 0)
        return 2 * x

    assert is_proven(call)


def test_a_result_bears_the_dims_that_are_asked_for():
    assert not is_proven(lambda x: jnp.swapaxes(x, 0, 1))
    assert is_proven(lambda x: jnp.swapaxes(x, 0, 1), ("lon", "lat", None))
    assert not is_proven(lambda x: x.sum(-1))
    assert not is_proven(lambda x: x[:, 0], ("lat", None))


def test_a_constant_is_one_in_any_place():
    assert is_proven(lambda x: jnp.ones(x.shape))
    assert not is_proven(lambda x: jnp.ones(x.shape) * jnp.ones(x.shape).sum())


def test_a_system_of_equations_is_solved_for_each_cell():
    def solve(x):
        return solve_triangular(MIXING, x[..., None], lower=False)[..., 0]

    whole, part = (jax.make_jaxpr(solve)(cells(n)[:, 0]) for n in (LENGTH, LENGTH // 2))
    assert proven(whole, part, [("lat", None)], [("lat", None)])
