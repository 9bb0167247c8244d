"""A paired effect with its 5, 50 and 95 % quantiles, for every observation.

    python tests/benchmarks/effects.py             # xr_aimz alone
    python tests/benchmarks/effects.py --vs aimz   # and aimz, run in turn (Python 3.12)

Each run is a process of its own, on the same arrays and the same posterior draws: 1000 draws
of a 5-feature linear model for 100 000 observations, the first feature raised by one. Time is
that of all calls until the quantiles are in memory, compilation included. aimz predicts twice,
estimates the effect, and takes the quantiles with xarray. Of either, what the imports left
behind is collected before the clock starts: Python would take a tenth of a second for it at
some moment of the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import numpy as np

OBSERVATIONS, FEATURES, DRAWS, CHUNK = 100_000, 5, 1000, 25_000
ENDS = [0.05, 0.5, 0.95]


def model(X, y=None):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([X.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    with numpyro.plate("data", X.shape[0]):
        numpyro.sample("y", dist.Normal(jnp.dot(X, weights), sigma), obs=y)


def posterior() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "weights": rng.normal(size=(DRAWS, FEATURES)).astype(np.float32),
        "sigma": np.abs(rng.normal(1, 0.1, size=DRAWS)).astype(np.float32),
    }


def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(OBSERVATIONS, FEATURES)).astype("f4")


def quantiles(ds, fit, do):
    return ds.aimz.intervene(fit, do, sites="y", summary=ENDS).y_quantile.compute()


def run_xr_aimz() -> tuple[float, np.ndarray]:
    import xarray as xr

    import xr_aimz  # noqa: F401

    names = [f"x{i}" for i in range(FEATURES)]
    columns = {name: ("obs", column) for name, column in zip(names, rows().T, strict=True)}
    ds = xr.Dataset(columns).chunk(obs=CHUNK)
    draws = {n: v[None] for n, v in posterior().items()}
    fit = ds.aimz.from_posterior(model, draws, {"X": names}, dim="obs")
    gc.collect()
    start = time.perf_counter()
    found = quantiles(ds, fit, {"x0": lambda x: x + 1})
    return time.perf_counter() - start, found.values


def run_aimz() -> tuple[float, np.ndarray]:
    import jax
    from aimz import ImpactModel
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    X = rows()
    raised = X + np.eye(FEATURES, dtype="f4")[0]
    guide = SVI(model, AutoNormal(model), Adam(1e-3), Trace_ELBO())
    impact = ImpactModel(model, jax.random.key(0), guide)
    impact.set_posterior_sample(posterior())
    key = jax.random.key(1)
    gc.collect()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"rng_key": key, "progress": False}
        before, after = (
            impact.predict(x, output_dir=f"{folder}/{i}", **options)
            for i, x in enumerate((X, raised))
        )
        effect = impact.estimate_effect(before, after)
        found = effect["posterior_predictive"]["y"]
        found = found.chunk(chain=-1, draw=-1).quantile(ENDS, ("chain", "draw")).compute()
        return time.perf_counter() - start, found.values


def one(who: str) -> None:
    import dask

    # Where distributed is installed, dask imports it to look for a cluster: 0.2 s of either.
    with dask.config.set(scheduler="threads"):
        seconds, found = {"xr_aimz": run_xr_aimz, "aimz": run_aimz}[who]()
    # The effect is the first weight, at every observation.
    wanted = np.quantile(posterior()["weights"][:, 0], ENDS)
    error = float(abs(found - wanted[:, None]).max())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_gb": peak / 1e9, "error": error}))


def measure(who: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", who]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["aimz"], default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", metavar="WHO")
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    whom = ["xr_aimz", *([options.vs] if options.vs else [])]
    runs: dict[str, list[dict[str, float]]] = {who: [] for who in whom}
    for _ in range(options.runs):
        for who in whom:
            runs[who].append(measure(who))
    for who, found in runs.items():
        seconds, peak, error = (
            median(r[k] for r in found) for k in ("seconds", "peak_gb", "error")
        )
        print(f"{who:8} median {seconds:.2f} s, peak {peak:.3f} GB, largest error {error:.1e}")
    if options.vs:
        pairs = zip(runs["xr_aimz"], runs[options.vs], strict=True)
        ratio = median(a["seconds"] / b["seconds"] for a, b in pairs)
        print(f"xr_aimz / {options.vs}: median ratio of times {ratio:.3f}")


if __name__ == "__main__":
    main()
