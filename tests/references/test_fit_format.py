"""What the first release saved loads forever, and predicts what it predicted then."""

import shutil
import sys
from pathlib import Path

import cftime
import numpy as np
import pytest
import xarray as xr

import xr_aimz

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "fit.zarr"
    shutil.unpack_archive(DATA / "fit-format-1.zip", folder)
    sys.path.insert(0, str(DATA))
    yield xr_aimz.load_fit(folder, trust_import=True)
    sys.path.remove(str(DATA))


@pytest.fixture(scope="module")
def expected():
    with xr.open_dataset(DATA / "fit-format-1.nc") as ds:
        yield ds.load()


def test_it_predicts_the_recorded_numbers(fit, expected):
    ds = fit.constant_data.assign(fit.observed_data)
    pred = ds.aimz.predict(fit, seed=5).compute()
    np.testing.assert_allclose(pred.flow.values, expected.flow.values, rtol=1e-5, atol=1e-5)
    assert pred.attrs["aimz_fit"] == fit.token
    assert pred.flow.attrs == {"units": "m3 s-1", "long_name": "discharge"}


@pytest.mark.slow
def test_its_chains_go_on(fit, expected):
    further = fit.sample(4, seed=7).posterior["yield"]
    # Chains drift apart by rounding that another version of XLA does otherwise.
    np.testing.assert_allclose(further.values, expected.further.values, rtol=1e-2)


def test_its_labels_are_what_they_were(fit):
    assert list(fit.posterior.site.values) == ["upper", "middle", "lower"]
    times = fit.observed_data.time
    assert times.values[1] == cftime.Datetime360Day(2000, 2, 1)
    assert times.dt.calendar == "360_day"
    assert fit.binding.constants == {"power": 1}
    assert fit.options["seed"] == 3
    assert fit.options["draws"] == 10
