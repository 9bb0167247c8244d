"""Results on disk: what comes back is what went in, and a torn store says so."""

import json
import subprocess
import sys

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr

from xr_aimz.errors import StoreError
from xr_aimz.store import INCOMPLETE, to_zarr


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
    assert INCOMPLETE not in group.attrs
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
    to_zarr(ds, path)
    for store in (path, str(path)):
        with pytest.raises(StoreError, match="mode='w'") as caught:
            to_zarr(ds * 2, store)
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


def test_an_interrupted_write_says_so(ds, tmp_path):
    def break_down(block, block_info=None):
        if block_info[0]["chunk-location"][-1] == 2:
            raise KeyboardInterrupt
        return block

    lazy = ds.chunk(lat=1)
    torn = lazy.assign(
        tas=lazy.tas.copy(data=lazy.tas.data.map_blocks(break_down, dtype=lazy.tas.dtype))
    )
    path = tmp_path / "out.zarr"
    with pytest.raises(KeyboardInterrupt):
        to_zarr(torn, path)
    group = zarr.open_group(path, mode="r")
    assert INCOMPLETE in group.attrs
    # Nothing that reads consolidated metadata takes it for whole.
    assert group.metadata.consolidated_metadata is None
    assert "consolidated_metadata" not in json.loads((path / "zarr.json").read_text())
    with pytest.raises(ValueError, match=r"[Cc]onsolidated"):
        reads(path)

    whole = to_zarr(ds.chunk(lat=1), path, mode="w")
    xr.testing.assert_identical(whole.load(), ds)


@pytest.mark.parametrize("values", [["a", "bb", "ccc"], ["ä", "ß-long-name", ""]])
def test_strings_come_back_without_a_warning(ds, tmp_path, values):
    named = ds.assign_coords(lat=values, kind=("lat", values[::-1]), run="r1i1p1")
    back = to_zarr(named.chunk(time=2), tmp_path / "out.zarr").load()
    assert back.lat.values.tolist() == values
    assert back.kind.values.tolist() == values[::-1]
    assert back.run.item() == "r1i1p1"
    xr.testing.assert_equal(back, named)
    assert back.kind.dtype.kind in "UOT"


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
