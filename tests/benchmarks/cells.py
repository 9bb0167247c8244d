"""A fit in every cell against a loop, and the whole of a real grid.

Run with ``python tests/benchmarks/cells.py``; it needs ``iris-sample-data`` and takes a
few minutes. Three parameters, 240 yearly steps, 300 + 300 draws of one chain. The loop is
over a few cells, each with an ``MCMC`` of its own, as one would write it; its figures are
per cell, with compilation (what a loop over ``MCMC.run`` costs) and without (one ``MCMC``
that is told the next cell's data). Loops and fits of the whole grid take turns, and figures are
medians over the rounds, in seconds of the clock and of the processor: the latter is what
other work on the machine disturbs least. The first fit traces and compiles.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
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
ROUNDS, LOOP_CELLS = 3, 3


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


def seconds(work: Callable[[], object]) -> np.ndarray:
    """Of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return np.array([time.perf_counter() - clock, time.process_time() - processor])


class Loop:
    """A loop over cells with ``MCMC.run``."""

    def __init__(self, ds: xr.Dataset) -> None:
        cells = ds.tas.stack(cell=("latitude", "longitude")).transpose("cell", "time")
        step = len(cells.cell) // LOOP_CELLS
        self.each = [np.asarray(y, np.float32) for y in cells.values[::step][:LOOP_CELLS]]
        self.years = np.asarray(ds.years, np.float32)
        self._same = MCMC(NUTS(trend), **DRAWS, progress_bar=False, jit_model_args=True)
        self._run(self._same, self.each[0])

    def anew(self) -> None:
        """Compile for each cell."""
        for y in self.each:
            self._run(MCMC(NUTS(trend), **DRAWS, progress_bar=False), y)

    def same(self) -> None:
        """Compile once."""
        for y in self.each:
            self._run(self._same, y)

    def _run(self, sampler: MCMC, y: np.ndarray) -> None:
        sampler.run(jax.random.key(0), self.years, tas=y)
        jax.block_until_ready(sampler.get_samples())


def fit(ds: xr.Dataset, seed: int, **options: object) -> xr_aimz.Fit:
    """A fit of every cell of the grid."""
    return ds.aimz.fit(trend, per=("latitude", "longitude"), seed=seed, progress=False, **options)


def nuts(ds: xr.Dataset) -> None:
    """Print the figures of NUTS against those of the loop."""
    count, options = ds.sizes["latitude"] * ds.sizes["longitude"], {"draws": 300, "warmup": 300}
    loop, rounds = Loop(ds), []
    for seed in range(ROUNDS):
        each = [seconds(work) / LOOP_CELLS for work in (loop.anew, loop.same)]
        rounds.append([*each, seconds(lambda: fit(ds, seed, chains=1, **options))])  # noqa: B023
    first = rounds[0][2]
    anew, same, again = (np.median([r[i] for r in rounds[i == 2 :]], axis=0) for i in range(3))
    for name, at in (("clock", 0), ("processor", 1)):
        print(
            f"NUTS by the {name}: loop {anew[at]:.3g} s a cell compiling each, {same[at]:.3g} s "
            f"compiling once; {count} cells {first[at]:.1f} s, again {again[at]:.1f} s"
        )
        print(
            f"  times the loop: {anew[at] * count / first[at]:.0f} (both compile), "
            f"{anew[at] * count / again[at]:.0f} (the loop compiles), "
            f"{same[at] * count / again[at]:.1f} (neither)"
        )


def main() -> None:
    """Print the figures."""
    warnings.simplefilter("ignore")
    ds = grid()
    count = ds.sizes["latitude"] * ds.sizes["longitude"]
    nuts(ds)
    first, again = (seconds(lambda: fit(ds, s, method="laplace", draws=300)) for s in (0, 1))  # noqa: B023
    print(
        f"Laplace, {count} cells: {count / first[0]:.0f} cells/s by the clock, again "
        f"{count / again[0]:.0f}; {count / again[1]:.0f} cells/s by the processor"
    )


if __name__ == "__main__":
    main()
