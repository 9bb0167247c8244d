"""Draws and names of graphs that no change of the code may change."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import ordinary_models
import pytest
import xarray as xr

PINS = json.loads((Path(__file__).parents[1] / "data/pins.json").read_text("utf8"))


@pytest.mark.parametrize("name", PINS["models"])
def test_draws_and_names_are_pinned(name):
    model, split, options = ordinary_models.MODELS[name]
    ds = ordinary_models.DS.chunk(dict.fromkeys(split, 3))
    pred = ds.aimz.prior_predictive(model, draws=2, seed=11, **options)
    assert isinstance(pred, xr.Dataset)
    if jax.__version__ == PINS["jax"]:
        # Of another version a program may have other operations, and so another name.
        assert {n: a.data.name for n, a in pred.items()} == PINS["models"][name]["names"]
    corners = pred.isel({d: [0, -1] for d in pred.dims if d in ("time", "lat")}).compute()
    for variable, values in PINS["models"][name]["draws"].items():
        np.testing.assert_allclose(
            np.asarray(corners[variable], float).ravel(), values, rtol=2e-4, atol=2e-4
        )


def count_through_latent(x, a=None, n=None):
    slope = numpyro.sample("s", dist.Normal(0, 1))
    a = numpyro.sample("a", dist.Normal(slope * x, 1), obs=a)
    numpyro.sample("n", dist.Poisson(jnp.exp(a)), obs=n)


@pytest.mark.skipif(jax.__version__ != PINS["jax"], reason="another version has other programs")
def test_names_of_predictions_that_check_lazy_inputs_are_pinned():
    t = np.arange(6.0)
    values = {"x": ("time", t / 6), "a": ("time", t / 6), "n": ("time", np.arange(6))}
    ds = xr.Dataset(values, {"time": range(6)})
    fit = ds.aimz.from_posterior(count_through_latent, {"s": np.ones((1, 3))})
    past = ds.a.where(ds.time < 3)
    names = [
        ds[["x"]].chunk(time=3).aimz.predict(fit, sites="n", **options).n.data.name
        for options in (
            {"condition": {"a": past.chunk(time=3)}},
            {"condition": {"a": past}},
            {},
            {"do": {"x": ds.x.where(ds.time < 2)}},
        )
    ]
    assert names == PINS["checked"]
