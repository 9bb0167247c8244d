"""The same values in every kind of file, and ways to open them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr


def write_files(folder):
    """The same values, in every kind of file."""
    rng = np.random.default_rng(0)
    ds = xr.Dataset(
        {"x": (("t", "s"), rng.normal(size=(8, 6))), "y": (("t", "s"), rng.normal(size=(8, 6)))},
        {
            "t": np.arange(8),
            "s": list("abcdef"),
            "height": ("s", np.arange(6.0)),
            "day": ("t", pd.date_range("2000-01-01", periods=8)),
            "kind": ("s", ["u", "vv"] * 3),
        },
    )
    packed = {"x": {"dtype": "i2", "scale_factor": 0.001, "_FillValue": -999}}
    ds.to_netcdf(folder / "all.nc", encoding=packed)
    # Strings of fixed length have no place in the v3 specification, of which Zarr warns.
    lettered = ds.assign_coords(s=ds.s.astype(np.dtypes.StringDType())).drop_vars("kind")
    lettered.to_zarr(folder / "all.zarr", consolidated=False)
    ds.drop_vars(["kind", "s"]).to_zarr(folder / "two.zarr", zarr_format=2)
    for part in range(2):
        ds.isel(t=slice(4 * part, 4 * part + 4)).to_netcdf(folder / f"part{part}.nc")


OPENED = {
    "netcdf": lambda f: xr.open_dataset(f / "all.nc"),
    "netcdf, dask": lambda f: xr.open_dataset(f / "all.nc", chunks={}),
    "h5netcdf": lambda f: xr.open_dataset(f / "all.nc", engine="h5netcdf"),
    "zarr": lambda f: xr.open_zarr(f / "all.zarr", consolidated=False),
    "zarr without dask": lambda f: xr.open_zarr(f / "all.zarr", chunks=None, consolidated=False),
    "zarr 2": lambda f: xr.open_zarr(f / "two.zarr"),
    "many files": lambda f: xr.open_mfdataset(sorted(f.glob("part*.nc"))),
    "in memory": lambda f: xr.open_dataset(f / "all.nc").load(),
}


CHANGED = {
    "chunk": lambda ds: ds.chunk(t=2),
    "sel": lambda ds: ds.sel(t=slice(1, 6)).isel(s=[4, 1, 2]).chunk(t=2),
    "arithmetic": lambda ds: ds.assign(x=ds.x * 2 + ds.height).chunk(t=2),
    "chunk, then arithmetic": lambda ds: (c := ds.chunk(t=2)).assign(x=c.x.where(c.x > c.height)),
    "function": lambda ds: ds.chunk(t=2).map(
        lambda a: a + 1 if a.name in {"x", "y", "z", "u", "v"} else a
    ),
}
