"""Values that 32 bits cannot tell apart are refused, wherever they are and whatever the chunks."""

import dask
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import xr_aimz
from xr_aimz.errors import DtypeError

EPOCH = 1.7e9
DRAWS = {"slope": np.full((1, 2), 0.5, np.float32)}


def trend(seconds, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * (seconds - EPOCH), 0.1), obs=y)


def in_each(seconds, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * seconds, 1), obs=y)


def dataset(seconds):
    seconds = np.asarray(seconds, float)
    y = 0.5 * (seconds - seconds.mean())
    return xr.Dataset(
        {"seconds": ("time", seconds), "y": ("time", y)}, {"time": np.arange(len(seconds))}
    )


@pytest.fixture
def coarse():
    """Steps of 1, where float32 has steps of 128."""
    return dataset(EPOCH + np.arange(100.0))


@pytest.fixture
def fine():
    return dataset(np.arange(100.0))


def fitted(ds, model=trend):
    return ds.aimz.from_posterior(model, DRAWS)


def test_the_message_names_the_variable_both_figures_and_the_remedies(coarse):
    parts = [
        "'seconds'",
        "1700000001.0 at time=1 becomes 1700000000.0",
        "rounding error of 1,",
        "standard deviation, 28.9",
        "Subtract an offset",
        "JAX_ENABLE_X64=1",
        ".astype('float32')",
    ]
    with pytest.raises(DtypeError) as caught:
        coarse.aimz.fit(trend, progress=False)
    assert [p for p in parts if p not in str(caught.value)] == []


@pytest.mark.parametrize("chunks", [None, {"time": 7}])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "svi", "steps": 10},
        {"method": "svi", "steps": 10, "batch": {"time": 10}},
        {"method": "laplace"},
    ],
)
def test_every_fit_refuses_them_before_it_starts(coarse, chunks, options):
    ds = coarse if chunks is None else coarse.chunk(chunks)
    with pytest.raises(DtypeError, match=r"'seconds'.*time=1 "):
        ds.aimz.fit(trend, progress=False, **options)


def test_an_outcome_is_looked_at_too(fine):
    ds = fine.assign(y=fine.y + EPOCH)
    with pytest.raises(DtypeError, match="variable 'y'"):
        ds.aimz.fit(trend, progress=False)
    fit = fitted(fine)
    with pytest.raises(DtypeError, match="variable 'y'"):
        ds.aimz.log_likelihood(fit)
    with pytest.raises(DtypeError, match=r"variable 'y'.*at time=\d+ "):
        ds.chunk(time=1).aimz.log_likelihood(fit).compute()


def test_a_prediction_refuses_them_at_once_in_memory_and_in_its_task_where_lazy(coarse, fine):
    fit = fitted(fine)
    with pytest.raises(DtypeError, match=r"'seconds'.*time=1 .*deviation, 28\.9"):
        coarse.aimz.predict(fit)
    lazy = coarse.chunk(time=25).aimz.predict(fit)
    with pytest.raises(DtypeError, match=r"'seconds'.*time=2[5-9] "):
        lazy.isel(time=slice(25, 50)).compute()


def test_the_labels_of_a_dimension_without_a_coordinate_are_positions(coarse, fine):
    fit = fitted(fine.drop_vars("time"))
    lazy = coarse.drop_vars("time").chunk(time=25).aimz.predict(fit)
    with pytest.raises(DtypeError, match=r"at entry 2[5-9] of 'time'"):
        lazy.isel(time=slice(25, 50)).compute()


def test_one_label_a_block_has_no_spread_of_its_own(coarse, fine):
    """The fit's spread is what a rounding error is compared with, not the block's."""
    fit = fitted(fine)
    with pytest.raises(DtypeError, match="'seconds'"):
        coarse.chunk(time=1).aimz.predict(fit).compute()
    with pytest.raises(DtypeError, match="'seconds'"):
        coarse.isel(time=[1]).aimz.predict(fit)


def test_a_saved_fit_knows_the_spread(coarse, fine, tmp_path):
    fitted(fine).save(tmp_path / "fit.zarr")
    loaded = xr_aimz.load_fit(tmp_path / "fit.zarr", trend)
    xr.testing.assert_identical(loaded.data_sd, fitted(fine).data_sd)
    with pytest.raises(DtypeError, match="'seconds'"):
        coarse.chunk(time=1).aimz.predict(loaded).compute()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
def test_further_draws_know_the_spread(fine):
    fit = fine.aimz.fit(in_each, method="svi", steps=20, draws=5, progress=False)
    xr.testing.assert_identical(fit.sample(3).data_sd, fit.data_sd)
    assert float(fit.data_sd.seconds) == pytest.approx(np.arange(100.0).std())


def test_values_of_do_and_condition_are_looked_at(fine):
    fit = fitted(fine)
    with pytest.raises(DtypeError, match=r"do=\{'seconds'"):
        fine.aimz.predict(fit, do={"seconds": EPOCH + 1})
    later = (fine.seconds + EPOCH).chunk(time=1)
    with pytest.raises(DtypeError, match=r"do=\{'seconds'"):
        fine.aimz.predict(fit, do={"seconds": later}).compute()
    with pytest.raises(DtypeError, match="condition='y'"):
        fine.aimz.predict(fit, condition={"y": fine.y + EPOCH})
    with pytest.raises(DtypeError, match="condition='y'"):
        fine.aimz.predict(fit, condition={"y": (fine.y + EPOCH).chunk(time=1)}).compute()
    fine.aimz.predict(fit, do={"seconds": 1e5}, condition={"y": fine.y}).compute()


def test_draws_from_the_prior_refuse_them(coarse):
    with pytest.raises(DtypeError, match="'seconds'"):
        coarse.aimz.prior_predictive(trend, draws=2)


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
def test_every_cell_has_a_spread_of_its_own(lazy):
    rng = np.random.default_rng(0)
    heights = np.array([0.0, 1e6])
    level = heights + rng.normal(size=(50, 2))
    ds = xr.Dataset(
        {"seconds": (("time", "lat"), level), "y": (("time", "lat"), rng.normal(size=(50, 2)))},
        {"lat": [10.0, 20.0]},
    )
    ds = ds.chunk(lat=1, time=25) if lazy else ds
    # Over both cells the spread is 5e5, and in the second it is 1.
    with pytest.raises(DtypeError, match=r"lat=20\.0.*deviation, (0\.9|1)"):
        ds.aimz.fit(in_each, per="lat", method="laplace", draws=2, progress=False)
    near = ds.assign(seconds=ds.seconds - heights)
    fit = near.aimz.fit(in_each, per="lat", method="laplace", draws=2, progress=False)
    assert fit.data_sd.seconds.dims == ("lat",)
    turned = ds.isel(lat=[1, 0])
    with pytest.raises(DtypeError, match=r"lat=20\.0"):
        turned.aimz.predict(fit).compute()
    near.aimz.predict(fit).compute()


@pytest.mark.parametrize(
    "values",
    [
        np.full(5, 0.1),
        np.full(5, EPOCH + 1),
        np.array([0.3, 0.1 + 0.2, 0.3]),
        np.arange(1850.0, 2021.0),
        np.arange(-90, 90, 0.25),
        np.array([np.nan, 0.1, 0.7]),
        np.full(3, np.nan),
        np.array([0.1, 0.2]),
        np.array([0.1]),
        101_325 + 500 * np.random.default_rng(0).normal(size=100),
        EPOCH + 86400.0 * np.arange(3650),
    ],
    ids=["constant", "far constant", "noise", "years", "latitudes", "gap", "nothing", "two", "one",
         "pressure", "days"],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_what_32_bits_hold_is_let_through(values, chunk):
    ds = dataset(values)
    fit = fitted(ds, in_each)
    if chunk is not None:
        ds = ds.isel(time=slice(0, 6)).chunk(time=chunk)
    ds.drop_vars("y").aimz.predict(fit).compute()


def test_a_value_beyond_the_range_of_32_bits_is_refused(fine):
    with pytest.raises(DtypeError, match=r"1e\+39 at time=3 becomes inf"):
        fine.assign(seconds=fine.seconds.where(fine.time != 3, 1e39)).aimz.predict(fitted(fine))


def test_either_remedy_lets_them_through(coarse, fine):
    fit = fitted(fine)
    coarse.astype("float32").aimz.predict(fit).compute()
    coarse.assign(seconds=coarse.seconds - EPOCH).aimz.predict(fit).compute()
    with jax.enable_x64(True):
        coarse.aimz.predict(fitted(coarse)).compute()


def test_a_dataset_in_32_bits_has_nothing_to_check(fine):
    """The check costs a float32 input nothing: no task has one."""
    ds = fine.astype("float32").chunk(time=50)
    graph = ds.aimz.predict(fitted(fine)).y.__dask_graph__()
    tasks = [node.value for key, node in dict(graph).items() if "aimz-task" in str(key)]
    assert [t.requirements for t in tasks] == [()]


@given(
    offset=st.sampled_from([0.0, 1e4, 1e5, 2e5, 1e6, 1e7, EPOCH]),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    length=st.integers(3, 12),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_no_accepted_value_is_off_by_a_thousandth_of_an_sd_and_no_chunk_matters(
    offset, scale, length, chunk, seed
):
    rng = np.random.default_rng(seed)
    fit = fitted(dataset(scale * rng.normal(size=20)), in_each)
    ds = dataset(offset + scale * rng.normal(size=length)).drop_vars("y")
    sd = float(fit.data_sd.seconds)
    off = np.abs(ds.seconds.values - ds.seconds.values.astype(np.float32)).max() > 1e-3 * sd
    for one in (ds, ds.chunk(time=chunk)):
        try:
            with dask.config.set(scheduler="synchronous"):
                one.aimz.predict(fit).compute()
        except DtypeError:
            assert off
        else:
            assert not off


def scaled(seconds, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * (seconds - EPOCH), 0.1), obs=y)


def differenced(seconds, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * (seconds - int(EPOCH)), 0.1), obs=y)


def looked_up(seconds, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(jnp.where(seconds == 1_700_000_003, slope, 0), 1), obs=y)


def scanned(seconds, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    _, level = jax.lax.scan(lambda c, x: (c + slope * x, c), 0.0, seconds)
    numpyro.sample("y", dist.Normal(level, 1), obs=y)


def carried(seconds, y=None):
    """An integer becomes a float a step after it was carried on."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    _, before = jax.lax.scan(lambda c, x: (x, c.astype(float)), jnp.zeros((), int), seconds)
    numpyro.sample("y", dist.Normal(slope * before, 1), obs=y)


def test_integers_that_a_model_converts_are_as_coarse(coarse, fine):
    whole = coarse.assign(seconds=coarse.seconds.astype(int))
    refused = r"'seconds'.*1700000001 at time=1 becomes 1700000000\.0"
    core = {"core_dim": "time"}
    for model, options in ((scaled, {}), (scanned, core), (carried, core)):
        with pytest.raises(DtypeError, match=refused):
            whole.aimz.fit(model, progress=False, **options)
    fit = fine.assign(seconds=fine.seconds.astype(int)).aimz.from_posterior(scaled, DRAWS)
    with pytest.raises(DtypeError, match=refused):
        whole.aimz.predict(fit)
    with pytest.raises(DtypeError, match=r"'seconds'.*at time=\d+ becomes"):
        whole.chunk(time=1).aimz.predict(fit).compute()


@pytest.mark.parametrize("model", [differenced, looked_up])
def test_integers_that_a_model_keeps_are_exact(coarse, model):
    whole = coarse.assign(seconds=coarse.seconds.astype(int))
    fit = whole.aimz.from_posterior(model, DRAWS)
    for ds in (whole, whole.chunk(time=10)):
        pred = ds.aimz.predict(fit).y.isel(chain=0, draw=0).compute()
    steps = np.arange(100.0)
    expected = steps / 2 if model is differenced else np.where(steps == 3, 0.5, 0)
    np.testing.assert_allclose(pred, expected, atol=5)


def test_a_file_is_not_kept_in_memory_by_the_checks_of_a_fit_per_cell(tmp_path):
    values = np.random.default_rng(0).normal(size=(6, 3))
    xr.Dataset({"y": (("time", "cell"), values)}).to_netcdf(tmp_path / "data.nc")

    def centre(y=None):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with xr_aimz.plate("time"):
            numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    with xr.open_dataset(tmp_path / "data.nc") as ds:
        fit = ds.aimz.fit(centre, per="cell", method="laplace", draws=10, progress=False)
        assert not ds.y.variable._in_memory
        np.testing.assert_allclose(fit.data_sd.y, values.std(0), rtol=1e-6)
