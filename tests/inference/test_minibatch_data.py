"""Every label as often as every other, whatever the chunks; and what no batch can be."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from xr_aimz.binding.bound import bind
from xr_aimz.errors import DimensionError, OptionError
from xr_aimz.inference.minibatch_data import (
    WindowSizes,
    epoch_windows,
    plan_windows,
    shuffled_orders,
)

RAGGED = (7, 13, 5, 40, 1, 34)
EPOCHS = 600


def model(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


@pytest.fixture
def ds():
    x = np.ones((20, 6, 2))
    dims = ("time", "lat", "lev")
    return xr.Dataset({"x": (dims, x), "y": (dims, x)}, {"time": np.arange(20)})


CUTS = {
    "one window": WindowSizes({"time": 8}, {"time": 100}, {"time": (100,)}, {"time": 1}),
    "a few windows": WindowSizes({"time": 6}, {"time": 100}, {"time": RAGGED}, {"time": 3}),
    "a batch a window": WindowSizes({"time": 8}, {"time": 100}, {"time": RAGGED}, {"time": 2}),
    "all in one batch": WindowSizes({"time": 100}, {"time": 100}, {"time": (100,)}, {"time": 1}),
    "two dims": WindowSizes(
        {"time": 6, "lat": 3},
        {"time": 100, "lat": 11},
        {"time": RAGGED, "lat": (4, 4, 3)},
        {"time": 3, "lat": 2},
    ),
}


def rows_of(made, visit, dim, deck):
    if made.resident:
        return deck[dim].order(visit.turns[dim])
    rows = np.concatenate([np.arange(*chunk) for chunk in visit.chunks[dim]])
    return rows[visit.order[dim]]


@pytest.mark.parametrize("made", CUTS.values(), ids=CUTS)
def test_each_label_is_visited_once_an_epoch_on_average(made):
    dims = list(made.sizes)
    visits = np.zeros([made.lengths[d] for d in dims])
    deck = shuffled_orders(made, 0)
    for number in range(EPOCHS):
        for visit in epoch_windows(made, 0, number):
            rows = [rows_of(made, visit, d, deck) for d in dims]
            for start in visit.starts:
                own = [r[s : s + made.sizes[d]] for r, s, d in zip(rows, start, dims, strict=True)]
                assert all(len(set(o)) == made.sizes[d] for o, d in zip(own, dims, strict=True))
                visits[np.ix_(*own)] += 1
    # A label is in 0, 1 or 2 batches of an epoch (4 along two dims): a variance of at most 1.
    # The largest of some 1000 deviations is within 5 standard errors.
    assert np.abs(visits / EPOCHS - 1).max() < 5 / np.sqrt(EPOCHS)
    # All labels together: one batch more or less a window, by chance.
    assert abs(visits.mean() / EPOCHS - 1) < 0.01


@pytest.mark.parametrize("made", CUTS.values(), ids=CUTS)
def test_an_epoch_is_a_function_of_seed_and_number(made):
    def places(seed, number):
        return [
            v.starts.tolist() + [dict(v.turns)] + [c.tolist() for c in v.order.values()]
            for v in epoch_windows(made, seed, number)
        ]

    assert places(0, 3) == places(0, 3)
    if made is not CUTS["all in one batch"]:
        assert places(0, 3) != places(0, 4)
        assert places(0, 3) != places(1, 3)


def test_steps_before_a_window_are_counted():
    steps = 0
    for visit in epoch_windows(CUTS["a few windows"], 5, 2):
        assert visit.before == steps
        steps += len(visit.starts)


def test_a_window_keeps_to_its_bytes_and_holds_a_batch(ds):
    bound = bind(ds.chunk(time=2), model)
    weights = [(("time",), 96), (("time",), 48)]
    made = plan_windows({"time": 2}, bound.inputs, weights, 2870)
    assert made.windows["time"] == 5
    assert made.longest("time") == 4
    shortest = min(sum(b - a for a, b in v.chunks["time"]) for v in epoch_windows(made, 0, 0))
    assert shortest >= 2
    # Where the bytes are too few for a batch, the batch goes first.
    assert plan_windows({"time": 12}, bound.inputs, weights, 1).longest("time") >= 12


def test_data_that_fit_are_one_window(ds):
    bound = bind(ds.chunk(time=3), model)
    assert plan_windows({"time": 4}, bound.inputs, [(("time",), 96)], 10**6).resident


def test_data_in_memory_are_cut_where_they_are_too_much(ds):
    bound = bind(ds, model)
    made = plan_windows({"time": 2}, bound.inputs, [(("time",), 96)], 1900)
    assert not made.resident
    assert made.longest("time") <= 4
    assert sum(made.chunks["time"]) == 20


@pytest.mark.parametrize(
    ("batch", "error", "named"),
    [
        ({"time": 21}, OptionError, "larger than the data, which have 20 entries along 'time'"),
        (241, OptionError, "larger than the data, which have 240 observations"),
        ({"lat": 2}, OptionError, r"couples 'lat' .*\['time', 'lev'\]"),
        ({"depth": 2}, DimensionError, r"'depth' is no observation dimension.*\['time', 'lev'\]"),
        ({"time": 0}, OptionError, "a size is an int of at least 1"),
        ({"time": 2.5}, OptionError, "a size is an int of at least 1"),
        (-3, OptionError, "a size is an int of at least 1"),
        (True, OptionError, "a size is an int of at least 1"),
        ({}, OptionError, "names no dimension"),
    ],
)
def test_what_no_batch_can_be(ds, batch, error, named):
    def untouched(block):
        raise AssertionError("a task ran before the refusal")

    lazy = ds.chunk(time=5)
    sprung = lazy.copy(
        data={n: a.data.map_blocks(untouched, dtype=a.dtype) for n, a in lazy.data_vars.items()}
    )
    with pytest.raises(error, match=named):
        sprung.aimz.fit(model, method="svi", batch=batch, core_dim="lat", progress=False)


def test_a_number_of_observations_is_shared_out_along_the_first_dim(ds):
    from xr_aimz.inference.minibatch_data import batch_sizes

    bound = bind(ds, model, core_dim="time")
    assert batch_sizes(160, bound.binding, bound.inputs) == {"lat": 4}
    bound = bind(ds, model)
    assert batch_sizes(25, bound.binding, bound.inputs) == {"time": 2}
