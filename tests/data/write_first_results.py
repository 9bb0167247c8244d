"""How ``results-1.zip`` was written: never again.

It holds stores of the first release: results that are whole, the same results cut short, a fit
per cell, and one that was cut short. Every later release must open them.
"""

import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import dask
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from dask.callbacks import Callback

import xr_aimz
from xr_aimz.inference import per_cell_program

HERE = Path(__file__).parent


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


values = np.arange(12.0).reshape(4, 3)
results = xr.Dataset(
    {"a": (("t", "s"), values, {"units": "K"}), "n": (("t", "s"), np.zeros((4, 3), int))},
    {"t": np.arange(4), "s": ["u", "vv", "w"], "zero": ("s", np.zeros(3))},
)


class Cut(Callback):
    """Stops a write after two blocks."""

    done = 0

    def _posttask(self, key, value, dsk, state, worker):
        self.done += "aimz-write" in str(key)
        if self.done == 2:
            raise KeyboardInterrupt


rng = np.random.default_rng(0)
cells = xr.Dataset(
    {"y": (("t", "cell"), rng.normal(size=(6, 500)))},
    {"x": ("t", np.linspace(-1, 1, 6)), "cell": np.arange(500)},
)
options = {"per": "cell", "method": "laplace", "draws": 2, "progress": False}
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    folder = Path(folder)
    results.chunk(t=2).aimz.to_zarr(folder / "whole.zarr", progress=False)
    with dask.config.set(scheduler="sync"), Cut(), suppress(KeyboardInterrupt):
        results.chunk(t=1).aimz.to_zarr(folder / "torn.zarr", progress=False)
    with xr_aimz.set_options(block_bytes=1):
        cells.aimz.fit(line, store=folder / "cells.zarr", **options)
        run, done = per_cell_program.TileProgram.run, []

        def cut(*args):
            done.append(True)
            if len(done) > 1:
                raise KeyboardInterrupt
            return run(*args)

        per_cell_program.TileProgram.run = cut
        with suppress(KeyboardInterrupt):
            cells.aimz.fit(line, store=folder / "torn_cells.zarr", **options)
    shutil.make_archive(str(HERE / "results-1"), "zip", folder)
