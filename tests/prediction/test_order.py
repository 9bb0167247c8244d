"""A prediction on some of the labels is that part of the whole, or it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro.contrib.control_flow import scan
from strategies import assert_same

import xr_aimz
from xr_aimz.errors import LabelError, ModelError

YEARS = np.arange(2000, 2008)
N = len(YEARS)


def recursive(order):
    def model(x, y=None):
        phi = numpyro.sample("phi", dist.Normal(0, 1))

        def step(before, now):
            value = numpyro.sample("y", dist.Normal(phi * before[-1] + before[0], 0.5), obs=now)
            return (value, *before[:-1]), None

        scan(step, (jnp.float32(0),) * order, y, length=x.shape[0])

    return model


def local_level(x, y=None):
    def step(before, now):
        state = numpyro.sample("state", dist.Normal(before, 1))
        numpyro.sample("y", dist.Normal(state, 1), obs=now)
        return state, None

    scan(step, 0.0, y, length=x.shape[0])


def growth(x, y=None):
    def step(before, now):
        state = numpyro.sample("state", dist.Normal(before, 1))
        numpyro.sample("y", dist.Normal(state - before, 0.1), obs=now)
        return state, None

    scan(step, 0.0, y, length=x.shape[0])


def smoothed(x, y=None):
    def step(before, now):
        after = 0.7 * before + now
        return after, after

    mean = numpyro.deterministic("mean", jax.lax.scan(step, jnp.float32(0), x)[1])
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def backwards(x, y=None):
    mean = jax.lax.cumsum(x, reverse=True)
    numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def increments(x, y=None):
    """Draws that have a place and no label."""
    with numpyro.plate("step", x.shape[0] - 1):
        jump = numpyro.sample("jump", dist.Normal(0, 1))
    level = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jump)])
    numpyro.sample("y", dist.Normal(level, 0.1), obs=y)


def steps_between(x, y=None):
    """The same in a scan of one step less, whose draws NumPyro would lengthen by itself."""

    def step(before, _):
        jump = numpyro.sample("jump", dist.Normal(before, 1))
        return jump, jump

    _, jumps = scan(step, 0.0, None, length=x.shape[0] - 1)
    numpyro.sample("y", dist.Normal(jnp.concatenate([jnp.zeros(1), jumps]), 0.1), obs=y)


def plain(x, y=None):
    with xr_aimz.plate("year"):
        state = numpyro.sample("state", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(state + x, 1), obs=y)


MODELS = {
    "ar1": recursive(1),
    "ar2": recursive(2),
    "local_level": local_level,
    "growth": growth,
    "smoothed": smoothed,
    "backwards": backwards,
    "increments": increments,
    "steps_between": steps_between,
    "plain": plain,
}
rng = np.random.default_rng(0)
DRAWS = {
    "phi": rng.normal(size=(1, 3)),
    "state": rng.normal(size=(1, 3, N)),
    "jump": rng.normal(size=(1, 3, N - 1)),
}


def series(years):
    own = np.random.default_rng(1).normal(size=(2, 3000))
    place = np.asarray(years) - 1000
    return xr.Dataset(
        {"x": ("year", own[0, place]), "y": ("year", own[1, place])}, {"year": np.asarray(years)}
    )


def fitted(name, **options):
    return series(YEARS).aimz.from_posterior(MODELS[name], DRAWS, **options)


FITS = {name: fitted(name, core_dim="year") for name in MODELS}
WINDOWS = st.one_of(
    st.slices(N).filter(lambda s: len(range(*s.indices(N)))).map(lambda s: np.arange(N)[s]),
    st.lists(st.integers(0, N - 1), min_size=1, unique=True).map(np.array),
)


def kept(ds, fit, window, known):
    """The prediction on a window, with the outcome known in so many of its first steps."""
    part = ds.isel(year=window)
    given = part.y.isel(year=slice(0, known))
    condition = {"y": given} if known else None
    return part.aimz.predict(fit, condition=condition)


@pytest.mark.slow
@settings(max_examples=60)
@given(name=st.sampled_from(sorted(MODELS)), window=WINDOWS, known=st.integers(0, 3))
def test_a_window_is_that_part_of_the_whole_or_refused(name, window, known):
    ds, fit = series(YEARS), FITS[name]
    try:
        found = kept(ds, fit, window, known)
    except (LabelError, ModelError):
        return
    # The whole knows what the window knows, and a recursion the past of it.
    places = window[:known]
    if known and name.startswith("ar"):
        places = np.arange(places[-1] + 1)
    whole = ds.aimz.predict(fit, condition={"y": ds.y.isel(year=places)} if known else None)
    assert_same(found, whole.isel(year=window))


@pytest.mark.parametrize(
    ("name", "window", "known"),
    [
        ("ar1", slice(0, 3), 0),
        ("ar1", slice(3, 8), 1),
        ("ar1", slice(3, 8), 3),
        ("ar1", slice(3, 5), 3),
        ("ar2", slice(2, 8), 2),
        ("local_level", [6, 1, 3], 0),
        ("local_level", slice(None, None, -1), 0),
        ("smoothed", slice(0, 5), 0),
        ("backwards", slice(3, 8), 0),
        ("increments", slice(0, 8), 0),
        ("steps_between", slice(0, 8), 0),
        ("plain", [6, 1, 3], 0),
    ],
)
def test_what_can_be_predicted_is(name, window, known):
    found = kept(series(YEARS), FITS[name], window, known)
    assert found.sizes["year"] == len(YEARS[window])


@pytest.mark.parametrize(
    ("name", "window", "known", "match"),
    [
        ("ar1", slice(1, 8), 0, r"'y'.*begins at 2001, where the fit began at 2000"),
        ("ar2", slice(2, 8), 1, r"'y'.*the last 2 before"),
        ("ar1", [0, 1, 3], 0, r"2003 follows 2001, where the fit had 2002"),
        ("ar1", slice(None, None, -1), 1, r"begins at 2007"),
        ("growth", slice(1, 8), 0, r"'y'.*begins at 2001"),
        ("smoothed", slice(4, 8), 0, r"'mean'.*all labels of 'year'.*\.sel\(year="),
        ("backwards", slice(0, 5), 0, r"'y'.*ends at 2004, where the fit ended at 2007"),
        ("increments", slice(0, 5), 0, r"'jump'.*'step'.*5 labels where the fit had 8"),
        ("increments", [1, 0, *range(2, 8)], 0, r"'jump'.*begins at 2001"),
        ("steps_between", slice(0, 5), 0, r"'jump'"),
    ],
)
def test_what_would_be_wrong_is_refused(name, window, known, match):
    with pytest.raises(LabelError, match=match):
        kept(series(YEARS), FITS[name], window, known)


def test_a_forecast_goes_on_from_what_is_known_of_the_past():
    """The recipe of the message, and the last label before as its short form."""
    past, future = series(YEARS), series(YEARS + N).drop_vars("y")
    fit = FITS["ar1"]
    with pytest.raises(LabelError, match=r"'y'.*xr\.concat\(\[past, future\], 'year'\)"):
        future.aimz.predict(fit)
    whole = xr.concat([past, future], "year").aimz.predict(fit, condition="y")
    last = xr.concat([past.isel(year=[-1]), future], "year").aimz.predict(fit, condition="y")
    assert_same(whole.sel(year=future.year), last.sel(year=future.year))
    np.testing.assert_array_equal(whole.y.sel(year=2007)[0], [np.float32(past.y[-1])] * 3)
    # After it, each draw is phi times the one before, and noise.
    before, after = (whole.y.sel(year=y)[0].values for y in (2007, 2008))
    residual = after - (DRAWS["phi"][0] + 1) * before
    assert (np.abs(residual) < 5 * 0.5).all()
    for gap in (past.isel(year=[0]), past.isel(year=[-2])):
        with pytest.raises(LabelError, match=r"begins at 2006|follows 2000"):
            xr.concat([gap, future], "year").aimz.predict(fit, condition="y")


def test_a_history_that_is_lazy_is_asked_for_in_memory():
    ds = series(YEARS).isel(year=slice(3, None))
    history = ds.y.isel(year=[0]).chunk()
    with pytest.raises(LabelError, match="in memory"):
        ds.aimz.predict(FITS["ar1"], condition={"y": history})
    whole = series(YEARS)
    assert whole.aimz.predict(FITS["ar1"], condition={"y": whole.y[:3].chunk()}).sizes["year"] == N


def test_a_density_needs_the_past_too():
    ds, fit = series(YEARS), FITS["ar1"]
    late = ds.isel(year=slice(3, None))
    with pytest.raises(LabelError, match=r"the density of 'y'.*select from the result"):
        late.aimz.log_likelihood(fit)
    early = ds.isel(year=slice(0, 3))
    assert_same(early.aimz.log_likelihood(fit), ds.aimz.log_likelihood(fit).isel(year=slice(0, 3)))
    level = FITS["local_level"]
    assert_same(
        late.aimz.log_likelihood(level), ds.aimz.log_likelihood(level).isel(year=slice(3, None))
    )


def test_an_effect_needs_the_past_too():
    ds = series(YEARS)
    with pytest.raises(LabelError, match="'mean'"):
        ds.isel(year=slice(3, None)).aimz.intervene(FITS["smoothed"], {"x": 0.0})
    assert (
        ds.isel(year=slice(0, 3)).aimz.intervene(FITS["smoothed"], {"x": 0.0}).sizes["year"] == 3
    )


def test_what_is_not_returned_does_not_matter():
    ds, fit = series(YEARS), FITS["growth"]
    states = ds.isel(year=slice(3, None)).aimz.predict(fit, sites="state")
    assert_same(states, ds.aimz.predict(fit, sites="state").isel(year=slice(3, None)))


def test_places_are_labels_that_begin_at_0():
    ds = series(YEARS).drop_vars("year")
    fit = ds.aimz.from_posterior(MODELS["ar1"], DRAWS, core_dim="year")
    assert ds.isel(year=slice(0, 3)).aimz.predict(fit).sizes["year"] == 3
    with pytest.raises(LabelError, match="the fit had none"):
        series(YEARS).aimz.predict(fit)
    with pytest.raises(LabelError, match="the fit has labels there and the Dataset none"):
        ds.aimz.predict(FITS["ar1"])


def test_the_labels_of_a_coordinate_alone_are_known():
    """A model of no variable but the dimension's own coordinate."""

    def model(year, y=None):
        numpyro.sample("y", dist.Normal(jnp.cumsum(year), 1), obs=y)

    ds = xr.Dataset(coords={"year": YEARS})
    fit = ds.aimz.from_posterior(model, {}, dim="year")
    assert ds.isel(year=slice(0, 3)).aimz.predict(fit).sizes["year"] == 3
    with pytest.raises(LabelError, match="begins at 2003"):
        ds.isel(year=slice(3, None)).aimz.predict(fit)


def test_draws_by_place_are_not_cut():
    ds = series(YEARS)
    fit = fitted("increments")
    with pytest.raises(ModelError, match=r"'jump'.*'year', which is cut into blocks.*core_dim="):
        ds.chunk(year=3).aimz.predict(fit)
    assert_same(ds.aimz.predict(fit), ds.aimz.predict(FITS["increments"]))


def test_a_saved_fit_knows_of_its_lengths(tmp_path):
    fit = FITS["increments"]
    fit.save(tmp_path / "fit.zarr")
    loaded = xr_aimz.load_fit(tmp_path / "fit.zarr", MODELS["increments"])
    assert loaded.sites["jump"].lengths == {"year"}
    with pytest.raises(LabelError, match="'jump'"):
        series(YEARS + 1).aimz.predict(loaded)


def test_lengths_are_those_of_the_dims_that_they_follow():
    def model(x, y=None):
        with numpyro.plate("gap", x.shape[1] - 1):
            jump = numpyro.sample("jump", dist.Normal(0, 1))
        with numpyro.plate("part", x.shape[0] // 2):
            half = numpyro.sample("half", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jump.sum() + half.sum() + x, 1), obs=y)

    dims = ("time", "lat")
    ds = xr.Dataset(
        {n: (dims, np.ones((4, 3))) for n in "xy"}, {"time": range(4), "lat": [1, 2, 3]}
    )
    fit = ds.aimz.from_posterior(model, {"jump": np.ones((1, 2, 2)), "half": np.ones((1, 2, 2))})
    assert fit.sites["jump"].lengths == {"lat"}
    assert fit.sites["half"].lengths == {"time"}
    later = ds.assign_coords(time=range(4, 8))
    with pytest.raises(LabelError, match="'half'"):
        later.aimz.predict(fit)


def test_rows_of_a_table_go_on_along_its_first_dim_alone():
    def model(x, y=None):
        def step(before, now):
            value = numpyro.sample("y", dist.Normal(0.5 * before + 1, 0.1), obs=now)
            return value, None

        scan(step, 0.0, y, length=x.shape[0])

    dims = ("time", "lat")
    labels = {"time": range(4), "lat": [1, 2, 3]}
    ds = xr.Dataset({n: (dims, np.ones((4, 3))) for n in "xy"}, labels)
    fit = ds.aimz.from_posterior(model, {}, layout="table", core_dim=dims)
    whole = ds.aimz.predict(fit)
    early = {"time": slice(0, 2)}
    assert_same(ds.isel(early).aimz.predict(fit), whole.isel(early))
    for part in ({"lat": slice(0, 2)}, {"time": slice(1, 4)}):
        with pytest.raises(LabelError, match=f"along {next(iter(part))!r}"):
            ds.isel(part).aimz.predict(fit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
def test_a_recursion_in_each_cell_needs_the_past_too():
    ds = series(YEARS).expand_dims(lat=[50, 60])
    fit = ds.aimz.fit(
        MODELS["ar1"], per="lat", core_dim="year", method="laplace", draws=9, progress=False
    )
    whole = ds.aimz.predict(fit)
    early = {"year": slice(0, 3), "lat": [1]}
    assert_same(ds.isel(early).aimz.predict(fit), whole.isel(early))
    late = ds.isel(year=slice(3, None))
    with pytest.raises(LabelError, match="'y' is made step by step"):
        late.aimz.predict(fit)
    history = late.y.isel(year=[0])
    found = late.aimz.predict(fit, condition={"y": history})
    known = ds.aimz.predict(fit, condition={"y": ds.y.isel(year=slice(0, 4))})
    assert_same(found, known.sel(year=late.year))


@pytest.mark.parametrize("dtype", [object, "str", "datetime64[ns]", "datetime64[s]"])
def test_labels_are_compared_by_value(dtype):
    words = np.array([f"{y}-01-01" for y in YEARS])
    ds = series(YEARS).assign_coords(year=words.astype("datetime64[D]"))
    if np.dtype(dtype).kind != "M":
        ds = ds.assign_coords(year=words)
    fit = ds.aimz.from_posterior(MODELS["ar1"], DRAWS, core_dim="year")
    other = ds.assign_coords(year=ds.year.values.astype(dtype))
    assert_same(other.aimz.predict(fit), ds.aimz.predict(fit))
    with pytest.raises(LabelError, match="begins at"):
        other.isel(year=slice(1, None)).aimz.predict(fit)
