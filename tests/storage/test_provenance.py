"""Every result says which fit, seed and versions it comes from, and stores keep that."""

from dataclasses import replace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@pytest.fixture(scope="module")
def ds():
    x = np.linspace(-1, 1, 12)
    variables = {"x": ("time", x), "y": ("time", 2 * x, {"units": "mm"})}
    return xr.Dataset(variables, attrs={"title": "a Dataset"})


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.from_posterior(line, {"slope": np.linspace(1, 2, 10).reshape(2, 5)})


@pytest.fixture(scope="module")
def results(ds, fit):
    return {
        "predict": ds.aimz.predict(fit, seed=3),
        "summary": ds.aimz.predict(fit, seed=3, summary="mean"),
        "after": ds.aimz.predict(fit, seed=3).aimz.summary("mean"),
        "intervene": ds.aimz.intervene(fit, {"x": 0.0}, seed=3),
        "log_likelihood": ds.aimz.log_likelihood(fit),
        "prior_predictive": ds.aimz.prior_predictive(line, draws=5, seed=3),
    }


def test_results_carry_the_fit_the_seed_and_versions(results, fit):
    for name, result in results.items():
        assert result.attrs["title"] == "a Dataset"
        assert f"jax {jax.__version__}" in result.attrs["aimz_versions"].split(", ")
        assert f"xr_aimz {xr_aimz.__version__}" in result.attrs["aimz_versions"].split(", ")
        # Nothing stands behind a prior but the model; and a density is not drawn.
        assert result.attrs.get("aimz_fit") == (None if name.startswith("prior") else fit.token)
        assert result.attrs.get("aimz_seed") == (None if name.startswith("log") else 3)


def test_attrs_of_variables_are_as_they_were(results):
    assert results["predict"].y.attrs == {"units": "mm"}
    assert "aimz_fit" not in results["summary"].y_mean.attrs


def test_lineage_goes_with_every_result(ds, fit):
    tracked = replace(fit, lineage={"mlflow_run_id": "abc"})
    for result in (
        ds.aimz.predict(tracked),
        ds.aimz.intervene(tracked, {"x": 0.0}),
        ds.aimz.log_likelihood(tracked),
    ):
        assert result.attrs["mlflow_run_id"] == "abc"
    assert "mlflow_run_id" not in ds.aimz.predict(fit).attrs


def test_a_result_as_input_leaves_its_own_lineage_behind(ds, fit):
    other = ds.aimz.from_posterior(line, {"slope": np.zeros((1, 4))})
    first = ds.assign_attrs(ds.aimz.predict(other, seed=9).attrs)
    assert first.aimz.predict(fit, seed=3).attrs["aimz_fit"] == fit.token
    assert "aimz_seed" not in first.aimz.log_likelihood(fit).attrs
    assert "aimz_fit" not in first.aimz.prior_predictive(line, draws=5).attrs


def test_stores_keep_it_and_equal_runs_resume(ds, fit, tmp_path):
    tracked = replace(fit, lineage={"mlflow_run_id": "abc"})
    pred = ds.chunk(time=4).aimz.predict(tracked, seed=3)
    stored = pred.aimz.to_zarr(tmp_path / "pred.zarr", progress=False)
    assert stored.attrs == pred.attrs
    assert stored.attrs["mlflow_run_id"] == "abc"
    assert xr.open_zarr(tmp_path / "pred.zarr").attrs["aimz_fit"] == fit.token
    # The same prediction again: nothing in its attrs makes it another one.
    again = ds.chunk(time=4).aimz.predict(tracked, seed=3)
    whole = again.aimz.to_zarr(tmp_path / "pred.zarr", progress=False)
    assert whole.attrs == {**again.attrs, "history": pred.attrs["history"]}


def test_netcdf_keeps_it(ds, fit, tmp_path):
    pred = ds.aimz.predict(fit, seed=3).compute()
    pred.to_netcdf(tmp_path / "pred.nc", engine="netcdf4")
    with xr.open_dataset(tmp_path / "pred.nc") as back:
        assert back.attrs["aimz_fit"] == fit.token
        assert back.attrs["aimz_seed"] == 3


def test_a_result_of_a_result_names_its_own_run_alone(ds, fit):
    tracked = ds.aimz.predict(replace(fit, lineage={"mlflow_run_id": "first"}))
    assert tracked.attrs["mlflow_run_id"] == "first"
    again = ds.assign_attrs(tracked.attrs).aimz.predict(fit)
    assert "mlflow_run_id" not in again.attrs
    assert "aimz_lineage" not in again.attrs


def test_a_store_is_resumed_whatever_tracked_the_fit(ds, fit, tmp_path):
    whole = ds.aimz.predict(fit).aimz.to_zarr(tmp_path / "p.zarr", progress=False)
    tracked = replace(fit, lineage={"mlflow_run_id": "first"})
    again = ds.aimz.predict(tracked).aimz.to_zarr(tmp_path / "p.zarr", progress=False)
    xr.testing.assert_equal(whole, again)
