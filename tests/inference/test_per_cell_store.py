"""A posterior on disk: reopened lazily, resumed, refused when it is another fit's."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.errors import DamagedStoreError, StoreError, StoreKindError
from xr_aimz.inference import per_cell_program

OPTIONS = {"per": ("lat", "lon"), "method": "laplace", "draws": 30, "progress": False}
# A tile has 240 cells, so that blocks are two rows of a hundred, and the one that is left.
SMALL = {"block_bytes": 1}


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    weights = numpyro.sample("deep/weights", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(slope * x + weights.sum(), 0.5), obs=y)


def dataset():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(12, 3, 100))
    y[:, 0, 0] = np.nan
    return xr.Dataset(
        {"y": (("time", "lat", "lon"), y)},
        {"x": ("time", np.linspace(-1, 1, 12)), "lat": list("abc"), "lon": range(100)},
    )


@pytest.fixture(scope="module")
def ds():
    return dataset()


@pytest.fixture(scope="module")
def expected(ds):
    return ds.aimz.fit(line, **OPTIONS)


def stored(ds, store, **options):
    with xr_aimz.set_options(**SMALL):
        return ds.chunk(lat=1).aimz.fit(line, store=store, **{**OPTIONS, **options})


class Counter:
    """Counts the cells that are really fitted."""

    def __init__(self, monkeypatch, limit=None):
        self.cells, self.limit = 0, limit
        monkeypatch.setattr(
            per_cell_program.TileProgram, "run", self._counting(per_cell_program.TileProgram.run)
        )

    def _counting(self, run):
        def counted(this, seed, words, own, shared):
            if self.limit is not None and self.cells >= self.limit:
                raise KeyboardInterrupt
            self.cells += len(words)
            return run(this, seed, words, own, shared)

        return counted


@pytest.mark.slow
def test_a_stored_fit_is_the_one_in_memory_and_lazy(ds, expected, tmp_path):
    fit = stored(ds, tmp_path / "fit.zarr")
    assert all(a.chunks is not None for a in fit.posterior.values())
    assert len(fit.posterior.slope.chunksizes["lat"]) > 1
    xr.testing.assert_allclose(fit.posterior.compute(), expected.posterior, rtol=1e-6)
    xr.testing.assert_identical(fit.sample_stats.status, expected.sample_stats.status)
    found, wanted = (ds.aimz.predict(f, draws=5).y for f in (fit, expected))
    xr.testing.assert_allclose(found.compute(), wanted.compute(), rtol=1e-5, atol=1e-5)
    xr.testing.assert_allclose(fit.diagnostics(), expected.diagnostics(), rtol=1e-6)


def test_the_store_is_a_posterior_of_arviz_by_itself(ds, expected, tmp_path):
    stored(ds, tmp_path / "fit.zarr")
    with xr.open_datatree(tmp_path / "fit.zarr", engine="zarr", consolidated=False) as tree:
        assert "xr_aimz_incomplete" not in tree.attrs
        xr.testing.assert_allclose(
            tree["posterior"].slope.compute(), expected.posterior.slope, rtol=1e-6
        )
        assert tree["posterior"]["deep.weights"].dims[:4] == ("chain", "draw", "lat", "lon")


@pytest.mark.slow
def test_finished_blocks_are_not_fitted_twice(ds, expected, tmp_path, monkeypatch):
    store = tmp_path / "fit.zarr"
    cut = Counter(monkeypatch, limit=150)
    with pytest.raises(KeyboardInterrupt):
        stored(ds, store)
    monkeypatch.undo()
    assert "xr_aimz_incomplete" in xr.open_zarr(store, consolidated=False).attrs
    rest = Counter(monkeypatch)
    fit = stored(ds, store)
    assert cut.cells + rest.cells == 299
    assert 0 < rest.cells < 299
    xr.testing.assert_allclose(fit.posterior.compute(), expected.posterior, rtol=1e-6)
    again = Counter(monkeypatch)
    stored(ds, store)
    assert again.cells == 0


@pytest.mark.slow
def test_a_run_killed_in_another_process_is_finished_here(ds, expected, tmp_path):
    store = tmp_path / "fit.zarr"
    killed = (
        "import os, sys; sys.path.insert(0, {tests!r})\n"
        "import test_per_cell_store as t\n"
        "from xr_aimz.inference.per_cell_store import ZarrCells as Stored\n"
        "put, done = Stored.put, []\n"
        "def dying(self, place, data, arrays):\n"
        "    done.append(place)\n"
        "    if len(done) == 2:\n"
        "        self._record.__class__.__setitem__ = lambda *a: os._exit(9)\n"
        "    put(self, place, data, arrays)\n"
        "Stored.put = dying\n"
        "t.stored(t.dataset(), {store!r})\n"
    ).format(tests=str(__file__).rpartition("/")[0], store=str(store))
    gone = subprocess.run([sys.executable, "-c", killed], check=False, capture_output=True)
    assert gone.returncode == 9, gone.stderr.decode()
    fit = stored(ds, store)
    xr.testing.assert_allclose(fit.posterior.compute(), expected.posterior, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        (lambda ds: ds, {"draws": 31}, "model, method and options"),
        (lambda ds: ds, {"seed": 1}, "'seed'"),
        (lambda ds: ds.assign_coords(lon=ds.lon + 1), {}, "'labels'"),
        (lambda ds: ds.assign(y=ds.y + 1), {}, "fit of other data"),
    ],
)
def test_the_store_of_another_fit_is_refused(ds, tmp_path, change, options, match):
    store = tmp_path / "fit.zarr"
    stored(ds, store)
    with pytest.raises(StoreError, match=match):
        stored(change(ds), store, **options)


@pytest.mark.slow
def test_load_fit_says_what_the_store_is_and_how_to_come_to_a_fit(ds, expected, tmp_path):
    store, saved = tmp_path / "cells.zarr", tmp_path / "saved.zarr"
    fit = stored(ds, store)
    with pytest.raises(StoreKindError, match="what a fit per cell has as its store=") as caught:
        xr_aimz.load_fit(store, line)
    assert "the spec was changed" not in str(caught.value)
    # The remedies that it names.
    with xr.open_datatree(store, engine="zarr", consolidated=False) as tree:
        assert tree["posterior"].sizes["lon"] == 100
    stored(ds, store).save(saved)
    loaded = xr_aimz.load_fit(saved, line)
    assert loaded.token == fit.token
    # A saved fit whose spec was changed is another thing.
    root = json.loads((saved / "zarr.json").read_text())
    root["attributes"]["xr_aimz_fit"]["method"] = "other"
    (saved / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DamagedStoreError, match="the spec was changed") as caught:
        xr_aimz.load_fit(saved, line)
    assert not isinstance(caught.value, StoreKindError)


def test_what_is_no_fit_is_refused(ds, tmp_path):
    with pytest.raises(StoreError, match="is not a fit of cells"):
        stored(ds, tmp_path)
    ds.drop_vars("lat").to_zarr(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="is not a fit of cells"):
        stored(ds, tmp_path / "other.zarr")
