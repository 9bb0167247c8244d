"""How many draws of a kernel are computed at once."""

import jax
import jax.numpy as jnp
import pytest

from xr_aimz.kernel.compile import _choose_batch_size
from xr_aimz.tracing import largest_product


def network(x, w):
    hidden = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0]
    return hidden.sum(-1)


def test_the_largest_matrix_product_is_found_at_any_depth():
    closed = jax.make_jaxpr(network)(jnp.ones((50, 8)), jnp.ones((8, 8)))
    assert largest_product(closed) == 50 * 8
    assert largest_product(jax.make_jaxpr(lambda x: x + 1)(1.0)) == 0


@pytest.mark.parametrize(
    ("count", "elements", "product", "size"),
    [
        (1000, 25_000, 25_000, 10),  # a regression: at least 16 are aimed at, 10 divides
        (1000, 100, 100, 1000),
        (1000, 625, 80_000, 2),  # a network: by its hidden layer
        (1000, 6250, 800_000, 1),
        (7, 10**6, 0, 7),
    ],
)
def test_a_batch_of_draws_fits_the_cache(count, elements, product, size):
    assert _choose_batch_size(count, elements, product) == size
