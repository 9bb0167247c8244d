"""Bad input is refused before a task runs, by a message that says what to do about it.

Every refusal names the variable, dimension or site, says what was found, and gives the
remedy; its class says what the caller would do, and is a standard class besides.
"""

import dask.array as da
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoNormal

import xr_aimz
from xr_aimz import errors

DRAWS = {"slope": np.array([[0.5, 1.5], [1.0, 2.0]], np.float32)}
LOCAL = {"level": np.arange(2 * 3 * 2, dtype=np.float32).reshape(2, 3, 2)}


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


def levels(x, y=None):
    with xr_aimz.plate("lat"):
        level = numpyro.sample("level", dist.Normal(0, 10))
    with xr_aimz.plate("time"), xr_aimz.plate("lat"):
        numpyro.sample("y", dist.Normal(level * x, 1), obs=y)


def walk(x, y=None):
    scale = numpyro.sample("slope", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(jnp.cumsum(x), scale).to_event(0), obs=y)


@pytest.fixture
def ds():
    x = np.linspace(-1, 1, 5)
    return xr.Dataset(
        {
            "x": ("time", x, {"units": "K"}),
            "y": ("time", 2 * x, {"units": "mm"}),
        },
        {"time": np.arange(2000, 2005)},
    )


@pytest.fixture
def grid():
    x = np.linspace(-1, 1, 10).reshape(5, 2)
    return xr.Dataset(
        {"x": (("time", "lat"), x), "y": (("time", "lat"), 2 * x)},
        {"time": np.arange(2000, 2005), "lat": [10.0, 20.0]},
    )


@pytest.fixture
def fit(ds):
    return ds.aimz.from_posterior(line, DRAWS)


@pytest.fixture
def local(grid):
    return grid.aimz.from_posterior(levels, LOCAL)


@pytest.fixture
def armed():
    """Makes a variable that fails the test if anything ever computes it."""

    def arm(array):
        def spring(block):
            raise AssertionError("a task ran before the refusal")

        lazy = da.from_array(array.values, chunks=-1).map_blocks(spring, dtype=array.dtype)
        return array.copy(data=lazy)

    return arm


def refusal(call, error, standard, *parts):
    """The message of a refusal of that class, which has all of these parts."""
    assert issubclass(error, standard)
    assert issubclass(error, errors.AimzError)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    for part in parts:
        assert part in message
    return message


def everywhere(ds, model, fit):
    """The calls that bind a model anew, and those that bind a fit to another Dataset."""
    return [
        lambda: ds.aimz.fit(model, progress=False),
        lambda: ds.aimz.from_posterior(model, DRAWS),
        lambda: ds.aimz.describe(model),
        lambda: ds.aimz.predict(fit),
        lambda: ds.aimz.log_likelihood(fit),
        lambda: ds.aimz.describe(fit),
    ]


@pytest.mark.parametrize("error", [getattr(errors, n) for n in errors.__all__ if n != "warn"])
def test_every_class_is_a_standard_one(error):
    standard = (
        IndexError,
        KeyError,
        ValueError,
        TypeError,
        NotImplementedError,
        FileExistsError,
        OSError,
        MemoryError,
        ModuleNotFoundError,
        UserWarning,
    )
    assert issubclass(error, standard) or error is errors.AimzError
    assert error.__doc__


def test_a_missing_variable(ds, fit):
    renamed = ds.rename(x="temperature")
    for call in (
        lambda: renamed.aimz.predict(fit),
        lambda: renamed.aimz.log_likelihood(fit),
        lambda: ds.aimz.fit(line, {"x": "temperature"}),
        lambda: ds.aimz.describe(line, {"x": "temperature"}),
        lambda: ds.aimz.from_posterior(line, DRAWS, {"x": ["y", "temperature"]}),
    ):
        refusal(
            call, errors.MissingVariableError, KeyError, "'x'", "'temperature'", "Rename", "'y'"
        )


def test_an_outcome_that_a_log_likelihood_lacks(ds, fit):
    refusal(
        lambda: ds.drop_vars("y").aimz.log_likelihood(fit),
        errors.MissingVariableError,
        KeyError,
        "'y'",
        "'x'",
    )


@pytest.mark.parametrize("verb", ["fit", "describe", "from_posterior"])
def test_an_argument_bound_to_nothing(ds, verb):
    rest = (DRAWS,) if verb == "from_posterior" else ()
    refusal(
        lambda: getattr(ds.drop_vars("x").aimz, verb)(line, *rest),
        errors.BindingError,
        ValueError,
        "'x'",
        "bound to nothing",
        "'y'",
        "variables={'x':",
    )


def test_an_unknown_name_in_variables(ds):
    refusal(
        lambda: ds.aimz.fit(line, {"temperature": "x"}),
        errors.BindingError,
        ValueError,
        "'temperature'",
        "no such argument",
        "['x', 'y']",
    )


def test_a_stray_in_a_list_of_names(ds):
    refusal(
        lambda: ds.aimz.fit(line, {"x": ["x", 3.0]}),
        errors.BindingError,
        ValueError,
        "'x'",
        "3.0",
        "a list names variables",
    )


def test_a_chunked_core_dim(ds, armed):
    chunked = ds.assign(x=armed(ds.x).chunk(time=2))
    fit = ds.aimz.from_posterior(walk, DRAWS, core_dim="time")
    for call in (
        lambda: chunked.aimz.fit(walk, core_dim="time"),
        lambda: chunked.aimz.predict(fit),
        lambda: chunked.aimz.log_likelihood(fit),
    ):
        message = refusal(call, errors.ChunkError, ValueError, "'x'", "'time'", "3")
        assert "ds.chunk({'time': -1})" in message
    assert chunked.chunk({"time": -1}).aimz.predict(fit).sizes["time"] == 5


def test_a_core_dim_that_is_no_observation_dim(ds):
    refusal(
        lambda: ds.aimz.fit(line, core_dim="lat"),
        errors.DimensionError,
        ValueError,
        "'lat'",
        "('time',)",
    )


def test_a_dim_that_is_nowhere(ds):
    refusal(
        lambda: ds.aimz.fit(line, dim="lat"),
        errors.DimensionError,
        ValueError,
        "'lat'",
        "'time'",
    )


def test_dims_that_the_fit_never_had(ds, fit, armed):
    wider = ds.assign(x=armed(ds.x.expand_dims(member=3)))
    for call in (lambda: wider.aimz.predict(fit), lambda: wider.aimz.log_likelihood(fit)):
        refusal(
            call,
            errors.DimensionError,
            ValueError,
            "'x'",
            "'member'",
            "('time',)",
            "select one label of it",
        )


def test_an_observation_dim_that_is_gone(ds, fit):
    refusal(
        lambda: ds.rename(time="year").aimz.predict(fit),
        errors.DimensionError,
        ValueError,
        "'time'",
        "'year'",
        "rename",
    )


def test_units_of_an_input_that_differ(ds, fit, armed):
    celsius = ds.assign(x=armed(ds.x).assign_attrs(units="degC"))
    refusal(
        lambda: celsius.aimz.predict(fit),
        errors.UnitsError,
        ValueError,
        "'x'",
        "'degC'",
        "'K'",
        "Convert",
    )


def test_units_of_an_outcome_that_differ(ds, fit):
    metres = ds.assign(y=ds.y.assign_attrs(units="m"))
    refusal(
        lambda: metres.aimz.log_likelihood(fit),
        errors.UnitsError,
        ValueError,
        "'y'",
        "'m'",
        "'mm'",
    )
    assert metres.aimz.predict(fit).y.attrs["units"] == "mm"


def test_units_that_one_side_does_not_have(ds, fit):
    bare = ds.assign(x=ds.x.drop_attrs())
    assert set(bare.aimz.predict(fit).data_vars) == {"y"}


def test_duplicate_labels(ds, fit):
    twice = ds.assign_coords(time=[2000, 2001, 2001, 2002, 2003])
    for call in everywhere(twice, line, fit):
        refusal(
            call,
            errors.LabelError,
            ValueError,
            "'time'",
            "2001",
            "ds.drop_duplicates('time')",
        )


def test_an_object_dtype(ds, fit):
    strange = ds.assign(x=("time", np.array([1, "a", None, 2.0, []], dtype=object)))
    for call in everywhere(strange, line, fit):
        refusal(call, errors.DtypeError, TypeError, "'x'", "object", "ds['x'].astype(float)")


@pytest.mark.parametrize("values", [list("abcde"), np.array(list("abcde"), dtype="S1")])
def test_strings(ds, fit, values):
    strange = ds.assign(x=("time", values))
    for call in everywhere(strange, line, fit):
        refusal(call, errors.DtypeError, TypeError, "'x'", "ds['x'].astype(float)", "codes")


def test_complex_numbers(ds, fit):
    for call in everywhere(ds.assign(x=ds.x.astype(complex)), line, fit):
        refusal(call, errors.DtypeError, TypeError, "'x'", "complex128", "floats, ints and bools")


def dates(kind):
    if kind == "cftime":
        return xr.date_range("2000-01-01", periods=5, calendar="360_day", use_cftime=True)
    start = pd.date_range("2000-01-01", periods=5)
    return start if kind == "datetime64" else start - start[0]


@pytest.mark.parametrize("kind", ["datetime64", "timedelta64", "cftime"])
def test_dates(ds, kind):
    dated = ds.assign_coords(time=dates(kind))
    for call in (
        lambda: dated.aimz.fit(line, {"x": "time"}),
        lambda: dated.aimz.from_posterior(line, DRAWS, {"x": "time"}),
        lambda: dated.aimz.describe(line, {"x": "time"}),
    ):
        message = refusal(call, errors.DtypeError, TypeError, "'time'", "'x'", "variables={'x': ")
        # A length of time has no decimal year.
        remedy = "timedelta64" if kind == "timedelta64" else "ds['time'].dt.decimal_year"
        assert remedy in message
        assert ("decimal_year" in message) is (kind != "timedelta64")


@pytest.mark.parametrize("kind", ["datetime64", "cftime"])
def test_the_remedy_for_dates_is_one(ds, kind):
    dated = ds.assign_coords(time=dates(kind))
    dated = dated.assign_coords(year=dated["time"].dt.decimal_year - 2000)
    fit = dated.aimz.from_posterior(line, DRAWS, {"x": "year"})
    assert dated.aimz.predict(fit).y.dims == ("chain", "draw", "time")


def test_an_empty_dimension(ds, fit):
    for call in everywhere(ds.isel(time=slice(0)), line, fit):
        refusal(call, errors.DimensionError, ValueError, "'time'", "empty")


def test_a_model_that_observes_nothing(ds):
    def silent(x, y=None):
        numpyro.sample("y", dist.Normal(x, 1))

    refusal(
        lambda: ds.aimz.fit(silent),
        errors.ModelError,
        ValueError,
        "silent",
        "obs=y",
    )


def test_an_outcome_that_is_not_bound(ds):
    refusal(
        lambda: ds.drop_vars("y").aimz.fit(line),
        errors.BindingError,
        ValueError,
        "line",
        "'y'",
        "variables={'y': ",
    )


def test_an_outcome_without_the_default_none(ds):
    def stern(x, y):
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    refusal(
        lambda: ds.aimz.fit(stern),
        errors.ModelError,
        ValueError,
        "stern",
        "'y'",
        "y=None",
    )


@pytest.mark.parametrize("verb", ["fit", "describe"])
def test_a_model_that_raises_has_its_own_error(ds, verb):
    def broken(x, y=None):
        numpyro.sample("slope", dist.Normal(0, 1))
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as caught:
        getattr(ds.aimz, verb)(broken)
    assert caught.value.args == ("mine",)
    notes = "\n".join(caught.value.__notes__)
    assert "'slope'" in notes
    assert "'x': (5,)" in notes
    assert "'y': (5,)" in notes


def test_a_plate_of_another_size_says_how_to_size_it(ds):
    def fixed(x, y=None):
        with numpyro.plate("time", 7):
            numpyro.sample("y", dist.Normal(x, 1), obs=y)

    # NumPyro's own error, whatever its class.
    with pytest.raises(Exception, match="broadcast") as caught:
        ds.aimz.fit(fixed)
    assert "xr_aimz.plate" in "\n".join(caught.value.__notes__)


def test_labels_that_the_fit_never_saw(grid, local, armed):
    beyond = grid.assign_coords(lat=[10.0, 30.0]).assign(y=grid.y.copy())
    beyond = beyond.assign(x=armed(beyond.x))
    for call in (lambda: beyond.aimz.predict(local), lambda: beyond.aimz.log_likelihood(local)):
        refusal(call, errors.LabelError, ValueError, "'level'", "'lat'", "30.0", "never saw")


def test_labels_on_one_side_only(grid, local):
    refusal(
        lambda: grid.drop_vars("lat").aimz.predict(local),
        errors.LabelError,
        ValueError,
        "'level'",
        "'lat'",
        "same coordinate",
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svi", {"chains": 2}),
        ("svi", {"warmup": 10}),
        ("nuts", {"steps": 10}),
        ("nuts", {"optimizer": 0.1}),
        (AutoNormal, {"chains": 2}),
        (MCMC(NUTS(line), num_warmup=1, num_samples=1), {"draws": 3}),
    ],
)
def test_an_option_that_the_method_does_not_take(ds, method, options):
    (name,) = options
    message = refusal(
        lambda: ds.aimz.fit(line, method=method, progress=False, **options),
        errors.OptionError,
        TypeError,
        repr(name),
    )
    assert "it takes" in message


@pytest.mark.parametrize("options", [{"draws": 0}, {"chains": 1.5}, {"warmup": -1}])
def test_an_option_of_no_use(ds, options):
    ((name, value),) = options.items()
    refusal(
        lambda: ds.aimz.fit(line, **options), errors.OptionError, TypeError, f"{name}={value!r}"
    )


@pytest.mark.parametrize("method", ["mcmc", None, 3])
def test_an_unknown_method(ds, method):
    refusal(
        lambda: ds.aimz.fit(line, method=method),
        errors.OptionError,
        TypeError,
        repr(method),
        "'nuts'",
        "'svi'",
    )


def test_a_method_made_for_another_model(ds):
    refusal(
        lambda: ds.aimz.fit(line, method=NUTS(levels)),
        errors.OptionError,
        TypeError,
        "levels",
        "line",
        "same",
    )


def test_an_unknown_layout(ds):
    refusal(
        lambda: ds.aimz.fit(line, layout="long"),
        errors.BindingError,
        ValueError,
        "'long'",
        "'grid'",
        "'table'",
    )


@pytest.mark.parametrize("sites", ["tas", ["y", "tas"], []])
def test_unknown_sites(ds, fit, sites):
    parts = ["'slope'", "'y'"] + (["'tas'"] if sites else [])
    refusal(
        lambda: ds.aimz.predict(fit, sites=sites), errors.MissingVariableError, KeyError, *parts
    )


@pytest.mark.parametrize("draws", [0, 3, 1.0, True])
def test_draws_that_are_not_there(ds, fit, draws):
    for verb in ("predict", "log_likelihood"):
        refusal(
            lambda verb=verb: getattr(ds.aimz, verb)(fit, draws=draws),
            errors.OptionError,
            TypeError,
            f"draws={draws!r}",
            "2 draws",
        )


@pytest.mark.parametrize("name", ["x", "y"])
def test_missing_values_that_leave_no_cell(ds, name):
    gappy = ds.assign({name: ds[name].where(ds.time != ds.time)})
    refusal(
        lambda: gappy.aimz.fit(line, progress=False),
        errors.MissingValueError,
        ValueError,
        repr(name),
        "missing values (NaN)",
        "no cell",
    )


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_integers_that_jax_cannot_hold(ds, fit, value):
    # Before a task runs, and not only when one meets the value.
    large = ds.assign(x=("time", np.array([0, 1, value, 2, 3], np.int64), {"units": "K"}))
    for call in (
        lambda: large.aimz.fit(line, progress=False),
        lambda: large.aimz.predict(fit),
        lambda: large.aimz.log_likelihood(fit),
    ):
        message = refusal(call, errors.DtypeError, TypeError, "'x'", "int64", "int32")
        assert str(value) in message
        assert "float" in message


def test_integers_that_jax_can_hold_pass(ds, fit):
    fits = ds.assign(x=("time", np.array([0, 1, 2**31 - 128, 2, -(2**31)], np.int64)))
    assert fits.aimz.predict(fit).y.notnull().all()


def test_lazy_integers_are_refused_by_the_task_that_meets_them(ds, fit):
    large = ds.assign(x=("time", np.array([0, 1, 2**40, 2, 3], np.int64))).chunk()
    lazy = large.aimz.predict(fit)
    refusal(lazy.compute, errors.DtypeError, TypeError, "'x'", "int64", "int32")


def test_a_latent_site_without_draws(ds):
    refusal(
        lambda: ds.aimz.from_posterior(line, {"slop": DRAWS["slope"]}),
        errors.ModelError,
        ValueError,
        "'slope'",
        "'slop'",
    )


def test_a_data_array_that_lacks_labels(ds, fit):
    x = ds.x.isel(time=slice(3))
    own = ds.isel(time=slice(3)).aimz.from_posterior(line, DRAWS, {"x": x.rename(None)})
    refusal(
        lambda: ds.drop_vars("x").aimz.predict(own),
        errors.LabelError,
        ValueError,
        "'x'",
        "2 labels",
        "'time'",
        "2003",
    )


def test_permuted_dims_and_another_order_of_variables_just_work(grid, local):
    expected = grid.aimz.predict(local).compute()
    turned = grid.transpose("lat", "time")[["y", "x"]]
    got = turned.aimz.predict(local).compute()
    assert got.y.dims == ("chain", "draw", "time", "lat")
    xr.testing.assert_allclose(got.drop_attrs(), expected.drop_attrs(), rtol=1e-5)

    density = turned.aimz.log_likelihood(local).compute()
    xr.testing.assert_allclose(density, grid.aimz.log_likelihood(local).compute(), rtol=1e-5)


def test_another_order_of_labels_just_works(grid, local):
    turned = grid.isel(lat=[1, 0], time=[4, 0, 3, 1, 2])
    expected = grid.aimz.predict(local).compute()
    got = turned.aimz.predict(local).compute()
    assert got.lat.values.tolist() == [20.0, 10.0]
    xr.testing.assert_allclose(
        got.sortby(["time", "lat"]).drop_attrs(), expected.drop_attrs(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "error", "meant"),
    [
        (lambda ds, fit: ds.aimz.fit(line, {"x": "xx"}), "MissingVariableError", "'x' by 'xx'"),
        (lambda ds, fit: ds.aimz.fit(line, {"X": "x"}), "BindingError", "'x' by 'X'"),
        (lambda ds, fit: ds.rename(x="X").aimz.fit(line), "BindingError", "'X' by 'x'"),
        (lambda ds, fit: ds.aimz.fit(line, dim="tiem"), "DimensionError", "'time' by 'tiem'"),
        (lambda ds, fit: ds.aimz.fit(line, core_dim="Time"), "DimensionError", "'time' by 'Time'"),
        (lambda ds, fit: ds.aimz.fit(line, per="tme"), "DimensionError", "'time' by 'tme'"),
        (lambda ds, fit: ds.aimz.fit(line, layout="gird"), "BindingError", "'grid' by 'gird'"),
        (lambda ds, fit: ds.aimz.fit(line, method="nust"), "OptionError", "'nuts' by 'nust'"),
        (
            lambda ds, fit: ds.aimz.fit(line, per="time", method="lapalce"),
            "OptionError",
            "'laplace' by 'lapalce'",
        ),
        (
            lambda ds, fit: ds.aimz.fit(line, method="svi", batch={"tim": 2}),
            "DimensionError",
            "'time' by 'tim'",
        ),
        (
            lambda ds, fit: ds.rename(time="tme").aimz.predict(fit),
            "DimensionError",
            "'tme' by 'time'",
        ),
        (
            lambda ds, fit: ds.aimz.predict(fit, sites="slpoe"),
            "MissingVariableError",
            "'slope' by 'slpoe'",
        ),
        (
            lambda ds, fit: ds.aimz.predict(fit, do={"slop": 1.0}),
            "MissingVariableError",
            "'slope' by 'slop'",
        ),
        (
            lambda ds, fit: ds.aimz.intervene(fit, {"sloep": 1.0}),
            "MissingVariableError",
            "'slope' by 'sloep'",
        ),
        (
            lambda ds, fit: ds.aimz.predict(fit, condition={"Y": 1.0}),
            "MissingVariableError",
            "'y' by 'Y'",
        ),
        (
            lambda ds, fit: ds.aimz.predict(fit, condition={"y": "yy"}),
            "MissingVariableError",
            "'y' by 'yy'",
        ),
        (
            lambda ds, fit: ds.rename(y="Y").aimz.log_likelihood(fit),
            "MissingVariableError",
            "'Y' by 'y'",
        ),
        (
            lambda ds, fit: ds.aimz.predict(fit, new_labels="smaple"),
            "OptionError",
            "'sample' by 'smaple'",
        ),
        (
            lambda ds, fit: ds.aimz.intervene(fit, {"x": 1.0}, contrast="diference"),
            "OptionError",
            "'difference' by 'diference'",
        ),
        (
            lambda ds, fit: ds.aimz.predict(fit, summary=["maen"]),
            "OptionError",
            "'mean' by 'maen'",
        ),
        (
            lambda ds, fit: xr_aimz.set_options(progres=True),
            "OptionError",
            "'progress' by 'progres'",
        ),
    ],
)
def test_a_misspelled_name_is_told_which_is_meant(ds, fit, call, error, meant):
    with pytest.raises(getattr(errors, error)) as caught:
        call(ds, fit)
    said = str(caught.value)
    right, _, wrong = meant.partition(" by ")
    assert wrong in said
    # Where nothing else has the name, it says how to bind it.
    assert f"did you mean {meant}?" in said or f"variables={{{wrong}: {right}}}" in said


def test_labels_that_are_new_may_be_drawn(grid, local):
    beyond = grid.assign_coords(lat=[10.0, 30.0])
    refusal(
        lambda: beyond.aimz.predict(local),
        errors.LabelError,
        ValueError,
        "30.0",
        "new_labels='sample'",
    )
    assert beyond.aimz.predict(local, new_labels="sample").sizes["lat"] == 2


@pytest.mark.parametrize("variables", ["x", ["x", "y"], {"x"}])
def test_variables_are_a_mapping(ds, variables):
    refusal(
        lambda: ds.aimz.fit(line, variables),
        errors.BindingError,
        ValueError,
        repr(variables),
        "['x', 'y']",
    )
