"""What would not fit in memory is refused before it is read."""

import dask.array as da
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from xr_aimz import errors
from xr_aimz.binding.bound import bind
from xr_aimz.fits.memory import COPIES, check_memory
from xr_aimz.options import available_memory


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


def unread(*args, **kwargs):
    raise AssertionError("a block was read")


def lazy(size):
    """Arrays of a size that may be far beyond any machine; to read a block is a failure."""
    blocks = da.zeros(size, chunks=size // 8, dtype="f4")
    values = da.map_blocks(unread, blocks, dtype="f4", meta=np.empty(0, "f4"))
    return xr.Dataset({"x": ("time", values), "y": ("time", values)})


def test_a_fit_that_cannot_be_held_says_so_before_it_reads():
    with pytest.raises(errors.MemoryLimitError) as refused:
        lazy(10**15).aimz.fit(line, progress=False)
    text = str(refused.value)
    assert isinstance(refused.value, MemoryError)
    assert "'x' 4e+03 TB, 'y' 4e+03 TB" in text
    assert "method=\"svi\", batch={'time': 125000000000000}" in text


@pytest.mark.parametrize("spare", [0, -1])
def test_the_limit_is_three_copies_of_what_is_lazy(spare):
    ds = lazy(8000)
    bound = bind(ds, line)
    free = COPIES * 2 * ds.x.nbytes + spare
    if spare < 0:
        with pytest.raises(errors.MemoryLimitError, match=r"192 kB, and 192 kB of memory"):
            check_memory(bound.binding, bound.inputs.arrays, free)
    else:
        check_memory(bound.binding, bound.inputs.arrays, free)


def test_what_is_in_memory_is_not_counted():
    ds = xr.Dataset({"x": ("time", np.ones(8)), "y": ("time", np.ones(8))})
    bound = bind(ds, line)
    check_memory(bound.binding, bound.inputs.arrays, 0)


def test_one_variable_of_two_arguments_is_counted_once():
    bound = bind(lazy(8000), line, {"x": "y"})
    check_memory(bound.binding, bound.inputs.arrays, COPIES * 8000 * 4)


def test_without_a_dim_to_batch_the_remedy_is_another():
    bound = bind(lazy(8000).chunk(time=-1), line, core_dim="time")
    with pytest.raises(errors.MemoryLimitError, match="Select a part"):
        check_memory(bound.binding, bound.inputs.arrays, 0)


def test_the_machine_has_some_memory():
    assert 2**24 < available_memory() < 2**50
