"""Record which blocks of a Zarr store are written, and find chunks that are lost or truncated."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore

from xr_aimz.errors import StoreError, WriteError
from xr_aimz.storage.listing import Entry, can_list, list_entries, list_keys, unwrap_store

Index = tuple[int, ...]
Sizes = Mapping[str, Sequence[int | None]]
METADATA = "zarr.json"


@dataclass(frozen=True)
class Damage:
    """Chunks and metadata of a store that are absent or differ in size from what was written.

    Parameters
    ----------
    missing, cut : mapping of array to the indices of chunks
        Absent chunks, and chunks whose size differs from the size that was written.
    metadata : tuple of str
        Arrays whose metadata document is absent.
    """

    missing: Mapping[str, frozenset[Index]]
    cut: Mapping[str, frozenset[Index]]
    metadata: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.cut or self.metadata)

    def of(self, array: str) -> frozenset[Index]:
        """Return the indices of an array's chunks that have to be written again."""
        none: frozenset[Index] = frozenset()
        return self.missing.get(array, none) | self.cut.get(array, none)

    def __str__(self) -> str:
        """List the arrays, each with the number of its chunks and the first three indices."""
        parts = [
            *_describe_chunks(self.missing, "missing"),
            *_describe_chunks(self.cut, "not as long as written"),
        ]
        if self.metadata:
            parts.append(f"the metadata of {list(self.metadata[:5])!r} missing")
        return "; ".join(parts)


def _describe_chunks(chunks: Mapping[str, frozenset[Index]], what: str) -> Iterator[str]:
    for array, indices in sorted(chunks.items()):
        first = ", ".join(str(list(index)) for index in sorted(indices)[:3])
        more = ", ..." if len(indices) > 3 else ""
        yield f"{array!r} has {len(indices)} {what} (block {first}{more})"


def find_damage(
    documents: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Entry], sizes: Sizes
) -> Damage:
    """Compare the chunks that arrays should have with the listing of a store.

    Parameters
    ----------
    documents : mapping of array to metadata document
        Arrays of which every chunk has been written.
    entries : mapping of key to Entry
        The listing.
    sizes : mapping of array to the sizes of its chunks, in the order of :func:`numpy.ndindex`
        Sizes in bytes, where they were recorded.
    """
    missing: dict[str, frozenset[Index]] = {}
    truncated: dict[str, frozenset[Index]] = {}
    for array, document in documents.items():
        absent, short = set(), set()
        record = sizes.get(array)
        for at, index in enumerate(_iter_indices(document)):
            entry = entries.get(chunk_key(array, index))
            if entry is None:
                absent.add(index)
            elif record and None not in (record[at], entry.size) and record[at] != entry.size:
                short.add(index)
        missing |= {array: frozenset(absent)} if absent else {}
        truncated |= {array: frozenset(short)} if short else {}
    without_metadata = tuple(sorted(a for a in documents if f"{a}/{METADATA}" not in entries))
    return Damage(missing, truncated, without_metadata)


def chunk_sizes(
    documents: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Entry]
) -> dict[str, list[int | None]]:
    """Return the sizes in bytes of the chunks of each array, in the order of their indices."""
    no_entry = Entry(None, None)
    return {
        array: [entries.get(chunk_key(array, i), no_entry).size for i in _iter_indices(document)]
        for array, document in documents.items()
    }


def array_documents(root: bytes) -> dict[str, Mapping[str, Any]]:
    """Return the metadata of all arrays by path, from a group's consolidated metadata."""
    nodes = (json.loads(root).get("consolidated_metadata") or {}).get("metadata", {})
    return {path: d for path, d in nodes.items() if d.get("node_type") == "array"}


def chunk_grid(document: Mapping[str, Any]) -> Index:
    """Return the number of chunks along each axis, or of shards for a sharded array."""
    lengths = document["chunk_grid"]["configuration"]["chunk_shape"]
    return tuple(ceil(n / c) for n, c in zip(document["shape"], lengths, strict=True))


def chunk_key(array: str, index: Collection[int]) -> str:
    """Return the key of a chunk, by the default encoding of Zarr 3."""
    return "/".join([array, "c", *map(str, index)])


def _iter_indices(document: Mapping[str, Any]) -> Iterator[Index]:
    return product(*map(range, chunk_grid(document)))


ROOT = "zarr.json"
FOLDER = "xr_aimz"
_MANIFEST, _DONE, _SIZES = (f"{FOLDER}/{n}" for n in ("manifest.json", "done", "chunks.json"))
# Schemes that obstore serves: it retries failed requests, and reads credentials from where the
# clouds' own tools do.
_CLOUD_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
_MARK = re.compile(rf"{_DONE}/(?P<name>.*)/c(?P<at>(\.\d+)*)")
# Keys of the root metadata in both formats of Zarr, without which a store is unreadable.
_ROOT_KEYS = (ROOT, ".zmetadata", ".zgroup", ".zattrs", ".zarray")


@dataclass(frozen=True)
class Manifest:
    """Description of a write: fingerprint, blocks, and what its results are computed from.

    Parameters
    ----------
    fingerprint : str
        Of all parts.
    blocks : mapping of variable to int
        Number of blocks of each lazy variable.
    version : int
    parts : mapping of str to str
        Each part in words, with a digest, from which the difference of two writes is described.
    origins : mapping of str to str
        Source data in words, each with a digest or the size and time of a file.
    unnamed : tuple of str
        Sources that have no name which is the same in another process.
    strings : mapping of variable to dtype
        Dtypes of strings that the store does not have.
    """

    fingerprint: str
    blocks: Mapping[str, int]
    version: int = 2
    parts: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    unnamed: Collection[str] = ()
    strings: Mapping[str, str] = field(default_factory=dict)


def as_store(store: Any) -> Store:
    """Return the Zarr store at a path or URL; a store is returned as it is."""
    if isinstance(store, Store):
        if isinstance(store, ZipStore) and not store._is_open:
            store._sync_open()
        return store
    if isinstance(store, str) and store.startswith("file://"):
        # The same class as for its path, so that the two are recognised as one store.
        return LocalStore(url2pathname(urlsplit(store).path))
    if isinstance(store, str) and "://" in store:
        return _open_remote(store)
    if isinstance(store, (str, Path)):
        return LocalStore(Path(store).expanduser())
    raise StoreError(
        f"store={store!r}: give a path, a URL, or a store of zarr.storage, obstore or icechunk"
    )


def _open_remote(url: str) -> Store:
    if url.split("://", maxsplit=1)[0] not in _CLOUD_SCHEMES:
        return FsspecStore.from_url(url)
    try:
        import obstore.store
    except ImportError as error:
        raise StoreError(f"store={url!r} needs obstore: pip install 'xr_aimz[cloud]'") from error
    return ObjectStore(obstore.store.from_url(url))


def read_manifest(store: Store) -> Manifest | None:
    """Return the manifest of a store, or None if this package has not begun to write to it."""
    document = _read_key(store, _MANIFEST)
    if document is None:
        return None
    names = {f.name for f in fields(Manifest)}
    return Manifest(**{k: v for k, v in json.loads(document).items() if k in names})


def is_complete(store: Store) -> bool:
    """Return whether a store is complete: the root's metadata, which is written last, exists."""
    return sync(store.exists(ROOT))


def is_nonempty(store: Store) -> bool:
    """Return whether a store has any key."""
    return not sync(store.is_empty(""))


def contains(store: Store, other: Store) -> bool:
    """Return whether clearing a store would clear another."""
    if isinstance(store, LocalStore) and isinstance(other, LocalStore):
        return Path(other.root).resolve().is_relative_to(Path(store.root).resolve())
    return store == other


def unknown_keys(store: Store) -> list[str]:
    """Return the keys that belong to no array or group, neither of this package nor of Zarr."""
    keys = list_keys(store)
    nodes = {key.split("/")[0] for key in keys if key.endswith(f"/{ROOT}")}
    return sorted(k for k in keys if k.split("/")[0] not in {*nodes, ROOT, FOLDER})


def store_contents(store: MemoryStore) -> dict[str, bytes]:
    """Return the bytes under every key of a store in memory."""
    return {key: _read_key(store, key) or b"" for key in list_keys(store)}


def put_document(store: Store, values: Mapping[str, bytes]) -> None:
    """Write bytes under keys of a store.

    Raises
    ------
    WriteError
        From any exception of the store.
    """
    make = default_buffer_prototype().buffer.from_bytes
    try:
        for key, value in values.items():
            sync(store.set(key, make(value)))
    except Exception as error:
        # A store may raise any class.
        raise WriteError(f"{type(error).__name__}: {error}") from error


def begin_write(store: Store, manifest: Manifest, keys: Mapping[str, bytes]) -> None:
    """Write the manifest, then every key of a template except the root's metadata."""
    if isinstance(store, LocalStore):
        # A local write goes to a temporary file that is then renamed; those that a killed process
        # left behind belong to no array.
        for stray in Path(store.root).rglob("*.partial"):
            stray.unlink()
    put_document(store, {_MANIFEST: json.dumps(asdict(manifest)).encode()})
    put_document(store, {k: v for k, v in keys.items() if k != ROOT})


def finish_write(store: Store, keys: Mapping[str, bytes]) -> None:
    """Write the root's metadata, which completes the store: it can be opened from here on.

    Raises
    ------
    WriteError
        A chunk that was written is absent.
    """
    documents, entries = array_documents(keys[ROOT]), _list_if_possible(store)
    if entries is not None:
        if damage := find_damage(documents, entries, {}):
            raise WriteError(f"what was written is not in the store: {damage}")
        record = {"sizes": chunk_sizes(documents, entries)}
        put_document(store, {_SIZES: json.dumps(record, separators=(",", ":")).encode()})
    put_document(store, {ROOT: keys[ROOT]})
    with suppress(Exception):
        # Marks that cannot be removed change nothing: the store is complete.
        sync(store.delete_dir(_DONE))


def find_store_damage(store: Store) -> Damage:
    """Find the chunks that a complete store has lost since it was written, by one listing.

    In a store without recorded sizes, which an earlier version wrote, only the blocks of lazy
    variables are checked: all-zero chunks of other variables were not written.
    """
    entries, root = _list_if_possible(store), _read_key(store, ROOT)
    manifest = read_manifest(store)
    if entries is None or root is None or manifest is None:
        return Damage({}, {})
    recorded = _read_key(store, _SIZES)
    sizes = {} if recorded is None else json.loads(recorded)["sizes"]
    written = manifest.blocks if recorded is None else sizes
    documents = array_documents(root)
    if not documents:
        # Another program has written the root again, without consolidated metadata.
        loaded = {n: _read_key(store, f"{n}/{ROOT}") for n in written}
        documents = {n: json.loads(d) for n, d in loaded.items() if d is not None}
    return find_damage({n: d for n, d in documents.items() if n in written}, entries, sizes)


def mark_block(store: Store, variable: str, index: Iterable[int]) -> None:
    """Record that a block's bytes are in the store, with the size of a local file."""
    size, inner = 0, unwrap_store(store)
    if isinstance(inner, LocalStore):
        # In other stores it would cost a request, and a chunk is written whole or not at all.
        size = (Path(inner.root) / chunk_key(variable, tuple(index))).stat().st_size
    put_document(store, {_mark_key(variable, index): str(size).encode()})


def written_blocks(
    store: Store, entries: Mapping[str, Entry] | None = None
) -> set[tuple[str, tuple[int, ...]]]:
    """Return the blocks, by variable and index, that are recorded and whose chunk exists.

    ``entries`` is the listing of the store, if it is at hand.
    """
    entries = list_entries(store) if entries is None else entries
    matches = ((key, _MARK.fullmatch(key)) for key in entries)
    blocks = {key: (m["name"], tuple(map(int, m["at"].split(".")[1:]))) for key, m in matches if m}
    return {
        block
        for key, block in blocks.items()
        if (entry := entries.get(chunk_key(*block))) and _has_size(store, key, entry)
    }


def _has_size(store: Store, mark: str, entry: Entry) -> bool:
    """Return whether a chunk has the size that its mark records, if it records one."""
    inner = unwrap_store(store)
    if not isinstance(inner, LocalStore):
        return True
    size = int((Path(inner.root) / mark).read_bytes() or b"-1")
    # Marks by an earlier version hold 1, and no chunk is as short.
    return size in (1, entry.size)


def _list_if_possible(store: Store) -> dict[str, Entry] | None:
    """Return the listing of a store, or None if it cannot be listed."""
    return list_entries(store) if can_list(store) else None


def remove_store(store: Store, keys: Iterable[str]) -> None:
    """Delete existing keys of a store.

    Raises
    ------
    WriteError
        From any exception of the store.
    """
    try:
        for key in keys:
            sync(store.delete(key))
    except Exception as error:
        raise WriteError(f"{type(error).__name__}: {error}") from error


def clear_store(store: Store) -> None:
    """Delete every key of a store, beginning with the root metadata that makes it readable."""
    for root in _ROOT_KEYS:
        if sync(store.exists(root)):
            sync(store.delete(root))
    # Then the marks of written blocks, because a resumed write would trust them.
    sync(store.delete_dir(_DONE))
    if sync(store.exists(_MANIFEST)):
        sync(store.delete(_MANIFEST))
    if is_nonempty(store):
        sync(store.clear())


def _mark_key(variable: str, index: Iterable[int]) -> str:
    return f"{_DONE}/{variable}/" + ".".join(["c", *map(str, index)])


def _read_key(store: Store, key: str) -> bytes | None:
    buffer: Buffer | None = sync(store.get(key, default_buffer_prototype()))
    return None if buffer is None else buffer.to_bytes()
