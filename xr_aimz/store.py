"""Results on disk: a lazy Dataset streamed to Zarr, block by block, and reopened.

Chunks on disk are the blocks of the graph, so a task writes whole chunks and no two
tasks share one. A write that was cut short goes on where it stopped: the graph names
what it computes by its content, and the manifest knows which blocks are there.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import dask
import numpy as np
import xarray as xr
import zarr
from dask.base import compute, tokenize
from dask.callbacks import Callback
from dask.system import CPU_COUNT
from tqdm.auto import tqdm
from xarray.conventions import encode_cf_variable, encode_dataset_coordinates
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.storage import LocalStore, MemoryStore

from xr_aimz import manifest
from xr_aimz.errors import (
    IncompleteStoreError,
    OptionError,
    SpaceError,
    StoreError,
    WriteError,
)
from xr_aimz.manifest import Manifest
from xr_aimz.options import shows_progress
from xr_aimz.rounding import MANTISSA
from xr_aimz.writing import missing_blocks, writers

__all__ = ["open_zarr", "to_zarr"]

_CODEC = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
_KEPT = ("units", "calendar")


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
        A path; a URL that fsspec knows (``"s3://..."``); a store of ``zarr.storage``, of
        obstore or of an Icechunk session.
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
    blocks = _uniform(ds)
    whole = _sharded(blocks, shards)
    into, lazy = manifest.as_store(store), _encoded(whole)
    count = {name: v.data.npartitions for name, v in lazy.items()}
    mine = Manifest(_fingerprint(whole, precision), count)
    if mode == "w":
        _check_space(into, lazy, 0)
        manifest.clear(into)
    elif _resumes(store, into, mine, resume):
        return _opened(into)
    done = manifest.marked(into)
    _check_space(into, lazy, len(done))
    template = _template(whole, lazy, _layout(blocks, lazy, shards))
    try:
        manifest.begin(into, mine, template)
        _write(into, lazy, done, precision, progress)
    except OSError as error:
        raise _failed(store, into, count, error) from error
    manifest.finish(into, template)
    return _opened(into)


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
            "version of JAX); choose another path, or mode='w'"
        )
    return manifest.is_whole(into)


def _failed(store: Any, into: Store, count: Mapping[str, int], error: OSError) -> WriteError:
    there = len(manifest.marked(into))
    return WriteError(
        f"writing {str(store)!r} failed with {there} of {sum(count.values())} blocks there: "
        f"{error}. They stay; once the cause is gone, the same call goes on from here"
    )


def _write(
    into: Store,
    lazy: Mapping[str, xr.Variable],
    done: Any,
    precision: int | None,
    progress: bool | None,
) -> None:
    tasks = []
    for name, variable in lazy.items():
        array = variable.data
        missing = missing_blocks(name, array, done)
        if missing:
            target = zarr.open_array(into, path=name, mode="r+", zarr_format=3)
            tasks.append(writers(name, array, target, into, missing, precision))
    # Looking for chunks that are all fill value costs a pass over every draw, and a chunk that
    # is absent is no sign of anything.
    with _bar(progress), _scheduler(), zarr.config.set({"array.write_empty_chunks": True}):
        compute(*tasks)


def _template(
    ds: xr.Dataset, lazy: Mapping[str, xr.Variable], layout: Mapping[str, Mapping[str, Any]]
) -> MemoryStore:
    """All of a store but the blocks: metadata, and what is in memory."""
    memory = MemoryStore()
    ds.drop_vars(list(lazy)).to_zarr(memory, consolidated=False, zarr_format=3)
    # Not written lazily by xarray: dask.delayed would import distributed, half a second.
    for name, variable in lazy.items():
        zarr.create_array(
            memory,
            name=name,
            shape=variable.shape,
            dtype=variable.dtype,
            compressors=(_CODEC,),
            dimension_names=[str(d) for d in variable.dims],
            attributes={k: v for k, v in variable.attrs.items() if k != "_FillValue"},
            **layout[name],
        )
    # Which coordinates belong to which variable xarray knows of the Dataset as a whole.
    _, attrs = encode_dataset_coordinates(ds)
    zarr.open_group(memory, mode="r+").attrs.put(dict(attrs))
    with warnings.catch_warnings():
        # Consolidated metadata is not in the v3 specification yet; xarray reads it all the
        # same, https://github.com/zarr-developers/zarr-specs/pull/309.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(memory)
    return memory


def _encoded(ds: xr.Dataset) -> dict[str, xr.Variable]:
    """The lazy variables by the conventions that xarray writes: dates as counts, and so on."""
    variables, _ = encode_dataset_coordinates(ds)
    return {
        str(name): encode_cf_variable(v, name=name)
        for name, v in variables.items()
        if v.chunks is not None
    }


def _opened(into: Store) -> xr.Dataset:
    return xr.open_zarr(into, consolidated=True)


def _fingerprint(ds: xr.Dataset, precision: int | None) -> str:
    """A name for the values to be written: of lazy ones that of their graph."""
    parts = {
        str(name): (v.dims, str(v.dtype), (v.chunks, v.data.name) if v.chunks else v.values)
        for name, v in ds.variables.items()
    }
    return tokenize(parts, precision)


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


def _uniform(ds: xr.Dataset) -> xr.Dataset:
    """As Zarr can hold it: chunks of one size, strings of any length."""
    ragged = {d: max(c) for d, c in ds.chunks.items() if set(c[:-1]) - {max(c)}}
    # A string of fixed length has no place in the v3 specification; one of any length has.
    strings = {
        name: v.astype(np.dtypes.StringDType())
        for name, v in ds.variables.items()
        if v.dtype.kind == "U"
    }
    coords = {name: v for name, v in strings.items() if name in ds.coords}
    data = {name: v for name, v in strings.items() if name not in ds.coords}
    uniform = ds.copy().chunk(ragged).assign_coords(coords).assign(data)
    for variable in uniform.variables.values():
        # How a source was stored (its codecs, its chunks) is no way to store this; how its
        # times were counted is.
        variable.encoding = {k: v for k, v in variable.encoding.items() if k in _KEPT}
    return uniform


def _sharded(ds: xr.Dataset, shards: Mapping[str, int] | None) -> xr.Dataset:
    """A task for each shard: blocks put together."""
    if not shards:
        return ds
    strangers = sorted(set(shards) - set(ds.chunks))
    if strangers:
        raise OptionError(f"shards={strangers!r}: the results are chunked along {[*ds.chunks]!r}")
    return ds.chunk({d: -(-n // max(ds.chunks[d])) * max(ds.chunks[d]) for d, n in shards.items()})


def _layout(
    blocks: xr.Dataset, lazy: Mapping[str, xr.Variable], shards: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """The lengths of chunks and shards: a chunk is a block, a shard is several."""
    whole = {name: tuple(max(c) for c in v.chunks or ()) for name, v in lazy.items()}
    if not shards:
        return {name: {"chunks": lengths} for name, lengths in whole.items()}
    inner = {name: tuple(max(c) for c in blocks.variables[name].chunks or ()) for name in lazy}
    return {name: {"chunks": inner[name], "shards": whole[name]} for name in lazy}


def _scheduler() -> Any:
    """Threads, where nobody asked for anything else: one more than there are cores."""
    # Without a scheduler dask imports distributed, half a second, to look for a client:
    # there is none where nobody has imported it.
    asked = [dask.config.get(name, None) for name in ("scheduler", "num_workers", "pool")]
    if "distributed" in sys.modules or any(a is not None for a in asked):
        return nullcontext()
    # A task that waits for the disk leaves its core to one that draws.
    return dask.config.set(scheduler=dask.threaded.get, num_workers=CPU_COUNT + 1)


def _bar(progress: bool | None) -> Any:
    return _Bar() if shows_progress(progress) else nullcontext()


class _Bar(Callback):
    """A progress bar over the tasks of dask's local schedulers."""

    def _start_state(self, dsk: Mapping[Any, Any], state: Mapping[str, Any]) -> None:
        count = sum(len(state[kind]) for kind in ("ready", "waiting"))
        self._tqdm = tqdm(total=count, desc="to_zarr", unit="task")

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        self._tqdm.update()

    def _finish(self, dsk: Any, state: Any, failed: bool) -> None:
        self._tqdm.close()
