"""Which blocks of a store are there, and whose they are.

A chunk that was never written reads as fill value, so completeness has a record of its
own. It lies beside the arrays under keys that no reader of Zarr looks at: a fingerprint
of what is being written, and a mark for each block whose bytes are in the store. The
root's metadata is put last, by one write: until then there is nothing to open.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore

from xr_aimz.errors import StoreError, WriteError

__all__ = [
    "Manifest",
    "as_store",
    "begin",
    "clear",
    "contents",
    "finish",
    "foreign",
    "holds",
    "is_whole",
    "mark",
    "marked",
    "occupied",
    "put",
    "read",
]

ROOT = "zarr.json"
FOLDER = "xr_aimz"
_MANIFEST, _DONE = f"{FOLDER}/manifest.json", f"{FOLDER}/done"
# Which obstore serves: it retries requests that fail, and reads credentials where the
# clouds' own tools do.
_CLOUDS = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https")
_MARK = re.compile(rf"{_DONE}/(?P<name>.*)/c(?P<at>(\.\d+)*)")
# Where the roots of both formats of Zarr keep what makes them readable.
_ROOTS = (ROOT, ".zmetadata", ".zgroup", ".zattrs", ".zarray")


@dataclass(frozen=True)
class Manifest:
    """What is being written: a fingerprint, and how many blocks each variable has."""

    fingerprint: str
    blocks: Mapping[str, int]
    version: int = 1


def as_store(store: Any) -> Store:
    """A Zarr store from a path, a URL that fsspec knows, or a store as it is."""
    if isinstance(store, Store):
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
    return None if found is None else Manifest(**json.loads(found))


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
    keys = sync(_listed(store.list()))
    nodes = {key.split("/")[0] for key in keys if key.endswith(f"/{ROOT}")}
    return sorted(k for k in keys if k.split("/")[0] not in {*nodes, ROOT, FOLDER})


def contents(store: MemoryStore) -> dict[str, bytes]:
    """Every key of a store in memory."""
    return {key: _get(store, key) or b"" for key in sync(_listed(store.list()))}


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
    """Put the root's metadata: from here on the store can be opened, and is whole."""
    put(store, {ROOT: keys[ROOT]})
    with suppress(Exception):
        # Marks that cannot be removed change nothing: the store is whole.
        sync(store.delete_dir(_DONE))


def mark(store: Store, variable: str, index: Iterable[int]) -> None:
    """Record that a block's bytes are in the store."""
    put(store, {_key(variable, index): b"1"})


def marked(store: Store) -> set[tuple[str, tuple[int, ...]]]:
    """The blocks, by variable and index, that have been recorded."""
    keys = sync(_listed(store.list_prefix(_DONE + "/")))
    found = (_MARK.fullmatch(key) for key in keys)
    return {(m["name"], tuple(map(int, m["at"].split(".")[1:]))) for m in found if m}


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


async def _listed(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]
