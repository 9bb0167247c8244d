"""What is made of a fit before any of it is sent: no server here."""

import json
import os
import threading
import time
from dataclasses import replace

import dask
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.fits.configuration import model_reference
from xr_aimz.mlflow import artifacts
from xr_aimz.mlflow.artifacts import (
    artifact_writers,
    entry_table,
    installed_packages,
    variable_table,
)
from xr_aimz.mlflow.run_data import (
    chain_diagnostics,
    describe_data,
    fit_metrics,
    fit_params,
    fit_tags,
    loss_curves,
    truncated_text,
    valid_key,
)
from xr_aimz.mlflow.runs import TrackingCalls, short_timeouts


def level(y=None, more=1.0):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with xr_aimz.plate("t"):
        numpyro.sample("y", dist.Normal(mu, more), obs=y)


@pytest.fixture(scope="module")
def cells():
    """A fit in each of 30 cells, one of them without data."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(20, 30))
    y[:, 3] = np.nan
    ds = xr.Dataset({"y": (("t", "cell"), y)}, {"cell": np.arange(30) * 10})
    return ds.aimz.fit(level, per="cell", method="svi", steps=1500, draws=50)


def posterior(**shapes):
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            name: (("chain", "draw", *(f"{name}_{i}" for i in range(len(shape)))), values)
            for name, shape in shapes.items()
            for values in [rng.normal(size=(2, 50, *shape))]
        }
    )


def test_parameters_are_flat_texts(line):
    _, fit = line
    found = fit_params(fit)
    assert found["method"] == "nuts"
    assert found["chains"] == "2"
    assert found["warmup"] == "500"
    assert found["seed"] == "0"
    assert found["argument.X"] == "x,z"
    assert found["dim"] == "row"
    assert found["size.row"] == "40"
    assert "per" not in found
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.slow
def test_a_constant_is_a_parameter():
    ds = xr.Dataset({"y": ("t", np.zeros(5))})
    fit = ds.aimz.fit(level, {"more": 2.5}, method="laplace", draws=200)
    assert fit_params(fit)["argument.more"] == "2.5"


@pytest.mark.parametrize("name", ["lat/lon (deg)", "é" * 300, "a" * 300, "..", "x\ny", "../up"])
def test_keys_are_what_a_server_takes(name):
    from mlflow.entities import Param
    from mlflow.utils.validation import _validate_metric_name, _validate_param_keys_unique

    _validate_metric_name(valid_key(name))
    _validate_param_keys_unique([Param(valid_key(name), "1"), Param(valid_key(name + "2"), "1")])
    assert len(valid_key(name)) <= 250


def test_text_is_cut_and_says_so():
    assert truncated_text("a" * 10, 10) == "a" * 10
    assert truncated_text("a" * 11, 10) == "aaaaaaa..."
    assert truncated_text(["lat", "lon"], 20) == "lat,lon"
    assert truncated_text([{"a": 1}], 20) == '[{"a": 1}]'


def test_a_fit_that_was_saved_and_loaded_is_logged_as_it_was(line, tmp_path):
    _, fit = line
    fit.save(tmp_path / "fit.zarr")
    loaded = xr_aimz.load_fit(tmp_path / "fit.zarr", fit.model)
    assert fit_params(loaded) == fit_params(fit)
    assert fit_tags(loaded) == fit_tags(fit)
    assert describe_data(loaded).digest == describe_data(fit).digest


def test_tags_say_what_the_model_was(line):
    _, fit = line
    found = fit_tags(fit)
    assert found["xr_aimz.fit"] == fit.token
    assert found["xr_aimz.version.jax"] == fit.versions["jax"]
    assert found["xr_aimz.concerns"] == "none"
    assert found["xr_aimz.model_sha256"] == model_reference(fit.model)["sha256"]


def test_a_model_without_source_has_no_hash_and_no_file(line):
    space = {}
    exec("def made(y=None): pass", space)
    fit = replace(line[1], model=space["made"])
    assert "xr_aimz.model_sha256" not in fit_tags(fit)
    assert "model.py" not in dict(artifact_writers(fit, None, None, pictures=False))


def test_a_short_curve_is_whole():
    losses = xr.DataArray(np.array([5.0, 3.0, 2.0]), dims="step", coords={"step": [9, 19, 29]})
    (curve,) = loss_curves(losses)
    assert curve.every == 1
    np.testing.assert_array_equal(curve.steps, [9, 19, 29])
    np.testing.assert_array_equal(curve.values, [5, 3, 2])


def test_a_long_curve_is_means_over_runs_of_steps():
    losses = xr.DataArray(np.arange(2503.0), dims="step")
    (curve,) = loss_curves(losses)
    assert curve.every == 3
    assert len(curve.values) == 835
    np.testing.assert_array_equal(curve.values[:2], [1, 4])
    np.testing.assert_array_equal(curve.steps[:2], [2, 5])
    # The last run has one step only.
    assert (curve.steps[-1], curve.values[-1]) == (2502, 2502)


def test_curves_of_cells_are_quantiles_and_no_more(cells):
    found = {c.name: c for c in loss_curves(cells.losses, points=40)}
    assert set(found) == {"loss_median", "loss_q05", "loss_q95"}
    assert all(len(c.values) <= 40 for c in found.values())
    every = found["loss_median"].every
    first = cells.losses.isel(step=slice(every)).mean("step").dropna("cell")
    assert every > 1
    assert first.size == 29
    median = np.quantile(first, 0.5, method="nearest")
    np.testing.assert_allclose(found["loss_median"].values[0], median, rtol=1e-6)


def test_a_loss_that_was_lost_in_a_cell_is_the_worst():
    values = np.array([[1.0, 2.0, np.nan], [1.0, np.inf, np.nan]])
    losses = xr.DataArray(values, dims=("step", "cell"))
    found = {c.name: c.values for c in loss_curves(losses)}
    np.testing.assert_array_equal(found["loss_q95"], [2, np.inf])


def test_measures_are_the_worst_diagnostics(line):
    _, fit = line
    table = fit.diagnostics()
    found = fit_metrics(fit, chain_diagnostics(fit))
    assert found["rhat_max"] == float(table.w.sel(diagnostic="rhat").max())
    assert found["ess_bulk_min"] == float(table.w.sel(diagnostic="ess_bulk").min())
    assert found["divergences"] == int(fit.sample_stats.diverging.sum())
    assert found["concerns"] == 0


def test_measures_of_cells_are_counts(cells):
    found = fit_metrics(cells, chain_diagnostics(cells))
    assert found["cells"] == 30
    assert found["cells_no_data"] == 1
    assert found["cells_ok"] == 29
    # Draws of a guide are independent: R-hat of them says nothing.
    assert "rhat_max" not in found
    assert len(found) < 15


def test_the_table_has_the_figures_of_each_entry(line):
    _, fit = line
    frame = entry_table(fit.posterior, chain_diagnostics(fit))
    assert list(frame.index) == ["w[feature=x]", "w[feature=z]"]
    draws = fit.posterior.w.sel(feature="z").values
    row = frame.loc["w[feature=z]"]
    np.testing.assert_allclose(row["mean"], draws.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["sd"], draws.std(), rtol=1e-5)
    np.testing.assert_allclose(row["q0.95"], np.quantile(draws, 0.95), rtol=1e-5)
    assert row["rhat"] == float(fit.diagnostics().w.sel(feature="z", diagnostic="rhat"))


def test_the_table_is_bounded():
    draws = posterior(small=(), middle=(30,), large=(40, 40))
    frame = entry_table(draws, xr.Dataset(), limit=100)
    assert len(frame) == 31
    rows = variable_table(draws, xr.Dataset(), limit=100)
    assert list(rows.index) == ["small", "middle", "large"]
    assert list(rows.listed) == [True, True, False]
    assert rows.loc["large", "entries"] == 1600
    means = draws.large.mean(("chain", "draw"))
    np.testing.assert_allclose(rows.loc["large", "mean_max"], means.max())


def test_tables_of_draws_that_are_lazy_and_partly_missing(cells):
    lazy = cells.posterior.chunk(cell=10)
    rows = variable_table(lazy, xr.Dataset())
    means = cells.posterior.mu.mean(("chain", "draw"), skipna=False)
    np.testing.assert_allclose(rows.loc["mu", "mean_median"], np.nanmedian(means), rtol=1e-5)
    frame = entry_table(lazy, xr.Dataset())
    assert np.isnan(frame.loc["mu[cell=30]", "mean"])


def refuse(dsk, keys, **options):
    raise AssertionError("data were loaded")


@pytest.mark.slow
def test_a_digest_is_of_content():
    ds = xr.Dataset({"y": ("t", np.arange(5.0))}, {"t": pd.date_range("2000", periods=5)})
    one, other = (
        describe_data(d.aimz.fit(level, method="laplace", draws=200)) for d in (ds, ds.copy())
    )
    assert one.digest == other.digest
    assert one.of == "content"
    assert one.name == "y"
    for changed in (ds + 1, ds.assign_coords(t=ds.t + np.timedelta64(1, "D"))):
        assert (
            describe_data(changed.aimz.fit(level, method="laplace", draws=200)).digest
            != one.digest
        )
    json.dumps(one.variables)


def test_lazy_data_are_not_loaded_for_a_digest(tmp_path):
    path = tmp_path / "data.nc"
    xr.Dataset({"y": ("t", np.arange(6.0))}).to_netcdf(path)
    found = {}
    for name, chunks in (("dask", {"t": 3}), ("file", None)):
        with xr.open_dataset(path, chunks=chunks) as ds:
            fit = ds.aimz.fit(level, method="laplace", draws=200)
            with dask.config.set(scheduler=refuse):
                found[name] = describe_data(fit)
                # The same file opened once more is the same data.
                with xr.open_dataset(path, chunks=chunks) as again:
                    same = xr.Dataset({"y": again.y})
                    assert describe_data(_with(fit, same)).digest == found[name].digest
            assert not fit.observed_data.y.variable._in_memory
    assert found["dask"].of == "dask graph"
    assert found["file"].of == "file name, size and time"


def _with(fit, observed):
    return replace(fit, observed_data=observed)


def test_pictures_leave_pyplot_alone(line, cells):
    before, backend = plt.figure(), plt.get_backend()
    _, fit = line
    for one, expected in ((fit, "trace.png"), (cells, "loss.png")):
        name, draw = artifacts.figure(one)
        assert name == expected
        assert draw().startswith(b"\x89PNG")
    assert plt.get_fignums() == [before.number]
    assert plt.gcf() is before
    assert not before.axes
    assert plt.get_backend() == backend
    plt.close(before)


def test_files_are_bounded_and_whole(cells):
    made = {
        n: make()
        for n, make in artifact_writers(cells, chain_diagnostics(cells), None, pictures=True)
    }
    assert set(made) == {
        "fit.json",
        "loss.png",
        "model.py",
        "posterior.csv",
        "posterior_variables.csv",
        "requirements.txt",
    }
    assert json.loads(made["fit.json"])["per"] == ["cell"]
    assert made["model.py"].decode() == model_reference(level)["source"]
    assert f"xarray=={xr.__version__}\n" in installed_packages()


def test_patience_leaves_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    inside, leave = threading.Barrier(2), threading.Event()
    during = []

    def other():
        with short_timeouts():
            inside.wait()
            leave.wait()
            during.append(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])

    thread = threading.Thread(target=other)
    with short_timeouts():
        thread.start()
        inside.wait()
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    leave.set()
    thread.join()
    assert during == ["2"]
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_attempts_end_when_failures_have_taken_too_long():
    attempts, calls = TrackingCalls(lost=0.02), []

    def fails():
        calls.append("called")
        time.sleep(0.03)
        raise OSError("gone")

    assert attempts("one", lambda: 1) == 1
    assert attempts("two", fails) is None
    assert attempts("three", fails) is None
    assert attempts.always("four", fails) is None
    assert calls == ["called"] * 2
    assert (
        attempts.said() == "two: OSError: gone; four: OSError: gone; not tried after that: three"
    )
