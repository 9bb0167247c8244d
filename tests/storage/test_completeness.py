"""A chunk that is lost or cut: open_zarr names it, to_zarr writes it again."""

import shutil
import zipfile
from pathlib import Path

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from interrupted_writes import interrupted
from zarr.storage import MemoryStore, ZipStore

import xr_aimz
from xr_aimz import open_zarr
from xr_aimz.errors import DamagedStoreError, IncompleteStoreError, StoreError

DATA = Path(__file__).parents[1] / "data"


def dataset():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "tas": (("time", "lat"), rng.normal(size=(6, 4)).astype("f4"), {"units": "K"}),
            "wave": (("time", "lat"), rng.normal(size=(6, 4)) + 1j),
            "count": (("time", "lat"), rng.integers(1, 9, (6, 4))),
            "wet": (("time", "lat"), np.ones((6, 4), bool)),
            "none": (("time", "lat"), np.zeros((6, 4), int)),
        },
        {
            "time": np.arange(6),
            "lat": [10.0, 20.0, 30.0, 40.0],
            "kind": ("lat", ["u", "vv", "w", "x"]),
            "zero": ("lat", np.zeros(4)),
            "height": 0.0,
            "lazy": ("time", da.arange(6, chunks=2)),
        },
    )


# As Dataset.chunk makes them: whatever is no index, and has a dimension.
LAZY = ("tas", "wave", "count", "wet", "none", "lazy", "zero")
EAGER = ("time", "lat", "kind", "height")


@pytest.fixture
def ds():
    return dataset().chunk(time=2)


@pytest.fixture
def path(ds, tmp_path):
    ds.aimz.to_zarr(tmp_path / "out.zarr", progress=False)
    return tmp_path / "out.zarr"


def chunks(path):
    """Every chunk of a store of results."""
    of_a_scalar = [p for p in path.glob("*/c") if p.is_file()]
    return [*sorted(p for p in path.glob("*/c/**/*") if p.is_file()), *of_a_scalar]


def cut(chunk):
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])


def changed(chunk):
    """One bit of it."""
    held = bytearray(chunk.read_bytes())
    held[len(held) // 2] ^= 1
    chunk.write_bytes(held)


def times(path):
    return {p: p.stat().st_mtime_ns for p in chunks(path) if p.relative_to(path).parts[0] in LAZY}


def mended(ds, path, count, **options):
    """The same call writes so many blocks, and the store is whole again."""
    before = times(path)
    back = ds.aimz.to_zarr(path, progress=False, **options)
    assert len(times(path).items() - before.items()) == count
    xr.testing.assert_identical(back.load(), ds.compute())
    xr.testing.assert_identical(open_zarr(path).load(), ds.compute())


def test_every_chunk_is_there_to_be_found(path):
    # Of what is nothing but zeros too: an absent chunk is a lost one.
    names = {p.relative_to(path).parts[0] for p in chunks(path)}
    assert names == {*LAZY, *EAGER}


@pytest.mark.parametrize("name", LAZY)
def test_a_lost_block_is_named_and_only_it_is_computed_again(ds, path, name):
    lost = [p for p in chunks(path) if p.relative_to(path).parts[0] == name][-1]
    lost.unlink()
    at = ", ".join(lost.relative_to(path / name / "c").parts)
    said = rf"'{name}' has 1 missing \(block \[{at}\]\)"
    with pytest.raises(IncompleteStoreError, match=said) as caught:
        open_zarr(path)
    assert repr(str(path)) in str(caught.value)
    mended(ds, path, 1)


@pytest.mark.parametrize("name", EAGER)
def test_a_lost_coordinate_is_named_and_written_again(ds, path, name):
    shutil.rmtree(path / name / "c") if (path / name / "c").is_dir() else (
        path / name / "c"
    ).unlink()
    with pytest.raises(IncompleteStoreError, match=f"'{name}' has 1 missing"):
        open_zarr(path)
    mended(ds, path, 0)


def test_lost_metadata_are_named_and_written_again(ds, path):
    (path / "tas" / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError, match=r"the metadata of \['tas'\] missing"):
        open_zarr(path)
    mended(ds, path, 0)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("damage", [cut, changed])
def test_no_reader_takes_what_is_left_of_a_chunk_of_labels_for_them(path, name, damage):
    damage(next(p for p in chunks(path) if p.relative_to(path).parts[0] == name))
    with pytest.raises(Exception, match="checksum"):
        zarr.open_array(path, path=name, mode="r")[...]
    with pytest.raises(Exception, match="checksum"):
        xr.open_zarr(path).load()


@pytest.mark.parametrize("name", [*LAZY, *EAGER])
def test_a_chunk_that_was_cut_is_named(path, name):
    cut(next(p for p in chunks(path) if p.relative_to(path).parts[0] == name))
    with pytest.raises(DamagedStoreError, match=rf"'{name}' has 1 not as long as written"):
        open_zarr(path)


@pytest.mark.parametrize("name", LAZY)
def test_a_block_that_was_cut_is_computed_again(ds, path, name):
    cut(next(p for p in chunks(path) if p.relative_to(path).parts[0] == name))
    mended(ds, path, 1)


def test_a_lost_chunk_of_floats_reads_as_nan_in_any_reader(path):
    for name in ("tas", "wave"):
        shutil.rmtree(path / name / "c" / "1")
        assert np.isnan(zarr.open_array(path, path=name)[2:4]).all()
        assert xr.open_zarr(path)[name][2:4].isnull().all()


@pytest.mark.slow
@given(data=st.data())
def test_whatever_is_lost_or_cut_is_named_and_mended(tmp_path_factory, data):
    ds, path = dataset().chunk(time=2), tmp_path_factory.mktemp("any") / "out.zarr"
    ds.aimz.to_zarr(path, progress=False)
    every = chunks(path)
    hurt = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=8, unique=True))
    for number, chunk in enumerate(hurt):
        chunk.unlink() if data.draw(st.booleans(), f"lost {number}") else cut(chunk)
    with pytest.raises((DamagedStoreError, IncompleteStoreError)) as caught:
        open_zarr(path)
    names = {chunk.relative_to(path).parts[0] for chunk in hurt}
    assert all(repr(name) in str(caught.value) for name in names)
    lazy = [chunk for chunk in hurt if chunk.relative_to(path).parts[0] in LAZY]
    mended(ds, path, len(lazy))


def test_a_shard_that_is_lost_or_cut(ds, tmp_path):
    path, tas = tmp_path / "out.zarr", ds[["tas"]].chunk(time=1, lat=1)
    tas.aimz.to_zarr(path, shards={"time": 3, "lat": 2}, progress=False)
    for damage, error in ((Path.unlink, IncompleteStoreError), (cut, DamagedStoreError)):
        damage(path / "tas" / "c" / "1" / "0")
        with pytest.raises(error, match=r"'tas' has 1 .*block \[1, 0\]"):
            open_zarr(path)
        mended(tas, path, 1, shards={"time": 3, "lat": 2})


def test_a_zip_of_a_store(ds, path, tmp_path):
    names = [p for p in path.rglob("*") if p.is_file()]
    for left_out, error in ((None, None), (path / "tas" / "c" / "1" / "0", IncompleteStoreError)):
        packed = tmp_path / f"{error}.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in names:
                if file != left_out:
                    archive.write(file, file.relative_to(path))
        store = ZipStore(packed, mode="r")
        if error is None:
            xr.testing.assert_identical(open_zarr(store).load(), ds.compute())
        else:
            with pytest.raises(error, match="'tas' has 1 missing"):
                open_zarr(store)
        store.close()


def test_a_store_in_memory(ds):
    store = MemoryStore()
    ds.aimz.to_zarr(store, progress=False)
    del store._store_dict["tas/c/1/0"]
    with pytest.raises(IncompleteStoreError, match=r"'tas' has 1 missing \(block \[1, 0\]\)"):
        open_zarr(store)
    xr.testing.assert_identical(ds.aimz.to_zarr(store, progress=False).load(), ds.compute())


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_block_that_is_lost_before_its_write_is_taken_up(ds, tmp_path, damage):
    path, tas = tmp_path / "out.zarr", ds[["tas"]].drop_vars(["lazy", "zero"])
    interrupted(tas.chunk(time=1), path, most=6)
    there = [p for p in chunks(path) if p.parts[-4] == "tas"]
    assert 1 < len(there) < 6
    damage(there[0])
    with pytest.raises(IncompleteStoreError, match=f"'tas' {7 - len(there)} of 6"):
        open_zarr(path)
    mended(tas.chunk(time=1), path, 7 - len(there))


@pytest.mark.filterwarnings("ignore:Object at xr_aimz")
def test_what_another_hand_has_added_is_no_damage(ds, path):
    xr.Dataset({"more": ("lat", np.zeros(4))}).to_zarr(path, mode="a")
    xr.testing.assert_identical(open_zarr(path)[[*LAZY[:5]]].load(), ds.compute())


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def cells():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {"y": (("t", "cell"), rng.normal(size=(6, 500)))},
        {"x": ("t", np.linspace(-1, 1, 6)), "cell": np.arange(500)},
    )


def fit_cells(store):
    """Three blocks of cells."""
    with xr_aimz.set_options(block_bytes=1):
        options = {"method": "laplace", "draws": 2, "progress": False}
        return cells().aimz.fit(line, per="cell", store=store, **options)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, cut])
@pytest.mark.parametrize("name", ["posterior/slope/c/0/0/1", "sample_stats/status/c/1"])
def test_a_block_of_cells_that_is_lost_or_cut_is_fitted_again(tmp_path, damage, name):
    store = tmp_path / "fit.zarr"
    whole = fit_cells(store).posterior.compute()
    others = [p for p in store.glob("posterior/slope/c/0/0/*") if p.name != "1"]
    before = {p: p.stat().st_mtime_ns for p in others}
    damage(store / name)
    if damage is cut:
        with pytest.raises(Exception, match="checksum"):
            xr.open_datatree(store, engine="zarr", consolidated=False).load()
    again = fit_cells(store)
    xr.testing.assert_identical(again.posterior.compute(), whole)
    assert (again.sample_stats.status == 0).all()
    assert {p: p.stat().st_mtime_ns for p in others} == before


@pytest.fixture
def first(tmp_path):
    """Stores that the first release wrote."""
    shutil.unpack_archive(DATA / "results-1.zip", tmp_path)
    return tmp_path


def first_results():
    """What they hold."""
    values = np.arange(12.0).reshape(4, 3)
    return xr.Dataset(
        {"a": (("t", "s"), values, {"units": "K"}), "n": (("t", "s"), np.zeros((4, 3), int))},
        {"t": np.arange(4), "s": ["u", "vv", "w"], "zero": ("s", np.zeros(3))},
    )


def test_a_store_of_the_first_release_opens(first):
    xr.testing.assert_identical(open_zarr(first / "whole.zarr").load(), first_results())
    (first / "whole.zarr" / "a" / "c" / "1" / "0").unlink()
    with pytest.raises(IncompleteStoreError, match=r"'a' has 1 missing \(block \[1, 0\]\)"):
        open_zarr(first / "whole.zarr")


def test_a_store_that_the_first_release_cut_short_says_so(first):
    with pytest.raises(IncompleteStoreError, match="'a' 3 of 4"):
        open_zarr(first / "torn.zarr")
    with pytest.raises(StoreError, match="version of JAX, NumPyro or this package"):
        first_results().chunk(t=1).aimz.to_zarr(first / "torn.zarr")


def test_a_fit_per_cell_of_the_first_release_opens(first):
    with xr.open_datatree(first / "cells.zarr", engine="zarr", consolidated=False) as tree:
        assert tree["posterior"].slope.notnull().all()
    for name in ("cells.zarr", "torn_cells.zarr"):
        # Its programs had other names, so it is no part of the fit as it is made now.
        with pytest.raises(StoreError, match="model, method and options"):
            fit_cells(first / name)
