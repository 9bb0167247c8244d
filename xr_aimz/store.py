"""Results on disk: a lazy Dataset streamed to Zarr, block by block, and reopened.

Chunks on disk are the blocks of the graph, so a task writes whole chunks and no two
tasks share one. A write that was cut short goes on where it stopped: the graph names
what it computes by its content, and the manifest knows which blocks are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import xarray as xr
from dask.base import tokenize
from zarr.abc.store import Store
from zarr.storage import LocalStore

from xr_aimz import manifest
from xr_aimz.errors import (
    IncompleteStoreError,
    OptionError,
    SpaceError,
    StoreError,
    WriteError,
)
from xr_aimz.lineage import passing
from xr_aimz.manifest import Manifest
from xr_aimz.record import versions
from xr_aimz.rounding import MANTISSA
from xr_aimz.template import encoded, layout, plain, sharded, template, uniform
from xr_aimz.transaction import commit, is_repository
from xr_aimz.writing import stores_read, write

__all__ = ["open_zarr", "to_zarr"]


def to_zarr(
    ds: xr.Dataset,
    store: Any,
    *,
    mode: Literal["w-", "w"] = "w-",
    resume: bool = True,
    precision: int | None = None,
    shards: Mapping[str, int] | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Compute a lazy Dataset into a Zarr store, block by block, and open it again.

    Parameters
    ----------
    ds : Dataset
        Lazy, as :func:`xr_aimz.predict` gives it, or any other.
    store : path, URL or Zarr store
        A path; a URL (``"s3://..."``, with the extra ``cloud``); a store of ``zarr.storage``;
        or an Icechunk repository, on whose branch ``main`` the results become visible as one
        commit or not at all.
    mode : {"w-", "w"}
        ``"w-"`` refuses what exists, other than an own write to resume; ``"w"`` replaces it.
    resume : bool, default True
        Go on where an earlier write of the same results to this store was cut short: blocks
        that are there are not computed again, and a store that is whole is only opened.
    precision : int, optional
        Keep this many bits of each float's mantissa (float32 has 23): values are rounded,
        by at most ``2 ** -(precision + 1)`` of their size. By default all are kept.
    shards : mapping of dim to int, optional
        Length of a Zarr shard along a dimension; a shard holds several blocks and is one
        file, written by one task. Rounded up to whole blocks.
    progress : bool, optional
        By default as :class:`xr_aimz.set_options` says.

    Returns
    -------
    Dataset
        The store, opened lazily.

    Raises
    ------
    StoreError
        The store exists and is not to be resumed or replaced, or holds other results.
    SpaceError
        The disk has less space than the results need; nothing was written.
    WriteError
        Writing failed on the way; what is written stays, and the same call goes on.
    OptionError

    Notes
    -----
    Until its last block is written a store has no root metadata, so no reader takes it
    for whole. Blocks survive the death of the process; against a loss of power they are
    as safe as the file system makes them.

    Blosc lz4 with bitshuffle: predictive draws are noise, on which a stronger codec
    spends time for nothing.

    Examples
    --------
    >>> import xarray as xr, xr_aimz
    >>> ds = xr.Dataset({"tas": ("lat", [1.0, 2.0, 3.0])}).chunk(lat=2)
    >>> stored = ds.aimz.to_zarr("doctest.zarr", mode="w", progress=False)
    >>> stored.tas.values.tolist()
    [1.0, 2.0, 3.0]
    """
    _check_options(mode, precision, shards)
    blocks = uniform(ds)
    whole = sharded(blocks, shards)
    lazy = encoded(whole)
    lengths = layout(blocks, lazy, shards)
    laid = partial(template, whole, lazy, lengths)
    fingerprint = _fingerprint(whole, precision, lengths)
    if is_repository(store):
        write_all = partial(write, lazy=lazy, done=(), precision=precision, progress=progress)
        return commit(store, laid, write_all, fingerprint, replace=mode == "w", resume=resume)
    into = manifest.as_store(store)
    count = {name: v.data.npartitions for name, v in lazy.items()}
    mine = Manifest(fingerprint, count)
    if mode == "w":
        _check_space(into, lazy, 0)
        _check_own_source(store, into, lazy)
        manifest.clear(into)
    elif _resumes(store, into, mine, resume):
        return _opened(into)
    done = manifest.marked(into)
    _check_space(into, lazy, len(done))
    go_on = partial(write, into, lazy, done, partial(manifest.mark, into), precision, progress)
    _written(store, into, mine, manifest.contents(laid()), go_on)
    return _opened(into)


def _written(
    store: Any, into: Store, mine: Manifest, keys: Mapping[str, bytes], go_on: Callable[[], None]
) -> None:
    """All of a store: the manifest and what is in memory, then the blocks, then its root."""
    try:
        manifest.begin(into, mine, keys)
        go_on()
        manifest.finish(into, keys)
    except WriteError as error:
        raise WriteError(
            f"writing {str(store)!r} failed: {error}. The blocks that are there stay; once the "
            "cause is gone, the same call goes on from them"
        ) from error


def open_zarr(store: Any, **options: Any) -> xr.Dataset:
    """Open a store lazily, if it is whole.

    Parameters
    ----------
    store : path, URL or Zarr store
    **options
        For :func:`xarray.open_zarr`, which opens a whole store just as well.

    Raises
    ------
    IncompleteStoreError
        Writing the store was cut short: it says which variables lack how many blocks.
    """
    into = manifest.as_store(store)
    found = manifest.read(into)
    if found is not None and not manifest.is_whole(into):
        there = [name for name, _ in manifest.marked(into)]
        lacks = {n: count - there.count(n) for n, count in found.blocks.items()}
        listed = ", ".join(f"{n!r} {lacks[n]} of {found.blocks[n]}" for n in lacks if lacks[n])
        raise IncompleteStoreError(
            f"{str(store)!r} was not written to its end; blocks that are missing: {listed or 0}. "
            "Write the same results to it again, and to_zarr goes on from here"
        )
    return xr.open_zarr(into, **options)


def _check_options(mode: Any, precision: Any, shards: Any) -> None:
    if mode not in ("w-", "w"):
        raise StoreError(f"mode={mode!r}: there are 'w-' and 'w'")
    most = max(width for _, width in MANTISSA.values())
    if precision is not None and (
        isinstance(precision, bool) or not isinstance(precision, int) or not 1 <= precision <= most
    ):
        raise OptionError(
            f"precision={precision!r}: the number of bits of the mantissa to keep, from 1 to 23 "
            "for float32"
        )
    bad = {d: n for d, n in (shards or {}).items() if not isinstance(n, int) or n < 1}
    if bad:
        raise OptionError(f"shards={bad!r}: the length of a shard is an int of at least 1")


def _resumes(store: Any, into: Store, mine: Manifest, resume: bool) -> bool:
    """Whether the store holds just these results, whole; False if they are to be written."""
    if not manifest.occupied(into):
        return False
    name = repr(str(store))
    there = manifest.read(into)
    if there is None or not resume:
        raise StoreError(f"{name} exists; choose another path, or mode='w'")
    if there.fingerprint != mine.fingerprint:
        raise StoreError(
            f"{name} exists and holds other results (another fit, Dataset, seed, option or "
            "version of JAX or NumPyro); choose another path, or mode='w'"
        )
    return manifest.is_whole(into)


def _opened(into: Store) -> xr.Dataset:
    return xr.open_zarr(into, consolidated=True)


def _fingerprint(ds: xr.Dataset, precision: int | None, lengths: Mapping[str, Any]) -> str:
    """A name for what is to be written: of lazy values that of their graph."""
    parts = {
        str(name): (v.dims, str(v.dtype), (v.chunks, v.data.name) if v.chunks else v.values)
        for name, v in ds.variables.items()
    }
    attrs = {str(name): plain(v.attrs) for name, v in ds.variables.items()}
    # The history has the time of day. What was tracked where moves no draw; other versions of
    # these two may.
    left_out = {"history", *passing(ds.attrs)}
    own = {k: v for k, v in plain(ds.attrs).items() if k not in left_out}
    made_by = {name: versions()[name] for name in ("jax", "numpyro")}
    return tokenize(parts, precision, lengths, repr(attrs), repr(own), made_by)


def _check_own_source(store: Any, into: Store, lazy: Mapping[str, xr.Variable]) -> None:
    """What is to be replaced must not be what the results are read from."""
    if manifest.occupied(into) and any(
        manifest.holds(into, source) for source in stores_read(lazy)
    ):
        raise StoreError(
            f"mode='w' would empty {str(store)!r}, from which these results are read; write to "
            "another path"
        )


def _check_space(into: Store, lazy: Mapping[str, xr.Variable], done: int) -> None:
    if not isinstance(into, LocalStore) or not lazy:
        return
    folder = Path(into.root).absolute()
    while not folder.exists():
        folder = folder.parent
    blocks = sum(a.data.npartitions for a in lazy.values())
    needed = sum(a.nbytes for a in lazy.values()) * (blocks - done) // max(blocks, 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SpaceError(
            f"the results need up to {needed / 1e9:.3g} GB, and {str(folder)!r} has "
            f"{free / 1e9:.3g} GB free; write elsewhere, fewer draws, or summaries of them"
        )
