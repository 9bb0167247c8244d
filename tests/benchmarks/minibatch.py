"""Steps a second of a minibatch fit, against a scan written by hand; peak memory from Zarr.

    python tests/benchmarks/minibatch.py                 # steps/s, and the fit's accuracy
    python tests/benchmarks/minibatch.py --vs aimz       # and aimz's loop over svi.update
    python tests/benchmarks/minibatch.py --zarr 8        # peak memory, store of 8 GB

The model is a linear regression, 200 000 observations of 5 features in 20 chunks, batches of
1000. Ours and the scan run in turn in one process; the figures are medians. Steps a second
are those between a short and a long fit, so that tracing and compiling, which take a second
or two, are left out; they are given beside. The scan goes over batches that lie ready in
memory in a fixed order, with neither shuffling nor reading, its likelihood scaled by hand.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

OBSERVATIONS, FEATURES, BATCH, CHUNKS = 200_000, 5, 1000, 20
SHORT, LONG = 20_000, 220_000


def data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(OBSERVATIONS, FEATURES)).astype(np.float32)
    return X, (X @ np.arange(FEATURES) + rng.normal(size=OBSERVATIONS)).astype(np.float32)


def regression(X, y=None):
    import numpyro
    import numpyro.distributions as dist

    weights = numpyro.sample("weights", dist.Normal(0, 10).expand([X.shape[-1]]).to_event(1))
    with numpyro.plate("data", X.shape[0]):
        numpyro.sample("y", dist.Normal(X @ weights, 1.0), obs=y)


def closed_form(X, y):
    """Mean and sd of the weights: noise of 1, prior sd of 10."""
    X, y = X.astype(float), y.astype(float)
    precision = X.T @ X + np.eye(X.shape[1]) / 100
    return np.linalg.solve(precision, X.T @ y), np.sqrt(np.diag(np.linalg.inv(precision)))


def fit(ds, steps):
    start = time.perf_counter()
    fitted = ds.aimz.fit(
        regression, method="svi", batch=BATCH, steps=steps, draws=2000, progress=False
    )
    return fitted, time.perf_counter() - start


def by_hand(X, y):
    """A function that takes an epoch's steps, and how many there are in it."""
    import jax
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    def model(X, y):
        weights = numpyro.sample("weights", dist.Normal(0, 10).expand([FEATURES]).to_event(1))
        with numpyro.plate("data", BATCH), handlers.scale(scale=OBSERVATIONS / BATCH):
            numpyro.sample("y", dist.Normal(X @ weights, 1.0), obs=y)

    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(1e-3), Trace_ELBO())
    batched = (jax.numpy.asarray(X.reshape(-1, BATCH, FEATURES)), y.reshape(-1, BATCH))
    state = svi.init(jax.random.key(0), X[:BATCH], y[:BATCH])
    run = jax.jit(lambda s, xy: jax.lax.scan(lambda s, b: svi.update(s, *b), s, xy))
    return lambda: jax.block_until_ready(run(state, batched)), OBSERVATIONS // BATCH


def speed(runs: int, against_aimz: bool) -> None:
    import xarray as xr

    import xr_aimz  # noqa: F401

    X, y = data()
    ds = xr.Dataset({"X": (("obs", "feature"), X), "y": ("obs", y)}).chunk(obs=len(y) // CHUNKS)
    epoch, steps = by_hand(X, y)
    epoch()
    ours, hand, fixed = [], [], []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(LONG // steps // 2):
            epoch()
        hand.append(LONG // steps // 2 * steps / (time.perf_counter() - start))
        _, short = fit(ds, SHORT)
        fitted, long = fit(ds, LONG)
        ours.append((LONG - SHORT) / (long - short))
        fixed.append(short - SHORT / ours[-1])
    print(f"by hand: {median(hand):,.0f} steps/s; ours: {median(ours):,.0f} steps/s")
    ratios = sorted(o / h for o, h in zip(ours, hand, strict=True))
    print(f"ours / by hand: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"before and after the steps of a fit: {median(fixed):.1f} s")
    mean, sd = closed_form(X, y)
    draws = fitted.posterior.weights.values[0]
    print(f"posterior mean, off by at most {np.abs((draws.mean(0) - mean) / sd).max():.3f} sd")
    print(f"posterior sd / closed form: {np.round(draws.std(0) / sd, 3)}")
    if against_aimz:
        print(f"aimz: {aimz(X, y):,.0f} steps/s")


def aimz(X, y, epochs: int = 5) -> float:
    import jax
    from aimz import ImpactModel
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    svi = SVI(regression, AutoNormal(regression), Adam(1e-3), Trace_ELBO())
    model = ImpactModel(regression, jax.random.key(0), svi)
    options = {"batch_size": BATCH, "progress": False}
    start = time.perf_counter()
    model.fit(X, y, epochs=1, **options)
    first = time.perf_counter() - start
    start = time.perf_counter()
    model.fit(X, y, epochs=1 + epochs, **options)
    return epochs * len(y) / BATCH / (time.perf_counter() - start - first)


def write(path: Path, gigabytes: float, chunk: int) -> None:
    import dask
    import dask.array as da
    import xarray as xr

    features = 20
    rows = int(gigabytes * 1e9 / 4 / (features + 1)) // chunk * chunk
    rng = da.random.default_rng(0)
    X = rng.normal(size=(rows, features), chunks=(chunk, features)).astype("f4")
    y = (X.sum(axis=1) + rng.normal(size=rows, chunks=chunk)).astype("f4")
    with dask.config.set(scheduler="threads", num_workers=2):
        xr.Dataset({"X": (("obs", "feature"), X), "y": ("obs", y)}).to_zarr(path, zarr_format=3)


def one(path: Path, epochs: float) -> None:
    """A fit in a process of its own: bytes of the peak before it and after."""
    import xarray as xr

    import xr_aimz  # noqa: F401

    ds = xr.open_zarr(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    ds.aimz.fit(regression, method="svi", batch=BATCH, epochs=epochs, draws=100, progress=False)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"before": before, "peak": peak, "seconds": seconds, "bytes": ds.nbytes}))


def memory(gigabytes: float, chunk: int, epochs: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.zarr"
        write(path, gigabytes, chunk)
        command = [sys.executable, __file__, "--one", str(path), "--epochs", str(epochs)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"data of {found['bytes'] / 1e9:.2f} GB, {epochs} epochs in {found['seconds']:.0f} s")
    before = found["before"] / 1e9
    print(f"peak memory: {found['peak'] / 1e9:.2f} GB ({before:.2f} before the fit)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["aimz"], default=None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--zarr", type=float, metavar="GB", help="a store of so many GB")
    parser.add_argument("--chunk", type=int, default=250_000, help="rows of a chunk of the store")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.epochs)
    elif options.zarr:
        memory(options.zarr, options.chunk, options.epochs)
    else:
        speed(options.runs, options.vs is not None)


if __name__ == "__main__":
    main()
