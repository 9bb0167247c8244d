"""Windows hold the rows that they say; one is read ahead and no more."""

import threading

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from xr_aimz.binding.bound import bind
from xr_aimz.inference.minibatch_data import epoch_windows, make_reader, prefetch

SMALL = 40 * 4 * 6 * 3


def model(x, height, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x + height, 1), obs=y)


@pytest.fixture
def ds():
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "x": (("lat", "time"), rng.normal(size=(6, 100))),
            "height": ("lat", rng.normal(size=6)),
            "y": (("time", "lat"), rng.normal(size=(100, 6))),
        }
    )


CHUNKS = {"numpy": None, "even": {"time": 10}, "ragged": {"time": (7, 13, 5, 40, 1, 34)}}


@pytest.mark.parametrize("sizes", [{"time": 4}, {"time": 4, "lat": 2}], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_a_window_holds_the_rows_that_it_says(ds, chunks, sizes):
    bound = bind(ds.chunk(chunks) if chunks else ds, model)
    made = make_reader(bound.binding, bound.inputs, sizes, SMALL, 0)
    assert made.kept_windows is None
    assert ("height" in made.static) == ("lat" not in sizes)
    for visit in epoch_windows(made.batches, 0, 0):
        arrays = made.load(visit)
        rows = {d: made.positions(visit, d) for d in sizes}
        for name, array in arrays.items():
            dims = made.inputs.dims[name]
            expected = ds[name].isel({d: r for d, r in rows.items() if d in dims})
            found = array[
                tuple(slice(0, len(rows[d])) if d in rows else slice(None) for d in dims)
            ]
            np.testing.assert_array_equal(
                found, expected.transpose(*dims).values.astype(np.float32)
            )
            # Padded: all windows of a fit are of one shape, for which the steps are compiled.
            longest = [made.batches.longest(d) if d in rows else ds.sizes[d] for d in dims]
            assert array.shape == tuple(longest)


def test_data_that_fit_are_read_once_and_lie_in_the_order_of_their_deck(ds):
    reads = []

    def counted(block):
        reads.append(threading.get_ident())
        return block

    lazy = ds.chunk(time=25)
    lazy["y"] = lazy.y.copy(data=lazy.y.data.map_blocks(counted, meta=np.empty((0, 0))))
    bound = bind(lazy, model)
    made = make_reader(bound.binding, bound.inputs, {"time": 4}, 2**20, 0)
    for number in range(3):
        for visit in epoch_windows(made.batches, 0, number):
            kept = made.load(visit)["y"]
            deck = made.orders["time"]
            start = visit.turns["time"]
            expected = ds.y.values[deck.order(start)].astype(np.float32)
            assert made.positions(visit, "time").tolist() == deck.order(start).tolist()
            # A batch that begins at any row is a slice, past the last one too.
            for first in range(100):
                rows = np.asarray(kept)[(first + start) % 100 :][:4]
                np.testing.assert_array_equal(rows, np.roll(expected, -first, axis=0)[:4])
    assert len(reads) == 4


def test_one_window_is_read_ahead_and_no_more(ds):
    loaded = []

    def counted(block, block_info=None):
        loaded.append(block_info[0]["chunk-location"][0])
        return block

    lazy = ds.chunk(time=10)
    data = da.map_blocks(counted, lazy.y.data, dtype=float, meta=np.empty((0, 0)))
    bound = bind(lazy.assign(y=lazy.y.copy(data=data)), model)
    made = make_reader(bound.binding, bound.inputs, {"time": 4}, 20 * 2 * 4 * 6 * 4, 0)
    windows = prefetch(made, epoch_windows(made.batches, 0, 0))
    loaded.clear()
    for number, (visit, _) in enumerate(windows, 1):
        chunks = len(visit.chunks["time"])
        assert chunks == 2
        assert len(loaded) <= (number + 1) * chunks
    assert sorted(loaded) == list(range(10))


def test_what_goes_wrong_while_reading_is_raised(ds):
    def fails(block):
        raise OSError("the disk is gone")

    lazy = ds.chunk(time=10)
    bound = bind(lazy, model)
    made = make_reader(bound.binding, bound.inputs, {"time": 4}, SMALL, 0)
    made.inputs.arrays["y"].data = lazy.y.data.map_blocks(
        fails, dtype=float, meta=np.empty((0, 0))
    )
    with pytest.raises(OSError, match="the disk is gone"):
        list(prefetch(made, epoch_windows(made.batches, 0, 0)))
