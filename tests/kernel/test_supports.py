"""Outcomes with values that their distribution cannot take are refused, and named."""

import warnings

import dask
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from numpyro.contrib.control_flow import scan

import xr_aimz
from xr_aimz.binding.bound import bind
from xr_aimz.errors import DtypeError, SupportError
from xr_aimz.kernel.spec import KernelSpec
from xr_aimz.kernel.supports import find_outcome_supports

DRAWS = {"rate": np.array([[1.0, 2.0]], np.float32)}
LABELS = {"time": np.arange(2000, 2006), "lat": [10.0, 20.0]}


def counted(y=None):
    rate = numpyro.sample("rate", dist.Gamma(2, 1))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def series(values):
    values = np.asarray(values)
    return xr.Dataset({"y": ("time", values)}, {"time": 2000 + np.arange(len(values))})


def broken(values=(1.0, 2.5, np.nan, -1.0)):
    return series(values)


OPTIONS = [
    {"draws": 5, "warmup": 5, "chains": 1},
    {"method": "svi", "steps": 5},
    {"method": "laplace"},
    {"method": "svi", "steps": 5, "batch": {"time": 2}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["nuts", "svi", "laplace", "batches"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_every_fit_names_the_variable_the_count_the_first_label_and_the_support(options, chunk):
    ds = broken() if chunk is None else broken().chunk(time=chunk)
    with pytest.raises(SupportError) as caught:
        ds.aimz.fit(counted, progress=False, **options)
    parts = ["'y'", "2 of 4", "2.5 at time=2001", "Poisson: whole numbers from 0 up"]
    assert [p for p in parts if p not in str(caught.value)] == []


@pytest.mark.slow
def test_batches_that_stream_are_looked_at_window_by_window():
    values = np.random.default_rng(0).poisson(2.0, 4096).astype(np.float32)
    values[3000] = 0.5
    ds = series(values).chunk(time=256)
    with (
        xr_aimz.set_options(block_bytes=4096),
        pytest.raises(SupportError, match=r"0\.5 at time=5000\."),
    ):
        ds.aimz.fit(
            counted, method="svi", batch={"time": 64}, epochs=2, draws=2, progress=False
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, {"lat": 1}])
def test_a_fit_of_every_cell_names_the_cell(chunks):
    values = np.ones((6, 2))
    values[3, 1] = 1.5
    ds = xr.Dataset({"y": (("time", "lat"), values)}, LABELS)
    ds = ds if chunks is None else ds.chunk(chunks)
    with pytest.raises(SupportError, match=r"1\.5 at lat=20\.0, time=2003\."):
        ds.aimz.fit(counted, per="lat", method="laplace", draws=2, progress=False)


def test_a_log_likelihood_refuses_them_at_once_in_memory_and_in_its_task_where_lazy():
    fit = series([1.0, 2.0]).aimz.from_posterior(counted, DRAWS)
    with pytest.raises(SupportError, match=r"2\.5 at time=2001\."):
        broken().aimz.log_likelihood(fit)
    lazy = broken().chunk(time=2).aimz.log_likelihood(fit)
    with pytest.raises(SupportError, match=r"1 of 2, the first -1\.0 at time=2003\."):
        lazy.isel(time=[2, 3]).compute()
    with dask.config.set(scheduler="synchronous"):
        good = broken([1.0, 3.0, np.nan, 0.0, 2.0]).chunk(time=3).aimz.log_likelihood(fit)
        assert bool(good.y.isel(time=2).isnull().all())


@pytest.mark.parametrize("chunks", [None, {"time": 1}])
def test_values_that_are_given_are_looked_at(chunks):
    ds = series([1.0, 2.0, 3.0])
    fit = ds.aimz.from_posterior(counted, DRAWS)
    value = xr.DataArray([1.0, np.nan, -2.0], {"time": ds.time}, "time")
    value = value if chunks is None else value.chunk(chunks)
    with pytest.raises(SupportError, match=r"condition='y' has .* -2\.0 at time=2002\."):
        ds.aimz.predict(fit, condition={"y": value}).compute()
    ds.aimz.predict(fit, condition={"y": ds.y.where(ds.time < 2002)}).compute()


def test_given_values_of_a_fit_with_per_name_their_cell():
    values = np.random.default_rng(0).poisson(2.0, (6, 2)).astype(float)
    ds = xr.Dataset({"y": (("time", "lat"), values)}, LABELS)
    fit = ds.aimz.fit(counted, per="lat", method="laplace", draws=2, progress=False)
    wrong = ds.y.where((ds.time != 2004) | (ds.lat != 20), -3.0)
    for one in (wrong, wrong.chunk(lat=1)):
        with pytest.raises(SupportError, match=r"-3\.0 at lat=20\.0, time=2004\."):
            ds.aimz.predict(fit, condition={"y": one}).compute()


# Of a model's outcome: its distribution of a positive latent, values, and the words of a refusal.
CASES = {
    "poisson": (dist.Poisson, [0.0, 3.0], [0.5], "whole numbers from 0 up"),
    "geometric": (lambda r: dist.GeometricLogits(r), [0, 3], [-1], "whole numbers from 0 up"),
    "negative binomial": (lambda r: dist.NegativeBinomial2(r, r), [0.0], [1.5], "from 0 up"),
    "zero inflated": (lambda r: dist.ZeroInflatedPoisson(0.5, r), [0.0], [1.5], "from 0 up"),
    "binomial": (lambda r: dist.Binomial(5, logits=r), [0, 5], [6, -1], "numbers from 0 to 5"),
    "bernoulli": (lambda r: dist.Bernoulli(logits=r), [0.0, 1.0], [2.0, 0.5], "0 and 1"),
    "bool": (lambda r: dist.Bernoulli(logits=r), [True, False], [], ""),
    "categorical": (
        lambda r: dist.Categorical(logits=jnp.zeros(3)), [0, 2], [3, -1], "from 0 to 2"
    ),
    "ordered": (
        lambda r: dist.OrderedLogistic(r, jnp.array([-1.0, 1.0])), [0, 2], [3], "from 0 to 2"
    ),
    "beta": (lambda r: dist.Beta(r, 1.0), [0.2, 1.0], [1.2], "numbers from 0 to 1"),
    "exponential": (dist.Exponential, [0.1], [-1.0, np.inf], "numbers above 0"),
    "gamma": (lambda r: dist.Gamma(r, 1.0), [0.1], [0.0], "numbers above 0"),
    "lognormal": (lambda r: dist.LogNormal(r, 1.0), [0.1], [-0.1], "numbers above 0"),
    "normal": (lambda r: dist.Normal(r, 1.0), [-5.0], [np.inf, -np.inf], "finite numbers"),
    "student": (lambda r: dist.StudentT(3.0, r), [-5.0], [np.inf], "finite numbers"),
    "uniform": (lambda r: dist.Uniform(2.0, 3.0), [2.0, 3.0], [1.9], "numbers from 2 to 3"),
    "truncated": (
        lambda r: dist.TruncatedNormal(r, 1.0, low=0.5), [0.5], [0.4], "numbers from 0.5 up"
    ),
    "von mises": (lambda r: dist.VonMises(0.0, r), [3.0], [4.0], "angles from -pi to pi"),
    "mixture": (
        lambda r: dist.MixtureSameFamily(
            dist.Categorical(logits=jnp.zeros(2)), dist.Poisson(jnp.stack([r, 2 * r]))
        ), [1.0], [1.5], "whole numbers from 0 up"
    ),
    "censored": (
        lambda r: dist.RightCensoredDistribution(dist.Weibull(r, 2.0), 1), [0.0, 0.1], [-0.1],
        "numbers from 0 up",
    ),
    "masked": (lambda r: dist.Poisson(r).mask(True), [1.0], [1.5], "whole numbers"),
    "expanded": (lambda r: dist.Poisson(r).expand([1]), [1.0], [1.5], "whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_numpyro_gives_no_density_is_refused_and_what_it_gives_one_is_not(case):
    make, good, bad, words = CASES[case]

    def model(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", make(rate), obs=y)

    fit = series(np.zeros(1, np.asarray(good).dtype)).aimz.from_posterior(model, DRAWS)
    series(good).aimz.log_likelihood(fit)
    for value in bad:
        with pytest.raises(SupportError) as caught:
            series([*good, value]).aimz.log_likelihood(fit)
        assert words in str(caught.value)
        assert f"1 of {len(good) + 1}, the first {value} at time=200{len(good)}." in str(
            caught.value
        )


@pytest.mark.slow
@given(
    values=st.lists(
        st.sampled_from([-1.0, 0.0, 0.25, 1.0, 2.0, 3.5, 7.0, np.inf, np.nan]),
        min_size=1,
        max_size=5,
    ),
    name=st.sampled_from(
        ["poisson", "binomial", "bernoulli", "beta", "gamma", "normal", "uniform"]
    ),
)
def test_the_verdict_is_numpyros_own(values, name):
    """Refused where NumPyro's density is minus infinity or none, at any rate."""
    make, data = CASES[name][0], np.array(values, np.float32)

    def model(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", make(rate), obs=y)

    ds = series(data)
    bound = bind(ds, model)
    program = KernelSpec(model, bound.binding, bound.sites, bound.inputs.dims, ())
    (requirement,) = find_outcome_supports(program, bound.inputs, {})
    there = data[~np.isnan(data)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        density = make(jnp.float32(1.5)).log_prob(there)
    # A Beta has no density at an end of its support, nor has NumPyro a verdict on it.
    expected = bool(np.any(~np.isfinite(density) & ~((name == "beta") & (there == 0))))
    try:
        xr_aimz.binding.requirements.check_in_memory([requirement], bound.inputs)
    except SupportError:
        assert expected
    else:
        assert not expected


@pytest.mark.slow
def test_bounds_that_are_inputs_are_those_of_the_cell():
    def model(n, y=None):
        chance = numpyro.sample("chance", dist.Beta(1, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", dist.Binomial(n, chance), obs=y)

    draws = {"chance": np.full((1, 2), 0.5, np.float32)}
    ds = series([1.0, 4.0, 2.0, 9.0]).assign(n=("time", [5.0, 3.0, 2.0, np.nan]))
    fit = ds.aimz.from_posterior(model, draws)
    for one in (ds, ds.chunk(time=2)):
        with pytest.raises(
            SupportError, match=r"from 0 to 3\. They are 1 of .* 4\.0 at time=2001"
        ):
            one.aimz.log_likelihood(fit).compute()
    # Where the number of trials is missing, so is the cell.
    ds.assign(y=ds.y.clip(max=2)).aimz.log_likelihood(fit).compute()


@pytest.mark.parametrize(
    "make",
    [
        lambda top: dist.Uniform(0, top),
        lambda top: dist.TruncatedNormal(0.0, 1.0, low=-top, high=top),
        lambda top: dist.Uniform(0, numpyro.deterministic("twice", 2 * top)),
    ],
)
def test_a_support_that_is_made_from_draws_is_left_alone(make):
    def model(y=None):
        top = numpyro.sample("rate", dist.HalfNormal(10))
        with xr_aimz.plate("time"):
            numpyro.sample("y", make(top), obs=y)

    ds = series([0.5, 1.5, 100.0])
    fit = ds.aimz.from_posterior(model, DRAWS)
    density = ds.aimz.log_likelihood(fit).y
    assert bool(np.isneginf(density.isel(time=2)).all())


def test_a_model_may_ask_for_a_density_outside_of_the_support():
    def model(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", dist.Poisson(rate, validate_args=False), obs=y)

    ds = series([0.5, 1.5])
    assert bool(np.isfinite(ds.aimz.log_likelihood(ds.aimz.from_posterior(model, DRAWS)).y).all())


def test_an_event_is_one_cell_and_one_bad_entry_is_enough():
    def shares(y=None):
        numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", dist.Dirichlet(jnp.ones(3)), obs=y)

    def several(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", dist.Poisson(rate).expand([3]).to_event(1), obs=y)

    part = {"time": [2000, 2001], "species": list("abc")}
    good = xr.Dataset({"y": (("time", "species"), [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])}, part)
    fit = good.aimz.from_posterior(shares, DRAWS)
    good.aimz.log_likelihood(fit)
    with pytest.raises(SupportError, match=r"sum to 1\. They are 1 of 2, .*at time=2001"):
        (good + xr.DataArray([0, 0.1], dims="time")).aimz.log_likelihood(fit)
    fit = good.astype(int).aimz.from_posterior(several, DRAWS)
    with pytest.raises(SupportError, match=r"1 of 2, the first \[0\.2 0\.3 0\.5\] at time=2000"):
        good.aimz.log_likelihood(fit)


def test_a_table_a_scan_and_a_function_of_the_outcome_are_looked_at():
    def table(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        numpyro.sample("y", dist.Poisson(rate).expand([6]), obs=y)

    def steps(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))

        def step(carry, value):
            carry = carry + 1
            return carry, numpyro.sample("y", dist.Poisson(rate * carry), obs=value)

        scan(step, 1.0, y)

    def logs(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("log", dist.Normal(rate, 1), obs=None if y is None else jnp.log(y))

    grid = xr.Dataset({"y": (("time", "lat"), [[1.0, 2.0], [3.0, 4.5], [0.0, 1.0]])},
                      {"time": [1, 2, 3], "lat": [10.0, 20.0]})  # fmt: skip
    with pytest.raises(SupportError, match=r"4\.5 at time=2, lat=20\.0"):
        grid.aimz.fit(table, layout="table", progress=False)
    with pytest.raises(SupportError, match=r"2\.5 at time=2001"):
        series([1.0, 2.5]).aimz.fit(steps, core_dim="time", progress=False)
    with pytest.raises(SupportError, match=r"'y'.*site 'log'.*-inf at time=2001"):
        series([1.0, 0.0]).aimz.fit(logs, progress=False)


def test_codes_that_are_floats_are_told_apart_from_wrong_values():
    def model(y=None):
        rate = numpyro.sample("rate", dist.Gamma(2, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", dist.OrderedLogistic(rate, jnp.array([-1.0, 1.0])), obs=y)

    with pytest.raises(DtypeError, match=r"'y' .* is a float.*OrderedLogistic.*astype\(int\)"):
        series([0.0, 2.0]).aimz.fit(model, progress=False)
