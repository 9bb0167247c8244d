"""A fit in every cell against a loop, and the whole of a real grid.

Run with ``python tests/benchmarks/cells.py``; it needs ``iris-sample-data`` and takes a
few minutes. Three parameters, 240 yearly steps, 300 + 300 draws of one chain. The loop is
over a few cells, each with an ``MCMC`` of its own, as one would write it; its figures are
per cell, with compilation (what a loop over ``MCMC.run`` costs) and without (one ``MCMC``
that is told the next cell's data). The fits' figures are for the second of two calls in a
process, and for the first, which traces and compiles.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import iris_sample_data
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.infer import MCMC, NUTS

import xr_aimz

GRID = Path(iris_sample_data.__file__).parent / "sample_data" / "A1B_north_america.nc"
DRAWS = {"num_warmup": 300, "num_samples": 300}
LOOP_CELLS = 5


def trend(years, tas=None):
    level = numpyro.sample("level", dist.Normal(0, 10))
    slope = numpyro.sample("slope", dist.Normal(0, 5))
    noise = numpyro.sample("noise", dist.HalfNormal(5))
    numpyro.sample("tas", dist.Normal(level + slope * years, noise), obs=tas)


def grid() -> xr.Dataset:
    """Yearly anomalies of temperature over North America, centuries from the middle."""
    coder = xr.coders.CFDatetimeCoder(use_cftime=True)
    with xr.open_dataset(GRID, decode_times=coder, decode_timedelta=False) as raw:
        tas = raw.air_temperature.load().reset_coords(drop=True)
    steps = np.arange(tas.sizes["time"])
    years = xr.DataArray((steps - steps.mean()) / 100, dims="time")
    return xr.Dataset({"tas": tas - tas.mean("time")}).assign_coords(years=years)


def loop(ds: xr.Dataset) -> tuple[float, float]:
    """Seconds a cell, compiling for each and compiling once."""
    cells = ds.tas.stack(cell=("latitude", "longitude")).transpose("cell", "time")
    each = [np.asarray(y, np.float32) for y in cells.values[:: len(cells.cell) // LOOP_CELLS]]
    years = np.asarray(ds.years, np.float32)
    start = time.perf_counter()
    for y in each:
        one = MCMC(NUTS(trend), **DRAWS, progress_bar=False)
        one.run(jax.random.key(0), years, tas=y)
        jax.block_until_ready(one.get_samples())
    anew = (time.perf_counter() - start) / len(each)
    same = MCMC(NUTS(trend), **DRAWS, progress_bar=False, jit_model_args=True)
    same.run(jax.random.key(0), years, tas=each[0])
    start = time.perf_counter()
    for y in each:
        same.run(jax.random.key(0), years, tas=y)
        jax.block_until_ready(same.get_samples())
    return anew, (time.perf_counter() - start) / len(each)


def timed(ds: xr.Dataset, **options: object) -> tuple[float, float, xr_aimz.Fit]:
    """Seconds of a first and a second fit of the whole grid."""
    seconds = []
    for seed in (0, 1):
        start = time.perf_counter()
        fit = ds.aimz.fit(
            trend, per=("latitude", "longitude"), seed=seed, progress=False, **options
        )
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1], fit


def main() -> None:
    """Print the figures."""
    warnings.simplefilter("ignore")
    ds = grid()
    count = ds.sizes["latitude"] * ds.sizes["longitude"]
    anew, same = loop(ds)
    print(f"loop over MCMC.run: {anew:.3g} s a cell compiling each, {same:.3g} s compiling once")
    first, second, fit = timed(ds, draws=300, warmup=300, chains=1)
    failed = int((fit.sample_stats.status != 0).sum())
    print(f"NUTS, {count} cells: {first:.1f} s, again {second:.1f} s; {failed} cells failed")
    print(
        f"  times the loop: {anew * count / first:.0f} (both compile), "
        f"{anew * count / second:.0f} (the loop compiles), {same * count / second:.1f} (neither)"
    )
    first, second, fit = timed(ds, method="laplace", draws=300)
    failed = int((fit.sample_stats.status != 0).sum())
    print(
        f"Laplace, {count} cells: {count / first:.0f} cells/s, again {count / second:.0f} "
        f"cells/s; {failed} cells failed"
    )


if __name__ == "__main__":
    main()
