"""Predict a linear model from a chunked Dataset into Zarr: time and peak memory.

    python tests/benchmarks/predict_linear.py            # xr_aimz alone, 1x and 10x the data
    python tests/benchmarks/predict_linear.py --vs aimz  # and aimz's predict, run in turn
    python tests/benchmarks/predict_linear.py --against ../old  # and another checkout's, in turn

Each run is a process of its own, on the same arrays and the same posterior draws: 1000
draws of a 5-feature linear model for 400 000 observations. Time is that of the predict
call until all is in the store, compilation included; memory is the process's peak RSS.
The inputs of the larger run lie in a Zarr store, as data larger than memory would.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

HERE = Path(__file__).parents[2]
OBSERVATIONS, FEATURES, DRAWS, CHUNK = 400_000, 5, 1000, 25_000


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


def write_inputs(path: Path, observations: int) -> None:
    import dask.array as da
    import xarray as xr

    rows = da.random.default_rng(0).normal(size=(observations, FEATURES), chunks=(CHUNK, FEATURES))
    xr.Dataset({"X": (("obs", "feature"), rows.astype("f4"))}).to_zarr(path, zarr_format=3)


def run_xr_aimz(inputs: Path, output: Path) -> float:
    import xarray as xr

    import xr_aimz  # noqa: F401

    ds = xr.open_zarr(inputs)
    fit = ds.aimz.from_posterior(model, {n: v[None] for n, v in posterior().items()}, dim="obs")
    start = time.perf_counter()
    ds.aimz.predict(fit).aimz.to_zarr(output, progress=False)
    return time.perf_counter() - start


def run_aimz(inputs: Path, output: Path) -> float:
    import jax
    import xarray as xr
    from aimz import ImpactModel
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal
    from numpyro.optim import Adam

    rows = xr.open_zarr(inputs).X.values
    guide = SVI(model, AutoNormal(model), Adam(1e-3), Trace_ELBO())
    impact = ImpactModel(model, jax.random.key(0), guide)
    impact.set_posterior_sample(posterior())
    start = time.perf_counter()
    impact.predict(rows, output_dir=output, progress=False)
    return time.perf_counter() - start


def measure(who: str, inputs: Path, checkout: Path = HERE) -> dict[str, float]:
    """One run in a process of its own, of the package in a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", who, str(inputs), f"{folder}/out.zarr"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(inputs: Path, checkout: Path, runs: int) -> None:
    """The ratio to another checkout, of runs in turn, the first pair left out."""
    pairs = [
        (measure("xr_aimz", inputs), measure("xr_aimz", inputs, checkout)) for _ in range(runs + 1)
    ][1:]
    ratios = sorted(new["seconds"] / old["seconds"] for new, old in pairs)
    print(
        f"time / that of {checkout}: median {median(ratios):.3f}, {ratios[0]:.3f} to "
        f"{ratios[-1]:.3f} in {runs} pairs"
    )


def one(who: str, inputs: Path, output: Path) -> None:
    seconds = {"xr_aimz": run_xr_aimz, "aimz": run_aimz}[who](inputs, output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_gb": peak / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["aimz"], default=None)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "INPUTS", "OUTPUT"))
    options = parser.parse_args()
    if options.one:
        who, inputs, output = options.one
        one(who, Path(inputs), Path(output))
        return
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.zarr", Path(folder) / "large.zarr"
        write_inputs(small, OBSERVATIONS)
        if options.against:
            compare(small, options.against, options.runs)
            return
        write_inputs(large, 10 * OBSERVATIONS)
        whom = ["xr_aimz", *([options.vs] if options.vs else [])]
        runs: dict[str, list[dict[str, float]]] = {who: [] for who in whom}
        for _ in range(options.runs):
            for who in whom:
                runs[who].append(measure(who, small))
        for who, found in runs.items():
            seconds, peak = (median(r[k] for r in found) for k in ("seconds", "peak_gb"))
            print(f"{who:8} {OBSERVATIONS} obs: median {seconds:.2f} s, peak {peak:.3f} GB")
        if options.vs:
            pairs = zip(runs["xr_aimz"], runs[options.vs], strict=True)
            ratio = median(a["seconds"] / b["seconds"] for a, b in pairs)
            print(f"xr_aimz / {options.vs}: median ratio of times {ratio:.3f}")
        ten = measure("xr_aimz", large)
        base = median(r["peak_gb"] for r in runs["xr_aimz"])
        print(
            f"xr_aimz  {10 * OBSERVATIONS} obs: {ten['seconds']:.2f} s, peak "
            f"{ten['peak_gb']:.3f} GB, {ten['peak_gb'] / base - 1:+.1%} of memory"
        )


if __name__ == "__main__":
    main()
