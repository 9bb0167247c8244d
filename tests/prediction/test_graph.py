"""One task a block, compiled once a shape, under the bytes that were allowed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import dask
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from dask.callbacks import Callback

import xr_aimz
from xr_aimz.kernel import compile

calls = []


def line(x, y=None):
    calls.append(x.shape)
    b = numpyro.sample("b", dist.Normal(0, 1))
    with xr_aimz.plate("time"):
        numpyro.deterministic("mu", b * x)
        numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


@pytest.fixture(scope="module")
def ds():
    x = np.linspace(0, 1, 11)
    return xr.Dataset({"x": ("time", x), "y": ("time", x)}, {"time": np.arange(11)})


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.from_posterior(line, {"b": np.ones((2, 5))})


def test_a_ragged_edge_is_padded_and_needs_no_program_of_its_own(ds, fit):
    pred = ds.chunk(time=(4, 4, 3)).aimz.predict(fit)
    before = set(compile._compiled)
    with dask.config.set(scheduler="threads", num_workers=4):
        values = pred.compute()
    assert len(set(compile._compiled) - before) == 1
    seen = len(calls)
    again = pred.compute()
    assert len(calls) == seen  # a task calls a compiled program; it never traces
    xr.testing.assert_identical(again, values)
    assert values.y.shape == (2, 5, 11)
    np.testing.assert_allclose(values.mu[0, 0], ds.x, rtol=1e-6)


def test_many_threads_compile_one_program(ds, fit):
    pred = ds.isel(time=slice(0, 7)).chunk(time=1).aimz.predict(fit)
    before = set(compile._compiled)
    with ThreadPoolExecutor(7) as pool:
        parts = list(pool.map(lambda i: pred.y.isel(time=i).values, range(7)))
    assert len(set(compile._compiled) - before) == 1
    np.testing.assert_array_equal(np.stack(parts, -1), pred.y.values)


class Tasks(Callback):
    def __init__(self):
        self.blocks = []

    def _posttask(self, key, result, dsk, state, worker_id):
        if isinstance(result, dict) and "mu" in result:
            self.blocks.append(result)  # and kept, so that no two share an id


def test_there_is_one_task_a_block_however_many_sites(ds, fit):
    with Tasks() as seen:
        ds.chunk(time=(4, 4, 3)).aimz.predict(fit).compute(scheduler="synchronous")
    assert len({id(block) for block in seen.blocks}) == 3
    assert all(set(block) == {"mu", "y"} for block in seen.blocks)


@pytest.mark.parametrize("block_bytes", [4 * 2**20, 2**17, 2**12])
@pytest.mark.parametrize("chunks", [None, 512])
def test_no_task_holds_more_than_it_may(block_bytes, chunks):
    n = 2048
    ds = xr.Dataset({"x": ("time", np.ones(n))}, {"time": np.arange(n)})
    fit = ds.aimz.from_posterior(line, {"b": np.ones((2, 60))})
    with xr_aimz.set_options(block_bytes=block_bytes):
        pred = (ds if chunks is None else ds.chunk(time=chunks)).aimz.predict(fit)
    held = sum(np.prod(a.data.chunksize) * a.dtype.itemsize for a in pred.values())
    # one draw of one block is the least that there is
    least = 2 * 4 * (chunks or 1024)
    assert held <= max(block_bytes, least)
    if chunks is not None:
        assert pred.y.chunksizes["time"] == (512,) * 4
    assert pred.y.sizes == {"chain": 2, "draw": 60, "time": n}


def test_inputs_are_computed_once_though_draws_are_cut():
    made = []

    def make(block):
        made.append(block.shape)
        return block

    n = 1024
    ds = xr.Dataset({"x": ("time", np.ones(n))}, {"time": np.arange(n)}).chunk(time=512)
    # a function of the blocks that counts: dask calls it once on nothing, for its dtype
    ds["x"] = ds.x.copy(data=ds.x.data.map_blocks(make, dtype=float, meta=np.empty(0)))
    fit = ds.aimz.from_posterior(line, {"b": np.ones((2, 60))})
    with xr_aimz.set_options(block_bytes=2**17):
        pred = ds.aimz.predict(fit)
    assert len(pred.y.chunksizes["draw"]) > 2
    pred.compute()
    assert len(made) == 2


@pytest.mark.slow
def test_a_progress_bar_is_shown_where_it_is_asked_for(ds, fit, tmp_path, capfd):
    pred = ds.aimz.predict(fit)
    pred.aimz.to_zarr(tmp_path / "quiet.zarr", progress=False)
    assert capfd.readouterr().err == ""
    pred.aimz.to_zarr(tmp_path / "shown.zarr", progress=True)
    assert "to_zarr: 100%" in capfd.readouterr().err
    ds.aimz.fit(line, method="svi", steps=1500, progress=True)
    assert "SVI: 100%" in capfd.readouterr().err


@pytest.mark.slow
def test_a_prediction_of_one_block_is_traced_once(ds, fit):
    seen = len(calls)
    pred = ds.chunk(time=-1).aimz.predict(fit)
    assert len(calls) == seen + 1
    # Where it is compiled, the trace is there; a process of its own makes it anew.
    values = pred.compute()
    assert len(calls) == seen + 1
    compile._compiled.clear()
    compile._traces.clear()
    xr.testing.assert_identical(pred.compute(), values)
    assert len(calls) == seen + 2
