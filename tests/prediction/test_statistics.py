"""Statistics are those of the draws, whoever takes them and however they are cut."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from dask.callbacks import Callback

import xr_aimz
from xr_aimz.errors import BlockSizeError, DimensionError, DtypeError, OptionError

DRAWS = ("chain", "draw")
ASKED = ("mean", "std", "median", 0.05, 0.5, 0.95, "prob>0.5", "prob<=0", "hdi", "hdi94")


def model(x, y=None, n=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.deterministic("half", b / 2)
    with xr_aimz.plate("time"), xr_aimz.plate("lat"):
        mu = numpyro.deterministic("mu", b * x)
        numpyro.sample("site", dist.Normal(mu, 1.0), obs=y)
        numpyro.sample("count", dist.Bernoulli(logits=mu), obs=n)


@pytest.fixture(scope="module")
def ds():
    rng = np.random.default_rng(0)
    shape, dims = (31, 5), ("time", "lat")
    return xr.Dataset(
        {
            "x": (dims, rng.normal(size=shape)),
            "tas": (
                dims,
                rng.normal(size=shape),
                {"units": "K", "standard_name": "air_temperature", "cell_methods": "time: mean"},
            ),
            "n": (dims, rng.integers(0, 2, shape), {"units": "1"}),
        },
        {"time": np.arange(1990, 2021), "lat": np.linspace(-20, 20, 5), "height": 2.0},
        {"title": "a Dataset"},
    )


@pytest.fixture(scope="module")
def fit(ds):
    b = np.random.default_rng(1).normal(size=(2, 60))
    return ds.aimz.from_posterior(model, {"b": b}, {"y": "tas"})


@pytest.fixture(scope="module")
def draws(ds, fit):
    return ds.aimz.predict(fit).compute()


@pytest.fixture(scope="module")
def expected(draws):
    """The same statistics by xarray and, for the intervals, by the definition."""
    found = {}
    for name, array in draws.items():
        wide = array.astype("f8")
        found[f"{name}_mean"] = wide.mean(DRAWS)
        found[f"{name}_std"] = wide.std(DRAWS)
        found[f"{name}_median"] = wide.median(DRAWS)
        found[f"{name}_quantile"] = wide.quantile([0.05, 0.5, 0.95], DRAWS)
        prob = [(wide > 0.5).mean(DRAWS), (wide <= 0).mean(DRAWS)]
        found[f"{name}_prob"] = xr.concat(prob, "threshold")
        for suffix, percent in (("hdi", 89), ("hdi94", 94)):
            found[f"{name}_{suffix}"] = shortest(wide, percent)
    return found


def shortest(array, percent):
    rest = [d for d in array.dims if d not in DRAWS]
    rows = np.sort(array.transpose(*rest, *DRAWS).values.reshape(*array.shape[2:], -1))
    within = int(percent * rows.shape[-1] / 100)
    starts = (rows[..., within:] - rows[..., : rows.shape[-1] - within]).argmin(-1)[..., None]
    ends = [np.take_along_axis(rows, i, -1)[..., 0] for i in (starts, starts + within)]
    return xr.DataArray(np.stack(ends), dims=("ci_bound", *rest))


def assert_expected(found, expected):
    assert set(found.data_vars) == set(expected)
    for name, wanted in expected.items():
        assert found[name].dims == wanted.dims, name
        np.testing.assert_allclose(
            found[name].values, wanted.values, rtol=2e-6, atol=2e-6, err_msg=name
        )


CHUNKS = [None, {"time": 8}, {"time": 13, "lat": 2}, {"lat": 1}]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("block_bytes", [2**27, 2**17])
def test_statistics_are_those_of_the_draws(ds, fit, expected, chunks, block_bytes):
    cut = ds if chunks is None else ds.chunk(chunks)
    with xr_aimz.set_options(block_bytes=block_bytes):
        found = cut.aimz.predict(fit, summary=ASKED)
    assert_expected(found, expected)
    if chunks is not None:
        # Cells were cut for the draws' sake, and the result has the Dataset's chunks again.
        lengths = {**ds.sizes, **chunks}
        assert found.tas_mean.data.chunksize == (lengths["time"], lengths["lat"])


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [None, {"time": 8}, {"draw": 7, "time": 9, "lat": 2}])
@pytest.mark.parametrize("block_bytes", [2**27, 2**15])
def test_a_datasets_draws_are_summarized_alike(draws, expected, chunks, block_bytes):
    with xr_aimz.set_options(block_bytes=block_bytes):
        found = (draws if chunks is None else draws.chunk(chunks)).aimz.summary(ASKED)
    assert bool(found.chunks) == (chunks is not None)
    assert_expected(found, expected)


def test_both_ways_give_one_dataset(ds, fit, draws):
    inside = ds.chunk(time=9).aimz.predict(fit, summary=ASKED).compute()
    after = draws.chunk(time=9).aimz.summary(ASKED).compute()
    assert list(inside.data_vars) == list(after.data_vars)
    coords = [found.coords.to_dataset().drop_attrs(deep=False) for found in (inside, after)]
    xr.testing.assert_identical(*coords)
    xr.testing.assert_allclose(inside, after, rtol=2e-6, atol=2e-6)
    assert [inside[n].dtype for n in inside] == [after[n].dtype for n in inside]
    assert [inside[n].attrs for n in inside] == [after[n].attrs for n in inside]


def test_a_summary_commutes_with_selection(ds, fit):
    whole = ds.aimz.predict(fit, summary=ASKED)
    some = {"time": [2005, 1991, 2020], "lat": slice(-10, 10)}
    part = ds.sel(some).chunk(time=2).aimz.predict(fit, summary=ASKED)
    for name, array in part.items():
        wanted = whole[name].sel({d: s for d, s in some.items() if d in array.dims})
        np.testing.assert_allclose(array, wanted, rtol=2e-6, atol=2e-6)


def test_nothing_is_computed_until_it_is_asked_for(ds, fit):
    class Tasks(Callback):
        seen = 0

        def _pretask(self, key, dsk, state):
            self.seen += 1

    with Tasks() as tasks:
        lazy = ds.chunk(time=8).aimz.predict(fit, summary=ASKED)
        ds.chunk(time=8).aimz.predict(fit).aimz.summary(ASKED)
        assert tasks.seen == 0
        lazy.tas_mean.compute()
    assert tasks.seen > 0


def test_no_draws_leave_a_task(ds, fit):
    class Largest(Callback):
        bytes = 0

        def _posttask(self, key, result, dsk, state, worker):
            if isinstance(result, dict):
                self.bytes = max(self.bytes, *(a.nbytes for a in result.values()))

    with Largest() as largest:
        ds.chunk(time=8).aimz.predict(fit, summary="mean").compute(scheduler="synchronous")
    assert 0 < largest.bytes <= 8 * 5 * 4


def test_labels_and_attrs(ds, fit):
    found = ds.aimz.predict(fit, sites="tas", summary=ASKED)
    assert found.attrs["title"] == "a Dataset"
    assert set(found.coords) == {"time", "lat", "height", "quantile", "threshold", "ci_bound"}
    assert found.threshold.values.tolist() == [">0.5", "<=0"]
    assert found.ci_bound.values.tolist() == ["lower", "upper"]
    assert found.tas_mean.attrs == {
        "units": "K",
        "standard_name": "air_temperature",
        "cell_methods": "time: mean realization: mean",
        "long_name": "mean of tas",
    }
    methods = found.tas_std.attrs["cell_methods"]
    assert methods == "time: mean realization: standard_deviation"
    # CF has no method for a quantile.
    assert found.tas_quantile.attrs["cell_methods"] == "time: mean"
    assert found.tas_prob.attrs["units"] == "1"
    assert "standard_name" not in found.tas_prob.attrs
    assert found.tas_hdi94.attrs["long_name"] == "94 % highest density interval of tas"


def test_the_interval_is_arviz_own(draws):
    az = pytest.importorskip("arviz")
    ours = draws[["tas"]].aimz.summary("hdi94").tas_hdi94
    theirs = az.hdi(draws[["tas"]], 0.94).tas
    dim = next(d for d in theirs.dims if d not in ("time", "lat"))
    np.testing.assert_allclose(ours, theirs.transpose(dim, "time", "lat"), rtol=1e-6)


def test_a_draw_that_is_nan_makes_its_cell_nan():
    values = np.random.default_rng(0).normal(size=(2, 50, 3)).astype("f4")
    values[1, 7, 1] = np.nan
    found = xr.Dataset({"v": ((*DRAWS, "lat"), values)}).aimz.summary(ASKED)
    for name, array in found.items():
        empty = np.isnan(array.values).reshape(-1, 3)
        assert (empty == [False, True, False]).all(), name


def test_infinities_are_ordered_like_any_number():
    values = np.array([[-np.inf, 0.0, 1.0, np.inf, np.inf]])[..., None]
    found = xr.Dataset({"v": ((*DRAWS, "lat"), values)}).aimz.summary((0, 0.25, 0.5, 1))
    assert found.v_quantile.values.ravel().tolist() == [-np.inf, 0.0, 1.0, np.inf]


@pytest.mark.parametrize(
    ("dtype", "made"),
    [("i4", "f4"), ("bool", "f4"), ("i8", "f8"), ("u2", "f4"), ("f4", "f4"), ("f8", "f8")],
)
def test_ints_give_floats_and_floats_stay(dtype, made):
    values = np.random.default_rng(0).integers(0, 2, (2, 50, 3)).astype(dtype)
    ds = xr.Dataset({"v": ((*DRAWS, "lat"), values)})
    found = ds.aimz.summary(("mean", "std", 0.3, "median", "prob>=1", "hdi"))
    assert {a.dtype for a in found.values()} == {np.dtype(made)}
    wide = ds.v.astype("f8")
    np.testing.assert_allclose(found.v_mean, wide.mean(DRAWS), rtol=1e-6)
    np.testing.assert_allclose(found.v_quantile[0], wide.quantile(0.3, DRAWS), rtol=1e-6)
    np.testing.assert_allclose(found.v_prob[0], (wide >= 1).mean(DRAWS), rtol=1e-6)


def test_a_mean_far_from_zero_keeps_its_digits():
    values = (1e6 + np.random.default_rng(0).normal(size=(1, 4000, 9))).astype("f4")
    found = xr.Dataset({"v": ((*DRAWS, "lat"), values)}).aimz.summary(("mean", "std"))
    np.testing.assert_allclose(found.v_mean, values.astype("f8").mean((0, 1)), rtol=6e-8)
    np.testing.assert_allclose(found.v_std, values.astype("f8").std((0, 1)), rtol=1e-3)


def test_a_posterior_and_its_other_variables(draws):
    ds = draws[["half"]].assign(area=("lat", np.ones(5))).assign_coords(run="r1")
    found = ds.aimz.summary("mean")
    assert set(found.data_vars) == {"half_mean", "area"}
    assert "run" in found.coords
    assert "chain" not in found.variables
    one = draws.tas.isel(chain=0, drop=True).to_dataset().aimz.summary("mean")
    np.testing.assert_allclose(one.tas_mean, draws.tas[0].mean("draw"), rtol=1e-5, atol=1e-6)


def test_a_summary_can_be_stored(ds, fit, expected, tmp_path):
    lazy = ds.chunk(time=8).aimz.predict(fit, summary=ASKED)
    stored = lazy.aimz.to_zarr(tmp_path / "summary.zarr", progress=False)
    assert_expected(stored, expected)
    np.testing.assert_allclose(
        stored.tas_prob.sel(threshold=">0.5"), expected["tas_prob"][0], atol=1e-6
    )


def test_blocks_are_cut_until_their_draws_fit(ds, fit):
    with xr_aimz.set_options(block_bytes=2**14):
        lazy = ds.aimz.predict(fit, sites="tas", summary="mean")
    # 120 draws of 4 bytes a cell, and an eighth of the bytes
    assert np.prod(lazy.tas_mean.data.chunksize) <= 2**14 / 8 / 480
    with (
        xr_aimz.set_options(block_bytes=400),
        pytest.raises(
            BlockSizeError, match=r"2 chains x 60 draws .*480 bytes.* block_bytes is 400"
        ),
    ):
        ds.aimz.predict(fit, sites="tas", summary="mean")


def test_a_core_dim_is_never_cut_for_a_summary(ds):
    def walk(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(jnp.cumsum(b * x, 0), 1.0), obs=y)

    fit = ds.aimz.from_posterior(walk, {"b": np.ones((1, 40))}, {"y": "tas"}, core_dim="time")
    with xr_aimz.set_options(block_bytes=2**13):
        lazy = ds.aimz.predict(fit, summary="mean")
    assert lazy.tas_mean.data.chunksize == (31, 1)
    truth = ds.aimz.predict(fit).tas.mean(DRAWS)
    np.testing.assert_allclose(lazy.tas_mean, truth, rtol=1e-5, atol=1e-5)
    with (
        xr_aimz.set_options(block_bytes=2**12),
        pytest.raises(BlockSizeError, match=r"'time': 31, 'lat': 1.*core_dim=\('time',\)"),
    ):
        ds.aimz.predict(fit, summary="mean")


@pytest.mark.parametrize(
    "asked", ["men", 1.5, -0.1, True, "prob", "prob>much", "hdi100", (), None]
)
def test_what_is_no_statistic_is_refused(draws, asked):
    with pytest.raises(OptionError, match="summary="):
        draws.aimz.summary(asked)


def test_what_has_no_draws_is_refused(ds, draws):
    with pytest.raises(DimensionError, match=r"'chain' or 'draw'.*'time'"):
        ds.aimz.summary()
    words = xr.Dataset({"word": (DRAWS, np.array([["a", "b"]]))})
    with pytest.raises(DtypeError, match="'word' has dtype <U1"):
        words.aimz.summary()


def test_statistics_may_be_given_one_by_one_in_a_list_or_by_name(draws):
    expected = draws.aimz.summary(("mean", 0.5, "prob>0.5"))
    for found in (
        draws.aimz.summary("mean", 0.5, "prob>0.5"),
        draws.aimz.summary(["mean", 0.5], "prob>0.5"),
        draws.aimz.summary(statistics=["mean", 0.5, "prob>0.5"]),
        xr_aimz.summary(draws, "mean", 0.5, "prob>0.5"),
        xr_aimz.summary(draws, statistics=("mean", [0.5, "prob>0.5"])),
        xr_aimz.summary(draws, np.array(["mean"]), np.array(0.5), "prob>0.5"),
    ):
        xr.testing.assert_identical(found, expected)
    xr.testing.assert_identical(draws.aimz.summary(), xr_aimz.summary(draws))
    assert "site_quantile" in draws.rename(tas="site").aimz.summary()


def test_a_prediction_takes_them_as_a_summary_does(ds, fit):
    nested = ds.aimz.predict(fit, summary=["mean", ["std", 0.5]])
    xr.testing.assert_identical(
        nested.compute().drop_attrs(),
        ds.aimz.predict(fit, summary=("mean", "std", 0.5)).compute().drop_attrs(),
    )


def test_statistics_are_given_in_one_place_and_by_name(draws):
    with pytest.raises(OptionError, match=r"\('mean',\) and statistics='std'"):
        draws.aimz.summary("mean", statistics="std")
    with pytest.raises(OptionError, match=r"summary=.*'maen'.*did you mean 'mean'"):
        draws.aimz.summary("maen")
    for nothing in ([], [[]]):
        with pytest.raises(OptionError, match="names no statistic"):
            draws.aimz.summary(statistics=nothing)
