"""A table is answered as its Dataset is, row by row, whatever rows come with it."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import cftime
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import strategies
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro.contrib.control_flow import scan

import xr_aimz
from xr_aimz import errors
from xr_aimz.kernel import compile
from xr_aimz.mlflow.serving import PyfuncModel
from xr_aimz.mlflow.signature import input_example

STATISTICS = ("mean", "std", 0.05, 0.5, 0.95)
# The same bits; another program may round otherwise, over means of draws of some tens.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def melting(warmth, forcing, melt=None):
    """A grid: one input of every cell, one of every year, one latent of every site."""
    with xr_aimz.plate("site"):
        rate = numpyro.sample("rate", dist.HalfNormal(10))
    with xr_aimz.plate("time"), xr_aimz.plate("site"):
        mu = numpyro.deterministic("mu", rate * warmth + forcing)
        numpyro.sample("melt", dist.Normal(mu, 1), obs=melt)


@pytest.fixture(scope="module")
def grid():
    rng = np.random.default_rng(0)
    warmth = rng.uniform(0, 8, (9, 12))
    ds = xr.Dataset(
        {
            "warmth": (("time", "site"), warmth, {"units": "degC"}),
            "forcing": ("time", np.linspace(0, 1, 9)),
            "melt": (("time", "site"), 3 * warmth + rng.normal(size=(9, 12))),
        },
        {"time": pd.date_range("2000-01-01", periods=9, freq="YS"), "site": list("abcdefghijkl")},
    )
    return ds, ds.aimz.fit(melting, method="laplace", draws=600)


@pytest.fixture(scope="module")
def predictor(grid):
    return PyfuncModel(grid[1])


@pytest.fixture(scope="module")
def table(grid):
    return grid[0].drop_vars("melt").to_dataframe().reset_index()


def expected(ds, fit, table, **options):
    """What ``predict`` says, a column for each number of a cell."""
    summary = options.pop("summary", STATISTICS)
    pred = ds.aimz.predict(fit, summary=summary, **options).compute()
    dims = [d for d in fit.binding.block_dims if d in table]
    at = {d: xr.DataArray(table[d].to_numpy(), dims="row") for d in dims}
    return pred.sel(at)


def assert_answers(answer, pred, name):
    np.testing.assert_allclose(answer[f"{name}_mean"], pred[f"{name}_mean"], **CLOSE)
    np.testing.assert_allclose(answer[f"{name}_std"], pred[f"{name}_std"], **CLOSE)
    for q in pred["quantile"].values:
        column = answer[f"{name}_quantile[{q}]"]
        np.testing.assert_allclose(column, pred[f"{name}_quantile"].sel(quantile=q), **CLOSE)


def test_a_table_is_answered_as_its_dataset_is(grid, predictor, table):
    ds, fit = grid
    answer = predictor.predict(table)
    pred = expected(ds, fit, table)
    for name in ("melt", "mu"):
        assert_answers(answer, pred, name)
    assert [c for c in answer if c.startswith("melt")] == [
        "melt_mean",
        "melt_std",
        "melt_quantile[0.05]",
        "melt_quantile[0.5]",
        "melt_quantile[0.95]",
    ]
    assert set(answer.dtypes) == {np.dtype(jnp.result_type(float))}


@pytest.mark.slow
@settings(max_examples=10)
@given(st.data())
def test_a_row_is_answered_alone_as_it_is_with_others(predictor, table, data):
    # The law: an answer depends on no other row, nor on the order of the rows.
    rows = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, unique=True))
    some = table.iloc[rows]
    answer = predictor.predict(some)
    assert answer.index.equals(some.index)
    whole = predictor.predict(table).loc[some.index]
    np.testing.assert_allclose(answer, whole, **CLOSE)


def test_pieces_of_a_table_are_the_whole(predictor, table):
    # As batch jobs do: an iterator of pieces, each answered by itself.
    pieces = [table.iloc[i : i + 17] for i in range(0, len(table), 17)]
    found = pd.concat(predictor.predict(piece) for piece in pieces)
    np.testing.assert_allclose(found, predictor.predict(table), **CLOSE)


def test_what_json_makes_of_a_table_is_the_same_table(predictor, table):
    records = json.loads(table.to_json(orient="records", date_format="iso"))
    read = pd.DataFrame.from_records(records)
    np.testing.assert_allclose(predictor.predict(read), predictor.predict(table), **CLOSE)


def test_draws_come_as_a_long_table(grid, predictor, table):
    ds, fit = grid
    some = table.iloc[[50, 3]]
    answer = predictor.predict(some, {"returns": "draws", "draws": 4, "seed": 7})
    pred = ds.aimz.predict(fit, draws=4, seed=7).compute()
    assert list(answer.columns[:3]) == ["row", "chain", "draw"]
    assert len(answer) == 2 * 1 * 4
    for row, (_, label) in enumerate(some.iterrows()):
        own = answer[answer.row == row]
        cell = pred.sel(time=label.time, site=label.site)
        np.testing.assert_array_equal(own.draw, pred.draw)
        for name in ("melt", "mu"):
            np.testing.assert_allclose(own[name], cell[name].isel(chain=0), **CLOSE)


def test_scenarios_are_columns(grid, predictor, table):
    ds, fit = grid
    do = {"cold": {"warmth": 0.5}, "warm": {"warmth": 5}}
    params = {"do": json.dumps(do), "summary": ["mean", "prob>3"], "quantiles": [0.5], "seed": 3}
    answer = predictor.predict(table.head(5), params)
    pred = expected(ds, fit, table.head(5), do=do, seed=3, summary=("mean", "prob>3", 0.5))
    for name in do:
        at = pred.sel(scenario=name)
        np.testing.assert_allclose(answer[f"melt_mean[{name}]"], at.melt_mean, **CLOSE)
        found = answer[f"melt_quantile[0.5, {name}]"]
        np.testing.assert_allclose(found, at.melt_quantile.sel(quantile=0.5), **CLOSE)
        found = answer[f"melt_prob[>3, {name}]"]
        np.testing.assert_allclose(found, at.melt_prob.sel(threshold=">3"), atol=0.01)
    one = predictor.predict(table.head(5), {"do": {"warmth": 5.0}, "seed": 3})
    np.testing.assert_allclose(one.melt_mean, answer["melt_mean[warm]"], **CLOSE)


def test_sites_and_new_labels_are_asked_for_as_in_predict(grid, predictor, table):
    new = table[table.site == "b"].head(3).assign(site="somewhere")
    with pytest.raises(errors.LabelError, match=r"'rate'.*'somewhere'"):
        predictor.predict(new)
    answer = predictor.predict(new, {"new_labels": "sample", "sites": ["melt"]})
    assert {c.partition("_")[0] for c in answer} == {"melt"}
    ds, fit = grid
    there = ds.sel(time=new.time.to_numpy(), site=["a"]).assign_coords(site=["somewhere"])
    there["warmth"][:] = new.warmth.to_numpy()[:, None]
    pred = there.aimz.predict(fit, new_labels="sample", sites="melt", summary="mean")
    np.testing.assert_allclose(answer.melt_mean, pred.melt_mean[:, 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda t: t.drop(columns="warmth"), errors.MissingVariableError, "'warmth' .a variable"),
        (lambda t: t.drop(columns="site"), errors.MissingVariableError, "'site' .labels"),
        (lambda t: t.assign(site=1), errors.LabelError, "'site' holds 1"),
        (lambda t: t.assign(time="yesterday"), errors.LabelError, "'time' holds 'yesterday'"),
        (lambda t: t.assign(warmth="hot"), errors.DtypeError, "'warmth' holds 'hot'"),
        (lambda t: pd.concat([t, t]), errors.LabelError, r"rows \[0, 3\] have the same labels"),
        (
            lambda t: t.assign(forcing=[0.0, 1.0, 0.0]),
            errors.DimensionError,
            r"'forcing' has the values 1.0 and 0.0.*'time'",
        ),
        (lambda t: t.iloc[:0], errors.DimensionError, "no rows"),
        (lambda t: t.to_dict(), errors.DtypeError, "got a dict"),
        (
            lambda t: pd.concat([t, t[["site"]]], axis=1),
            errors.MissingVariableError,
            "several columns called",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(predictor, table, change, error, named):
    with pytest.raises(error, match=named):
        predictor.predict(change(table.head(3)))


@pytest.mark.parametrize(
    ("params", "error", "named"),
    [
        ({"quantile": [0.5]}, errors.OptionError, "'quantile'"),
        ({"returns": "samples"}, errors.OptionError, "'samples'"),
        ({"summary": [], "quantiles": []}, errors.OptionError, "ask for nothing"),
        ({"quantiles": [1.5]}, errors.OptionError, "1.5"),
        ({"draws": 1000}, errors.OptionError, "600 draws"),
        ({"do": "{warmth: 1}"}, errors.InterventionError, "is not JSON"),
        ({"do": '{"warmth": "hot"}'}, errors.InterventionError, "sets names to numbers"),
        ({"do": "[1]"}, errors.InterventionError, "sets names to numbers"),
        ({"do": '{"heat": 1}'}, Exception, "'heat'"),
        ({"new_labels": "ignore"}, errors.OptionError, "'ignore'"),
        ({"sites": ["snow"]}, errors.MissingVariableError, "'snow'"),
        ({"seed": 2**64}, errors.OptionError, "64 bits"),
        ({"seed": "a"}, errors.OptionError, "seed='a' is no whole number"),
        ({"seed": 0.5}, errors.OptionError, "seed=0.5"),
        ({"draws": float("inf")}, errors.OptionError, "draws=inf"),
        ({"quantiles": ["low"]}, errors.OptionError, "'low' is no number"),
        ({"quantiles": None}, errors.OptionError, "quantiles=None: give a list"),
        ({"summary": "mean"}, errors.OptionError, "summary='mean': give a list"),
        ({"do": '{"warm": {}}'}, errors.InterventionError, "set nothing"),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_name(predictor, table, params, error, named):
    with pytest.raises(error, match=named):
        predictor.predict(table.head(2), params)


def test_a_second_request_of_a_size_traces_and_compiles_nothing(grid, table, monkeypatch):
    fresh = PyfuncModel(grid[1])
    fresh.predict(table.head(5))
    programs = len(compile._compiled)
    traced = []
    make = jax.make_jaxpr
    monkeypatch.setattr(jax, "make_jaxpr", lambda *a, **k: traced.append(a) or make(*a, **k))
    answer = fresh.predict(table.iloc[5:10], {"seed": 5})
    assert len(answer) == 5
    assert not traced
    # Other numbers of rows of one time, padded to the same size.
    fresh.predict(table.iloc[12:19])
    fresh.predict(table.iloc[12:15])
    assert len(compile._compiled) == programs


@pytest.mark.slow
def test_threads_get_the_answers_that_one_gets(grid, table):
    fresh = PyfuncModel(grid[1])
    starts = list(range(0, 100, 5)) * 2
    gate = threading.Barrier(8)

    def ask(start):
        if start < 40:
            gate.wait(timeout=60)
        return fresh.predict(table.iloc[start : start + 8])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, starts))
    whole = fresh.predict(table)
    for start, answer in zip(starts, found, strict=True):
        np.testing.assert_allclose(answer, whole.iloc[start : start + 8], **CLOSE)


# Other kinds of fits.


def test_rows_without_labels_are_told_by_their_positions(line):
    ds, fit = line
    predictor = PyfuncModel(fit)
    table = ds[["x", "z"]].to_dataframe().reset_index(drop=True)
    pred = ds.aimz.predict(fit, summary=STATISTICS)
    assert_answers(predictor.predict(table), pred, "y")
    # A row elsewhere in a request has other noise, unless a column says which row it is.
    moved = predictor.predict(table.iloc[10:20])
    assert not np.allclose(moved.y_mean, pred.y_mean[10:20], **CLOSE)
    np.testing.assert_allclose(moved.y_mean, pred.y_mean[10:20], atol=0.1)
    named = predictor.predict(table.rename_axis("row").reset_index().iloc[10:20])
    assert_answers(named, pred.isel(row=slice(10, 20)), "y")


def vectors(x, codes, offset, y=None):
    """Two inputs with further dims, one without an observation dim, a vector outcome."""
    with xr_aimz.plate("time"):
        a = numpyro.sample("a", dist.Normal(0, 1))
        mean = x + (a + offset)[..., None] * jnp.asarray([1.0, 2.0])[codes][..., None]
        numpyro.sample("y", dist.Normal(mean, 1).to_event(1), obs=y)


@pytest.mark.slow
def test_further_dimensions_are_columns():
    rng = np.random.default_rng(1)
    days = xr.date_range("2001-02-28", periods=6, calendar="360_day", use_cftime=True)
    ds = xr.Dataset(
        {
            "x": (("time", "band"), rng.normal(size=(6, 2))),
            "codes": ("time", np.array([0, 1, 0, 1, 0, 1])),
            "offset": ((), 2.0),
            "y": (("time", "band"), rng.normal(size=(6, 2))),
        },
        {"time": days, "band": ["red", "green"]},
    )
    fit = ds.aimz.fit(vectors, method="laplace", draws=400)
    table = pd.DataFrame(
        {
            "time": [t.isoformat() for t in days],
            "x[green]": ds.x.sel(band="green"),
            "x[red]": ds.x.sel(band="red"),
            "codes": ds.codes.astype(float),
        }
    )
    answer = PyfuncModel(fit).predict(table.iloc[::-1])
    pred = ds.aimz.predict(fit, summary=("mean", 0.5)).isel(time=slice(None, None, -1))
    for band in ("red", "green"):
        at = pred.sel(band=band)
        np.testing.assert_allclose(answer[f"y_mean[{band}]"], at.y_mean, **CLOSE)
        found = answer[f"y_quantile[0.5, {band}]"]
        np.testing.assert_allclose(found, at.y_quantile.sel(quantile=0.5), **CLOSE)
    with pytest.raises(errors.MissingVariableError, match=r"x\[green\]"):
        PyfuncModel(fit).predict(table.drop(columns="x[green]"))
    with pytest.raises(errors.DtypeError, match=r"'codes'.*0.5"):
        PyfuncModel(fit).predict(table.assign(codes=0.5))
    assert isinstance(days[0], cftime.Datetime360Day)
    example = input_example(fit, rows=3)
    assert list(example) == ["time", "x[red]", "x[green]", "codes"]
    assert example.time.tolist() == [t.isoformat() for t in days[:3]]
    answered = PyfuncModel(fit).predict(example)
    np.testing.assert_allclose(answered, answer.iloc[::-1].head(3), **CLOSE)


@pytest.mark.slow
def test_a_table_model_with_features_on_a_grid():
    rng = np.random.default_rng(2)
    shape, dims = (5, 4), ("lat", "lon")
    ds = xr.Dataset(
        {n: (dims, rng.normal(size=shape)) for n in ("x", "z", "y")},
        {"lat": np.linspace(50, 54, 5), "lon": np.arange(4.0)},
    )
    fit = ds.aimz.fit(
        strategies.regression, {"X": ["x", "z"]}, layout="table", method="laplace", draws=400
    )
    table = ds.drop_vars("y").to_dataframe().reset_index().sample(13, random_state=0)
    # Whole degrees, as a spreadsheet writes them.
    table = table.assign(lat=table.lat.astype(int))
    assert_answers(PyfuncModel(fit).predict(table), expected(ds, fit, table), "y")


def cell(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@pytest.mark.slow
def test_fits_in_every_cell():
    rng = np.random.default_rng(3)
    dims = ("time", "lat")
    ds = xr.Dataset(
        {n: (dims, rng.normal(size=(20, 3))) for n in ("x", "y")},
        {"time": np.arange(20), "lat": [1.0, 2.0, 3.0]},
    )
    fit = ds.aimz.fit(cell, per="lat", method="laplace", draws=400)
    table = ds.drop_vars("y").to_dataframe().reset_index().sample(31, random_state=0)
    assert_answers(PyfuncModel(fit).predict(table), expected(ds, fit, table), "y")
    with pytest.raises(errors.AimzError, match=r"4\.0"):
        PyfuncModel(fit).predict(table.head(1).assign(lat=4.0))


def lagged(x, y=None):
    rho = numpyro.sample("rho", dist.Normal(0, 1))
    before = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
    numpyro.sample("y", dist.Normal(x + rho * before, 1), obs=y)


@pytest.fixture(scope="module")
def series():
    rng = np.random.default_rng(4)
    dims = ("time", "site")
    return xr.Dataset(
        {n: (dims, rng.normal(size=(10, 3))) for n in ("x", "y")},
        {"time": np.arange(10), "site": list("abc")},
    )


def test_series_of_a_core_dim_are_answered_whole(series):
    fit = series.aimz.fit(lagged, core_dim="time", method="laplace", draws=400)
    table = series.drop_vars("y").to_dataframe().reset_index().sample(frac=1, random_state=0)
    pred = expected(series, fit, table)
    assert_answers(PyfuncModel(fit).predict(table), pred, "y")
    assert len(input_example(fit)) == 10
    some = table[table.site != "b"]
    assert_answers(
        PyfuncModel(fit).predict(some), pred.isel(row=(table.site != "b").to_numpy()), "y"
    )


@pytest.mark.slow
def test_a_model_that_couples_rows_is_refused(series):
    # An answer would depend on which rows come together.
    fit = series.aimz.fit(lagged, method="laplace", draws=400)
    table = series.drop_vars("y").to_dataframe().reset_index()
    with pytest.raises(errors.ModelError, match="couples cells along 'time'"):
        PyfuncModel(fit).predict(table.head(1))


def counted(x, y=None):
    numpyro.deterministic("largest", x.max())
    rate = numpyro.sample("rate", dist.Exponential(1))
    numpyro.sample("y", dist.Poisson(rate * jnp.exp(x)), obs=y)


@pytest.mark.slow
def test_a_deterministic_of_all_rows_is_left_out_or_refused(series):
    ds = series.assign(y=np.abs(series.y * 2).round().astype(int))
    fit = ds.aimz.fit(counted, method="laplace", draws=400)
    table = ds.drop_vars("y").to_dataframe().reset_index()
    with pytest.raises(errors.ModelError, match=r"'largest'.*sites="):
        PyfuncModel(fit).predict(table)
    answer = PyfuncModel(fit).predict(table, {"sites": ["y"]})
    assert_answers(answer, expected(ds, fit, table, sites="y"), "y")
    # A gap in a grid has the values of a row, so that counts have no hole to fall into.
    some = table.drop(index=[3, 17])
    answer = PyfuncModel(fit).predict(some, {"sites": ["y"]})
    assert_answers(answer, expected(ds, fit, some, sites="y"), "y")


def fixed(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x + jnp.arange(10.0) * 0, 1), obs=y)


@pytest.mark.slow
def test_a_model_of_one_size_is_answered_at_that_size_where_it_is_said_to_be_whole(series):
    ds = series.isel(site=0, drop=True)
    table = ds.drop_vars("y").to_dataframe().reset_index()
    fit = ds.aimz.fit(fixed, core_dim="time", method="laplace", draws=400)
    assert_answers(PyfuncModel(fit).predict(table), expected(ds, fit, table), "y")
    # It counts positions, and rows may come in pieces.
    fit = ds.aimz.fit(fixed, method="laplace", draws=400)
    with pytest.raises(errors.ModelError, match=r"not proven.*'time'.*core_dim='time'"):
        PyfuncModel(fit).predict(table)


def spread(x, y=None):
    """A deterministic as long as the series is, less one."""
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.deterministic("step", b * jnp.diff(x, axis=0))
    numpyro.deterministic("rises", jnp.diff(x, axis=0) > 0)
    with xr_aimz.plate("time"), xr_aimz.plate("site"):
        numpyro.sample("y", dist.Normal(b * x, 1), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("returns", ["summary", "draws"])
def test_what_the_series_of_a_row_lacks_is_missing(series, returns):
    fit = series.aimz.fit(spread, core_dim="time", method="laplace", draws=400)
    table = series.drop_vars("y").to_dataframe().reset_index()
    some = table[(table.site != "b") | (table.time < 4)].reset_index(drop=True)
    params = {"returns": returns, "summary": ["mean"], "quantiles": []}
    predictor = PyfuncModel(fit)
    answer = predictor.predict(some, params)
    rows = answer["row"] if returns == "draws" else answer.index
    short = (some.site == "b").to_numpy()[rows]
    for i in range(9):
        found = answer[f"step_mean[{i}]" if returns == "summary" else f"step[{i}]"]
        assert found.isna().tolist() == (short & (i > 2)).tolist()
    alone = predictor.predict(some[some.site != "b"], params)
    whole, own = (t.drop(columns="row", errors="ignore") for t in (answer[~short], alone))
    np.testing.assert_allclose(whole.astype(float), own.astype(float), **CLOSE)
    if returns == "draws":
        # A bool that some rows lack.
        assert answer["rises[2]"].dtype == bool
        assert answer["rises[8]"].dtype == np.float64
        assert set(answer.loc[~short, "rises[8]"]) <= {0.0, 1.0}


def pairs(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    numpyro.sample("y", dist.Normal(x[..., None, None] * b, 1).to_event(2), obs=y)


@pytest.mark.slow
def test_two_columns_of_one_name_are_refused():
    rng = np.random.default_rng(6)
    ds = xr.Dataset(
        {"x": ("time", np.arange(6.0)), "y": (("time", "p", "q"), rng.normal(size=(6, 2, 2)))},
        {"time": range(6), "p": ["a", "a, b"], "q": ["b, c", "c"]},
    )
    fit = ds.aimz.fit(pairs, method="laplace", draws=400)
    table = ds[["x"]].to_dataframe().reset_index()
    for returns, name in (("summary", "y_mean"), ("draws", "y")):
        with pytest.raises(errors.LabelError, match=rf"'{name}\[a, b, c\]'.*other labels"):
            PyfuncModel(fit).predict(table, {"returns": returns})


def numbered(x, row=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("row", dist.Normal(b * x, 1), obs=row)


def test_an_outcome_called_as_a_column_of_draws_is_refused_there(series):
    ds = series.isel(site=0, drop=True).rename(y="row")
    fit = ds.aimz.fit(numbered, method="laplace", draws=400)
    table = ds[["x"]].to_dataframe().reset_index()
    with pytest.raises(errors.OptionError, match=r"'draws'.*\['row'\].*summary"):
        PyfuncModel(fit).predict(table, {"returns": "draws"})
    assert "row_mean" in PyfuncModel(fit).predict(table)


def twins(rain, other, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * rain.sum(-1) + other, 1), obs=y)


def test_two_columns_of_one_name_are_refused_before_a_request():
    ds = xr.Dataset(
        {"rain": (("time", "s"), np.ones((6, 2))), "rain[a]": ("time", np.arange(6.0))},
        {"time": range(6), "s": ["a", "b"]},
    ).assign(y=("time", np.arange(6.0)))
    given = {"rain": "rain", "other": "rain[a]"}
    fit = ds.aimz.fit(twins, given, method="laplace", draws=400)
    with pytest.raises(errors.LabelError, match=r"'rain\[a\]'"):
        PyfuncModel(fit)


def shifted(x, k, v, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x + k + v.sum(), 1), obs=y)


@pytest.mark.slow
def test_a_variable_of_no_row_may_be_given_where_it_is_the_same_in_all():
    ds = xr.Dataset(
        {"x": ("time", np.arange(6.0)), "y": ("time", np.arange(6.0))}, {"time": range(6)}
    ).assign(k=7.0, v=("q", [1.0, 2.0]))
    predictor = PyfuncModel(ds.aimz.fit(shifted, method="laplace", draws=400))
    table = ds[["x"]].to_dataframe().reset_index()
    known = predictor.predict(table)
    np.testing.assert_allclose(predictor.predict(table.assign(k=7.0)), known, **CLOSE)
    both = table.assign(**{"v[0]": 1.0, "v[1]": 2.0})
    np.testing.assert_allclose(predictor.predict(both), known, **CLOSE)
    other = predictor.predict(both.iloc[:1].assign(k=107.0))
    np.testing.assert_allclose(other.y_mean, known.y_mean[:1] + 100, rtol=1e-5)
    with pytest.raises(
        errors.DimensionError, match=r"'k' has the values 3.0 and 0.0 in rows 0 an"
    ):
        predictor.predict(table.assign(k=[0.0, 0.0, 0.0, 3.0, 0.0, 0.0]))


@pytest.mark.slow
def test_rows_that_share_labels_are_the_same_in_whatever_pieces_they_come():
    rng = np.random.default_rng(7)
    dims = ("time", "site")
    ds = xr.Dataset(
        {
            "warmth": (dims, rng.normal(size=(50, 60))),
            "forcing": ("time", np.linspace(0, 1, 50)),
            "melt": (dims, rng.normal(size=(50, 60))),
        },
        {"time": np.arange(50), "site": np.arange(60)},
    )
    fit = ds.aimz.fit(melting, method="laplace", draws=400)
    # Far apart, so that they are answered in several pieces, with one time in two of them.
    at = np.arange(50)
    table = pd.DataFrame({"time": at, "site": at, "warmth": 1.0, "forcing": 0.5})
    table = pd.concat([table, table.iloc[:1].assign(site=59)], ignore_index=True)
    assert len(PyfuncModel(fit).predict(table)) == 51
    table.loc[50, "forcing"] = 2.0
    with pytest.raises(errors.DimensionError, match=r"'forcing' has the values 2.0 and 0.5"):
        PyfuncModel(fit).predict(table)


def picked(x, k, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x + jnp.asarray([1.0, 2.0, 3.0])[k], 1), obs=y)


@pytest.mark.slow
def test_numbers_that_the_model_cannot_run_with_are_an_error_of_the_request():
    x = np.arange(6.0)
    ds = xr.Dataset(
        {"x": ("time", x), "k": ("time", np.arange(6) % 3), "y": ("time", x)}, {"time": range(6)}
    )
    predictor = PyfuncModel(ds.aimz.fit(picked, method="laplace", draws=400))
    table = ds[["x", "k"]].to_dataframe().reset_index()
    with pytest.raises(errors.InterventionError, match=r"do={'k': 2.0}.*2 and not 2.0"):
        predictor.predict(table, {"do": '{"k": 2.0}'})
    assert len(predictor.predict(table, {"do": '{"k": 2}'})) == 6


def tallied(x, count=None, y=None):
    rate = numpyro.sample("rate", dist.Exponential(1))
    numpyro.sample("y", dist.Normal(rate * x, 1), obs=y)
    numpyro.sample("count", dist.Poisson(rate * jnp.exp(x)), obs=count)


@pytest.mark.slow
def test_a_missing_number_that_counts_cannot_answer_is_told_by_row(series):
    ds = series.isel(site=0, drop=True)
    ds = ds.assign(count=np.abs(ds.y * 2).round().astype(int))
    fit = ds.aimz.fit(tallied, method="laplace", draws=400)
    table = ds[["x"]].to_dataframe().reset_index()
    gap = table.assign(x=table.x.where(table.time != 3))
    predictor = PyfuncModel(fit)
    with pytest.raises(errors.MissingValueError, match=r"rows \[3\].*'x'.*leave those rows out"):
        predictor.predict(gap)
    whole = predictor.predict(table)
    # What the message says can be done.
    others = predictor.predict(gap.drop(index=3))
    np.testing.assert_allclose(others, whole.drop(index=3), **CLOSE)
    filled = predictor.predict(gap.fillna({"x": 0.0})).drop(index=3)
    np.testing.assert_allclose(filled, whole.drop(index=3), **CLOSE)
    answer = predictor.predict(gap, {"sites": ["y"]})
    assert answer.y_mean.isna().tolist() == [i == 3 for i in range(10)]


def test_what_was_found_of_one_model_is_not_taken_for_anothers():
    """For one row the two are one program; only one of them couples rows."""

    def alone(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b * x, 1), obs=y)

    def centred(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        x = x - x.mean() if x.shape[0] > 1 else x
        numpyro.sample("y", dist.Normal(b * x, 1), obs=y)

    values = np.arange(8.0)
    ds = xr.Dataset({"x": ("time", values), "y": ("time", values)}, {"time": np.arange(8)})
    table = ds[["x"]].to_dataframe().reset_index()
    draws = {"b": np.linspace(0, 1, 6)[None]}
    PyfuncModel(ds.aimz.from_posterior(alone, draws)).predict(table.iloc[:1])
    other = PyfuncModel(ds.aimz.from_posterior(centred, draws))
    for rows in (1, 8):
        with pytest.raises(errors.ModelError, match="couples cells along 'time'"):
            other.predict(table.iloc[:rows])


def test_rows_of_a_recursion_without_its_past_are_refused():
    def walk(x, y=None):
        phi = numpyro.sample("phi", dist.Normal(0, 1))

        def step(before, now):
            x, y = now
            y = numpyro.sample("y", dist.Normal(phi * before + x, 0.1), obs=y)
            return y, None

        scan(step, 0.0, (x, y))

    ds = xr.Dataset({n: ("time", np.ones(6)) for n in "xy"}, {"time": np.arange(2000, 2006)})
    fit = ds.aimz.from_posterior(walk, {"phi": np.full((1, 3), 0.5)}, core_dim="time")
    rows = pd.DataFrame({"time": np.arange(2000, 2008), "x": 1.0})
    predictor = PyfuncModel(fit)
    whole = predictor.predict(rows)
    np.testing.assert_allclose(predictor.predict(rows.head(3)), whole.head(3), **CLOSE)
    for part in (rows.tail(2), rows.iloc[[0, 1, 3]]):
        with pytest.raises(errors.LabelError, match="'y' is made step by step along 'time'"):
            predictor.predict(part)
