"""Results on disk: a lazy Dataset streamed to Zarr, block by block, and reopened.

Chunks on disk are the blocks of the graph, so a task writes whole chunks and no two
tasks share one. A write that was cut short goes on where it stopped, and one that has lost
blocks since writes those: the manifest knows what is written, by names that stay the same in
another process, and which blocks are there.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from zarr.abc.store import Store
from zarr.storage import LocalStore

from xr_aimz import manifest
from xr_aimz.completeness import Damage, chunk_key
from xr_aimz.errors import (
    DamagedStoreError,
    IncompleteStoreError,
    OptionError,
    ResumeWarning,
    SpaceError,
    StoreError,
    WriteError,
    warn,
)
from xr_aimz.listing import list_entries
from xr_aimz.manifest import Manifest
from xr_aimz.results_identity import differences, manifest_of
from xr_aimz.rounding import MANTISSA
from xr_aimz.template import (
    encoded,
    layout,
    sharded,
    strings_of,
    template,
    uniform,
    with_objects_loaded,
    with_strings,
)
from xr_aimz.transaction import commit, is_repository
from xr_aimz.transaction import opened as opened_repository
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
        Go on where an earlier write of the same results to this store was cut short, in this
        process or another: blocks that are there are not computed again, a store that is whole
        is only opened, and blocks that it has lost since are computed again.
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

    Warns
    -----
    ResumeWarning
        The results are made from something that another process cannot tell to be the same,
        so that it could not go on with this write.

    Notes
    -----
    A lost chunk of floats reads as NaN in any reader of Zarr. :func:`open_zarr` finds chunks that
    were lost or cut.
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
    loaded = with_objects_loaded(ds)
    blocks = uniform(loaded)
    whole = sharded(blocks, shards)
    lazy = encoded(whole)
    lengths = layout(blocks, lazy, shards)
    laid = partial(template, whole, lazy, lengths)
    options = {"precision": precision, "chunks and shards": lengths}
    mine = manifest_of(whole, lazy, options, strings_of(loaded))
    if is_repository(store):
        write_all = partial(write, lazy=lazy, done=(), precision=precision, progress=progress)
        return commit(store, laid, write_all, mine, replace=mode == "w", resume=resume)
    into, damage = manifest.as_store(store), None
    if mode == "w":
        _check_replaceable(store, into, lazy)
    else:
        _check_same(store, into, mine, resume)
        damage = manifest.damage_of(into) if manifest.is_whole(into) else None
    if damage is not None and not damage:
        return _opened(into, mine)
    if resume:
        # Before anything is written or removed.
        _warn_unnamed(mine)
    if mode == "w":
        manifest.clear(into)
    done = _blocks_there(into, lazy, damage)
    _check_space(into, lazy, len(done))
    go_on = partial(write, into, lazy, done, partial(manifest.mark, into), precision, progress)
    _written(store, into, mine, manifest.contents(laid()), go_on)
    return _opened(into, mine)


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
    """Open a store of results lazily, if it is whole.

    Parameters
    ----------
    store : path, URL, Zarr store or Icechunk repository
        As :func:`to_zarr` wrote it. Any other store is opened as it is.
    **options
        For :func:`xarray.open_zarr`, which opens a whole store just as well.

    Raises
    ------
    IncompleteStoreError
        Writing the store was cut short, or blocks were lost since: it says which variables lack
        how many blocks.
    DamagedStoreError
        Blocks are not as long as they were written.

    Notes
    -----
    The store is listed once, and no chunk is read. A bit that has changed shows in no listing: the
    checksum of a coordinate's chunk finds it when that is read; blocks of results have none.
    """
    if is_repository(store):
        return opened_repository(store, **options)
    into = manifest.as_store(store)
    found = manifest.read(into)
    if found is None:
        return xr.open_zarr(into, **options)
    if not manifest.is_whole(into):
        there = Counter(name for name, _ in manifest.marked(into))
        lacks = {n: count - there[n] for n, count in found.blocks.items()}
        listed = ", ".join(f"{n!r} {lacks[n]} of {found.blocks[n]}" for n in lacks if lacks[n])
        raise IncompleteStoreError(
            f"{str(store)!r} was not written to its end; blocks that are missing: {listed or 0}. "
            "Write the same results to it again, and to_zarr goes on from here"
        )
    if damage := manifest.damage_of(into):
        raise (DamagedStoreError if damage.cut else IncompleteStoreError)(
            f"{str(store)!r} is not as it was written: {damage}. Write the same results to it "
            "again, and to_zarr computes what is missing, or take another copy"
        )
    return with_strings(xr.open_zarr(into, **options), found.strings)


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


def _check_same(store: Any, into: Store, mine: Manifest, resume: bool) -> None:
    """Refuse a store that holds anything but these results, or a part of them."""
    if not manifest.occupied(into):
        return
    name = repr(str(store))
    there = manifest.read(into)
    if there is None or not resume:
        raise StoreError(f"{name} exists; choose another path, or mode='w'")
    if there.fingerprint != mine.fingerprint:
        raise StoreError(
            f"{name} exists and holds other results: {differences(there, mine)}. Choose another "
            "path, or mode='w'"
        )


def _blocks_there(
    into: Store, lazy: Mapping[str, xr.Variable], damage: Damage | None
) -> set[tuple[str, tuple[int, ...]]]:
    """The blocks that are there; what is left of others is removed.

    ``damage`` is that of a store that was whole once, None of one that never was.
    """
    blocks = [(n, i) for n, v in lazy.items() for i in np.ndindex(*v.data.numblocks)]
    if damage is not None:
        done = {(name, index) for name, index in blocks if index not in damage.of(name)}
        stale = [chunk_key(name, index) for name in damage.cut for index in damage.cut[name]]
    else:
        entries = list_entries(into)
        done = manifest.marked(into, entries)
        stale = [key for b in blocks if b not in done and (key := chunk_key(*b)) in entries]
    # Zarr reads what a block at the edge of an array does not cover of its chunk.
    manifest.remove(into, stale)
    return done


def _warn_unnamed(mine: Manifest) -> None:
    if not mine.unnamed:
        return
    warn(
        "if this write is cut short, no other process can take it up: it would not know "
        f"{list(mine.unnamed)!r} to be the same. Load or store what they are made from first, "
        "give random arrays a seed, or say resume=False",
        ResumeWarning,
    )


def _opened(into: Store, mine: Manifest) -> xr.Dataset:
    return with_strings(xr.open_zarr(into, consolidated=True), mine.strings)


def _check_replaceable(store: Any, into: Store, lazy: Mapping[str, xr.Variable]) -> None:
    """There must be space, and what is replaced must not be what the results are read from."""
    _check_space(into, lazy, 0, freed=_weight(into))
    if manifest.occupied(into) and any(
        manifest.holds(into, source) for source in stores_read(lazy)
    ):
        raise StoreError(
            f"mode='w' would empty {str(store)!r}, from which these results are read; write to "
            "another path"
        )


def _weight(into: Store) -> int:
    """The bytes that a local store takes."""
    if not isinstance(into, LocalStore):
        return 0
    return sum(entry.size or 0 for entry in list_entries(into).values())


def _check_space(into: Store, lazy: Mapping[str, xr.Variable], done: int, freed: int = 0) -> None:
    if not isinstance(into, LocalStore) or not lazy:
        return
    folder = Path(into.root).absolute()
    while not folder.exists():
        folder = folder.parent
    blocks = sum(a.data.npartitions for a in lazy.values())
    needed = sum(a.nbytes for a in lazy.values()) * (blocks - done) // max(blocks, 1)
    free = shutil.disk_usage(folder).free + freed
    if needed > free:
        raise SpaceError(
            f"the results need up to {needed / 1e9:.3g} GB, and {str(folder)!r} has "
            f"{free / 1e9:.3g} GB free; write elsewhere, fewer draws, or summaries of them"
        )
