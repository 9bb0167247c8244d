"""Which blocks of a store are there, and whose they are.

A chunk that was never written reads as fill value, so completeness has a record of its
own. It lies beside the arrays under keys that no reader of Zarr looks at: a fingerprint
of what is being written, a mark for each block whose bytes are in the store, and in the end
the sizes of all chunks. The root's metadata is put last, by one write: until then there is
nothing to open. What is there after that is compared with the record (:func:`damage_of`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore

from xr_aimz.completeness import Damage, array_documents, chunk_key, find_damage, sizes_of
from xr_aimz.errors import StoreError, WriteError
from xr_aimz.listing import Entry, can_list, list_entries, list_keys, unwrapped

__all__ = [
    "Manifest",
    "as_store",
    "begin",
    "clear",
    "contents",
    "damage_of",
    "finish",
    "foreign",
    "holds",
    "is_whole",
    "mark",
    "marked",
    "occupied",
    "put",
    "read",
    "remove",
]

ROOT = "zarr.json"
FOLDER = "xr_aimz"
_MANIFEST, _DONE, _SIZES = (f"{FOLDER}/{n}" for n in ("manifest.json", "done", "chunks.json"))
# Which obstore serves: it retries requests that fail, and reads credentials where the
# clouds' own tools do.
_CLOUDS = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
_MARK = re.compile(rf"{_DONE}/(?P<name>.*)/c(?P<at>(\.\d+)*)")
# Where the roots of both formats of Zarr keep what makes them readable.
_ROOTS = (ROOT, ".zmetadata", ".zgroup", ".zattrs", ".zarray")


@dataclass(frozen=True)
class Manifest:
    """What is being written.

    Parameters
    ----------
    fingerprint : str
        Of all of it.
    blocks : mapping of variable to int
        How many blocks each lazy variable has.
    version : int
    parts : mapping of str to str
        Each part of it in words, with a digest: what may be said of two writes that differ.
    origins : mapping of str to str
        What it is made from, with a digest or the size and time of a file.
    unnamed : tuple of str
        What of that another process cannot tell to be the same.
    strings : mapping of variable to dtype
        Strings whose dtype the store does not have.
    """

    fingerprint: str
    blocks: Mapping[str, int]
    version: int = 2
    parts: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    unnamed: Collection[str] = ()
    strings: Mapping[str, str] = field(default_factory=dict)


def as_store(store: Any) -> Store:
    """A Zarr store from a path, a URL that fsspec knows, or a store as it is."""
    if isinstance(store, Store):
        if isinstance(store, ZipStore) and not store._is_open:
            store._sync_open()
        return store
    if isinstance(store, str) and store.startswith("file://"):
        # The same store as by its path, which is how two are found to be one.
        return LocalStore(url2pathname(urlsplit(store).path))
    if isinstance(store, str) and "://" in store:
        return _remote(store)
    if isinstance(store, (str, Path)):
        return LocalStore(Path(store).expanduser())
    raise StoreError(
        f"store={store!r}: give a path, a URL, or a store of zarr.storage, obstore or icechunk"
    )


def _remote(url: str) -> Store:
    if url.split("://", maxsplit=1)[0] not in _CLOUDS:
        return FsspecStore.from_url(url)
    try:
        import obstore.store
    except ImportError as error:
        raise StoreError(f"store={url!r} needs obstore: pip install 'xr_aimz[cloud]'") from error
    return ObjectStore(obstore.store.from_url(url))


def read(store: Store) -> Manifest | None:
    """The manifest, if this package has begun to write here."""
    found = _get(store, _MANIFEST)
    if found is None:
        return None
    known = {f.name for f in fields(Manifest)}
    return Manifest(**{k: v for k, v in json.loads(found).items() if k in known})


def is_whole(store: Store) -> bool:
    """Whether the root's metadata is there, which is put last."""
    return sync(store.exists(ROOT))


def occupied(store: Store) -> bool:
    """Whether anything at all is in the store."""
    return not sync(store.is_empty(""))


def holds(store: Store, other: Store) -> bool:
    """Whether emptying a store would empty another."""
    if isinstance(store, LocalStore) and isinstance(other, LocalStore):
        return Path(other.root).resolve().is_relative_to(Path(store.root).resolve())
    return store == other


def foreign(store: Store) -> list[str]:
    """Keys that are in no array or group, and so not ours or any of Zarr's."""
    keys = list_keys(store)
    nodes = {key.split("/")[0] for key in keys if key.endswith(f"/{ROOT}")}
    return sorted(k for k in keys if k.split("/")[0] not in {*nodes, ROOT, FOLDER})


def contents(store: MemoryStore) -> dict[str, bytes]:
    """Every key of a store in memory."""
    return {key: _get(store, key) or b"" for key in list_keys(store)}


def put(store: Store, values: Mapping[str, bytes]) -> None:
    """Put bytes under keys.

    Raises
    ------
    WriteError
        Whatever the store raised.
    """
    make = default_buffer_prototype().buffer.from_bytes
    try:
        for key, value in values.items():
            sync(store.set(key, make(value)))
    except Exception as error:
        # A store's own errors are of any class.
        raise WriteError(f"{type(error).__name__}: {error}") from error


def begin(store: Store, manifest: Manifest, keys: Mapping[str, bytes]) -> None:
    """Put the manifest, then every key of a template but the root's metadata."""
    if isinstance(store, LocalStore):
        # A local write goes to a file of its own that is then renamed: what a killed process
        # leaves of those is nobody's.
        for stray in Path(store.root).rglob("*.partial"):
            stray.unlink()
    put(store, {_MANIFEST: json.dumps(asdict(manifest)).encode()})
    put(store, {k: v for k, v in keys.items() if k != ROOT})


def finish(store: Store, keys: Mapping[str, bytes]) -> None:
    """Put the root's metadata: from here on the store can be opened, and is whole.

    Raises
    ------
    WriteError
        A chunk that was written is not there.
    """
    documents, entries = array_documents(keys[ROOT]), _entries(store)
    if entries is not None:
        if lost := find_damage(documents, entries, {}):
            raise WriteError(f"what was written is not in the store: {lost}")
        found = {"sizes": sizes_of(documents, entries)}
        put(store, {_SIZES: json.dumps(found, separators=(",", ":")).encode()})
    put(store, {ROOT: keys[ROOT]})
    with suppress(Exception):
        # Marks that cannot be removed change nothing: the store is whole.
        sync(store.delete_dir(_DONE))


def damage_of(store: Store) -> Damage:
    """What a store that was whole has lost since, by one listing.

    Of a store without a record of sizes, which an earlier version wrote, only the blocks of lazy
    variables are looked for: all-zero chunks of the others were not written.
    """
    entries, root = _entries(store), _get(store, ROOT)
    there = read(store)
    if entries is None or root is None or there is None:
        return Damage({}, {})
    recorded = _get(store, _SIZES)
    sizes = {} if recorded is None else json.loads(recorded)["sizes"]
    written = there.blocks if recorded is None else sizes
    known = array_documents(root)
    if not known:
        # Another hand has written the root anew, and has not consolidated what is below it.
        found = {n: _get(store, f"{n}/{ROOT}") for n in written}
        known = {n: json.loads(d) for n, d in found.items() if d is not None}
    return find_damage({n: d for n, d in known.items() if n in written}, entries, sizes)


def mark(store: Store, variable: str, index: Iterable[int]) -> None:
    """Record that a block's bytes are in the store, and how many a local file has."""
    size, inner = 0, unwrapped(store)
    if isinstance(inner, LocalStore):
        # Elsewhere it would be a request, and a chunk is put whole or not at all.
        size = (Path(inner.root) / chunk_key(variable, tuple(index))).stat().st_size
    put(store, {_key(variable, index): str(size).encode()})


def marked(
    store: Store, entries: Mapping[str, Entry] | None = None
) -> set[tuple[str, tuple[int, ...]]]:
    """The blocks, by variable and index, that have been recorded and are there.

    ``entries`` is the listing of the store, where there is one already.
    """
    entries = list_entries(store) if entries is None else entries
    found = ((key, _MARK.fullmatch(key)) for key in entries)
    blocks = {key: (m["name"], tuple(map(int, m["at"].split(".")[1:]))) for key, m in found if m}
    return {
        block
        for key, block in blocks.items()
        if (entry := entries.get(chunk_key(*block))) and _has_size(store, key, entry)
    }


def _has_size(store: Store, mark: str, entry: Entry) -> bool:
    """Whether a chunk has the bytes that its mark says, if it does."""
    inner = unwrapped(store)
    if not isinstance(inner, LocalStore):
        return True
    size = int((Path(inner.root) / mark).read_bytes() or b"-1")
    # Of marks by an earlier version, which said 1, and no chunk is as short.
    return size in (1, entry.size)


def _entries(store: Store) -> dict[str, Entry] | None:
    """A listing, or None of what cannot be listed."""
    return list_entries(store) if can_list(store) else None


def remove(store: Store, keys: Iterable[str]) -> None:
    """Remove keys that are there.

    Raises
    ------
    WriteError
        Whatever the store raised.
    """
    try:
        for key in keys:
            sync(store.delete(key))
    except Exception as error:
        raise WriteError(f"{type(error).__name__}: {error}") from error


def clear(store: Store) -> None:
    """Empty a store, first of what makes it readable."""
    for root in _ROOTS:
        if sync(store.exists(root)):
            sync(store.delete(root))
    # Then of what says which blocks are there: a resume would trust it.
    sync(store.delete_dir(_DONE))
    if sync(store.exists(_MANIFEST)):
        sync(store.delete(_MANIFEST))
    if occupied(store):
        sync(store.clear())


def _key(variable: str, index: Iterable[int]) -> str:
    return f"{_DONE}/{variable}/" + ".".join(["c", *map(str, index)])


def _get(store: Store, key: str) -> bytes | None:
    found: Buffer | None = sync(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()
