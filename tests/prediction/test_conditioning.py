"""Outcomes that are given in some cells: a history, then a forecast."""

import dask
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import strategies
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_checks import ComputedError, refuse, untouchable
from numpyro.contrib.control_flow import scan
from strategies import assert_same, cases, chunked, chunkings, selections

import xr_aimz
from xr_aimz.errors import (
    DimensionError,
    DtypeError,
    LabelError,
    MissingVariableError,
    ModelError,
    OptionError,
    UnitsError,
)

MOST_Z = 5.0
PHI = 0.8
YEARS = np.arange(2000, 2010)
ONES = {"b": np.ones((1, 2))}


def ar1(t, y=None):
    phi = numpyro.sample("phi", dist.Normal(0, 1))

    def step(before, now):
        value = numpyro.sample("y", dist.Normal(phi * before, 1.0), obs=now)
        return value, None

    scan(step, 0.0, y, length=t.shape[0])


@pytest.fixture(scope="module")
def walk():
    rng = np.random.default_rng(0)
    values = {v: ("time", rng.normal(size=10)) for v in "ty"}
    ds = xr.Dataset(values, {"time": YEARS})
    fit = ds.aimz.from_posterior(ar1, {"phi": np.full((2, 10_000), PHI)}, core_dim="time")
    return ds, fit


def test_a_forecast_is_that_of_the_history(walk):
    """h steps after y, an AR(1) is Normal(phi^h y, sqrt(sum phi^2i))."""
    ds, fit = walk
    history = xr.DataArray([0.0, -2.0, 1.0, 5.0], {"time": YEARS[:4]}, dims="time")
    pred = ds.drop_vars("y").aimz.predict(fit, condition={"y": history}).y.compute()
    np.testing.assert_array_equal(
        pred.isel(time=slice(4)), history.expand_dims(chain=2, draw=10_000)
    )
    count = pred.sizes["chain"] * pred.sizes["draw"]
    for h in range(1, 7):
        variance = sum(PHI ** (2 * i) for i in range(h))
        z = (pred.isel(time=3 + h) - 5 * PHI**h) / np.sqrt(variance)
        assert np.abs(z.mean()) < MOST_Z / np.sqrt(count)
        assert np.abs(z.var() - 1) < MOST_Z * np.sqrt(2 / count)


def test_a_series_that_is_given_whole_comes_back(walk):
    ds, fit = walk
    for condition in ("y", ["y"], {"y": "y"}, {"y": ds.y[::-1]}):
        pred = ds.aimz.predict(fit, draws=2, condition=condition).y
        np.testing.assert_array_equal(pred, ds.y.astype("f4").expand_dims(chain=2, draw=2))


def test_missing_at_the_end_is_to_be_drawn(walk):
    ds, fit = walk
    ends = ds.assign(y=ds.y.where(ds.time < 2005))
    lacks = ds.y.sel(time=slice(2004))
    pred = ends.aimz.predict(fit, draws=3, condition="y")
    assert_same(pred, ds.aimz.predict(fit, draws=3, condition={"y": lacks}))
    assert pred.y.notnull().all()


def test_a_gap_in_a_recursion_is_refused(walk):
    ds, fit = walk
    gap = ds.y.where(ds.time != 2003)
    with pytest.raises(ModelError, match=r"'y' has a gap along 'time'.*without a gap"):
        ds.aimz.predict(fit, condition={"y": gap})
    late = ds.y.isel(time=slice(3, None))
    with pytest.raises(ModelError, match=r"from the first step on"):
        ds.aimz.predict(fit, condition={"y": late})


def test_a_lazy_history_is_looked_at_in_its_task(walk):
    ds, fit = walk
    history = ds.y.where(ds.time < 2005)
    pred = ds.aimz.predict(fit, condition={"y": history}, draws=2)
    with dask.config.set(scheduler=refuse):
        lazy = ds.aimz.predict(fit, condition={"y": history.chunk(time=2)}, draws=2)
        gap = ds.aimz.predict(fit, condition={"y": history[::-1].chunk(time=2)[2:]}, draws=2)
        hole = ds.y.where(ds.time != 2003).chunk(time=2)
        bad = ds.aimz.predict(fit, condition={"y": hole}, draws=2)
    assert_same(lazy, pred)
    assert_same(gap, pred)
    with pytest.raises(ModelError, match="'y' has a gap along 'time'"):
        bad.compute(scheduler="synchronous")


def test_a_history_of_its_own_for_every_cell():
    def model(x, y=None):
        def step(before, now):
            with xr_aimz.plate("lat"):
                value = numpyro.sample("y", dist.Normal(before + 1, 1e-3), obs=now)
            return value, None

        scan(step, jnp.zeros(x.shape[1]), y, length=x.shape[0])
        numpyro.sample("b", dist.Normal(0, 1))

    dims = ("time", "lat")
    ds = xr.Dataset(
        {n: (dims, np.zeros((4, 3))) for n in "xy"}, {"time": range(4), "lat": [1, 2, 3]}
    )
    fit = ds.aimz.from_posterior(model, ONES, core_dim="time")
    history = xr.DataArray(
        [[10.0, 20.0], [11.0, np.nan]], {"time": [0, 1], "lat": [3, 1]}, dims=dims
    )
    pred = ds.chunk(lat=2).aimz.predict(fit, condition={"y": history.transpose()})
    expected = [[20, 1, 10], [21, 2, 11], [22, 3, 12], [23, 4, 13]]
    np.testing.assert_allclose(pred.y[0, 0], expected, atol=0.02)
    holed = history.assign_coords(time=[0, 2])
    with pytest.raises(ModelError, match="without a gap"):
        ds.aimz.predict(fit, condition={"y": holed})


# Laws.


FAMILIES = ("grid", "broadcast", "table", "counts", "multivariate")


def some_cells(data, case):
    """An outcome in part: some cells missing, its labels in another order."""
    array = case.ds[case.outcomes[0]]
    sizes = {d: array.sizes[d] for d in case.dims}
    mask = xr.DataArray(
        np.random.default_rng(data.draw(st.integers(0, 99))).uniform(size=[*sizes.values()]) < 0.6,
        dims=tuple(sizes),
    )
    order = {d: np.array(data.draw(st.permutations(range(n)))) for d, n in sizes.items()}
    return array.where(mask), array.where(mask).isel(order)


@pytest.mark.slow
@settings(max_examples=5)
@given(st.data())
def test_a_condition_commutes_with_selection_and_chunks(data):
    case = data.draw(cases(families=FAMILIES, kinds=strategies.KINDS))
    fit, name = case.fit(), case.outcomes[0]
    aligned, turned = some_cells(data, case)
    ds = case.ds.drop_vars(case.outcomes)
    pred = chunked(ds, data.draw(chunkings(ds))).aimz.predict(fit, condition={name: turned})
    free = case.ds.aimz.predict(fit)
    # Given cells as given, free cells as without a condition: to the last bit of the noise.
    expected = xr.where(aligned.notnull(), aligned, free[name].astype("f8"))
    found = pred[name].transpose(*expected.dims).compute()
    np.testing.assert_allclose(found, expected.values, rtol=2e-6, atol=2e-6)
    assert found.dtype == free[name].dtype
    some = data.draw(selections(ds))
    part = ds.isel(some)
    part = chunked(part, data.draw(chunkings(part)))
    assert_same(part.aimz.predict(fit, condition={name: turned}), pred.isel(some))


@settings(max_examples=6)
@given(st.data())
def test_building_with_a_condition_computes_nothing(data):
    case = data.draw(cases(families=("grid", "table", "counts"), kinds=strategies.KINDS))
    fit, name = case.fit(), case.outcomes[0]
    lazy = untouchable(some_cells(data, case)[1])
    with dask.config.set(scheduler=refuse):
        pred = case.ds.aimz.predict(fit, condition={name: lazy})
    with pytest.raises(ComputedError):
        pred.compute(scheduler="synchronous")


@settings(max_examples=3)
@given(st.data())
def test_a_lazy_condition_is_the_condition(data):
    case = data.draw(cases(families=("grid", "counts"), kinds=strategies.KINDS))
    fit, name = case.fit(), case.outcomes[0]
    array = some_cells(data, case)[1]
    chunks = {d: data.draw(strategies.cuts(n)) for d, n in array.sizes.items()}
    lazy = case.ds.aimz.predict(fit, condition={name: array.chunk(chunks)})
    assert_same(lazy, case.ds.aimz.predict(fit, condition={name: array}))


# What a value would tell of.


def two_outcomes(x, first=None, second=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    cause = numpyro.sample("first", dist.Normal(b * x, 1e-3), obs=first)
    numpyro.sample("second", dist.Normal(cause + 100, 1e-3), obs=second)


@pytest.fixture(scope="module")
def pair():
    values = {n: ("time", np.arange(5.0)) for n in ("x", "first", "second")}
    ds = xr.Dataset(values, {"time": np.arange(5)})
    return ds, ds.aimz.from_posterior(two_outcomes, ONES)


def test_a_given_cause_has_its_effect(pair):
    ds, fit = pair
    pred = ds.aimz.predict(fit, condition={"first": xr.full_like(ds.x, 7)})
    np.testing.assert_allclose(pred.second, 107, atol=0.02)


def test_a_given_effect_without_its_cause_is_refused(pair):
    ds, fit = pair
    match = r"condition='second': site 'first' is drawn.*give 'first' too"
    with pytest.raises(ModelError, match=match):
        ds.aimz.predict(fit, condition={"second": 5.0})
    part = ds.isel(time=slice(3))
    with pytest.raises(ModelError, match=match):
        ds.aimz.predict(fit, condition={"first": part.first, "second": ds.second})
    both = ds.aimz.predict(fit, condition={"first": ds.first, "second": part.second})
    np.testing.assert_allclose(both.second[0, 0], [0, 1, 2, 103, 104], atol=0.02)


def level_model(t, y=None):
    def step(before, now):
        state = numpyro.sample("state", dist.Normal(before, 1))
        numpyro.sample("y", dist.Normal(state, 1), obs=now)
        return state, None

    scan(step, 0.0, y, length=t.shape[0])


def test_a_state_that_is_drawn_cannot_be_told_of():
    values = {v: ("time", np.arange(6.0)) for v in "ty"}
    ds = xr.Dataset(values, {"time": np.arange(6)})
    past = ds.isel(time=slice(4))
    fit = past.aimz.from_posterior(level_model, {"state": np.ones((1, 2, 4))}, core_dim="time")
    with pytest.raises(ModelError, match=r"condition='y': site 'state' is drawn.*Fit with those"):
        ds.aimz.predict(fit, condition="y", new_labels="sample")
    with pytest.raises(ModelError, match="site 'state' is drawn"):
        ds.aimz.predict(fit, condition={"y": ds.y.chunk()}, new_labels="sample")
    # Its past is known to the posterior, with or without a gap: y does not feed the state.
    gap = past.y.where(past.time != 1)
    for y in (past.y, gap, gap.chunk(time=2)):
        pred = ds.aimz.predict(fit, condition={"y": y}, new_labels="sample").y
        np.testing.assert_array_equal(pred[0, 0, [0, 2, 3]], [0, 2, 3])


def test_a_level_that_is_drawn_cannot_be_told_of():
    def model(x, y=None):
        with xr_aimz.plate("group"):
            level = numpyro.sample("level", dist.Normal(0, 1))
        with xr_aimz.plate("time"), xr_aimz.plate("group"):
            numpyro.sample("y", dist.Normal(level + x, 1), obs=y)

    dims = ("time", "group")
    ds = xr.Dataset(
        {n: (dims, np.ones((4, 3))) for n in "xy"}, {"time": range(4), "group": list("abc")}
    )
    fit = ds.isel(group=[0, 1]).aimz.from_posterior(model, {"level": np.zeros((1, 2, 2))})
    old = ds.y.isel(group=[0, 1], time=slice(2))
    pred = ds.aimz.predict(fit, condition={"y": old}, new_labels="sample").y
    assert (pred.isel(time=[0, 1], group=[0, 1]) == 1).all()
    assert (pred.isel(group=2) != 1).all()
    with pytest.raises(ModelError, match="site 'level' is drawn"):
        ds.aimz.predict(fit, condition={"y": ds.y.isel(time=[0])}, new_labels="sample")


# An event is given whole or not at all.


def vectors(x, joint, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    mean = (b * x)[..., None] * jnp.ones(2)
    fn = dist.MultivariateNormal(mean, jnp.eye(2)) if joint else dist.Normal(mean, 1).to_event(1)
    numpyro.sample("y", fn, obs=y)


@pytest.fixture(scope="module")
def pairs():
    return xr.Dataset(
        {"x": ("time", np.ones(3)), "y": (("time", "species"), np.arange(6.0).reshape(3, 2))},
        {"time": range(3), "species": ["oak", "ash"]},
    )


def test_a_part_of_a_joint_event_is_refused(pairs):
    fit = pairs.aimz.from_posterior(vectors, ONES, {"joint": True})
    whole = pairs.y.where(pairs.time != 1)
    pred = pairs.aimz.predict(fit, condition={"y": whole.isel(species=[1, 0])}).y
    np.testing.assert_array_equal(pred[0, 0, [0, 2]], [[0, 1], [4, 5]])
    oak = pairs.y.where(pairs.species == "oak")
    with pytest.raises(ModelError, match=r"a part of \['species'\], .* as one"):
        pairs.aimz.predict(fit, condition={"y": oak})
    lazy = pairs.aimz.predict(fit, condition={"y": whole.chunk()})
    np.testing.assert_array_equal(lazy.y, pred)
    lazy = pairs.aimz.predict(fit, condition={"y": oak.chunk(species=1)})
    with pytest.raises(ModelError, match=r"a part of \['species'\]"):
        lazy.compute(scheduler="synchronous")
    with pytest.raises(LabelError, match=r"condition='y' lacks 1 of the 2 .*'species'.*'ash'"):
        pairs.aimz.predict(fit, condition={"y": pairs.y.sel(species=["oak"])})


def test_a_part_of_independent_cells_can_be_given(pairs):
    fit = pairs.aimz.from_posterior(vectors, ONES, {"joint": False})
    oak = pairs.y.where(pairs.species == "oak")
    pred = pairs.aimz.predict(fit, condition={"y": oak})
    free = pairs.aimz.predict(fit)
    np.testing.assert_array_equal(pred.y.sel(species="oak")[0, 0], [0, 2, 4])
    assert_same(pred.sel(species="ash"), free.sel(species="ash"))


# What a condition may be.


@pytest.fixture(scope="module")
def line():
    def model(x, rain=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.deterministic("mu", b * x)
        with xr_aimz.plate("time"), xr_aimz.plate("lat"):
            numpyro.sample("obs/rain", dist.Normal(b * x, 1), obs=rain)

    dims = ("time", "lat")
    rng = np.random.default_rng(0)
    ds = xr.Dataset(
        {"x": (dims, rng.normal(size=(3, 2))), "fall": (dims, np.zeros((3, 2)), {"units": "mm"})},
        {"time": [1, 2, 3], "lat": [10.0, 20.0]},
    )
    return ds, ds.aimz.from_posterior(model, ONES, {"rain": "fall"})


def test_an_outcome_goes_by_either_name_and_a_number_is_everywhere(line):
    ds, fit = line
    for condition in ({"fall": 3}, {"obs/rain": 3.0}, {"fall": np.float64(3)}):
        assert (ds.aimz.predict(fit, condition=condition).fall == 3).all()


def test_a_dimension_that_is_lacking_is_broadcast_and_one_label_is_one_label(line):
    ds, fit = line
    row = xr.DataArray([1.0, 2.0, 3.0], {"time": [1, 2, 3]}, dims="time")
    pred = ds.aimz.predict(fit, condition={"fall": row}).fall
    np.testing.assert_array_equal(pred[0, 0].T, [[1, 2, 3]] * 2)
    pred = ds.aimz.predict(fit, condition={"fall": row.assign_coords(lat=20.0)}).fall
    np.testing.assert_array_equal(pred.sel(lat=20)[0, 0], [1, 2, 3])
    free = ds.aimz.predict(fit).fall
    np.testing.assert_array_equal(pred.sel(lat=10), free.sel(lat=10))
    # A Dataset of one label of lat, too.
    one = ds.sel(lat=20.0)
    found = one.aimz.predict(fit, condition={"fall": row}).fall
    np.testing.assert_array_equal(found, pred.sel(lat=20.0))


def test_without_labels_positions_must_agree(line):
    ds, fit = line
    bare = ds.drop_vars("time")
    given_all = xr.zeros_like(bare.fall) + 4
    assert (bare.aimz.predict(fit, condition={"fall": given_all}).fall == 4).all()
    with pytest.raises(DimensionError, match=r"2 entries along 'time', where 3 are wanted"):
        bare.aimz.predict(fit, condition={"fall": given_all.isel(time=[0, 1])})
    with pytest.raises(LabelError, match=r"has no labels on 'time', and the Dataset has some"):
        ds.aimz.predict(fit, condition={"fall": given_all})
    with pytest.raises(LabelError, match=r"has labels on 'time', and the Dataset has none"):
        bare.aimz.predict(fit, condition={"fall": ds.fall})


@pytest.mark.parametrize(
    ("condition", "error", "match"),
    [
        ({"snow": 1.0}, MissingVariableError, r"'snow': .* outcomes are \['fall'\]"),
        ({"b": 1.0}, ModelError, r"'b': a latent .* posterior.*\['fall'\]"),
        ({"mu": 1.0}, ModelError, r"'mu': a deterministic .*\['fall'\]"),
        ({"fall": "snow"}, MissingVariableError, r"no variable 'snow'.*DataArray"),
        ({"fall": 1.0, "obs/rain": 1.0}, OptionError, "twice"),
        ({"fall": np.ones(3)}, OptionError, "no labels; give a DataArray"),
        ({"fall": None}, DtypeError, "dtype object"),
        (True, OptionError, "condition=True: give the name"),
        ([3], OptionError, r"condition=\[3\]"),
        ({"fall": xr.DataArray(["a"], dims="x")}, DtypeError, "dtype <U1"),
        ({"fall": xr.DataArray(np.ones(2), dims="draw")}, DimensionError, r"\['draw'\] is not"),
        (
            {"fall": xr.DataArray([1.0], {"time": [9]}, dims="time")},
            LabelError,
            r"\[9\] ... on 'time', and none .* \[1, 2, 3\]",
        ),
        (
            {"fall": xr.DataArray([1.0, 1], {"time": [1, 1]}, dims="time")},
            LabelError,
            "duplicate labels of 'time'",
        ),
        (
            {"fall": xr.DataArray([1.0, 1], {"lat": [10, 20.000000001]}, dims="lat")},
            LabelError,
            "but for rounding",
        ),
        ({"fall": xr.DataArray(1.0, attrs={"units": "cm"})}, UnitsError, "'cm'.*'mm'"),
    ],
)
def test_bad_conditions_are_refused(line, condition, error, match):
    ds, fit = line
    with dask.config.set(scheduler=refuse), pytest.raises(error, match=match):
        ds.aimz.predict(fit, condition=condition)


def test_a_count_is_a_whole_number():
    ds = xr.Dataset({n: ("time", [0, 1, 2]) for n in ("x", "y", "hit")}, {"time": range(3)})
    fit = ds.aimz.from_posterior(strategies.counts, {"a": np.zeros((1, 2))})
    half = xr.DataArray([0.5, np.nan, 2.0], {"time": range(3)}, dims="time")
    with pytest.raises(DtypeError, match=r"condition='n' has the value .*0\.5.*whole numbers"):
        ds.aimz.predict(fit, condition={"n": half})
    lazy = ds.aimz.predict(fit, condition={"n": half.chunk()})
    with pytest.raises(DtypeError, match=r"0\.5"):
        lazy.compute(scheduler="synchronous")
    pred = ds.aimz.predict(fit, condition={"n": half.where(half != 0.5), "hit": True})
    assert pred.y.dtype == jnp.result_type(int)
    assert (pred.y.isel(time=2) == 2).all()
    assert (pred.hit == 1).all()


def test_a_site_that_observes_a_function_of_a_variable_takes_its_own_values():
    def model(x, rain=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("rain", dist.Normal(b * x, 1), obs=None if rain is None else jnp.log(rain))

    ds = xr.Dataset({n: ("time", np.ones(3)) for n in ("x", "rain")}, {"time": range(3)})
    fit = ds.aimz.from_posterior(model, ONES)
    with pytest.raises(OptionError, match=r"'rain': the fit knows of no variable.*as it is"):
        ds.aimz.predict(fit, condition="rain")
    pred = ds.aimz.predict(fit, condition={"rain": np.log(ds.rain)})
    assert (pred.rain == 0).all()


def test_a_scale_may_be_an_input():
    """What is looked at before a condition is taken has no values yet, and none are checked."""

    def of(x, s, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b * x, s), obs=y)

    values = {v: ("time", np.arange(1.0, 11)) for v in "xsy"}
    ds = xr.Dataset(values, {"time": YEARS})
    fit = ds.aimz.from_posterior(of, {"b": np.ones((1, 5))})
    known = ds.y.where(ds.time < 2004)
    free = ds.aimz.predict(fit).y.compute()
    found = ds.aimz.predict(fit, condition={"y": known}).y.compute()
    np.testing.assert_array_equal(found, free.where(known.isnull(), known))
    effect = ds.aimz.intervene(fit, {"x": lambda x: x + 1}, condition={"y": known}).y.compute()
    np.testing.assert_allclose(effect[0, 0], known.isnull(), atol=1e-5)
