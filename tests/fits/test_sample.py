"""More from a fit: further draws, and every one of NumPyro's samplers by the same door."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.einstein import ASVGD, SVGD, MixtureGuidePredictive, RBFKernel, SteinVI
from numpyro.infer import (
    AIES,
    ESS,
    HMC,
    MCMC,
    NUTS,
    SA,
    BarkerMH,
    DiscreteHMCGibbs,
    HMCGibbs,
    MixedHMC,
)
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adagrad

from xr_aimz.errors import ConvergenceWarning, ModelError, OptionError

SD = 0.5


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.deterministic("double", 2 * slope)
    numpyro.sample("y", dist.Normal(slope * x, SD), obs=y)


def switched(x, y=None):
    """The same, beside a coin of which nothing is known but its prior."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    coin = numpyro.sample("coin", dist.Bernoulli(0.3))
    numpyro.sample("y", dist.Normal(slope * x + 0 * coin, SD), obs=y)


def halves(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    offset = numpyro.sample("offset", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x + offset, SD), obs=y)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 30)
    x -= x.mean()
    y = 0.8 * x + SD * rng.normal(size=30)
    return xr.Dataset({"x": ("time", x), "y": ("time", y)}, {"time": np.arange(30)})


def closed_form(ds):
    x = ds.x.where(ds.y.notnull())
    precision = float((x**2).sum() / SD**2 + 1)
    return float((x * ds.y).sum() / SD**2) / precision, precision**-0.5


def fit_quietly(ds, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ds.aimz.fit(*args, progress=False, **options)


def assert_posterior(ds, fitted, mean_within=0.25, sd_within=0.25):
    mean, sd = closed_form(ds)
    slope = fitted.posterior.slope
    assert abs(float(slope.mean()) - mean) < mean_within * sd
    assert abs(float(slope.std()) / sd - 1) < sd_within


def gibbs_of_offset(x, y):
    def offset(rng_key, gibbs_sites, hmc_sites):
        precision = len(x) / SD**2 + 1
        mean = jnp.sum(y - hmc_sites["slope"] * x) / SD**2 / precision
        return {"offset": dist.Normal(mean, precision**-0.5).sample(rng_key)}

    return offset


KERNELS = {
    "HMC": (line, lambda ds: HMC(line, trajectory_length=2.0)),
    "SA": (line, lambda ds: SA(line)),
    "BarkerMH": (line, lambda ds: BarkerMH(line)),
    "AIES": (line, lambda ds: AIES(line)),
    "ESS": (line, lambda ds: ESS(line)),
    "HMCGibbs": (
        halves,
        lambda ds: HMCGibbs(
            NUTS(halves),
            gibbs_of_offset(jnp.asarray(ds.x.values), jnp.asarray(ds.y.values)),
            ["offset"],
        ),
    ),
    "DiscreteHMCGibbs": (switched, lambda ds: DiscreteHMCGibbs(NUTS(switched))),
    "MixedHMC": (switched, lambda ds: MixedHMC(HMC(switched, trajectory_length=1.5))),
}


# An ensemble needs many chains to move in; the chains of most others run in turn.
CHAINS = {"AIES": 20, "ESS": 20, "HMC": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_finds_the_closed_form_and_goes_on_from_there(ds, name):
    model, kernel = KERNELS[name]
    chains = CHAINS.get(name, 2)
    draws = 2400 // chains if name in CHAINS else 1500
    fitted = fit_quietly(ds, model, method=kernel(ds), draws=draws, warmup=600, chains=chains)
    assert dict(fitted.posterior.sizes) == {"chain": chains, "draw": draws}
    assert name in fitted.method
    assert_posterior(ds, fitted)
    if model is switched:
        # some thousand draws of a coin, of which every few are new
        assert abs(float(fitted.posterior.coin.mean()) - 0.3) < 0.08
    further = fitted.sample(draws)
    assert list(further.posterior.draw[[0, -1]]) == [draws, 2 * draws - 1]
    assert_posterior(ds, further)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AIES", "SA", "DiscreteHMCGibbs"])
def test_a_kernel_leaves_missing_values_out(ds, name):
    model, kernel = KERNELS[name]
    gappy = ds.assign(y=ds.y.where(ds.time % 5 != 0))
    chains = CHAINS.get(name, 2)
    fitted = fit_quietly(gappy, model, method=kernel(ds), draws=400, warmup=400, chains=chains)
    assert_posterior(gappy, fitted, 0.35, 0.3)


def test_an_ensemble_of_an_odd_number_is_an_error(ds):
    with pytest.raises(OptionError, match="chains=3: AIES"):
        ds.aimz.fit(line, method=AIES(line), chains=3)


STEIN = {
    "SteinVI": lambda: SteinVI(
        line, AutoNormal(line), Adagrad(0.3), RBFKernel(), num_stein_particles=4
    ),
    "SteinVI by hand": lambda: SteinVI(
        line, by_hand, Adagrad(0.3), RBFKernel(), num_stein_particles=4
    ),
    "SVGD": lambda: SVGD(line, Adagrad(0.3), RBFKernel(), num_stein_particles=40),
    "ASVGD": lambda: ASVGD(line, Adagrad(0.3), RBFKernel(), num_stein_particles=40),
}


def by_hand(x, y=None):
    mean = numpyro.param("mean", lambda key: jax.random.normal(key))
    sd = numpyro.param("sd", 0.3, constraint=dist.constraints.positive)
    numpyro.sample("slope", dist.Normal(mean, sd))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STEIN))
def test_stein(ds, name):
    if name == "SteinVI":
        ds = ds.assign(y=ds.y.where(ds.time % 5 != 0))
    fitted = fit_quietly(ds, line, method=STEIN[name](), steps=1000, draws=1000)
    assert fitted.method.startswith(name.split()[0])
    assert dict(fitted.posterior.sizes) == {"chain": 1, "draw": 1000}
    further = fitted.sample(1000)
    # NumPyro sums the force of the data over particles: but for SVGD, which divides it by
    # their number, the posterior is too narrow, and only its mean is right.
    sd_within = 0.3 if name == "SVGD" else np.inf
    for found in (fitted, further):
        assert_posterior(ds, found, 0.35, sd_within)


@pytest.mark.slow
def test_draws_of_a_mixture_are_numpyros(ds):
    made = STEIN["SteinVI by hand"]()
    fitted = fit_quietly(ds, line, method=made, steps=300, draws=4000)
    start, _ = jax.random.split(jax.random.key(0))
    again = STEIN["SteinVI by hand"]()
    data = {"x": jnp.asarray(ds.x.values), "y": jnp.asarray(ds.y.values)}
    params = again.run(start, 300, progress_bar=False, **data).params
    mixture = MixtureGuidePredictive(
        line, by_hand, params, again.guide_sites, num_samples=4000, return_sites=["slope"]
    )
    expected = mixture(jax.random.key(1), **data)["slope"]
    found = fitted.posterior.slope
    # 4000 independent draws each: an sd of 0.022 sds for the difference of their means
    assert abs(float(found.mean()) - float(expected.mean())) < 0.1 * float(expected.std())
    assert abs(float(found.std()) / float(expected.std()) - 1) < 0.06


def test_a_stein_guide_covers_the_model(ds):
    made = SteinVI(switched, by_hand, Adagrad(0.3), RBFKernel())
    with pytest.raises(ModelError, match=r"by_hand does not cover .*\['coin'\]"):
        ds.aimz.fit(switched, method=made, progress=False)


# Further draws.


@pytest.fixture(scope="module", params=["svi", "nuts", "MCMC"])
def fitted(ds, request):
    options = {"svi": {"steps": 1000}, "nuts": {"warmup": 200, "chains": 2}, "MCMC": {}}
    method = request.param
    if method == "MCMC":
        method = MCMC(
            NUTS(line),
            num_warmup=200,
            num_samples=600,
            thinning=2,
            num_chains=2,
            chain_method="sequential",
            progress_bar=False,
        )
        return fit_quietly(ds, line, method=method)
    return fit_quietly(ds, line, method=method, draws=300, **options[method])


@pytest.mark.slow
def test_further_draws_are_numbered_on_and_are_of_the_same_posterior(ds, fitted):
    further = fitted.sample(500)
    assert list(further.posterior.draw.values) == list(range(300, 800))
    assert further.posterior.sizes["chain"] == fitted.posterior.sizes["chain"]
    assert set(further.posterior) == {"slope", "double"}
    np.testing.assert_allclose(further.posterior.double, 2 * further.posterior.slope, rtol=1e-6)
    assert set(further.sample_stats) == set(fitted.sample_stats)
    assert_posterior(ds, further)


@pytest.mark.slow
def test_a_seed_gives_the_same_draws_and_the_next_ones_are_new(fitted):
    once, again = fitted.sample(50, seed=3), fitted.sample(50, seed=3)
    xr.testing.assert_identical(once.posterior, again.posterior)
    assert not np.isin(once.posterior.slope, fitted.sample(50, seed=4).posterior.slope).any()
    assert not np.isin(once.posterior.slope, fitted.posterior.slope).any()
    after = once.sample(50, seed=3)
    assert list(after.posterior.draw[[0, -1]]) == [350, 399]
    assert not np.isin(once.posterior.slope, after.posterior.slope).any()


@pytest.mark.slow
def test_predictions_from_both_are_joined_with_noise_of_their_own(ds, fitted):
    one = ds.aimz.predict(fitted).y
    two = ds.aimz.predict(fitted.sample(300)).y
    both = xr.concat([one, two], "draw").compute()
    assert both.indexes["draw"].is_unique
    noise = both - both.mean("draw")
    first, second = noise.isel(draw=slice(300)), noise.isel(draw=slice(300, None))
    # of pairs with the same noise the correlation would be near 1
    assert abs(np.corrcoef(first.values.ravel(), second.values.ravel())[0, 1]) < 0.05


@pytest.mark.slow
def test_a_chain_goes_on_where_it_was(ds):
    fitted = fit_quietly(ds, line, method=BarkerMH(line), draws=50, warmup=300, chains=1)
    last = float(fitted.posterior.slope[0, -1])
    # More than half of its proposals are refused, and a chain then stays where it is: exactly.
    first = [float(fitted.sample(2, seed=seed).posterior.slope[0, 0]) for seed in range(5)]
    assert first.count(last) >= 2


def test_draws_made_elsewhere_have_no_more(ds, fitted):
    other = ds.aimz.from_posterior(line, fitted.posterior[["slope"]])
    with pytest.raises(OptionError, match="draws made elsewhere"):
        other.sample(10)


@pytest.mark.parametrize("draws", [0, 1.5, True])
def test_a_number_of_draws(fitted, draws):
    with pytest.raises(OptionError, match=f"draws={draws!r}"):
        fitted.sample(draws)


# Draws made elsewhere, in each of their forms.


def test_every_form_of_a_posterior_is_the_same_fit(ds):
    values = np.random.default_rng(0).normal(size=(2, 5))
    arrays = {"slope": values.astype("f4")}
    dataset = xr.Dataset({"slope": (("chain", "draw"), arrays["slope"])})
    tree = xr.DataTree.from_dict({"posterior": dataset, "other": xr.Dataset({"a": 1})})
    pred = [
        ds.aimz.predict(ds.aimz.from_posterior(line, given)).y.compute()
        for given in (arrays, dataset, tree)
    ]
    for other in pred[1:]:
        np.testing.assert_array_equal(other, pred[0])
    assert pred[0].shape == (2, 5, 30)
