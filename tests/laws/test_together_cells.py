"""Conditions and new labels in a fit of each cell: laws, closed forms, and what is refused."""

import dataclasses
import warnings

import dask
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import strategies
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_checks import refuse
from numpyro.contrib.control_flow import scan
from strategies import assert_same, chunked

import xr_aimz
from xr_aimz.errors import ConvergenceWarning, LabelError, ModelError

PER = ("lat", "lon")
NOISE, TAU, PRIOR = 0.5, 1.5, 10.0
MOST_Z = 5.0
NEW = {"new_labels": "sample", "sites": ["level", "y"]}


def groups(x, y=None):
    """Known scales: in each cell the posterior of ``mu`` is a Gaussian in closed form."""
    mu = numpyro.sample("mu", dist.Normal(0, PRIOR))
    with xr_aimz.plate("group"):
        level = numpyro.sample("level", dist.Normal(mu, TAU))
    with xr_aimz.plate("group"), xr_aimz.plate("rep"):
        numpyro.sample("y", dist.Normal(level + x, NOISE), obs=y)


def walk(t, y=None):
    phi = numpyro.sample("phi", dist.Normal(0, 1))

    def step(before, now):
        value = numpyro.sample("y", dist.Normal(phi * before, 1.0), obs=now)
        return value, None

    scan(step, 0.0, y, length=t.shape[0])


def states(t, y=None):
    def step(before, now):
        state = numpyro.sample("state", dist.Normal(0.9 * before, 0.5))
        numpyro.sample("y", dist.Normal(state, 0.3), obs=now)
        return state, None

    scan(step, 0.0, y, length=t.shape[0])


def two(x, first=None, second=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    cause = numpyro.sample("first", dist.Normal(b + x, 1e-3), obs=first)
    numpyro.sample("second", dist.Normal(cause + 100, 1e-3), obs=second)


def quiet(ds, model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        options = {"per": PER, "method": "laplace", "progress": False, **options}
        return ds.aimz.fit(model, **options)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    cells = rng.normal(0, 3, (3, 2))
    y = cells + rng.normal(0, TAU, (6, 1, 3, 2)) + rng.normal(0, NOISE, (6, 4, 3, 2))
    return xr.Dataset(
        {"x": (("group", "rep"), np.zeros((6, 4))), "y": (("group", "rep", *PER), y)},
        {"group": list("abcdef"), "rep": range(4), "lat": [50.0, 40, 30], "lon": [7, 9]},
    )


@pytest.fixture(scope="module")
def fitted(ds):
    """Groups b and e are new to it, and one cell has no data."""
    there = ds.assign(y=ds.y.where((ds.lat != 40) | (ds.lon != 9)))
    return quiet(there.isel(group=[0, 2, 3, 5]), groups, draws=400)


def alone(fit, **cell):
    """What the fit of one cell alone would be, by law 10."""
    at = {d: [v] for d, v in cell.items()}
    stats = fit.sample_stats.sel(at)
    return dataclasses.replace(fit, posterior=fit.posterior.sel(at), sample_stats=stats)


@pytest.mark.slow
def test_a_new_group_has_its_closed_form_in_each_cell(ds):
    """y of a new group is Normal(mean, sd) of mu, tau and the noise together."""
    seen = ds.isel(group=[0, 2, 3, 5])
    fit = quiet(seen, groups, draws=4000)
    pred = ds.isel(group=[1]).aimz.predict(fit, **NEW).compute()
    means, count = seen.y.mean("rep"), seen.sizes["group"]
    spread = TAU**2 + NOISE**2 / seen.sizes["rep"]
    variance = 1 / (1 / PRIOR**2 + count / spread)
    mean = variance * means.sum("group") / spread
    for name, more in (("level", TAU**2), ("y", TAU**2 + NOISE**2)):
        z = ((pred[name] - mean) / np.sqrt(variance + more)).stack(all=("chain", "draw"))
        assert np.abs(z.mean("all")).max() < MOST_Z / np.sqrt(4000), name
        assert np.abs(z.var("all") - 1).max() < MOST_Z * np.sqrt(2 / 4000), name


def test_new_levels_are_drawn_from_their_own_cells_globals(ds, fitted):
    pred = ds.aimz.predict(fitted, **NEW).compute()
    assert pred.y.dims == ("chain", "draw", "group", "rep", *PER)
    new = pred.level.sel(group=["b", "e"]) - fitted.posterior.mu
    z = (new / TAU).stack(all=("chain", "draw"), cell=("group", *PER)).dropna("cell")
    assert z.sizes["cell"] == 10
    assert np.abs(z.var("all") - 1).max() < MOST_Z * np.sqrt(2 / 400)
    # Each cell, and each group of it, has noise of its own.
    between = np.corrcoef(z.transpose("cell", ...).values) - np.eye(10)
    assert np.abs(between).max() < MOST_Z / np.sqrt(400)
    # What was seen keeps its posterior, and a cell without draws has none.
    old = {"group": list("acdf")}
    xr.testing.assert_equal(
        pred.level.sel(old).transpose(*fitted.posterior.level.dims), fitted.posterior.level
    )
    assert pred.level.sel(lat=40, lon=9).isnull().all()
    assert int(pred.y.isnull().any(("chain", "draw", "group", "rep")).sum()) == 1


@pytest.fixture(scope="module")
def whole(ds):
    """A cell without draws is NaN, and NaN is like no other number: here there is none."""
    return quiet(ds.isel(group=[0, 2, 3, 5]), groups, draws=5)


@st.composite
def parts(draw, ds):
    """Labels to select, in any order, and chunks for what is left."""
    some = {
        d: draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
        for d, n in ds.sizes.items()
    }
    chunks = {d: draw(strategies.cuts(len(some[d]))) for d in some}
    return some, draw(st.sampled_from([None, chunks]))


@pytest.mark.slow
@settings(max_examples=6)
@given(st.data())
def test_new_labels_commute_with_selection_and_chunks(ds, whole, data):
    pred = ds.aimz.predict(whole, **NEW)
    some, chunks = data.draw(parts(ds))
    part = chunked(ds.isel(some), chunks)
    assert_same(part.aimz.predict(whole, **NEW), pred.isel(some))


@pytest.mark.slow
@settings(max_examples=6)
@given(st.data())
def test_conditions_commute_with_selection_and_chunks(ds, whole, data):
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).uniform(size=ds.y.shape) < 0.5
    given_y = ds.y.where(mask).where(~ds.group.isin(["b", "e"]))
    order = {d: np.array(data.draw(st.permutations(range(n)))) for d, n in ds.y.sizes.items()}
    options = {"condition": {"y": given_y.isel(order)}, **NEW}
    pred = ds.aimz.predict(whole, **options)
    free = ds.aimz.predict(whole, **NEW)
    # Given entries as given, the others to the last bit of their noise as without a condition.
    expected = xr.where(given_y.notnull(), given_y, free.y.astype("f8"))
    np.testing.assert_allclose(pred.y, expected.transpose(*pred.y.dims), rtol=2e-6, atol=2e-6)
    xr.testing.assert_equal(pred.level.compute(), free.level.compute())
    some, chunks = data.draw(parts(ds))
    part = chunked(ds.isel(some), chunks)
    assert_same(part.aimz.predict(whole, **options), pred.isel(some))


def test_a_lazy_condition_is_the_condition(ds, whole):
    inputs = ds.isel(group=[0, 3])
    past = ds.y.where((ds.rep < 2) | (ds.lat == 30)).isel(group=[3, 0], lat=[2, 0])
    with dask.config.set(scheduler=refuse):
        lazy = inputs.aimz.predict(whole, condition={"y": past.chunk(lat=1, rep=3)})
    assert_same(lazy, inputs.aimz.predict(whole, condition={"y": past}))


@pytest.mark.slow
@pytest.mark.parametrize("cell", [{"lat": 50.0, "lon": 7}, {"lat": 30.0, "lon": 9}])
def test_a_cell_answers_as_it_would_alone(ds, whole, cell):
    at = {d: [v] for d, v in cell.items()}
    part, one = ds.sel(at), quiet(ds.sel(at).isel(group=[0, 2, 3, 5]), groups, draws=5)
    past = ds.y.isel(group=[0, 2], rep=slice(2))
    options = {**NEW, "condition": {"y": past}}
    expected = ds.aimz.predict(whole, **options).sel(at).compute()
    # The draws of its globals are the same to the last ulp, and so is what comes of them.
    found = part.aimz.predict(one, **options)
    np.testing.assert_allclose(found.y, expected.y, rtol=1e-5, atol=1e-5)
    # Under the very same draws the random bits are the same: not one differs.
    found = part.aimz.predict(alone(whole, **cell), **options).compute()
    xr.testing.assert_equal(found, expected)


def test_a_condition_of_some_cells_leaves_the_others_free(ds, fitted):
    inputs = ds.isel(group=[0, 2]).drop_vars("y")
    free = inputs.aimz.predict(fitted).y.compute()
    here = ds.y.sel(group=["a", "c"], lat=[30.0])
    found = inputs.aimz.predict(fitted, condition={"y": here}).y.compute()
    np.testing.assert_allclose(
        found.sel(lat=[30.0]), here.broadcast_like(found.sel(lat=[30.0])), rtol=1e-6
    )
    # Two programs: the same bits of noise, and values to the last few ulp.
    others = {"lat": [50.0, 40]}
    xr.testing.assert_allclose(found.sel(others), free.sel(others), rtol=2e-6, atol=2e-6)
    # One label of a cell's dim, as a scalar coordinate.
    one = ds.y.sel(group=["a", "c"], lat=30.0)
    xr.testing.assert_equal(inputs.aimz.predict(fitted, condition={"y": one}).y.compute(), found)
    # Without the cells' dims: the same in all of them, but not where there are no draws.
    same = xr.full_like(ds.x, 3.0).isel(group=[0, 2])
    found = inputs.aimz.predict(fitted, condition={"y": same}).y.compute()
    assert (found.where(free.notnull(), 3) == 3).all()
    assert found.isnull().equals(free.isnull())


# Recursions.


@pytest.fixture(scope="module")
def series():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(8, 3, 2))
    dims = ("time", *PER)
    return xr.Dataset(
        {"t": ("time", np.zeros(8)), "y": (dims, y)},
        {"time": range(2000, 2008), "lat": [50.0, 40, 30], "lon": [7, 9]},
    )


@pytest.mark.slow
def test_each_cell_has_a_history_of_its_own_length(series):
    """One step after its last value y, an AR(1) is Normal(phi y, 1)."""
    fit = quiet(series, walk, core_dim="time", draws=4000)
    known = xr.DataArray([[3, 4], [5, 6], [8, 1]], dims=PER)
    past = series.y.where(series.time < 2000 + known)
    pred = series.drop_vars("y").aimz.predict(fit, condition={"y": past}).y.compute()
    np.testing.assert_allclose(pred.where(past.notnull()), past.broadcast_like(pred), rtol=1e-6)
    for lat in range(3):
        for lon in range(2):
            steps, at = int(known[lat, lon]), {"lat": lat, "lon": lon}
            if steps == 8:
                continue
            mean = fit.posterior.phi.isel(at) * past.isel(at)[steps - 1]
            z = pred.isel(at).isel(time=steps) - mean
            assert np.abs(z.mean()) < MOST_Z / np.sqrt(4000)
            assert np.abs(z.var() - 1) < MOST_Z * np.sqrt(2 / 4000)
    holed = past.where((past.time != 2001) | (past.lat != 40))
    with pytest.raises(ModelError, match=r"'y' has a gap along 'time'"):
        series.aimz.predict(fit, condition={"y": holed})


@pytest.mark.slow
def test_states_are_drawn_on_from_the_last_of_their_cell(series):
    fit = quiet(series.isel(time=slice(5)), states, core_dim="time", draws=4000)
    options = {"new_labels": "sample", "sites": ["state", "y"]}
    pred = series.chunk(lat=2).aimz.predict(fit, **options).compute()
    past = pred.state.isel(time=slice(5)).transpose(*fit.posterior.state.dims)
    xr.testing.assert_equal(past, fit.posterior.state)
    z = (pred.state.isel(time=5) - 0.9 * pred.state.isel(time=4)) / 0.5
    assert np.abs(z.mean(("chain", "draw"))).max() < MOST_Z / np.sqrt(4000)
    assert np.abs(z.var(("chain", "draw")) - 1).max() < MOST_Z * np.sqrt(2 / 4000)
    part = series.isel(lon=[1], lat=[2, 0])
    assert_same(part.aimz.predict(fit, **options), pred.isel(lon=[1], lat=[2, 0]))
    with pytest.raises(LabelError, match=r"'state'.*scanned.*2000 to 2004.*in order"):
        series.isel(time=slice(1, 8)).aimz.predict(fit, **options)


@pytest.mark.slow
def test_rows_of_a_table_are_new_in_each_cell():
    def model(x, y=None):
        mean = numpyro.sample("mean", dist.Normal(0, 1))
        with numpyro.plate("row", x.shape[0]):
            level = numpyro.sample("level", dist.Normal(mean + 50, 1e-3))
            numpyro.sample("y", dist.Normal(level + x, 1e-3), obs=y)

    ds = xr.Dataset(
        {"x": (("a", "b"), np.zeros((3, 2))), "y": (("a", "b", "site"), np.zeros((3, 2, 2)))},
        {"a": range(3), "b": range(2), "site": [1, 2]},
    )
    fit = quiet(ds.isel(a=[0]), model, per="site", layout="table", draws=5)
    given_y = ds.y.isel(a=[0], b=[1], site=[1]) + 7
    options = {"new_labels": "sample", "condition": {"y": given_y}, "sites": ["level", "y"]}
    pred = ds.aimz.predict(fit, **options).compute()
    new = pred.level.isel(a=slice(1, 3)) - fit.posterior["mean"]
    np.testing.assert_allclose(new, 50, atol=0.02)
    np.testing.assert_array_equal(pred.y.isel(a=0, b=1, site=1)[0], [7.0] * 5)
    part = ds.isel(a=[2, 0], site=[1]).chunk(a=1)
    assert_same(part.aimz.predict(fit, **options), pred.isel(a=[2, 0], site=[1]))


# What cannot be right.


def test_a_cell_that_was_not_fitted_has_no_globals(ds, fitted):
    moved = ds.assign_coords(lat=[50.0, 40, 99])
    moved = moved.isel(group=[0, 2])
    for options in ({}, {"new_labels": "sample"}, {"condition": "y", "new_labels": "sample"}):
        with pytest.raises(
            LabelError,
            match=r"\[99.0\].*Each label of per=\('lat', 'lon'\) has globals of its own",
        ):
            moved.aimz.predict(fitted, **options)


@pytest.mark.slow
def test_a_value_tells_of_what_is_drawn_in_its_own_cell_only(series, ds, fitted):
    with pytest.raises(ModelError, match="site 'level' is drawn"):
        ds.aimz.predict(fitted, condition={"y": ds.y.isel(lat=[0])}, new_labels="sample")
    x = xr.zeros_like(series.y)
    both = xr.Dataset({"x": x, "first": x, "second": x + 100}, series.coords)
    fit = quiet(both, two, per="lat", draws=5)
    second = both.second.isel(lat=[0])
    with pytest.raises(ModelError, match="give 'first' too"):
        both.aimz.predict(fit, condition={"second": second})
    with pytest.raises(ModelError, match="give 'first' too"):
        both.aimz.predict(fit, condition={"second": second, "first": both.first.isel(lat=[1])})
    known = {"second": second, "first": both.first.isel(lat=[0, 2]) + 7}
    pred = both.aimz.predict(fit, condition=known)
    np.testing.assert_allclose(pred.second.isel(lat=0), 100)
    np.testing.assert_allclose(pred.second.isel(lat=2), 107, atol=0.02)


def test_an_effect_under_a_condition_in_cells(ds, fitted):
    past = ds.y.isel(rep=slice(2))
    options = {"condition": {"y": past.isel(group=[0, 2, 3, 5])}, "new_labels": "sample"}
    effect = ds.chunk(group=2).aimz.intervene(fitted, {"x": lambda x: x + 2}, **options).y
    seen = effect.sel(group=list("acdf"), lat=[50.0, 30])
    np.testing.assert_array_equal(seen.isel(rep=slice(2)), 0)
    np.testing.assert_allclose(seen.isel(rep=slice(2, 4)), 2, atol=1e-5)
    np.testing.assert_allclose(effect.sel(group=["b", "e"], lat=[50.0, 30]), 2, atol=1e-5)


@pytest.mark.slow
def test_the_guard_sees_a_model_of_one_cell(series):
    def centred(t, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(slope * (t - t.mean()), 1), obs=y)

    uneven = series.assign(t=("time", np.arange(8.0)))
    fit = quiet(uneven, centred, draws=5)
    for condition in ({"y": series.y}, {"y": series.y.isel(lat=[0], lon=[0])}):
        with pytest.raises(ModelError, match="couples cells along 'time'"):
            uneven.chunk(time=4).aimz.predict(fit, condition=condition)
