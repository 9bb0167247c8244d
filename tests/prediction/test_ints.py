"""Inputs that were ints at the fit, with missing values now."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

LEVELS = np.array([10.0, 20.0, 30.0])


def indexed(group, y=None):
    level = numpyro.sample("level", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(level[group], 1e-3), obs=y)


def sloped(group, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * group, 1e-3), obs=y)


@pytest.fixture(scope="module")
def ds():
    values = {"group": ("time", [0, 1, 2, 1]), "y": ("time", np.zeros(4))}
    return xr.Dataset(values, {"time": range(4)})


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.from_posterior(indexed, {"level": np.tile(LEVELS, (1, 2, 1))})


@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_an_index_that_is_missing_is_named_before_any_task(ds, fit, chunks):
    gappy = ds.where(ds.time != 1)
    gappy = gappy if chunks is None else gappy.chunk(chunks)
    part = xr.full_like(ds.group, 1.0, float).where(ds.time < 2)
    for options in ({}, {"do": {"group": part}}):
        with pytest.raises(TypeError, match="integer") as caught:
            gappy.aimz.predict(fit, **options)
        assert "['group'] were ints at the fit" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("chunks", [None, {"time": 2}])
def test_an_index_that_is_replaced_may_be_missing(ds, fit, chunks):
    gappy = ds.where(ds.time != 1)
    gappy = gappy if chunks is None else gappy.chunk(chunks)
    levels = xr.DataArray([0, 2], {"set": [0, 2]}, "set")
    pred = gappy.aimz.predict(fit, do={"group": levels}).y
    np.testing.assert_allclose(pred, np.broadcast_to([[[10], [30]]], (1, 2, 2, 4)), atol=0.02)
    effect = gappy.aimz.intervene(fit, {"group": 2}, baseline={"group": 1}).y
    np.testing.assert_allclose(effect, 10, atol=1e-4)
    with pytest.raises(TypeError, match="integer"):
        gappy.aimz.intervene(fit, {"group": 2})


def test_a_model_that_takes_floats_takes_them(ds):
    fit = ds.aimz.from_posterior(sloped, {"slope": np.ones((1, 2))})
    pred = ds.where(ds.time != 1).aimz.predict(fit).y
    np.testing.assert_allclose(pred[0], [[0, np.nan, 2, 1]] * 2, atol=0.02)
