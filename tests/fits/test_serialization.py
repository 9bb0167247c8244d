"""Packed values come back as they were, and what has no place is refused by name."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpyro.contrib.module import ParamShape

from xr_aimz.errors import DamagedStoreError, StoreError
from xr_aimz.fits.serialization import decode_tree, encode_tree

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers()
keys = st.text() | st.integers() | st.tuples(st.text())
trees = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


def through(value):
    arrays = {}

    def put(array):
        arrays[str(len(arrays))] = array
        return str(len(arrays) - 1)

    packed = json.loads(json.dumps(encode_tree(value, put, "a value"), allow_nan=False))
    return decode_tree(packed, arrays.__getitem__)


@given(trees)
def test_values_come_back(value):
    # As text: NaN is not equal to itself.
    assert repr(through(value)) == repr(value)


def test_arrays_and_keys_come_back():
    value = {
        "a": np.arange(3, dtype="i2"),
        "b": (jnp.ones(2), np.float32(2.5)),
        "k": jax.random.key(7),
    }
    back = through(value)
    np.testing.assert_array_equal(back["a"], value["a"])
    assert isinstance(back["b"][0], jax.Array)
    assert back["b"][1].dtype == np.float32
    assert jax.random.bits(back["k"]) == jax.random.bits(value["k"])
    assert jax.tree.structure(through({"p": ParamShape((2, 3))})) == jax.tree.structure(
        {"p": ParamShape((2, 3))}
    )


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", math.sin, int])
def test_what_has_no_place_is_refused(value):
    with pytest.raises(StoreError, match="constant 'c' holds"):
        encode_tree([value], lambda a: "", "constant 'c'")


@pytest.mark.parametrize(
    "packed",
    [{"pickle": "x"}, [1], {}, {"a": 1, "b": 2}, {"class": ["Popen", []]}, {"float": "1"}],
)
def test_what_is_no_value_is_refused(packed):
    with pytest.raises(DamagedStoreError):
        decode_tree(packed, {}.__getitem__)
