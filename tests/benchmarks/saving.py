"""Saving and loading a fit of about 200 MB: seconds, beside a plain copy by xarray.

``python tests/benchmarks/saving.py``
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import saved_models

import xr_aimz

CELLS, DRAWS, REPEATS = 12_500, 4_000, 3


def timed(what, call):
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = call()
        best = min(best, time.perf_counter() - start)
    print(f"{what:<48}{best:8.2f} s")
    return found


def fits():
    rng = np.random.default_rng(0)
    lat = np.arange(CELLS)
    x = rng.normal(size=(2, CELLS)).astype("f4")
    ds = xr.Dataset({"x": (("time", "lat"), x), "y": (("time", "lat"), x)}, {"lat": lat})
    fit = ds.isel(lat=slice(2)).aimz.fit(
        saved_models.line, per="lat", method="laplace", draws=2, progress=False
    )
    draws = rng.normal(size=(1, DRAWS, CELLS)).astype("f4")
    dims = ("chain", "draw", "lat")
    coords = {"chain": [0], "draw": np.arange(DRAWS), "lat": lat}
    posterior = xr.Dataset({"slope": (dims, draws)}, coords)
    from dataclasses import replace

    eager = replace(fit, posterior=posterior)
    return eager, replace(fit, posterior=posterior.chunk(lat=CELLS // 10))


def main():
    folder = Path(tempfile.mkdtemp())
    eager, lazy = fits()
    print(f"posterior of {eager.posterior.nbytes / 1e6:.0f} MB; best of {REPEATS}")
    for name, fit in (("eager", eager), ("lazy", lazy)):
        path = folder / f"{name}.zarr"
        timed(f"save, {name}", lambda fit=fit, path=path: fit.save(path, mode="w"))
        back = timed(f"load, {name}", lambda p=path: xr_aimz.load_fit(p, saved_models.line))
        timed(f"read all draws, {name}", lambda back=back: back.posterior.sum().compute())
    plain = folder / "plain.zarr"
    ds = lazy.posterior
    timed("xarray's to_zarr of the posterior", lambda: ds.to_zarr(plain, mode="w"))
    timed("xarray's read of it", lambda: xr.open_zarr(plain).sum().compute())
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
