"""Five statistics of a linear model's predictions: time and peak memory.

    python tests/benchmarks/summary.py            # xr_aimz alone
    python tests/benchmarks/summary.py --vs aimz  # and aimz's predict + xarray, run in turn

Each run is a process of its own, on the arrays, the model and the 1000 posterior draws of
``predict_linear.py``, for 400 000 observations; the mean, the standard deviation and the
5, 50 and 95 % quantiles of every observation end in memory. aimz has no summaries: its
``predict`` writes the draws, and xarray's ``mean``, ``std`` and ``quantile`` reduce them as
that comes back. Time is that of the call until the five are there, compilation included;
memory is the process's peak RSS.
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
from predict_linear import OBSERVATIONS, model, posterior, write_inputs

QUANTILES = [0.05, 0.5, 0.95]


def run_xr_aimz(inputs: Path, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
    import xarray as xr

    import xr_aimz  # noqa: F401

    ds = xr.open_zarr(inputs)
    fit = ds.aimz.from_posterior(model, {n: v[None] for n, v in posterior().items()}, dim="obs")
    start = time.perf_counter()
    found = ds.aimz.predict(fit, summary=("mean", "std", *QUANTILES)).compute()
    seconds = time.perf_counter() - start
    return seconds, {"mean": found.y_mean.values, "quantile": found.y_quantile.values}


def run_aimz(inputs: Path, folder: Path) -> tuple[float, dict[str, np.ndarray]]:
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
    tree = impact.predict(rows, output_dir=folder, progress=False)
    draws = tree["posterior_predictive"].y
    dims = ("chain", "draw")
    mean = draws.mean(dims).compute()
    draws.std(dims).compute()
    # A quantile wants the draws of a cell in one chunk; some cells at a time, or memory is gone.
    quantile = draws.chunk(dict.fromkeys(dims, -1)).quantile(QUANTILES, dims).compute()
    seconds = time.perf_counter() - start
    return seconds, {"mean": mean.values, "quantile": quantile.values}


def measure(who: str, inputs: Path) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", who, str(inputs), f"{folder}/out"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(who: str, inputs: Path, folder: Path) -> None:
    seconds, found = {"xr_aimz": run_xr_aimz, "aimz": run_aimz}[who](inputs, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Noise differs, so these agree to Monte Carlo error: a sign that both did the same work.
    middle = [float(found["mean"].mean()), *np.mean(found["quantile"], axis=-1).tolist()]
    print(json.dumps({"seconds": seconds, "peak_gb": peak / 1e9, "averages": middle}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vs", choices=["aimz"], default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "INPUTS", "OUTPUT"))
    options = parser.parse_args()
    if options.one:
        who, inputs, output = options.one
        one(who, Path(inputs), Path(output))
        return
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.zarr"
        write_inputs(inputs, OBSERVATIONS)
        whom = ["xr_aimz", *([options.vs] if options.vs else [])]
        runs: dict[str, list[dict]] = {who: [] for who in whom}
        for _ in range(options.runs):
            for who in whom:
                runs[who].append(measure(who, inputs))
    for who, found in runs.items():
        seconds, peak = (median(r[k] for r in found) for k in ("seconds", "peak_gb"))
        averages = ", ".join(f"{v:.3f}" for v in found[0]["averages"])
        print(f"{who:8} median {seconds:.2f} s, peak {peak:.3f} GB; averages {averages}")
    if options.vs:
        pairs = zip(runs["xr_aimz"], runs[options.vs], strict=True)
        ratio = median(b["seconds"] / a["seconds"] for a, b in pairs)
        print(f"{options.vs} / xr_aimz: median ratio of times {ratio:.1f}")


if __name__ == "__main__":
    main()
