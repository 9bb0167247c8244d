"""Run the main workflow on a real grid: ``python -m xr_aimz.demo [folder]``.

Two hundred and forty years of annual temperature over North America, as a climate model
simulated them under scenario A1B (UK Met Office, in the package ``iris-sample-data``). A
partially pooled warming trend is fitted in every cell of the 37 x 49 grid, predicted
from a chunked Dataset to Zarr, reopened, summarized and plotted. The trends are compared
with ordinary least squares, with which they should agree here: 240 years of data in a
cell are more informative than its neighbours.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.infer import init_to_median

import xr_aimz


def load() -> xr.Dataset:
    """Load the A1B temperatures ``tas(time, lat, lon)`` in K above the mean of 1961-1990.

    Returns
    -------
    Dataset
        With ``decade(time)``, decades since the middle of the record.
    """
    import iris_sample_data

    source = Path(iris_sample_data.path) / "A1B_north_america.nc"
    with xr.open_dataset(source, decode_times=xr.coders.CFDatetimeCoder(use_cftime=True)) as raw:
        ds = raw[["air_temperature"]].load()
    ds = ds.rename(air_temperature="tas", latitude="lat", longitude="lon")
    ds = ds.drop_vars([name for name in ds.coords if name not in ds.dims])
    baseline = ds.tas.sel(time=slice("1961", "1990")).mean("time")
    attrs = {"units": "K", "long_name": "temperature above the mean of 1961-1990"}
    year = ds.time.dt.decimal_year
    decade = ((year - year.mean()) / 10).assign_attrs(long_name="decades since mid-record")
    return ds.assign(tas=(ds.tas - baseline).assign_attrs(attrs)).assign_coords(decade=decade)


def warming(decade, tas=None):  # type: ignore[no-untyped-def] # as a reader would write it
    """Model a trend in every cell: intercept, slope and noise, each partially pooled."""
    mean_level = numpyro.sample("mean_level", dist.Normal(0, 5))
    mean_slope = numpyro.sample("mean_slope", dist.Normal(0, 1))
    mean_noise = numpyro.sample("mean_noise", dist.Normal(0, 1))
    spread_level = numpyro.sample("spread_level", dist.HalfNormal(5))
    spread_slope = numpyro.sample("spread_slope", dist.HalfNormal(1))
    spread_noise = numpyro.sample("spread_noise", dist.HalfNormal(1))
    with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
        level = numpyro.sample("level", dist.Normal(mean_level, spread_level))
        slope = numpyro.sample("slope", dist.Normal(mean_slope, spread_slope))
        noise = numpyro.sample("noise", dist.LogNormal(mean_noise, spread_noise))
    with xr_aimz.plate("time"), xr_aimz.plate("lat"), xr_aimz.plate("lon"):
        numpyro.sample("tas", dist.Normal(level + slope * decade, noise), obs=tas)


def ordinary_least_squares(ds: xr.Dataset) -> xr.Dataset:
    """Compute the OLS slope and its standard error in each cell, in K per decade."""
    x = ds.decade - ds.decade.mean("time")
    y = ds.tas - ds.tas.mean("time")
    squares = (x**2).sum("time")
    slope = (x * y).sum("time") / squares
    residual = ((y - slope * x) ** 2).sum("time") / (ds.sizes["time"] - 2)
    return xr.Dataset({"slope": slope, "error": np.sqrt(residual / squares)})


def draw_map(slope: xr.DataArray, path: Path) -> None:
    """Plot the mean trend and its posterior sd over ``(lat, lon)``, side by side, to a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mean, sd = slope.mean(("chain", "draw")), slope.std(("chain", "draw"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, values, title in zip(axes, (mean, sd), ("warming", "posterior sd"), strict=True):
        labelled = values.assign_attrs(units="K / 10 years", long_name=title)
        labelled.plot(ax=panel, cmap="inferno", robust=True)  # type: ignore[call-arg] # an accessor, which mypy takes for a method
        panel.set_title(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def agreement(slope: xr.DataArray, ols: xr.Dataset) -> tuple[float, float]:
    """Compute the share of cells with the OLS slope within a posterior sd, and sd / OLS error."""
    mean, sd = slope.mean(("chain", "draw")), slope.std(("chain", "draw"))
    within = abs(mean - ols.slope) <= sd
    return float(within.mean()), float((sd / ols.error).median())


def coverage(pred: xr.Dataset, ds: xr.Dataset) -> float:
    """Compute the share of the last thirty years that the 90 % predictive interval covers."""
    recent = pred.tas.isel(time=slice(-30, None)).chunk(chain=-1, draw=-1)
    low, high = recent.quantile([0.05, 0.95], ("chain", "draw"))
    truth = ds.tas.isel(time=slice(-30, None))
    return float(((low <= truth) & (truth <= high)).mean())


def main(arguments: list[str] | None = None) -> None:
    """Fit, predict, store, reopen, summarize, plot, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m xr_aimz.demo", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("xr_aimz_demo"))
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    ds = load()
    print(ds.aimz.describe(warming), "\n")

    fit = ds.aimz.fit(warming, method="svi", steps=4000, draws=500, init=init_to_median)
    fitted = time.perf_counter()
    pred = ds.chunk(lat=10).aimz.predict(fit)
    stored = pred.aimz.to_zarr(folder / "pred.zarr", mode="w")
    written = time.perf_counter()
    slope = fit.posterior.slope
    draw_map(slope, folder / "warming.png")

    within, ratio = agreement(slope, ordinary_least_squares(ds))
    area = np.cos(np.deg2rad(ds.lat))
    mean = slope.weighted(area).mean(("lat", "lon"))
    low, high = mean.quantile([0.05, 0.95]).values
    print(f"\n{ds.sizes['lat'] * ds.sizes['lon']} cells, {ds.sizes['time']} years")
    print(f"warming, area mean             {float(mean.mean()):.4f} K a decade")
    print(f"  its 90 % interval            {low:.4f} to {high:.4f}")
    print(f"cells within one sd of OLS     {within:.1%}")
    print(f"posterior sd / OLS error       {ratio:.3f} (median of cells)")
    print(f"90 % interval covers           {coverage(stored, ds):.1%} of the last 30 years")
    print(f"predictive draws               {stored.tas.nbytes / 1e9:.2f} GB in {folder}/pred.zarr")
    print(f"map                            {folder}/warming.png")
    print(f"fit {fitted - start:.0f} s, predict and write {written - fitted:.0f} s")


if __name__ == "__main__":
    main()
