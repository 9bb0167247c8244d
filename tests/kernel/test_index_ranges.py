"""Values by which a model takes entries of an axis lie within it, or are refused."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import xr_aimz
from xr_aimz.errors import AimzError, IndexRangeError

CITIES = ["Oslo", "Rome", "Wien"]
MEANS = np.array([10.0, 20.0, 30.0])


def by_group(group, y=None):
    with numpyro.plate("city", 3):
        a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a[group], 1e-3), obs=y)


def by_bin(x, y=None):
    with numpyro.plate("city", 3):
        a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a[jnp.floor(x / 10).astype(int)], 1e-3), obs=y)


def with_prior(group, prior, y=None):
    with numpyro.plate("city", prior.shape[0]):
        a = numpyro.sample("a", dist.Normal(prior, 1))
    numpyro.sample("y", dist.Normal(a[group], 1e-3), obs=y)


def table(group):
    n = len(group)
    labels = {"row": np.arange(100, 100 + n), "city": CITIES}
    data = {
        "group": ("row", np.asarray(group)),
        "x": ("row", 10.0 * np.asarray(group)),
        "prior": ("city", np.zeros(3)),
        "y": ("row", np.linspace(0, 1, n)),
    }
    return xr.Dataset(data, labels)


GOOD = table([0, 1, 2, 1])
DRAWS = {"a": MEANS.reshape(1, 1, 3)}
SVI = {"method": "svi", "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def fits():
    models = {"group": by_group, "bin": by_bin, "prior": with_prior}
    return {n: (m, GOOD.aimz.from_posterior(m, DRAWS)) for n, m in models.items()}


VERBS = {
    "fit": lambda ds, m, fit: ds.aimz.fit(m, **SVI),
    "fit of chunks": lambda ds, m, fit: ds.chunk(row=2).aimz.fit(m, **SVI),
    "fit in batches": lambda ds, m, fit: ds.chunk(row=2).aimz.fit(m, batch=2, **SVI),
    "predict": lambda ds, m, fit: ds.aimz.predict(fit),
    "predict in a task": lambda ds, m, fit: ds.chunk(row=3).aimz.predict(fit).compute(),
    "log_likelihood": lambda ds, m, fit: ds.aimz.log_likelihood(fit),
    "prior_predictive": lambda ds, m, fit: ds.aimz.prior_predictive(m, draws=2),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("model", "variable"), [("group", "group"), ("bin", "x")])
@pytest.mark.parametrize("value", [5, -1])
def test_a_value_beyond_its_axis_is_refused(fits, model, variable, verb, value):
    of, fit = fits[model]
    call = VERBS[verb]
    call(GOOD, of, fit)
    # A prediction of the prior draws the site itself, and its axis has no name.
    axis = "an axis" if verb == "prior_predictive" else "'city'"
    words = rf"variable '{variable}'.*value {value}\b.*row=102.*{axis}.*positions 0 to 2"
    with pytest.raises(IndexRangeError, match=words) as caught:
        call(table([0, 1, value, 1]), of, fit)
    assert isinstance(caught.value, AimzError)
    assert isinstance(caught.value, IndexError)
    assert ("pandas" in str(caught.value)) == (value == -1)


@pytest.mark.parametrize("verb", ["predict", "fit"])
def test_what_is_in_memory_is_checked_before_any_task(fits, verb):
    of, fit = fits["group"]
    with pytest.raises(IndexRangeError):
        VERBS[verb](table([0, 3]), of, fit)
    lazy = table([0, 3]).chunk(row=1).aimz.predict(fit)
    np.testing.assert_allclose(lazy.y.isel(row=0).values.ravel(), 10.0, atol=0.1)
    with pytest.raises(IndexRangeError, match="row=101"):
        lazy.y.isel(row=1).values  # noqa: B018 # computes


def test_the_labels_of_the_axis_are_named_where_it_has_any(fits):
    with pytest.raises(IndexRangeError, match=r"'city' of site 'a'.*\['Oslo', 'Rome', 'Wien'\]"):
        table([0, 3]).aimz.predict(fits["prior"][1])


def test_a_value_of_do_is_a_position_too(fits):
    fit = fits["group"][1]
    assert GOOD.aimz.predict(fit, do={"group": 1}).y.round().values.ravel().tolist() == [20] * 4
    for call in (
        lambda: GOOD.aimz.predict(fit, do={"group": 3}),
        lambda: GOOD.aimz.intervene(fit, {"group": 3}),
    ):
        with pytest.raises(IndexRangeError, match=r"do={'group': ...}.*value 3\b"):
            call()


def test_a_missing_value_is_no_position(fits):
    """NaN has its own rules: a cell that is missing, and not one that is refused."""
    known = GOOD.assign(x=GOOD.x.where(GOOD.row != 101))
    found = known.aimz.predict(fits["bin"][1]).y.round().values.ravel()
    np.testing.assert_array_equal(found, [10, np.nan, 30, 20])


def test_a_model_that_clips_its_positions_is_let_through():
    def clipped(group, y=None):
        by_group(jnp.clip(group, 0, 2), y)

    fit = GOOD.aimz.from_posterior(clipped, DRAWS)
    found = table([0, 5, -1]).aimz.predict(fit).y.round().values.ravel()
    np.testing.assert_array_equal(found, [10, 30, 10])


def cells(group):
    y = np.linspace(0, 1, len(group)).reshape(2, -1)
    dims = ("cell", "row")
    data = {"group": (dims, np.reshape(group, y.shape)), "y": (dims, y)}
    return xr.Dataset(data, {"cell": ["p", "q"]})


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, {"cell": 1}])
def test_a_fit_of_each_cell_names_the_cell(chunks):
    def lay(ds):
        return ds if chunks is None else ds.chunk(chunks)

    options = {"per": "cell", "method": "laplace", "draws": 2, "progress": False}
    fit = lay(cells([0, 1, 2, 1, 0, 1])).aimz.fit(by_group, **options)
    assert (fit.sample_stats.status == 0).all()
    bad = lay(cells([0, 1, 2, 1, 0, 7]))
    words = r"'group'.*value 7\b.*cell='q'.*entry 2 of 'row'"
    with pytest.raises(IndexRangeError, match=words):
        bad.aimz.fit(by_group, **options)
    with pytest.raises(IndexRangeError, match=words):
        bad.aimz.predict(fit).compute()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-3, 5), min_size=1, max_size=5),
    st.sampled_from(["group", "bin"]),
    st.booleans(),
)
def test_a_prediction_is_that_of_the_group_or_an_error(fits_of, group, model, chunked):
    """Law: the mean of a row is that of its own group, or the row is refused."""
    ds = table(group)
    ds = ds.chunk(row=1) if chunked else ds
    fit = fits_of[model]
    if all(0 <= g < 3 for g in group):
        found = ds.aimz.predict(fit).y.values.ravel()
        np.testing.assert_allclose(found, MEANS[group], atol=0.1)
    else:
        with pytest.raises(IndexRangeError):
            ds.aimz.predict(fit).compute()


@pytest.fixture(scope="module")
def fits_of(fits):
    return {name: fit for name, (_, fit) in fits.items()}


def test_the_error_is_public():
    assert "IndexRangeError" in xr_aimz.errors.__all__
