"""Missing inputs of outcomes that are counts: refused where they count, and only there."""

import dask
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from test_laws import refuse

from xr_aimz.errors import MissingValueError

DIMS = ("time", "lat")
MATCH = r"variable 'x' \(argument 'x'\) has missing values.*site 'n' is drawn as int32"


def counted(x, z, n=None, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("n", dist.Bernoulli(logits=slope * x), obs=n)
    numpyro.sample("y", dist.Normal(slope * z, 1), obs=y)


@pytest.fixture(scope="module")
def ds():
    x, z, y = np.random.default_rng(0).normal(size=(3, 6, 4))
    values = {"x": x, "z": z, "y": y, "n": (y > 0).astype(int)}
    return xr.Dataset(
        {name: (DIMS, a) for name, a in values.items()},
        {"time": range(6), "lat": [10.0, 20, 30, 40]},
    )


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.from_posterior(counted, {"slope": np.ones((1, 3))})


@pytest.fixture(scope="module")
def gappy(ds):
    return ds.assign(x=ds.x.where((ds.time != 2) | (ds.lat != 30)))


HERE = {"time": 2, "lat": 30}


def refused(build, *, lazy):
    """At once for arrays in memory; for lazy ones in a task, and only when it is run."""
    with dask.config.set(scheduler=refuse):
        if not lazy:
            with pytest.raises(MissingValueError, match=MATCH):
                build()
            return
        made = build()
    with pytest.raises(MissingValueError, match=MATCH):
        made.compute(scheduler="synchronous")


LAYOUTS = pytest.mark.parametrize("chunks", [None, {"time": 3, "lat": 2}])


def chunked(ds, chunks):
    return ds if chunks is None else ds.chunk(chunks)


@LAYOUTS
def test_a_missing_input_of_counts_is_refused(gappy, fit, chunks):
    there = chunked(gappy, chunks)
    refused(lambda: there.aimz.predict(fit), lazy=chunks is not None)
    refused(lambda: there.aimz.predict(fit, summary="mean"), lazy=chunks is not None)


@LAYOUTS
def test_what_is_made_from_other_inputs_is_as_it_was(ds, gappy, fit, chunks):
    found = chunked(gappy, chunks).aimz.predict(fit, sites="y")
    xr.testing.assert_allclose(found.compute(), ds.aimz.predict(fit, sites="y").compute())
    holed = chunked(ds.assign(z=gappy.x), chunks).aimz.predict(fit)
    assert np.issubdtype(holed.n.dtype, np.integer)
    assert int(holed.y.isnull().sum()) == 3


@LAYOUTS
@pytest.mark.parametrize("kind", ["scalar", "array", "lazy", "part", "lazy part"])
def test_an_input_that_is_set_may_be_missing(ds, gappy, fit, chunks, kind):
    value = xr.full_like(ds.x, 0.5)
    if "part" in kind:
        value = value.where(ds.time == 2)
    value = 0.5 if kind == "scalar" else value.chunk(lat=3) if "lazy" in kind else value
    found = chunked(gappy, chunks).aimz.predict(fit, do={"x": value}).n
    assert np.issubdtype(found.dtype, np.integer)
    expected = ds.aimz.predict(fit, do={"x": value}).n
    np.testing.assert_array_equal(found, expected)


@LAYOUTS
def test_an_input_that_is_left_alone_where_it_is_missing_is_refused(ds, gappy, fit, chunks):
    there, lazy = chunked(gappy, chunks), chunks is not None
    elsewhere = xr.full_like(ds.x, 0.5).where(ds.time != 2)
    refused(lambda: there.aimz.predict(fit, do={"x": elsewhere}), lazy=lazy)
    refused(lambda: there.aimz.predict(fit, do={"x": lambda x: x + 1}), lazy=lazy)
    refused(lambda: there.aimz.predict(fit, do={"x": elsewhere.chunk(lat=3)}), lazy=True)
    # One level of several, and one scenario of two, in which the hole is open.
    levels = xr.DataArray([1.0, np.nan], {"level": [1, 2]}, "level") + xr.zeros_like(ds.x)
    refused(lambda: there.aimz.predict(fit, do={"x": levels}), lazy=lazy)
    two = {"all": {"x": 0.5}, "other": {"z": 0.5}}
    refused(lambda: there.aimz.predict(fit, do=two), lazy=lazy)


@LAYOUTS
@pytest.mark.parametrize("contrast", ["difference", "percent"])
def test_a_baseline_with_a_hole_is_refused_whatever_the_contrast(gappy, fit, chunks, contrast):
    """A percentage of counts is a float, and drawn from a hole all the same."""
    there, do = chunked(gappy, chunks), {"x": 0.5}
    options = {"contrast": contrast, "sites": "n"}
    refused(lambda: there.aimz.intervene(fit, do, **options), lazy=chunks is not None)
    whole = there.aimz.intervene(fit, do, baseline={"x": 0.5}, **options).n.fillna(0)
    assert (whole == 0).all()


# A fit in every cell.


def rated(x, n=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("n", dist.Bernoulli(logits=slope * x), obs=n)


def at_land(ds):
    """Neither counts nor inputs at two latitudes."""
    sea = ds.lat.isin([10, 40])
    return ds[["x", "n"]].where(sea)


@pytest.fixture(scope="module")
def cells(ds):
    return at_land(ds).aimz.fit(rated, per="lat", method="laplace", draws=20, progress=False)


@LAYOUTS
def test_a_cell_without_draws_may_miss_its_inputs(ds, cells, chunks):
    there = chunked(at_land(ds), chunks)
    with dask.config.set(scheduler=refuse):
        pred = there.aimz.predict(cells).n
    assert (pred.dims, pred.dtype) == (("chain", "draw", "time", "lat"), np.float64)
    found = pred.compute()
    assert found.dtype == pred.dtype
    land = found.sel(lat=[20, 30])
    assert land.isnull().all()
    assert found.sel(lat=[10, 40]).notnull().all()
    # With inputs there, the same numbers.
    xr.testing.assert_identical(
        found.drop_attrs(), ds.aimz.predict(cells).n.compute().drop_attrs()
    )
    for some in ([10.0], [30.0], [40.0, 20]):
        part = there.sel(lat=some).aimz.predict(cells).n
        assert part.dtype == pred.dtype
        np.testing.assert_array_equal(part, found.sel(lat=some))
    effect = there.aimz.intervene(cells, {"x": lambda x: x + 1}).n
    assert effect.compute().isnull().any(("chain", "draw", "time")).values.tolist() == [0, 1, 1, 0]


@LAYOUTS
def test_a_cell_with_draws_may_not(ds, cells, chunks):
    there = at_land(ds)
    there = chunked(there.assign(x=there.x.where((ds.time != 2) | (ds.lat != 40))), chunks)
    refused(lambda: there.aimz.predict(cells), lazy=chunks is not None)
    fine = there.aimz.predict(cells, do={"x": 0.5}).n.compute()
    assert fine.isnull().any(("chain", "draw", "time")).values.tolist() == [0, 1, 1, 0]


def test_what_all_cells_share_is_missing_in_those_with_draws(ds):
    shared = at_land(ds).assign(x=ds.x.isel(lat=0, drop=True))
    fit = shared.aimz.fit(rated, per="lat", method="laplace", draws=5, progress=False)
    holed = shared.assign(x=shared.x.where(ds.time != 2))
    refused(lambda: holed.aimz.predict(fit), lazy=False)
    refused(lambda: holed.chunk(time=3).aimz.predict(fit), lazy=True)
    assert holed.sel(lat=[30]).aimz.predict(fit).n.isnull().all()
