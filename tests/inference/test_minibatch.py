"""Law 9: a minibatch posterior is the full-batch one; and a fit goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from minibatch_models import NOISE, SPREAD, best_factorized, effects, quiet, regression
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.util import log_density

import xr_aimz
from xr_aimz.binding.bound import bind
from xr_aimz.binding.layout import arrange, block_of
from xr_aimz.errors import ConvergenceWarning, ModelError, OptionError, StoreError
from xr_aimz.inference.local_params import find_site_axes, likelihood_scales, scale_likelihood
from xr_aimz.inference.minibatch_data import WindowSizes
from xr_aimz.tracing.sites import trace_lock


def shares(z, x, y=None):
    """Local latents with an event, and on another scale than the guide's."""
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    with numpyro.plate("row", x.shape[0]):
        share = numpyro.sample("share", dist.Dirichlet(np.ones(3, np.float32)))
        rate = numpyro.sample("rate", dist.LogNormal(z, 1))
        numpyro.sample("y", dist.Normal(rate * share[:, 0] + x, scale), obs=y)


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200_000, 5)).astype(np.float32)
    y = (X @ np.arange(5) + rng.normal(size=200_000)).astype(np.float32)
    return xr.Dataset({"X": (("obs", "feature"), X), "y": ("obs", y)}).chunk(obs=10_000)


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(1)
    effect, x = rng.normal(size=400), rng.normal(size=(400, 6))
    y = 1.5 + SPREAD * effect[:, None] + 0.7 * x + NOISE * rng.normal(size=(400, 6))
    dims = ("group", "rep")
    return xr.Dataset({"x": (dims, x), "y": (dims, y)}, {"group": 10 * np.arange(400)})


@pytest.fixture
def few(groups):
    return groups.isel(group=slice(0, 23))


@pytest.mark.slow
def test_the_posterior_of_a_conjugate_regression(linear):
    X, y = linear.X.values.astype(float), linear.y.values
    precision = X.T @ X + np.eye(5) / 100
    mean, sd = np.linalg.solve(precision, X.T @ y), np.diag(np.linalg.inv(precision)) ** 0.5
    # No warning either: a converged fit raises no false alarm.
    fitted = linear.aimz.fit(
        regression, method="svi", batch=1000, steps=200_000, draws=4000, progress=False
    )
    draws = fitted.posterior.weights.values[0]
    assert np.abs((draws.mean(0) - mean) / sd).max() < 0.1
    assert np.abs(draws.std(0) / sd - 1).max() < 0.1
    assert fitted.concerns == ()
    # The loss is that of all data: minus the evidence, but for the noise of a batch.
    logdet = np.linalg.slogdet(precision * 100)[1]
    rest = y @ y - mean @ X.T @ y
    evidence = -0.5 * (len(y) * np.log(2 * np.pi) + logdet + rest)
    assert abs(float(fitted.losses[-2000:].mean()) / -evidence - 1) < 1e-3
    # Deterministics are left to predict; what was observed stays where it was.
    assert set(fitted.posterior) == {"weights"}
    assert fitted.observed_data.y.chunks is not None
    double = linear.isel(obs=slice(5)).aimz.predict(fitted, sites="double").double
    np.testing.assert_allclose(double, 2 * fitted.posterior.weights, rtol=1e-6)


@pytest.fixture(scope="module")
def full(groups):
    """Moments of the fit to all groups at once."""
    fitted = groups.aimz.fit(effects, method="svi", steps=4000, draws=20_000, progress=False)
    return moments(fitted)


def moments(fitted):
    return fitted.posterior.mean(("chain", "draw")), fitted.posterior.std(("chain", "draw"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_effects_with_their_groups_in_batches(groups, full, seed):
    fitted = groups.chunk(group=37).aimz.fit(
        effects,
        method="svi",
        batch={"group": 50},
        steps=120_000,
        draws=20_000,
        seed=seed,
        progress=False,
    )
    assert fitted.posterior.effect.dims == ("chain", "draw", "group")
    assert fitted.posterior.indexes["group"].equals(groups.indexes["group"])
    found, spread = moments(fitted)
    # The posterior is Gaussian, so the means are its own, which NUTS would find but for noise.
    # The sds are those of the guide: of slope 0.92, of level 0.98 of the posterior's.
    for mean, sd in (best_factorized(groups), full):
        off, ratio = (found - mean) / sd, spread / sd
        for name in ("level", "slope"):
            # 20 000 draws: 0.007 of Monte Carlo error in both.
            assert abs(float(off[name])) < 0.1
            assert abs(float(ratio[name]) - 1) < 0.1
        # Each of 400 effects was in an eighth of the steps.
        assert float((off.effect**2).mean()) ** 0.5 < 0.1
        assert abs(float(ratio.effect.median()) - 1) < 0.02
        assert float(abs(ratio.effect - 1).quantile(0.95)) < 0.1


def parts_of(length, size):
    return [slice(k, k + size) for k in range(0, length, size)]


CASES = {
    "local": (effects, {"group": 4}, {}, "grid"),
    "two dims": (effects, {"group": 4, "rep": 2}, {}, "grid"),
    "dim without latents": (effects, {"rep": 3}, {}, "grid"),
    "table, events": (shares, {"row": 4}, {}, "table"),
}


def dataset(model):
    rng = np.random.default_rng(3)
    if model is effects:
        values = rng.normal(size=(2, 12, 6))
        return xr.Dataset({n: (("group", "rep"), v) for n, v in zip("xy", values, strict=True)})
    values = rng.normal(size=(3, 12, 2))
    return xr.Dataset({n: (("row", "side"), v) for n, v in zip("zxy", values, strict=True)})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batches_of_a_pass_have_on_average_the_density_of_all_data(case):
    model, sizes, variables, layout = case
    ds = dataset(model)
    bound = bind(ds, model, variables, layout=layout)
    lengths = {d: ds.sizes[d] for d in sizes}
    whole = WindowSizes(
        sizes, lengths, {d: (n,) for d, n in lengths.items()}, dict.fromkeys(sizes, 1)
    )
    arrays = {n: a.values.astype(np.float32) for n, a in bound.inputs.arrays.items()}
    dims = bound.inputs.dims
    block = block_of(bound.binding, bound.inputs.sizes)
    with trace_lock(block):
        passed = arrange(bound.binding, arrays, dims, block)
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(**passed)
        latents = {
            n: trace[n]["value"] for n, site in bound.sites.items() if site.kind == "latent"
        }
        expected, _ = log_density(model, (), passed, latents)
    counted = scale_likelihood(model, likelihood_scales(bound.sites, bound.binding, whole))
    small = block_of(bound.binding, {**bound.inputs.sizes, **sizes})
    found = []
    for place in np.ndindex(*(lengths[d] // n for d, n in sizes.items())):
        starts = {d: k * sizes[d] for d, k in zip(sizes, place, strict=True)}
        cut = {d: slice(k, k + sizes[d]) for d, k in starts.items()}
        own = {n: a[tuple(cut.get(d, slice(None)) for d in dims[n])] for n, a in arrays.items()}
        part = {n: cut_draw(bound, n, v, starts, sizes) for n, v in latents.items()}
        with trace_lock(small):
            passed = arrange(bound.binding, own, dims, small)
            found.append(float(log_density(counted, (), passed, part)[0]))
    # Sums of a hundred 32-bit terms in another order.
    np.testing.assert_allclose(np.mean(found), float(expected), rtol=1e-5)


def cut_draw(bound, name, value, starts, sizes):
    entries = find_site_axes(bound.sites[name], bound.binding, sizes)
    if not entries.batched:
        return value
    rows = entries.rows(value[None], bound.inputs.sizes)
    return entries.folded(entries.cut(rows, starts, sizes))[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["grid", "table"])
def test_local_latents_with_events_by_every_layout(layout):
    ds = dataset(shares)
    ds = ds if layout == "table" else ds.isel(side=0)
    fitted = quiet(ds, shares, layout=layout, batch={"row": 5}, steps=300, draws=50)
    dims = ("row", "side") if layout == "table" else ("row",)
    assert fitted.posterior.rate.dims == ("chain", "draw", *dims)
    assert fitted.posterior.share.shape == (1, 50, *(ds.sizes[d] for d in dims), 3)
    np.testing.assert_allclose(fitted.posterior.share.values.sum(-1), 1, rtol=1e-5)
    assert (fitted.posterior.rate > 0).all()
    # Labels are drawn apart from each other, not one batch's noise over and over.
    flat = fitted.posterior.rate.values.reshape(50, -1)
    assert len(np.unique(flat, axis=1).T) == flat.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sites"),
    [(AutoMultivariateNormal, {"weights"}), (lambda: None, None)],
    ids=["class", "SVI"],
)
def test_other_guides_where_all_latents_are_global(linear, method, sites):
    ds = linear.isel(obs=slice(0, 4000))
    if sites is None:
        method = SVI(regression, AutoNormal(regression), optax.adam(0.01), Trace_ELBO())
    fitted = quiet(ds, regression, method=method, batch=500, epochs=400, draws=200)
    assert fitted.losses.size == 400 * 8
    np.testing.assert_allclose(
        fitted.posterior.weights.mean(("chain", "draw")), np.arange(5), atol=0.1
    )


@pytest.mark.slow
def test_a_delta_guide_finds_the_mode(few):
    fitted = quiet(few, effects, method=AutoDelta, batch={"group": 6}, steps=4000, draws=2)
    mean, _ = best_factorized(few)
    # The mode of a Gaussian is its mean; prior sds are 1 and data sds 0.2.
    np.testing.assert_allclose(fitted.posterior.effect[0, 0], mean.effect, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [2**20, 500], ids=["kept", "streamed"])
def test_a_fit_goes_on_exactly(few, block_bytes):
    options = {"batch": {"group": 4}, "optimizer": optax.adam(0.01), "draws": 20}
    ds = few.chunk(group=5)
    with xr_aimz.set_options(block_bytes=block_bytes):
        straight = quiet(ds, effects, steps=201, **options)
        half = quiet(ds, effects, steps=101, **options)
        taken_up = quiet(ds, effects, steps=201, init=half, **options)
        xr.testing.assert_identical(taken_up.posterior, straight.posterior)
        xr.testing.assert_identical(taken_up.losses, straight.losses)
        for name, value in straight.state.items():
            if name != "call":
                np.testing.assert_array_equal(taken_up.state[name], value)
        # The fit that was continued is as it was.
        assert int(half.state["step"]) == 101
        with pytest.raises(OptionError, match=r"steps=50 .* has taken 101 already"):
            quiet(ds, effects, steps=50, init=half, **options)


@pytest.mark.slow
def test_what_is_not_the_fit_to_continue(few, tmp_path):
    def fit(ds=few, model=effects, **options):
        return quiet(ds, model, **{"batch": {"group": 4}, "steps": 20, "draws": 5, **options})

    first = fit(checkpoint=tmp_path / "state")
    again = fit(checkpoint=tmp_path / "state")
    xr.testing.assert_identical(again.posterior, first.posterior)
    for options in ({"steps": 30}, {"patience": 10}, {"optimizer": 0.01}):
        with pytest.raises(OptionError, match="other steps, patience or optimizer"):
            fit(checkpoint=tmp_path / "state", **options)
    other = few.assign(y=few.y + 1)
    relabelled = few.assign_coords(group=few.group + 1)
    for way in ({"init": first}, {"checkpoint": tmp_path / "state"}):
        for options in ({"ds": other}, {"ds": relabelled}, {"batch": {"group": 5}}):
            with pytest.raises(OptionError, match="is of another fit"):
                fit(**way, **options)
        with pytest.raises(OptionError, match="seed=0, and this one has seed=1"):
            fit(**way, seed=1)
    with pytest.raises(OptionError, match="the kind of optimizer"):
        fit(init=first, optimizer=optax.sgd(1e-3), steps=40)
    # As a version wrote it that kept no averages.
    old = replace(first, state={k: v for k, v in first.state.items() if k != "layout"})
    with pytest.raises(OptionError, match=r"init= was written by another version of xr_aimz"):
        fit(init=old)
    with pytest.raises(StoreError, match="directory that exists"):
        fit(checkpoint=tmp_path / "absent" / "state")


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("nuts", {"batch": 4}, r"'nuts' does not take \['batch'\]"),
        ("svi", {"batch": 4, "steps": 10, "epochs": 2}, "steps=10 and epochs=2"),
        ("svi", {"batch": 4, "epochs": 0}, "epochs=0"),
        ("svi", {"batch": 4, "patience": 0}, "patience=0"),
        ("svi", {"epochs": 2}, r"\['epochs'\] go with batches"),
        ("svi", {"checkpoint": "state"}, r"\['checkpoint'\] go with batches"),
        ("svi", {"batch": 4, "chains": 2}, "chains"),
        ("svi", {"batch": 4, "init": {"effect": 0.0}}, r"init= has values of \['effect'\]"),
        (AutoLaplaceApproximation, {"batch": 4}, "needs all of the data at once"),
        (AutoMultivariateNormal, {"batch": {"group": 4}}, r"\['effect'\] have entries along"),
    ],
)
def test_options_that_do_not_go_together(few, method, options, named):
    with pytest.raises(OptionError, match=named):
        quiet(few, effects, method=method, **options)


@pytest.mark.slow
def test_a_fit_that_kept_nothing_cannot_be_continued(few):
    whole = quiet(few, effects, steps=10, draws=5)
    with pytest.raises(OptionError, match="kept nothing to continue from"):
        quiet(few, effects, batch=6, init=whole)
    part = quiet(few, effects, batch=6, steps=10, draws=5)
    with pytest.raises(OptionError, match="continues a fit in batches"):
        quiet(few, effects, init=part)


def test_a_model_whose_size_is_written_into_it(few):
    def sized(x, y=None):
        with numpyro.plate("group", 23, dim=-2):
            effect = numpyro.sample("effect", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(effect + x, 1), obs=y)

    with pytest.raises((ModelError, ValueError, TypeError)) as caught:
        quiet(few, sized, batch={"group": 4})
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    assert "xr_aimz.plate" in told


@pytest.mark.slow
def test_a_loss_that_still_falls_is_a_warning(linear):
    ds = linear.isel(obs=slice(0, 20_000))
    with pytest.warns(ConvergenceWarning, match="still falling"):
        ds.aimz.fit(
            regression,
            method="svi",
            batch=500,
            epochs=100,
            optimizer=optax.adam(1e-4),
            draws=10,
            progress=False,
        )


@pytest.mark.slow
def test_patience_ends_the_steps_at_the_full_rate(linear):
    ds = linear.isel(obs=slice(0, 4000))
    options = {"batch": 500, "steps": 20_000, "draws": 500}
    fitted = quiet(ds, regression, patience=500, **options)
    settled = fitted.losses.full_rate_steps
    assert 1000 <= settled < 14_000
    # All of the steps at the shrinking rate are taken.
    assert int(fitted.state["step"]) == settled + 6000
    np.testing.assert_allclose(
        fitted.posterior.weights.mean(("chain", "draw")), np.arange(5), atol=0.1
    )
    stopped = quiet(ds, regression, patience=500, optimizer=optax.adam(0.01), **options)
    assert int(stopped.state["step"]) == stopped.losses.full_rate_steps < 20_000


KILLED = """
import sys, numpy as np, optax, xarray as xr, xr_aimz
sys.path.insert(0, {tests!r})
from minibatch_models import effects
rng = np.random.default_rng(0)
ds = xr.Dataset({{n: (("group", "rep"), rng.normal(size=(300, 4))) for n in "xy"}})
print("ready", flush=True)
fitted = ds.chunk(group=50).aimz.fit(
    effects, method="svi", batch={{"group": 20}}, steps={steps}, draws=5, progress=False,
    optimizer=optax.adam(0.01), checkpoint={path!r},
)
np.savez({out!r}, **fitted.state)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    steps, tests = 60_000, os.path.dirname(__file__)

    def start(name):
        out, path = str(tmp_path / f"{name}.npz"), tmp_path / f"{name}.state"
        script = KILLED.format(tests=tests, steps=steps, path=str(path), out=out)
        script = f"import warnings; warnings.simplefilter('ignore')\n{script}"
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL), path

    def result(name):
        with np.load(tmp_path / f"{name}.npz") as file:
            return {n: file[n] for n in file.files}

    running, path = start("killed")
    deadline = time.monotonic() + 120
    while not path.exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    with np.load(path) as file:
        assert 0 < int(file["step"]) < steps
    assert not (tmp_path / "killed.npz").exists()
    for name in ("killed", "straight"):
        running, _ = start(name)
        assert running.wait(timeout=300) == 0
    killed, straight = result("killed"), result("straight")
    assert killed.keys() == straight.keys()
    for name, value in straight.items():
        np.testing.assert_array_equal(killed[name], value)


MEASURED = """
import json, resource, sys, warnings, xarray as xr, xr_aimz
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
from minibatch_models import regression
def fit(ds):
    ds.aimz.fit(regression, method="svi", batch=1000, epochs=2, draws=10, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ds = xr.open_zarr({path!r})
with xr_aimz.set_options(block_bytes=8 * 2**20):
    before = fit(ds.isel(obs=slice(0, 150_000)))
    print(json.dumps([before, fit(ds), ds.nbytes]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path):
    import dask.array as da

    rng = da.random.default_rng(0)
    X = rng.normal(size=(4_000_000, 20), chunks=(50_000, 20)).astype("f4")
    y = rng.normal(size=4_000_000, chunks=50_000).astype("f4")
    path = str(tmp_path / "data.zarr")
    xr.Dataset({"X": (("obs", "feature"), X), "y": ("obs", y)}).to_zarr(path, zarr_format=3)
    script = MEASURED.format(tests=os.path.dirname(__file__), path=path)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    before, after, size = json.loads(done.stdout.splitlines()[-1])
    assert size > 300e6
    # Windows of 8 MiB, some five times over, and what a process adds as it goes.
    assert after - before < 100e6


@pytest.mark.slow
def test_a_random_key_of_jax_is_kept_as_its_words(few):
    fitted = quiet(few, effects, batch={"group": 4}, steps=5, draws=5)
    assert all(isinstance(v, np.ndarray) and v.dtype != object for v in fitted.state.values())
    words = jax.random.key_data(jax.random.key(0))
    assert any(v.shape == words.shape and v.dtype == words.dtype for v in fitted.state.values())
