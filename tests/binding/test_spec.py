"""Arguments are variables: which is which, and what the model is handed."""

import inspect

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from xarray.core import indexing

import xr_aimz
from xr_aimz.binding.bound import bind
from xr_aimz.binding.layout import arrange, block_of


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "tas": (("time", "lat", "lon"), rng.normal(size=(4, 3, 2)), {"units": "K"}),
            "co2": ("time", rng.normal(size=4)),
            "height": (("lat", "lon"), rng.normal(size=(3, 2))),
            "bands": (("lat", "band"), rng.normal(size=(3, 5))),
            "kernel": ("band", rng.normal(size=5)),
            "count": ("time", np.arange(4)),
            "land": (("lat", "lon"), np.ones((3, 2), bool)),
            "level": ((), 3.0),
        },
        {
            "time": np.arange(4),
            "lat": [1.0, 2.0, 3.0],
            "lon": [5.0, 6.0],
            "sunny": ("lat", [1] * 3),
        },
    )


def handed(ds, *names, variables=None, **options):
    """What a model of these arguments and an outcome ``tas`` is handed, and its binding."""
    passed = []

    def model(**arguments):
        passed.append(arguments)
        numpyro.sample("tas", dist.Normal(0, 1), obs=arguments["tas"])

    found = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
    found.append(inspect.Parameter("tas", inspect.Parameter.KEYWORD_ONLY, default=None))
    model.__signature__ = inspect.Signature(found)
    return bind(ds, model, variables, **options).binding, passed[0]


def shapes(passed):
    return {name: np.shape(value) for name, value in passed.items()}


def test_arguments_are_variables_of_their_own_name(ds):
    binding, _ = handed(ds, "co2", "height")
    assert {a.name: [s.name for s in a.sources] for a in binding.arguments} == {
        "co2": ["co2"],
        "height": ["height"],
        "tas": ["tas"],
    }
    assert [a.name for a in binding.outcomes] == ["tas"]
    assert [a.name for a in binding.inputs] == ["co2", "height"]
    assert binding.dims == ("time", "lat", "lon")


def test_arguments_are_coordinates_too(ds):
    binding, _ = handed(ds, "sunny", "lat")
    assert binding.argument("sunny").sources[0].dims == ("lat",)
    assert binding.argument("lat").sources[0].name == "lat"


def test_arguments_are_bound_by_other_names(ds):
    binding, _ = handed(ds, "x", variables={"x": "co2"})
    assert binding.argument("x").sources[0].name == "co2"


def test_names_that_xarray_derives(ds):
    dated = ds.assign_coords(time=pd.date_range("2000-01-01", periods=4))
    binding, _ = handed(dated, "x", variables={"x": "time.dayofyear"})
    assert binding.argument("x").sources[0].dims == ("time",)


def test_grid_shapes_broadcast_against_the_outcome(ds):
    names = ("co2", "height", "bands", "kernel", "level", "lat")
    _, passed = handed(ds, *names)
    assert shapes(passed) == {
        "co2": (4, 1, 1),
        "height": (1, 3, 2),
        "bands": (1, 3, 1, 5),
        # No observation dim: its own shape.
        "kernel": (5,),
        "level": (),
        "lat": (1, 3, 1),
        "tas": (4, 3, 2),
    }


def test_table_shapes_have_one_leading_axis(ds):
    names = ("co2", "height", "bands", "kernel", "level")
    _, passed = handed(ds, *names, layout="table")
    assert shapes(passed) == {
        "co2": (24,),
        "height": (24,),
        "bands": (24, 5),
        "kernel": (5,),
        "level": (),
        "tas": (24,),
    }


@pytest.mark.parametrize(("layout", "shape"), [("grid", (4, 3, 2, 2)), ("table", (24, 2))])
def test_a_list_of_names_is_stacked_last(ds, layout, shape):
    variables = {"x": ["co2", "height"]}
    binding, passed = handed(ds, "x", variables=variables, layout=layout)
    assert passed["x"].shape == shape
    assert binding.argument("x").stacked
    assert [s.name for s in binding.argument("x").sources] == ["co2", "height"]


def regress(x, tas=None):
    prior = dist.Normal(jnp.zeros(x.shape[-1]), 1).to_event(1)
    slope = numpyro.sample("slope", prior, infer={"event_dims": ["feature"]})
    numpyro.sample("tas", dist.Normal(x @ slope, 1), obs=tas)


def test_features_are_labelled_with_the_names(ds):
    draws = np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)
    variables = {"x": ["height", "co2"]}
    fit = ds.aimz.from_posterior(regress, {"slope": draws}, variables)
    assert fit.posterior.slope.dims == ("chain", "draw", "feature")
    assert fit.posterior.feature.values.tolist() == ["height", "co2"]
    assert ds.aimz.predict(fit).tas.dims == ("chain", "draw", "time", "lat", "lon")


def test_a_table_of_values_is_that_of_the_grid(ds):
    def model(co2, bands, tas=None):
        numpyro.sample("tas", dist.Normal(jnp.mean(co2), 1), obs=tas)

    bound = bind(ds, model, layout="table")
    arrays = {n: jnp.asarray(a.values) for n, a in bound.inputs.arrays.items()}
    block = block_of(bound.binding, bound.inputs.sizes)
    passed = arrange(bound.binding, arrays, bound.inputs.dims, block)
    co2 = ds.co2.broadcast_like(ds.tas).transpose("time", "lat", "lon")
    np.testing.assert_allclose(passed["co2"], co2.values.ravel(), rtol=1e-6)
    np.testing.assert_allclose(passed["tas"], ds.tas.values.ravel(), rtol=1e-6)
    bands = np.broadcast_to(ds.bands.values[None, :, None, :], (4, 3, 2, 5)).reshape(24, 5)
    np.testing.assert_allclose(passed["bands"], bands, rtol=1e-6)


def test_a_data_array_is_an_argument(ds):
    x = ds.co2 * 2
    binding, passed = handed(ds, "x", variables={"x": x})
    assert passed["x"].shape == (4, 1, 1)
    assert binding.argument("x").sources[0].data.equals(x)
    assert binding.without_data().argument("x").sources[0].data is None


def test_a_data_array_is_aligned_by_label(ds):
    def model(x, tas=None):
        numpyro.deterministic("copy", x)
        numpyro.sample("tas", dist.Normal(x, 1), obs=tas)

    x = xr.DataArray(np.arange(6.0), dims="time", coords={"time": [5, 3, 1, 0, 2, 4]})
    fit = ds.aimz.from_posterior(model, {}, {"x": x})
    got = ds.aimz.predict(fit, sites="copy").compute()["copy"]
    np.testing.assert_array_equal(got.isel(chain=0, draw=0), [3, 2, 4, 1])


@pytest.mark.parametrize("value", [3, 2.5, True, None, (1, 2), np.arange(7)], ids=repr)
def test_constants_reach_the_model_as_they_are(ds, value):
    binding, passed = handed(ds, "k", variables={"k": value})
    assert passed["k"] is value
    assert binding.constants["k"] is value


def test_an_integer_constant_stays_static(ds):
    def model(co2, degree, tas=None):
        # A traced value would be no length.
        w = [numpyro.sample(f"w{i}", dist.Normal(0, 1)) for i in range(degree)]
        mean = sum(w[i] * co2**i for i in range(degree))
        numpyro.sample("tas", dist.Normal(mean, 1), obs=tas)

    draws = {f"w{i}": np.ones((1, 2), np.float32) for i in range(3)}
    fit = ds.aimz.from_posterior(model, draws, {"degree": 3})
    assert set(fit.posterior) == {"w0", "w1", "w2"}
    assert ds.aimz.predict(fit).tas.compute().notnull().all()


def test_integers_and_booleans_stay_what_they_are(ds):
    dtypes = {}

    def model(count, land, height, tas=None):
        dtypes.update(count=count.dtype, land=land.dtype, height=height.dtype)
        numpyro.sample("tas", dist.Normal(count * land * height, 1), obs=tas)

    bind(ds, model)
    assert jnp.issubdtype(dtypes["count"], jnp.integer)
    assert dtypes["land"] == np.dtype(bool)
    assert dtypes["height"] == jnp.result_type(float)


def test_integers_and_booleans_index(ds):
    def model(count, land, tas=None):
        a = numpyro.sample("a", dist.Normal(jnp.zeros(4), 1).to_event(1))
        numpyro.sample("tas", dist.Normal(jnp.where(land, a[count], 0.0), 1), obs=tas)

    draws = np.arange(8, dtype=np.float32).reshape(1, 2, 4)
    fit = ds.aimz.from_posterior(model, {"a": draws})
    assert ds.aimz.predict(fit).tas.compute().shape == (1, 2, 4, 3, 2)


def counts(x, exposure=None, y=None):
    rate = numpyro.sample("rate", dist.Gamma(2, 1))
    mean = rate * x if exposure is None else rate * x * exposure
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def test_an_optional_input_is_an_input():
    n = 6
    ds = xr.Dataset(
        {
            "x": ("time", np.ones(n)),
            "exposure": ("time", np.full(n, 1e4)),
            "y": ("time", np.ones(n)),
        },
        {"time": np.arange(n)},
    )
    fit = ds.aimz.from_posterior(counts, {"rate": np.ones((1, 4), np.float32)})
    assert [a.name for a in fit.binding.outcomes] == ["y"]
    assert [a.name for a in fit.binding.inputs] == ["x", "exposure"]
    # Left out it would be predicted as 1.
    assert ds.drop_vars("y").aimz.predict(fit).y.compute().min() > 9000

    bare = ds.drop_vars("exposure")
    without = bare.aimz.from_posterior(counts, {"rate": np.ones((1, 4), np.float32)})
    assert [a.name for a in without.binding.arguments] == ["x", "y"]
    assert bare.aimz.predict(without).y.compute().max() < 100


def logged(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    observed = None if y is None else jnp.log(y)
    numpyro.sample("log_y", dist.Normal(slope * x, 1), obs=observed)


def test_an_outcome_in_another_scale_bears_no_units():
    ds = xr.Dataset(
        {"x": ("time", np.ones(3)), "y": ("time", [1.0, 2.0, 3.0], {"units": "mm"})},
        {"time": np.arange(3)},
    )
    fit = ds.aimz.from_posterior(logged, {"slope": np.ones((1, 2), np.float32)})
    assert [a.name for a in fit.binding.outcomes] == ["y"]
    pred = ds.drop_vars("y").aimz.predict(fit)
    assert set(pred.data_vars) == {"log_y"}
    assert "units" not in pred.log_y.attrs


def test_an_outcome_as_it_is_bears_its_name_and_units(ds):
    def model(x, obs=None):
        numpyro.sample("site/one", dist.Normal(x, 1), obs=obs)

    fit = ds.aimz.from_posterior(model, {}, {"x": "co2", "obs": "tas"})
    pred = ds.aimz.predict(fit)
    assert list(pred.data_vars) == ["tas"]
    assert pred.tas.attrs == {"units": "K"}
    assert list(ds.aimz.predict(fit, sites="site/one").data_vars) == ["tas"]


def species(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    mean = slope * x[..., None] * jnp.ones(3)
    numpyro.sample("y", dist.MultivariateNormal(mean, jnp.eye(3)), obs=y)


def plain(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@pytest.fixture
def many():
    return xr.Dataset(
        {"x": ("time", np.ones(5)), "y": (("time", "species"), np.zeros((5, 3)))},
        {"time": np.arange(5), "species": ["ant", "bee", "cow"]},
    )


def test_a_multivariate_outcome_finds_its_event_dims(many):
    fit = many.aimz.from_posterior(species, {"slope": np.ones((1, 2), np.float32)})
    assert fit.binding.dims == ("time",)
    pred = many.drop_vars("y").aimz.predict(fit)
    assert pred.y.dims == ("chain", "draw", "time", "species")
    assert many.aimz.log_likelihood(fit).y.dims == ("chain", "draw", "time")


def test_a_univariate_outcome_has_only_observation_dims(many):
    fit = many.aimz.from_posterior(plain, {"slope": np.ones((1, 2), np.float32)})
    assert fit.binding.dims == ("time", "species")


def test_labels_of_event_dims_are_predicted_too(many):
    fit = many.aimz.from_posterior(species, {"slope": np.ones((1, 2), np.float32)})
    pred = many.drop_vars("y").aimz.predict(fit)
    assert pred.species.values.tolist() == ["ant", "bee", "cow"]


def test_observation_dims_are_as_asked(many):
    bound = bind(many, species, dim="time")
    assert bound.binding.dims == ("time",)
    turned = bind(many, plain, dim=("species", "time"))
    assert turned.binding.dims == ("species", "time")
    assert turned.inputs.dims["y"] == ("species", "time")


def test_a_model_runs_unchanged_on_a_table_and_on_a_grid(ds):
    def model(x, tas=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        numpyro.deterministic("mean", slope * x + jnp.zeros(jnp.shape(x)))
        numpyro.sample("tas", dist.Normal(slope * x, 1), obs=tas)

    draws = {"slope": np.array([[1.0, -2.0]], np.float32)}
    both = [
        ds.aimz.predict(ds.aimz.from_posterior(model, draws, {"x": "height"}, layout=layout))
        for layout in ("grid", "table")
    ]
    grid, table = (pred.tas.compute() for pred in both)
    assert grid.dims == table.dims == ("chain", "draw", "time", "lat", "lon")
    xr.testing.assert_allclose(grid, table, rtol=1e-5)


def test_names_of_arguments_and_of_variables_may_cross(ds):
    # A variable may have the name of another argument: an argument is what it is bound to.
    def model(co2, height, tas=None):
        numpyro.deterministic("swapped", co2 * 1.0)
        numpyro.sample("tas", dist.Normal(height, 1), obs=tas)

    fit = ds.aimz.from_posterior(model, {}, {"co2": "height", "height": "co2"})
    got = ds.aimz.predict(fit, sites="swapped").swapped.isel(chain=0, draw=0).compute()
    assert got.dims == ("lat", "lon")
    np.testing.assert_allclose(got, ds.height, rtol=1e-6)


def test_one_variable_for_two_arguments(ds):
    def model(a, b, tas=None):
        numpyro.deterministic("gone", a - b)
        numpyro.sample("tas", dist.Normal(a, 1), obs=tas)

    fit = ds.aimz.from_posterior(model, {}, {"a": "height", "b": "height"})
    assert not ds.aimz.predict(fit, sites="gone").gone.compute().any()


def test_arguments_that_are_left_out_keep_their_defaults(ds):
    def model(co2, power=2.0, tas=None):
        numpyro.deterministic("raised", co2**power)
        numpyro.sample("tas", dist.Normal(co2, 1), obs=tas)

    fit = ds.aimz.from_posterior(model, {})
    got = ds.aimz.predict(fit, sites="raised").raised.isel(chain=0, draw=0).compute()
    assert got.dims == ("time",)
    np.testing.assert_allclose(got, ds.co2**2, rtol=1e-5)


def test_binding_reads_no_data(ds):
    class Tripwire(xr.backends.BackendArray):
        shape, dtype = (4, 3, 2), np.dtype("float64")

        def __getitem__(self, key):
            raise AssertionError("read")

    lazy = xr.Variable(("time", "lat", "lon"), indexing.LazilyIndexedArray(Tripwire()))

    def model(tas=None):
        numpyro.sample("tas", dist.Normal(0, 1), obs=tas)

    assert bind(ds.assign(tas=lazy), model).binding.dims == ("time", "lat", "lon")


def test_the_public_plate_is_sized_by_the_dataset(ds):
    def model(tas=None):
        with xr_aimz.plate("lat"), xr_aimz.plate("band"):
            pass
        with xr_aimz.plate("lon"):
            a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("tas", dist.Normal(a, 1), obs=tas)

    assert bind(ds, model).sites["a"].dims == ("lon",)
