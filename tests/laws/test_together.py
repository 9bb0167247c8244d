"""Features that meet: each pair against a closed form, or against each on its own."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.errors import MissingValueError

TIME, LAT, LON = 40, 4, 3


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    with numpyro.plate("time", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def closed_form(x, y, noise=0.5, prior=10.0):
    """Mean and sd of the slope, over time, missing values left out."""
    whole = x.notnull() & y.notnull()
    x, y = x.where(whole, 0), y.where(whole, 0)
    precision = (x**2).sum("time") / noise**2 + 1 / prior**2
    return (x * y).sum("time") / noise**2 / precision, precision**-0.5


@pytest.fixture(scope="module")
def grid():
    rng = np.random.default_rng(3)
    slope = np.linspace(-1, 2, LAT * LON).reshape(LAT, LON)
    x = rng.normal(size=(TIME, LAT, LON))
    y = slope * x + 0.5 * rng.normal(size=x.shape)
    y[rng.random(y.shape) < 0.1] = np.nan
    y[:, 0, 0] = np.nan
    x[5, 1, 1] = np.nan
    dims = ("time", "lat", "lon")
    return xr.Dataset(
        {"x": (dims, x), "y": (dims, y, {"units": "K"})},
        {"time": np.arange(TIME), "lat": [10.0, 20.0, 30.0, 40.0], "lon": ["a", "b", "c"]},
    )


@pytest.fixture(scope="module")
def cells(grid):
    return grid.aimz.fit(line, per=("lat", "lon"), method="laplace", draws=500, progress=False)


def test_cells_leave_missing_values_out(grid, cells):
    mean, sd = closed_form(grid.x, grid.y)
    land = np.zeros((LAT, LON), bool)
    land[0, 0] = True
    np.testing.assert_array_equal(cells.posterior.slope.isnull().all(("chain", "draw")), land)
    found, spread = (getattr(cells.posterior.slope, f)(("chain", "draw")) for f in ("mean", "std"))
    assert float((abs(found - mean) / sd).max()) < 0.2
    assert float(abs(spread / sd - 1).max()) < 0.15
    assert cells.sample_stats.status.values[0, 0] != 0
    assert (cells.sample_stats.status.values[~land] == 0).all()


def test_a_cell_with_gaps_is_the_same_in_any_region(grid, cells):
    part = grid.isel(lat=[1], lon=[1, 2])
    alone = part.aimz.fit(line, per=("lat", "lon"), method="laplace", draws=500, progress=False)
    np.testing.assert_allclose(
        alone.posterior.slope, cells.posterior.slope.isel(lat=[1], lon=[1, 2]), rtol=1e-5
    )


def test_an_effect_in_cells(grid, cells):
    inputs = grid[["x"]].fillna(0).chunk(lat=2)
    effect = inputs.aimz.intervene(cells, {"x": lambda x: x + 2})
    assert effect.y.dims == ("chain", "draw", "time", "lat", "lon")
    expected = (2 * cells.posterior.slope).broadcast_like(effect.y.isel(time=0))
    np.testing.assert_allclose(effect.y.isel(time=7), expected, atol=2e-5)
    own = inputs.aimz.intervene(cells, {"x": inputs.x})
    assert (own.y.fillna(0) == 0).all()


def test_levels_in_cells_come_before_them(grid, cells):
    levels = xr.DataArray([0.0, 1.0], {"level": [10, 20]}, "level")
    pred = grid[["x"]].fillna(0).aimz.predict(cells, do={"x": levels})
    assert pred.y.dims == ("chain", "draw", "level", "time", "lat", "lon")
    change = pred.y.sel(level=20) - pred.y.sel(level=10)
    expected = cells.posterior.slope.broadcast_like(change.isel(time=0))
    np.testing.assert_allclose(change.isel(time=3), expected, atol=2e-5)


def test_a_summary_in_cells_is_that_of_their_draws(grid, cells):
    inputs = grid[["x"]].fillna(0).chunk(lat=2)
    whole = inputs.aimz.predict(cells).y.compute()
    found = inputs.aimz.predict(cells, summary=("mean", "std", 0.1)).compute()
    assert found.y_mean.dims == ("time", "lat", "lon")
    over = ("chain", "draw")
    np.testing.assert_allclose(found.y_mean, whole.mean(over), atol=1e-5)
    np.testing.assert_allclose(found.y_std, whole.std(over), atol=1e-5)
    expected = whole.quantile(0.1, over, skipna=False)
    np.testing.assert_allclose(found.y_quantile[0], expected, atol=1e-5)
    assert found.y_mean.isnull().all("time").sum() == 1


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(4)
    x = rng.normal(size=4000)
    y = 1.5 * x + 0.5 * rng.normal(size=4000)
    y[rng.random(4000) < 0.2] = np.nan
    return xr.Dataset({"x": ("time", x), "y": ("time", y)}, {"time": np.arange(4000)})


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, {"time": 500}], ids=["memory", "chunks"])
def test_batches_leave_missing_values_out(table, chunks):
    ds = table if chunks is None else table.chunk(chunks)
    mean, sd = closed_form(table.x, table.y)
    fit = ds.aimz.fit(line, method="svi", batch=200, steps=20_000, draws=2000, progress=False)
    found = fit.posterior.slope
    assert abs(float(found.mean() - mean)) < 0.3 * float(sd)
    assert abs(float(found.std() / sd) - 1) < 0.2


@pytest.fixture(scope="module")
def fitted(table):
    return table.aimz.fit(line, method="laplace", draws=400, progress=False)


def test_a_summary_of_an_effect_is_that_of_its_draws(table, fitted):
    inputs = table[["x"]].isel(time=slice(60)).chunk(time=25)
    do = {"warm": {"x": lambda x: x + 1}, "warmer": {"x": lambda x: x + 2}}
    whole = inputs.aimz.intervene(fitted, do)
    found = inputs.aimz.intervene(fitted, do, summary=("mean", 0.05, 0.95))
    assert found.y_mean.dims == ("scenario", "time")
    assert found.y_quantile.dims == ("quantile", "scenario", "time")
    assert found.scenario.values.tolist() == ["warm", "warmer"]
    over = ("chain", "draw")
    np.testing.assert_allclose(found.y_mean, whole.y.mean(over), atol=1e-5)
    expected = whole.y.quantile([0.05, 0.95], over)
    np.testing.assert_allclose(found.y_quantile, expected, atol=1e-5)


def test_a_history_and_an_intervention(table, fitted):
    inputs = table.isel(time=slice(40)).assign(x=table.x.isel(time=slice(40)))
    past = inputs.y.where(inputs.time < 20).fillna(0.0).where(inputs.time < 20)
    pred = inputs.aimz.predict(fitted, do={"x": 1.0}, condition={"y": past})
    plain = inputs.aimz.predict(fitted, do={"x": 1.0})
    history = past[:20].broadcast_like(pred.y[..., :20]).transpose(*pred.y.dims)
    np.testing.assert_allclose(pred.y[..., :20], history, rtol=1e-6)
    # Two programs: the same bits of noise, and values to the last few ulp.
    np.testing.assert_allclose(pred.y[..., 20:], plain.y[..., 20:], rtol=2e-6, atol=2e-6)


def test_the_prior_under_an_intervention(table):
    inputs = table[["x"]].isel(time=slice(10))
    prior = inputs.aimz.prior_predictive(
        line, sites=["slope", "y"], do={"x": 3.0}, draws=300, dim="time"
    )
    noise = prior.y - 3 * prior.slope
    assert abs(float(noise.mean())) < 5 * 0.5 / 3000**0.5
    assert abs(float(noise.std()) / 0.5 - 1) < 0.1


def test_a_prediction_with_all_of_it_is_written_and_resumed(grid, cells, tmp_path):
    pred = grid[["x"]].fillna(0).chunk(lat=1).aimz.predict(cells, summary=("mean", 0.5))
    first = pred.aimz.to_zarr(tmp_path / "out.zarr", progress=False)
    again = grid[["x"]].fillna(0).chunk(lat=1).aimz.predict(cells, summary=("mean", 0.5))
    second = again.aimz.to_zarr(tmp_path / "out.zarr", progress=False)
    xr.testing.assert_identical(first.load(), second.load())
    xr.testing.assert_allclose(xr_aimz.open_zarr(tmp_path / "out.zarr").y_mean, pred.y_mean)


def cell_fit(ds, model=line):
    return ds.aimz.fit(model, per="lat", method="laplace", draws=200, progress=False)


@pytest.fixture
def columns():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, 20))
    dims = ("lat", "time")
    y = 2 * x + 0.5 * rng.normal(size=x.shape)
    return xr.Dataset({"x": (dims, x), "y": (dims, y)}, {"lat": [0.0, 1.0, 2.0]})


@pytest.mark.slow
def test_a_cell_whose_values_never_meet_has_no_data(columns):
    apart = columns.copy(deep=True)
    apart.x[1, :10] = np.nan
    apart.y[1, 10:] = np.nan
    assert cell_fit(apart).sample_stats.status.values.tolist() == [0, 1, 0]
    apart.x[0, 0] = np.nan
    assert cell_fit(apart).sample_stats.status.values.tolist() == [0, 1, 0]


@pytest.mark.slow
def test_land_does_not_speak_for_the_sea(columns):
    land = columns.copy(deep=True)
    land.y[0] = np.nan
    land.x[0, 0] = np.nan
    assert cell_fit(land).sample_stats.status.values.tolist() == [1, 0, 0]
    shared = land.assign(x=columns.x.isel(lat=1, drop=True).where(columns.time != 3))
    assert cell_fit(shared).sample_stats.status.values.tolist() == [1, 0, 0]


def test_the_gaps_of_every_variable_are_looked_at(columns):
    def centred(x, z, y=None):
        a = numpyro.sample("a", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(a + 0 * x + (z - z.mean()), 1), obs=y)

    gappy = columns.assign(z=columns.x + 1).copy(deep=True)
    gappy.z[1, :10] = np.nan
    gappy.x[0, 0] = np.nan
    with pytest.raises(MissingValueError, match="'z'"):
        cell_fit(gappy, centred)


@pytest.mark.slow
def test_gaps_that_no_label_has_many_of_are_masked_in_batches():
    rng = np.random.default_rng(6)
    x = rng.normal(size=(100, 40))
    y = 1.5 * x + 0.5 * rng.normal(size=x.shape)
    place = np.arange(100)
    y[place, (place * 7) % 40] = np.nan
    ds = xr.Dataset({"x": (("time", "lat"), x), "y": (("time", "lat"), y)})

    def flat(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    fit = ds.aimz.fit(flat, method="svi", batch={"time": 20}, steps=6000, progress=False)
    whole = ds.stack(cell=("time", "lat")).rename(time="t", lat="l").rename(cell="time")
    mean, sd = closed_form(whole.x, whole.y)
    assert abs(float(fit.posterior.slope.mean() - mean)) < 0.5 * float(sd)


@pytest.mark.slow
def test_do_on_a_site_of_a_cell(columns):
    def shifted(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 10))
        with xr_aimz.plate("time"):
            u = numpyro.sample("u", dist.Normal(0, 0.1))
            numpyro.sample("y", dist.Normal(slope * x + u, 0.5), obs=y)

    fit = cell_fit(columns, shifted)
    set_to = xr.DataArray(np.arange(20.0), dims="time")
    effect = columns[["x"]].aimz.intervene(fit, {"u": set_to}, baseline={"u": 0.0})
    expected = set_to.broadcast_like(effect.y).transpose(*effect.y.dims)
    np.testing.assert_allclose(effect.y, expected, atol=1e-5)
