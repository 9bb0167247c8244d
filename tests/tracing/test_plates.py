"""Plates for dimensions of the Dataset, and for the axis of stacked variables."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.errors import DimensionError

RNG = np.random.default_rng(0)
DS = xr.Dataset(
    {n: (("time", "lat"), RNG.normal(size=(4, 3))) for n in "uvy"},
    {"time": range(4), "lat": [50, 60, 70]},
)


def regression(X, y=None):
    with xr_aimz.plate("feature"):
        w = numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal((X * w).sum(-1), 0.1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["grid", "table"])
def test_the_axis_of_stacked_variables_is_a_dimension(layout):
    draws = {"w": np.array([[[2.0, 3.0]]])}
    fit = DS.aimz.from_posterior(regression, draws, {"X": ["u", "v"]}, layout=layout)
    assert fit.posterior.w.dims == ("chain", "draw", "feature")
    assert fit.posterior.feature.values.tolist() == ["u", "v"]
    pred = DS.chunk(time=2).aimz.predict(fit)
    noise = (pred.y - 2 * DS.u - 3 * DS.v) / 0.1
    assert np.abs(noise).max() < 5
    fitted = DS.aimz.fit(
        regression, {"X": ["u", "v"]}, layout=layout, method="laplace", draws=400, progress=False
    )
    assert fitted.posterior.w.sizes["feature"] == 2


@pytest.mark.slow
def test_it_is_one_in_each_cell_too():
    fit = DS.aimz.fit(
        regression, {"X": ["u", "v"]}, per="lat", method="laplace", draws=400, progress=False
    )
    assert fit.posterior.w.dims == ("chain", "draw", "lat", "feature")
    assert DS.aimz.predict(fit, draws=2).y.shape == (1, 2, 4, 3)


def two_stacks(X, Z, y=None):
    with xr_aimz.plate("feature"):
        w = numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal((X * w).sum(-1) + Z.sum(-1), 1), obs=y)


def test_stacks_of_one_length_share_it_and_others_do_not():
    assert "feature" in repr(DS.aimz.describe(two_stacks, {"X": ["u", "v"], "Z": ["v", "u"]}))
    with pytest.raises(DimensionError, match=r"'feature'.*\{'X': 2, 'Z': 1\}.*numpyro\.plate"):
        DS.aimz.describe(two_stacks, {"X": ["u", "v"], "Z": ["u"]})


def test_a_dimension_of_that_name_is_the_datasets_or_ambiguous():
    def model(x, y=None):
        with xr_aimz.plate("feature"):
            w = numpyro.sample("w", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal((x * w).sum(-1), 1), obs=y)

    own = DS.assign(x=(("time", "lat", "feature"), np.ones((4, 3, 5))))
    assert "feature" in repr(own.aimz.describe(model))
    with pytest.raises(DimensionError, match=r"'feature' may mean|of size 5.*\{'X': 2\}"):
        own.aimz.describe(regression, {"X": ["u", "v"]})


def test_without_a_stack_it_is_no_dimension():
    def model(u, y=None):
        with xr_aimz.plate("feature"):
            numpyro.sample("w", dist.Normal(0, 1))

    with pytest.raises(DimensionError, match=r"no dimension 'feature'.*\['lat', 'time'\]"):
        DS.aimz.describe(model)


def test_a_dimension_of_per_is_said_to_be_one():
    def model(u, y=None):
        with xr_aimz.plate("lat"):
            level = numpyro.sample("level", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(level + u, 1), obs=y)

    match = r"'lat' is in per=\('lat',\).*leave the plate out"
    for verb in ("fit", "describe"):
        with pytest.raises(DimensionError, match=match):
            getattr(DS.aimz, verb)(model, per="lat")


def test_a_misspelled_dimension_is_told_which_is_meant():
    def model(u, y=None):
        with xr_aimz.plate("tiem"):
            numpyro.sample("y", dist.Normal(jnp.sum(u), 1), obs=y)

    with pytest.raises(DimensionError, match=r"did you mean 'time' by 'tiem'"):
        DS.aimz.describe(model)
