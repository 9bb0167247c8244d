"""Missing inputs of outcomes that are counts: refused where they count, and only there."""

import dask
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from lazy_checks import refuse
from numpyro.contrib.control_flow import scan

import xr_aimz
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_all_cells_share_is_missing_in_those_with_draws(ds):
    shared = at_land(ds).assign(x=ds.x.isel(lat=0, drop=True))
    fit = shared.aimz.fit(rated, per="lat", method="laplace", draws=5, progress=False)
    holed = shared.assign(x=shared.x.where(ds.time != 2))
    refused(lambda: holed.aimz.predict(fit), lazy=False)
    refused(lambda: holed.chunk(time=3).aimz.predict(fit), lazy=True)
    assert holed.sel(lat=[30]).aimz.predict(fit).n.isnull().all()


# A site that is drawn between the input and the count.


def chained(x, tas=None, count=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    t = numpyro.sample("tas", dist.Normal(slope * x, 1), obs=tas)
    numpyro.sample("count", dist.Poisson(jnp.exp(0.1 * t)), obs=count)


def through(site, target="count"):
    return rf"'x'.*site '{target}', which is made from it through \['{site}'\], is drawn as int32"


def refused_through(build, *, lazy, match=None):
    match = through("tas") if match is None else match
    with dask.config.set(scheduler=refuse):
        if not lazy:
            with pytest.raises(MissingValueError, match=match):
                build()
            return
        made = build()
    with pytest.raises(MissingValueError, match=match):
        made.compute(scheduler="synchronous")


@pytest.fixture(scope="module")
def chain(ds):
    return ds[["x"]].assign(tas=ds.y, count=ds.n)


@pytest.fixture(scope="module")
def chain_fit(chain):
    return chain.aimz.from_posterior(chained, {"slope": np.ones((1, 3))})


@pytest.fixture(scope="module")
def chain_gappy(chain):
    return chain.assign(x=chain.x.where((chain.time != 2) | (chain.lat != 30)))


@LAYOUTS
@pytest.mark.parametrize(
    "options",
    [{}, {"sites": "count"}, {"summary": "mean"}, {"do": {"slope": 0.5}}, {"condition": {}}],
    ids=["all", "one", "summary", "do", "condition"],
)
def test_a_hole_behind_a_drawn_site_is_refused(chain, chain_gappy, chain_fit, chunks, options):
    if "condition" in options:
        options = {"condition": {"tas": chain.tas.where(chain.time != 2)}}
    there = chunked(chain_gappy, chunks)
    refused_through(lambda: there.aimz.predict(chain_fit, **options), lazy=chunks is not None)


@LAYOUTS
def test_the_site_between_is_blank_where_its_input_is_missing(chain_gappy, chain_fit, chunks):
    found = chunked(chain_gappy, chunks).aimz.predict(chain_fit, sites="tas").tas
    assert found.isnull().any(("chain", "draw")).equals(chain_gappy.x.isnull())


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize("how", ["condition", "do"])
@pytest.mark.parametrize("kind", ["whole", "part", "lazy part"])
def test_given_values_close_the_hole_behind_them(chain, chain_gappy, chain_fit, chunks, how, kind):
    value = chain.tas.where(chain.time == 2) if "part" in kind else chain.tas
    given = {how: {"tas": value.chunk(lat=3) if "lazy" in kind else value}}
    found = chunked(chain_gappy, chunks).aimz.predict(chain_fit, **given).compute()
    expected = chain.aimz.predict(chain_fit, **given).compute()
    xr.testing.assert_identical(found.drop_attrs(), expected.drop_attrs())
    # As it was given, where the input is missing too.
    here = found.tas.sel(HERE)
    np.testing.assert_array_equal(here, np.full(here.shape, chain.tas.sel(HERE), np.float32))


@pytest.mark.slow
@LAYOUTS
def test_a_function_of_the_site_between_leaves_the_hole_open(chain_gappy, chain_fit, chunks):
    there = chunked(chain_gappy, chunks)
    refused_through(
        lambda: there.aimz.predict(chain_fit, do={"tas": lambda t: t + 1}),
        lazy=chunks is not None,
    )


@pytest.mark.slow
@LAYOUTS
def test_each_world_is_looked_at_by_itself(chain, chain_gappy, chain_fit, chunks):
    there, lazy = chunked(chain_gappy, chunks), chunks is not None
    two = {"input": {"x": 0.5}, "between": {"tas": 0.5}}
    found = there.aimz.predict(chain_fit, do=two, sites="count")["count"]
    assert (found >= 0).all()
    refused_through(lambda: there.aimz.intervene(chain_fit, {"tas": 0.5}), lazy=lazy)
    effect = there.aimz.intervene(chain_fit, {"tas": 0.5}, baseline={"x": 0.5})
    assert np.abs(effect["count"]).max() < 100


def test_a_count_that_is_given_itself_may_miss_its_input(ds, gappy, fit):
    given = {"n": ds.n.where(ds.time == 2)}
    found = gappy.aimz.predict(fit, condition=given, sites="n").n
    np.testing.assert_array_equal(found, ds.aimz.predict(fit, condition=given, sites="n").n)
    elsewhere = {"n": ds.n.where(ds.time != 2)}
    refused(lambda: gappy.aimz.predict(fit, condition=elsewhere, sites="n"), lazy=False)


def test_a_count_between_counts_though_it_is_not_asked_for(chain):
    def counts_first(x, count=None, tas=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        n = numpyro.sample("count", dist.Poisson(jnp.exp(slope * x)), obs=count)
        numpyro.sample("tas", dist.Normal(0.1 * n, 1), obs=tas)

    fit = chain.aimz.from_posterior(counts_first, {"slope": np.ones((1, 3))})
    holed = chain.assign(x=chain.x.where(chain.time != 2))
    match = "site 'count' is drawn as int32"
    refused_through(lambda: holed.aimz.predict(fit, sites="tas"), lazy=False, match=match)
    known = holed.aimz.predict(fit, sites="tas", condition="count").tas
    assert known.notnull().all()


@pytest.mark.slow
@LAYOUTS
def test_a_hole_behind_a_drawn_site_of_cells(chain, chunks):
    sea = chain.lat.isin([10, 40])
    made = chain.where(sea).aimz.fit(chained, per="lat", method="laplace", draws=5, progress=False)
    land = chunked(chain.where(sea), chunks).aimz.predict(made)["count"]
    assert land.isnull().any(("chain", "draw", "time")).values.tolist() == [0, 1, 1, 0]
    holed = chain.where(sea & (chain.time != 2))
    there, lazy = chunked(holed, chunks), chunks is not None
    refused_through(lambda: there.aimz.predict(made), lazy=lazy)
    some = chain.tas.where((chain.time == 2) & (chain.lat == 10))
    refused_through(lambda: there.aimz.predict(made, condition={"tas": some}), lazy=lazy)
    past = chain.tas.where(chain.time == 2)
    found = there.aimz.predict(made, condition={"tas": past})["count"].sel(lat=[10, 40])
    assert (found >= 0).all()


def local(x, count=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with xr_aimz.plate("time"):
        z = numpyro.sample("z", dist.Normal(slope * x, 1))
        numpyro.sample("count", dist.Poisson(jnp.exp(0.1 * z)), obs=count)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, {"time": 3}])
def test_a_hole_behind_a_latent_counts_where_that_is_drawn(chunks):
    values = np.arange(6.0) / 3
    ds = xr.Dataset({"x": ("time", values), "count": ("time", np.arange(6))}, {"time": range(6)})
    draws = {"slope": np.ones((1, 3)), "z": np.zeros((1, 3, 6))}
    fit = ds.aimz.from_posterior(local, draws)
    holed, lazy = chunked(ds.assign(x=ds.x.where(ds.time != 2)), chunks), chunks is not None
    # Of the posterior, it is made from nothing.
    assert (holed.aimz.predict(fit)["count"] >= 0).all()
    more = {"lazy": lazy, "match": through("z")}
    refused_through(lambda: holed.aimz.predict(fit, do={"slope": 0.5}), **more)
    part = xr.DataArray([1.0], {"time": [0]}, "time")
    refused_through(lambda: holed.aimz.predict(fit, do={"x": part}), **more)
    assert (holed.aimz.predict(fit, do={"z": 0.5})["count"] >= 0).all()
    # New labels from 4 on: the hole is at one that is known, then at one that is drawn.
    for shift, known in ((2, True), (4, False)):
        new = holed.assign_coords(time=np.arange(6) + shift)
        if known:
            found = new.aimz.predict(fit, new_labels="sample")
            assert (found["count"] >= 0).all()
        else:
            refused_through(lambda new=new: new.aimz.predict(fit, new_labels="sample"), **more)


def state(x, count=None):
    def step(carry, now):
        driver, seen = now
        s = numpyro.sample("s", dist.Normal(0.5 * carry + 0.1 * driver, 1.0))
        numpyro.sample("count", dist.Poisson(jnp.exp(0.1 * s)), obs=seen)
        return s, None

    scan(step, 0.0, (x, count), length=x.shape[0])


@pytest.mark.parametrize("lazy", [False, True])
def test_a_hole_in_the_forecast_of_a_state_is_refused(lazy):
    ds = xr.Dataset(
        {"x": ("time", np.ones(9)), "count": ("time", np.arange(9))}, {"time": range(9)}
    )
    draws = {"s": np.zeros((1, 3, 6))}
    fit = ds.isel(time=slice(6)).aimz.from_posterior(state, draws, core_dim="time")
    whole = ds.drop_vars("count")
    holed = whole.assign(x=whole.x.where(ds.time != 7))
    holed = holed.chunk() if lazy else holed
    assert (holed.isel(time=slice(6)).aimz.predict(fit)["count"] >= 0).all()
    refused_through(
        lambda: holed.aimz.predict(fit, new_labels="sample"), lazy=lazy, match=through("s")
    )
