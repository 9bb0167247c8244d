"""Predictions that could have come out wrong without a word, and do not."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan

import xr_aimz
from xr_aimz.errors import BindingError, DimensionError, LabelError, ModelError

T = np.arange(6.0)
ONES = {"b": np.ones((1, 2))}


def line(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    mu = numpyro.deterministic("mu", b * x)
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture
def ds():
    return xr.Dataset({"x": ("time", T), "y": ("time", T)}, {"time": T})


def first(array):
    return array.isel(chain=0, draw=0).values


def test_a_data_array_is_used_though_a_variable_has_the_arguments_name(ds):
    fit = ds.aimz.from_posterior(line, ONES, {"x": ds.x * 100})
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), 100 * T)


def test_a_data_array_gives_way_to_a_variable_that_comes_with_a_new_dataset(ds):
    fit = ds.drop_vars("x").aimz.from_posterior(line, ONES, {"x": ds.x * 100})
    np.testing.assert_allclose(first(ds.drop_vars("x").aimz.predict(fit).mu), 100 * T)
    later = xr.Dataset({"x": ("time", T + 7)}, {"time": T + 50})
    np.testing.assert_allclose(first(later.aimz.predict(fit).mu), T + 7)


def test_two_arguments_may_be_bound_crosswise(ds):
    def model(x, z, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(numpyro.deterministic("mu", b * x + 100 * z), 1), obs=y)

    crossed = ds.assign(q=ds.x, x=xr.ones_like(ds.x))
    fit = crossed.aimz.from_posterior(model, ONES, {"x": crossed.q, "z": "x"})
    np.testing.assert_allclose(first(crossed.aimz.predict(fit).mu), T + 100)


def test_one_variable_may_be_input_and_outcome(ds):
    def model(previous, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(numpyro.deterministic("mu", b * previous), 1), obs=y)

    fit = ds.aimz.from_posterior(model, ONES, {"previous": "y"})
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), T)


def test_a_reloaded_model_is_another_program(ds, tmp_path, monkeypatch):
    source = """
import numpyro, numpyro.distributions as dist
K = {k}
def model(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(numpyro.deterministic("mu", b * x * K), 1), obs=y)
"""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "a_model_to_reload.py").write_text(source.format(k=1))
    module = importlib.import_module("a_model_to_reload")
    fit = ds.aimz.from_posterior(module.model, ONES)
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), T)
    module.K = 7
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), 7 * T)
    (tmp_path / "a_model_to_reload.py").write_text(source.format(k=1000))
    fit = ds.aimz.from_posterior(importlib.reload(module).model, ONES)
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), 1000 * T)


def test_a_core_dim_stays_whole_whatever_else_is_chunked(ds):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        mu = numpyro.deterministic("mu", jnp.cumsum(b * x))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = ds.aimz.from_posterior(model, ONES, core_dim="time")
    other = ds.assign(other=ds.x.chunk(time=2), y=ds.y.chunk(time=2))
    np.testing.assert_allclose(first(other.aimz.predict(fit).mu), np.cumsum(T))


def test_a_scan_along_a_dimension_that_is_cut_is_refused(ds):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))

        def step(level, now):
            numpyro.sample("y", dist.Normal(level + b, 1), obs=now)
            return level + b, None

        scan(step, 0.0, y, length=x.shape[0])

    fit = ds.aimz.from_posterior(model, ONES)
    assert ds.aimz.predict(fit).y.shape == (1, 2, 6)
    with pytest.raises(ModelError, match=r"'y'.*scan along 'time'.*core_dim='time'"):
        ds.chunk(time=3).aimz.predict(fit)


def test_a_total_over_a_dimension_that_is_cut_is_refused(ds):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.deterministic("total", (b * x).sum())
        numpyro.deterministic("square", b**2)
        numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    fit = ds.aimz.from_posterior(model, ONES)
    np.testing.assert_allclose(ds.aimz.predict(fit).total, [[15, 15]])
    with pytest.raises(ModelError, match=r"'total' has no dimension \['time'\].*\['x'\]"):
        ds.chunk(time=4).aimz.predict(fit)
    # what is made of latents alone is the same in every block
    assert ds.chunk(time=4).aimz.predict(fit, sites=["square", "y"]).square.shape == (1, 2)


def test_a_total_of_an_argument_that_has_the_name_of_a_site_is_refused_as_one(ds):
    def model(x, y=None):
        b = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.deterministic("total", b * x.sum())
        numpyro.sample("y", dist.Normal(b, 1.0).expand(x.shape), obs=y)

    fit = ds.aimz.from_posterior(model, {"x": ONES["b"]})
    with pytest.raises(ModelError, match=r"'total' has no dimension \['time'\].*\['x'\]"):
        ds.chunk(time=4).aimz.predict(fit, sites="total")


@pytest.mark.slow
def test_a_deterministic_of_the_outcome_is_of_what_was_observed(ds):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        drawn = numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)
        numpyro.deterministic("rmse", jnp.sqrt(((drawn - b * x) ** 2).mean()))

    fit = ds.aimz.fit(model, draws=1000, warmup=300, chains=1, progress=False)
    truth = np.sqrt(((ds.y - fit.posterior.b * ds.x) ** 2).mean("time"))
    xr.testing.assert_allclose(fit.posterior.rmse, truth.transpose("chain", "draw"), atol=1e-5)


def species(x, y=None):
    with numpyro.plate("species", 3):
        b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x[..., None] * b, 1e-3).to_event(1), obs=y)


def test_labels_of_an_event_dim_are_the_fits():
    ds = xr.Dataset(
        {"x": ("time", np.ones(4)), "y": (("time", "species"), np.ones((4, 3)))},
        {"time": np.arange(4), "species": list("abc")},
    )
    fit = ds.aimz.from_posterior(species, {"b": np.array([[[1.0, 2, 3]]])})
    assert fit.posterior.b.dims == ("chain", "draw", "species")
    turned = ds.isel(species=[2, 0, 1]).aimz.predict(fit).y
    for label, value in zip("abc", (1, 2, 3), strict=True):
        np.testing.assert_allclose(turned.sel(species=label), value, atol=0.01)
    with pytest.raises(LabelError, match="'species'"):
        ds.assign_coords(species=list("xyz")).aimz.predict(fit)


def test_labels_of_features_in_draws_made_elsewhere():
    def model(X, y=None):
        with numpyro.plate("feature", X.shape[-1]):
            b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(numpyro.deterministic("mu", X @ b), 1), obs=y)

    ds = xr.Dataset({n: ("time", v * np.ones(3)) for n, v in {"u": 1, "v": 10, "y": 0}.items()})
    draws = xr.Dataset(
        {"b": (("chain", "draw", "feature"), [[[5.0, 7.0]]])}, {"feature": ["v", "u"]}
    )
    fit = ds.aimz.from_posterior(model, draws, {"X": ["u", "v"]})
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), 7 * 1 + 5 * 10)
    with pytest.raises(LabelError, match=r"'b' has 1 labels of 'feature'.*\['w'\]"):
        ds.aimz.from_posterior(model, draws.assign_coords(feature=["v", "w"]), {"X": ["u", "v"]})


def test_groups_that_the_fit_never_saw():
    def model(index, y=None):
        with xr_aimz.plate("group"):
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(a[index], 1e-3), obs=y)

    ds = xr.Dataset(
        {"index": ("time", [0, 1, 2]), "y": ("time", np.zeros(3))},
        {"time": np.arange(3), "group": list("abc")},
    )
    fit = ds.aimz.from_posterior(model, {"a": np.array([[[1.0, 2, 3]]])})
    assert fit.posterior.a.dims == ("chain", "draw", "group")
    for groups in (list("abcde"), ["c"]):
        with pytest.raises(LabelError, match="'group'"):
            ds.drop_vars("group").assign_coords(group=groups).aimz.predict(fit)


def test_a_plate_of_fixed_size_with_a_dimensions_name_is_not_sliced():
    def model(index, y=None):
        with numpyro.plate("lat", 3):
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(a[index], 1e-3), obs=y)

    ds = xr.Dataset(
        {"index": (("time", "lat"), [[2, 1, 0]] * 4), "y": (("time", "lat"), np.zeros((4, 3)))},
        {"time": np.arange(4), "lat": [5, 6, 7]},
    )
    fit = ds.aimz.from_posterior(model, {"a": np.array([[[1.0, 2, 3]]])})
    np.testing.assert_allclose(first(ds.aimz.predict(fit).y), [[3, 2, 1]] * 4, atol=0.01)
    for part in (ds.chunk(lat=1), ds.isel(lat=[2, 1])):
        with pytest.raises(ModelError, match=r"'a' has draws of shape .*xr_aimz\.plate"):
            part.aimz.predict(fit)


def test_an_absent_outcome_leaves_its_dims_to_be_said():
    def model(X, y=None):
        with numpyro.plate("feature", X.shape[-1]):
            b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("data", X.shape[0]):
            numpyro.sample("y", dist.Normal(X @ b, 1e-3), obs=y)

    ds = xr.Dataset({"X": (("time", "feature"), np.ones((4, 6)))}, {"time": np.arange(4)})
    draws = {"b": np.ones((1, 2, 6))}
    with pytest.raises(DimensionError, match=r"\['feature', 'time'\].*dim=\(\.\.\.\)"):
        ds.aimz.from_posterior(model, draws)
    fit = ds.aimz.from_posterior(model, draws, dim="time")
    pred = ds.chunk(feature=2).aimz.predict(fit).y
    np.testing.assert_allclose(pred, 6, atol=0.01)


def test_an_input_may_lose_a_dimension_that_the_result_keeps():
    ds = xr.Dataset(
        {n: (("time", "lat"), np.ones((4, 3))) for n in "xy"},
        {"time": np.arange(4), "lat": np.arange(3)},
    )
    fit = ds.aimz.from_posterior(line, ONES)
    for x in (("time", np.arange(4.0)), ((), 2.0)):
        mu = ds.assign(x=x).aimz.predict(fit).mu
        assert mu.shape == mu.values.shape == (1, 2, 4, 3)
        np.testing.assert_allclose(mu.sel(lat=2)[0, 0], np.broadcast_to(np.asarray(x[1]), 4))


def test_results_of_one_name_are_refused(ds):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("obs", dist.Normal(numpyro.deterministic("y", b * x), 1.0), obs=y)

    with pytest.raises(ModelError, match="'y' and 'obs' would both be called 'y'"):
        ds.aimz.from_posterior(model, ONES)


def test_a_param_without_its_value_is_refused(ds):
    def model(x, y=None):
        a = numpyro.param("a", 0.5)
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(numpyro.deterministic("mu", a + b * x), 1.0), obs=y)

    with pytest.raises(ModelError, match=r"\['a'\] would be left at their initial values"):
        ds.aimz.from_posterior(model, ONES)
    fit = ds.aimz.from_posterior(model, ONES, params={"a": np.float32(3)})
    np.testing.assert_allclose(first(ds.aimz.predict(fit).mu), 3 + T)


def test_a_copy_with_other_draws_is_another_fit(ds):
    fit = ds.aimz.from_posterior(line, ONES)
    triple = dataclasses.replace(fit, posterior=fit.posterior * 3)
    difference = ds.aimz.predict(triple).mu - ds.aimz.predict(fit).mu
    np.testing.assert_allclose(first(difference), 2 * T)


def test_draws_need_labels_of_their_own(ds):
    twice = xr.Dataset({"b": (("chain", "draw"), np.ones((2, 1)))}, {"chain": [0, 0]})
    with pytest.raises(LabelError, match="duplicate labels of 'chain'"):
        ds.aimz.from_posterior(line, twice)


def test_one_chain_selected_is_a_posterior_too(ds):
    fit = ds.aimz.from_posterior(line, {"b": np.ones((2, 3))})
    part = ds.aimz.from_posterior(line, fit.posterior.isel(chain=1))
    whole = ds.aimz.predict(fit).y.compute()
    xr.testing.assert_allclose(ds.aimz.predict(part).y.compute(), whole.isel(chain=[1]))


def test_an_array_without_labels_is_no_constant(ds):
    with pytest.raises(BindingError, match=r"'x'.*without labels, as long as 'time'"):
        ds.aimz.from_posterior(line, ONES, {"x": T})


def test_a_site_that_only_a_prediction_has_is_named(ds):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y" if y is not None else "other", dist.Normal(b * x, 1.0), obs=y)

    fit = ds.aimz.from_posterior(model, ONES)
    with pytest.raises(ModelError, match="'other'"):
        ds.aimz.predict(fit)


def test_what_came_from_a_store_can_be_stored(ds, tmp_path):
    stored = ds.assign_coords(area=("time", T)).chunk(time=4)
    stored.to_zarr(tmp_path / "in.zarr", zarr_format=2)
    opened = xr.open_zarr(tmp_path / "in.zarr").chunk(time=3)
    fit = ds.aimz.from_posterior(line, ONES)
    written = opened.aimz.predict(fit).aimz.to_zarr(tmp_path / "out.zarr", progress=False)
    np.testing.assert_allclose(first(written.mu), T)
    np.testing.assert_allclose(written.area, T)
