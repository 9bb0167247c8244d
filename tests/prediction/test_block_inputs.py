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


def test_tasks_read_the_draws_of_a_fit_in_place():
    """One copy in memory, where JAX reads it without another: at a multiple of 64 bytes."""

    def network(x, y=None):
        weights = numpyro.sample("weights", dist.Normal(0, 1).expand([3, 8]).to_event(2))
        numpyro.sample("y", dist.Normal((x @ weights).sum(-1), 1.0), obs=y)

    x = xr.Dataset({"x": (("time", "feature"), np.ones((6, 3), np.float32))}).chunk(time=2)
    given_draws = np.random.default_rng(0).normal(size=(1, 40, 3, 8)).astype(np.float32)
    fit = x.aimz.from_posterior(network, {"weights": given_draws}, dim="time")
    held = fit.posterior.weights.values
    assert not held.flags.writeable
    before = held.copy()
    given_draws[:] = np.nan  # what becomes of it is no business of the fit
    np.testing.assert_array_equal(held, before)
    graph = dict(x.aimz.predict(fit, sites="y").y.data.dask)
    blocks = [
        node.value
        for node in graph.values()
        if isinstance(getattr(node, "value", None), np.ndarray) and node.value.shape[-1] == 8
    ]
    assert blocks
    for block in blocks:
        assert np.shares_memory(block, held)
        assert block.ctypes.data % 64 == 0


def test_draws_of_float64_are_cast_once():
    ds = xr.Dataset({"x": ("time", np.arange(4.0))}).chunk(time=2)
    wide = np.random.default_rng(0).normal(size=(1, 5))
    fits = [ds.aimz.from_posterior(line, {"b": b}, dim="time") for b in (wide, np.float32(wide))]
    assert fits[0].posterior.b.dtype == np.float64
    first, second = (ds.aimz.predict(fit, sites="y").y for fit in fits)
    assert not any(
        node.value.dtype == np.float64
        for node in dict(first.data.dask).values()
        if isinstance(getattr(node, "value", None), np.ndarray) and node.value.shape == (1, 5)
    )
    np.testing.assert_array_equal(first, second)
