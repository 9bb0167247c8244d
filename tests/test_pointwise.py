"""What a trace shows to be made cell by cell is; what is not, it does not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xr_aimz.pointwise import follows, literals

N, K = 6, 3
CELLS = np.arange(N * K, dtype=np.float32).reshape(N, K)
ROW = np.ones(K, np.float32)


def shown(f, out=0, into=(0, None)):
    return follows(jax.make_jaxpr(f)(CELLS, ROW), into, [out])


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: x @ w,
        lambda x, w: jnp.exp(x).sum(1) + 2.0,
        lambda x, w: jnp.where(x[:, 0] > 0, x[:, 1], w[0]),
        lambda x, w: jnp.tanh(x * w[None])[:, :2].max(-1),
        lambda x, w: jax.nn.softplus(x).reshape(N, K, 1).squeeze(-1).cumsum(1)[:, -1],
        lambda x, w: jnp.broadcast_to(w.sum(), (N,)) * x[:, 0],
        lambda x, w: jax.vmap(lambda row: row @ w)(x),
        lambda x, w: x.T[1],
        lambda x, w: jnp.stack([x[:, 0], x[:, 1] * w[0]], -1)[:, 1],
        lambda x, w: jnp.concatenate([x, x * w], 1).sum(1),
        lambda x, w: jax.jit(lambda y: y[:, 0] ** 2)(x),
        lambda x, w: jax.lax.fori_loop(0, 3, lambda i, a: a + 1, w)[0] * x[:, 0],
    ],
)
def test_cells_by_themselves_are_shown_to_be(f):
    assert shown(f)
    # And they are: the rows of a part are the part of the rows.
    np.testing.assert_allclose(
        f(CELLS, ROW)[2:4],
        jax.vmap(lambda r: f(jnp.broadcast_to(r, (N, K)), ROW)[0])(CELLS)[2:4],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: x[:, 0] - x.mean(0)[0],
        lambda x, w: x.cumsum(0)[:, 0],
        lambda x, w: jnp.roll(x[:, 0], 1),
        lambda x, w: x[::-1, 0],
        lambda x, w: x[:, 0] + jnp.arange(N),
        lambda x, w: x[:, 0] * jnp.linspace(0.0, 1.0, N),
        lambda x, w: x[:, 0] + np.arange(N),
        lambda x, w: jnp.sort(x[:, 0]),
        lambda x, w: (x @ x.T)[:, 0],
        lambda x, w: jnp.concatenate([x[1:, 0], x[:1, 0]]),
        lambda x, w: x[:, 0][jnp.arange(N)[::-1]],
        lambda x, w: jax.lax.scan(lambda c, r: (c + r[0], c), 0.0, x)[1],
        lambda x, w: jnp.fft.fft(x[:, 0]).real,
        lambda x, w: jnp.diff(x[:, 0], prepend=0.0),
        lambda x, w: x[:, 0].reshape(2, 3).sum(1).repeat(3),
        lambda x, w: x.reshape(-1)[:N],
        lambda x, w: jnp.stack([x[:, 0], jnp.arange(N)], 1)[:, 1],
        lambda x, w: jnp.concatenate([x[:, :1], jnp.arange(N)[:, None]], 1).sum(1),
        lambda x, w: x[:, 0] + jax.random.normal(jax.random.key(0), (N,)),
    ],
)
def test_cells_that_look_at_others_are_not(f):
    assert not shown(f)


def test_an_output_without_the_axis_must_not_come_from_it():
    assert shown(lambda x, w: w.sum(), out=None)
    assert not shown(lambda x, w: x.sum() + w.sum(), out=None)
    assert not shown(lambda x, w: x.sum(0), out=None)


def test_the_axis_must_be_where_it_should_be():
    assert not shown(lambda x, w: x.T, out=0)
    assert shown(lambda x, w: x.T, out=1)


def test_a_number_made_from_a_length_is_among_the_literals():
    def scaled(x):
        return x / x.shape[0]

    whole, half = (jax.make_jaxpr(scaled)(CELLS[:n]) for n in (N, N // 2))
    assert literals(whole) != literals(half)
    plain = [jax.make_jaxpr(lambda x: x / 2)(CELLS[:n]) for n in (N, N // 2)]
    assert literals(plain[0]) == literals(plain[1])
    gaps = [jax.make_jaxpr(lambda x: jnp.where(x > 0, x, jnp.nan))(CELLS[:n]) for n in (N, 2)]
    assert literals(gaps[0]) == literals(gaps[1])
