"""How a Dataset lies in a Zarr store: its arrays, chunks and attrs, before any block.

What xarray would write of it, but for the blocks: chunks of one size, dates and flags
encoded, coordinates named where CF wants them. It is laid out in a store in memory,
whose keys then go wherever the results go.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.conventions import encode_cf_variable, encode_dataset_coordinates
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from xr_aimz.errors import OptionError

__all__ = [
    "CHECKED",
    "CODECS",
    "encoded",
    "layout",
    "missing_value",
    "plain",
    "sharded",
    "strings_of",
    "template",
    "uniform",
    "with_objects_loaded",
    "with_strings",
]

# By measurement, docs/store.md: a stronger codec finds as little in noise, and takes longer.
# Blocks of 64 KiB stay in a core's first caches: 0.8 of the time that Blosc's own size takes.
_BLOSC = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", blocksize=2**16)
# Of labels and fits: a checksum, by which any reader of Zarr finds a chunk that was cut.
CHECKED: tuple[BytesBytesCodec, ...] = (_BLOSC, Crc32cCodec())
# Of the blocks of results, of which it would take a tenth: docs/decisions/lost-chunks.md.
CODECS: tuple[BytesBytesCodec, ...] = (_BLOSC,)
_KEPT = ("units", "calendar")
# Attrs that would have a reader change the values; these are written as they are.
_DECODED = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")


def with_objects_loaded(ds: xr.Dataset) -> xr.Dataset:
    """A Dataset whose lazy strings, and dates of a calendar, are in memory.

    What dtype they would be stored with is not known before.
    """
    lazy = {
        n: v for n, v in ds.variables.items() if v.chunks is not None and v.dtype.kind in "OUT"
    }
    return _replaced(ds, xr.Dataset(lazy).compute().variables)


def uniform(ds: xr.Dataset) -> xr.Dataset:
    """As Zarr can hold it: chunks of one size, strings of any length."""
    lengths = {d: max(c) for d, c in ds.chunks.items() if set(c[:-1]) - {max(c)}}
    # Coordinates in memory are labels, and few; data in memory are a block.
    blocks = {
        n: _chunked(v, lengths)
        for n, v in ds.variables.items()
        if v.chunks is not None or (n in ds.data_vars and v.ndim and v.dtype.kind in "fiubc")
    }
    # A string of fixed length has no place in the v3 specification; one of any length has.
    of_any_length = np.dtypes.StringDType()
    strings = {n: ds.variables[n].astype(of_any_length) for n in strings_of(ds)}
    uniform = _replaced(ds, {**blocks, **strings})
    for variable in uniform.variables.values():
        # How a source was stored (its codecs, its chunks) is no way to store this; how its
        # times were counted is.
        own = {k: v for k, v in variable.encoding.items() if k in _KEPT}
        variable.encoding = {**own, "compressors": CHECKED} if variable.chunks is None else {}
    return uniform


def strings_of(ds: xr.Dataset) -> dict[str, str]:
    """The dtype of each variable of strings in memory that Zarr has no such dtype for."""
    return {
        str(name): v.dtype.str if v.dtype.kind == "U" else "object"
        for name, v in ds.variables.items()
        if v.chunks is None
        and (v.dtype.kind == "U" or (v.dtype.kind == "O" and _are_strings(v.values)))
    }


def with_strings(ds: xr.Dataset, strings: Mapping[str, str]) -> xr.Dataset:
    """A Dataset that was opened, its strings in the dtypes that they had."""
    there = {n: dtype for n, dtype in strings.items() if n in ds.variables}
    return _replaced(ds, {n: ds.variables[n].astype(dtype) for n, dtype in there.items()})


def _chunked(variable: xr.Variable, lengths: Mapping[Any, int]) -> xr.Variable:
    return variable.chunk({d: n for d, n in lengths.items() if d in variable.dims})


def _are_strings(values: np.ndarray) -> bool:
    return values.size > 0 and all(isinstance(part, str) for part in values.flat)


def _replaced(ds: xr.Dataset, variables: Mapping[Any, xr.Variable]) -> xr.Dataset:
    """A copy with other values for some variables, which stay coordinates or data."""
    coords = {n: v for n, v in variables.items() if n in ds.coords}
    data = {n: v for n, v in variables.items() if n not in ds.coords}
    return ds.copy().assign_coords(coords).assign(data)


def missing_value(dtype: np.dtype) -> Any:
    """What a chunk that is lost reads as: NaN where there is one."""
    return dtype.type(np.nan) if dtype.kind in "fc" else np.zeros((), dtype)[()]


def sharded(ds: xr.Dataset, shards: Mapping[str, int] | None) -> xr.Dataset:
    """A task for each shard: blocks put together."""
    if not shards:
        return ds
    strangers = sorted(set(shards) - set(ds.chunks))
    if strangers:
        raise OptionError(f"shards={strangers!r}: the results are chunked along {[*ds.chunks]!r}")
    lengths = {d: -(-n // max(ds.chunks[d])) * max(ds.chunks[d]) for d, n in shards.items()}
    lazy = {n: v for n, v in ds.variables.items() if v.chunks is not None}
    return _replaced(ds, {n: _chunked(v, lengths) for n, v in lazy.items()})


def template(
    ds: xr.Dataset, lazy: Mapping[str, xr.Variable], layout: Mapping[str, Mapping[str, Any]]
) -> MemoryStore:
    """All of a store but the blocks: metadata, and what is in memory."""
    memory = MemoryStore()
    # A chunk that is absent is a chunk that was lost.
    with zarr.config.set({"array.write_empty_chunks": True}):
        ds.drop_vars(list(lazy)).to_zarr(memory, consolidated=False, zarr_format=3)
    # Not written lazily by xarray: dask.delayed would import distributed, half a second.
    for name, variable in lazy.items():
        zarr.create_array(
            memory,
            name=name,
            shape=variable.shape,
            dtype=variable.dtype,
            compressors=CODECS,
            fill_value=missing_value(variable.dtype),
            dimension_names=[str(d) for d in variable.dims],
            attributes={k: v for k, v in plain(variable.attrs).items() if k not in _DECODED},
            **layout[name],
        )
    # Which coordinates belong to which variable xarray knows of the Dataset as a whole.
    _, attrs = encode_dataset_coordinates(ds)
    zarr.open_group(memory, mode="r+").attrs.put(plain(attrs))
    with warnings.catch_warnings():
        # Consolidated metadata is not in the v3 specification yet; xarray reads it all the
        # same, https://github.com/zarr-developers/zarr-specs/pull/309.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(memory)
    return memory


def plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attrs as JSON can hold them: arrays as lists, NumPy's numbers as Python's."""
    return {str(k): v.tolist() if hasattr(v, "tolist") else v for k, v in attrs.items()}


def encoded(ds: xr.Dataset) -> dict[str, xr.Variable]:
    """The lazy variables by the conventions that xarray writes: dates as counts, and so on."""
    variables, _ = encode_dataset_coordinates(ds)
    return {
        str(name): encode_cf_variable(v, name=name)
        for name, v in variables.items()
        if v.chunks is not None
    }


def layout(
    blocks: xr.Dataset, lazy: Mapping[str, xr.Variable], shards: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """The lengths of chunks and shards: a chunk is a block, a shard is several."""
    whole = {name: tuple(max(c) for c in v.chunks or ()) for name, v in lazy.items()}
    if not shards:
        return {name: {"chunks": lengths} for name, lengths in whole.items()}
    inner = {name: tuple(max(c) for c in blocks.variables[name].chunks or ()) for name in lazy}
    return {name: {"chunks": inner[name], "shards": whole[name]} for name in lazy}
