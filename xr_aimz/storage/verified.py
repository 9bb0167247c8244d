"""Read arrays from a Zarr store, each verified against the digests in the store's spec."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from xr_aimz.errors import (
    DamagedStoreError,
    IncompleteStoreError,
    MemoryLimitError,
    StoreKindError,
)
from xr_aimz.options import available_memory
from xr_aimz.storage.bundle import DIGEST, SPEC, content_digest, is_array_path, json_digest
from xr_aimz.storage.completeness import ROOT, as_store, chunk_grid, read_manifest
from xr_aimz.storage.listing import list_entries

# Attribute at the root of a fit per cell; its identity is under the same name as the spec.
_CELLS_ATTR = "xr_aimz_block"
_CODEC_NAMES = {"blosc", "bytes", "crc32c", "vlen-utf8"}
_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|string")
_FIELDS = {
    "attributes",
    "chunk_grid",
    "chunk_key_encoding",
    "codecs",
    "data_type",
    "dimension_names",
    "fill_value",
    "node_type",
    "shape",
    "storage_transformers",
    "zarr_format",
}


@dataclass(frozen=True)
class VerifiedStore:
    """Complete store of a saved fit, with its verified spec."""

    name: str
    store: Store
    spec: Mapping[str, Any]

    @classmethod
    def opened(cls, store: Any) -> VerifiedStore:
        """Open a store and verify its spec, without opening any array.

        Raises
        ------
        StoreKindError
            The store holds something else than a saved fit.
        DamagedStoreError
            The store differs from what was written.
        """
        name, into = repr(str(store)), as_store(store)
        _check_links(name, into)
        attributes = _as_mapping(_read_json(name, into, ROOT).get("attributes"))
        _check_kind(name, into, attributes)
        spec = _as_mapping(attributes[SPEC])
        if json_digest(spec) != attributes.get(DIGEST):
            raise DamagedStoreError(
                f"{name}: the spec was changed after it was written (sha256 {json_digest(spec)}, "
                f"written was {attributes.get(DIGEST)!r})"
            )
        return cls(name, into, spec)

    def verify(self) -> None:
        """Compare all metadata with the spec, and check that every chunk exists.

        Raises
        ------
        DamagedStoreError
            With the group or array that is missing or differs.
        """
        for group, digest in _as_mapping(self.spec.get("groups")).items():
            if not is_array_path(f"{group}/x"):
                raise DamagedStoreError(f"{self.name}: {group!r} is no name of a group")
            document = self._json(f"{group}/{ROOT}")
            if json_digest(document) != digest or document.get("node_type") != "group":
                raise DamagedStoreError(
                    f"{self.name}: the metadata of group {group!r} was changed"
                )
        keys: dict[str, list[str]] = defaultdict(list)
        for key in list_entries(self.store):
            parts = key.split("/", maxsplit=2)
            keys["/".join(parts[:2])] += parts[2:]
        for path, entry in _as_mapping(self.spec.get("arrays")).items():
            self._verify_array(path, _as_mapping(entry), keys[path])

    def _verify_array(self, path: str, entry: Mapping[str, Any], keys: Sequence[str]) -> None:
        if not is_array_path(path):
            raise DamagedStoreError(
                f"{self.name}: {path!r} is no path of an array within the store"
            )
        document = self._json(f"{path}/{ROOT}")
        if json_digest(document) != entry.get("metadata"):
            raise DamagedStoreError(f"{self.name}: the metadata of array {path!r} was changed")
        _check_metadata(self.name, path, document)
        count = entry.get("chunks")
        if count != prod(chunk_grid(document)):
            raise DamagedStoreError(f"{self.name}: array {path!r} cannot have {count!r} chunks")
        absent = count - sum(_is_chunk(key, chunk_grid(document)) for key in keys)
        if absent > 0:
            raise DamagedStoreError(
                f"{self.name}: array {path!r} lacks {absent} of its {count} chunks"
            )
        self._check_room(path, document)

    def _check_room(self, path: str, document: Mapping[str, Any]) -> None:
        """Check that an eager array, or a chunk of a lazy one, fits in memory."""
        is_eager = "values" in self.spec["arrays"][path]
        shape = document["shape"]
        if not is_eager:
            shape = document["chunk_grid"]["configuration"]["chunk_shape"]
        nbytes, available = prod(shape) * _least_bytes(document["data_type"]), available_memory()
        if nbytes > available:
            raise MemoryLimitError(
                f"{self.name}: array {path!r} says that it has {nbytes:.3g} bytes to be read at "
                f"once, and there is memory for {available:.3g}"
            )

    def _json(self, key: str) -> Mapping[str, Any]:
        return _read_json(self.name, self.store, key)

    def values(self, path: str) -> np.ndarray:
        """Read an array, and compare its values with their digest."""
        try:
            array = self.lazy(path)
            # A string without axes is read as a str, to which NumPy would give a fixed length.
            result = np.asarray(array[...], array.dtype)
        except Exception as error:
            # A codec may raise any class on damaged bytes.
            raise DamagedStoreError(
                f"{self.name}: array {path!r} cannot be read, a chunk of it is damaged "
                f"({type(error).__name__}: {error})"
            ) from error
        if content_digest(result) != _as_mapping(self.spec["arrays"][path]).get("values"):
            raise DamagedStoreError(f"{self.name}: the values of array {path!r} were changed")
        return result

    def lazy(self, path: str) -> zarr.Array:
        """Open an array of which the metadata is verified, and no values are read."""
        if path not in _as_mapping(self.spec.get("arrays")):
            raise DamagedStoreError(f"{self.name}: the spec lists no array {path!r}")
        return zarr.open_array(self.store, path=path, mode="r", zarr_format=3)

    def chunked(
        self, path: str, dims: Sequence[str], chunks: tuple[tuple[int, ...], ...], name: str
    ) -> xr.Variable:
        """Open an array as a dask-backed variable with these dims and chunks, named ``name``."""
        if path not in _as_mapping(self.spec.get("arrays")):
            raise DamagedStoreError(f"{self.name}: the spec lists no array {path!r}")
        group, _, variable = path.partition("/")
        opened = xr.open_zarr(
            self.store,
            group=group,
            chunks=None,
            consolidated=False,
            decode_cf=False,
        )
        result = opened.variables[variable]
        if result.shape != tuple(map(sum, chunks)) or tuple(result.dims) != tuple(dims):
            raise DamagedStoreError(
                f"{self.name}: chunks {chunks!r} do not make the array {path!r}"
            )
        return result.chunk(dict(zip(dims, chunks, strict=True)), name=name)


def _read_json(name: str, store: Store, key: str) -> Mapping[str, Any]:
    buffer = sync(store.get(key, default_buffer_prototype()))
    if buffer is None and key == ROOT:
        begun = read_manifest(store) is not None
        reason = "it was not written to its end, save the fit again" if begun else "there is none"
        raise IncompleteStoreError(f"{name} is no whole store of a fit: {reason}")
    if buffer is None:
        raise DamagedStoreError(f"{name} is no whole store: {key!r} is missing")
    try:
        return _as_mapping(json.loads(buffer.to_bytes()))
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{name}: {key!r} is no JSON ({error})") from error


def _check_kind(name: str, store: Store, attributes: Mapping[str, Any]) -> None:
    """Refuse a store that is no saved fit, such as the other stores that this package writes."""
    if _CELLS_ATTR in attributes:
        raise StoreKindError(
            f"{name} is what a fit per cell has as its store=: the draws, and nothing of the "
            "binding or the model. Repeat the fit with store= this path: finished cells are not "
            "fitted again, and save() of what it gives writes what load_fit reads. The draws "
            "alone: xarray.open_datatree(path, engine='zarr', consolidated=False)"
        )
    if read_manifest(store) is not None and SPEC not in attributes:
        raise StoreKindError(
            f"{name} is no saved fit: it holds results of to_zarr; open it by xr_aimz.open_zarr"
        )
    if SPEC not in attributes:
        raise StoreKindError(
            f"{name} is no saved fit: its root has no attribute {SPEC!r}; give a store that "
            "fit.save(...) wrote"
        )


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DamagedStoreError(f"{str(value)[:80]!r} is found where the spec needs a mapping")
    return value


def _check_metadata(name: str, path: str, document: Mapping[str, Any]) -> None:
    """Check an array against the closed list of dtypes, codecs and layouts of saved fits."""
    layout = {k: document.get(k) for k in ("data_type", "chunk_key_encoding", "chunk_grid")}
    codecs = [c.get("name") if isinstance(c, dict) else c for c in document.get("codecs", [None])]
    encoding = {"name": "default", "configuration": {"separator": "/"}}
    is_valid = (
        document.get("zarr_format") == 3
        and document.get("node_type") == "array"
        and set(document) <= _FIELDS
        and not document.get("storage_transformers")
        and isinstance(layout["data_type"], str)
        and _DTYPES.fullmatch(layout["data_type"])
        and layout["chunk_key_encoding"] == encoding
        and isinstance(layout["chunk_grid"], dict)
        and layout["chunk_grid"].get("name") == "regular"
        and _are_lengths(document.get("shape"), 0)
        and _are_lengths(layout["chunk_grid"].get("configuration", {}).get("chunk_shape"), 1)
        and set(codecs) <= _CODEC_NAMES
        and codecs[-1] == "crc32c"
    )
    if not is_valid:
        raise DamagedStoreError(
            f"{name}: array {path!r} has a dtype, codec or layout that no saved fit has: "
            f"{layout['data_type']!r}, codecs {codecs!r}"
        )


def _least_bytes(dtype: str) -> int:
    """Return the least size of an entry in bytes."""
    return 16 if dtype == "string" else np.dtype(dtype).itemsize


def _is_chunk(key: str, grid: tuple[int, ...]) -> bool:
    first, *index = key.split("/")
    return (
        first == "c"
        and len(index) == len(grid)
        and all(i.isdecimal() and int(i) < n for i, n in zip(index, grid, strict=True))
    )


def _are_lengths(lengths: Any, least: int) -> bool:
    return isinstance(lengths, list) and all(type(n) is int and n >= least for n in lengths)


def _check_links(name: str, store: Store) -> None:
    """Refuse a local store with symbolic links, which may lead out of it."""
    if not isinstance(store, LocalStore):
        return
    links = [p for p in Path(store.root).rglob("*") if p.is_symlink()]
    if links:
        raise DamagedStoreError(
            f"{name}: {str(links[0].relative_to(store.root))!r} is a link, which may lead out of "
            "the store; no saved fit has any"
        )
