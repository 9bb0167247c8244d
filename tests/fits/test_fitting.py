"""A fit by every door: strings, NumPyro's own objects, networks, scans, several outcomes."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from flax import linen, nnx
from numpyro.contrib.control_flow import scan
from numpyro.contrib.einstein import RBFKernel, SteinVI
from numpyro.contrib.module import flax_module, nnx_module, random_flax_module, random_nnx_module
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.optim import Adagrad

import xr_aimz
from xr_aimz.errors import ConvergenceWarning, ModelError, OptionError

SHORT = {"draws": 100, "warmup": 100, "chains": 2, "progress": False}


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    numpyro.deterministic("double", 2 * slope)
    numpyro.deterministic("mean", slope * x)
    numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 40)
    y = 2 * x + rng.normal(0, 0.3, x.size)
    return xr.Dataset(
        {"y": ("time", y, {"units": "K", "long_name": "yield"})},
        coords={"x": ("time", x), "time": np.arange(40)},
    )


def quiet_fit(ds, model, *args, **options):
    """A fit too short to be trusted, and known to be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ds.aimz.fit(model, *args, **options)


@pytest.fixture(scope="module")
def fitted(ds):
    return quiet_fit(ds, line, **SHORT)


def test_posterior_holds_latents_and_what_is_no_prediction(fitted):
    assert set(fitted.posterior) == {"slope", "noise", "double"}
    assert fitted.posterior.slope.dims == ("chain", "draw")
    np.testing.assert_allclose(fitted.posterior.double, 2 * fitted.posterior.slope, rtol=1e-6)


def test_sample_stats_have_the_names_of_arviz(fitted):
    names = {"diverging", "energy", "lp", "acceptance_rate", "n_steps", "tree_depth", "step_size"}
    assert set(fitted.sample_stats) == names
    assert all(a.dims == ("chain", "draw") for a in fitted.sample_stats.values())
    assert (fitted.sample_stats.n_steps < 2**fitted.sample_stats.tree_depth).all()


def test_diagnostics_have_a_figure_for_every_variable(fitted):
    table = fitted.diagnostics()
    assert list(table.diagnostic.values) == ["rhat", "ess_bulk", "ess_tail"]
    assert set(table) == {*fitted.posterior, "divergences"}
    assert float(table.slope.sel(diagnostic="rhat")) < 1.1


def test_repr_names_model_method_and_outcome(fitted):
    for shown in (repr(fitted), fitted._repr_html_()):
        assert "line" in shown
        assert "NUTS, 2 chains" in shown
        assert "slope" in shown


@pytest.mark.slow
def test_a_short_fit_warns_with_figures(ds):
    with pytest.warns(ConvergenceWarning, match=r"ess_bulk below 100 a chain .*'slope': \d+"):
        ds.aimz.fit(line, draws=20, warmup=20, chains=2, progress=False)


def test_a_fit_keeps_what_it_warned_of_and_draws_made_elsewhere_are_not_looked_at(ds, fitted):
    assert fitted.concerns is not None
    assert all(concern in repr(fitted) for concern in fitted.concerns)
    other = ds.aimz.from_posterior(line, fitted.posterior)
    assert other.concerns is None
    assert "not looked for" in repr(other)


def test_the_seed_is_all_that_chance_depends_on(ds, fitted):
    again = quiet_fit(ds, line, **SHORT)
    other = quiet_fit(ds, line, **{**SHORT, "seed": 1})
    xr.testing.assert_identical(again.posterior, fitted.posterior)
    assert not again.posterior.slope.equals(other.posterior.slope)


def least_squares(ds):
    return float((ds.x * ds.y).sum() / (ds.x**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        lambda: NUTS(line, target_accept_prob=0.9),
        lambda: MCMC(
            NUTS(line),
            num_warmup=100,
            num_samples=100,
            num_chains=2,
            chain_method="vectorized",
            progress_bar=False,
        ),
    ],
    ids=["kernel", "MCMC"],
)
def test_numpyros_own_samplers(ds, method):
    made = method()
    options = {} if isinstance(made, MCMC) else SHORT
    fitted = quiet_fit(ds, line, method=made, **options)
    assert dict(fitted.posterior.sizes) == {"chain": 2, "draw": 100}
    # the sd of the slope is 0.08; the mean of 200 draws is within a few of its errors
    assert abs(float(fitted.posterior.slope.mean()) - least_squares(ds)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        lambda: "svi",
        lambda: AutoMultivariateNormal,
        lambda: AutoNormal(line, init_loc_fn=init_to_median),
        lambda: SVI(line, AutoNormal(line), optax.adam(0.03), Trace_ELBO()),
    ],
    ids=["svi", "class", "instance", "SVI"],
)
def test_every_way_to_variational_inference(ds, method):
    fitted = ds.aimz.fit(line, method=method(), steps=3000, draws=300, progress=False)
    assert dict(fitted.posterior.sizes) == {"chain": 1, "draw": 300}
    assert fitted.losses.sizes == {"step": 3000}
    assert fitted.losses[-100:].mean() < fitted.losses[:100].mean()
    assert abs(float(fitted.posterior.slope.mean()) - least_squares(ds)) < 0.05
    assert fitted.sample_stats.sizes == {}


@pytest.mark.slow
def test_a_loss_still_falling_is_a_warning(ds):
    with pytest.warns(ConvergenceWarning, match=r"loss was still falling .* of the 300 steps"):
        ds.aimz.fit(
            line,
            method="svi",
            steps=300,
            optimizer=optax.adam(0.003),
            init={"slope": -20.0, "noise": 1.0},
            progress=False,
        )


def test_a_loss_that_is_not_finite_is_a_warning(ds):
    with pytest.warns(ConvergenceWarning, match=r"\d+ of 20 losses are not finite"):
        ds.aimz.fit(line, method="svi", steps=20, optimizer=optax.sgd(1e20), progress=False)


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("svi", {"chains": 2}, "chains"),
        ("svi", {"warmup": 10}, "warmup"),
        ("nuts", {"steps": 10}, "steps"),
        ("nuts", {"optimizer": 0.1}, "optimizer"),
        ("gibbs", {}, "'gibbs'"),
        ("nuts", {"draws": 0}, "draws=0"),
    ],
)
def test_an_option_that_a_method_does_not_take(ds, method, options, named):
    with pytest.raises(OptionError, match=named):
        ds.aimz.fit(line, method=method, **options)


def test_a_kernel_made_for_another_model(ds):
    with pytest.raises(OptionError, match="was made for the model"):
        ds.aimz.fit(line, method=NUTS(lambda x, y=None: None))


@pytest.mark.slow
def test_initial_values(ds):
    fitted = quiet_fit(ds, line, init={"slope": 1.9, "noise": 0.3}, **SHORT)
    assert np.isfinite(fitted.posterior.slope).all()


@pytest.mark.slow
def test_a_param_is_trained_by_svi_and_used_by_predict(ds):
    def trained(x, y=None):
        slope = numpyro.param("slope", 0.0)
        noise = numpyro.sample("noise", dist.HalfNormal(1))
        numpyro.deterministic("mean", slope * x)
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)

    fitted = ds.aimz.fit(trained, method="svi", steps=3000, draws=50, progress=False)
    assert abs(float(fitted.params["slope"]) - least_squares(ds)) < 0.02
    mean = ds.aimz.predict(fitted, sites="mean")["mean"].compute()
    np.testing.assert_allclose(mean[0, 0], float(fitted.params["slope"]) * ds.x, rtol=1e-5)
    with pytest.raises(ModelError, match=r"'slope'.*params.*method='svi'"):
        ds.aimz.fit(trained, **SHORT)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(1, 4, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


NET = Net(nnx.Rngs(0))


def nnx_trained(x, y=None):
    net = nnx_module("net", NET)
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(net(x[:, None])[:, 0], noise), obs=y)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(1, 4, rngs=rngs)
        self.dropped = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropped(self.hidden(x)).sum(-1)


DROPPING = Dropping(nnx.Rngs(0))


def test_a_network_with_dropout_is_refused(ds):
    def dropping(x, y=None):
        net = nnx_module("net", DROPPING)
        numpyro.sample("y", dist.Normal(net(x[:, None]), 1), obs=y)

    with pytest.raises(ModelError, match=r"'net\$state' holds a random key"):
        ds.aimz.fit(dropping, method="svi", progress=False)


def nnx_random(x, y=None):
    net = random_nnx_module("net", NET, prior=dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(net(x[:, None])[:, 0], 0.3), obs=y)


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(x)


def flax_trained(x, y=None):
    net = flax_module("net", Dense(), input_shape=(1,))
    numpyro.sample("y", dist.Normal(net(x[:, None])[:, 0], 0.3), obs=y)


def flax_random(x, y=None):
    net = random_flax_module("net", Dense(), prior=dist.Normal(0, 1), input_shape=(1,))
    numpyro.sample("y", dist.Normal(net(x[:, None])[:, 0], 0.3), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("model", [nnx_trained, nnx_random, flax_trained, flax_random])
def test_a_network_is_fitted_and_predicts_alike_in_any_chunks(ds, model):
    fitted = quiet_fit(
        ds, model, method="svi", steps=3000, draws=100, optimizer=0.02, progress=False
    )
    pred = ds.chunk(time=7).aimz.predict(fitted).y.compute()
    whole = ds.aimz.predict(fitted).y.compute()
    np.testing.assert_allclose(pred, whole, rtol=1e-4, atol=1e-5)
    error = pred.mean(("chain", "draw")) - 2 * ds.x
    # noise of 0.3 over 40 points and 100 draws leaves a mean within some 0.15 of the truth
    assert float(np.sqrt((error**2).mean())) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("model", [nnx_random, flax_random])
def test_a_random_network_by_nuts(ds, model):
    fitted = quiet_fit(ds, model, **SHORT)
    assert all("/" not in name for name in fitted.posterior)
    assert any(name.startswith("net.") for name in fitted.posterior)
    error = ds.aimz.predict(fitted).y.mean(("chain", "draw")) - 2 * ds.x
    assert float(np.sqrt((error**2).mean())) < 0.3


def walk(level0, tas=None):
    drift = numpyro.sample("drift", dist.Normal(0, 1))
    length = level0.shape[0]

    def step(level, now):
        with xr_aimz.plate("lat"):
            level = level + drift
            numpyro.sample("tas", dist.Normal(level, 0.1), obs=now)
        return level, None

    scan(step, level0[0], tas, length=length)


@pytest.mark.slow
def test_a_scan_over_a_core_dim():
    rng = np.random.default_rng(0)
    truth = 0.5 * np.arange(1, 13)[:, None] + np.zeros(4)
    ds = xr.Dataset(
        {
            "tas": (("time", "lat"), truth + rng.normal(0, 0.1, truth.shape), {"units": "K"}),
            "level0": (("time", "lat"), np.zeros_like(truth)),
        },
        coords={"time": np.arange(12), "lat": [10.0, 20.0, 30.0, 40.0]},
    )
    fitted = quiet_fit(ds, walk, core_dim="time", **SHORT)
    assert abs(float(fitted.posterior.drift.mean()) - 0.5) < 0.02
    pred = ds.aimz.predict(fitted).tas
    assert pred.dims == ("chain", "draw", "time", "lat")
    assert pred.attrs["units"] == "K"
    whole = pred.compute()
    parts = ds.chunk(lat=3).aimz.predict(fitted).tas.compute()
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    part = ds.isel(lat=[2, 0]).aimz.predict(fitted).tas.compute()
    np.testing.assert_allclose(part, whole.isel(lat=[2, 0]), rtol=1e-5)
    steps = whole.values - 0.5 * np.arange(1, 13)[:, None]
    assert np.corrcoef(steps[0, :, 0, 0], steps[0, :, 1, 0])[0, 1] < 0.5
    log = ds.aimz.log_likelihood(fitted).tas
    assert log.dims == ("chain", "draw", "time", "lat")


@pytest.mark.slow
def test_two_outcomes_keep_their_own_names_and_attrs():
    def both(x, rain=None, wet=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("amount", dist.Normal(slope * x, 1), obs=rain)
            numpyro.sample("flag", dist.Bernoulli(logits=slope * x), obs=wet)

    x = np.linspace(-1, 1, 30)
    ds = xr.Dataset(
        {
            "x": ("time", x),
            "pr": ("time", 0.7 * x, {"units": "mm"}),
            "wet": ("time", (x > 0).astype(int)),
        }
    )
    fitted = quiet_fit(ds, both, {"rain": "pr"}, **SHORT)
    pred = ds.aimz.predict(fitted).compute()
    assert set(pred) == {"pr", "wet"}
    assert pred.pr.attrs["units"] == "mm"
    assert pred.wet.dtype.kind == "i"


@pytest.mark.slow
def test_a_prior_that_cannot_be_sampled():
    def improper(x, y=None):
        slope = numpyro.sample("slope", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

    x = np.linspace(-1, 1, 30)
    ds = xr.Dataset({"x": ("time", x), "y": ("time", 3 * x)})
    fitted = quiet_fit(ds, improper, init={"slope": 0.0}, **SHORT)
    assert abs(float(fitted.posterior.slope.mean()) - 3) < 0.3
    assert ds.aimz.predict(fitted).y.compute().shape == (2, 100, 30)


def test_the_tree_follows_the_schema_of_arviz(ds, fitted):
    tree = fitted.to_datatree(
        posterior_predictive=ds.aimz.predict(fitted), log_likelihood=ds.aimz.log_likelihood(fitted)
    )
    assert set(tree.children) == {
        "posterior",
        "sample_stats",
        "observed_data",
        "constant_data",
        "posterior_predictive",
        "log_likelihood",
    }
    assert tree["observed_data"].y.identical(ds.y.drop_vars("x"))


@pytest.mark.slow
def test_chains_run_at_once_where_there_are_devices():
    script = """
import warnings; warnings.simplefilter("ignore")  # what is printed is what is compared
import jax, numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
from xr_aimz.inference.mcmc import kernel_for, sampler_for
def model(y=None):
    numpyro.sample("y", dist.Normal(numpyro.sample("m", dist.Normal(0, 1)), 1), obs=y)
made = sampler_for(kernel_for(model, None), draws=5, chains=4, warmup=5, progress=False)
print(made.chain_method)
"""
    import os
    import subprocess
    import sys

    for devices, expected in ((1, "vectorized"), (4, "parallel")):
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        assert done.stdout.split() == [expected]
    assert jax.local_device_count() >= 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svi", "batches", "stein"])
def test_five_steps_are_a_concern(ds, method):
    options = {"method": "svi", "steps": 5, "draws": 20, "progress": False}
    if method == "batches":
        options["batch"] = 5
    if method == "stein":
        options["method"] = SteinVI(line, AutoNormal(line), Adagrad(0.3), RBFKernel())
    with pytest.warns(ConvergenceWarning, match="5 steps are too few to see") as caught:
        fitted = xr_aimz.fit(ds, line, **options)
    assert len(fitted.concerns) >= 1
    # The line that called, by whichever way it did.
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.slow
def test_a_tree_at_its_greatest_depth_is_a_concern(ds, tmp_path):
    kernel = NUTS(line, max_tree_depth=1)
    with pytest.warns(ConvergenceWarning, match="ended at the greatest tree depth, 1 "):
        fitted = ds.aimz.fit(line, method=kernel, draws=200, warmup=50, chains=2, progress=False)
    (concern,) = [c for c in fitted.concerns if "tree depth" in c]
    assert "method=NUTS(model, max_tree_depth=3)" in concern
    # A saved fit has it too, and so have its further draws.
    fitted.save(tmp_path / "fit.zarr")
    back = xr_aimz.load_fit(tmp_path / "fit.zarr", line)
    assert back.concerns == fitted.concerns
    assert back.sample_stats.n_steps.attrs["max_tree_depth"] == 1
    for one in (fitted, back):
        assert any("tree depth, 1 " in c for c in one.sample(100, seed=1).concerns)
