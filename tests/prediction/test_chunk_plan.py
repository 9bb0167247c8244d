"""How a prediction is cut: under the limit, evenly, and never through a core dim."""

from math import prod

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.binding.alignment import AlignedInputs
from xr_aimz.binding.spec import Binding, BoundArgument, VariableRef
from xr_aimz.prediction.chunk_plan import plan_chunks

# A task holds its outputs several times over.
COPIES = 4
LEAST_CELLS = 1024


def cut(sizes, shape, limit, *, core=(), chunks=None, itemsize=4):
    dims = tuple(sizes)
    binding = Binding((BoundArgument("y", (VariableRef("y", "y", dims),)),), {}, dims, core)
    inputs = AlignedInputs({}, sizes, {}, xr.Dataset(), chunks=chunks or {})
    return plan_chunks(binding, inputs, shape, itemsize * prod(sizes.values()), limit)


def weight(found, itemsize=4):
    """The bytes of the heaviest task's outputs."""
    cells = prod(max(c) for c in found.chunks.values())
    return cells * max(found.chain) * max(found.draw) * itemsize


def whole(found, sizes, shape):
    assert {d: sum(c) for d, c in found.chunks.items()} == dict(sizes)
    assert (sum(found.chain), sum(found.draw)) == shape


CASES = [
    ({"time": 240, "lat": 37, "lon": 49}, (4, 1000)),
    ({"obs": 400_000}, (4, 250)),
    ({"obs": 7}, (1, 3)),
    ({"lat": 997, "lon": 1009}, (3, 97)),
    ({}, (2, 100)),
]


@pytest.mark.parametrize(("sizes", "shape"), CASES)
@pytest.mark.parametrize("limit", [2**17, 2**20, 2**27, 2**40])
def test_a_task_stays_under_the_limit(sizes, shape, limit):
    found = cut(sizes, shape, limit)
    whole(found, sizes, shape)
    assert weight(found) * COPIES <= limit or max(found.chain) * max(found.draw) == 1


@pytest.mark.parametrize(("sizes", "shape"), CASES)
def test_what_fits_is_not_cut(sizes, shape):
    found = cut(sizes, shape, 2**40)
    assert found.chunks == {d: (n,) for d, n in sizes.items()}
    assert (found.chain, found.draw) == ((shape[0],), (shape[1],))


def test_a_block_is_no_smaller_than_is_worth_a_task():
    found = cut({"obs": 400_000}, (4, 1000), 2**16)
    assert max(found.chunks["obs"]) >= LEAST_CELLS // 2
    assert max(found.chain) * max(found.draw) < 4000


def test_a_limit_below_one_draw_still_gives_a_plan():
    found = cut({"obs": 100}, (2, 5), 1)
    whole(found, {"obs": 100}, (2, 5))
    assert max(found.chain) * max(found.draw) == 1


@pytest.mark.parametrize("core", [("time",), ("lat",), ("time", "lat"), ("time", "lat", "lon")])
def test_core_dims_stay_whole(core):
    sizes = {"time": 240, "lat": 37, "lon": 49}
    found = cut(sizes, (4, 1000), 2**20, core=core)
    whole(found, sizes, (4, 1000))
    for dim in core:
        assert found.chunks[dim] == (sizes[dim],)
    if core != tuple(sizes):
        assert prod(len(c) for c in found.chunks.values()) > 1


def test_chunks_of_the_dataset_are_kept():
    chunks = {"time": (100, 100, 40), "lat": (30, 7)}
    sizes = {"time": 240, "lat": 37, "lon": 49}
    found = cut(sizes, (4, 1000), 2**27, chunks=chunks)
    assert found.chunks == {**chunks, "lon": (49,)}
    assert weight(found) * COPIES <= 2**27


def test_blocks_are_as_even_as_can_be():
    found = cut({"obs": 400_000}, (4, 250), 2**27)
    chunks = found.chunks["obs"]
    assert len(chunks) > 1
    assert len(set(chunks[:-1])) == 1
    # Padding the last block to the size of the others wastes little.
    assert max(chunks) - min(chunks) < len(chunks)


@pytest.mark.parametrize("draws", [100, 500, 960, 1000, 4000])
@pytest.mark.parametrize("limit", [2**18, 2**20, 2**22])
def test_runs_of_draws_are_equal_where_they_can_be(draws, limit):
    found = cut({"obs": 5000}, (1, draws), limit, chunks={"obs": (5000,)})
    assert len(found.draw) > 1
    # Each length of run is a program to compile.
    assert len(set(found.draw)) == 1


def test_runs_of_a_prime_number_of_draws():
    found = cut({"obs": 5000}, (1, 997), 2**20, chunks={"obs": (5000,)})
    assert sum(found.draw) == 997
    assert len(set(found.draw)) <= 2


def test_chains_are_cut_before_a_run_of_draws_is_over_the_limit():
    found = cut({"obs": 5000}, (4, 100), COPIES * 4 * 5000 * 2, chunks={"obs": (5000,)})
    assert found.chain == (1, 1, 1, 1)
    assert max(found.draw) <= 2


@pytest.mark.parametrize("limit", [2**17, 2**20])
def test_a_prediction_has_the_chunks_of_its_plan(limit):
    def model(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

    ds = xr.Dataset({"x": ("obs", np.zeros(20_000))}, {"obs": np.arange(20_000)})
    ds["y"] = ds.x
    fit = ds.aimz.from_posterior(model, {"slope": np.zeros((2, 50), np.float32)})
    with xr_aimz.set_options(block_bytes=limit):
        pred = ds.aimz.predict(fit)
    assert prod(max(c) for c in pred.y.chunks) * 4 * COPIES <= limit
    assert pred.y.isel(obs=slice(3)).compute().notnull().all()
