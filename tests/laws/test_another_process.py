"""A write that is cut short in one process is taken up by another, whose hash seed differs."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from dask.callbacks import Callback
from interrupted_writes import Writes, interrupted
from opened_files import CHANGED, OPENED, write_files

import xr_aimz
from xr_aimz.errors import ResumeWarning, StoreError
from xr_aimz.storage import completeness
from xr_aimz.storage.completeness import chunk_key

CASES = [(how, change) for how in OPENED for change in CHANGED if how != "h5netcdf"]


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@contextmanager
def prediction(folder, how, change):
    draws = {"slope": np.random.default_rng(0).normal(size=(1, 4))}
    made_on = xr.Dataset({"x": (("t", "s"), np.ones((2, 2)))})
    fit = made_on.aimz.from_posterior(line, draws, dim=("t", "s"))
    with OPENED[how](folder) as ds:
        yield CHANGED[change](ds).drop_vars("y").aimz.predict(fit)


def begin(folder):
    """A part of every case."""
    for number, case in enumerate(CASES):
        with prediction(folder, *case) as pred:
            interrupted(pred, folder / f"{number}.zarr", most=2)


def take_up(folder):
    """The rest of every case: what it came to."""
    for number, case in enumerate(CASES):
        with prediction(folder, *case) as pred:
            store = folder / f"{number}.zarr"
            there = [
                store / chunk_key(*b)
                for b in completeness.written_blocks(completeness.as_store(store))
            ]
            count = sum(completeness.read_manifest(completeness.as_store(store)).blocks.values())
            assert 0 < len(there) < count
            before = {p: p.stat().st_mtime_ns for p in there}
            back = pred.aimz.to_zarr(store, progress=False)
            assert {p: p.stat().st_mtime_ns for p in there} == before
            np.testing.assert_array_equal(back.y, pred.y)


def run(function, folder, hash_seed, *arguments):
    """Call a function of this module in a process of its own."""
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import test_another_process as t\n"
        f"t.{function}(pathlib.Path(sys.argv[2]), *sys.argv[3:])\n"
    )
    tests = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", program, tests, str(folder), *arguments],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, said = process.communicate()
    assert process.returncode == 0, said


@pytest.mark.slow
def test_results_of_whatever_was_opened_are_taken_up_by_another_process(tmp_path):
    write_files(tmp_path)
    finish(run("begin", tmp_path, "1"))
    finish(run("take_up", tmp_path, "2"))


def plane(x, z, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1))
    sd = numpyro.sample("sd", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(a * x + b * z, sd), obs=y)


METHODS = {
    "svi": {"method": "svi", "steps": 40},
    "laplace": {"method": "laplace"},
    "nuts": {"method": "nuts", "warmup": 5, "chains": 1},
}
COMMON = {"draws": 10, "progress": False}


def cells(folder):
    """Three hundred cells with two inputs, and as many blocks as there are chunks."""
    path = folder / "cells.nc"
    if not path.exists():
        rng = np.random.default_rng(0)
        arrays = {n: (("t", "cell"), rng.normal(size=(12, 300))) for n in "xyz"}
        xr.Dataset(arrays, {"cell": np.arange(300), "t": np.arange(12)}).to_netcdf(path)
    return xr.open_dataset(path).chunk(cell=100)


class StopsAfterABlock(Callback):
    """Stops a fit before its second block of cells is read."""

    def __init__(self, store):
        self.store = store

    def _start(self, dsk):
        if finished_blocks(self.store):
            raise KeyboardInterrupt


def fit_cells(folder, method, store):
    # A block of few bytes: one of each chunk, whatever a tile has.
    with xr_aimz.set_options(block_bytes=1):
        return cells(folder).aimz.fit(plane, per="cell", store=store, **COMMON, **METHODS[method])


def fitted(folder, method):
    """A prediction from a fit that every process makes for itself."""
    one = cells(folder).isel(cell=0, drop=True).load()
    return one.chunk(t=4).aimz.predict(one.aimz.fit(plane, **COMMON, **METHODS[method]))


def begin_fits(folder, *methods):
    for method in methods:
        store = folder / f"{method}.zarr"
        with StopsAfterABlock(store), pytest.raises(KeyboardInterrupt):
            fit_cells(folder, method, store)
        interrupted(fitted(folder, method), folder / f"predicted-{method}.zarr")


def take_up_fits(folder, *methods):
    for method in methods:
        store = folder / f"{method}.zarr"
        there = finished_blocks(store)
        assert len(there) == 1
        fit_cells(folder, method, store)
        assert {p: p.stat().st_mtime_ns for p in there} == there
        assert len(finished_blocks(store)) > 1
        pred, path = fitted(folder, method), folder / f"predicted-{method}.zarr"
        xr.testing.assert_identical(pred.aimz.to_zarr(path, progress=False).load(), pred.load())


def finished_blocks(store):
    """The marks of finished blocks, and when each was made."""
    marks = (store / "xr_aimz_finished" / "c").glob("*")
    return {p: p.stat().st_mtime_ns for p in marks if p.suffix != ".partial"}


@pytest.mark.slow
def test_fits_and_fits_per_cell_are_taken_up_by_another_process(tmp_path):
    cells(tmp_path).close()
    finish(run("begin_fits", tmp_path, "1", *METHODS))
    finish(run("take_up_fits", tmp_path, "2", *METHODS))


@pytest.mark.slow
def test_a_fit_per_cell_that_was_killed_is_taken_up(tmp_path):
    cells(tmp_path).close()
    store = tmp_path / "laplace.zarr"
    process = run("begin_a_fit", tmp_path, "1", "laplace")
    while process.poll() is None and not finished_blocks(store):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = finished_blocks(store)
    assert there
    finish(run("begin_a_fit", tmp_path, "2", "laplace"))
    assert finished_blocks(store).items() > there.items()


def begin_a_fit(folder, method):
    fit_cells(folder, method, folder / f"{method}.zarr")


@pytest.fixture
def ds():
    values = np.random.default_rng(0).normal(size=(6, 4))
    return xr.Dataset({"x": (("t", "s"), values)}, {"t": np.arange(6)}).chunk(t=2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda ds: ds + 1, "'x'"),
        (lambda ds: ds.chunk(t=3), "chunks and shards"),
        (lambda ds: ds.assign_coords(t=ds.t + 1), "coordinate 't'"),
        (lambda ds: ds.assign_attrs(title="new"), "attribute 'title'"),
        (lambda ds: ds.assign(z=ds.x.isel(s=0)), r"variable 'z' \(only here\)"),
    ],
)
def test_a_refusal_names_what_differs(ds, tmp_path, change, what):
    interrupted(ds, tmp_path / "out.zarr")
    with pytest.raises(StoreError, match=f"holds other results: they differ in .*{what}"):
        change(ds).aimz.to_zarr(tmp_path / "out.zarr")
    with pytest.raises(StoreError, match=r"precision \(None there, 9 here\)"):
        ds.aimz.to_zarr(tmp_path / "out.zarr", precision=9)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            lambda ds, fit, more: ds.assign(x=ds.x + 1).aimz.predict(fit),
            "the values of 'x', which 'y' depends on",
        ),
        (lambda ds, fit, more: ds.aimz.predict(more), "the draws of the fit"),
        (lambda ds, fit, more: ds.aimz.predict(fit, seed=1), "the seed, or the labels of chains"),
        (lambda ds, fit, more: ds.assign_coords(t=ds.t + 9).aimz.predict(fit), "labels of 't'"),
        (lambda ds, fit, more: ds.aimz.predict(fit, summary=["mean"]), "'y_mean'"),
    ],
)
def test_a_refusal_names_what_differs_in_a_prediction(ds, tmp_path, other, what):
    rng = np.random.default_rng(0)
    fit, more = (
        ds.aimz.from_posterior(line, {"slope": rng.normal(size=(1, 3))}, dim=("t", "s"))
        for _ in range(2)
    )
    interrupted(ds.aimz.predict(fit), tmp_path / "out.zarr")
    with pytest.raises(StoreError, match=what):
        other(ds, fit, more).aimz.to_zarr(tmp_path / "out.zarr")


def test_a_refusal_names_the_file_that_has_changed(tmp_path):
    write_files(tmp_path)
    path = tmp_path / "all.nc"
    with xr.open_dataset(path) as ds:
        interrupted(ds.chunk(t=2), tmp_path / "out.zarr")
    os.utime(path, ns=(0, 0))
    with xr.open_dataset(path) as ds, pytest.raises(StoreError) as caught:
        ds.chunk(t=2).aimz.to_zarr(tmp_path / "out.zarr")
    assert f"the file {str(path)!r}" in str(caught.value)
    assert "1970-01-01" in str(caught.value)
    assert "which 'x'" in str(caught.value)


class Opaque:
    """An array that holds what another process cannot compare."""

    def __init__(self, values):
        self.values, self.held = values, threading.local()
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, region):
        return self.values[region]


def opaque(ds):
    data = da.from_array(Opaque(ds.x.values), chunks=(2, 4), meta=np.empty((0, 0)))
    return ds.assign(x=ds.x.copy(data=data))


@pytest.mark.parametrize(
    "made", [opaque, lambda ds: ds * da.random.default_rng().normal(size=(6, 4))]
)
def test_what_no_other_process_could_take_up_is_said_before_the_first_block(ds, tmp_path, made):
    lazy, store = made(ds), tmp_path / "out.zarr"
    with Writes() as writes, warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        with pytest.raises(ResumeWarning, match=r"no other process can take it up.*'x'"):
            lazy.aimz.to_zarr(store)
    assert (writes.done, store.exists()) == (0, False)
    # Whoever says that he will not resume is not warned.
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        lazy.aimz.to_zarr(tmp_path / "other.zarr", resume=False)
    # The process that began it goes on with it; another is told why it does not.
    with pytest.warns(ResumeWarning):
        interrupted(lazy, store)
    with pytest.warns(ResumeWarning) as caught:
        lazy.aimz.to_zarr(store)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(StoreError, match="another process cannot tell them to be the same"):
        made(ds).aimz.to_zarr(store)


def test_what_was_predicted_from_such_data_is_said_too(ds, tmp_path):
    fit = ds.aimz.from_posterior(line, {"slope": np.ones((1, 3))}, dim=("t", "s"))
    with pytest.warns(ResumeWarning, match=r"an object of .* in 'y'"):
        opaque(ds).aimz.predict(fit).aimz.to_zarr(tmp_path / "out.zarr")
