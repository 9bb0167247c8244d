"""What blocks take their own part of, and that the part is theirs."""

from __future__ import annotations

from itertools import accumulate

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import xr_aimz
from xr_aimz.binding.alignment import AlignedInputs
from xr_aimz.prediction.graph import block_inputs
from xr_aimz.random.labels import hash_labels

cuts = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


def made(array, chunks, cut_dims=()):
    """The operands of one array over ``x`` and ``y``, with keys of two draws and one site."""
    sizes = {"x": array.shape[0], "y": array.shape[1]}
    inputs = AlignedInputs({"a": xr.DataArray(array, dims=("x", "y"))}, sizes, {}, xr.Dataset())
    keys = np.zeros((1, 2, 1, 2), np.uint32)
    whole = {"chain": (1,), "draw": (2,), **chunks}
    return {o.kind: o for o in block_inputs(inputs, {}, keys, cut_dims, whole)}


def taken(operand, at):
    key, part = operand.part(at)
    return np.asarray(operand.array.blocks[key[1:]])[part]


@given(own=cuts, wanted=cuts, lazy=st.booleans())
def test_parts_are_those_of_the_blocks_however_both_are_cut(own, wanted, lazy):
    length = sum(own)
    ends = sorted({min(end, length) for end in accumulate(wanted)} | {length})
    blocks = tuple(np.diff([0, *ends]).tolist())
    values = np.arange(length * 3.0).reshape(length, 3)
    array = da.from_array(values, chunks=(own, (2, 1))) if lazy else values
    operand = made(array, {"x": blocks, "y": (3,)})["array"]
    found = [taken(operand, {"x": i, "y": 0}) for i in range(len(blocks))]
    np.testing.assert_array_equal(np.concatenate(found), values)
    assert [len(f) for f in found] == list(blocks)


def test_a_block_within_a_chunk_costs_no_task_of_its_own():
    array = da.ones((8, 3), chunks=(4, 3))
    operand = made(array, {"x": (2, 2, 2, 2), "y": (3,)})["array"]
    assert operand.array is array
    assert operand.part({"x": 3, "y": 0}) == ((array.name, 1, 0), (slice(2, 4), slice(0, 3)))


def test_positions_are_counted_in_each_block():
    operand = made(np.ones((7, 2)), {"x": (3, 4), "y": (2,)}, cut_dims=("x",))["words"]
    found = np.concatenate([taken(operand, {"x": i}) for i in (0, 1)])
    np.testing.assert_array_equal(found, hash_labels("x", np.arange(7)))


def line(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


@pytest.mark.parametrize("dim", ["word", "site", "key"])
@pytest.mark.parametrize("labelled", [True, False])
def test_no_name_of_a_dimension_is_taken(dim, labelled):
    x = np.linspace(0, 1, 6)
    ds = xr.Dataset({"x": (dim, x), "y": (dim, x)}, {dim: np.arange(6)} if labelled else {})
    fit = ds.aimz.from_posterior(line, {"b": np.ones((2, 5))})
    with xr_aimz.set_options(block_bytes=1):
        cut = ds.chunk({dim: 2}).aimz.predict(fit)
    assert cut.y.data.npartitions > 3
    xr.testing.assert_allclose(cut.compute(), ds.aimz.predict(fit).compute())
