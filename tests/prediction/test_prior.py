"""Draws from the prior: a prediction that knows of no data."""

import dask
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import strategies
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from lazy_checks import ComputedError, all_lazy, refuse
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive
from scipy import stats
from strategies import assert_same, cases, chunked, chunkings

import xr_aimz
from xr_aimz.errors import (
    BindingError,
    DimensionError,
    MissingVariableError,
    ModelError,
    OptionError,
    RandomnessError,
)

MOST_Z, LEAST_P = 5.0, 1e-5


def hierarchy(x, y=None):
    mu = numpyro.sample("mu", dist.Normal(1, 2))
    tau = numpyro.sample("tau", dist.Gamma(3.0, 2.0))
    with numpyro.plate("site", x.shape[-1], dim=-1):
        level = numpyro.sample("level", dist.Normal(mu, tau))
        with numpyro.plate("time", x.shape[0], dim=-2):
            mean = numpyro.deterministic("mean", level + x)
            numpyro.sample("y", dist.StudentT(8.0, mean, 0.5), obs=y)


@pytest.fixture(scope="module")
def grid():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f4")
    return xr.Dataset({"x": (("time", "site"), x)}, {"time": range(3), "site": list("abcd")})


NAMES = ["mu", "tau", "level", "mean", "y"]


@pytest.mark.slow
def test_it_is_numpyros_predictive_in_distribution(grid):
    options = {"dim": ("time", "site"), "sites": NAMES, "draws": 20_000}
    ours = grid.chunk(site=2).aimz.prior_predictive(hierarchy, **options).compute()
    theirs = Predictive(hierarchy, num_samples=20_000)(jax.random.key(0), x=grid.x.values)
    for name in NAMES:
        left = ours[name].values[0].reshape(20_000, -1).astype("f8")
        right = np.asarray(theirs[name]).reshape(20_000, -1).astype("f8")
        assert left.shape == right.shape
        for a, b in ((left, right), ((left - right.mean(0)) ** 2, (right - right.mean(0)) ** 2)):
            spread = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
            assert np.abs((a.mean(0) - b.mean(0)) / spread).max() < MOST_Z
        for a, b in zip(left.T, right.T, strict=True):
            assert stats.ks_2samp(a, b).pvalue > LEAST_P
    # The sites of a draw belong together.
    mean = (ours.level + grid.x).transpose(*ours["mean"].dims)
    np.testing.assert_allclose(ours["mean"], mean, atol=1e-5)
    z = (ours.level - ours.mu) / ours.tau
    assert np.abs(z.mean()) < MOST_Z / np.sqrt(80_000)
    assert np.abs(z.var() - 1) < MOST_Z * np.sqrt(2 / 80_000)


@pytest.mark.slow
def test_what_comes_out(grid):
    prior = grid.aimz.prior_predictive(hierarchy, dim=("time", "site"), draws=7)
    assert list(prior) == ["mean", "y"]
    assert prior.y.dims == ("chain", "draw", "time", "site")
    assert prior.sizes == {"chain": 1, "draw": 7, "time": 3, "site": 4}
    assert prior.site.values.tolist() == list("abcd")
    assert prior.attrs["history"].endswith("prior_predictive of hierarchy")
    latents = grid.aimz.prior_predictive(hierarchy, dim=("time", "site"), sites="level", draws=7)
    assert latents.level.dims == ("chain", "draw", "site")
    # Defaults, and the same function.
    same = xr_aimz.prior_predictive(grid, hierarchy, dim=("time", "site"))
    assert same.sizes["draw"] == 500
    assert_same(same.isel(draw=slice(7)), prior)


def there(case):
    """The Dataset of a case without its outcomes, and the variables that are left."""
    ds = case.ds.drop_vars(case.outcomes)
    gone = {n: v for n, v in case.variables.items() if isinstance(v, str) and v not in ds}
    return ds, {n: v for n, v in case.variables.items() if n not in gone}


@pytest.mark.slow
@settings(max_examples=6)
@given(st.data())
def test_it_commutes_with_selection_and_chunks(data):
    case = data.draw(cases(kinds=strategies.KINDS))
    sites = [*case.posterior, *case.outcomes]
    options = {"layout": case.layout, "draws": 3, "sites": sites}
    prior = case.ds.aimz.prior_predictive(case.model, case.variables, **options)
    some = {
        d: data.draw(st.lists(st.integers(0, case.ds.sizes[d] - 1), min_size=1, unique=True))
        for d in case.dims
    }
    part = case.ds.isel(some)
    part = chunked(part, data.draw(chunkings(part)))
    assert_same(
        part.aimz.prior_predictive(case.model, case.variables, **options), prior.isel(some)
    )


@pytest.mark.slow
@settings(max_examples=4)
@given(cases(families=("grid", "local", "broadcast", "features", "table")))
def test_the_outcome_need_not_be_there(case):
    ds, variables = there(case)
    options = {"layout": case.layout, "draws": 3}
    whole = case.ds.aimz.prior_predictive(case.model, case.variables, **options)
    absent = ds.aimz.prior_predictive(case.model, variables, dim=case.dims, **options)
    assert absent.y.attrs == {}
    absent["y"].attrs.update(whole.y.attrs)
    assert_same(absent, whole)


@settings(max_examples=6)
@given(st.data())
def test_building_it_computes_nothing(data):
    case = data.draw(cases())
    ds = all_lazy(case.ds, data.draw(chunkings(case.ds)))
    with dask.config.set(scheduler=refuse):
        prior = ds.aimz.prior_predictive(case.model, case.variables, layout=case.layout)
    with pytest.raises(ComputedError):
        prior.compute(scheduler="synchronous")


def test_a_recursion_and_two_absent_outcomes():
    def model(t, y=None, wet=None, weight=None):
        rate = numpyro.sample("rate", dist.Normal(5, 1e-3))

        def step(level, now):
            level = numpyro.sample("level", dist.Normal(level + rate, 1e-3))
            numpyro.sample("y", dist.Normal(level, 1e-3), obs=now)
            return level, None

        scan(step, 0.0, y, length=t.shape[0])
        numpyro.sample("wet", dist.Bernoulli(probs=jnp.ones(t.shape)), obs=wet)

    ds = xr.Dataset({"t": ("time", np.zeros(4))}, {"time": range(4)})
    prior = ds.aimz.prior_predictive(model, core_dim="time", draws=3)
    assert set(prior) == {"y", "wet"}
    np.testing.assert_allclose(prior.y[0, 0], [5, 10, 15, 20], atol=0.05)
    assert prior.wet.dims == ("chain", "draw", "time")
    with pytest.raises(ModelError, match="inside a scan along 'time', which is cut"):
        ds.chunk(time=2).aimz.prior_predictive(model, draws=3)


def test_a_deterministic_of_what_is_drawn_is_not_cut():
    def model(x, y=None):
        with xr_aimz.plate("time"):
            level = numpyro.sample("level", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(level + x, 1), obs=y)
        numpyro.deterministic("total", level.sum())

    ds = xr.Dataset({"x": ("time", np.zeros(6))}, {"time": range(6)})
    prior = ds.aimz.prior_predictive(model, sites=["level", "total"], draws=3).compute()
    np.testing.assert_allclose(prior.total, prior.level.sum("time"), rtol=1e-5)
    cut = ds.chunk(time=2)
    with pytest.raises(ModelError, match=r"'total' has no dimension \['time'\].*\['level'\]"):
        cut.aimz.prior_predictive(model)
    assert_same(cut.aimz.prior_predictive(model, sites="level", draws=3), prior[["level"]])


def test_arviz_finds_its_groups():
    def line(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 10))
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

    ds = xr.Dataset({v: ("time", np.ones(5)) for v in "xy"}, {"time": range(5)})
    fit = ds.aimz.from_posterior(line, {"slope": np.ones((1, 4))})
    both = ds.aimz.prior_predictive(line, sites=["slope", "y"], draws=20)
    tree = fit.to_datatree(prior=both[["slope"]], prior_predictive=both[["y"]])
    assert set(tree) >= {"posterior", "observed_data", "prior", "prior_predictive"}
    assert tree["prior_predictive"].y.sizes["draw"] == 20


# Bad input.


def no_outcome(x):
    numpyro.sample("slope", dist.Normal(0, 1))


def with_param(x, y=None):
    scale = numpyro.param("scale", 1.0)
    numpyro.sample("y", dist.Normal(x, scale), obs=y)


def improper(x, y=None):
    a = numpyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(x + a, 1), obs=y)


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (no_outcome, {}, ModelError, r"neither an outcome.*sites=.*\['slope'\]"),
        (with_param, {}, ModelError, r"\['scale'\] are trained and have no prior"),
        (improper, {}, RandomnessError, "site 'a': ImproperUniform has no sampler"),
        (strategies.broadcast, {}, BindingError, r"\['z'\] of the model are bound to nothing"),
        (improper, {"draws": 0}, OptionError, "draws=0"),
        (improper, {"draws": True}, OptionError, "draws=True"),
        (improper, {"sites": "b"}, MissingVariableError, r"sites=\('b',\)"),
        (improper, {"core_dim": "lat"}, DimensionError, r"core_dim=\['lat'\]"),
    ],
)
def test_bad_input_is_refused(model, options, error, match):
    ds = xr.Dataset({"x": ("time", np.ones(3))}, {"time": range(3)})
    with pytest.raises(error, match=match):
        ds.aimz.prior_predictive(model, **options)


def test_dims_that_are_not_known_are_asked_for(grid):
    with pytest.raises(DimensionError, match=r"the outcome is not in the Dataset.*dim="):
        grid.aimz.prior_predictive(hierarchy)


def test_a_model_without_an_outcome_has_its_latents():
    ds = xr.Dataset({"x": ("time", np.ones(3))}, {"time": range(3)})
    prior = ds.aimz.prior_predictive(no_outcome, sites="slope", draws=5)
    assert prior.slope.shape == (1, 5)
    assert len(np.unique(prior.slope)) == 5
