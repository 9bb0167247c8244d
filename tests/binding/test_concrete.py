"""Models that read the values of an argument in Python: np.unique, int(x.max()), len(set(x))."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import xr_aimz
from xr_aimz.errors import ChunkError, InterventionError, MissingValueError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
LEVELS = {"level": np.array([[[1.0, 20.0, 300.0]] * 2], np.float32)}


def observe(level, department, y):
    numpyro.sample("y", dist.Normal(level[department], 1), obs=y)


def levels(size):
    with numpyro.plate("departments", size):
        return numpyro.sample("level", dist.Normal(0, 10))


def by_unique(department, y=None):
    names, codes = np.unique(department, return_inverse=True)
    observe(levels(len(names)), codes, y)


def by_maximum(department, y=None):
    observe(levels(int(department.max()) + 1), department, y)


def by_set(department, y=None):
    observe(levels(len(set(department))), department, y)


def by_list(department, y=None):
    observe(levels(len({int(d) for d in department.tolist()})), department, y)


def by_branch(department, y=None):
    observe(levels(3 if department.min() == 0 else 4), department, y)


def by_plate(department, y=None):
    observe(levels(department.max() + 1), department, y)


def with_size(department, n, y=None):
    observe(levels(n), department, y)


MODELS = [by_unique, by_maximum, by_set, by_list, by_branch, by_plate]


def dataset(codes=(0, 1, 2, 1, 0, 2)):
    rng = np.random.default_rng(0)
    values = {"department": ("time", list(codes)), "y": ("time", rng.normal(size=len(codes)))}
    return xr.Dataset(values, {"time": np.arange(len(codes))})


def fitted(model=by_unique, ds=None, **options):
    return (dataset() if ds is None else ds).aimz.from_posterior(model, LEVELS, **options)


@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_model_with_the_number_as_a_constant(model):
    ds, twin = dataset(), fitted(with_size, variables={"n": 3})
    fit = fitted(model)
    assert fit.sites["level"].dims == twin.sites["level"].dims
    xr.testing.assert_equal(ds.aimz.predict(fit).y.compute(), ds.aimz.predict(twin).y.compute())
    xr.testing.assert_equal(
        ds.aimz.log_likelihood(fit).y.compute(), ds.aimz.log_likelihood(twin).y.compute()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"warmup": 20, "chains": 1}, {"method": "svi", "steps": 20}, {"method": "laplace"}],
)
def test_every_method_fits_it(options):
    ds = dataset()
    ds["y"] = ds.y.where(ds.time != 3)
    options = {**options, "draws": 10, "progress": False}
    fit = ds.aimz.fit(by_unique, **options)
    twin = ds.aimz.fit(with_size, {"n": 3}, **options)
    np.testing.assert_array_equal(fit.posterior.level, twin.posterior.level)


def test_a_table_and_a_grid():
    grid = xr.Dataset(
        {"department": ("site", [2, 0, 1]), "y": (("time", "site"), np.zeros((4, 3)))}
    )

    def table(department, y=None):
        observe(levels(len(np.unique(department))), department, y)

    fit = grid.aimz.from_posterior(table, LEVELS, layout="table")
    found = grid.aimz.predict(fit).y.isel(chain=0, draw=0).compute()
    np.testing.assert_allclose(found, [[300, 1, 20]] * 4, atol=5)


def test_dims_that_the_argument_lacks_are_cut():
    grid = xr.Dataset(
        {"department": ("site", [2, 0, 1]), "y": (("time", "site"), np.zeros((4, 3)))}
    )
    fit = grid.aimz.from_posterior(by_unique, LEVELS)
    whole = grid.aimz.predict(fit).y
    parts = grid.drop_vars("department").chunk(time=2).assign(department=grid.department)
    pred = parts.aimz.predict(fit).y
    assert pred.chunksizes["time"] == (2, 2)
    xr.testing.assert_allclose(pred.compute(), whole.compute())
    with xr_aimz.set_options(block_bytes=1):
        # A Dataset in memory is cut elsewhere.
        assert grid.aimz.predict(fit).y.chunksizes["site"] == (3,)


def test_a_dim_of_the_argument_that_is_cut_is_refused_with_what_to_write():
    ds, fit = dataset(), fitted()
    for chunked in (ds.chunk(time=2), ds.chunk(time=3).assign(department=ds.department)):
        with pytest.raises(ModelError) as caught:
            chunked.aimz.predict(fit)
        parts = ["'department'", "['time'] are cut", "variables={'n': 7}", "xr_aimz.plate"]
        assert [p for p in parts if p not in str(caught.value)] == []


def test_other_values_than_the_fits_are_refused():
    """np.unique gives the codes 0 and 1 to departments 0 and 2: the second would be the first."""
    ds, fit = dataset(), fitted()
    others = [
        ds.isel(time=[0, 2]),
        ds.isel(time=slice(None, None, -1)),
        dataset((0, 0, 0, 0, 0, 2)),
    ]
    for other in others:
        with pytest.raises(ModelError, match=r"'department'.*others than at the fit"):
            other.aimz.predict(fit)
        with pytest.raises(ModelError, match=r"'department'.*others than at the fit"):
            other.aimz.log_likelihood(fit)
    lazy = dataset((0, 0, 0, 0, 0, 2)).chunk()
    with pytest.raises(ModelError, match=r"'department'.*others than at the fit"):
        lazy.aimz.predict(fit).compute()
    xr.testing.assert_equal(
        ds.chunk().aimz.predict(fit).y.compute(), ds.aimz.predict(fit).y.compute()
    )


def test_new_labels_with_the_same_values_are_predicted():
    later = dataset().drop_vars("y").assign_coords(time=np.arange(6) + 100)
    assert later.aimz.predict(fitted()).y.time.values[0] == 100


def test_a_saved_fit_has_the_values(tmp_path):
    fit = fitted()
    fit.save(tmp_path / "fit.zarr")
    loaded = xr_aimz.load_fit(tmp_path / "fit.zarr", by_unique)
    np.testing.assert_array_equal(loaded.binding.concrete["department"], [0, 1, 2, 1, 0, 2])
    ds = dataset()
    xr.testing.assert_identical(
        ds.aimz.predict(loaded).y.compute(), ds.aimz.predict(fit).y.compute()
    )
    with pytest.raises(ModelError, match="others than at the fit"):
        ds.isel(time=[0, 2]).aimz.predict(loaded)


@given(codes=st.lists(st.integers(0, 2), min_size=3, max_size=6).filter(lambda c: len({*c}) == 3))
def test_two_fits_that_differ_in_the_values_alone_are_two_programs(codes):
    """The values are constants of a program, and a name that lacked them would be shared."""
    ds = dataset(codes)
    pred = ds.aimz.predict(fitted(ds=ds)).y.isel(chain=0, draw=0)
    np.testing.assert_allclose(pred, np.array([1.0, 20.0, 300.0])[codes], atol=6)


@pytest.mark.slow
def test_a_fit_of_every_cell_reads_what_all_cells_share():
    rng = np.random.default_rng(0)
    ds = dataset().drop_vars("y").assign(y=(("lat", "time"), rng.normal(size=(2, 6))))
    options = {"per": "lat", "method": "laplace", "draws": 2, "progress": False}
    fit, twin = (
        ds.aimz.fit(by_unique, **options),
        ds.aimz.fit(with_size, {"n": 3}, **options),
    )
    np.testing.assert_array_equal(fit.posterior.level, twin.posterior.level)
    xr.testing.assert_equal(ds.aimz.predict(fit).y.compute(), ds.aimz.predict(twin).y.compute())
    each = ds.assign(department=ds.department.expand_dims(lat=2))
    with pytest.raises(ModelError, match=r"'department'.*per=\['lat'\]"):
        each.aimz.fit(by_unique, **options)


def test_batches_of_it_are_refused():
    with pytest.raises(ModelError, match=r"'department'.*\['time'\] are cut by batch="):
        dataset().aimz.fit(by_unique, method="svi", steps=5, batch={"time": 2}, progress=False)


def test_what_cannot_be_read_is_refused_by_name():
    ds = dataset()

    def of_outcome(department, y=None):
        level = levels(3)
        seen = None if y is None else np.log(y)
        numpyro.sample("log", dist.Normal(level[department], 1), obs=seen)

    with pytest.raises(ModelError, match=r"argument 'y'.*outcome.*jax\.numpy"):
        abs(ds).aimz.fit(of_outcome, progress=False)
    with pytest.raises(ChunkError, match=r"'department'.*is lazy.*\.load\(\)"):
        ds.chunk().aimz.fit(by_unique, progress=False)
    with pytest.raises(MissingValueError, match=r"'department'.*missing values"):
        ds.where(ds.time != 1).aimz.fit(by_maximum, progress=False)
    with pytest.raises(InterventionError, match=r"'department'.*jax\.numpy"):
        ds.aimz.predict(fitted(), do={"department": 2})


def test_only_the_arguments_that_it_needs_are_read():
    def two(department, x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        observe(levels(len(np.unique(department))) + slope * x[0], department, y)

    ds = dataset().assign(x=("time", np.ones(6)))
    fit = ds.aimz.from_posterior(two, {**LEVELS, "slope": np.ones((1, 2), np.float32)})
    assert set(fit.binding.concrete) == {"department"}
    shown = repr(ds.aimz.describe(fit))
    assert "input, its values read" in shown
    assert "constant" not in shown
    prior = ds.drop_vars("y").aimz.prior_predictive(two, draws=2, dim="time")
    assert prior.y.shape == (1, 2, 6)


def test_a_model_that_fails_for_another_reason_raises_its_own_error():
    def broken(department, y=None):
        raise LookupError("the model's own")

    with pytest.raises(LookupError, match="the model's own"):
        dataset().aimz.fit(broken, progress=False)

    def misshapen(department, y=None):
        numpyro.sample("y", dist.Normal(jnp.zeros(4) + department, 1), obs=y)

    with pytest.raises(TypeError, match="incompatible shapes"):
        dataset().aimz.fit(misshapen, progress=False)
