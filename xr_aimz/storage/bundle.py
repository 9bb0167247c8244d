"""Write named arrays and one spec to a Zarr store, which is readable only once complete."""

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

from xr_aimz.errors import StoreError, WriteError
from xr_aimz.storage.blocks import CHECKED, missing_value, source_stores, write_blocks
from xr_aimz.storage.completeness import (
    FOLDER,
    ROOT,
    Manifest,
    as_store,
    begin_write,
    chunk_grid,
    clear_store,
    contains,
    is_complete,
    is_nonempty,
    put_document,
    read_manifest,
    store_contents,
    unknown_keys,
)

SPEC, DIGEST = "xr_aimz_fit", "xr_aimz_sha256"
_CHUNK_BYTES = 2**26
# A name is one part of a path, so that it cannot refer outside of the store.
_NAME = re.compile(r"[^/\\\x00-\x1f]{1,200}")


@dataclass
class ArrayBundle:
    """Arrays to store, by their path ``group/name``, with their dims and the attrs of groups.

    Those in ``lazy`` are dask-backed, in chunks of one size.
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


def write_bundle(store: Any, content: ArrayBundle, spec: Mapping[str, Any], mode: str) -> None:
    """Write the arrays of a bundle to a store, then the spec, which completes it.

    Raises
    ------
    StoreError
        The store exists, or a name cannot be stored.
    WriteError
        Writing failed; the store is left incomplete, and the same call replaces it.
    """
    _check_array_names(content)
    into = as_store(store)
    _check_not_source(store, into, content)
    _prepare_store(store, into, mode)
    template = _make_template(content)
    documents = {k: v for k, v in store_contents(template).items() if k != ROOT}
    begin_write(into, Manifest("a fit", {}), documents)
    try:
        # An absent chunk has to mean a lost one, so empty chunks are written too; an array keeps
        # the setting under which it was opened.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for path, values in content.eager.items():
                zarr.open_array(into, path=path, mode="r+", zarr_format=3)[...] = values
    except Exception as error:
        # A store may raise any class.
        raise WriteError(f"writing {str(store)!r} failed: {error}") from error
    write_blocks(into, content.lazy, (), _skip_mark, None, False)
    entries = {path: _describe_array(content, path, documents) for path in content.paths}
    groups = {g: json_digest(json.loads(documents[f"{g}/{ROOT}"])) for g in content.groups}
    full_spec = {**spec, "arrays": entries, "groups": groups}
    put_document(into, {ROOT: _encode_root(full_spec)})
    with suppress(Exception):
        # The store is complete already; other readers of Zarr warn of a folder that is no array.
        sync(into.delete_dir(FOLDER))


def _prepare_store(store: Any, into: Store, mode: str) -> None:
    if mode not in ("w-", "w"):
        raise StoreError(f"mode={mode!r}: there are 'w-' and 'w'")
    if not is_nonempty(into):
        return
    manifest = read_manifest(into)
    unfinished = manifest is not None and manifest.fingerprint == "a fit" and not is_complete(into)
    if mode != "w" and not unfinished:
        raise StoreError(f"{str(store)!r} exists; choose another path, or mode='w'")
    if mode != "w" and (extra := unknown_keys(into)):
        raise StoreError(
            f"{str(store)!r} holds a save that was cut short, and {extra[:3]!r}, which are no "
            "part of it; choose another path, or mode='w', which empties it"
        )
    clear_store(into)


def _check_not_source(store: Any, into: Store, content: ArrayBundle) -> None:
    """Refuse to write to a store that the lazy arrays are read from."""
    if any(contains(into, source) for source in source_stores(content.lazy)):
        raise StoreError(f"the fit is read from {str(store)!r} itself; choose another path")


def _skip_mark(name: str, index: tuple[int, ...]) -> None:
    """Record nothing for a written block: an interrupted save is written again as a whole."""


def _check_array_names(content: ArrayBundle) -> None:
    invalid = [p for p in content.paths if not is_array_path(p)]
    if invalid:
        raise StoreError(
            f"names {invalid!r} cannot be stored: a slash would separate groups; rename the "
            "variables"
        )


def is_array_path(path: Any) -> bool:
    """Return whether a path is ``group/name`` and stays within the store."""
    parts = str(path).split("/")
    return (
        isinstance(path, str)
        and len(parts) == 2
        and all(_NAME.fullmatch(p) and p.strip(".") and p != ROOT for p in parts)
        and not any(p.startswith("__") for p in parts)
        and parts[0] != FOLDER
    )


def _make_template(content: ArrayBundle) -> MemoryStore:
    """Write the metadata of all arrays and groups, without values, to a store in memory."""
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
            chunks=_chunk_shape(content, path),
            compressors=CHECKED,
            fill_value=missing_value(array.dtype),
            dimension_names=content.dims[path],
            attributes=content.attrs.get(path, {}),
        )
    return memory


def _chunk_shape(content: ArrayBundle, path: str) -> tuple[int, ...]:
    """Return an array's chunk shape: a lazy array's blocks, or parts of at most 64 MiB by axis."""
    if path in content.lazy:
        return tuple(max(c) for c in content.lazy[path].chunks or ())
    array = content.eager[path]
    chunks, nbytes = [max(n, 1) for n in array.shape], max(array.nbytes, 1)
    for axis, n in enumerate(chunks):
        chunks[axis] = max(1, n * _CHUNK_BYTES // nbytes) if nbytes > _CHUNK_BYTES else n
        nbytes = nbytes * chunks[axis] // n
    return tuple(chunks)


def _describe_array(
    content: ArrayBundle, path: str, documents: Mapping[str, bytes]
) -> dict[str, Any]:
    metadata = json.loads(documents[f"{path}/{ROOT}"])
    entry = {"metadata": json_digest(metadata), "chunks": prod(chunk_grid(metadata))}
    if path in content.eager:
        entry["values"] = content_digest(content.eager[path])
    return entry


def content_digest(values: np.ndarray) -> str:
    """Return the SHA-256 digest of an array's dtype, shape and values; chunks do not count."""
    digest = hashlib.sha256(repr((str(values.dtype), values.shape)).encode())
    if isinstance(values.dtype, np.dtypes.StringDType):
        digest.update(json.dumps(values.tolist()).encode())
    else:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def json_digest(document: Any) -> str:
    """Return the SHA-256 digest of a JSON document; spacing and order of keys do not count."""
    return hashlib.sha256(_encode_canonical(document)).hexdigest()


def _encode_canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _encode_root(spec: Mapping[str, Any]) -> bytes:
    attributes = {DIGEST: json_digest(spec), SPEC: spec}
    root = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(root, allow_nan=False, indent=1).encode()
