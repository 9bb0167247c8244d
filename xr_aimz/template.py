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
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from xr_aimz.errors import OptionError

__all__ = ["CODECS", "encoded", "layout", "plain", "sharded", "template", "uniform"]

# By measurement, docs/store.md: a stronger codec finds as little in noise, and takes longer.
# Blocks of 64 KiB stay in a core's first caches: 0.8 of the time that Blosc's own size takes.
CODECS = (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", blocksize=2**16),)
_KEPT = ("units", "calendar")
# Attrs that would have a reader change the values; these are written as they are.
_DECODED = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")


def uniform(ds: xr.Dataset) -> xr.Dataset:
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
        kept = _KEPT if variable.chunks is None else ()
        variable.encoding = {k: v for k, v in variable.encoding.items() if k in kept}
    return uniform


def sharded(ds: xr.Dataset, shards: Mapping[str, int] | None) -> xr.Dataset:
    """A task for each shard: blocks put together."""
    if not shards:
        return ds
    strangers = sorted(set(shards) - set(ds.chunks))
    if strangers:
        raise OptionError(f"shards={strangers!r}: the results are chunked along {[*ds.chunks]!r}")
    return ds.chunk({d: -(-n // max(ds.chunks[d])) * max(ds.chunks[d]) for d, n in shards.items()})


def template(
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
            compressors=CODECS,
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
