"""The cipher written out is JAX's own, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from xr_aimz.random.keys import threefry

EDGES = (0, 1, 2, 2**16, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


def words(*values):
    return tuple(jnp.asarray(v, jnp.uint32) for v in values)


def of_jax(key, counter):
    """JAX's cipher of any counters: it splits its one array into high and low words."""
    out = threefry_2x32(jnp.stack(key), jnp.concatenate([c.ravel() for c in counter]))
    return [half.reshape(counter[0].shape) for half in jnp.split(out, 2)]


@pytest.mark.parametrize("wrapped", [threefry, jax.jit(threefry)], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(1,), (7,), (4, 3, 5)])
def test_bits_are_those_of_jax(wrapped, shape):
    rng = np.random.default_rng(0)
    for _ in range(3):
        key = words(*rng.integers(0, 2**32, 2, dtype=np.uint32))
        counter = words(*rng.integers(0, 2**32, (2, *shape), dtype=np.uint32))
        for got, expected in zip(wrapped(key, counter), of_jax(key, counter), strict=True):
            assert got.dtype == jnp.uint32
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("key", [(a, b) for a in EDGES for b in (0, 2**32 - 1)])
def test_bits_are_those_of_jax_at_the_edges(key):
    high, low = (a.ravel() for a in np.meshgrid(EDGES, EDGES))
    counter = words(high, low)
    got, expected = threefry(words(*key), counter), of_jax(words(*key), counter)
    np.testing.assert_array_equal(jnp.stack(got), jnp.stack(expected))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, expected):
    # From kat_vectors of the authors' Random123, so that JAX is not the only witness.
    got = threefry(words(*key), words(*counter))
    assert tuple(int(word) for word in got) == expected


def test_a_key_for_each_counter():
    own = np.broadcast_to(np.arange(3)[:, None], (3, 4))
    keys = words(own, own + 10)
    counter = words(*np.broadcast_to([np.arange(4), np.zeros(4)], (3, 2, 4)).swapaxes(0, 1))
    got = jnp.stack(threefry(keys, counter))
    assert got.shape == (2, 3, 4)
    for i in range(3):
        alone = of_jax(words(i, i + 10), tuple(half[i] for half in counter))
        np.testing.assert_array_equal(got[:, i], jnp.stack(alone))
