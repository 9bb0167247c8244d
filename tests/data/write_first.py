"""How ``fit-format-1.zip`` and ``fit-format-1.nc`` were written: never again.

They are of the first release that saved fits. Every later one must load and predict them.
"""

import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import xarray as xr
from first_model import rivers

import xr_aimz  # registers Dataset.aimz

HERE = Path(__file__).parent

rng = np.random.default_rng(0)
rain = rng.uniform(0, 3, (8, 3))
time = xr.date_range("2000-01-30", periods=8, freq="D", calendar="360_day", use_cftime=True)
ds = xr.Dataset(
    {
        "rain": (("time", "site"), rain, {"units": "mm"}),
        "flow": (
            ("time", "site"),
            rain + [1, 2, 3],
            {"units": "m3 s-1", "long_name": "discharge"},
        ),
    },
    {"time": time, "site": ["upper", "middle", "lower"]},
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", xr_aimz.errors.ConvergenceWarning)
    fit = ds.aimz.fit(rivers, {"power": 1}, draws=10, chains=2, warmup=100, seed=3, progress=False)
with tempfile.TemporaryDirectory() as folder:
    fit.save(Path(folder) / "fit.zarr")
    shutil.make_archive(str(HERE / "fit-format-1"), "zip", Path(folder) / "fit.zarr")
expected = ds.aimz.predict(fit, seed=5).compute()[["flow"]].reset_coords(drop=True)
expected = expected.drop_vars(["time", "site"]).drop_attrs()
further = fit.sample(4, seed=7).posterior["yield"].rename("further").drop_vars(["chain", "draw"])
expected = expected.drop_vars(["chain", "draw"]).assign(further=further.rename(draw="more"))
expected.astype("f4").to_netcdf(HERE / "fit-format-1.nc", engine="netcdf4")
