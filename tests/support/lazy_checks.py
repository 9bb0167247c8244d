"""Lazy arrays that raise when they are computed."""

from __future__ import annotations

import dask.array as da
from strategies import chunked


class ComputedError(AssertionError):
    pass


def refuse(*args, **kwargs):
    raise ComputedError("something was computed")


def untouchable(array):
    """The same array, lazily, whose chunks raise when they are computed."""
    lazy = da.from_array(array.values, chunks=-1)
    return array.copy(data=lazy.map_blocks(refuse, dtype=array.dtype, meta=lazy._meta))


def all_lazy(ds, chunks):
    # Index coordinates live in memory; all else must not be looked at.
    lazy = [n for n in ds.variables if n not in ds.indexes and ds[n].dtype.kind in "fiub"]
    ds = ds.assign({n: untouchable(ds[n]) for n in lazy if n in ds.data_vars}).assign_coords(
        {n: untouchable(ds[n]) for n in lazy if n in ds.coords}
    )
    return chunked(ds, chunks)
