"""Results on disk: what comes back is what went in, and a torn store says so."""

import subprocess
import sys

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

from xr_aimz.errors import IncompleteStoreError, OptionError, SpaceError, StoreError
from xr_aimz.storage import completeness
from xr_aimz.storage.results import open_zarr, to_zarr


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "tas": (
                ("chain", "draw", "time", "lat"),
                rng.normal(size=(2, 6, 5, 3)).astype(np.float32),
                {"units": "K", "long_name": "temperature"},
            ),
            "count": (("chain", "draw", "time"), rng.integers(0, 9, (2, 6, 5), np.int32)),
            "wet": (("chain", "draw"), rng.random((2, 6)) < 0.5),
        },
        {
            "chain": [0, 1],
            "draw": np.arange(6),
            "time": xr.date_range("2000-01-01", periods=5),
            "lat": [10.0, 20.0, 30.0],
            "height": ((), 2.0, {"units": "m"}),
            "area": ("lat", [1.0, 2.0, 3.0]),
        },
        {"history": "made", "title": "draws"},
    )


def reads(path):
    return xr.open_zarr(path, consolidated=True)


@pytest.mark.parametrize(
    "chunks", [{}, {"lat": 2}, {"time": 2, "draw": 4}, {"lat": 1, "chain": 1}]
)
def test_a_round_trip_is_identical(ds, tmp_path, chunks):
    back = to_zarr(ds.chunk(chunks), tmp_path / "out.zarr")
    xr.testing.assert_identical(back.load(), ds)
    assert {n: a.dtype for n, a in back.variables.items()} == {
        n: a.dtype for n, a in ds.variables.items()
    }


def test_the_accessor_does_the_same(ds, tmp_path):
    back = ds.chunk(lat=2).aimz.to_zarr(str(tmp_path / "out.zarr"), progress=False)
    xr.testing.assert_identical(back.load(), ds)


def test_what_comes_back_is_lazy_in_the_chunks_that_went_in(ds, tmp_path):
    back = to_zarr(ds.chunk(time=2, lat=2), tmp_path / "out.zarr")
    assert isinstance(back.tas.data, da.Array)
    assert back.tas.chunks == ((2,), (6,), (2, 2, 1), (2, 1))


def test_a_dataset_in_memory_is_written_too(ds, tmp_path):
    xr.testing.assert_identical(to_zarr(ds, tmp_path / "out.zarr").load(), ds)


def test_others_read_the_store_and_find_it_whole(ds, tmp_path):
    path = tmp_path / "out.zarr"
    to_zarr(ds.chunk(lat=2), path)
    xr.testing.assert_identical(reads(path).load(), ds)
    xr.testing.assert_identical(xr.open_dataset(path, engine="zarr", chunks=None).load(), ds)
    group = zarr.open_group(path, mode="r")
    assert group.attrs.asdict() == ds.attrs
    assert group.metadata.zarr_format == 3
    assert group.metadata.consolidated_metadata is not None


@pytest.mark.parametrize(
    "chunks",
    [
        {"time": (1, 3, 1)},
        {"time": (3, 1, 1), "lat": (1, 2)},
        {"time": (2, 2, 1), "lat": (1, 2), "draw": (5, 1)},
        {"draw": (1, 4, 1), "chain": (1, 1)},
    ],
)
def test_irregular_chunks_are_written_whole(ds, tmp_path, chunks):
    back = to_zarr(ds.chunk(chunks), tmp_path / "out.zarr")
    xr.testing.assert_identical(back.load(), ds)


def test_zeros_and_missing_values_come_back(ds, tmp_path):
    # A chunk that was never written reads as the fill value.
    plain = ds.assign(tas=ds.tas * 0, count=ds["count"] * 0)
    gappy = plain.assign(tas=plain.tas.where(plain.lat != 20))
    xr.testing.assert_identical(to_zarr(gappy.chunk(lat=1), tmp_path / "out.zarr").load(), gappy)


def test_a_store_that_exists_is_not_overwritten(ds, tmp_path):
    path = tmp_path / "out.zarr"
    ds.to_zarr(path, zarr_format=3)
    for store in (path, str(path)):
        with pytest.raises(StoreError, match="mode='w'") as caught:
            to_zarr(ds * 2, store)
        with pytest.raises(StoreError, match="mode='w'"):
            to_zarr(ds, store)
        assert repr(str(path)) in str(caught.value)
        assert isinstance(caught.value, FileExistsError)
    xr.testing.assert_identical(reads(path).load(), ds)


def test_a_store_is_replaced_where_that_is_asked(ds, tmp_path):
    path = tmp_path / "out.zarr"
    to_zarr(ds.chunk(lat=1), path)
    other = ds[["tas"]].isel(lat=[0]) + 1
    back = to_zarr(other.chunk(time=2), path, mode="w")
    xr.testing.assert_identical(back.load(), other)
    xr.testing.assert_identical(reads(path).load(), other)


@pytest.mark.parametrize("mode", ["a", "r+", None])
def test_another_mode_is_refused_with_those_there_are(ds, tmp_path, mode):
    with pytest.raises(StoreError, match="'w-' and 'w'") as caught:
        to_zarr(ds, tmp_path / "out.zarr", mode=mode)
    assert repr(mode) in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()


class Watched:
    """An array that notes what is read of it, and breaks down after so many reads."""

    def __init__(self, values, most):
        self.values, self.most, self.read = values, most, []
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, region):
        if len(self.read) == self.most:
            raise RuntimeError("cut")
        self.read.append(region[-1].start)
        return self.values[region]

    def __dask_tokenize__(self):
        # One name whatever happens: that of what is computed.
        return "tas-of-the-test"


def watched(ds, most=None):
    """The Dataset in blocks of a latitude, and what has been read of its ``tas``."""
    lazy, source = ds.chunk(lat=1), Watched(ds.tas.values, most)
    data = da.from_array(source, lazy.tas.data.chunks, meta=np.empty((0,) * 4, "f4"))
    return lazy.assign(tas=lazy.tas.copy(data=data)), source


def interrupted(ds, path):
    """A write that breaks down with one latitude to go: which were written."""
    lazy, source = watched(ds, most=2)
    with pytest.raises(RuntimeError, match="cut"), dask.config.set(scheduler="sync"):
        to_zarr(lazy, path)
    return source.read


def test_an_interrupted_write_cannot_be_opened(ds, tmp_path):
    path = tmp_path / "out.zarr"
    interrupted(ds, path)
    for read in (reads, xr.open_zarr, zarr.open_group):
        with pytest.raises((FileNotFoundError, zarr.errors.GroupNotFoundError)):
            read(path, mode="r") if read is zarr.open_group else read(path)
    with pytest.raises(IncompleteStoreError, match="blocks that are missing") as caught:
        open_zarr(path)
    assert "'tas' 1 of 3" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_a_write_goes_on_where_it_was_cut_short(ds, tmp_path):
    path = tmp_path / "out.zarr"
    there = interrupted(ds, path)
    lazy, source = watched(ds)
    back = to_zarr(lazy, path)
    assert sorted(there + source.read) == [0, 1, 2]
    xr.testing.assert_identical(back.load(), ds)
    xr.testing.assert_identical(open_zarr(path).load(), ds)
    assert not (path / "xr_aimz" / "done").exists()
    # Whole: it is opened, and nothing is computed.
    xr.testing.assert_identical(to_zarr(watched(ds, most=0)[0], path).load(), ds)


def test_other_results_do_not_go_on_in_a_store(ds, tmp_path):
    path = tmp_path / "out.zarr"
    interrupted(ds, path)
    for other in (ds.chunk(lat=1) * 2, ds.chunk(lat=2)):
        with pytest.raises(StoreError, match="other results"):
            to_zarr(other, path)
    with pytest.raises(StoreError, match="other results"):
        to_zarr(ds.chunk(lat=1), path, precision=9)
    with pytest.raises(StoreError, match="exists"):
        to_zarr(ds.chunk(lat=1), path, resume=False)
    xr.testing.assert_identical(to_zarr(ds * 2, path, mode="w").load(), ds * 2)


@pytest.mark.skipif(
    pd.__version__ < "3",
    reason="an index of pandas 2 has strings of fixed length, of which Zarr warns",
)
@pytest.mark.parametrize("values", [["a", "bb", "ccc"], ["ä", "ß-long-name", ""]])
def test_strings_come_back_without_a_warning(ds, tmp_path, values):
    named = ds.assign_coords(lat=values, kind=("lat", values[::-1]), run="r1i1p1")
    back = to_zarr(named.chunk(time=2), tmp_path / "out.zarr").load()
    assert back.lat.values.tolist() == values
    assert back.kind.values.tolist() == values[::-1]
    assert back.run.item() == "r1i1p1"
    xr.testing.assert_equal(back, named)
    assert back.kind.dtype.kind in "UOT"


STRINGS = {
    "fixed": np.array(["a", "bb", "ccc"]),
    "objects": np.array(["a", "bb", "ccc"], object),
    "of any length": np.array(["a", "bb", "ccc"], np.dtypes.StringDType()),
}


@pytest.mark.parametrize("kind", STRINGS)
@pytest.mark.parametrize("lazy", [False, True])
def test_strings_come_back_in_the_dtype_that_they_had(ds, tmp_path, kind, lazy):
    values, path = STRINGS[kind], tmp_path / "out.zarr"
    named = ds.assign_coords(lat=values, kind=("lat", values), run=((), values[1])).assign(
        word=("lat", values)
    )
    chunked = named.chunk(lat=2) if lazy else named.assign(tas=named.tas.chunk(lat=2))
    assert (chunked.kind.chunks is not None) == lazy
    for back in (to_zarr(chunked, path), open_zarr(path), to_zarr(chunked, path)):
        for name in ("lat", "kind", "run", "word"):
            assert back[name].dtype == chunked[name].dtype, name
        xr.testing.assert_identical(back.load(), named)


def test_calendar_dates_come_back(ds, tmp_path):
    pytest.importorskip("cftime")
    days = xr.date_range("2000-02-28", periods=5, calendar="360_day", use_cftime=True)
    dated = ds.assign_coords(time=days)
    back = to_zarr(dated.chunk(time=2), tmp_path / "out.zarr").load()
    xr.testing.assert_identical(back, dated)


def test_a_write_computes_each_block_once(ds, tmp_path):
    computed = []

    def count(block, block_info=None):
        computed.append(block_info[0]["chunk-location"])
        return block

    lazy = ds[["tas"]].chunk(time=2, lat=2)
    counted = lazy.assign(tas=lazy.tas.copy(data=lazy.tas.data.map_blocks(count, dtype="f4")))
    to_zarr(counted, tmp_path / "out.zarr")
    assert len(computed) == len(set(computed)) == 6


def test_a_write_does_not_change_what_is_written(ds, tmp_path):
    lazy = ds.chunk(lat=2)
    before = lazy.copy(deep=True)
    to_zarr(lazy, tmp_path / "out.zarr")
    xr.testing.assert_identical(lazy, before)
    assert lazy.chunks == before.chunks


def test_progress_is_shown_where_it_is_asked_for(ds, tmp_path, capsys):
    to_zarr(ds.chunk(lat=1), tmp_path / "quiet.zarr", progress=False)
    assert capsys.readouterr().err == ""
    to_zarr(ds.chunk(lat=1), tmp_path / "loud.zarr", progress=True)
    assert "to_zarr" in capsys.readouterr().err


def test_writing_does_not_import_distributed(tmp_path):
    # Half a second, to look for a client that nobody has made.
    path = tmp_path / "out.zarr"
    program = (
        "import sys, numpy, xarray, xr_aimz\n"
        "ds = xarray.Dataset({'a': ('x', numpy.zeros(4))}).chunk(x=2)\n"
        f"ds.aimz.to_zarr({str(path)!r})\n"
        "print('distributed' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    assert reads(path).sizes == {"x": 4}


def test_shards_hold_whole_blocks(ds, tmp_path):
    path = tmp_path / "out.zarr"
    back = to_zarr(ds[["tas"]].chunk(time=1, lat=1), path, shards={"time": 3, "lat": 2})
    xr.testing.assert_identical(back.load(), ds[["tas"]])
    array = zarr.open_array(path, path="tas")
    assert (array.shards, array.chunks) == ((2, 6, 3, 2), (2, 6, 1, 1))
    assert len([p for p in (path / "tas" / "c").rglob("*") if p.is_file()]) == 2 * 2


def test_shards_that_cut_a_block_are_made_whole(ds, tmp_path):
    back = to_zarr(ds[["tas"]].chunk(time=2), tmp_path / "out.zarr", shards={"time": 3})
    assert back.tas.encoding["shards"][2] == 4
    xr.testing.assert_identical(back.load(), ds[["tas"]])


@pytest.mark.parametrize("bits", [1, 10, 22])
def test_precision_rounds_floats_and_nothing_else(ds, tmp_path, bits):
    gappy = ds.assign(tas=ds.tas.where(ds.lat != 20))
    back = to_zarr(gappy.chunk(lat=1), tmp_path / "out.zarr", precision=bits).load()
    error = abs(back.tas - gappy.tas) / abs(gappy.tas)
    assert float(error.max()) <= 2.0 ** -(bits + 1)
    assert float(error.max()) > 2.0 ** -(bits + 2)
    assert (back.tas.isnull() == gappy.tas.isnull()).all()
    xr.testing.assert_identical(back.drop_vars("tas"), gappy.drop_vars("tas"))


def test_fewer_bits_are_fewer_bytes(tmp_path):
    noise = np.random.default_rng(0).normal(size=(1000, 1000)).astype("f4")
    lazy = xr.Dataset({"a": (("x", "y"), noise)}).chunk(x=250)
    for bits, name in ((None, "all"), (10, "ten")):
        to_zarr(lazy, tmp_path / name, precision=bits)
    sizes = [
        sum(p.stat().st_size for p in (tmp_path / name).rglob("*") if p.is_file())
        for name in ("all", "ten")
    ]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    "options", [{"precision": 0}, {"precision": 2.5}, {"shards": {"lat": 0}}, {"shards": {"h": 2}}]
)
def test_options_without_sense_are_refused(ds, tmp_path, options):
    with pytest.raises(OptionError):
        to_zarr(ds.chunk(lat=1), tmp_path / "out.zarr", **options)
    assert not (tmp_path / "out.zarr").exists()


def test_lazy_calendar_dates_come_back(ds, tmp_path):
    pytest.importorskip("cftime")
    days = xr.date_range("2000-02-28", periods=5, calendar="360_day", use_cftime=True)
    dated = ds.assign_coords(day=("time", days))
    back = to_zarr(dated.chunk(time=2), tmp_path / "out.zarr").load()
    xr.testing.assert_identical(back, dated)


def test_results_larger_than_the_disk_are_refused_before_any_work(tmp_path):
    petabytes = xr.Dataset({"a": (("x", "y"), da.zeros((10**8, 10**7), chunks=10**6))})
    with pytest.raises(SpaceError, match=r"8e\+06 GB.* GB free") as caught:
        to_zarr(petabytes, tmp_path / "out.zarr")
    assert isinstance(caught.value, OSError)
    assert not (tmp_path / "out.zarr").exists()


def test_dates_and_flags_that_are_lazy_are_encoded(ds, tmp_path):
    days = ds.time.variable.values
    lazy = ds[["wet"]].assign(day=("time", days), gap=("time", days - days[0])).chunk(time=2)
    back = to_zarr(lazy, tmp_path / "out.zarr").load()
    xr.testing.assert_identical(back, lazy.load())
    assert back.wet.dtype == bool


def test_coordinates_stay_with_their_variables(ds, tmp_path):
    path = tmp_path / "out.zarr"
    to_zarr(ds.chunk(lat=1), path)
    attrs = zarr.open_array(path, path="tas").attrs.asdict()
    assert set(attrs["coordinates"].split()) == {"area", "height"}
    assert "coordinates" not in zarr.open_group(path).attrs.asdict()


@pytest.mark.parametrize("kind", ["memory store", "memory url"])
def test_any_store_of_zarr_will_do(ds, kind):
    store = zarr.storage.MemoryStore() if kind == "memory store" else "memory://xr_aimz/out.zarr"
    back = to_zarr(ds.chunk(lat=1), store)
    xr.testing.assert_identical(back.load(), ds)
    with pytest.raises(StoreError, match="other results"):
        to_zarr(ds.chunk(lat=1) + 1, store)
    xr.testing.assert_identical(to_zarr(ds.chunk(lat=1), store).load(), ds)


def test_a_chunk_of_nothing_but_the_fill_value_is_written(tmp_path):
    path = tmp_path / "out.zarr"
    to_zarr(xr.Dataset({"a": ("x", np.zeros(4))}).chunk(x=2), path)
    assert sorted(p.name for p in (path / "a" / "c").iterdir()) == ["0", "1"]


def test_a_clearing_that_is_killed_leaves_no_marks_behind(ds, tmp_path):
    path = tmp_path / "out.zarr"
    interrupted(ds, path)
    # What clearing does first: whatever it comes to, no later write trusts what is left.
    store = completeness.as_store(path)
    cleared = []
    store.clear = lambda: cleared.append(True) or nothing()
    completeness.clear_store(store)
    assert cleared
    assert completeness.read_manifest(completeness.as_store(path)) is None
    assert completeness.written_blocks(completeness.as_store(path)) == set()


async def nothing():
    pass


def test_another_layout_is_no_write_to_go_on_with(ds, tmp_path):
    path = tmp_path / "out.zarr"
    interrupted(ds, path)
    with pytest.raises(StoreError, match="other results"):
        to_zarr(watched(ds)[0], path, shards={"lat": 1})


def test_other_attrs_are_other_results(ds, tmp_path):
    path = tmp_path / "out.zarr"
    to_zarr(ds.chunk(lat=1), path)
    with pytest.raises(StoreError, match="other results"):
        to_zarr(ds.chunk(lat=1).assign(tas=ds.tas.chunk(lat=1).assign_attrs(units="degC")), path)
    again = to_zarr(ds.chunk(lat=1).assign_attrs(history="made later"), path)
    xr.testing.assert_equal(again.load(), ds)


def test_a_store_is_not_replaced_by_what_is_read_from_it(ds, tmp_path):
    path = tmp_path / "out.zarr"
    stored = to_zarr(ds.chunk(lat=1), path)
    with pytest.raises(StoreError, match="from which these results are read"):
        to_zarr(stored[["tas"]] * 2, path, mode="w")
    with pytest.raises(StoreError, match="from which these results are read"):
        to_zarr(stored[["tas"]] * 2, tmp_path, mode="w")
    xr.testing.assert_identical(reads(path).load(), ds)


def test_attrs_of_numpy_are_written_and_none_changes_a_value(ds, tmp_path):
    odd = {"valid_range": np.array([0.0, 1.0]), "x": np.float32(2), "missing_value": 0.0}
    lazy = ds[["tas"]].assign_attrs(levels=np.arange(3)).chunk(lat=1)
    lazy = lazy.assign(tas=(lazy.tas * 0).assign_attrs(odd))
    back = to_zarr(lazy, tmp_path / "out.zarr").load()
    assert (back.tas == 0).all()
    assert {"valid_range": [0.0, 1.0], "x": 2.0}.items() <= back.tas.attrs.items()
    assert "missing_value" not in back.tas.attrs
    assert back.attrs["levels"] == [0, 1, 2]


def test_lazy_dates_of_a_file_are_written(ds, tmp_path):
    ref = xr.DataArray(ds.time.values, dims="time").chunk(time=2)
    ref.encoding = {"units": "days since 2000-01-01", "dtype": "int64"}
    dated = ds[["wet"]].assign_coords(ref=ref)
    dated.to_zarr(tmp_path / "in.zarr", zarr_format=3)
    opened = xr.open_zarr(tmp_path / "in.zarr")
    assert opened.ref.chunks is not None
    back = to_zarr(opened, tmp_path / "out.zarr").load()
    np.testing.assert_array_equal(back.ref, ds.time)
