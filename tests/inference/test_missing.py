"""Missing values: masked cell by cell, whatever the model, the layout and the method."""

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
from hypothesis import assume, given
from hypothesis import strategies as st
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from numpyro.infer.util import log_density
from strategies import DIMS, cases

import xr_aimz
from xr_aimz.binding.bound import bind
from xr_aimz.binding.layout import arrange, block_of
from xr_aimz.errors import ConvergenceWarning, MissingValueError
from xr_aimz.inference.missing import mask_model, prepare_masked
from xr_aimz.tracing.sites import trace_lock

# Models. The sites that each observes are named after the outcome.


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(slope * x, 0.3), obs=y)


def logged(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("log_y", dist.Normal(slope * x, 1), obs=None if y is None else jnp.log(y))


def transposed(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("yt", dist.Normal(slope * x.T, 1), obs=None if y is None else y.T)


def bounded(x, y=None):
    """A density that is -inf or has no gradient wherever y is not below x."""
    power = numpyro.sample("power", dist.HalfNormal(1))
    u = dist.Beta(power + 1, 2.0)
    numpyro.sample(
        "y", dist.TransformedDistribution(u, dist.transforms.AffineTransform(0.0, x)), obs=y
    )


def counted(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Poisson(jnp.exp(slope * x)), obs=y)


def shares(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Dirichlet(jnp.exp(slope * x[..., None] * jnp.arange(3.0))), obs=y)


def regression(X, y=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([X.shape[1]]).to_event(1))
    with numpyro.plate("data", X.shape[0]):
        numpyro.sample("y", dist.Normal(X @ w, 1), obs=y)


def walk(level0, y=None):
    drift = numpyro.sample("drift", dist.Normal(0, 1))

    def step(level, now):
        with xr_aimz.plate("lat"):
            level = level + drift
            numpyro.sample("y", dist.Normal(level, 0.1), obs=now)
        return level, None

    scan(step, level0[0], y, length=level0.shape[0])


def two(x, z, y=None, n=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
    numpyro.sample("n", dist.Normal(slope * z, 1), obs=n)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    shape = (6, 5)
    return xr.Dataset(
        {
            "x": (("time", "lat"), rng.uniform(2, 3, shape)),
            "z": ("time", rng.uniform(2, 3, 6)),
            "y": (("time", "lat"), rng.uniform(0.5, 1.5, shape)),
            "n": (("time", "lat"), rng.poisson(3, shape).astype(float)),
            "shares": (("time", "lat", "kind"), rng.dirichlet([2, 2, 2], shape)),
            "level0": (("time", "lat"), np.zeros(shape)),
        },
        {"time": np.arange(6), "lat": np.arange(5.0)},
    )


def at(ds, name, *cells):
    """A copy with NaN in cells of a variable."""
    values = ds[name].values.copy()
    for cell in cells:
        values[cell] = np.nan
    return ds.assign({name: (ds[name].dims, values, ds[name].attrs)})


def problem(ds, model, variables=None, **options):
    """A bound model, masked, its arguments, and the block that it is traced for."""
    bound = bind(ds, model, variables, **options)
    block = block_of(bound.binding, bound.inputs.sizes)
    arrays = {k: jnp.asarray(a.values) for k, a in bound.inputs.arrays.items()}
    passed = arrange(bound.binding, arrays, bound.inputs.dims, block)
    return bound, prepare_masked(model, bound.binding, bound.sites, passed, block), passed, block


def density(model, passed, block, latents):
    def total(latents):
        return log_density(model, (), passed, latents)[0]

    with trace_lock(block):
        return jax.value_and_grad(total)(latents)


def terms(ds, model, latents, variables=None, **options):
    """The log density of each cell of each observed site, and of the priors, by name."""
    _, _, passed, block = problem(ds, model, variables, **options)
    with trace_lock(block):
        sites = handlers.trace(handlers.substitute(model, data=latents)).get_trace(**passed)
        return {n: m["fn"].log_prob(m["value"]) for n, m in sites.items() if m["type"] == "sample"}


S, P = {"slope": 0.4}, {"power": 0.7}
GRID = [
    # model, variables, the variable with gaps, its gaps, site, cells of the site that go
    (line, {}, "y", [(1, 2), (3, 0)], S, "y", [(1, 2), (3, 0)]),
    (line, {}, "x", [(1, 2)], S, "y", [(1, 2)]),
    (line, {"x": "z"}, "z", [(4,)], S, "y", [(4, slice(None))]),
    (logged, {}, "y", [(1, 2), (0, 0)], S, "log_y", [(1, 2), (0, 0)]),
    (logged, {}, "x", [(1, 2)], S, "log_y", [(1, 2)]),
    (transposed, {}, "y", [(1, 2)], S, "yt", [(2, 1)]),
    (transposed, {}, "x", [(1, 2)], S, "yt", [(2, 1)]),
    (bounded, {}, "y", [(1, 2)], P, "y", [(1, 2)]),
    (bounded, {}, "x", [(0, 0)], P, "y", [(0, 0)]),
    (counted, {"y": "n"}, "n", [(5, 4)], S, "y", [(5, 4)]),
    (counted, {"y": "n"}, "x", [(0, 0)], S, "y", [(0, 0)]),
    (shares, {"y": "shares"}, "shares", [(1, 2, 0)], S, "y", [(1, 2)]),
    (shares, {"y": "shares"}, "x", [(1, 2)], S, "y", [(1, 2)]),
    (walk, {}, "y", [(1, 2), (0, 0)], {"drift": 0.2}, "y", [(1, 2), (0, 0)]),
    (two, {}, "x", [(1, 2)], S, "y", [(1, 2)]),
    (two, {}, "n", [(3, 3)], S, "n", [(3, 3)]),
    (two, {}, "z", [(2,)], S, "n", [(2, slice(None))]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "variables", "name", "gaps", "latents", "site", "gone"),
    GRID,
    ids=[f"{row[0].__name__}-{row[2]}" for row in GRID],
)
def test_only_the_cells_that_are_missing_leave_the_density(
    ds, model, variables, name, gaps, latents, site, gone
):
    core = {"core_dim": "time"} if model is walk else {}
    each = terms(ds, model, latents, variables, **core)
    there = np.ones(each[site].shape, bool)
    for cell in gone:
        there[cell] = False
    expected = sum(float(np.sum(v)) for n, v in each.items() if n != site)
    expected += float(np.sum(np.where(there, each[site], 0)))
    _, without, passed, block = problem(at(ds, name, *gaps), model, variables, **core)
    assert without is not model
    found, gradient = density(without, passed, block, latents)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert all(np.isfinite(g) for g in gradient.values())


def test_a_model_without_gaps_is_left_as_it_is(ds):
    assert problem(ds, line)[1] is line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x", "z", "y"])
def test_a_table_of_stacked_variables(ds, name):
    latents = {"w": jnp.array([0.3, -0.2])}
    options = {"variables": {"X": ["x", "z"]}, "layout": "table"}
    cell = (4,) if name == "z" else (4, 1)
    each = terms(ds, regression, latents, **options)
    there = np.ones((6, 5), bool)
    there[cell] = False
    expected = float(each["w"]) + float(each["y"][there.ravel()].sum())
    _, without, passed, block = problem(at(ds, name, cell), regression, **options)
    found, gradient = density(without, passed, block, latents)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert np.isfinite(gradient["w"]).all()


def test_the_wrapped_model_can_be_mapped_over_cells(ds):
    # What a fit in every cell does: the same program, other gaps in each, one without data.
    bound, _, _, _ = problem(ds.isel(lat=0, drop=True), line)
    without = mask_model(line, bound.binding, bound.sites)
    gappy = at(ds, "y", (1, 2), (slice(None), 4))

    def one(x, y):
        return log_density(without, (), {"x": x, "y": y}, {"slope": 0.4})[0]

    found = jax.jit(jax.vmap(one, in_axes=1))
    with trace_lock(block_of(bound.binding, bound.inputs.sizes)):
        totals = found(jnp.asarray(gappy.x.values), jnp.asarray(gappy.y.values))
    each = terms(ds, line, {"slope": 0.4})
    kept = np.where(np.isnan(gappy.y), 0, each["y"]).sum(0) + float(each["slope"])
    np.testing.assert_allclose(totals, kept, rtol=2e-6)


# Law 11, on generated Datasets.


@pytest.mark.slow
@given(st.data())
def test_a_missing_value_changes_nothing_but_its_own_cell(data):
    case = data.draw(cases())
    floats = {n: case.ds[n].astype(float) for n in ("n", "hit")}
    ds = case.ds.assign(floats)
    names = [*case.outcomes] + ["x"] * (ds.x.dtype.kind == "f")
    name = data.draw(st.sampled_from(names))
    shape = [ds.sizes[d] for d in ds[name].dims if d in DIMS]
    assume(np.prod(shape) > 1)
    cell = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    options = {"variables": case.variables, "layout": case.layout}

    bound, _, passed, block = problem(ds, case.model, **options)
    latents = {n: jnp.reshape(v[0, 0], bound.sites[n].shape) for n, v in case.posterior.items()}
    with trace_lock(block):
        sites = handlers.trace(handlers.substitute(case.model, data=latents)).get_trace(**passed)
    terms = {n: m["fn"].log_prob(m["value"]) for n, m in sites.items() if m["type"] == "sample"}

    gappy = at(ds, name, cell)
    _, without, holed, block = problem(gappy, case.model, **options)
    found, gradient = density(without, holed, block, latents)
    expected = 0.0
    for site, term in terms.items():
        gone = np.zeros(1, bool)
        for argument in bound.sites[site].observed_inputs | bound.sites[site].density_inputs:
            if any(s.name == name for s in bound.binding.argument(argument).sources):
                rank = 1 if case.layout == "table" else len(shape)
                gone = np.isnan(holed[argument])
                gone = gone.any(tuple(range(rank, gone.ndim)))
                assert gone.sum() == 1
        expected += float(np.sum(np.where(gone, 0, term)))
    # The terms are of order 1 to 100, and there are some hundred at most.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert all(np.isfinite(g).all() for g in gradient.values())


# What a gap would touch besides its own cell is an error.


def centred(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * (x - x.mean()), 1), obs=y)


def scaled(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    scale = 1.0 if y is None else y.std()
    numpyro.sample("y", dist.Normal(slope * x, scale), obs=y)


def lagged(x, y=None):
    """Autoregressive in its own outcome."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    before = jnp.zeros_like(x) if y is None else jnp.concatenate([jnp.zeros((1, 5)), y[:-1]])
    numpyro.sample("y", dist.Normal(slope * before + x, 1), obs=y)


def tail(x, y=None):
    """Autoregressive, given the first value: it observes the others."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    before = jnp.zeros_like(x[1:]) if y is None else y[:-1]
    now = None if y is None else y[1:]
    numpyro.sample("later", dist.Normal(slope * before + x[1:], 1), obs=now)


def informed(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(x.max(), x.mean()))
    numpyro.sample("y", dist.Normal(slope + 0 * x, 1), obs=y)


def factored(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
    numpyro.factor("penalty", -0.1 * jnp.abs(0.0 if y is None else y).sum())


@pytest.mark.parametrize(
    ("model", "name", "moved"),
    [
        (centred, "x", ["y"]),
        (scaled, "y", ["y"]),
        (lagged, "y", ["y"]),
        (tail, "y", ["later"]),
        (informed, "x", ["slope"]),
        (factored, "y", ["penalty"]),
    ],
)
def test_a_gap_that_touches_other_cells_is_an_error(ds, model, name, moved):
    with pytest.raises(MissingValueError) as refused:
        at(ds, name, (2, 2)).aimz.fit(model, core_dim=("time", "lat"), progress=False)
    text = str(refused.value)
    assert f"variable {name!r} (argument {name!r}) has 1 missing values (NaN) of 30" in text
    assert repr(moved) in text
    assert "fillna" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "gone"),
    [(lagged, "x", (2, 2)), (tail, "x", (1, 2)), (informed, "y", (2, 2))],
)
def test_a_gap_elsewhere_in_the_same_models_is_none(ds, model, name, gone):
    latents = {"slope": 0.4}
    each = terms(ds, model, latents)
    site = "later" if model is tail else "y"
    there = np.ones(each[site].shape, bool)
    there[gone] = False
    expected = float(each["slope"]) + float(each[site][there].sum())
    _, without, passed, block = problem(at(ds, name, (2, 2)), model)
    np.testing.assert_allclose(density(without, passed, block, latents)[0], expected, rtol=2e-6)


def flagged(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    above = None if y is None else (y > 1).astype(int)
    numpyro.sample("above", dist.Bernoulli(logits=slope * x), obs=above)


def partial_plate(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with numpyro.plate("lat", 5, subsample_size=2):
        batch = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y_part", dist.Normal(slope, 1), obs=batch)


def test_what_hides_its_gaps_is_an_error(ds):
    with pytest.raises(MissingValueError, match=r"'above' observes a function of \['y'\]"):
        at(ds, "y", (1, 1)).aimz.fit(flagged, progress=False)
    with pytest.raises(xr_aimz.errors.ModelError, match=r"'lat' takes a random part of its 5"):
        at(ds, "y", (1, 1)).aimz.fit(partial_plate, progress=False)


def test_an_input_without_observation_dims_is_an_error(ds):
    def known(x, weights, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(slope * x, weights[0]), obs=y)

    gappy = ds.assign(weights=("kind", [1.0, np.nan, 1.0]))
    with pytest.raises(MissingValueError, match=r"'weights'.*no observation dimension"):
        gappy.aimz.fit(known, progress=False)


def test_no_cell_left_is_an_error(ds):
    gappy = at(at(ds, "y", (slice(3),)), "x", (slice(3, 6),))
    with pytest.raises(MissingValueError, match=r"no cell of site 'y' has its outcome"):
        gappy.aimz.fit(line, progress=False)


# Every method.

SHORT = {"draws": 200, "warmup": 200, "chains": 2, "progress": False}


def fit_quietly(ds, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ds.aimz.fit(*args, **options)


def settling():
    """An optimizer that ends on the optimum, and not in a cloud around it."""
    return optax.adam(optax.exponential_decay(0.05, 3000, 1e-3))


def parts():
    guide = AutoGuideList(pair)
    guide.append(AutoNormal(handlers.block(pair, hide=["other"])))
    guide.append(AutoDelta(handlers.block(pair, expose=["other"])))
    return SVI(pair, guide, settling(), Trace_ELBO())


def pair(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    other = numpyro.sample("other", dist.Normal(0, 0.1))
    numpyro.sample("y", dist.Normal(slope * x + 0 * other, 0.3), obs=y)


def by_hand(x, y=None):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 0.1, constraint=dist.constraints.positive)
    numpyro.sample("slope", dist.Normal(mean, sd))


METHODS = {
    "nuts": lambda: ("nuts", SHORT),
    "svi": lambda: ("svi", {"steps": 3000}),
    "kernel": lambda: (HMC(line, trajectory_length=1.0), SHORT),
    "MCMC": lambda: (
        MCMC(
            NUTS(line),
            num_warmup=200,
            num_samples=200,
            num_chains=2,
            chain_method="vectorized",
            progress_bar=False,
        ),
        {},
    ),
    "guide class": lambda: (AutoNormal, {"steps": 3000}),
    "guide": lambda: (AutoNormal(line), {"steps": 3000}),
    "SVI": lambda: (SVI(line, AutoNormal(line), settling(), Trace_ELBO()), {"steps": 3000}),
    "SVI by hand": lambda: (SVI(line, by_hand, settling(), Trace_ELBO()), {"steps": 3000}),
    "parts": lambda: (parts(), {"steps": 3000}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_gives_the_posterior_of_what_is_there(ds, name):
    method, options = METHODS[name]()
    gappy = at(at(ds, "y", (0, 0), (5, 4)), "x", (2, 2))
    model = pair if name == "parts" else line
    fitted = fit_quietly(gappy, model, method=method, **{"progress": False, **options})
    both = gappy.x.notnull() & gappy.y.notnull()
    x, y = gappy.x.where(both, 0), gappy.y.where(both, 0)
    precision = float((x**2).sum() / 0.3**2 + 1 / 100)
    mean, sd = float((x * y).sum() / 0.3**2) / precision, precision**-0.5
    found = fitted.posterior.slope
    # 400 correlated draws, or a guide trained for a few seconds
    assert abs(float(found.mean()) - mean) < 0.3 * sd
    assert abs(float(found.std()) / sd - 1) < 0.2
    assert fitted.model is model


@pytest.mark.slow
def test_a_missing_cell_is_as_a_label_that_was_dropped(ds):
    row = ds[["z", "y"]].isel(lat=0, drop=True).rename(z="x")
    options = {"method": "svi", "steps": 500, "draws": 50, "progress": False}
    gappy = fit_quietly(at(row, "y", (2,), (4,)), line, **options)
    dropped = fit_quietly(row.isel(time=[0, 1, 3, 5]), line, **options)
    np.testing.assert_allclose(gappy.posterior.slope, dropped.posterior.slope, rtol=1e-5)


@pytest.mark.slow
def test_a_latent_whose_cells_are_all_missing_has_its_prior(ds):
    def local(y=None):
        with xr_aimz.plate("lat"):
            level = numpyro.sample("level", dist.Normal(3, 2))
        with xr_aimz.plate("time"), xr_aimz.plate("lat"):
            numpyro.sample("y", dist.Normal(level, 1), obs=y)

    gappy = at(ds, "y", (slice(None), 2))
    level = fit_quietly(gappy, local, method="svi", steps=5000, progress=False).posterior.level
    assert abs(float(level[..., 2].mean()) - 3) < 0.3
    assert abs(float(level[..., 2].std()) / 2 - 1) < 0.15
    assert float(level[..., 1].std()) < 0.5


# Predictions.


@pytest.fixture(scope="module")
def fitted(ds):
    gappy = at(ds, "y", (0, 0), (5, 4))
    return gappy, fit_quietly(gappy, line, method="svi", steps=300, draws=20, progress=False)


def test_a_prediction_fills_the_gaps_of_its_outcome(fitted):
    gappy, fit = fitted
    pred = gappy.aimz.predict(fit).y.compute()
    assert np.isfinite(pred).all()


def test_a_likelihood_is_nan_where_anything_is_missing(fitted):
    gappy, fit = fitted
    gappy = at(gappy, "x", (2, 2))
    found = gappy.aimz.log_likelihood(fit).y.compute()
    gone = gappy.y.isnull() | gappy.x.isnull()
    xr.testing.assert_equal(found.isnull().all(("chain", "draw")), gone)
    xr.testing.assert_equal(found.isnull().any(("chain", "draw")), gone)


def swallows(x, z, y=None):
    """A model that makes a number of NaN."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    mean = slope * jnp.where(x > 2.5, 1.0, 0.0) + jnp.nan_to_num(z)
    numpyro.deterministic("mean", mean)
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


@pytest.mark.parametrize("layout", ["grid", "table"])
@pytest.mark.parametrize("chunks", [{}, {"time": 4}, {"time": 1, "lat": 2}])
def test_an_outcome_is_nan_where_its_inputs_are(ds, chunks, layout):
    fit = ds.aimz.from_posterior(swallows, {"slope": np.ones((1, 3))}, layout=layout)
    gappy = at(at(ds, "x", (2, 3)), "z", (4,))
    pred = gappy.chunk(chunks).aimz.predict(fit).compute()
    gone = np.zeros((6, 5), bool)
    gone[2, 3] = gone[4] = True
    np.testing.assert_array_equal(np.isnan(pred.y), np.broadcast_to(gone, (1, 3, 6, 5)))
    # what is not drawn is what the model says that it is
    assert np.isfinite(pred["mean"]).all()


def test_each_outcome_misses_its_own_inputs_only(ds):
    fit = ds.aimz.from_posterior(two, {"slope": np.ones((1, 3))})
    pred = at(ds, "x", (2, 3)).aimz.predict(fit).compute()
    assert np.isnan(pred.y[0, :, 2, 3]).all()
    assert int(np.isnan(pred.y).sum()) == 3
    assert np.isfinite(pred.n).all()


def test_a_multivariate_outcome_misses_a_cell_whole(ds):
    fit = ds.aimz.from_posterior(shares, {"slope": np.ones((1, 3))}, {"y": "shares"})
    pred = at(ds, "x", (2, 3)).aimz.predict(fit).shares.compute()
    assert np.isnan(pred[0, :, 2, 3]).all()
    assert int(np.isnan(pred).sum()) == 9
    gappy = at(ds, "shares", (2, 3, 1))
    found = gappy.aimz.log_likelihood(fit).shares.compute()
    assert found.dims == ("chain", "draw", "time", "lat")
    assert int(np.isnan(found).sum()) == 3


def test_ints_have_no_nan_and_say_so(ds):
    fit = ds.aimz.from_posterior(counted, {"slope": np.ones((1, 3))}, {"y": "n"})
    gappy = at(ds, "x", (2, 3))
    pred = gappy.chunk(time=2).aimz.predict(fit)
    with pytest.raises(MissingValueError) as refused:
        pred.compute()
    assert "variable 'x' (argument 'x')" in str(refused.value)
    assert "fillna" in str(refused.value)
    # and what it says works
    filled = gappy.fillna({"x": 0}).aimz.predict(fit).where(gappy.x.notnull()).n.compute()
    np.testing.assert_array_equal(
        np.isnan(filled), np.broadcast_to(gappy.x.isnull(), (1, 3, 6, 5))
    )
