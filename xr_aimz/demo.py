"""The main job on a real grid: ``python -m xr_aimz.demo [folder]``.

Two and a half centuries of annual temperature over North America, as a climate model
simulated them under scenario A1B (UK Met Office, in the package ``iris-sample-data``). A
partially pooled warming trend is fitted in every cell of the 37 x 49 grid, predicted
from a chunked Dataset to Zarr, reopened, summarized and drawn. The trends are compared
with ordinary least squares, which is what they ought to agree with here: 240 years say
more about a cell than its neighbours do.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr

import xr_aimz

__all__ = ["load", "main", "ordinary_least_squares", "warming"]


def load() -> xr.Dataset:
    """The A1B temperatures ``tas(time, lat, lon)`` in K, with ``decade`` since mid-record."""
    import iris_sample_data

    source = Path(iris_sample_data.path) / "A1B_north_america.nc"
    with xr.open_dataset(source, decode_times=xr.coders.CFDatetimeCoder(use_cftime=True)) as raw:
        ds = raw[["air_temperature"]].load()
    ds = ds.rename(air_temperature="tas", latitude="lat", longitude="lon")
    ds = ds.drop_vars([name for name in ds.coords if name not in ds.dims])
    year = ds.time.dt.decimal_year
    decade = ((year - year.mean()) / 10).assign_attrs(units="10 years", long_name="time")
    return ds.assign_coords(decade=decade)


def warming(decade, tas=None):  # type: ignore[no-untyped-def]
    """A trend in every cell: intercept, slope and noise, each partially pooled."""
    mean_level = numpyro.sample("mean_level", dist.Normal(280, 30))
    mean_slope = numpyro.sample("mean_slope", dist.Normal(0, 1))
    mean_noise = numpyro.sample("mean_noise", dist.Normal(0, 1))
    spread_level = numpyro.sample("spread_level", dist.HalfNormal(30))
    spread_slope = numpyro.sample("spread_slope", dist.HalfNormal(1))
    spread_noise = numpyro.sample("spread_noise", dist.HalfNormal(1))
    with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
        level = numpyro.sample("level", dist.Normal(mean_level, spread_level))
        slope = numpyro.sample("slope", dist.Normal(mean_slope, spread_slope))
        noise = numpyro.sample("noise", dist.LogNormal(mean_noise, spread_noise))
    with xr_aimz.plate("time"), xr_aimz.plate("lat"), xr_aimz.plate("lon"):
        numpyro.sample("tas", dist.Normal(level + slope * decade, noise), obs=tas)


def ordinary_least_squares(ds: xr.Dataset) -> xr.Dataset:
    """Slope and its standard error in each cell, by the textbook's formulas."""
    x = ds.decade - ds.decade.mean("time")
    y = ds.tas - ds.tas.mean("time")
    squares = (x**2).sum("time")
    slope = (x * y).sum("time") / squares
    residual = ((y - slope * x) ** 2).sum("time") / (ds.sizes["time"] - 2)
    return xr.Dataset({"slope": slope, "error": np.sqrt(residual / squares)})


def draw_map(slope: xr.DataArray, path: Path) -> None:
    """The mean trend and its posterior sd, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mean, sd = slope.mean(("chain", "draw")), slope.std(("chain", "draw"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, values, title in zip(axes, (mean, sd), ("warming", "posterior sd"), strict=True):
        labelled = values.assign_attrs(units="K / 10 years", long_name=title)
        labelled.plot(ax=panel, cmap="inferno", robust=True)
        panel.set_title(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
