"""Write a lazy Dataset to Zarr block by block, or to Icechunk in one commit, and reopen it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

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
from xr_aimz.storage.blocks import (
    MANTISSA,
    cf_encode,
    chunk_layout,
    combine_shards,
    load_objects,
    restore_strings,
    source_stores,
    string_dtypes,
    with_uniform_chunks,
    write_blocks,
    write_template,
)
from xr_aimz.storage.completeness import (
    Damage,
    Manifest,
    as_store,
    begin_write,
    chunk_key,
    clear_store,
    contains,
    find_store_damage,
    finish_write,
    is_complete,
    is_nonempty,
    mark_block,
    put_document,
    read_manifest,
    remove_store,
    store_contents,
    written_blocks,
)
from xr_aimz.storage.listing import list_entries
from xr_aimz.storage.write_identity import describe_differences, make_manifest

BRANCH = "main"
_FINGERPRINT, _MANIFEST = "xr_aimz", "xr_aimz_manifest"


def is_repository(store: Any) -> bool:
    """Return whether a store is an Icechunk repository, without importing Icechunk."""
    return type(store).__module__.partition(".")[0] == "icechunk" and hasattr(
        store, "writable_session"
    )


def commit_results(
    repository: Any,
    template: Callable[[], MemoryStore],
    write: Callable[..., None],
    mine: Manifest,
    *,
    replace: bool,
    resume: bool,
) -> xr.Dataset:
    """Write results to an Icechunk repository in one session, commit them and open them.

    Parameters
    ----------
    repository : icechunk.Repository
    template : callable
        Returns a store in memory with the metadata of all arrays.
    write : callable of ``into`` and ``note``
        Writes the blocks.
    mine : Manifest
        Stored with the commit: results that the repository holds already are only opened.
    replace, resume : bool
        As ``mode="w"`` and ``resume`` of :func:`xr_aimz.to_zarr`.
    """
    session = repository.writable_session(BRANCH)
    if is_nonempty(session.store) and not replace:
        newest = next(iter(repository.ancestry(branch=BRANCH)))
        if not resume or newest.metadata.get(_FINGERPRINT) != mine.fingerprint:
            reason = f": {describe_differences(_commit_manifest(newest), mine)}" if resume else ""
            raise StoreError(
                f"branch {BRANCH!r} of the repository holds other results (snapshot "
                f"{newest.id}, {newest.message!r}){reason}; give another repository, or mode='w'"
            )
        return open_commit(repository)
    if replace:
        sync(session.store.clear())
    put_document(session.store, store_contents(template()))
    write(into=session.store, note=_skip_mark)
    metadata = {_FINGERPRINT: mine.fingerprint, _MANIFEST: asdict(mine)}
    session.commit("xr_aimz: results of to_zarr", metadata=metadata)
    return open_commit(repository)


def _skip_mark(name: str, index: tuple[int, ...]) -> None:
    """Record nothing for a written block: the commit includes all blocks or none."""


def open_commit(repository: Any, **options: Any) -> xr.Dataset:
    """Open the results of the last commit lazily."""
    newest = next(iter(repository.ancestry(branch=BRANCH)))
    store = repository.readonly_session(BRANCH).store
    ds = xr.open_zarr(store, **{"consolidated": False, **options})
    return restore_strings(ds, _commit_manifest(newest).strings)


def _commit_manifest(snapshot: Any) -> Manifest:
    """Return the manifest of a commit; an empty one if it has none, as of an earlier version."""
    return Manifest(**snapshot.metadata.get(_MANIFEST, {"fingerprint": "", "blocks": {}}))


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
        Lazy, from :func:`xr_aimz.predict` or any other source.
    store : path, URL or Zarr store
        A path; a URL (``"s3://..."``, with the extra ``cloud``); a store of ``zarr.storage``;
        or an Icechunk repository, on whose branch ``main`` the results become visible as one
        commit or not at all.
    mode : {"w-", "w"}
        ``"w-"`` refuses a store that exists, unless it holds a write to resume; ``"w"`` replaces
        it.
    resume : bool, default True
        Resume an interrupted write of the same results to this store, by this process or another:
        blocks that are stored are not computed again, a complete store is only opened, and blocks
        that it has lost since are computed again.
    precision : int, optional
        Keep this many bits of each float's mantissa (float32 has 23): values are rounded,
        by at most ``2 ** -(precision + 1)`` of their size. By default all are kept.
    shards : mapping of dim to int, optional
        Length of a Zarr shard along a dimension; a shard holds several blocks and is one
        file, written by one task. Rounded up to whole blocks.
    progress : bool, optional
        By default the option of :class:`xr_aimz.set_options`.

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
        Writing failed; blocks that are written stay, and the same call resumes from them.
    OptionError

    Warns
    -----
    ResumeWarning
        The results are computed from something that another process cannot identify, so that no
        other process could resume this write.

    Notes
    -----
    A lost chunk of floats reads as NaN in any reader of Zarr. :func:`open_zarr` finds chunks that
    were lost or truncated.
    Until its last block is written a store has no root metadata, so no reader takes it
    for complete. Written blocks survive the end of the process; against a loss of power they
    are as safe as the file system makes them.

    Chunks are compressed by Blosc lz4 with bitshuffle: predictive draws are noise, which a
    stronger codec compresses no further.

    Examples
    --------
    >>> import xarray as xr, xr_aimz
    >>> ds = xr.Dataset({"tas": ("lat", [1.0, 2.0, 3.0])}).chunk(lat=2)
    >>> stored = ds.aimz.to_zarr("doctest.zarr", mode="w", progress=False)
    >>> stored.tas.values.tolist()
    [1.0, 2.0, 3.0]
    """
    _check_options(mode, precision, shards)
    loaded = load_objects(ds)
    blocks = with_uniform_chunks(loaded)
    sharded = combine_shards(blocks, shards)
    lazy = cf_encode(sharded)
    lengths = chunk_layout(blocks, lazy, shards)
    template = partial(write_template, sharded, lazy, lengths)
    options = {"precision": precision, "chunks and shards": lengths}
    manifest = make_manifest(sharded, lazy, options, string_dtypes(loaded))
    if is_repository(store):
        write = partial(write_blocks, lazy=lazy, done=(), precision=precision, progress=progress)
        return commit_results(store, template, write, manifest, replace=mode == "w", resume=resume)
    into, damage = as_store(store), None
    if mode == "w":
        _check_replaceable(store, into, lazy)
    else:
        _check_same(store, into, manifest, resume)
        damage = find_store_damage(into) if is_complete(into) else None
    if damage is not None and not damage:
        return _reopen(into, manifest)
    if resume:
        # Warn before anything is written or removed.
        _warn_unnamed(manifest)
    if mode == "w":
        clear_store(into)
    done = _find_stored_blocks(into, lazy, damage)
    _check_space(into, lazy, len(done))
    write = partial(write_blocks, into, lazy, done, partial(mark_block, into), precision, progress)
    _write_store(store, into, manifest, store_contents(template()), write)
    return _reopen(into, manifest)


def _write_store(
    store: Any, into: Store, mine: Manifest, keys: Mapping[str, bytes], write: Callable[[], None]
) -> None:
    """Write a whole store: the manifest and eager variables, then the blocks, then the root."""
    try:
        begin_write(into, mine, keys)
        write()
        finish_write(into, keys)
    except WriteError as error:
        raise WriteError(
            f"writing {str(store)!r} failed: {error}. The blocks that are written stay; once the "
            "cause is gone, the same call goes on from them"
        ) from error


def open_zarr(store: Any, **options: Any) -> xr.Dataset:
    """Open a store of results lazily, after checking that it is complete.

    Parameters
    ----------
    store : path, URL, Zarr store or Icechunk repository
        As :func:`to_zarr` wrote it. Any other store is opened as it is.
    **options
        For :func:`xarray.open_zarr`, which opens a complete store just as well.

    Raises
    ------
    IncompleteStoreError
        Writing the store was interrupted, or blocks were lost since; the message names the
        variables and the number of blocks that each lacks.
    DamagedStoreError
        Blocks have another size than was written.

    Notes
    -----
    The store is listed once, and no chunk is read. A changed bit shows in no listing: for
    coordinates the chunk's checksum finds it when the chunk is read; blocks of results have none.
    """
    if is_repository(store):
        return open_commit(store, **options)
    into = as_store(store)
    manifest = read_manifest(into)
    if manifest is None:
        return xr.open_zarr(into, **options)
    if not is_complete(into):
        written = Counter(name for name, _ in written_blocks(into))
        lacks = {n: count - written[n] for n, count in manifest.blocks.items()}
        listed = ", ".join(f"{n!r} {lacks[n]} of {manifest.blocks[n]}" for n in lacks if lacks[n])
        raise IncompleteStoreError(
            f"{str(store)!r} was not written to its end; blocks that are missing: {listed or 0}. "
            "Write the same results to it again, and to_zarr goes on from here"
        )
    if damage := find_store_damage(into):
        raise (DamagedStoreError if damage.cut else IncompleteStoreError)(
            f"{str(store)!r} is not as it was written: {damage}. Write the same results to it "
            "again, and to_zarr computes what is missing, or take another copy"
        )
    return restore_strings(xr.open_zarr(into, **options), manifest.strings)


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
    invalid = {d: n for d, n in (shards or {}).items() if not isinstance(n, int) or n < 1}
    if invalid:
        raise OptionError(f"shards={invalid!r}: the length of a shard is an int of at least 1")


def _check_same(store: Any, into: Store, manifest: Manifest, resume: bool) -> None:
    """Refuse a store that holds anything else than these results, or a part of them."""
    if not is_nonempty(into):
        return
    name = repr(str(store))
    stored = read_manifest(into)
    if stored is None or not resume:
        raise StoreError(f"{name} exists; choose another path, or mode='w'")
    if stored.fingerprint != manifest.fingerprint:
        raise StoreError(
            f"{name} exists and holds other results: {describe_differences(stored, manifest)}. "
            "Choose another path, or mode='w'"
        )


def _find_stored_blocks(
    into: Store, lazy: Mapping[str, xr.Variable], damage: Damage | None
) -> set[tuple[str, tuple[int, ...]]]:
    """Return the blocks that are stored, by variable and index, and remove parts of others.

    ``damage`` is None for a store that was never complete.
    """
    blocks = [(n, i) for n, v in lazy.items() for i in np.ndindex(*v.data.numblocks)]
    if damage is not None:
        done = {(name, index) for name, index in blocks if index not in damage.of(name)}
        stale = [chunk_key(name, index) for name in damage.cut for index in damage.cut[name]]
    else:
        entries = list_entries(into)
        done = written_blocks(into, entries)
        stale = [key for b in blocks if b not in done and (key := chunk_key(*b)) in entries]
    # Zarr reads the part of a chunk that a block at the edge of an array does not cover.
    remove_store(into, stale)
    return done


def _warn_unnamed(manifest: Manifest) -> None:
    if not manifest.unnamed:
        return
    warn(
        "if this write is cut short, no other process can take it up: none can identify "
        f"{list(manifest.unnamed)!r}. Load or store what they are made from first, "
        "give random arrays a seed, or pass resume=False",
        ResumeWarning,
    )


def _reopen(into: Store, manifest: Manifest) -> xr.Dataset:
    return restore_strings(xr.open_zarr(into, consolidated=True), manifest.strings)


def _check_replaceable(store: Any, into: Store, lazy: Mapping[str, xr.Variable]) -> None:
    """Check the free space, and refuse to replace a store that the results are read from."""
    _check_space(into, lazy, 0, freed=_measure_bytes(into))
    if is_nonempty(into) and any(contains(into, source) for source in source_stores(lazy)):
        raise StoreError(
            f"mode='w' would empty {str(store)!r}, from which these results are read; write to "
            "another path"
        )


def _measure_bytes(into: Store) -> int:
    """Return the size of a local store in bytes, 0 for any other store."""
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
