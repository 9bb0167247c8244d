"""What data are known by: equal for the same data in any process, and for no others."""

import functools
import importlib
import os
import subprocess
import sys
import threading

import dask
import dask.array as da
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from opened_files import CHANGED, OPENED, write_files

from xr_aimz.storage.identity import identify, lazy_name, saved_name

ROWS, COLUMNS = 12, 6
# Each step takes an array (row, column) and gives another, with a number that it depends on.
STEPS = {
    "add": lambda a, n: a + n,
    "scale": lambda a, n: a * (n + 2),
    "rows": lambda a, n: a.isel(row=slice(n % 3, None)),
    "columns": lambda a, n: a.isel(column=[n % 3, 0, 2]),
    "where": lambda a, n: a.where(a > n, -1.0),
    "shift": lambda a, n: a.shift(row=1 + n % 2, fill_value=0.0),
    "cumsum": lambda a, n: a.cumsum("row") + n,
    "mean": lambda a, n: a - a.mean("row") * n,
    "rechunk": lambda a, n: a.chunk(row=2 + n % 3),
    "function": lambda a, n: xr.apply_ufunc(
        lambda block: block + n, a, dask="parallelized", output_dtypes=[a.dtype]
    ),
    "blocks": lambda a, n: a.copy(data=a.data.map_blocks(functools.partial(np.add, n))),
    "reverse": lambda a, n: a.isel(row=slice(None, None, -1)) + n,
}
# How a step with another number can still give the same: slices by remainders.
_FOLDED = {"rows", "columns", "shift", "rechunk"}

steps = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 4)), max_size=5)


def lazy(values, chunks):
    """The values under a name that no other array has."""
    data = da.from_array(values, chunks=chunks, name=False)
    return xr.DataArray(data, dims=("row", "column"))


def made(values, chunks, todo):
    array = lazy(values, chunks)
    for name, number in todo:
        array = STEPS[name](array, number)
    return array


def digest(array):
    return identify(array.data).digest


@given(todo=steps, chunks=st.integers(2, 12))
@settings(max_examples=40)
def test_the_same_work_has_one_name_however_its_tasks_are_called(todo, chunks):
    values = np.arange(ROWS * COLUMNS, dtype=float).reshape(ROWS, COLUMNS)
    one, other = (made(values, (chunks, 3), todo) for _ in range(2))
    assert one.data.name != other.data.name or not todo
    assert digest(one) == digest(other)
    assert identify(one.data).unnamed == ()


@given(todo=steps, at=st.integers(0, ROWS * COLUMNS - 1))
@settings(max_examples=40)
def test_a_value_that_differs_by_one_ulp_has_another_name(todo, at):
    values = np.arange(1.0, ROWS * COLUMNS + 1).reshape(ROWS, COLUMNS)
    changed = values.copy()
    changed.flat[at] = np.nextafter(changed.flat[at], np.inf)
    assert digest(made(values, (4, 3), todo)) != digest(made(changed, (4, 3), todo))


@pytest.mark.slow
@given(todo=steps.filter(len), data=st.data())
@settings(max_examples=40)
def test_another_step_has_another_name(todo, data):
    values = np.arange(ROWS * COLUMNS, dtype=float).reshape(ROWS, COLUMNS)
    at = data.draw(st.integers(0, len(todo) - 1))
    name, number = todo[at]
    changed = list(todo)
    changed[at] = (name, number + (6 if name in _FOLDED else 1))
    one, other = made(values, (4, 3), todo), made(values, (4, 3), changed)
    # What differs in nothing that is computed may have one name.
    if one.shape != other.shape or not np.array_equal(one, other, equal_nan=True):
        assert digest(one) != digest(other)


def test_what_is_known_of_a_step_stands_on_the_code_that_it_runs():
    x = lazy(np.ones((4, 4)), (2, 2))

    def with_function(function):
        return identify(x.data.map_blocks(function, dtype=float)).digest

    def closed_over(table):
        return lambda block: block + table

    one, other = np.ones(4), np.array([1.0, 1.0, 1.0, np.nextafter(1.0, 2.0)])
    assert with_function(closed_over(one)) == with_function(closed_over(one.copy()))
    assert with_function(closed_over(one)) != with_function(closed_over(other))
    assert with_function(lambda b: b + 1) != with_function(lambda b: b + 2)
    assert with_function(lambda b, k=1: b + k) != with_function(lambda b, k=2: b + k)
    assert with_function(np.sin) != with_function(np.cos)


def test_a_global_that_a_function_refers_to_is_part_of_it():
    places = [{"K": k} for k in (1, 1, 2)]
    for place in places:
        exec("def f(b):\n    return b * K", place)
    one, same, other = (identify(place["f"]).digest for place in places)
    assert one == same != other


def test_a_recursive_function_has_a_name():
    def again(n):
        return again(n - 1) if n else 0

    assert identify(again).unnamed == ()


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ({"b", "a"}, {"a", "b"}, {"a", "c"}),
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}, {"x": 2, "y": 1}),
        (pd.Index(["a", "bb"]), np.array(["a", "bb"]), pd.Index(["a", "b"])),
        (pd.RangeIndex(3), pd.Index([0, 1, 2]), pd.Index([0, 1, 3])),
        (np.float64(0.0), np.float64(0.0), np.float64(-0.0)),
        (np.zeros((2, 3)), np.zeros((3, 2)).reshape(2, 3), np.zeros((3, 2))),
        (np.arange(6)[::2], np.array([0, 2, 4]), np.array([0, 2, 5])),
        (pd.date_range("2000", periods=2), pd.date_range("2000", periods=2), ["2000"]),
        (threading.Lock(), threading.RLock(), None),
        (slice(1, 2), slice(1, 2), slice(1, 3)),
        (1, 1, True),
        ("1", "1", 1),
        ((1, 2), (1, 2), [1, 2]),
    ],
)
def test_values(one, same, other):
    assert identify(one).digest == identify(same).digest
    assert identify(one).digest != identify(other).digest


def test_dates_of_a_calendar_go_by_what_they_say():
    pytest.importorskip("cftime")
    days = [
        xr.date_range("2000-01-01", periods=3, freq=freq, calendar="360_day", use_cftime=True)
        for freq in ("D", "D", "MS")
    ]
    one, same, other = (identify(index).digest for index in days)
    assert one == same != other


class Opaque:
    """An array that cannot be taken apart: it holds what has no content."""

    shape, dtype, ndim = (4,), np.dtype(float), 1

    def __init__(self):
        self.local = threading.local()

    def __getitem__(self, region):
        return np.ones(4)[region]


def test_what_cannot_be_taken_apart_is_said():
    found = identify(da.from_array(Opaque(), chunks=2))
    assert found.unnamed == ("an object of _thread._local",)
    # In this process it has a name all the same, and no other has that.
    array, other = (da.from_array(Opaque(), chunks=2) for _ in range(2))
    assert identify(array) == identify(array)
    assert identify(array).digest != identify(other).digest


def test_a_name_that_a_person_gave_stands_for_what_cannot_be_looked_at():
    arrays = [da.from_array(Opaque(), chunks=2, name=name) for name in ("tas", "tas", "pr")]
    one, same, other = (identify(array) for array in arrays)
    assert one == same
    assert one.digest != other.digest
    assert one.unnamed == ()
    # What can be looked at goes by its content under any name.
    named = [da.from_array(np.full(4, v), chunks=2, name="tas") for v in (1.0, 2.0)]
    assert identify(named[0]).digest != identify(named[1]).digest


@pytest.mark.parametrize("package", ["h5py", "netCDF4"])
def test_an_array_of_an_open_file_goes_by_the_file_and_its_name(tmp_path, package):
    opened = getattr(pytest.importorskip(package), {"h5py": "File"}.get(package, "Dataset"))
    write_files(tmp_path)
    with opened(tmp_path / "all.nc", "r") as one, opened(tmp_path / "part0.nc", "r") as other:
        # Under one name: what can be looked at is.
        named = [da.from_array(f[v], name="x") for f, v in ((one, "x"), (one, "y"), (other, "x"))]
        found = [identify(array) for array in named]
    assert len({i.digest for i in found}) == 3
    assert all(i.unnamed == () for i in found)
    with opened(tmp_path / "all.nc", "r") as again:
        assert identify(da.from_array(again["x"], name="x")) == found[0]


def test_random_numbers_without_a_seed_have_no_name_that_stays():
    assert identify(da.random.default_rng().normal(size=4)).unnamed
    seeded = [identify(da.random.default_rng(s).normal(size=4)) for s in (3, 3, 4)]
    assert seeded[0] == seeded[1]
    assert seeded[0].digest != seeded[2].digest
    assert not seeded[0].unnamed


def test_functions_of_scipy_and_jax_have_names():
    cdf, other = (lambda b, f=f: f(b) for f in (scipy.stats.norm(0, 1).cdf, scipy.stats.norm.sf))
    assert identify(cdf).unnamed == ()
    assert identify(cdf).digest != identify(other).digest
    one, other = (jax.jit(lambda b, k=k: b + k) for k in (1, 2))
    assert identify(one).unnamed == ()
    assert identify(one).digest != identify(other).digest


def test_nothing_is_computed():
    def raises(block):
        raise AssertionError

    array = lazy(np.ones((4, 4)), (2, 2)).data.map_blocks(
        raises, dtype=float, meta=np.empty((0, 0))
    )
    with dask.config.set(scheduler=raises):
        identify(array)


def test_a_graph_that_was_written_out_has_its_own_name():
    x = lazy(np.ones((4, 4)), (2, 2)).data + 1
    assert identify(dask.optimize(x)[0]).unnamed == ()
    assert identify(x.persist()) == identify((lazy(np.ones((4, 4)), (2, 2)).data + 1).persist())


def test_delayed_values_go_by_their_functions_and_arguments():
    made = [da.from_delayed(dask.delayed(np.full)(4, v), (4,), float) for v in (1.0, 1.0, 2.0)]
    one, same, other = (identify(array).digest for array in made)
    assert one == same != other


def test_an_array_of_a_store_has_the_name_that_was_kept_with_it():
    array = da.from_array(np.ones(3), name=saved_name("xarray-slope-0f"))
    assert lazy_name(array) == "xarray-slope-0f"


def every_name(folder):
    """The name of each way to open the files and change what is in them."""
    return {
        f"{how}: {change}": identify(CHANGED[change](opened(folder)).x.variable)
        for how, opened in OPENED.items()
        if how != "h5netcdf" or _has("h5netcdf")
        for change in CHANGED
    }


def _has(package):
    return any((os.path.isdir(os.path.join(p, package))) for p in sys.path)


def in_process(folder, hash_seed):
    """What another process calls them: its lines."""
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "import test_identity as t\n"
        "for name, found in t.every_name(pathlib.Path(sys.argv[1])).items():\n"
        "    print(name, found.digest, found.unnamed)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_two_processes_have_the_same_names_for_what_they_open(tmp_path):
    write_files(tmp_path)
    one, other = (in_process(tmp_path, seed) for seed in ("1", "2"))
    assert one == other
    assert len(one) >= 7 * len(CHANGED)
    assert all(line.endswith("()") for line in one)
    # Every way is a name of its own, but where a change has loaded what it changes.
    here = every_name(tmp_path)
    assert sorted(f"{n} {i.digest} ()" for n, i in here.items()) == sorted(one)


@pytest.mark.parametrize("how", ["netcdf", "netcdf, dask", "zarr", "zarr without dask"])
def test_a_file_that_was_written_anew_has_another_name(tmp_path, how):
    write_files(tmp_path)

    def name():
        with OPENED[how](tmp_path) as ds:
            return identify(ds.chunk(t=2).x.data)

    before = name()
    assert name() == before
    if how.startswith("zarr"):
        zarr.open_array(tmp_path / "all.zarr", path="x", mode="r+")[0, 0] = 7.0
    else:
        os.utime(tmp_path / "all.nc", ns=(0, 1))
    after = name()
    assert after.digest != before.digest
    (origin,) = {k for k in before.origins if before.origins[k] != after.origins.get(k)}
    assert str(tmp_path) in origin


def test_a_function_of_a_module_of_ones_own_goes_by_what_it_refers_to(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tables_of_mine.py").write_text("SCALE = 2\ndef twice(x):\n    return 2 * x\n")
    (tmp_path / "steps_of_mine.py").write_text(
        "import tables_of_mine as tables\nfrom tables_of_mine import twice\nOFFSET = 1\n"
        "def helper(x):\n    return twice(x) + OFFSET\n"
        "def through_functions(x):\n    return helper(x)\n"
        "def through_a_module(x):\n    return x * tables.SCALE\n"
        "class Scaled:\n    def __init__(self, by):\n        self.by = by\n"
        "    def __call__(self, x):\n        return x * self.by + OFFSET\n"
    )
    steps_of_mine = importlib.import_module("steps_of_mine")
    scaled = steps_of_mine.Scaled

    def names():
        functions = (steps_of_mine.through_functions, steps_of_mine.through_a_module, scaled(2))
        return [identify(function).digest for function in functions]

    one = names()
    assert names() == one
    assert identify(scaled(3)).digest != one[2]
    steps_of_mine.tables.SCALE = 3
    assert [a == b for a, b in zip(names(), one, strict=True)] == [True, False, True]
    steps_of_mine.OFFSET = 5
    assert [a == b for a, b in zip(names(), one, strict=True)] == [False, False, False]


def test_a_title_stands_for_nothing_that_can_be_looked_at():
    class Held(Opaque):
        def __init__(self, value):
            self.value = value

    named = [da.from_array(Held(value), chunks=2, name="tas") for value in (1.0, 1.0, 2.0)]
    one, same, other = (identify(array).digest for array in named)
    assert one == same != other


def test_a_summary_goes_by_its_draws_and_not_by_their_history():
    draws = xr.Dataset({"y": (("chain", "draw", "t"), np.arange(24.0).reshape(2, 3, 4))})
    lazy = draws.chunk(t=2)
    first, again, other = (
        identify(ds.aimz.summary("mean").y_mean.variable).digest
        for ds in (
            lazy.assign_attrs(history="at noon"),
            lazy.assign_attrs(history="in the evening"),
            (draws + 1).chunk(t=2),
        )
    )
    assert first == again
    assert first != other
