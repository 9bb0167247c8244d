"""Outcomes that are not in the Dataset, and models that do not run without theirs."""

import warnings

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan

import xr_aimz
from xr_aimz.errors import BindingError, ConvergenceWarning, ModelError

YEARS = np.arange(2000, 2010)
RNG = np.random.default_rng(0)


@pytest.fixture
def ds():
    values = {v: ("year", RNG.normal(size=10)) for v in ("rain", "flow")}
    return xr.Dataset(values, {"year": YEARS})


def line(rain, flow=None, scale=1.0):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("flow", dist.Normal(b * rain, scale), obs=flow)


def with_plate(rain, flow=None):
    with xr_aimz.plate("year"):
        numpyro.sample("flow", dist.Normal(rain, 1), obs=flow)


def two(rain, snow=None, flow=None):
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("snow", dist.Normal(m * rain, 1), obs=snow)
    numpyro.sample("flow", dist.Normal(m, 1).expand([10]), obs=flow)


def local_level(flow=None):
    """A model whose length only the outcome gives."""
    q = numpyro.sample("q", dist.HalfNormal(1))

    def step(before, now):
        state = numpyro.sample("state", dist.Normal(before, q))
        numpyro.sample("flow", dist.Normal(state, 1), obs=now)
        return state, None

    scan(step, 0.0, flow)


def sized(flow=None):
    """The same, by the remedy."""
    q = numpyro.sample("q", dist.HalfNormal(1))

    def step(before, now):
        state = numpyro.sample("state", dist.Normal(before, q))
        numpyro.sample("flow", dist.Normal(state, 1), obs=now)
        return state, None

    scan(step, 0.0, flow, length=xr_aimz.plate("year").size)


STATES = {"q": np.ones((1, 3)), "state": np.zeros((1, 3, 10))}


@pytest.mark.parametrize("verb", ["fit", "describe"])
@pytest.mark.parametrize(
    ("model", "absent", "meant"),
    [
        (line, {"flow": "discharge"}, None),
        (line, {"flow": "flwo"}, "flwo"),
        (line, {"flow": "Flow"}, "Flow"),
        (with_plate, {"flow": "flows"}, "flows"),
        (local_level, {"flow": "discharge"}, None),
    ],
)
def test_an_outcome_that_is_not_in_the_dataset_is_named(ds, verb, model, absent, meant):
    renamed = ds.rename(absent)
    match = r"'flow'.*variables=\{'flow': "
    with pytest.raises(BindingError, match=match) as caught:
        getattr(renamed.aimz, verb)(model)
    said = str(caught.value)
    assert model.__name__ in said
    assert meant is None or f"variables={{'flow': {meant!r}}}" in said
    # The remedy is one.
    (there,) = absent.values()
    assert "outcome" in repr(renamed.aimz.describe(model, {"flow": there}))


def test_a_dimension_that_the_outcome_would_have_hides_nothing(ds):
    # The dims of a Dataset without the outcome are others, and core_dim= was refused instead.
    with pytest.raises(BindingError, match="'flow'"):
        ds[["rain"]].mean("year").assign(b=ds.flow).aimz.fit(line, core_dim="year")


def test_one_outcome_of_two_that_is_misspelled_is_no_latent(ds):
    misspelled = ds.assign(snow=ds.rain).rename(flow="flwo")
    for verb in ("fit", "describe"):
        with pytest.raises(BindingError, match=r"'flow' of two.*'flwo'.*\{'flow': None\}"):
            getattr(misspelled.aimz, verb)(two)
    # Left out on purpose, it is a latent.
    assert "latent" in repr(misspelled.aimz.describe(two, {"flow": None}))
    assert "latent" in repr(misspelled.drop_vars("flwo").aimz.describe(two))


def test_an_optional_input_that_is_misspelled_is_not_left_out(ds):
    misspelled = ds.assign(scal=1.0)
    with pytest.raises(BindingError, match=r"'scale' of line.*1\.0.*'scal'"):
        misspelled.aimz.describe(line)
    assert "scal" in repr(misspelled.aimz.describe(line, {"scale": "scal"}))


@pytest.mark.parametrize("other", ["flow_max", "inflow", "year_of_flow"])
def test_a_name_that_only_resembles_is_no_slip(ds, other):
    assert "outcome" in repr(ds.rename(rain=other).aimz.describe(line, {"rain": other}))
    with_spare = ds.assign({other: ds.rain})
    assert "outcome" in repr(with_spare.aimz.describe(line))


# A model that does not run without its outcome.


def test_a_length_that_only_the_outcome_has_is_told(ds):
    fit = ds.aimz.from_posterior(local_level, STATES, core_dim="year")
    remedy = r"\['flow'\].*IndexError.*xr_aimz\.plate\('year'\)\.size"
    with pytest.raises(ModelError, match=remedy):
        ds.aimz.predict(fit)
    with pytest.raises(ModelError, match=remedy):
        ds.isel(year=slice(0, 4)).aimz.predict(fit)
    with pytest.raises(ModelError, match=remedy):
        ds.aimz.predict(fit, condition="flow")
    with pytest.raises(ModelError, match=remedy):
        ds.aimz.intervene(fit, {"q": 1.0})
    for shown in (ds.aimz.describe(local_level, core_dim="year"), ds.aimz.describe(fit)):
        assert "predict" in repr(shown)
        assert "xr_aimz.plate('year').size" in repr(shown)
    # What has the outcome works.
    assert ds.aimz.log_likelihood(fit).flow.shape == (1, 3, 10)


@pytest.mark.slow
def test_the_remedy_for_such_a_length_is_one(ds):
    assert "will not work" not in repr(ds.aimz.describe(sized, core_dim="year"))
    old = ds.aimz.from_posterior(local_level, STATES, core_dim="year")
    fit = ds.aimz.from_posterior(sized, old.posterior, core_dim="year")
    assert ds.drop_vars("flow").aimz.predict(fit).flow.shape == (1, 3, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = ds.aimz.fit(sized, core_dim="year", method="svi", steps=2, draws=2)
    assert ds.drop_vars("flow").aimz.predict(fitted).flow.shape == (1, 2, 10)


@pytest.mark.parametrize("verb", ["fit", "describe", "from_posterior"])
def test_a_part_of_an_outcome_is_refused_where_it_is_bound(ds, verb):
    def steps(rain, flow=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("change", dist.Normal(b * rain[1:], 1), obs=flow[1:])

    def logged(rain, flow=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("log_flow", dist.Normal(b * rain, 1), obs=jnp.log(flow))

    rest = ({"b": np.ones((1, 2))},) if verb == "from_posterior" else ()
    for model, site in ((steps, "change"), (logged, "log_flow")):
        match = rf"'{site}'.*outcome 'flow'.*None in a prediction.*shift\(year=1\).*is None else"
        with pytest.raises(ModelError, match=match):
            getattr(ds.aimz, verb)(model, *rest)


def test_the_remedy_for_a_part_of_an_outcome_is_one(ds):
    def steps(rain, flow=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        seen = None if flow is None else flow[1:]
        numpyro.sample("change", dist.Normal(b * rain[1:], 1), obs=seen)

    fit = ds.aimz.from_posterior(steps, {"b": np.ones((1, 2))})
    assert ds.aimz.predict(fit).change.shape == (1, 2, 9)

    def lagged(before, flow=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("flow", dist.Normal(b * before, 1), obs=flow)

    known = ds.assign(before=ds.flow.shift(year=1)).isel(year=slice(1, None))
    fit = known.aimz.from_posterior(lagged, {"b": np.ones((1, 2))})
    assert known.aimz.predict(fit).flow.shape == (1, 2, 9)


# A model that does not run on a block.


def test_sizes_that_are_no_blocks_are_told_with_site_and_block(ds):
    def fixed(rain, flow=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        offset = jnp.arange(10.0)
        numpyro.sample("flow", dist.Normal(b * rain + offset, 1), obs=flow)

    fit = ds.aimz.from_posterior(fixed, {"b": np.ones((1, 2))})
    assert ds.aimz.predict(fit).sizes["year"] == 10
    parts = (
        r"block of \{'year': 4\}.*\{'year': 10\}.*incompatible shapes.*site 'b'.*core_dim='year'"
    )
    for call in (
        lambda: ds.isel(year=slice(0, 4)).aimz.predict(fit),
        lambda: ds.chunk(year=4).aimz.predict(fit),
        lambda: ds.chunk(year=4).aimz.log_likelihood(fit),
    ):
        with pytest.raises(ModelError, match=parts) as caught:
            call()
        assert isinstance(caught.value.__cause__, TypeError)
    parts = r"batch of \{'year': 4\}.*\{'year': 10\}.*incompatible shapes.*site 'b'"
    with pytest.raises(ModelError, match=parts):
        ds.aimz.fit(fixed, method="svi", batch={"year": 4}, progress=False)


def test_a_model_that_fails_on_another_kind_of_input_says_so(ds):
    def positive(rain, flow=None):
        if rain.dtype == bool:
            raise RuntimeError("no rain")
        numpyro.sample("flow", dist.Normal(rain, 1), obs=flow)

    fit = ds.aimz.from_posterior(positive, {})
    with pytest.raises(ModelError, match=r"ran at the fit, does not run.*RuntimeError: no rain"):
        ds.assign(rain=ds.rain > 0).aimz.predict(fit)
