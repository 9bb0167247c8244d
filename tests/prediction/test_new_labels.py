"""Latents at labels that the fit never saw: drawn from their prior, label by label."""

import dataclasses

import dask
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_checks import ComputedError, refuse, untouchable
from numpyro.contrib.control_flow import scan
from strategies import assert_same, cases, chunked, chunkings, selections

import xr_aimz
from xr_aimz.binding.labels import check_float_labels
from xr_aimz.errors import LabelError, ModelError, OptionError

MOST_Z = 5.0


def hierarchy(x, y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    with xr_aimz.plate("group"):
        level = numpyro.sample("level", dist.Normal(mu, tau))
    with xr_aimz.plate("time"), xr_aimz.plate("group"):
        numpyro.sample("y", dist.Normal(level + x, 0.5), obs=y)


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(0)
    dims, shape = ("time", "group"), (3, 4)
    ds = xr.Dataset(
        {"x": (dims, rng.normal(size=shape)), "y": (dims, rng.normal(size=shape))},
        {"time": range(3), "group": list("abcd")},
    )
    draws = {
        "mu": rng.normal(2, 0.3, (4, 5000)),
        "tau": np.exp(0.2 * rng.normal(size=(4, 5000))),
        "level": rng.normal(10, 1, (4, 5000, 2)),
    }
    return ds, ds.isel(group=[0, 2]).aimz.from_posterior(hierarchy, draws)


def test_a_new_group_is_distributed_as_its_globals_say(groups):
    """Given mu and tau, the outcome of a new group is Normal(mu + x, sqrt(tau^2 + 0.5^2))."""
    ds, fit = groups
    pred = ds.aimz.predict(fit, new_labels="sample", sites=["level", "y"]).compute()
    post, new = fit.posterior.astype("f8"), ["b", "d"]
    for found, mean, variance in (
        (pred.level, post.mu, post.tau**2),
        (pred.y, post.mu + ds.x, post.tau**2 + 0.25),
    ):
        z = ((found.sel(group=new) - mean) / np.sqrt(variance)).stack(all=("chain", "draw"))
        count = z.sizes["all"]
        assert np.abs(z.mean("all")).max() < MOST_Z / np.sqrt(count)
        assert np.abs(z.var("all") - 1).max() < MOST_Z * np.sqrt(2 / count)
    # Each group of its own, one level for all its times.
    b, d = (pred.level.sel(group=g) - post.mu for g in new)
    assert np.abs(np.corrcoef(b.values.ravel(), d.values.ravel())[0, 1]) < MOST_Z / np.sqrt(20_000)
    noise = pred.y - pred.level - ds.x
    np.testing.assert_allclose(noise.std(("chain", "draw")), 0.5, rtol=0.05)


def test_groups_that_were_seen_keep_their_posterior(groups):
    ds, fit = groups
    pred = ds.aimz.predict(fit, new_labels="sample", sites=["level", "y"])
    old = ds.sel(group=["a", "c"])
    np.testing.assert_array_equal(
        pred.level.sel(group=["a", "c"]), fit.posterior.level.astype("f4")
    )
    expected = old.aimz.predict(fit, sites=["level", "y"])
    assert_same(pred.sel(group=["a", "c"]), expected)


def split(data, case):
    """A fit on some of the labels of a case, and those labels."""
    keep = {
        d: sorted(data.draw(st.sets(st.integers(0, case.ds.sizes[d] - 1), min_size=1)))
        for d in case.dims
    }
    whole = case.fit().posterior
    part = whole.isel({d: i for d, i in keep.items() if d in whole.dims})
    return case.fit(case.ds.isel(keep), part), keep


KINDS = ("int", "string", "datetime64", "cftime")


@pytest.mark.slow
@settings(max_examples=4)
@given(st.data())
def test_new_labels_commute_with_selection_and_chunks(data):
    case = data.draw(cases(families=("local",), kinds=KINDS))
    fit, keep = split(data, case)
    options = {"new_labels": "sample", "sites": ["level", "twice", "y"]}
    pred = chunked(case.ds, data.draw(chunkings(case.ds))).aimz.predict(fit, **options)
    some = data.draw(selections(case.ds))
    part = case.ds.isel(some)
    part = chunked(part, data.draw(chunkings(part)))
    assert_same(part.aimz.predict(fit, **options), pred.isel(some))
    seen = case.ds.isel(keep)
    assert_same(seen.aimz.predict(fit, sites=options["sites"]), pred.isel(keep))


@pytest.mark.slow
@given(st.data())
def test_building_with_new_labels_computes_nothing(data):
    case = data.draw(cases(families=("local",), kinds=KINDS))
    fit, _ = split(data, case)
    lazy = case.fit(case.ds, case.fit().posterior)
    posterior = fit.posterior.map(untouchable)
    ds = case.ds.assign(x=untouchable(case.ds.x))
    with dask.config.set(scheduler=refuse):
        lazy = case.fit(
            case.ds.sel({d: posterior[d] for d in case.dims if d in posterior}), posterior
        )
        pred = ds.aimz.predict(lazy, new_labels="sample")
    with pytest.raises(ComputedError):
        pred.compute(scheduler="synchronous")


def test_several_local_dims_have_each_their_new_labels():
    def model(x, y=None):
        with xr_aimz.plate("lat"):
            north = numpyro.sample("north", dist.Normal(100, 1e-3))
        with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
            cell = numpyro.sample("cell", dist.Normal(numpyro.deterministic("m", 2 * north), 1e-3))
            numpyro.sample("y", dist.Normal(cell + x, 1e-3), obs=y)

    ds = xr.Dataset(
        {n: (("lat", "lon"), np.zeros((3, 3))) for n in "xy"}, {"lat": [1, 2, 3], "lon": [7, 8, 9]}
    )
    draws = {"north": np.full((1, 2, 2), 1.0), "cell": np.full((1, 2, 2, 2), 5.0)}
    fit = ds.isel(lat=[0, 2], lon=[0, 1]).aimz.from_posterior(model, draws)
    pred = ds.chunk(lat=2).aimz.predict(fit, new_labels="sample", sites=["north", "cell", "y"])
    np.testing.assert_allclose(pred.north[0, 0], [1, 100, 1], atol=0.02)
    # A seen latitude is above a cell never seen, and the cell follows it.
    np.testing.assert_allclose(pred.cell[0, 0], [[5, 5, 2], [200] * 3, [5, 5, 2]], atol=0.02)
    np.testing.assert_allclose(pred.y, pred.cell, atol=0.02)


def test_whole_numbers_and_vectors_can_be_new():
    def model(x, y=None):
        with xr_aimz.plate("group"):
            kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.0, 0.0, 1.0])))
            pair = numpyro.sample(
                "pair",
                dist.MultivariateNormal(jnp.array([10.0, 20.0]), 1e-6 * jnp.eye(2)),
                infer={"event_dims": ["part"]},
            )
            numpyro.sample("y", dist.Normal(kind + pair.sum(-1) + x, 1e-3), obs=y)

    ds = xr.Dataset({n: ("group", np.zeros(3)) for n in "xy"}, {"group": list("abc")})
    draws = {"kind": np.zeros((1, 2, 2), int), "pair": np.ones((1, 2, 2, 2))}
    fit = ds.sel(group=["c", "a"]).aimz.from_posterior(model, draws)
    pred = ds.aimz.predict(fit, new_labels="sample", sites=["kind", "pair", "y"])
    assert pred.kind.dtype == jnp.result_type(int)
    np.testing.assert_array_equal(pred.kind[0], [[0, 2, 0]] * 2)
    np.testing.assert_allclose(pred.pair[0, 0], [[1, 1], [10, 20], [1, 1]], atol=0.02)
    np.testing.assert_allclose(pred.y[0, 0], [2, 32, 2], atol=0.05)


def test_a_table_of_cells_has_new_labels_too():
    def model(x, y=None):
        with numpyro.plate("row", x.shape[0]):
            level = numpyro.sample("level", dist.Normal(50, 1e-3))
            numpyro.sample("y", dist.Normal(level + x, 1e-3), obs=y)

    ds = xr.Dataset(
        {n: (("lat", "lon"), np.zeros((3, 2))) for n in "xy"}, {"lat": [1, 2, 3], "lon": [7, 8]}
    )
    fit = ds.isel(lat=[1]).aimz.from_posterior(
        model, {"level": np.array([[[3.0, 4.0]]])}, layout="table"
    )
    pred = ds.chunk(lat=2).aimz.predict(fit, new_labels="sample")
    np.testing.assert_allclose(pred.y[0, 0], [[50, 50], [3, 4], [50, 50]], atol=0.02)


def test_stacked_labels_may_be_new():
    def model(x, y=None):
        with xr_aimz.plate("cell"):
            level = numpyro.sample("level", dist.Normal(50, 1e-3))
            numpyro.sample("y", dist.Normal(level + x, 1e-3), obs=y)

    ds = xr.Dataset(
        {n: (("lat", "lon"), np.zeros((2, 2))) for n in "xy"}, {"lat": [1, 2], "lon": [3, 4]}
    ).stack(cell=("lat", "lon"))
    fit = ds.isel(cell=[0, 2]).aimz.from_posterior(model, {"level": np.array([[[1.0, 2.0]]])})
    pred = ds.aimz.predict(fit, new_labels="sample").y
    np.testing.assert_allclose(pred[0, 0], [1, 50, 2, 50], atol=0.02)
    assert pred.indexes["cell"].equals(ds.indexes["cell"])


# A scan goes on from where the fit ended.


def local_level(t, y=None):
    q = numpyro.sample("q", dist.HalfNormal(1))

    def step(before, now):
        state = numpyro.sample("state", dist.Normal(0.9 * before, q))
        numpyro.sample("y", dist.Normal(state, 0.3), obs=now)
        return state, None

    scan(step, 0.0, y, length=t.shape[0])


def series(n):
    values = {v: ("time", np.arange(float(n))) for v in "ty"}
    return xr.Dataset(values, {"time": np.arange(2000, 2000 + n)})


@pytest.fixture(scope="module")
def states():
    rng = np.random.default_rng(1)
    draws = {"q": np.full((2, 10_000), 0.5), "state": rng.normal(3, 0.1, (2, 10_000, 4))}
    return series(4).aimz.from_posterior(local_level, draws, core_dim="time")


def test_states_after_the_fit_are_drawn_on_from_its_last(states):
    """From a last state s, the state h steps on is Normal(0.9^h s, 0.5 sqrt(sum 0.81^i))."""
    ds = series(7).drop_vars("y")
    pred = ds.aimz.predict(states, new_labels="sample", sites=["state", "y"]).compute()
    last = states.posterior.state.isel(time=-1, drop=True).astype("f4")
    np.testing.assert_array_equal(
        pred.state.isel(time=slice(4)), states.posterior.state.astype("f4")
    )
    for h in (1, 2, 3):
        variance = 0.25 * sum(0.81**i for i in range(h))
        for name, more in (("state", 0.0), ("y", 0.09)):
            z = (pred[name].isel(time=3 + h) - 0.9**h * last) / np.sqrt(variance + more)
            assert np.abs(z.mean()) < MOST_Z / np.sqrt(z.size)
            assert np.abs(z.var() - 1) < MOST_Z * np.sqrt(2 / z.size)


@pytest.mark.parametrize("labels", [[2001, 2002, 2003, 2004], [1999, 2000, 2001, 2002, 2003]])
def test_a_scan_cannot_begin_or_be_cut_before_its_new_steps(states, labels):
    ds = series(len(labels)).assign_coords(time=labels)
    with pytest.raises(LabelError, match=r"'state'.*scanned.*2000 to 2003.*in order"):
        ds.aimz.predict(states, new_labels="sample")


def test_sites_in_a_scan_that_runs_backwards_are_refused():
    """NumPyro gave state 0 the draws that belong to the last y."""

    def model(t, y=None, reverse=True):
        def step(before, now):
            state = numpyro.sample("state", dist.Normal(before, 1))
            numpyro.sample("y", dist.Normal(state, 1), obs=now)
            return state, None

        scan(step, 0.0, y, length=t.shape[0], reverse=reverse)

    draws = {"state": np.ones((1, 2, 2))}
    with pytest.raises(ModelError, match=r"\['state', 'y'\] are in a scan with reverse=True"):
        series(2).aimz.from_posterior(model, draws, core_dim="time")
    # The remedy: labels go with their values.
    turned = series(2).isel(time=slice(None, None, -1))
    fit = turned.aimz.from_posterior(model, draws, {"reverse": False}, core_dim="time")
    assert turned.aimz.predict(fit).time.values.tolist() == [2001, 2000]


def test_a_scan_without_sites_may_run_backwards():
    def model(t, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        _, after = scan(lambda s, now: (s + now, s), 0.0, t, reverse=True)
        numpyro.sample("y", dist.Normal(b + after, 1e-3), obs=y)

    fit = series(3).aimz.from_posterior(model, {"b": np.zeros((1, 2))}, core_dim="time")
    np.testing.assert_allclose(series(3).aimz.predict(fit).y[0, 0], [3, 2, 0], atol=0.02)


def test_a_scan_that_goes_on_is_not_cut():
    def outside(t, y=None):
        def step(before, _):
            state = numpyro.sample("state", dist.Normal(before + 1, 1e-3))
            return state, state

        _, states = scan(step, 0.0, None, length=t.shape[0])
        numpyro.sample("y", dist.Normal(states, 1e-3), obs=y)

    draws = {"state": np.array([[[5.0, 6.0]]])}
    fit = series(2).aimz.from_posterior(outside, draws)
    pred = series(4).aimz.predict(fit, new_labels="sample")
    np.testing.assert_allclose(pred.y[0, 0], [5, 6, 7, 8], atol=0.02)
    with pytest.raises(ModelError, match="'state' is inside a scan along 'time', which is cut"):
        series(4).chunk(time=2).aimz.predict(fit, new_labels="sample")


# What cannot be drawn label by label.


def test_new_entries_of_an_event_are_refused():
    def model(t, y=None):
        walk = numpyro.sample(
            "walk", dist.GaussianRandomWalk(1.0, t.shape[0]), infer={"event_dims": ["time"]}
        )
        numpyro.sample("y", dist.Normal(walk, 1), obs=y)

    fit = series(2).aimz.from_posterior(model, {"walk": np.ones((1, 2, 2))}, core_dim="time")
    with pytest.raises(ModelError, match=r"'walk' has no draws for 1 labels of 'time'.*event"):
        series(3).aimz.predict(fit, new_labels="sample")


def test_new_labels_of_a_core_dim_are_refused():
    def model(t, y=None):
        with xr_aimz.plate("time"):
            jump = numpyro.sample("jump", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jnp.cumsum(jump), 1), obs=y)

    fit = series(2).aimz.from_posterior(model, {"jump": np.ones((1, 2, 2))}, core_dim="time")
    with pytest.raises(ModelError, match=r"'jump'.*core_dim.*as a scan"):
        series(3).aimz.predict(fit, new_labels="sample")


def test_positions_are_not_new_labels(groups):
    ds, fit = groups
    refused = "'level' has labels on 'group', and the Dataset has none"
    with pytest.raises(LabelError, match=refused):
        ds.drop_vars("group").aimz.predict(fit, new_labels="sample")


def test_new_labels_are_refused_unless_asked_for(groups):
    ds, fit = groups
    with pytest.raises(LabelError, match="'level' has no draws for 2 labels"):
        ds.aimz.predict(fit)
    with pytest.raises(OptionError, match=r"new_labels='prior'.*'sample'"):
        ds.aimz.predict(fit, new_labels="prior")


@pytest.mark.parametrize(
    ("new", "there"),
    [
        ([0.1], np.array([0.1, 0.2], "f4")),
        ([0.3], [0.1 + 0.2, 0.5]),
        ([np.float32(7.7)], [7.7, 8.7]),
        ([-0.1], np.array([-0.1], "f4")),
    ],
)
def test_a_label_that_was_rounded_is_no_new_label(new, there):
    with pytest.raises(LabelError, match=r"but for rounding; give 'lat' the same values"):
        check_float_labels("site 'a'", "lat", pd.Index(new), pd.Index(there))


@pytest.mark.parametrize(
    ("new", "there"),
    [
        ([4_000_001.0], [4_000_000.0, 4_000_002.0]),
        ([1_600_000_060.0], [1_600_000_000.0]),
        ([0.1], [0.1001, 0.2]),
        (["a"], [0.1]),
        ([], [0.1]),
        ([2], [1, 3]),
    ],
)
def test_a_label_that_is_near_another_may_be_new(new, there):
    check_float_labels("site 'a'", "lat", pd.Index(new), pd.Index(there))


def test_a_prior_that_cannot_be_drawn_names_its_site():
    def model(x, y=None):
        with xr_aimz.plate("group"):
            level = numpyro.sample("level", dist.ImproperUniform(dist.constraints.real, (), ()))
            numpyro.sample("y", dist.Normal(level + x, 1), obs=y)

    ds = xr.Dataset({n: ("group", np.zeros(3)) for n in "xy"}, {"group": list("abc")})
    fit = ds.isel(group=[0]).aimz.from_posterior(model, {"level": np.ones((1, 2, 1))})
    with pytest.raises(xr_aimz.errors.RandomnessError, match="site 'level': ImproperUniform"):
        ds.aimz.predict(fit, new_labels="sample")


def test_a_latent_without_any_draws_is_named(groups):
    ds, fit = groups
    lost = dataclasses.replace(fit, posterior=fit.posterior.drop_vars("level"))
    for options in ({}, {"new_labels": "sample"}):
        with pytest.raises(ModelError, match=r"\['level'\] have no draws"):
            ds.aimz.predict(lost, **options)
