"""What ``do`` is given, on the labels of a Dataset; what cannot be is refused before work."""

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.errors import (
    DimensionError,
    DtypeError,
    InterventionError,
    LabelError,
    MissingVariableError,
    UnitsError,
)


def spring(block):
    raise AssertionError("a task ran before the refusal")


@pytest.fixture(scope="module")
def bound():
    ds = xr.Dataset(
        {
            "x": (("time", "lat"), np.zeros((3, 2)), {"units": "K"}),
            "n": ("time", np.array([1, 2, 3])),
            "y": (("time", "lat"), np.zeros((3, 2)), {"units": "mm"}),
        },
        {"time": [2000, 2001, 2002], "lat": [10.0, 20.0]},
    )

    def model(x, n, scale=2.0, y=None):
        table = numpyro.sample("table", dist.Normal(0, 1).expand([5]).to_event(1))
        with xr_aimz.plate("lat"):
            level = numpyro.sample("level", dist.Normal(0, 1))
        mean = numpyro.deterministic("mean", scale * (level + x + table[n]))
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)

    draws = {"table": np.arange(5.0)[None, None], "level": np.zeros((1, 1, 2))}
    fit = ds.aimz.from_posterior(model, draws, {"scale": 2.0})
    lazy = ds.x.copy(data=da.zeros((3, 2)).map_blocks(spring, dtype=float, meta=np.zeros((0, 0))))
    return ds.assign(x=lazy), fit, ds


def along(values, **coords):
    return xr.DataArray(values, coords, list(coords))


@pytest.mark.parametrize(
    ("do", "error", "parts"),
    [
        ({"q": 1}, MissingVariableError, ["'q'", "'level', 'n', 'table', 'x', 'y'"]),
        ({"mean": 1}, InterventionError, ["deterministic", "'level', 'n', 'table', 'x', 'y'"]),
        ({"scale": 1}, InterventionError, ["constant 2.0", "variable of the Dataset"]),
        ({"x": "hot"}, InterventionError, ["is a str", "DataArray"]),
        ({"x": np.zeros((3, 2))}, InterventionError, ["is a ndarray", "labels"]),
        ({"x": np.nan}, InterventionError, ["sets nothing"]),
        ({"x": xr.DataArray("a")}, DtypeError, ["<U1"]),
        ({"x": along([1.0], lat=[15.0])}, LabelError, ["[15.0]", "[10.0, 20.0", "do not meet"]),
        ({"x": along([1.0, 1.0], lat=[10.0, 10.0])}, LabelError, ["duplicate", "10.0"]),
        ({"x": xr.DataArray([1.0, 2.0], dims="lat")}, LabelError, ["no labels on 'lat'"]),
        ({"x": along([], ppm=[])}, DimensionError, ["empty along 'ppm'"]),
        ({"x": along([1.0], mean=[1])}, DimensionError, ["'mean'", "another name"]),
        ({"level": along([1.0], time=[2000])}, DimensionError, ["'time'", "('lat',)"]),
        ({"x": xr.DataArray(1.0, attrs={"units": "degC"})}, UnitsError, ["'degC'", "'K'"]),
        ({"y": xr.DataArray(1.0, attrs={"units": "cm"})}, UnitsError, ["'cm'", "'mm'"]),
        ({"x": lambda x: x.isel(lat=0)}, DimensionError, ["must keep the dims"]),
        ({}, InterventionError, ["do={}", "280.0"]),
        ({"a": {"x": 1}, "n": 2}, InterventionError, ["['a']", "['n']"]),
        (
            {"n": along([2**24 + 1, 0], time=[2000, 2001])},
            DtypeError,
            ["16777216", "every cell"],
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(bound, do, error, parts):
    ds, fit, _ = bound
    for call in (ds.aimz.intervene, lambda fit, do: ds.aimz.predict(fit, do=do)):
        with pytest.raises(error) as caught:
            call(fit, do)
        for part in parts:
            assert part in str(caught.value)


def test_a_baseline_is_one_scenario(bound):
    ds, fit, _ = bound
    with pytest.raises(DimensionError, match="one scenario"):
        ds.aimz.intervene(fit, {"x": 1}, baseline={"x": along([1.0, 2.0], ppm=[1, 2])})


def test_labels_in_another_order_and_labels_elsewhere(bound):
    _, fit, ds = bound
    value = along([1.0, 5.0, 9.0], lat=[20.0, 10.0, 30.0])
    shown = ds.aimz.predict(fit, do={"x": value}, sites="mean")["mean"]
    wanted = 2 * (np.array([5.0, 1.0]) + np.array([1.0, 2.0, 3.0])[:, None])
    np.testing.assert_allclose(shown[0, 0], wanted)


def test_integers_stay_integers_where_some_are_left_alone(bound):
    _, fit, ds = bound
    for value in (along([4], time=[2001]), along([np.nan, 4.0], time=[2000, 2001])):
        shown = ds.aimz.predict(fit, do={"n": value}, sites="mean")["mean"]
        np.testing.assert_allclose(shown[0, 0, :, 0], [2, 8, 6])


def test_a_callable_sees_the_coordinates(bound):
    _, fit, ds = bound
    ds = ds.assign_coords(north=("lat", [False, True]))
    effect = ds.aimz.intervene(fit, {"x": lambda x: x.where(~x.north, 3.0)})["mean"]
    np.testing.assert_allclose(effect[0, 0, 0], [0, 6])
