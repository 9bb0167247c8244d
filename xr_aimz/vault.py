"""Named arrays and one spec into a Zarr store, which is whole or not there.

The spec lies in the root's attrs, beside a digest of itself, and is written last. It lists
every array with the number of its chunks and a digest of its metadata, and of an array that
is read at once a digest of its values. Each chunk ends in a checksum. So what is cut short,
lost or edited is found, by the spec or by the chunk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from xr_aimz import manifest
from xr_aimz.completeness import grid
from xr_aimz.errors import StoreError, WriteError
from xr_aimz.template import CHECKED, missing_value
from xr_aimz.writing import stores_read, write

__all__ = ["DIGEST", "SPEC", "Content", "content_digest", "digest", "is_path", "keep"]

SPEC, DIGEST = "xr_aimz_fit", "xr_aimz_sha256"
_CHUNK = 2**26
# A name is one part of a path: it can lead nowhere else.
_NAME = re.compile(r"[^/\\\x00-\x1f]{1,200}")


@dataclass
class Content:
    """What is to be kept: arrays by their path, ``group/name``, and attrs of groups.

    ``lazy`` ones are dask-backed, in chunks of one size.
    """

    eager: dict[str, np.ndarray] = field(default_factory=dict)
    lazy: dict[str, xr.Variable] = field(default_factory=dict)
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attrs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        return [*self.eager, *self.lazy]

    @property
    def groups(self) -> list[str]:
        return sorted({path.partition("/")[0] for path in [*self.paths, *self.attrs]})


def keep(store: Any, content: Content, spec: Mapping[str, Any], mode: str) -> None:
    """Write arrays, then the spec, which makes the store whole.

    Raises
    ------
    StoreError
        The store exists, or a name cannot be kept.
    WriteError
        Writing failed; what is there is not whole, and the same call replaces it.
    """
    _check_names(content)
    into = manifest.as_store(store)
    _check_own_source(store, into, content)
    _make_room(store, into, mode)
    template = _template(content)
    documents = {k: v for k, v in manifest.contents(template).items() if k != manifest.ROOT}
    manifest.begin(into, manifest.Manifest("a fit", {}), documents)
    try:
        # A chunk that is absent is a chunk that was lost; an array keeps what was set when it
        # was opened.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for path, values in content.eager.items():
                zarr.open_array(into, path=path, mode="r+", zarr_format=3)[...] = values
    except Exception as error:
        # A store's own errors are of any class.
        raise WriteError(f"writing {str(store)!r} failed: {error}") from error
    write(into, content.lazy, (), _unmarked, None, False)
    listed = {path: _entry(content, path, documents) for path in content.paths}
    groups = {g: digest(json.loads(documents[f"{g}/{manifest.ROOT}"])) for g in content.groups}
    whole = {**spec, "arrays": listed, "groups": groups}
    manifest.put(into, {manifest.ROOT: _root(whole)})
    with suppress(Exception):
        # Whole already; other readers of Zarr wonder at what is no array.
        sync(into.delete_dir(manifest.FOLDER))


def _make_room(store: Any, into: Store, mode: str) -> None:
    if mode not in ("w-", "w"):
        raise StoreError(f"mode={mode!r}: there are 'w-' and 'w'")
    if not manifest.occupied(into):
        return
    there = manifest.read(into)
    unfinished = there is not None and there.fingerprint == "a fit" and not manifest.is_whole(into)
    if mode != "w" and not unfinished:
        raise StoreError(f"{str(store)!r} exists; choose another path, or mode='w'")
    if mode != "w" and (foreign := manifest.foreign(into)):
        raise StoreError(
            f"{str(store)!r} holds a save that was cut short, and {foreign[:3]!r}, which are no "
            "part of it; choose another path, or mode='w', which empties it"
        )
    manifest.clear(into)


def _check_own_source(store: Any, into: Store, content: Content) -> None:
    """What is to be replaced must not be what lazy draws are read from."""
    if any(manifest.holds(into, source) for source in stores_read(content.lazy)):
        raise StoreError(f"the fit is read from {str(store)!r} itself; choose another path")


def _unmarked(name: str, index: tuple[int, ...]) -> None:
    """A block needs no mark: what was cut short is written anew."""


def _check_names(content: Content) -> None:
    bad = [p for p in content.paths if not is_path(p)]
    if bad:
        raise StoreError(
            f"names {bad!r} cannot be kept in a store: a slash would separate groups; rename the "
            "variables"
        )


def is_path(path: Any) -> bool:
    """Whether it is ``group/name`` and leads nowhere else."""
    parts = str(path).split("/")
    return (
        isinstance(path, str)
        and len(parts) == 2
        and all(_NAME.fullmatch(p) and p.strip(".") and p != manifest.ROOT for p in parts)
        and not any(p.startswith("__") for p in parts)
        and parts[0] != manifest.FOLDER
    )


def _template(content: Content) -> MemoryStore:
    """The metadata of all arrays and groups, without any values."""
    memory = MemoryStore()
    for group in content.groups:
        zarr.create_group(memory, path=group, zarr_format=3, attributes=content.attrs.get(group))
    for path in content.paths:
        array = content.eager.get(path, content.lazy.get(path))
        assert array is not None
        zarr.create_array(
            memory,
            name=path,
            shape=array.shape,
            dtype=array.dtype,
            chunks=_chunks(content, path),
            compressors=CHECKED,
            fill_value=missing_value(array.dtype),
            dimension_names=content.dims[path],
            attributes=content.attrs.get(path, {}),
        )
    return memory


def _chunks(content: Content, path: str) -> tuple[int, ...]:
    """The blocks of a lazy array; of others pieces along the first long axis."""
    if path in content.lazy:
        return tuple(max(c) for c in content.lazy[path].chunks or ())
    array = content.eager[path]
    chunks, weight = [max(n, 1) for n in array.shape], max(array.nbytes, 1)
    for axis, n in enumerate(chunks):
        chunks[axis] = max(1, n * _CHUNK // weight) if weight > _CHUNK else n
        weight = weight * chunks[axis] // n
    return tuple(chunks)


def _entry(content: Content, path: str, documents: Mapping[str, bytes]) -> dict[str, Any]:
    metadata = json.loads(documents[f"{path}/{manifest.ROOT}"])
    entry = {"metadata": digest(metadata), "chunks": prod(grid(metadata))}
    if path in content.eager:
        entry["values"] = content_digest(content.eager[path])
    return entry


def content_digest(values: np.ndarray) -> str:
    """A digest of an array's values, whatever its chunks."""
    found = hashlib.sha256(repr((str(values.dtype), values.shape)).encode())
    if isinstance(values.dtype, np.dtypes.StringDType):
        found.update(json.dumps(values.tolist()).encode())
    else:
        found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def digest(document: Any) -> str:
    """A digest of what a JSON document says, however it is spaced."""
    return hashlib.sha256(_canonical(document)).hexdigest()


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _root(spec: Mapping[str, Any]) -> bytes:
    attributes = {DIGEST: digest(spec), SPEC: spec}
    root = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(root, allow_nan=False, indent=1).encode()
