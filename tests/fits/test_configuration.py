"""How a fit was made is recorded as text and numbers, with the defaults that acted."""

import json

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from numpyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import xr_aimz
from xr_aimz.fits.configuration import jsonable

# Short fits: what they come to is not looked at.
pytestmark = pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


def trend(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 40)
    return xr.Dataset({"x": ("time", x), "y": ("time", 2 * x + rng.normal(size=40))})


@pytest.mark.slow
def test_defaults_are_recorded_as_they_acted(ds):
    fit = ds.aimz.fit(line, progress=False)
    told = {"method": "nuts", "draws": 1000, "chains": 4, "warmup": 1000, "seed": 0}
    assert told.items() <= fit.options.items()
    assert (fit.posterior.sizes["chain"], fit.posterior.sizes["draw"]) == (4, 1000)
    assert "4 chains, 1000 warmup steps" in fit.method
    assert fit.options["dim"] == ["time"]
    assert fit.options["per"] == []
    assert fit.options["layout"] == "grid"


def test_the_defaults_of_variational_inference_are_those_that_acted(ds):
    fit = ds.aimz.fit(line, method="svi", progress=False)
    assert {"draws": 1000, "steps": 10_000, "optimizer": 0.05}.items() <= fit.options.items()
    assert (fit.losses.size, fit.posterior.sizes["draw"]) == (10_000, 1000)
    assert "chains" not in fit.options


def test_the_defaults_of_laplace_are_those_that_acted(ds):
    fit = ds.aimz.fit(line, method="laplace")
    assert (fit.options["draws"], fit.posterior.sizes["draw"]) == (1000, 1000)
    assert "steps" not in fit.options


def test_objects_are_recorded_by_name_and_settings(ds):
    kernel = NUTS(line, target_accept_prob=0.9)
    fit = ds.aimz.fit(line, method=kernel, draws=20, warmup=20, chains=1, progress=False)
    assert fit.options["method"] == "NUTS(target_accept_prob=0.9)"
    assert jsonable(MCMC(HMC(line), num_warmup=1, num_samples=1)) == "MCMC(HMC)"
    assert jsonable(init_to_median) == "init_to_median"
    assert jsonable(AutoMultivariateNormal) == "AutoMultivariateNormal"
    svi = SVI(line, AutoNormal(line), numpyro.optim.Adam(0.1), Trace_ELBO())
    assert jsonable(svi) == "SVI(AutoNormal, Adam)"
    for thing in (optax.adam(0.1), svi, jax.random.key(0), object(), lambda: 0, ds):
        # An address would make two equal fits look different.
        assert "0x" not in json.dumps(jsonable(thing))


@pytest.mark.slow
def test_an_mcmc_of_the_callers_tells_its_own_settings(ds):
    sampler = MCMC(NUTS(line), num_warmup=30, num_samples=40, num_chains=1, progress_bar=False)
    fit = ds.aimz.fit(line, method=sampler)
    assert {"draws": 40, "chains": 1, "warmup": 30}.items() <= fit.options.items()


@pytest.mark.slow
def test_two_equal_calls_leave_equal_records(ds):
    calls = [
        ds.aimz.fit(
            trend, method="svi", batch={"time": 10}, epochs=5, init={"slope": 1.0}, progress=False
        )
        for _ in range(2)
    ]
    assert json.dumps(calls[0].options) == json.dumps(calls[1].options)
    assert calls[0].options["batch"] == {"time": 10}
    assert "steps" not in calls[0].options
    assert calls[0].options["init"] == {"slope": 1.0}


def test_versions_are_those_of_the_packages(ds):
    fit = ds.aimz.fit(line, method="laplace")
    assert fit.versions["jax"] == jax.__version__
    assert fit.versions["numpyro"] == numpyro.__version__
    assert fit.versions["xr_aimz"] == xr_aimz.__version__
    assert {"python", "numpy", "xarray", "dask", "zarr"} <= set(fit.versions)


def test_draws_made_elsewhere_have_no_seed(ds):
    fit = ds.aimz.from_posterior(line, {"slope": np.zeros((2, 5))})
    assert fit.options["method"] == "draws made elsewhere"
    assert (fit.options["chains"], fit.options["draws"]) == (2, 5)
    assert "seed" not in fit.options
    assert fit.versions["jax"] == jax.__version__


def test_further_draws_say_what_they_are_drawn_from(ds):
    fit = ds.aimz.fit(line, method="svi", steps=200, progress=False)
    more = fit.sample(30, seed=5)
    assert (more.options["draws"], more.options["seed"]) == (30, 5)
    assert more.options["sampled_from"] == fit.token
    assert more.options["steps"] == 200
    assert more.versions == fit.versions
