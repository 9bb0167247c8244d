"""A write that is killed, starved or cut off loses nothing and never looks whole."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

from xr_aimz import open_zarr
from xr_aimz.errors import IncompleteStoreError, SpaceError, WriteError

# A fit made elsewhere and its prediction, the same in every process that runs this.
PROGRAM = """
import sys
import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr
import xr_aimz

def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.deterministic("mean", slope * x)
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)

rng = np.random.default_rng(0)
lat = np.linspace(-60, 60, 100)
ds = xr.Dataset({"x": (("lat", "lon"), rng.normal(size=(100, 500)).astype("f4"))}, {"lat": lat})
fit = ds.aimz.from_posterior(line, {"slope": rng.normal(size=(2, 50))}, dim=("lat", "lon"))
pred = ds.chunk(lat=1).aimz.predict(fit)
"""
WRITE = PROGRAM + "print('go', flush=True); pred.aimz.to_zarr(sys.argv[1], progress=False)"


def start(path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "go\n"
    return process


def finish(path):
    process = start(path)
    with process.stdout:
        return process.wait()


def contents(path):
    """A digest of every file, the history's time left out."""
    found = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = str(file.relative_to(path))
        found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    # The root has a history line with the time of day.
    found.pop("zarr.json")
    return found


def never_opens(path):
    """Whatever is there, nobody reads a number in it."""
    if (path / "xr_aimz").exists():
        with pytest.raises(IncompleteStoreError):
            open_zarr(path)
    with pytest.raises(FileNotFoundError):
        xr.open_zarr(path)


def times_of_blocks(path):
    return {
        p: p.stat().st_mtime_ns
        for mark in (path / "xr_aimz" / "done").glob("*/c.*")
        if mark.suffix != ".partial"
        for p in [path / mark.parent.name / "c" / mark.name[2:].replace(".", "/")]
    }


def kill_after(process, path, new):
    """SIGKILL once so many further blocks have been marked."""
    there = len(times_of_blocks(path))
    while process.poll() is None and len(times_of_blocks(path)) < there + new:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_killed_at_ten_moments_and_resumed_it_is_the_same_to_the_byte(tmp_path):
    whole, torn = tmp_path / "whole.zarr", tmp_path / "torn.zarr"
    assert finish(whole) == 0
    moments, finished = random.Random(0), {}
    for new in [0, *(moments.randint(0, 8) for _ in range(9))]:
        process = start(torn)
        time.sleep(moments.uniform(0, 0.05))
        kill_after(process, torn, new)
        never_opens(torn)
        now = times_of_blocks(torn)
        # What was finished has not been written again.
        assert {p: now[p] for p in finished} == finished
        finished = now
    assert finished
    assert finish(torn) == 0
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert contents(torn) == contents(whole)
    xr.testing.assert_equal(xr.open_zarr(torn).load(), xr.open_zarr(whole).load())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes, if this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False)
    if made.returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def noise(rows=100):
    values = np.random.default_rng(0).normal(size=(rows, 10_000)).astype("f4")
    return xr.Dataset({"a": (("x", "y"), values)}).chunk(x=5)


def mapped(ds, function):
    data = ds.a.data.map_blocks(function, dtype="f4", meta=np.empty((0, 0), "f4"))
    return ds.assign(a=ds.a.copy(data=data))


def remount(disk, option):
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def test_a_full_disk_is_foretold(small_disk):
    with pytest.raises(SpaceError, match=r"0.004 GB.*0.00\d+ GB free"):
        noise().aimz.to_zarr(small_disk / "out.zarr")
    assert list(small_disk.iterdir()) == []


def test_what_a_store_replaces_counts_as_space(small_disk):
    ds, path = noise(50), small_disk / "out.zarr"
    ds.aimz.to_zarr(path)
    with pytest.raises(SpaceError):
        ds.aimz.to_zarr(small_disk / "other.zarr")
    back = (-ds).aimz.to_zarr(path, mode="w")
    xr.testing.assert_identical(back.load(), -ds.load())
    with pytest.raises(SpaceError):
        noise(100).aimz.to_zarr(path, mode="w")
    # A refusal has touched nothing.
    xr.testing.assert_identical(open_zarr(path).load(), -ds.load())


def test_a_disk_that_fills_on_the_way_loses_nothing(small_disk):
    ds, path = noise(), small_disk / "out.zarr"
    remount(small_disk, "size=6m")
    other, filled_once = small_disk / "of someone else", []

    def fill(block):
        if not filled_once:
            filled_once.append(True)
            other.write_bytes(bytes(4_500_000))
        return block

    filled = mapped(ds, fill)
    with pytest.raises(WriteError, match=r"No space left.*goes on from them"):
        filled.aimz.to_zarr(path)
    never_opens(path)
    other.unlink()
    xr.testing.assert_identical(filled.aimz.to_zarr(path).load(), ds.load())


def test_a_store_made_read_only_on_the_way_loses_nothing(small_disk):
    ds, path = noise(50), small_disk / "out.zarr"
    lock = []

    def close(block):
        if not lock and len(times_of_blocks(path)) > 3:
            lock.append(True)
            remount(small_disk, "ro")
        return block

    closing = mapped(ds, close)
    with pytest.raises(WriteError, match=r"Read-only.*goes on from them"):
        closing.aimz.to_zarr(path)
    never_opens(path)
    remount(small_disk, "rw")
    xr.testing.assert_identical(closing.aimz.to_zarr(path).load(), ds.load())
