"""Which dimension each axis of a site is."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

import xr_aimz
from xr_aimz.binding.bound import bind
from xr_aimz.binding.layout import TABLE, shape_in_dataset, shape_in_model


@pytest.fixture
def ds():
    return xr.Dataset(
        {"x": ("time", np.zeros(4)), "y": (("time", "lat", "lon"), np.zeros((4, 3, 2)))},
        {"time": np.arange(4), "lat": [1.0, 2.0, 3.0], "lon": [5.0, 6.0], "band": list("abc")},
    )


def dims_of(ds, model, **options):
    bound = bind(ds, model, **options)
    return {name: site.dataset_dims for name, site in bound.sites.items()}


def observe(y, mean=0.0):
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def test_an_outcome_without_plates_is_matched_by_position(ds):
    assert dims_of(ds, lambda x, y=None: observe(y)) == {"y": ("time", "lat", "lon")}


def test_local_latents_by_the_name_of_a_plate(ds):
    def model(x, y=None):
        with xr_aimz.plate("lat"):
            numpyro.sample("a", dist.Normal(0, 1))
        with xr_aimz.plate("time"), xr_aimz.plate("lon"):
            numpyro.sample("b", dist.Normal(0, 1))
        observe(y)

    found = dims_of(ds, model)
    assert found["a"] == ("lat",)
    assert found["b"] == ("time", "lon")


def test_local_latents_by_the_size_of_the_data(ds):
    def model(x, y=None):
        # Names of the model's own, sizes and places of the outcome's.
        with numpyro.plate("row", y.shape[-2] if y is not None else 3, dim=-2):
            a = numpyro.sample("a", dist.Normal(0, 1))
        observe(y, a)

    assert dims_of(ds, model)["a"] == ("lat",)


def test_plates_around_the_outcome_give_dims_by_position(ds):
    def model(x, y=None):
        rows, columns = numpyro.plate("row", 3, dim=-2), numpyro.plate("column", 2, dim=-1)
        with rows:
            a = numpyro.sample("a", dist.Normal(0, 1))
        with columns:
            b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("step", 4, dim=-3), rows, columns:
            observe(y, a + b)

    found = dims_of(ds, model)
    assert found == {"a": ("lat",), "b": ("lon",), "y": ("time", "lat", "lon")}


def test_sizes_written_into_the_model_fall_back_to_position(ds):
    def model(x, y=None):
        with numpyro.plate("lat", 3, dim=-2), numpyro.plate("lon", 2, dim=-1):
            a = numpyro.sample("a", dist.Normal(0, 1))
        with numpyro.plate("time", 4, dim=-3):
            b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("t", 4, dim=-3), numpyro.plate("lat2", 3, dim=-2):
            observe(y, a + b)

    found = dims_of(ds, model)
    assert found["a"] == ("lat", "lon")
    assert found["b"] == ("time",)
    assert found["y"] == ("time", "lat", "lon")


def test_a_plate_of_another_size_is_a_dimension_of_its_own(ds):
    def model(x, y=None):
        with numpyro.plate("lat", 7):
            numpyro.sample("a", dist.Normal(0, 1))
        with numpyro.plate("group", 4):
            numpyro.sample("b", dist.Normal(0, 1))
        observe(y)

    fit = ds.aimz.from_posterior(model, {"a": np.zeros((1, 2, 7)), "b": np.zeros((1, 2, 4))})
    assert fit.posterior.b.dims == ("chain", "draw", "group")
    # Seven entries are no latitudes of three.
    assert fit.posterior.a.shape == (1, 2, 7)
    assert "lat" not in fit.posterior.a.coords


def test_a_plate_of_a_dim_that_only_a_coordinate_has(ds):
    def model(x, y=None):
        with xr_aimz.plate("band"):
            numpyro.sample("a", dist.Normal(0, 1))
        observe(y)

    fit = ds.aimz.from_posterior(model, {"a": np.zeros((1, 2, 3))})
    assert fit.posterior.a.dims == ("chain", "draw", "band")
    assert fit.posterior.band.values.tolist() == ["a", "b", "c"]


def test_event_dims_are_named_as_the_model_says(ds):
    def model(x, y=None):
        prior = dist.Normal(jnp.zeros((3, 2)), 1).to_event(2)
        numpyro.sample("a", prior, infer={"event_dims": ["band", "side"]})
        with xr_aimz.plate("lat"):
            one = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
            numpyro.sample("b", one, infer={"event_dims": ["side"]})
        numpyro.sample("c", dist.Dirichlet(jnp.ones(4)))
        observe(y)

    found = dims_of(ds, model)
    assert found["a"] == ("band", "side")
    assert found["b"] == ("lat", "side")
    assert found["c"] == ("c_dim_0",)


def test_a_deterministic_is_told_by_how_it_moves(ds):
    def model(x, y=None):
        with xr_aimz.plate("lat"):
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.deterministic("trend", a * x)
        numpyro.deterministic("total", jnp.sum(a))
        numpyro.deterministic("turned", jnp.swapaxes(a * x, 0, 1))
        observe(y, a * x)

    found = dims_of(ds, model)
    assert set(found["trend"]) == {"time", "lat"}
    assert found["total"] == ()
    assert set(found["turned"]) == {"time", "lat"}


def test_two_axes_of_one_site_have_two_names(ds):
    def model(x, y=None):
        n = x.shape[0]
        numpyro.deterministic("pairs", jnp.zeros((n, n)))
        observe(y)

    (first, second) = dims_of(ds, model, dim=("time", "lat", "lon"))["pairs"]
    assert first == "time"
    assert second != first


def test_equal_lengths_are_told_apart():
    square = xr.Dataset(
        {"y": (("time", "lat", "lon"), np.zeros((3, 3, 3)))},
        {d: np.arange(3) for d in ("time", "lat", "lon")},
    )

    def model(y=None):
        for dim in ("lon", "time", "lat"):
            with xr_aimz.plate(dim):
                numpyro.sample(f"of_{dim}", dist.Normal(0, 1))
        numpyro.sample("own", dist.Normal(jnp.zeros(3), 1).to_event(1))
        observe(y)

    found = dims_of(square, model)
    assert {n: found[n] for n in found if n != "y"} == {
        "of_lon": ("lon",),
        "of_time": ("time",),
        "of_lat": ("lat",),
        "own": ("own_dim_0",),
    }


def test_a_table_is_one_axis_that_unfolds(ds):
    def model(x, y=None):
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("a", dist.Normal(0, 1))
            observe(y)

    bound = bind(ds, model, layout="table")
    site = bound.sites["a"]
    assert site.dims == (TABLE,)
    assert site.dataset_dims == ("time", "lat", "lon")
    assert shape_in_dataset(site.dims, bound.binding, bound.inputs.sizes, (24,)) == (4, 3, 2)


def test_shapes_go_to_the_dataset_and_back(ds):
    def model(x, y=None):
        with xr_aimz.plate("time"), xr_aimz.plate("lon"):
            numpyro.sample("a", dist.Dirichlet(jnp.ones(5)))
        observe(y)

    bound = bind(ds, model)
    site, sizes = bound.sites["a"], bound.inputs.sizes
    assert site.shape == (4, 1, 2, 5)
    flat = shape_in_dataset(site.dims, bound.binding, sizes, site.shape)
    assert flat == (4, 2, 5)
    assert shape_in_model(site, bound.binding, sizes) == site.shape
    part = {**sizes, "time": 3, "lat": 1, "lon": 1}
    assert shape_in_model(site, bound.binding, part) == (3, 1, 1, 5)


def test_a_block_gets_its_own_part_of_a_local_latent(ds):
    def model(x, y=None):
        with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.deterministic("copy", a + 0 * x)
        observe(y, a)

    draws = np.arange(2 * 6, dtype=np.float32).reshape(1, 2, 3, 2)
    fit = ds.aimz.from_posterior(model, {"a": draws})
    part = ds.chunk(lat=2, lon=1).isel(lat=[2, 0]).aimz.predict(fit, sites="copy").compute()
    assert set(part["copy"].dims) == {"chain", "draw", "time", "lat", "lon"}
    expected = fit.posterior.a.sel(lat=[3.0, 1.0])
    got = part["copy"].isel(time=0).transpose(*expected.dims)
    np.testing.assert_array_equal(got, expected)
