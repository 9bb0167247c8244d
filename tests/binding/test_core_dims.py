"""Dimensions that a model couples, also where they are an event and no observation dimension."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.errors import ChunkError, DimensionError
from xr_aimz.mlflow.columns import table_schema

DRAWS = {"scale": np.array([[0.5, 1.0, 2.0]], np.float32)}
SPELLINGS = [{}, {"core_dim": "x"}, {"dim": "x"}, {"dim": "x", "core_dim": ("x",)}, {"dim": ()}]


def process(x, y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    near = jnp.exp(-0.5 * (x[:, None] - x[None, :]) ** 2)
    covariance = scale * near + 0.1 * jnp.eye(x.shape[0])
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(x.shape[0]), covariance), obs=y)


def processes(x, y=None):
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    near = jnp.exp(-0.5 * (x[:, None] - x[None, :]) ** 2)
    covariance = scale * near + 0.1 * jnp.eye(x.shape[0])
    with xr_aimz.plate("member"):
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(x.shape[0]), covariance), obs=y)


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    return xr.Dataset({"y": ("x", rng.normal(size=8))}, {"x": np.arange(8.0)})


@pytest.fixture
def several():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 8))
    return xr.Dataset({"y": (("member", "x"), values)}, {"member": range(6), "x": np.arange(8.0)})


@pytest.mark.parametrize("options", SPELLINGS)
def test_every_way_to_name_the_dimension_of_a_process_is_the_same(ds, options, tmp_path):
    plain = ds.aimz.from_posterior(process, DRAWS)
    fit = ds.aimz.from_posterior(process, DRAWS, **options)
    fit.save(tmp_path / "fit.zarr")
    for one in (fit, xr_aimz.load_fit(tmp_path / "fit.zarr", process)):
        xr.testing.assert_identical(
            ds.aimz.predict(one).y.compute(), ds.aimz.predict(plain).y.compute()
        )
        density = ds.aimz.log_likelihood(one).y
        assert density.dims == ("chain", "draw")
        xr.testing.assert_identical(density.compute(), ds.aimz.log_likelihood(plain).y.compute())
        assert one.binding.core_dims == fit.binding.core_dims


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
def test_a_process_is_fitted_with_its_core_dim(ds):
    fits = [
        ds.aimz.fit(process, draws=20, warmup=20, chains=1, progress=False, **options)
        for options in ({}, {"core_dim": "x"})
    ]
    np.testing.assert_array_equal(*(f.posterior.scale.values for f in fits))
    assert fits[1].options["core_dim"] == ["x"]


def test_an_event_dimension_that_is_a_core_dim_is_described_as_one(ds):
    shown = repr(ds.aimz.describe(process, core_dim="x"))
    assert any(line.split()[:3] == ["x", "8", "core"] for line in shown.splitlines())


def test_the_dims_around_an_event_are_still_cut(several):
    plain = several.aimz.from_posterior(processes, DRAWS)
    fit = several.aimz.from_posterior(processes, DRAWS, core_dim="x")
    assert fit.binding.dims == ("member",)
    chunked = several.chunk(member=2).aimz.predict(fit).y
    assert chunked.chunksizes["member"] == (2, 2, 2)
    xr.testing.assert_allclose(chunked.compute(), several.aimz.predict(plain).y.compute())
    # A table has a column for each observation dimension, and none for an event.
    assert table_schema(fit).core_dims == ()
    with pytest.raises(ChunkError, match=r"core_dim \['x'\]"):
        several.chunk(x=4).aimz.log_likelihood(fit)


def test_a_core_dim_that_is_nowhere_is_refused(ds):
    with pytest.raises(DimensionError, match=r"\['time'\].*\['x'\]"):
        ds.aimz.fit(process, core_dim="time")
