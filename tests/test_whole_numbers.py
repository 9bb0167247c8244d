"""Counts and seeds, of whatever type whole numbers have, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from strategies import assert_same

from xr_aimz.errors import OptionError
from xr_aimz.options import parse_count, parse_seed

THREES = [3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)]
NONE = [None, 3.0, "3", True, np.bool_(True), np.array([3]), jax.random.key(3), 1 + 0j]


def line(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x, 1), obs=y)


@pytest.fixture(scope="module")
def ds():
    return xr.Dataset({n: ("time", np.arange(4.0)) for n in "xy"}, {"time": range(4)})


@pytest.fixture(scope="module")
def fit(ds):
    return ds.aimz.fit(line, method="laplace", draws=400, progress=False)


@pytest.mark.parametrize("value", THREES, ids=lambda v: type(v).__name__)
def test_whole_numbers_of_any_type_are_taken(value):
    for found in (parse_count("draws", value), parse_seed(value)):
        assert type(found) is int
        assert found == 3


@pytest.mark.parametrize("value", NONE, ids=lambda v: type(v).__name__)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(OptionError, match=r"^draws=") as caught:
        parse_count("draws", value)
    assert " ".join(repr(value).split()) in str(caught.value)
    with pytest.raises(OptionError, match=r"^seed="):
        parse_seed(value)


def test_bounds():
    with pytest.raises(OptionError, match=r"warmup=-1: it must be an int of at least 0"):
        parse_count("warmup", -1, least=0)
    with pytest.raises(OptionError, match=r"draws=5: it must be an int from 1 to 4, for so"):
        parse_count("draws", 5, most=4, why=", for so")
    assert parse_seed(-(2**63)) == -(2**63)
    for far in (2**63, -(2**63) - 1):
        with pytest.raises(OptionError, match="64 bits"):
            parse_seed(far)


@pytest.mark.parametrize("kind", [np.int64, jnp.int32])
def test_every_call_takes_them(ds, fit, kind):
    two, seed = kind(2), kind(5)
    xr.testing.assert_identical(
        ds.aimz.predict(fit, draws=two, seed=seed).compute().drop_attrs(),
        ds.aimz.predict(fit, draws=2, seed=5).compute().drop_attrs(),
    )
    assert_same(ds.aimz.log_likelihood(fit, draws=two), ds.aimz.log_likelihood(fit, draws=2))
    effect = ds.aimz.intervene(fit, {"x": 1.0}, draws=two, seed=seed)
    assert effect.sizes["draw"] == 2
    assert effect.attrs["aimz_seed"] == ds.aimz.predict(fit, seed=5).attrs["aimz_seed"]
    prior = ds.aimz.prior_predictive(line, draws=two, seed=seed)
    assert_same(prior, ds.aimz.prior_predictive(line, draws=2, seed=5))
    again = ds.aimz.fit(line, method="laplace", draws=kind(400), seed=kind(0), progress=False)
    xr.testing.assert_identical(again.posterior, fit.posterior)
    assert fit.options == again.options


@pytest.mark.parametrize("seed", [None, jax.random.key(0), 1.5])
def test_a_seed_that_is_none_is_refused_by_every_call(ds, fit, seed):
    for call in (
        lambda: ds.aimz.fit(line, seed=seed),
        lambda: ds.aimz.fit(line, per="time", seed=seed),
        lambda: ds.aimz.predict(fit, seed=seed),
        lambda: ds.aimz.intervene(fit, {"x": 1.0}, seed=seed),
        lambda: ds.aimz.prior_predictive(line, seed=seed),
        lambda: fit.sample(3, seed=seed),
    ):
        with pytest.raises(OptionError, match=r"seed=.*int.*such as seed=0"):
            call()
