"""Laplace's approximation against closed forms, and what has no mode."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import strategies
import xarray as xr
from scipy.stats import norm

from xr_aimz.errors import ModelError, OptionError


def test_a_gaussian_posterior_is_its_own_approximation(line):
    ds, _ = line
    fit = ds.aimz.fit(
        strategies.regression, {"X": ["x", "z"]}, method="laplace", draws=20_000, progress=False
    )
    design = np.stack([ds.x, ds.z], 1)
    covariance = np.linalg.inv(design.T @ design / strategies.NOISE**2 + np.eye(2) / 4)
    mean = covariance @ design.T @ ds.y.values / strategies.NOISE**2
    draws = fit.posterior.w.isel(chain=0).values
    sd = np.sqrt(np.diag(covariance))
    # 20 000 independent draws: 0.007 sd of Monte Carlo error in the mean, 0.005 in the sd.
    np.testing.assert_allclose(draws.mean(0) / sd, mean / sd, atol=0.03)
    np.testing.assert_allclose(np.cov(draws.T) / covariance[0, 0], covariance / covariance[0, 0],
                               atol=0.04)  # fmt: skip
    assert fit.posterior.sizes["chain"] == 1


@pytest.mark.slow
def test_constraints_map_the_draws_back():
    """A Gamma is, by its logarithm, a mode log(k / rate) and a curvature k."""

    def waiting(y=None):
        rate = numpyro.sample("rate", dist.Gamma(20.0, 4.0))
        numpyro.sample("y", dist.Exponential(rate), obs=y)

    y = np.full(30, 0.2)
    ds = xr.Dataset({"y": ("n", y)})
    fit = ds.aimz.fit(waiting, method="laplace", draws=20_000, progress=False)
    shape, rate = 50.0, 4.0 + y.sum()
    expected = norm(np.log(shape / rate), shape**-0.5)
    logs = np.log(fit.posterior.rate.values.ravel())
    np.testing.assert_allclose(logs.mean(), expected.mean(), atol=4 * expected.std() / 20_000**0.5)
    np.testing.assert_allclose(logs.std(), expected.std(), rtol=0.03)


@pytest.mark.slow
def test_no_mode_is_an_error():
    def flat(y=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(a + 0 * b, 1), obs=y)

    ds = xr.Dataset({"y": ("n", np.zeros(3))})
    with pytest.raises(ModelError, match="no mode was found"):
        ds.aimz.fit(flat, method="laplace", progress=False)


def test_what_has_no_dense_curvature_is_refused():
    def coin(y=None):
        side = numpyro.sample("side", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(side, 1.0), obs=y)

    def wide(y=None):
        a = numpyro.sample("a", dist.Normal(0, 1).expand([5000]).to_event(1))
        numpyro.sample("y", dist.Normal(a.sum(), 1.0), obs=y)

    ds = xr.Dataset({"y": ("n", np.zeros(3))})
    with pytest.raises(ModelError, match="discrete"):
        ds.aimz.fit(coin, method="laplace", progress=False)
    with pytest.raises(ModelError, match="5000 latent values"):
        ds.aimz.fit(wide, method="laplace", progress=False)
    with pytest.raises(OptionError, match="does not take"):
        ds.aimz.fit(wide, method="laplace", steps=10, progress=False)
