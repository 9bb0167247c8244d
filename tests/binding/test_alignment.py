"""A Dataset that meets a fit's names, dims, labels and chunks."""

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import xr_aimz
from xr_aimz.binding.alignment import align, common_chunks
from xr_aimz.binding.bound import bind
from xr_aimz.errors import DimensionError, LabelError


def model(x, weights, y=None):
    numpyro.sample("y", dist.Normal(x + weights.sum(), 1), obs=y)


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "x": ("lat", rng.normal(size=3)),
            "y": (("time", "lat"), rng.normal(size=(4, 3))),
            "weights": ("band", [1.0, 2.0]),
            "other": (("time", "member"), rng.normal(size=(4, 2))),
        },
        {
            "time": pd.date_range("2000-01-01", periods=4),
            "lat": [10.0, 20.0, 30.0],
            "band": ["red", "blue"],
            "season": ("time", list("wwss")),
            "run": 7,
        },
    )


@pytest.fixture
def binding(ds):
    return bind(ds, model).binding


def test_arrays_have_observation_dims_first_and_in_order(ds, binding):
    turned = ds.transpose("member", "lat", "band", "time")
    inputs = align(binding, turned, outcomes=True)
    assert inputs.dims == {"x": ("lat",), "weights": ("band",), "y": ("time", "lat")}
    np.testing.assert_array_equal(inputs.arrays["y"], ds.y)


def test_outcomes_are_left_out_of_a_prediction(ds, binding):
    inputs = align(binding, ds.drop_vars("y"), outcomes=False)
    assert set(inputs.arrays) == {"x", "weights"}
    # A dim that only a coordinate has is a dim all the same.
    assert inputs.sizes["time"] == 4


def test_coords_are_kept_and_data_are_not(ds, binding):
    inputs = align(binding, ds, outcomes=False)
    assert not inputs.coords.data_vars
    assert set(inputs.coords.coords) == {"time", "lat", "band", "season", "run"}
    assert inputs.labels["lat"].tolist() == [10.0, 20.0, 30.0]


def test_a_scalar_coordinate_is_a_dim_of_size_one(ds, binding):
    one = ds.sel(lat=20.0).isel(time=2)
    inputs = align(binding, one, outcomes=True)
    assert set(inputs.scalars) == {"time", "lat"}
    assert inputs.dims["y"] == ("time", "lat")
    assert inputs.labels["lat"].tolist() == [20.0]
    assert inputs.labels["time"][0] == ds.time.values[2]


def test_what_was_a_scalar_is_a_scalar_in_the_result(ds):
    fit = ds.aimz.from_posterior(model, {})
    whole = ds.aimz.predict(fit).y.compute()
    part = ds.sel(lat=20.0).aimz.predict(fit).y.compute()
    assert part.dims == ("chain", "draw", "time")
    xr.testing.assert_allclose(part, whole.sel(lat=20.0), rtol=1e-5)


def test_dims_that_are_not_observed_take_the_order_of_the_fit(ds):
    def weighted(x, weights, y=None):
        numpyro.deterministic("first", weights[0] + 0 * x)
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    fit = ds.aimz.from_posterior(weighted, {})
    turned = ds.isel(band=[1, 0])
    assert turned.weights.values.tolist() == [2.0, 1.0]
    assert (turned.aimz.predict(fit, sites="first")["first"].compute() == 1.0).all()


@pytest.mark.parametrize(
    ("bands", "at_fault"),
    [
        (["red"], r"lacks 1 of the 2 labels of 'band'.*\['blue'\].*\.sel\(band="),
        (["red", "green"], r"1 labels of 'band'.*never saw, \['green'\].*new_labels='sample'"),
        (["red", "blue", "red"], r"labels of 'band' more than once, \['red'\]"),
    ],
)
def test_dims_that_are_not_observed_have_the_labels_of_the_fit(ds, binding, bands, at_fault):
    other = ds.isel(band=[0, 1, 0][: len(bands)]).assign_coords(band=bands)
    with pytest.raises(LabelError, match=at_fault):
        align(binding, other, outcomes=False)


def test_chunks_are_those_of_the_arrays_taken(ds, binding):
    assert align(binding, ds, outcomes=False).chunks == {}
    chunked = ds.chunk(lat=2)
    assert align(binding, chunked, outcomes=False).chunks["lat"] == (2, 1)


def test_chunks_of_what_is_left_out_count_where_no_array_is_chunked(ds, binding):
    # The outcome is large and chunked, the inputs are small and are not.
    chunked = ds.assign(y=ds.y.chunk(time=3, lat=1))
    inputs = align(binding, chunked.assign(x=ds.x.chunk(lat=2)), outcomes=False)
    assert inputs.chunks == {"time": (3, 1), "lat": (2, 1)}


def test_arrays_stay_lazy(ds, binding):
    chunked = ds.isel(lat=[2, 0, 1]).chunk()
    inputs = align(binding, chunked, outcomes=True)
    assert all(isinstance(a.data, da.Array) for a in inputs.arrays.values())


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(4,)], (4,)),
        ([(2, 2), (4,)], (2, 2)),
        ([(3, 1), (2, 2)], (2, 1, 1)),
        ([(1, 3), (2, 1, 1)], (1, 1, 1, 1)),
    ],
)
def test_common_chunks_cut_wherever_one_does(found, expected):
    assert common_chunks(found) == expected


def test_a_dim_without_a_coordinate_is_found(ds, binding):
    inputs = align(binding, ds.drop_vars("lat"), outcomes=True)
    assert "lat" not in inputs.labels
    assert inputs.sizes["lat"] == 3


def test_a_dim_that_is_not_there_is_refused(ds, binding):
    with pytest.raises(DimensionError, match=r"'lat'.*expand_dims\('lat'\)"):
        align(binding, ds.isel(lat=0, drop=True), outcomes=False)


def test_a_dim_that_an_array_lost_broadcasts(ds):
    fit = ds.aimz.from_posterior(model, {})
    flat = ds.assign(x=xr.Variable((), 2.5))
    same = ds.assign(x=xr.full_like(ds.x, 2.5))
    xr.testing.assert_allclose(
        flat.aimz.predict(fit).y.compute(), same.aimz.predict(fit).y.compute(), rtol=1e-6
    )


def test_a_multiindex_is_a_set_of_labels(ds):
    whole = ds.aimz.predict(ds.aimz.from_posterior(model, {})).y.compute()
    points = ds.drop_vars("other").stack(point=("time", "lat"))
    fit = points.aimz.from_posterior(model, {})
    assert fit.binding.dims == ("point",)
    got = points.aimz.predict(fit).y.compute()
    assert got.dims == ("chain", "draw", "point")
    # The sum of the levels' words addresses a cell, so stacking moves no draw.
    unstacked = got.unstack("point").transpose(*whole.dims)
    np.testing.assert_allclose(unstacked.values, whole.values, rtol=1e-5)


# Labels of a dimension that no array of the model has.


def vectors(x, y=None):
    mean = numpyro.sample(
        "mean", dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["species"]}
    )
    numpyro.sample("y", dist.Normal(mean + x[..., None], 1).to_event(1), obs=y)


SPECIES = np.array(["ash", "fir", "oak"])


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(0)
    ds = xr.Dataset(
        {"x": ("time", rng.normal(size=4)), "y": (("time", "species"), rng.normal(size=(4, 3)))},
        {"time": range(4), "species": SPECIES, "height": ("species", [20.0, 50.0, 40.0])},
    )
    return ds, ds.aimz.from_posterior(vectors, {"mean": rng.normal(size=(2, 3, 3))})


@given(st.lists(st.sampled_from(range(3)), min_size=1, max_size=4), st.booleans())
def test_a_known_part_of_an_event_is_that_part_of_the_whole(trees, places, chunked):
    ds, fit = trees
    some = ds.isel(species=places)
    some = some.chunk(time=2) if chunked else some
    found = some.aimz.predict(fit, sites=["y", "mean"])
    expected = ds.aimz.predict(fit, sites=["y", "mean"]).sel(species=SPECIES[places])
    xr.testing.assert_allclose(found.drop_attrs(), expected.drop_attrs(), rtol=1e-5)
    assert found.height.values.tolist() == some.height.values.tolist()


def test_one_of_them_may_be_a_scalar(trees):
    ds, fit = trees
    found = ds.isel(species=1).aimz.predict(fit)
    assert found.y.dims == ("chain", "draw", "time")
    assert found.species.item() == "fir"
    assert found.height.item() == 50.0
    expected = ds.aimz.predict(fit).isel(species=1)
    xr.testing.assert_allclose(found.drop_attrs(), expected.drop_attrs(), rtol=1e-5)


def test_a_density_has_all_of_them(trees):
    ds, fit = trees
    with pytest.raises(LabelError, match=r"lacks 1 of the 3 labels of 'species'.*\['fir'\]"):
        ds.isel(species=[0, 2]).aimz.log_likelihood(fit)
    with pytest.raises(LabelError, match=r"1 labels of 'species'.*\['elm'\].*new_labels='sample'"):
        ds.isel(species=[0]).assign_coords(species=["elm"]).aimz.predict(fit)


def test_an_index_may_count_among_either_labels():
    """Codes of a subset made anew would be another firm's: not guessed at."""

    def model(code, y=None):
        with xr_aimz.plate("firm"):
            level = numpyro.sample("level", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(level[code], 1e-3), obs=y)

    ds = xr.Dataset(
        {"code": ("row", [0, 1, 2, 0]), "y": ("row", np.zeros(4))}, {"firm": ["GE", "HP", "IBM"]}
    )
    fit = ds.aimz.from_posterior(model, {"level": np.array([[[1.0, 2.0, 3.0]]])})
    rows = ds.isel(row=[0, 2])
    np.testing.assert_allclose(rows.aimz.predict(fit).y[0, 0], [1, 3], atol=0.02)
    part = rows.isel(firm=[0, 2])
    anew = part.assign(code=("row", [0, 1]))
    for other in (part, anew):
        with pytest.raises(LabelError, match=r"lacks 1 of the 3.*\['HP'\].*index, which counts"):
            other.aimz.predict(fit)
