"""Sea surface temperature with its land: the real data that missing values are about."""

from __future__ import annotations

from pathlib import Path

import iris_sample_data
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz

# Harmonics of the year, and a trend: centred, so that they are nearly uncorrelated.
TERMS = ["cos1", "sin1", "cos2", "sin2", "trend"]


def in_a_cell(X, surface_temperature=None):
    """The months of one cell."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    weight = numpyro.sample(
        "weight", dist.Normal(0, 2).expand([5]).to_event(1), infer={"event_dims": ["feature"]}
    )
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with xr_aimz.plate("time"):
        fn = dist.Normal(300 + mean + X @ weight, noise)
        numpyro.sample("sst", fn, obs=surface_temperature)


def everywhere(X, surface_temperature=None):
    """The same in every cell, in one model: coefficients of its own for each."""
    with xr_aimz.plate("latitude"), xr_aimz.plate("longitude"):
        mean = numpyro.sample("mean", dist.Normal(0, 5))
        weight = numpyro.sample(
            "weight", dist.Normal(0, 2).expand([5]).to_event(1), infer={"event_dims": ["feature"]}
        )
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with xr_aimz.plate("time"), xr_aimz.plate("latitude"), xr_aimz.plate("longitude"):
        fn = dist.Normal(300 + mean + (X * weight).sum(-1), noise)
        numpyro.sample("sst", fn, obs=surface_temperature)


@pytest.fixture(scope="module")
def sst():
    path = Path(iris_sample_data.path) / "ostia_monthly.nc"
    ds = xr.open_dataset(path)[["surface_temperature"]].reset_coords(drop=True).load()
    years = (ds.time - ds.time[0]) / np.timedelta64(1, "D") / 365.25
    waves = {
        f"{name}{n}": getattr(np, name)(2 * np.pi * n * years)
        for n in (1, 2)
        for name in ("cos", "sin")
    }
    return ds.assign(**waves, trend=years - years.mean())


def with_a_tenth_deleted(ds):
    """The data less a tenth of the values at sea, chosen by chance; and which those are."""
    chance = np.random.default_rng(0).uniform(size=ds.surface_temperature.shape)
    deleted = ds.surface_temperature.notnull() & (chance < 0.1)
    return ds.assign(surface_temperature=ds.surface_temperature.where(~deleted)), deleted


def coverage(ds, pred, deleted, rate):
    """The share of deleted values that lie in the central interval of their draws."""
    low, high = ((1 - rate) / 2, (1 + rate) / 2)
    bounds = pred.surface_temperature.quantile([low, high], ("chain", "draw"), skipna=False)
    truth = ds.surface_temperature
    within = (truth >= bounds[0]) & (truth <= bounds[1])
    return float(within.where(deleted).mean())


def assert_nominal(ds, pred, deleted):
    # Of 287 values or more: two standard errors of as many independent ones are 0.035 and
    # 0.06, and neighbouring cells share their weather.
    assert coverage(ds, pred, deleted, 0.9) == pytest.approx(0.9, abs=0.04)
    assert coverage(ds, pred, deleted, 0.5) == pytest.approx(0.5, abs=0.08)


@pytest.mark.slow
def test_deleted_values_are_predicted_at_the_nominal_rate(sst):
    # The Gulf of Guinea and its coast; every second cell.
    region = sst.isel(latitude=slice(None, None, 2), longitude=slice(0, 24, 2))
    assert 0.1 < float(region.surface_temperature.isnull().mean()) < 0.6
    ds, deleted = with_a_tenth_deleted(region)
    fit = ds.aimz.fit(
        everywhere, {"X": TERMS}, method="svi", steps=3000, draws=300, progress=False
    )
    pred = ds.aimz.predict(fit).compute()
    assert_nominal(region, pred, deleted)
    # What the model sees of land is nothing: its cells have their prior.
    land = region.surface_temperature.isnull().all("time")
    mean = fit.posterior["mean"]
    assert float(mean.std("draw").where(land).mean()) == pytest.approx(5, rel=0.1)
    assert float(mean.std("draw").where(~land).max()) < 0.5


@pytest.mark.slow
def test_a_fit_in_every_cell_leaves_land_out(sst):
    ds, deleted = with_a_tenth_deleted(sst)
    fit = ds.aimz.fit(
        in_a_cell,
        {"X": TERMS},
        per=("latitude", "longitude"),
        method="laplace",
        draws=200,
        progress=False,
    )
    land = sst.surface_temperature.isnull().all("time")
    xr.testing.assert_equal(
        fit.posterior["mean"].isnull().all(("chain", "draw")).reset_coords(drop=True),
        land.reset_coords(drop=True),
    )
    part = slice(None, None, 4)
    some = {"longitude": part}
    pred = ds.isel(some).aimz.predict(fit).compute()
    assert_nominal(sst.isel(some), pred, deleted.isel(some))
    gone = pred.surface_temperature.isnull().any(("chain", "draw", "time"))
    np.testing.assert_array_equal(gone, land.isel(some))
