"""A fit that is saved and loaded, in another process, is the same fit."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import saved_models
import xarray as xr

import xr_aimz
from xr_aimz.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")

LOADED = """
import sys
sys.path.insert(0, {tests!r})
import xarray as xr, xr_aimz
fit = xr_aimz.load_fit({store!r}, trust_import=True)
ds = xr.open_dataset({data!r})
ds.aimz.predict(fit, seed=1).compute().to_netcdf({out!r}, engine="netcdf4")
"""


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 40)
    cells = {"time": np.arange(40), "lat": np.arange(4.0)}
    x2 = rng.normal(size=(40, 4))
    variables = {"x": ("time", x), "y": ("time", 2 * x + rng.normal(size=40), {"units": "mm"})}
    each = {"x": (("time", "lat"), x2), "y": (("time", "lat"), x2 + rng.normal(size=(40, 4)))}
    return xr.Dataset(variables, {"time": cells["time"]}), xr.Dataset(each, cells)


@pytest.fixture(scope="module")
def fits(ds, tmp_path_factory):
    whole, cells = ds
    quiet = {"progress": False}
    store = tmp_path_factory.mktemp("cells") / "draws.zarr"
    few = {"draws": 50, "warmup": 50, "chains": 2}
    batch = {"method": "svi", "batch": {"time": 10}, "steps": 200}
    return {
        "nuts": (whole, whole.aimz.fit(saved_models.line, **few, **quiet)),
        "svi": (whole, whole.aimz.fit(saved_models.line, method="svi", steps=200, **quiet)),
        "minibatch": (whole, whole.aimz.fit(saved_models.line, **batch, **quiet)),
        "network": (whole, whole.aimz.fit(saved_models.network, method="svi", steps=99, **quiet)),
        "cells": (cells, cells.aimz.fit(saved_models.line, per="lat", method="laplace", **quiet)),
        "lazy cells": (
            cells,
            cells.chunk(lat=2).aimz.fit(
                saved_models.line, per="lat", method="laplace", store=store, **quiet
            ),
        ),
    }


KINDS = ("nuts", "svi", "minibatch", "network", "cells", "lazy cells")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_predicts_the_same(kind, fits, tmp_path):
    ds, fit = fits[kind]
    fit.save(tmp_path / "fit.zarr")
    ds.to_netcdf(tmp_path / "ds.nc", engine="netcdf4")
    places = {"store": "fit.zarr", "data": "ds.nc", "out": "pred.nc"}
    code = LOADED.format(
        tests=str(Path(__file__).parent), **{n: str(tmp_path / p) for n, p in places.items()}
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine = ds.aimz.predict(fit, seed=1).compute()
    with xr.open_dataset(tmp_path / "pred.nc") as theirs:
        np.testing.assert_array_equal(theirs.y.values, mine.y.values)
        assert theirs.y.dtype == mine.y.dtype
        assert theirs.attrs["aimz_fit"] == fit.token


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_fit_comes_back(kind, fits, tmp_path):
    _, fit = fits[kind]
    fit.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", fit.model)
    assert back.token == fit.token
    for group in ("posterior", "sample_stats", "observed_data", "constant_data"):
        xr.testing.assert_identical(getattr(back, group), getattr(fit, group))
    assert (back.losses is None) == (fit.losses is None)
    if fit.losses is not None:
        xr.testing.assert_identical(back.losses, fit.losses)
    assert back.sites == fit.sites
    assert back.binding == fit.binding
    for name in ("attrs", "options", "versions", "lineage", "concerns", "method"):
        assert getattr(back, name) == getattr(fit, name), name
    assert set(back.state) == set(fit.state)
    for name, array in fit.state.items():
        np.testing.assert_array_equal(back.state[name], array)


def test_what_is_lazy_is_lazy_again(fits, tmp_path):
    _, fit = fits["lazy cells"]
    fit.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", fit.model)
    assert back.posterior.slope.chunks == fit.posterior.slope.chunks


def test_names_of_what_was_stacked_are_strings_there_and_back(tmp_path):
    rng = np.random.default_rng(0)
    values = {n: ("t", rng.normal(size=8)) for n in ("rain", "y", "z")}
    ds = xr.Dataset(values, {"t": list("abcdefgh"), "group": ["north", "south"]})

    def model(X, y=None):
        dims = {"event_dims": ["feature"]}
        slope = numpyro.sample("slope", dist.Normal(jnp.zeros(2), 1).to_event(1), infer=dims)
        with numpyro.plate("group", 2):
            numpyro.sample("shift", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(X @ slope, 1), obs=y)

    draws = {"slope": rng.normal(size=(1, 3, 2)), "shift": rng.normal(size=(1, 3, 2))}
    fit = ds.aimz.from_posterior(model, draws, {"X": ["rain", "z"]}, dim="t")
    fit.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", model)
    stored = fit.posterior.chunk(draw=1).aimz.to_zarr(tmp_path / "draws.zarr")
    for posterior in (fit.posterior, back.posterior, stored):
        assert posterior.feature.dtype == np.dtype("<U4")
        assert posterior.group.dtype == np.dtype("<U5")
        assert posterior.feature.values.tolist() == ["rain", "z"]
    assert back.observed_data.t.dtype == ds.t.dtype


def test_other_readers_of_zarr_open_the_groups(fits, tmp_path):
    _, fit = fits["nuts"]
    fit.save(tmp_path / "fit.zarr")
    with xr.open_datatree(tmp_path / "fit.zarr", engine="zarr", consolidated=False) as tree:
        xr.testing.assert_identical(tree["posterior"].to_dataset(), fit.posterior)
        xr.testing.assert_identical(tree["observed_data"].to_dataset(), fit.observed_data)


def test_without_a_model_the_error_says_both_ways(fits, tmp_path):
    _, fit = fits["svi"]
    fit.save(tmp_path / "fit.zarr")
    with pytest.raises(ModelError, match=r"'saved_models:line'.*model=.*trust_import=True"):
        xr_aimz.load_fit(tmp_path / "fit.zarr")


def test_another_model_is_an_error_with_both_digests(fits, tmp_path):
    _, fit = fits["svi"]
    fit.save(tmp_path / "fit.zarr")

    def other(x, y=None):
        return saved_models.line(x, y)

    with pytest.raises(ModelError, match=r"sha256 is '[0-9a-f]{64}'.*had '[0-9a-f]{64}'"):
        xr_aimz.load_fit(tmp_path / "fit.zarr", other)
