"""A fit in every cell: law 10, closed forms, NaN and failures, labels, diagnostics."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import strategies
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoMultivariateNormal
from scipy.stats import norm

import xr_aimz
from xr_aimz.errors import ConvergenceWarning, DimensionError, LabelError, ModelError, OptionError

NOISE, TAU = 0.5, 3.0
PER = ("lat", "lon")
METHODS = {
    "nuts": {"draws": 500, "warmup": 300, "chains": 2},
    "laplace": {"draws": 1000},
    "svi": {"draws": 1000, "steps": 3000},
}
SHORT = {"draws": 40, "warmup": 40, "chains": 2}


def line(x, y=None):
    """Known noise: in each cell the posterior is a Gaussian that can be written down."""
    level = numpyro.sample("level", dist.Normal(0, TAU))
    slope = numpyro.sample("slope", dist.Normal(0, TAU))
    numpyro.deterministic("double", 2 * slope)
    mean = numpyro.deterministic("mean", level + slope * x)
    numpyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def noisy(x, y=None):
    level = numpyro.sample("level", dist.Normal(0, TAU))
    slope = numpyro.sample("slope", dist.Normal(0, TAU))
    noise = numpyro.sample("noise", dist.HalfNormal(2))
    numpyro.sample("y", dist.Normal(level + slope * x, noise), obs=y)


def counts(x, y=None):
    rate = numpyro.sample("rate", dist.Normal(0, 1))
    numpyro.sample("y", dist.Poisson(jnp.exp(rate + 0 * x)), obs=y)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 30)
    level, slope = rng.normal(size=(2, 4, 5))
    y = level + slope * x[:, None, None] + NOISE * rng.normal(size=(30, 4, 5))
    y[:, 1, 2] = np.nan
    return xr.Dataset(
        {"y": (("time", *PER), y, {"units": "K"})},
        {"x": ("time", x), "time": np.arange(30), "lat": [50.0, 40, 30, 20], "lon": range(5)},
    )


def quiet(ds, model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ds.aimz.fit(model, *args, progress=False, **{"per": PER, **options})


@pytest.fixture(scope="module", params=list(METHODS))
def fitted(ds, request):
    return request.param, quiet(ds, line, method=request.param, **METHODS[request.param])


@pytest.fixture(scope="module")
def laplace(ds):
    return quiet(ds, line, method="laplace", draws=200)


def closed_form(ds):
    """Mean and sd of level and slope in every cell."""
    design = np.stack([np.ones(ds.sizes["time"]), ds.x.values], 1)
    precision = design.T @ design / NOISE**2 + np.eye(2) / TAU**2
    moments = np.einsum("tk,tij->kij", design, ds.y.values) / NOISE**2
    mean = np.einsum("kl,lij->kij", np.linalg.inv(precision), moments)
    return mean, np.sqrt(np.diag(np.linalg.inv(precision)))


@pytest.mark.slow
def test_each_cell_has_its_closed_form(ds, fitted):
    method, fit = fitted
    mean, sd = closed_form(ds)
    draws = fit.posterior
    for k, name in enumerate(("level", "slope")):
        off = (draws[name].mean(("chain", "draw")) - mean[k]) / sd[k]
        spread = draws[name].std(("chain", "draw")) / sd[k]
        # 1000 draws: the mean has 0.03 sd of Monte Carlo error, the sd 0.022; the largest of
        # 38 values some three times that, and draws of NUTS are not quite independent.
        assert float(abs(off).max()) < 0.16, method
        assert float(abs(spread - 1).max()) < 0.12, method


def test_posterior_and_stats_are_maps(ds, fitted):
    method, fit = fitted
    assert fit.posterior.slope.dims == ("chain", "draw", *PER)
    assert set(fit.posterior) == {"level", "slope", "double"}
    np.testing.assert_allclose(fit.posterior.double, 2 * fit.posterior.slope, rtol=1e-6)
    assert fit.posterior.lat.equals(ds.lat)
    status = fit.sample_stats.status
    assert (status.dtype, status.dims) == (np.int8, PER)
    assert status.attrs["flag_meanings"].split()[int(status[1, 2])] == "no_data"
    assert int((status != 0).sum()) == 1
    assert bool(fit.posterior.slope[:, :, 1, 2].isnull().all())
    assert int(fit.posterior.slope[0, 0].isnull().sum()) == 1
    table = fit.diagnostics()
    assert table.slope.dims == ("diagnostic", *PER)
    assert int(table.slope.sel(diagnostic="ess_bulk").notnull().sum()) == 19
    if method == "nuts":
        assert table.divergences.dims == ("chain", *PER)
        assert set(fit.sample_stats) == {"diverging", "lp", "n_steps", "status"}
    if method == "svi":
        assert fit.losses.dims == ("step", *PER)
        assert fit.losses.sizes["step"] <= 500
        assert int(fit.losses.step[-1]) == 3000
    assert "('lat', 'lon'): 20 cells, 19 of them fitted" in repr(fit)


# Law 10. One program serves all regions, so an example costs a trace and a run.
REGION = xr.Dataset(
    {"y": (("time", *PER), np.random.default_rng(1).normal(size=(13, 5, 9)))},
    {
        "x": ("time", np.linspace(-1, 1, 13)),
        "time": np.arange(13),
        "lat": np.arange(5) * 2.5,
        "lon": np.arange(9),
    },
)


@pytest.fixture(scope="module")
def whole():
    return {
        method: quiet(REGION, noisy, method=method, **options)
        for method, options in (
            ("nuts", SHORT),
            ("laplace", {"draws": 40}),
            ("svi", {"draws": 40, "steps": 200}),
        )
    }


@st.composite
def regions(draw):
    return {
        d: draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
        for d, n in (("lat", 5), ("lon", 9))
    }


@pytest.mark.slow
@given(regions(), st.integers(1, 5), st.booleans())
def test_a_fit_of_a_region_is_cell_for_cell_that_of_each_part(whole, region, chunk, swapped):
    part = REGION.isel(region)
    part = part.chunk(lon=chunk) if chunk < 5 else part
    per = PER[::-1] if swapped else PER
    for method, options in (
        ("nuts", SHORT),
        ("laplace", {"draws": 40}),
        ("svi", {"draws": 40, "steps": 200}),
    ):
        fit = quiet(part, noisy, per=per, method=method, **options)
        expected = whole[method].posterior.isel(region)
        xr.testing.assert_allclose(
            fit.posterior.transpose(*expected.slope.dims), expected, rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nuts", "laplace"])
def test_a_cell_alone_is_what_it_is_among_others(whole, method):
    options = SHORT if method == "nuts" else {"draws": 40}
    for cell in ({"lat": [0], "lon": [0]}, {"lat": [4], "lon": [8]}, {"lat": [2], "lon": [7]}):
        fit = quiet(REGION.isel(cell), noisy, method=method, **options)
        expected = whole[method].posterior.isel(cell)
        xr.testing.assert_allclose(fit.posterior, expected, rtol=1e-5, atol=1e-5)


def test_chains_and_cells_have_noise_of_their_own(whole):
    draws = whole["nuts"].posterior.slope.stack(lane=("chain", *PER))
    assert len(np.unique(draws.isel(draw=-1))) == draws.sizes["lane"]


# Cells that go wrong.


def picky(x, scale, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, scale), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nuts", "laplace", "svi"])
def test_a_cell_that_fails_says_so_and_stops_no_other(ds, method):
    options = {"nuts": SHORT, "laplace": {"draws": 40}, "svi": {"draws": 40, "steps": 200}}[method]
    scale = xr.DataArray(np.full((4, 5), NOISE), dims=PER)
    good = ds.assign(scale=scale)
    # A datum whose square 32 bits cannot hold has no finite density, wherever the slope is.
    bad = good.assign(y=ds.y.where((ds.lat != 30) | (ds.lon != 3), 3e38))
    with pytest.warns(ConvergenceWarning, match=r"the fit of 1 of 20 cells failed") as caught:
        fit = bad.aimz.fit(picky, per=PER, method=method, progress=False, **options)
    assert len(caught) == 1
    flags = fit.sample_stats.status.attrs["flag_meanings"].split()
    assert flags[int(fit.sample_stats.status[2, 3])] in ("not_finite", "no_mode", "diverged")
    assert bool(fit.posterior.slope[:, :, 2, 3].isnull().all())
    others = quiet(good, picky, method=method, **options).posterior.where(scale.notnull())
    kept = others.where((others.lat != 30) | (others.lon != 3))
    xr.testing.assert_allclose(fit.posterior, kept, rtol=1e-5)


@pytest.mark.slow
def test_one_warning_counts_the_cells(ds):
    with pytest.warns(ConvergenceWarning, match=r"ess_bulk below 100 a chain .* in 19 of 20") as w:
        ds.aimz.fit(line, per=PER, draws=20, warmup=50, chains=2, progress=False)
    assert len(w) == 1
    assert w[0].filename == __file__


@pytest.mark.slow
def test_trees_that_end_at_their_greatest_depth_are_counted(ds, tmp_path):
    def narrow(x, y=None):
        level = numpyro.sample("level", dist.Normal(0, TAU))
        # In units so small that steps of the one are tiny for the other.
        slope = numpyro.sample("slope", dist.Normal(0, 1000 * TAU))
        numpyro.sample("y", dist.Normal(level + 1e-3 * slope * x, NOISE), obs=y)

    options = {"per": PER, "draws": 100, "warmup": 20, "chains": 1, "progress": False}
    kernel = NUTS(narrow, max_tree_depth=3, adapt_mass_matrix=False)
    with pytest.warns(ConvergenceWarning, match="greatest tree depth, 3, at worst"):
        fit = ds.aimz.fit(narrow, method=kernel, store=tmp_path / "cells.zarr", **options)
    (concern,) = [c for c in fit.concerns if "tree depth" in c]
    deep = (fit.sample_stats.n_steps == 7).mean(("chain", "draw")).compute()
    assert concern.startswith(f"in {int((deep > 0.01).sum())} of 20 cells")
    assert "NUTS(model, max_tree_depth=5)" in concern
    # Read again, it is the same; and where trees are small, there is none.
    again = quiet(
        ds, narrow, method=kernel, store=tmp_path / "cells.zarr", draws=100, warmup=20, chains=1
    )
    assert again.concerns == fit.concerns
    calm = quiet(ds, line, draws=100, warmup=100, chains=1)
    assert not any("tree depth" in c for c in calm.concerns)


@pytest.mark.slow
def test_five_steps_in_cells_are_a_concern(ds):
    with pytest.warns(ConvergenceWarning, match="5 steps are too few to see"):
        ds.aimz.fit(line, per=PER, method="svi", steps=5, draws=10, progress=False)


@pytest.mark.slow
def test_a_region_without_data_is_nan(ds):
    fit = quiet(ds.isel(lat=[1], lon=[2]), line, method="laplace", draws=10)
    assert bool(fit.posterior.slope.isnull().all())


# What comes of such a fit.


def test_predictions_have_the_outcomes_order_and_nan_where_the_fit_has(ds, laplace):
    pred = ds.drop_vars("y").aimz.predict(laplace)
    assert pred.y.dims == ("chain", "draw", "time", *PER)
    assert pred.y.attrs["units"] == "K"
    values = pred.y.compute()
    assert int(values.isnull().any(("chain", "draw", "time")).sum()) == 1
    mean, _ = closed_form(ds)
    expected = mean[0] + mean[1] * ds.x.values[:, None, None]
    # 200 draws of noise 0.5.
    error = abs(values.mean(("chain", "draw")) - expected).max()
    assert float(error) < 5 * NOISE / np.sqrt(200)


@pytest.mark.slow
@given(regions(), st.integers(1, 4))
def test_predictions_commute_with_selecting_cells(whole, region, chunk):
    fit = whole["laplace"]
    inputs = REGION.drop_vars("y")
    expected = inputs.aimz.predict(fit).isel(region).compute()
    found = inputs.isel(region).chunk(lat=chunk, time=5).aimz.predict(fit)
    xr.testing.assert_allclose(found.compute(), expected, rtol=1e-5, atol=1e-5)


def test_noise_differs_from_cell_to_cell(whole):
    pred = REGION.drop_vars("y").aimz.predict(whole["laplace"]).y
    mean = whole["laplace"].posterior.level + whole["laplace"].posterior.slope * REGION.x
    noise = (pred - mean).stack(cell=PER).transpose("cell", ...).values.reshape(45, -1)
    between = np.corrcoef(noise) - np.eye(45)
    # 520 independent pairs a coefficient: sd 0.044, the largest of 990 some four of them.
    assert np.abs(between).max() < 0.22


def test_log_likelihood_is_the_density_of_each_cell(ds, laplace):
    found = ds.aimz.log_likelihood(laplace).y.compute()
    draws = laplace.posterior
    mean = (draws.level + draws.slope * ds.x).transpose("chain", "draw", "time", *PER)
    expected = norm(mean.values, NOISE).logpdf(ds.y.values)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_a_cell_that_the_fit_never_saw_is_an_error(ds, laplace):
    with pytest.raises(LabelError, match=r"no draws for 1 labels of 'lat', \[99.0\]"):
        ds.assign_coords(lat=[50.0, 40, 30, 99]).aimz.predict(laplace)


@pytest.mark.slow
def test_counts_stay_ints_unless_a_cell_has_no_draws():
    y = np.random.default_rng(0).poisson(2.0, (20, 3))
    ds = xr.Dataset(
        {"y": (("time", "site"), y)}, {"x": ("time", np.zeros(20)), "site": list("abc")}
    )
    fit = quiet(ds, counts, per="site", method="laplace", draws=50)
    assert ds.aimz.predict(fit).y.dtype.kind == "i"
    gone = ds.assign(y=ds.y.where(ds.site != "b"))
    fit = quiet(gone, counts, per="site", method="laplace", draws=50)
    pred = gone.aimz.predict(fit).y
    assert pred.dtype.kind == "f"
    assert gone.isel(site=[0]).aimz.predict(fit).y.dtype == pred.dtype
    assert pred.compute().isnull().any(("chain", "draw", "time")).values.tolist() == [0, 1, 0]


@pytest.mark.slow
def test_inputs_may_lack_or_have_the_cells_dims(ds):
    offset = xr.DataArray(np.arange(4.0), dims="lat")

    def shifted(x, height, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(slope * x + height, NOISE), obs=y)

    inputs = ds.drop_vars("y").assign(height=offset)
    exact = inputs.assign(y=(inputs.height + 0.7 * ds.x).expand_dims(lon=ds.lon))
    fit = quiet(exact, shifted, method="laplace", draws=500)
    np.testing.assert_allclose(fit.posterior.slope.mean(("chain", "draw")), 0.7, atol=0.06)


@pytest.mark.slow
def test_table_layout_and_features_in_each_cell():
    rng = np.random.default_rng(3)
    x, z = rng.normal(size=(2, 40))
    y = 0.5 * x[:, None] - z[:, None] * np.arange(3) + 0.1 * rng.normal(size=(40, 3))
    ds = xr.Dataset({"x": ("row", x), "z": ("row", z), "y": (("row", "site"), y)})
    fit = quiet(
        ds, strategies.regression, {"X": ["x", "z"]}, per="site", layout="table", method="laplace"
    )
    assert fit.posterior.w.dims == ("chain", "draw", "site", "feature")
    expected = np.stack([np.full(3, 0.5), -np.arange(3.0)], -1)
    # NOISE of the model is 0.7, the prior's sd 2: the mean of a posterior of sd 0.12.
    np.testing.assert_allclose(fit.posterior.w.mean(("chain", "draw")), expected, atol=0.1)


@pytest.mark.slow
def test_a_kernel_and_a_guides_class_serve_too(ds):
    kernel = NUTS(noisy, target_accept_prob=0.9)
    twice = [quiet(ds.isel(lon=[0]), noisy, method=kernel, **SHORT).posterior for _ in range(2)]
    xr.testing.assert_identical(*twice)
    fit = quiet(ds, line, method=AutoMultivariateNormal, steps=3000)
    mean, sd = closed_form(ds)
    off = (fit.posterior.slope.mean(("chain", "draw")) - mean[1]) / sd[1]
    assert float(abs(off).max()) < 0.16


def test_describe_shows_per(ds):
    shown = repr(ds.aimz.describe(line, per=PER))
    assert "per: a fit for each label" in shown
    assert "30" in shown


# Errors before work.


def test_a_cell_has_no_plate_over_per(ds):
    def plated(x, y=None):
        with xr_aimz.plate("lat"):
            level = numpyro.sample("level", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(level + x, 1), obs=y)

    with pytest.raises(DimensionError, match="'lat' is in per="):
        quiet(ds, plated)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"per": "depth"}, DimensionError, r"per=\['depth'\]: the outcome 'y' has no such"),
        ({"per": ("lat", "lat")}, DimensionError, "more than once"),
        ({"per": "time", "core_dim": "time"}, DimensionError, r"is in core_dim=\('time',\) too"),
        ({"per": PER, "dim": ("time", "lat")}, DimensionError, "is in dim="),
        ({"method": MCMC(NUTS(line), num_warmup=1, num_samples=1)}, OptionError, "NumPyro's HMC"),
        ({"method": "laplace", "chains": 2}, OptionError, r"does not take \['chains'\]"),
        ({"per": None, "store": "x.zarr"}, OptionError, "goes with per="),
        ({"method": NUTS(noisy)}, OptionError, "was made for the model"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(ds, options, error, match):
    lazy = ds.map(lambda a: a.chunk(time=-1).map_blocks(_never, template=a.chunk(time=-1)))
    with pytest.raises(error, match=match):
        lazy.assign_coords(x=ds.x).aimz.fit(line, **{"per": PER, **options})


def _never(block):
    raise AssertionError("something was computed")


def test_a_scalar_cell_is_told_how_to_be_a_cell(ds):
    with pytest.raises(DimensionError, match=r"expand_dims\(\['lat'\]\)"):
        quiet(ds.isel(lat=0), line)


def test_duplicate_cells_are_refused(ds):
    with pytest.raises(LabelError, match="duplicate labels"):
        quiet(ds.assign_coords(lat=[1, 1, 2, 3]), line)


def test_params_have_no_place_in_cells(ds):
    def trained(x, y=None):
        offset = numpyro.param("offset", 0.0)
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(slope * x + offset, 1), obs=y)

    with pytest.raises(ModelError, match="params"):
        quiet(ds, trained, method="svi")
