"""A Zarr store read only as far as its spec vouches for it.

Nothing is opened before it has been compared with the spec and with closed lists of dtypes
and codecs: whoever wrote a store, no code of theirs is run. Paths are names of arrays within
the store, never files, and a directory with a link in it is refused.
"""

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

from xr_aimz import manifest
from xr_aimz.completeness import grid
from xr_aimz.errors import (
    DamagedStoreError,
    IncompleteStoreError,
    MemoryLimitError,
    StoreKindError,
)
from xr_aimz.listing import list_entries
from xr_aimz.memory import available
from xr_aimz.vault import DIGEST, SPEC, content_digest, digest, is_path

__all__ = ["Vault"]

# What the root of a fit per cell has beside its identity, which is under the name of the spec.
_CELLS = "xr_aimz_block"
_NAMED = {"blosc", "bytes", "crc32c", "vlen-utf8"}
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
class Vault:
    """A store that was found to be whole, and what its spec says."""

    name: str
    store: Store
    spec: Mapping[str, Any]

    @classmethod
    def opened(cls, store: Any) -> Vault:
        """A store, its spec verified; no array is opened.

        Raises
        ------
        StoreKindError
            It is a store of something else.
        DamagedStoreError
            It is not as it was written.
        """
        name, into = repr(str(store)), manifest.as_store(store)
        _check_links(name, into)
        attributes = _mapping(_json(name, into, manifest.ROOT).get("attributes"))
        _check_kind(name, into, attributes)
        spec = _mapping(attributes[SPEC])
        if digest(spec) != attributes.get(DIGEST):
            raise DamagedStoreError(
                f"{name}: the spec was changed after it was written (sha256 {digest(spec)}, "
                f"written was {attributes.get(DIGEST)!r})"
            )
        return cls(name, into, spec)

    def verify(self) -> None:
        """Compare all metadata with the spec, and see that every chunk is there.

        Raises
        ------
        DamagedStoreError
            Says what is missing or differs.
        """
        for group, told in _mapping(self.spec.get("groups")).items():
            if not is_path(f"{group}/x"):
                raise DamagedStoreError(f"{self.name}: {group!r} is no name of a group")
            document = self._json(f"{group}/{manifest.ROOT}")
            if digest(document) != told or document.get("node_type") != "group":
                raise DamagedStoreError(
                    f"{self.name}: the metadata of group {group!r} was changed"
                )
        keys: dict[str, list[str]] = defaultdict(list)
        for key in list_entries(self.store):
            parts = key.split("/", maxsplit=2)
            keys["/".join(parts[:2])] += parts[2:]
        for path, entry in _mapping(self.spec.get("arrays")).items():
            self._verify_array(path, _mapping(entry), keys[path])

    def _verify_array(self, path: str, entry: Mapping[str, Any], keys: Sequence[str]) -> None:
        if not is_path(path):
            raise DamagedStoreError(
                f"{self.name}: {path!r} is no path of an array within the store"
            )
        document = self._json(f"{path}/{manifest.ROOT}")
        if digest(document) != entry.get("metadata"):
            raise DamagedStoreError(f"{self.name}: the metadata of array {path!r} was changed")
        _check_metadata(self.name, path, document)
        count = entry.get("chunks")
        if count != prod(grid(document)):
            raise DamagedStoreError(f"{self.name}: array {path!r} cannot have {count!r} chunks")
        absent = count - sum(_is_chunk(key, grid(document)) for key in keys)
        if absent > 0:
            raise DamagedStoreError(
                f"{self.name}: array {path!r} lacks {absent} of its {count} chunks"
            )
        self._check_room(path, document)

    def _check_room(self, path: str, document: Mapping[str, Any]) -> None:
        """What is read at once, an array or a chunk of a lazy one, must fit in memory."""
        whole = "values" in self.spec["arrays"][path]
        shape = document["shape"]
        if not whole:
            shape = document["chunk_grid"]["configuration"]["chunk_shape"]
        weight, room = prod(shape) * _weight(document["data_type"]), available()
        if weight > room:
            raise MemoryLimitError(
                f"{self.name}: array {path!r} says that it has {weight:.3g} bytes to be read at "
                f"once, and there is memory for {room:.3g}"
            )

    def _json(self, key: str) -> Mapping[str, Any]:
        return _json(self.name, self.store, key)

    def values(self, path: str) -> np.ndarray:
        """An array, read and compared with its digest."""
        try:
            array = self.lazy(path)
            # Of no axis a string comes as a str, which NumPy would give a length.
            found = np.asarray(array[...], array.dtype)
        except Exception as error:
            # Whatever a codec raises of bytes that are not its own.
            raise DamagedStoreError(
                f"{self.name}: array {path!r} cannot be read, a chunk of it is damaged "
                f"({type(error).__name__}: {error})"
            ) from error
        if content_digest(found) != _mapping(self.spec["arrays"][path]).get("values"):
            raise DamagedStoreError(f"{self.name}: the values of array {path!r} were changed")
        return found

    def lazy(self, path: str) -> zarr.Array:
        """An array that is verified as far as its metadata."""
        if path not in _mapping(self.spec.get("arrays")):
            raise DamagedStoreError(f"{self.name}: the spec lists no array {path!r}")
        return zarr.open_array(self.store, path=path, mode="r", zarr_format=3)

    def chunked(
        self, path: str, dims: Sequence[str], chunks: tuple[tuple[int, ...], ...], name: str
    ) -> xr.Variable:
        """A dask-backed variable under that name: chunks are read when they are asked for."""
        if path not in _mapping(self.spec.get("arrays")):
            raise DamagedStoreError(f"{self.name}: the spec lists no array {path!r}")
        group, _, variable = path.partition("/")
        opened = xr.open_zarr(
            self.store,
            group=group,
            chunks=None,
            consolidated=False,
            decode_cf=False,
        )
        found = opened.variables[variable]
        if found.shape != tuple(map(sum, chunks)) or tuple(found.dims) != tuple(dims):
            raise DamagedStoreError(
                f"{self.name}: chunks {chunks!r} do not make the array {path!r}"
            )
        return found.chunk(dict(zip(dims, chunks, strict=True)), name=name)


def _json(name: str, store: Store, key: str) -> Mapping[str, Any]:
    found = sync(store.get(key, default_buffer_prototype()))
    if found is None and key == manifest.ROOT:
        begun = manifest.read(store) is not None
        why = "it was not written to its end, save the fit again" if begun else "there is none"
        raise IncompleteStoreError(f"{name} is no whole store of a fit: {why}")
    if found is None:
        raise DamagedStoreError(f"{name} is no whole store: {key!r} is missing")
    try:
        return _mapping(json.loads(found.to_bytes()))
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(f"{name}: {key!r} is no JSON ({error})") from error


def _check_kind(name: str, store: Store, attributes: Mapping[str, Any]) -> None:
    """A saved fit, and none of the other stores that this package writes."""
    if _CELLS in attributes:
        raise StoreKindError(
            f"{name} is what a fit per cell has as its store=: the draws, and nothing of the "
            "binding or the model. Repeat the fit with store= this path: finished cells are not "
            "fitted again, and save() of what it gives writes what load_fit reads. The draws "
            "alone: xarray.open_datatree(path, engine='zarr', consolidated=False)"
        )
    if manifest.read(store) is not None and SPEC not in attributes:
        raise StoreKindError(
            f"{name} is no saved fit: it holds results of to_zarr; open it by xr_aimz.open_zarr"
        )
    if SPEC not in attributes:
        raise StoreKindError(
            f"{name} is no saved fit: its root has no attribute {SPEC!r}; give a store that "
            "fit.save(...) wrote"
        )


def _mapping(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise DamagedStoreError(f"{str(found)[:80]!r} stands where the spec has a mapping")
    return found


def _check_metadata(name: str, path: str, document: Mapping[str, Any]) -> None:
    """An array of the kind that is written here: a closed list of dtypes and codecs."""
    told = {k: document.get(k) for k in ("data_type", "chunk_key_encoding", "chunk_grid")}
    codecs = [c.get("name") if isinstance(c, dict) else c for c in document.get("codecs", [None])]
    encoding = {"name": "default", "configuration": {"separator": "/"}}
    good = (
        document.get("zarr_format") == 3
        and document.get("node_type") == "array"
        and set(document) <= _FIELDS
        and not document.get("storage_transformers")
        and isinstance(told["data_type"], str)
        and _DTYPES.fullmatch(told["data_type"])
        and told["chunk_key_encoding"] == encoding
        and isinstance(told["chunk_grid"], dict)
        and told["chunk_grid"].get("name") == "regular"
        and _are_lengths(document.get("shape"), 0)
        and _are_lengths(told["chunk_grid"].get("configuration", {}).get("chunk_shape"), 1)
        and set(codecs) <= _NAMED
        and codecs[-1] == "crc32c"
    )
    if not good:
        raise DamagedStoreError(
            f"{name}: array {path!r} has a dtype, codec or layout that no saved fit has: "
            f"{told['data_type']!r}, codecs {codecs!r}"
        )


def _weight(dtype: str) -> int:
    """The least bytes of an entry."""
    return 16 if dtype == "string" else np.dtype(dtype).itemsize


def _is_chunk(key: str, grid: tuple[int, ...]) -> bool:
    first, *index = key.split("/")
    return (
        first == "c"
        and len(index) == len(grid)
        and all(i.isdecimal() and int(i) < n for i, n in zip(index, grid, strict=True))
    )


def _are_lengths(found: Any, least: int) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= least for n in found)


def _check_links(name: str, store: Store) -> None:
    """In a directory nothing leads out of it."""
    if not isinstance(store, LocalStore):
        return
    links = [p for p in Path(store.root).rglob("*") if p.is_symlink()]
    if links:
        raise DamagedStoreError(
            f"{name}: {str(links[0].relative_to(store.root))!r} is a link, which may lead out of "
            "the store; no saved fit has any"
        )
