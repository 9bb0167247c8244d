"""Workloads of ``all.py``: the same model, data and posterior draws for each way to run them.

A workload is a function for each runner, which takes a folder and returns seconds, and a number
that should be the same for all runners to Monte Carlo error. Time is that of the calls until the
result is in the store, or in memory where a workload says so, compilation included. Packages are
imported before, but for the first result, which has them in its time.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DRAWS, FEATURES = 1000, 5
Runner = Callable[[Path], tuple[float, float]]


@dataclass(frozen=True)
class Workload:
    """A name, the runners by name, and names of the limits that bound its time from below."""

    name: str
    runners: dict[str, Runner]
    limits: dict[str, Runner] = field(default_factory=dict)


def timed(work: Callable[[], float]) -> tuple[float, float]:
    # What the imports left behind: Python would collect it at some moment of the run.
    gc.collect()
    start = time.perf_counter()
    number = work()
    return time.perf_counter() - start, float(number)


# --- predictions into a store -------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A regression: an outcome given ``eta = X @ weights + bias``, on ``(n, features)``."""

    name: str
    outcome: Callable
    n: int
    features: int = FEATURES
    chunks: int = 16
    layers: tuple[int, ...] = ()
    """Widths of the hidden layers of a network; none for a regression."""

    def model(self, X, y=None):
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def draw(name, *shape):
            return numpyro.sample(name, dist.Normal(0, 1).expand(shape).to_event(len(shape)))

        hidden, width = X, self.features
        for i, wide in enumerate(self.layers):
            hidden = jnp.tanh(hidden @ draw(f"w{i}", width, wide) + draw(f"b{i}", wide))
            width = wide
        eta = hidden @ draw("weights", width) + draw("bias", 1)[0]
        with numpyro.plate("data", X.shape[0]):
            numpyro.sample("y", self.outcome(eta), obs=y)

    def posterior(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)

        def normal(mean, sd, *shape):
            return rng.normal(mean, sd, (DRAWS, *shape)).astype(np.float32)

        widths = (self.features, *self.layers)
        draws = {"weights": normal(0.3, 0.05, widths[-1]), "bias": normal(0.5, 0.05, 1)}
        for i in range(len(self.layers)):
            draws[f"w{i}"] = normal(0, widths[i] ** -0.5, widths[i], widths[i + 1])
            draws[f"b{i}"] = normal(0, 0.1, widths[i + 1])
        return draws

    def rows(self) -> np.ndarray:
        shape = (self.n, self.features)
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def normal(eta):
    import numpyro.distributions as dist

    return dist.Normal(eta, 1.0)


def bernoulli(eta):
    import numpyro.distributions as dist

    return dist.Bernoulli(logits=eta)


def poisson(eta):
    import jax.numpy as jnp
    import numpyro.distributions as dist

    return dist.Poisson(jnp.exp(eta))


def negative_binomial(eta):
    import jax.numpy as jnp
    import numpyro.distributions as dist

    return dist.NegativeBinomial2(jnp.exp(eta), 3.0)


def gamma(eta):
    import jax.numpy as jnp
    import numpyro.distributions as dist

    return dist.Gamma(2.0, 2.0 * jnp.exp(-eta))


def student_t(eta):
    import numpyro.distributions as dist

    return dist.StudentT(4.0, eta, 1.0)


def beta(eta):
    import jax
    import numpyro.distributions as dist

    mean = jax.nn.sigmoid(eta)
    return dist.Beta(5.0 * mean, 5.0 * (1.0 - mean))


def binomial(eta):
    import numpyro.distributions as dist

    return dist.Binomial(20, logits=eta)


CASES = [
    Case("linear, 400 000", normal, 400_000),
    Case("Poisson, 50 000", poisson, 50_000),
    Case("NegativeBinomial2, 20 000", negative_binomial, 20_000),
    Case("Gamma, 20 000", gamma, 20_000),
    Case("StudentT, 50 000", student_t, 50_000),
    Case("Beta, 20 000", beta, 20_000),
    Case("Binomial, 20 000", binomial, 20_000),
    Case("network, 10 000", bernoulli, 10_000, 100, 16, (128, 128, 128)),
    Case("network, 100 000", bernoulli, 100_000, 100, 16, (128, 128, 128)),
]


def mean_of(path_or_values) -> float:
    """Mean of some draws, as a sign that all runners did the same work."""
    return float(np.asarray(path_or_values).mean())


def fit_of(case: Case):
    import xarray as xr

    import xr_aimz.prediction  # noqa: F401

    ds = xr.Dataset({"X": (("obs", "feature"), case.rows())}).chunk(obs=-(-case.n // case.chunks))
    draws = {n: v[None] for n, v in case.posterior().items()}
    return ds, ds.aimz.from_posterior(case.model, draws, dim="obs")


def run_xr_aimz(case: Case, folder: Path) -> tuple[float, float]:
    ds, fit = fit_of(case)

    def work():
        stored = ds.aimz.predict(fit, sites="y").aimz.to_zarr(folder / "out.zarr", progress=False)
        return mean_of(stored.y[:, :, :500])

    return timed(work)


def impact_model(case: Case):
    import jax
    from aimz import ImpactModel
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    def model(X, y=None):
        case.model(X, y)

    guide = SVI(model, AutoNormal(model), Adam(1e-3), Trace_ELBO())
    impact = ImpactModel(model, jax.random.key(0), guide)
    impact.set_posterior_sample(case.posterior())
    return impact


def run_aimz(case: Case, folder: Path) -> tuple[float, float]:
    impact, rows = impact_model(case), case.rows()

    def work():
        tree = impact.predict(rows, output_dir=folder / "out", progress=False)
        return mean_of(tree["posterior_predictive"].y[:, :, :500])

    return timed(work)


def run_predictive(case: Case, folder: Path) -> tuple[float, float]:
    import jax
    from numpyro.infer import Predictive

    predictive = Predictive(case.model, case.posterior(), return_sites=["y"])
    call = jax.jit(lambda key, X: predictive(key, X)["y"])
    rows = case.rows()
    return timed(lambda: mean_of(np.asarray(call(jax.random.key(0), rows))[:, :500]))


def run_apply_ufunc(case: Case, folder: Path) -> tuple[float, float]:
    """By ``Predictive`` on each chunk, with a key of its own: with one, all noise is equal."""
    import jax
    import xarray as xr
    from numpyro.infer import Predictive

    predictive = Predictive(case.model, case.posterior(), return_sites=["y"])
    call = jax.jit(lambda key, X: predictive(key, X)["y"])

    def on_chunk(X):
        key = jax.random.key(abs(hash(X[:1].tobytes())) % 2**31)
        return np.moveaxis(np.asarray(call(key, X)), 0, -1)

    rows = xr.DataArray(case.rows(), dims=("obs", "feature"))
    rows = rows.chunk(obs=-(-case.n // case.chunks))

    def work():
        dtype = jax.eval_shape(call, jax.random.key(0), case.rows()[:1]).dtype
        y = xr.apply_ufunc(
            on_chunk, rows, input_core_dims=[["feature"]], output_core_dims=[["draw"]],
            dask="parallelized", output_dtypes=[dtype],
            dask_gufunc_kwargs={"output_sizes": {"draw": DRAWS}},
        )  # fmt: skip
        y.to_dataset(name="y").to_zarr(folder / "out.zarr", zarr_format=3)
        return mean_of(xr.open_zarr(folder / "out.zarr").y[:500])

    return timed(work)


def limit_write(case: Case, folder: Path) -> tuple[float, float]:
    """Write as many numbers, of the digits that normal ones have, chunk by chunk."""
    import dask.array as da
    import xarray as xr

    chunk = -(-case.n // case.chunks)
    block = np.random.default_rng(0).normal(size=(1, DRAWS, chunk)).astype(np.float32)
    parts = [da.from_array(block, chunks=-1) for _ in range(case.n // chunk)]
    y = xr.DataArray(da.concatenate(parts, 2), dims=("chain", "draw", "obs"))

    def work():
        y.to_dataset(name="y").aimz.to_zarr(folder / "raw.zarr", progress=False)
        return 0.0

    import xr_aimz  # noqa: F401

    return timed(work)


def limit_noise(case: Case, folder: Path) -> tuple[float, float]:
    """Draw as many normal numbers with JAX, compiled, and drop them."""
    import jax

    draw = jax.jit(
        lambda keys: jax.lax.map(
            lambda k: jax.random.normal(k, (case.n,)).sum(), keys, batch_size=8
        )
    )
    keys = jax.random.split(jax.random.key(0), DRAWS)
    draw(keys).block_until_ready()
    return timed(lambda: draw(keys).block_until_ready().sum())


def limit_matmul(case: Case, folder: Path) -> tuple[float, float]:
    """Multiply as many matrices as the network does, and drop them."""
    import jax
    import jax.numpy as jnp

    widths = (case.features, *case.layers)
    weights = [jnp.ones((a, b)) for a, b in itertools.pairwise(widths)]
    rows = jnp.asarray(case.rows())

    def draw(scale):
        hidden = rows * scale
        for w in weights:
            hidden = hidden @ w
        return hidden.sum()

    all_draws = jax.jit(lambda s: jax.lax.map(draw, s))
    scales = jnp.linspace(0, 1, DRAWS)
    all_draws(scales).block_until_ready()
    return timed(lambda: all_draws(scales).block_until_ready().sum())


def prediction(case: Case) -> Workload:
    def bind(run):
        return lambda folder: run(case, folder)

    runners = {
        "xr_aimz": bind(run_xr_aimz),
        "aimz": bind(run_aimz),
        "Predictive": bind(run_predictive),
    }
    if not case.layers:
        runners["apply_ufunc"] = bind(run_apply_ufunc)
        limits = {"write": bind(limit_write), "normal numbers": bind(limit_noise)}
    else:
        limits = {"matmul": bind(limit_matmul)}
    return Workload(case.name, runners, limits)


# --- a grid with a local latent in each cell ----------------------------------------------------

GRID = {"time": 240, "lat": 37, "lon": 49}


def grid_data() -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(2)
    cells = (GRID["lat"], GRID["lon"])
    draws = {
        "level": rng.normal(10, 1, (DRAWS, *cells)).astype(np.float32),
        "slope": rng.normal(1, 0.1, DRAWS).astype(np.float32),
        "sigma": np.abs(rng.normal(1, 0.1, DRAWS)).astype(np.float32),
    }
    return draws, np.linspace(-1, 1, GRID["time"], dtype=np.float32)


def grid_xr_aimz(folder: Path) -> tuple[float, float]:
    import numpyro
    import numpyro.distributions as dist
    import xarray as xr

    import xr_aimz

    def model(year, tas=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
            level = numpyro.sample("level", dist.Normal(0, 1))
            with xr_aimz.plate("time"):
                numpyro.sample("tas", dist.Normal(level + slope * year, sigma), obs=tas)

    draws, year = grid_data()
    coords = {d: np.arange(n) for d, n in GRID.items()}
    ds = xr.Dataset({"year": ("time", year)}, coords)
    ds["tas"] = tuple(GRID), np.zeros(tuple(GRID.values()), np.float32)
    ds = ds.chunk(time=30)
    posterior = {
        n: (("chain", "draw", *(("lat", "lon") if v.ndim == 3 else ())), v[None])
        for n, v in draws.items()
    }
    labels = {d: coords[d] for d in ("lat", "lon")}
    fit = ds.aimz.from_posterior(model, xr.Dataset(posterior, labels))

    def work():
        stored = ds.aimz.predict(fit).aimz.to_zarr(folder / "out.zarr", progress=False)
        return mean_of(stored.tas[:, :, 0])

    return timed(work)


def grid_model(year, cell, tas=None):
    import numpyro
    import numpyro.distributions as dist

    slope = numpyro.sample("slope", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    count = GRID["lat"] * GRID["lon"]
    level = numpyro.sample("level", dist.Normal(0, 1).expand([count]).to_event(1))
    with numpyro.plate("data", year.shape[0]):
        numpyro.sample("tas", dist.Normal(level[cell] + slope * year, sigma), obs=tas)


def grid_table() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    draws, year = grid_data()
    count = GRID["lat"] * GRID["lon"]
    draws["level"] = draws["level"].reshape(DRAWS, count)
    return draws, np.repeat(year, count), np.tile(np.arange(count, dtype=np.int32), len(year))


def grid_aimz(folder: Path) -> tuple[float, float]:
    import jax
    from aimz import ImpactModel
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    draws, year, cell = grid_table()
    guide = SVI(grid_model, AutoNormal(grid_model), Adam(1e-3), Trace_ELBO())
    impact = ImpactModel(
        grid_model, jax.random.key(0), guide, param_input="year", param_output="tas"
    )
    impact.set_posterior_sample(draws)
    first = GRID["lat"] * GRID["lon"]

    def work():
        tree = impact.predict(year, cell=cell, output_dir=folder / "out", progress=False)
        return mean_of(tree["posterior_predictive"].tas[:, :, :first])

    return timed(work)


def grid_predictive(folder: Path) -> tuple[float, float]:
    import jax
    from numpyro.infer import Predictive

    draws, year, cell = grid_table()
    predictive = Predictive(grid_model, draws, return_sites=["tas"])
    call = jax.jit(lambda key, *a: predictive(key, *a)["tas"])
    first = GRID["lat"] * GRID["lon"]
    return timed(lambda: mean_of(np.asarray(call(jax.random.key(0), year, cell))[:, :first]))


# --- effects and summaries, in memory -----------------------------------------------------------

EFFECT = {"normal": Case("", normal, 100_000), "Poisson": Case("", poisson, 20_000)}
ENDS = [0.05, 0.5, 0.95]


def effect_xr_aimz(case: Case, folder: Path) -> tuple[float, float]:
    import xarray as xr

    import xr_aimz.prediction  # noqa: F401

    names = [f"x{i}" for i in range(FEATURES)]
    columns = {n: ("obs", c) for n, c in zip(names, case.rows().T, strict=True)}
    ds = xr.Dataset(columns).chunk(obs=-(-case.n // 4))
    draws = {n: v[None] for n, v in case.posterior().items()}
    fit = ds.aimz.from_posterior(case.model, draws, {"X": names}, dim="obs")

    def work():
        options = {"sites": "y", "summary": ENDS}
        effect = ds.aimz.intervene(fit, {"x0": lambda x: x + 1}, **options).compute()
        return mean_of(effect.y_quantile.sel(quantile=0.5))

    return timed(work)


def effect_aimz(case: Case, folder: Path) -> tuple[float, float]:
    import jax

    impact, rows = impact_model(case), case.rows()
    raised = rows + np.eye(FEATURES, dtype="f4")[0]

    def work():
        options = {"rng_key": jax.random.key(1), "progress": False}
        before, after = (
            impact.predict(x, output_dir=folder / str(i), **options)
            for i, x in enumerate((rows, raised))
        )
        y = impact.estimate_effect(before, after)["posterior_predictive"].y
        found = y.chunk(chain=-1, draw=-1).quantile(ENDS, ("chain", "draw")).compute()
        return mean_of(found.sel(quantile=0.5))

    return timed(work)


SUMMARY = Case("", normal, 400_000)


def summary_xr_aimz(folder: Path) -> tuple[float, float]:
    ds, fit = fit_of(SUMMARY)

    def work():
        found = ds.aimz.predict(fit, sites="y", summary=("mean", "std", *ENDS)).compute()
        return mean_of(found.y_mean)

    return timed(work)


def summary_aimz(folder: Path) -> tuple[float, float]:
    impact, rows = impact_model(SUMMARY), SUMMARY.rows()

    def work():
        tree = impact.predict(rows, output_dir=folder / "out", progress=False)
        y, dims = tree["posterior_predictive"].y, ("chain", "draw")
        mean = y.mean(dims).compute()
        y.std(dims).compute()
        y.chunk(dict.fromkeys(dims, -1)).quantile(ENDS, dims).compute()
        return mean_of(mean)

    return timed(work)


# --- fits ---------------------------------------------------------------------------------------

BATCH, STEPS = 1000, 100_000


def batch_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200_000, FEATURES)).astype(np.float32)
    return X, (X @ np.arange(FEATURES) + rng.normal(size=len(X))).astype(np.float32)


def batch_model(X, y=None, scale=1.0):
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers

    weights = numpyro.sample("weights", dist.Normal(0, 10).expand([FEATURES]).to_event(1))
    with numpyro.plate("data", X.shape[0]), handlers.scale(scale=scale):
        numpyro.sample("y", dist.Normal(X @ weights, 1.0), obs=y)


def minibatch_xr_aimz(folder: Path) -> tuple[float, float]:
    import xarray as xr

    import xr_aimz.prediction  # noqa: F401

    X, y = batch_data()
    ds = xr.Dataset({"X": (("obs", "feature"), X), "y": ("obs", y)}).chunk(obs=10_000)
    options = {"method": "svi", "batch": BATCH, "steps": STEPS, "draws": 2000, "progress": False}

    def work():
        fit = ds.aimz.fit(lambda X, y=None: batch_model(X, y), **options)
        return mean_of(fit.posterior.weights)

    return timed(work)


def minibatch_scan(folder: Path) -> tuple[float, float]:
    """A scan over batches in memory, written by hand, in a fixed order."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    X, y = batch_data()

    def work():
        guide = AutoNormal(batch_model)
        svi = SVI(batch_model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO(), scale=len(y) / BATCH)
        batches = (jax.numpy.asarray(X.reshape(-1, BATCH, FEATURES)), y.reshape(-1, BATCH))
        state = svi.init(jax.random.key(0), X[:BATCH], y[:BATCH])
        run = jax.jit(lambda s, b: jax.lax.scan(lambda s, b: svi.update(s, *b), s, b))
        for _ in range(STEPS * BATCH // len(y)):
            state, losses = run(state, batches)
            losses.block_until_ready()
        draws = guide.sample_posterior(
            jax.random.key(1), svi.get_params(state), sample_shape=(2000,)
        )
        return mean_of(draws["weights"])

    return timed(work)


AIMZ_EPOCHS = 20


def minibatch_aimz(folder: Path) -> tuple[float, float]:
    """Some epochs, compilation left out, scaled to as many steps as the others take."""
    import jax
    from aimz import ImpactModel
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    X, y = batch_data()

    def model(X, y=None):
        batch_model(X, y)

    svi = SVI(model, AutoNormal(model), Adam(1e-3), Trace_ELBO())
    impact = ImpactModel(model, jax.random.key(0), svi)
    options = {"batch_size": BATCH, "progress": False}

    def seconds(epochs: int) -> float:
        start = time.perf_counter()
        impact.fit(X, y, epochs=epochs, **options)
        return time.perf_counter() - start

    seconds(1)  # compiles
    an_epoch = (seconds(1 + AIMZ_EPOCHS) - seconds(1)) / AIMZ_EPOCHS
    number = mean_of(impact.posterior["weights"])
    return an_epoch * STEPS * BATCH / len(y), number


CELLS, YEARS, CELL_DRAWS = 512, 120, 300


def cell_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    year = np.linspace(-1, 1, YEARS, dtype=np.float32)
    level = rng.normal(10, 2, (CELLS, 1))
    return year, (level + 0.5 * year + rng.normal(size=(CELLS, YEARS))).astype(np.float32)


def cell_model(year, tas=None):
    import numpyro
    import numpyro.distributions as dist

    level = numpyro.sample("level", dist.Normal(10, 10))
    slope = numpyro.sample("slope", dist.Normal(0, 5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(5))
    numpyro.sample("tas", dist.Normal(level + slope * year, sigma), obs=tas)


def cells_xr_aimz(folder: Path) -> tuple[float, float]:
    import xarray as xr

    import xr_aimz.prediction  # noqa: F401

    year, tas = cell_data()
    ds = xr.Dataset({"year": ("time", year), "tas": (("cell", "time"), tas)})
    ds = ds.assign_coords(cell=np.arange(CELLS), time=np.arange(YEARS))
    options = {"draws": CELL_DRAWS, "warmup": CELL_DRAWS, "chains": 1, "progress": False}

    def work():
        return mean_of(ds.aimz.fit(cell_model, per="cell", **options).posterior.level)

    return timed(work)


def cells_vmap(folder: Path) -> tuple[float, float]:
    """``MCMC.run`` under ``vmap`` over tiles of 64 cells, written by hand."""
    import jax
    from numpyro.infer import MCMC, NUTS

    year, tas = cell_data()

    def run(key, y):
        sampler = MCMC(
            NUTS(cell_model), num_warmup=CELL_DRAWS, num_samples=CELL_DRAWS, progress_bar=False
        )
        sampler.run(key, year, tas=y)
        return sampler.get_samples()["level"]

    def work():
        tile = jax.jit(jax.vmap(run))
        keys = jax.random.split(jax.random.key(0), CELLS)
        tiles = [tile(keys[i : i + 64], tas[i : i + 64]) for i in range(0, CELLS, 64)]
        return mean_of(np.concatenate([np.asarray(t) for t in tiles]))

    return timed(work)


# --- growth, and the first result ---------------------------------------------------------------


def growth(n: int) -> Runner:
    def run(folder: Path) -> tuple[float, float]:
        import dask.array as da
        import xarray as xr

        import xr_aimz  # noqa: F401

        case = Case("", normal, n)
        rng = da.random.default_rng(0)
        rows = rng.normal(size=(n, FEATURES), chunks=(25_000, FEATURES)).astype("f4")
        xr.Dataset({"X": (("obs", "feature"), rows)}).to_zarr(folder / "in.zarr", zarr_format=3)
        ds = xr.open_zarr(folder / "in.zarr")
        draws = {k: v[None, :100] for k, v in case.posterior().items()}
        fit = ds.aimz.from_posterior(case.model, draws, dim="obs")

        def work():
            stored = ds.aimz.predict(fit, sites="y").aimz.to_zarr(
                folder / "out.zarr", progress=False
            )
            return mean_of(stored.y[:, :, :500])

        return timed(work)

    return run


FIRST = Case("", normal, 100)


def first_xr_aimz(folder: Path) -> tuple[float, float]:
    def work():
        ds, fit = fit_of(FIRST)
        return mean_of(ds.aimz.predict(fit, sites="y").y.compute())

    return timed(work)


def first_aimz(folder: Path) -> tuple[float, float]:
    def work():
        tree = impact_model(FIRST).predict(FIRST.rows(), output_dir=folder, progress=False)
        return mean_of(tree["posterior_predictive"].y)

    return timed(work)


def first_predictive(folder: Path) -> tuple[float, float]:
    start = time.perf_counter()
    number = run_predictive(FIRST, folder)[1]
    return time.perf_counter() - start, number


WORKLOADS = [
    *(prediction(case) for case in CASES),
    Workload(
        "grid, 240 x 37 x 49",
        {"xr_aimz": grid_xr_aimz, "aimz": grid_aimz, "Predictive": grid_predictive},
        {
            "write": lambda folder: limit_write(Case("", normal, 435_120, chunks=8), folder),
            "normal numbers": lambda folder: limit_noise(Case("", normal, 435_120), folder),
        },
    ),
    Workload("summary, 400 000", {"xr_aimz": summary_xr_aimz, "aimz": summary_aimz}),
    *(
        Workload(
            f"effect, {name}",
            {
                "xr_aimz": lambda folder, case=case: effect_xr_aimz(case, folder),
                "aimz": lambda folder, case=case: effect_aimz(case, folder),
            },
        )
        for name, case in EFFECT.items()
    ),
    Workload(
        "minibatch, 100 000 steps",
        {"xr_aimz": minibatch_xr_aimz, "scan by hand": minibatch_scan, "aimz": minibatch_aimz},
    ),
    Workload("cells, 512 by NUTS", {"xr_aimz": cells_xr_aimz, "vmap by hand": cells_vmap}),
    *(
        Workload(f"growth, {n:_}".replace("_", " "), {"xr_aimz": growth(n)})
        for n in (100_000, 1_000_000, 10_000_000)
    ),
    Workload(
        "first result",
        {"xr_aimz": first_xr_aimz, "aimz": first_aimz, "Predictive": first_predictive},
    ),
]
