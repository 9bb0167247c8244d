"""A Dataset, a Fit and a model, where another of them belongs; and a Fit that is pickled."""

import pickle

import cloudpickle
import dask
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from strategies import assert_same

import xr_aimz
from xr_aimz.errors import ModelError, OptionError


def line(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x, 1), obs=y)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    return xr.Dataset({n: ("time", rng.normal(size=6)) for n in "xy"}, {"time": range(6)})


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.fit(line, method="laplace", draws=400, progress=False)


CALLS = {
    "predict": lambda ds, fit: xr_aimz.predict(ds, fit),
    "log_likelihood": lambda ds, fit: xr_aimz.log_likelihood(ds, fit),
    "intervene": lambda ds, fit: xr_aimz.intervene(ds, fit, {"x": 1.0}),
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize(
    ("other", "remedy"),
    [
        (line, r"'line', a function.*ds\.aimz\.fit\(line\)"),
        ({"b": 1.0}, r"\{'b': 1\.0\}, a dict.*from_posterior"),
        (xr.Dataset(), r"a Dataset.*from_posterior"),
        ("fit.zarr", r"'fit\.zarr', a str.*load_fit"),
        (None, r"None, a NoneType"),
    ],
    ids=["model", "dict", "dataset", "path", "nothing"],
)
def test_what_is_no_fit_is_refused_by_name(ds, verb, other, remedy):
    with pytest.raises(OptionError, match=rf"^{verb} takes a Fit; found .*{remedy}"):
        CALLS[verb](ds, other)


def test_what_is_no_dataset_is_refused_by_name(ds, fit):
    for verb, call in CALLS.items():
        with pytest.raises(OptionError, match=rf"^{verb} takes a Dataset first; found a Fit"):
            call(fit, ds)
    for verb in ("fit", "describe", "prior_predictive"):
        with pytest.raises(OptionError, match=rf"^{verb}.*a DataArray.*x\.to_dataset\(name='x'\)"):
            getattr(xr_aimz, verb)(ds.x, line)
        with pytest.raises(OptionError, match=rf"^{verb} takes a Dataset first; found 'line'"):
            getattr(xr_aimz, verb)(line, ds)
    with pytest.raises(OptionError, match=r"^summary takes a Dataset"):
        xr_aimz.summary(fit)
    with pytest.raises(OptionError, match=r"^from_posterior takes a Dataset"):
        xr_aimz.from_posterior(ds.x, line, {})


def test_a_fit_is_no_model(ds, fit):
    for call in (
        lambda: ds.aimz.fit(fit),
        lambda: ds.aimz.prior_predictive(fit),
        lambda: ds.aimz.from_posterior(fit, {}),
    ):
        with pytest.raises(OptionError, match=r"takes a model; found a Fit of line.*fit\.model"):
            call()
    with pytest.raises(ModelError, match="NumPyro callable"):
        ds.aimz.describe({"x": 1})


# Pickle.


def by(method, ds, **options):
    def local(x, y=None):
        slope = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

    return ds.aimz.fit(local, method=method, progress=False, **options)


METHODS = {
    "nuts": {"draws": 300, "warmup": 200, "chains": 2},
    "svi": {"steps": 2000, "draws": 400},
    "batches": {"steps": 2000, "draws": 400, "batch": 3, "method": "svi"},
    "cells": {"per": "time", "draws": 200, "method": "laplace"},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_fit_comes_back_from_pickle(ds, name, module):
    options = dict(METHODS[name])
    fit = by(options.pop("method", name), ds, **options)
    back = pickle.loads(module.dumps(fit))
    assert back.token == fit.token
    assert back.options == fit.options
    assert_same(ds.aimz.predict(back, draws=3), ds.aimz.predict(fit, draws=3))
    if fit.sampler is not None:
        with pytest.raises(OptionError, match=r"was pickled.*load_fit"):
            back.sample(3)
    # What it holds can be kept all the same.
    assert pickle.loads(pickle.dumps(back)).token == fit.token


@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
def test_a_pickled_fit_can_be_saved(ds, tmp_path):
    fit = by("svi", ds, steps=200, draws=10)
    back = pickle.loads(pickle.dumps(fit))
    back.save(tmp_path / "fit.zarr")
    assert xr_aimz.load_fit(tmp_path / "fit.zarr", fit.model).token == fit.token


def test_what_no_pickle_holds_is_told(ds):
    generator = (n for n in range(3))

    def stuck(x, y=None):
        assert generator
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    fit = ds.aimz.from_posterior(stuck, {})
    with pytest.raises(pickle.PicklingError, match=r"generator.*fit\.save\(store\).*load_fit"):
        pickle.dumps(fit)


@pytest.mark.slow
def test_a_graph_that_holds_a_fit_runs_in_other_processes(ds, fit):
    lazy = dask.delayed(lambda fit: float(fit.posterior.b.mean()))(fit)
    found = lazy.compute(scheduler="processes", num_workers=1)
    assert found == float(fit.posterior.b.mean())
