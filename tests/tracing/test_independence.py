"""A proof from two traces is never given where a cell looks at another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.linalg import solve_triangular

from xr_aimz.tracing.independence import find_obstacles

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
CELL_BY_CELL |= {
    "a scan along its event": lambda x: jax.lax.scan(
        lambda c, v: (c + v, c * v), x[..., 0], jnp.moveaxis(x, -1, 0)
    )[1].transpose(1, 2, 0),
    "a scan that starts alike for all": lambda x: jax.lax.scan(
        lambda c, v: (0.5 * c + v, c), jnp.zeros(x.shape[:2]), jnp.moveaxis(x, -1, 0)
    )[1].transpose(1, 2, 0),
    "a map over cells": lambda x: jax.lax.map(
        lambda v: jnp.cumsum(v), x.reshape(-1, EVENT)
    ).reshape(x.shape),
    "a map over rows": lambda x: jax.lax.map(lambda v: jnp.tanh(v) * v.sum(-1, keepdims=True), x),
    "a counted loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, v: v * 0.5 + i, x),
    "a loop until each is done": lambda x: jax.vmap(
        lambda v: jax.lax.while_loop(lambda c: c > 0.1, lambda c: c / 2, v)
    )(x.ravel()).reshape(x.shape),
    "a branch that a number decides": lambda x: jax.lax.cond(
        jnp.sum(TABLE) > 0, lambda v: 2 * v, lambda v: v - v.mean(-1, keepdims=True), x
    ),
    "a branch for each": lambda x: jax.vmap(lambda v: jax.lax.cond(v > 0, jnp.sin, jnp.cos, v))(
        x.ravel()
    ).reshape(x.shape),
    "in a checkpoint": lambda x: jax.checkpoint(lambda v: jnp.tanh(v) + v.sum(-1, keepdims=True))(
        x
    ),
    "a table for each": lambda x: jnp.take_along_axis(
        jnp.stack([x, -x, 2 * x], -1), jnp.argmax(x, -1)[..., None, None], -1
    )[..., 0],
    "an entry of its event": lambda x: x * x[..., 1][..., None],
    "an entry set": lambda x: x.at[..., 0].set(x[..., 1]),
    "entries added to": lambda x: x.at[..., jnp.array([0, 2])].add(1.0),
    "a slice that values start": lambda x: (
        x
        * jax.lax.dynamic_slice_in_dim(x, jnp.argmax(TABLE) % 2, 2, axis=2).sum(-1, keepdims=True)
    ),
    "solved": lambda x: jnp.linalg.solve(MIXING + jnp.eye(EVENT), x[..., None])[..., 0],
    "solved, a matrix each": lambda x: jnp.linalg.solve(
        jnp.exp(x)[..., None] * jnp.eye(EVENT), x[..., None]
    )[..., 0],
    "a factor of each": lambda x: jnp.linalg.cholesky(
        x[..., None] * x[..., None, :] + jnp.eye(EVENT)
    )[..., 0],
    "a convolution along its event": lambda x: jax.lax.conv_general_dilated(
        x.reshape(-1, 1, EVENT), jnp.ones((1, 1, 3)), (1,), "SAME"
    ).reshape(x.shape),
    "smoothed along its event": lambda x: jax.vmap(
        lambda v: jnp.convolve(v, jnp.array([0.2, 0.6, 0.2]), "same")
    )(x.reshape(-1, EVENT)).reshape(x.shape),
    "transformed along its event": lambda x: jnp.fft.irfft(jnp.fft.rfft(x), EVENT),
    "the best of its event": lambda x: jax.lax.top_k(x, EVENT)[0],
    "interpolated": lambda x: jnp.interp(x, jnp.linspace(-3, 3, 5), TABLE),
    "shared work of any kind": lambda x: x * jnp.linalg.det(MIXING) + jnp.linalg.svd(MIXING)[1],
    "ones of its own": lambda x: x * np.ones(x.shape[:2], "f4")[..., None],
    "reversed along its event": lambda x: x[..., ::-1],
    "padded along its event": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 1)))[..., 1:-1],
}
COUPLED = {
    "a scan along cells": lambda x: jax.lax.scan(lambda c, v: (c + v, c), x[0], x)[1],
    "a loop until all are done": lambda x: jax.lax.while_loop(
        lambda v: v.max() > 0.1, lambda v: v / 2, x
    ),
    "a loop for the first": lambda x: jax.lax.fori_loop(
        0, x.shape[0], lambda i, v: v + x[i], jnp.zeros_like(x)
    ),
    "sums by group": lambda x: (
        jax.ops.segment_sum(
            x.reshape(-1, EVENT), (jnp.abs(x[..., 0]).ravel() * 10).astype(int) % 3, 3
        ).sum()
        + x
    ),
    "an entry set at a place": lambda x: x.at[1].set(0.0),
    "a convolution over cells": lambda x: jax.lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0)[:, None], jnp.ones((1, 1, 3, 3)), (1, 1), "SAME"
    )[:, 0].transpose(1, 2, 0),
    "a window over cells": lambda x: jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (3, 1, 1), (1, 1, 1), "SAME"
    ),
    "in a checkpoint": lambda x: jax.checkpoint(lambda v: v - v.mean(0))(x),
    "any of them": lambda x: jnp.where(jnp.any(x > 2), 2 * x, x),
    "a transform over cells": lambda x: (
        jnp.fft.ifft(jnp.fft.fft(x, axis=0) * jnp.arange(x.shape[0])[:, None, None], axis=0).real
    ),
    "padded at its end": lambda x: jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1],
    "a determinant of cells": lambda x: x + jnp.linalg.det(x[..., 0]),
    "taken by its neighbour": lambda x: x[(jnp.abs(x[:, 0, 0]) * 0).astype(int)],
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
    return find_obstacles(whole, part, [("lat", "lon", None)], [wanted]) == [None]


def commutes(call):
    half, x = LENGTH // 2, cells(LENGTH)
    whole = call(x)
    return all(
        np.allclose(whole[i : i + half, j : j + half], call(x[i : i + half, j : j + half]), 1e-4)
        for i in (0, half)
        for j in (0, half)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CELL_BY_CELL)
def test_what_is_made_cell_by_cell_is_proven(name):
    assert commutes(CELL_BY_CELL[name])
    assert is_proven(CELL_BY_CELL[name])


@pytest.mark.parametrize("name", COUPLED)
def test_what_looks_further_is_not(name):
    assert not commutes(COUPLED[name])
    assert not is_proven(COUPLED[name])


@pytest.mark.slow
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
    assert find_obstacles(whole, part, [("lat", None)], [("lat", None)]) == [None]
