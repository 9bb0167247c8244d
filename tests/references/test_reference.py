"""Law 6: in distribution, what comes out is what NumPyro and the closed form give."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import strategies
import xarray as xr
from numpyro.infer import Predictive
from scipy import stats

# Seeds are fixed, so a test passes always or never. Over the number of comparisons made
# here, |z| > 5 has a probability below one in ten thousand for a right program.
MOST_Z = 5.0
LEAST_P = 1e-5


def normal(x, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a + x, jnp.exp(0.3 * x)), obs=y)


def poisson(x, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Poisson(jnp.exp(0.5 * a + x)), obs=y)


def gamma(x, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Gamma(jnp.exp(0.3 * a), jnp.exp(x)), obs=y)


def bernoulli(x, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Bernoulli(logits=a + x), obs=y)


def vectors(x, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    scale = jnp.array([[1.0, 0.0], [-0.8, 0.5]])
    fn = dist.MultivariateNormal((a + x)[..., None] * jnp.array([1.0, 2.0]), scale_tril=scale)
    numpyro.sample("y", fn, obs=y)


MODELS = {
    "normal": (normal, "f4"),
    "poisson": (poisson, "i4"),
    "gamma": (gamma, "f4"),
    "bernoulli": (bernoulli, "i4"),
    "vectors": (vectors, "f4"),
}
CHAINS, DRAWS = 4, 5000


def two_samples(name):
    """Draws of ours and of NumPyro's from one posterior: arrays (draw, row, ...)."""
    model, dtype = MODELS[name]
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 6).astype("f4").reshape(3, 2)
    dims, shape = ("lat", "lon"), (3, 2)
    if name == "vectors":
        dims, shape = (*dims, "species"), (*shape, 2)
    ds = xr.Dataset(
        {"x": (("lat", "lon"), x), "y": (dims, np.ones(shape, dtype))},
        {"lat": [10.0, 20.0, 30.0], "lon": ["east", "west"]},
    )
    a = rng.normal(size=(CHAINS, DRAWS))
    fit = ds.aimz.from_posterior(model, {"a": a})
    ours = ds.chunk(lat=2).aimz.predict(fit).y.compute()
    flat = {"a": jnp.asarray(a.reshape(-1))}
    theirs = Predictive(model, flat)(jax.random.key(0), x=jnp.asarray(x))["y"]
    ours = ours.values.reshape(CHAINS * DRAWS, *shape)
    return ours.astype("f8"), np.asarray(theirs).astype("f8"), flat["a"]


samples = pytest.fixture(scope="module", params=MODELS, name="samples")(
    lambda request: (request.param, *two_samples(request.param))
)


def z_of_means(left, right):
    spread = np.sqrt(left.var(0, ddof=1) / len(left) + right.var(0, ddof=1) / len(right))
    return (left.mean(0) - right.mean(0)) / spread


def test_means_and_variances_are_those_of_predictive(samples):
    _, ours, theirs, _ = samples
    assert ours.shape == theirs.shape
    assert np.abs(z_of_means(ours, theirs)).max() < MOST_Z
    squares = [(s - theirs.mean(0)) ** 2 for s in (ours, theirs)]
    assert np.abs(z_of_means(*squares)).max() < MOST_Z


def test_every_cell_is_distributed_as_in_predictive(samples):
    name, ours, theirs, _ = samples
    cells = ours.reshape(len(ours), -1).T, theirs.reshape(len(theirs), -1).T
    for left, right in zip(*cells, strict=True):
        if name in ("poisson", "bernoulli"):
            most = np.quantile(right, 0.99)
            bins = np.arange(min(left.min(), right.min()), most + 2)
            table = [np.histogram(np.minimum(s, most), bins)[0] for s in (left, right)]
            table = np.array(table)[:, np.sum(table, 0) > 0]
            assert stats.chi2_contingency(table).pvalue > LEAST_P
        else:
            assert stats.ks_2samp(left, right).pvalue > LEAST_P


def test_draws_depend_on_their_parameters_as_in_predictive(samples):
    """Each draw used its own posterior draw: the covariance of result and parameter."""
    _, ours, theirs, a = samples
    a = np.asarray(a).reshape(-1, *(1,) * (ours.ndim - 1))
    products = [(s - theirs.mean(0)) * a for s in (ours, theirs)]
    assert np.abs(z_of_means(*products)).max() < MOST_Z
    assert (np.abs(products[0].mean(0)) > 0.02).all()


def test_cells_and_draws_are_independent_given_the_parameters():
    rng = np.random.default_rng(0)
    x = np.zeros((4, 3), "f4")
    ds = xr.Dataset({"x": (("lat", "lon"), x), "y": (("lat", "lon"), x)}, {"lat": range(4)})
    fit = ds.aimz.from_posterior(normal, {"a": np.zeros((2, 10_000))})
    noise = ds.aimz.predict(fit).y.values
    cells = np.corrcoef(noise.reshape(-1, 12).T)
    limit = MOST_Z / np.sqrt(20_000)
    assert np.abs(cells - np.eye(12)).max() < limit
    lagged = (noise[:, 1:] * noise[:, :-1]).mean((0, 1))
    assert np.abs(lagged).max() < limit
    chains = (noise[0] * noise[1]).mean(0)
    assert np.abs(chains).max() < MOST_Z / np.sqrt(10_000)
    assert stats.kstest(rng.permutation(noise.ravel())[:20_000], "norm").pvalue > LEAST_P


# The closed form of a conjugate model.


def closed_form(ds, prior=2.0):
    """Mean and covariance of the weights, Normal(0, prior) a priori and with known noise."""
    X = np.stack([ds.x, ds.z], -1)
    precision = X.T @ X / strategies.NOISE**2 + np.eye(2) / prior**2
    cov = np.linalg.inv(precision)
    return cov @ X.T @ ds.y.values / strategies.NOISE**2, cov


def test_a_fit_has_the_closed_form_posterior(line):
    ds, fit = line
    mean, cov = closed_form(ds)
    w = fit.posterior.w
    assert w.dims == ("chain", "draw", "feature")
    assert w.feature.values.tolist() == ["x", "z"]
    sd = np.sqrt(np.diag(cov))
    found = fit.diagnostics().w
    # Monte Carlo errors, from effective sample sizes of some thousand draws.
    ess = float(found.sel(diagnostic=[d for d in found.diagnostic.values if "bulk" in d]).min())
    assert ess > 1000
    z = (w.mean(("chain", "draw")).values - mean) / (sd / np.sqrt(ess))
    assert np.abs(z).max() < MOST_Z
    assert np.abs(w.std(("chain", "draw")).values / sd - 1).max() < MOST_Z / np.sqrt(2 * ess)
    correlation = np.corrcoef(w.values.reshape(-1, 2).T)[0, 1]
    expected = cov[0, 1] / np.prod(sd)
    assert abs(correlation - expected) < MOST_Z / np.sqrt(ess)


def test_a_prediction_has_the_closed_form_predictive(line):
    ds, fit = line
    mean, cov = closed_form(ds)
    rng = np.random.default_rng(1)
    new = xr.Dataset({n: ("row", rng.normal(size=9)) for n in "xz"}, {"row": np.arange(100, 109)})
    X = np.stack([new.x, new.z], -1)
    expected = xr.Dataset(
        {
            "mean": ("row", X @ mean),
            "sd": ("row", np.sqrt(strategies.NOISE**2 + np.sum(X @ cov * X, -1))),
        }
    )
    # The fit's rows have no labels, so these must not have any either.
    pred = new.drop_vars("row").chunk(row=4).aimz.predict(fit).y.compute()
    n = pred.sizes["chain"] * pred.sizes["draw"]
    z = (pred.mean(("chain", "draw")) - expected["mean"]) / (expected.sd / np.sqrt(n / 2))
    assert float(np.abs(z).max()) < MOST_Z
    ratio = pred.std(("chain", "draw")) / expected.sd - 1
    assert float(np.abs(ratio).max()) < MOST_Z / np.sqrt(n)


def test_the_log_likelihood_of_a_fit_is_the_density_in_closed_form(line):
    ds, fit = line
    density = ds.aimz.log_likelihood(fit).y
    mu = fit.posterior.w.sel(feature="x") * ds.x + fit.posterior.w.sel(feature="z") * ds.z
    wanted = stats.norm.logpdf(ds.y, mu, strategies.NOISE)
    np.testing.assert_allclose(density, wanted, rtol=1e-4, atol=1e-4)


# One model, written for rows and columns, on tables and grids.


@pytest.fixture(scope="module")
def cube():
    rng = np.random.default_rng(2)
    shape, dims = (4, 3, 2), ("time", "lat", "lon")
    return xr.Dataset(
        {
            "x": (dims, rng.normal(size=shape)),
            "z": (("lon", "time"), rng.normal(size=(2, 4))),
            "y": (dims, rng.normal(size=shape)),
        },
        {
            "time": np.arange("2000-01", "2000-05", dtype="M8[M]").astype("M8[ns]"),
            "lat": [-10.0, 0.0, 10.0],
            "lon": ["w", "e"],
        },
    )


W = np.random.default_rng(3).normal(size=(2, 50, 2))


def over_any_rows(X, y=None):
    """The regression, free of the number of leading axes."""
    w = numpyro.sample("w", dist.Normal(0, 2).expand([X.shape[-1]]).to_event(1))
    numpyro.sample("y", dist.Normal(X @ w, strategies.NOISE), obs=y)


def fitted(ds, model, layout):
    return ds.aimz.from_posterior(model, {"w": W}, {"X": ["x", "z"]}, layout=layout)


def expected_mean(ds):
    w = xr.DataArray(W, dims=("chain", "draw", "feature"))
    return w[..., 0] * ds.x + w[..., 1] * ds.z


@pytest.mark.parametrize("chunks", [None, {"time": 3, "lat": 2}])
def test_grid_and_table_give_one_prediction(cube, chunks):
    ds = strategies.chunked(cube, chunks)
    table = ds.aimz.predict(fitted(cube, strategies.regression, "table"))
    assert table.y.dims == ("chain", "draw", "time", "lat", "lon")
    strategies.assert_same(table, ds.aimz.predict(fitted(cube, over_any_rows, "table")))
    strategies.assert_same(table, ds.aimz.predict(fitted(cube, over_any_rows, "grid")))
    residual = (table.y - expected_mean(cube)) / strategies.NOISE
    assert stats.kstest(residual.values.ravel(), "norm").pvalue > LEAST_P


def test_grid_and_table_give_one_log_likelihood(cube):
    table = cube.chunk(lat=2).aimz.log_likelihood(fitted(cube, strategies.regression, "table"))
    grid = cube.aimz.log_likelihood(fitted(cube, over_any_rows, "grid"))
    strategies.assert_same(table, grid)
    mean = expected_mean(cube).transpose("chain", "draw", "time", "lat", "lon")
    wanted = stats.norm.logpdf(cube.y, mean, strategies.NOISE)
    np.testing.assert_allclose(table.y, wanted, rtol=1e-4, atol=1e-4)


def test_the_regression_runs_unchanged_on_one_dimension(cube):
    rows = cube.isel(lat=0, lon=0)
    one = rows.aimz.predict(fitted(rows, strategies.regression, "grid"))
    assert one.y.dims == ("chain", "draw", "time")
    strategies.assert_same(one, rows.aimz.predict(fitted(rows, strategies.regression, "table")))


def test_stacking_a_grid_to_a_table_moves_no_draw(cube):
    """A MultiIndex of labels addresses the cells that the labels address."""
    stacked = cube.stack(cell=("time", "lat", "lon"))
    table = stacked.aimz.predict(fitted(stacked, strategies.regression, "grid"))
    grid = cube.aimz.predict(fitted(cube, over_any_rows, "grid"))
    unstacked = table.y.unstack("cell").transpose(*grid.y.dims)
    wanted = grid.y.sel(lon=unstacked.lon, lat=unstacked.lat)
    strategies.assert_close(unstacked.values, wanted.values)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["table", "grid"])
def test_a_fit_in_either_layout_is_the_closed_form(cube, layout, line):
    """NUTS on a grid: the same posterior as that of the rows laid out by hand."""
    flat = xr.broadcast(cube)[0].stack(row=("time", "lat", "lon")).reset_index("row")
    mean, cov = closed_form(flat)
    model = strategies.regression if layout == "table" else over_any_rows
    fit = cube.aimz.fit(
        model,
        {"X": ["x", "z"]},
        layout=layout,
        warmup=500,
        draws=1000,
        chains=2,
        progress=False,
    )
    w = fit.posterior.w
    sd = np.sqrt(np.diag(cov))
    # An effective sample of 500 is what the diagnostics of the fit, silent here, warrant.
    assert (np.abs(w.mean(("chain", "draw")).values - mean) / sd).max() < MOST_Z / np.sqrt(500)
    assert np.abs(w.std(("chain", "draw")).values / sd - 1).max() < MOST_Z / np.sqrt(1000)
