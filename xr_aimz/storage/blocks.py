"""Lay out a Dataset in a Zarr store, and write each of its blocks by one dask task."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, product
from typing import Any

import dask.array as da
import dask.threaded
import numpy as np
import xarray as xr
import zarr
from dask._task_spec import Task as GraphTask
from dask._task_spec import TaskRef
from dask.base import compute, tokenize
from dask.callbacks import Callback
from dask.highlevelgraph import HighLevelGraph
from dask.system import CPU_COUNT
from tqdm.auto import tqdm
from xarray.conventions import encode_cf_variable, encode_dataset_coordinates
from zarr import Array
from zarr.abc.codec import BytesBytesCodec
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from xr_aimz.errors import OptionError, WriteError
from xr_aimz.options import shows_progress

_ROUNDING_SIZE = 2**15
MANTISSA: dict[Any, tuple[Any, int]] = {
    np.dtype(np.float32): (np.uint32, 23),
    np.dtype(np.float64): (np.uint64, 52),
}


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Round floats to ``bits`` bits of mantissa, ties to even; other dtypes stay as they are.

    The relative error is at most ``2 ** -(bits + 1)``.
    """
    if values.dtype not in MANTISSA:
        return values
    word, width = MANTISSA[values.dtype]
    if bits >= width:
        return values
    rounded = np.array(values, order="C")
    flat = rounded.reshape(-1)
    # In batches: the intermediate values stay in the processor's cache.
    for start in range(0, flat.size, _ROUNDING_SIZE):
        _round(flat[start : start + _ROUNDING_SIZE], word, width - bits)
    return rounded


def _round(values: np.ndarray, word: Any, drop: int) -> None:
    integers, nan_mask = values.view(word), np.isnan(values)
    nans = values[nan_mask]
    increment = (integers >> word(drop)) & word(1)
    increment += word((1 << (drop - 1)) - 1)
    integers += increment
    integers &= word(~((1 << drop) - 1) & int(np.iinfo(word).max))
    # Adding to the bits of a NaN can carry into the sign, so NaNs are restored.
    values[nan_mask] = nans


def use_scheduler() -> Any:
    """Return a context with dask's threads, two more than cores, unless another is configured."""
    # Without a scheduler dask imports distributed, half a second, to look for a client:
    # there is none where distributed is not imported yet.
    settings = [dask.config.get(name, None) for name in ("scheduler", "num_workers", "pool")]
    if "distributed" in sys.modules or any(setting is not None for setting in settings):
        return nullcontext()
    # Tasks that wait for the disk, or for a chunk to be encoded, leave their cores to others.
    return dask.config.set(scheduler=dask.threaded.get, num_workers=CPU_COUNT + 2)


def progress_bar(progress: bool | None) -> Any:
    """Return a context with a progress bar over dask's tasks, or without one."""
    return _ProgressBar() if shows_progress(progress) else nullcontext()


class _ProgressBar(Callback):
    """Progress bar over the tasks of dask's local schedulers."""

    def _start_state(self, dsk: Mapping[Any, Any], state: Mapping[str, Any]) -> None:
        count = sum(len(state[kind]) for kind in ("ready", "waiting"))
        self._tqdm = tqdm(total=count, desc="to_zarr", unit="task")

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        self._tqdm.update()

    def _finish(self, dsk: Any, state: Any, failed: bool) -> None:
        self._tqdm.close()


# By measurement, docs/store.md: a stronger codec finds as little in noise, and takes longer.
# Blocks of 64 KiB stay in a core's first caches: 0.8 of the time that Blosc's own size takes.
_BLOSC = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", blocksize=2**16)
# For labels and fits: a checksum, by which any reader of Zarr finds a truncated chunk.
CHECKED: tuple[BytesBytesCodec, ...] = (_BLOSC, Crc32cCodec())
# For the blocks of results, where a checksum costs a tenth: docs/decisions/lost-chunks.md.
CODECS: tuple[BytesBytesCodec, ...] = (_BLOSC,)
_TIME_ENCODING = ("units", "calendar")
# Attrs by which a reader would decode the values; the values are written as they are.
_DECODED = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")


def load_objects(ds: xr.Dataset) -> xr.Dataset:
    """Load the lazy strings, objects and calendar dates of a Dataset.

    The dtype to store them with is known from their values alone.
    """
    lazy = {
        n: v for n, v in ds.variables.items() if v.chunks is not None and v.dtype.kind in "OUT"
    }
    return _replace(ds, xr.Dataset(lazy).compute().variables)


def with_uniform_chunks(ds: xr.Dataset) -> xr.Dataset:
    """Return a Dataset that Zarr can store: chunks of one size, strings of variable length."""
    lengths = {d: max(c) for d, c in ds.chunks.items() if set(c[:-1]) - {max(c)}}
    # Coordinates in memory are labels, and few; each data variable in memory becomes a block.
    blocks = {
        n: _rechunk(v, lengths)
        for n, v in ds.variables.items()
        if v.chunks is not None or (n in ds.data_vars and v.ndim and v.dtype.kind in "fiubc")
    }
    # The v3 specification has no strings of fixed length, only of variable length.
    variable_length = np.dtypes.StringDType()
    strings = {n: ds.variables[n].astype(variable_length) for n in string_dtypes(ds)}
    uniform = _replace(ds, {**blocks, **strings})
    for variable in uniform.variables.values():
        # Codecs and chunks of the source do not apply to this store; the units and calendar
        # of its times do.
        times = {k: v for k, v in variable.encoding.items() if k in _TIME_ENCODING}
        variable.encoding = {**times, "compressors": CHECKED} if variable.chunks is None else {}
    return uniform


def string_dtypes(ds: xr.Dataset) -> dict[str, str]:
    """Return the dtype of each variable of strings in memory whose dtype Zarr does not have."""
    return {
        str(name): v.dtype.str if v.dtype.kind == "U" else "object"
        for name, v in ds.variables.items()
        if v.chunks is None
        and (v.dtype.kind == "U" or (v.dtype.kind == "O" and _are_strings(v.values)))
    }


def restore_strings(ds: xr.Dataset, strings: Mapping[str, str]) -> xr.Dataset:
    """Cast the strings of an opened Dataset to the dtypes recorded when it was written."""
    dtypes = {n: dtype for n, dtype in strings.items() if n in ds.variables}
    return _replace(ds, {n: ds.variables[n].astype(dtype) for n, dtype in dtypes.items()})


def _rechunk(variable: xr.Variable, lengths: Mapping[Any, int]) -> xr.Variable:
    return variable.chunk({d: n for d, n in lengths.items() if d in variable.dims})


def _are_strings(values: np.ndarray) -> bool:
    return values.size > 0 and all(isinstance(part, str) for part in values.flat)


def _replace(ds: xr.Dataset, variables: Mapping[Any, xr.Variable]) -> xr.Dataset:
    """Return a copy with some variables replaced; coordinates stay coordinates, data stay data."""
    coords = {n: v for n, v in variables.items() if n in ds.coords}
    data = {n: v for n, v in variables.items() if n not in ds.coords}
    return ds.copy().assign_coords(coords).assign(data)


def missing_value(dtype: np.dtype) -> Any:
    """Return the fill value of a dtype, read in place of a lost chunk: NaN, else zero."""
    return dtype.type(np.nan) if dtype.kind in "fc" else np.zeros((), dtype)[()]


def combine_shards(ds: xr.Dataset, shards: Mapping[str, int] | None) -> xr.Dataset:
    """Rechunk the lazy variables so that one task writes one shard of several blocks."""
    if not shards:
        return ds
    unknown = sorted(set(shards) - set(ds.chunks))
    if unknown:
        raise OptionError(f"shards={unknown!r}: the results are chunked along {[*ds.chunks]!r}")
    lengths = {d: -(-n // max(ds.chunks[d])) * max(ds.chunks[d]) for d, n in shards.items()}
    lazy = {n: v for n, v in ds.variables.items() if v.chunks is not None}
    return _replace(ds, {n: _rechunk(v, lengths) for n, v in lazy.items()})


def write_template(
    ds: xr.Dataset, lazy: Mapping[str, xr.Variable], layout: Mapping[str, Mapping[str, Any]]
) -> MemoryStore:
    """Write metadata and eager variables, without the lazy blocks, to a store in memory."""
    memory = MemoryStore()
    # An absent chunk has to mean a lost one, so empty chunks are written too.
    with zarr.config.set({"array.write_empty_chunks": True}):
        ds.drop_vars(list(lazy)).to_zarr(memory, consolidated=False, zarr_format=3)
    # Created here and not lazily by xarray: dask.delayed would import distributed, half a second.
    for name, variable in lazy.items():
        zarr.create_array(
            memory,
            name=name,
            shape=variable.shape,
            dtype=variable.dtype,
            compressors=CODECS,
            fill_value=missing_value(variable.dtype),
            dimension_names=[str(d) for d in variable.dims],
            attributes={k: v for k, v in json_attrs(variable.attrs).items() if k not in _DECODED},
            **layout[name],
        )
    # xarray encodes which coordinates belong to which variable for the whole Dataset.
    _, attrs = encode_dataset_coordinates(ds)
    zarr.open_group(memory, mode="r+").attrs.put(json_attrs(attrs))
    with warnings.catch_warnings():
        # Consolidated metadata is not in the v3 specification yet; xarray reads it all the
        # same, https://github.com/zarr-developers/zarr-specs/pull/309.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(memory)
    return memory


def json_attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Convert attrs to JSON values: arrays to lists, NumPy's scalars to Python's."""
    return {str(k): v.tolist() if hasattr(v, "tolist") else v for k, v in attrs.items()}


def cf_encode(ds: xr.Dataset) -> dict[str, xr.Variable]:
    """Encode the lazy variables by xarray's CF conventions, such as dates as counts."""
    variables, _ = encode_dataset_coordinates(ds)
    return {
        str(name): encode_cf_variable(v, name=name)
        for name, v in variables.items()
        if v.chunks is not None
    }


def chunk_layout(
    blocks: xr.Dataset, lazy: Mapping[str, xr.Variable], shards: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """Return the chunk and shard shapes of each variable: a block is a chunk, a shard several."""
    outer = {name: tuple(max(c) for c in v.chunks or ()) for name, v in lazy.items()}
    if not shards:
        return {name: {"chunks": lengths} for name, lengths in outer.items()}
    inner = {name: tuple(max(c) for c in blocks.variables[name].chunks or ()) for name in lazy}
    return {name: {"chunks": inner[name], "shards": outer[name]} for name in lazy}


Note = Callable[[str, tuple[int, ...]], None]


def write_blocks(
    into: Store,
    lazy: Mapping[str, xr.Variable],
    done: Collection[tuple[str, tuple[int, ...]]],
    note: Note,
    precision: int | None,
    progress: bool | None,
) -> None:
    """Compute every block that is not done, and write it to the store.

    Parameters
    ----------
    into : Store
        Holds the arrays already, without their blocks.
    lazy : mapping of name to Variable
    done : collection of (name, index)
    note : callable of (name, index)
        Called in the task when a block's bytes are in the store.
    precision, progress
        As in :func:`xr_aimz.to_zarr`.

    Raises
    ------
    WriteError
        The store failed; errors of the computation are raised unchanged.
    """
    tasks = []
    # Looking for chunks that are all fill value costs a pass over every draw, and an absent
    # chunk could then mean either. An array keeps the setting under which it was opened.
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, variable in lazy.items():
            array = variable.data
            indices = _find_unwritten(name, array, done)
            if indices:
                target = zarr.open_array(into, path=name, mode="r+", zarr_format=3)
                tasks.append(_make_write_tasks(name, array, target, note, indices, precision))
    with progress_bar(progress), use_scheduler():
        compute(*tasks)


def source_stores(lazy: Mapping[str, xr.Variable]) -> Iterator[Store]:
    """Iterate over the Zarr stores that the graphs of lazy variables read from."""
    for variable in lazy.values():
        for node in dict(variable.data.dask).values():
            # xarray wraps an array of a store in adapters, each of which holds the next.
            value: Any = getattr(node, "value", node)
            while hasattr(value, "array"):
                value = value.array
            array = getattr(value, "_array", None)
            if isinstance(array, Array):
                yield array.store_path.store


def _find_unwritten(
    name: str, array: da.Array, done: Collection[tuple[str, tuple[int, ...]]]
) -> list[tuple[int, ...]]:
    """Return the indices of the blocks that are not done."""
    indices = product(*(range(n) for n in array.numblocks))
    return [index for index in indices if (name, index) not in done]


def _make_write_tasks(
    name: str,
    array: da.Array,
    target: Array,
    note: Note,
    indices: Sequence[tuple[int, ...]],
    precision: int | None,
) -> da.Array:
    """Build a lazy bool array ``(block,)`` whose tasks write one missing block each."""
    starts = [tuple(accumulate((0, *chunks[:-1]))) for chunks in array.chunks]
    write = partial(_write, name=name, target=target, note=note, precision=precision)
    layer = f"aimz-write-{name}-{tokenize(array.name, indices)}"
    graph: dict[Any, Any] = {}
    for number, index in enumerate(indices):
        region = tuple(
            slice(start[i], start[i] + chunks[i])
            for start, chunks, i in zip(starts, array.chunks, index, strict=True)
        )
        key = (layer, number)
        graph[key] = GraphTask(key, write, TaskRef((array.name, *index)), region, index)
    layers = HighLevelGraph.from_collections(layer, graph, dependencies=[array])  # type: ignore[list-item] # dask's own
    chunks = ((1,) * len(indices),)
    return da.Array(layers, layer, chunks=chunks, meta=np.empty(0, bool))


def _write(
    block: np.ndarray,
    region: tuple[slice, ...],
    index: tuple[int, ...],
    *,
    name: str,
    target: Array,
    note: Note,
    precision: int | None,
) -> np.ndarray:
    values = np.asarray(block)
    rounded = values if precision is None else round_mantissa(values, precision)
    try:
        target[region] = rounded
        note(name, index)
    except WriteError:
        raise
    except Exception as error:
        # A store may raise any class; errors of the computation are raised before this.
        raise WriteError(f"{type(error).__name__}: {error}") from error
    return np.ones(1, bool)
