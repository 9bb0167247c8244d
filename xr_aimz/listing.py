"""The keys of a Zarr store with the sizes and times of their values, by one listing.

A store of zarr-python lists keys alone; the size of each would be a request of its own. What
lies beneath it (a directory, an object store, fsspec, a zip) lists both at once.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore

__all__ = ["Entry", "can_list", "list_entries", "list_keys", "unwrapped"]


class Entry(NamedTuple):
    """What a listing says of a value: bytes, and a stamp that changes when it is written anew.

    Either is None where the store does not list it.
    """

    size: int | None
    stamp: str | None


def can_list(store: Store) -> bool:
    """Whether a store lists its keys: a plain web server does not."""
    inner = unwrapped(store)
    below = getattr(inner, "store", None) or getattr(inner, "fs", None)
    protocol = getattr(below, "protocol", None) or type(below).__name__
    return store.supports_listing and "http" not in str(protocol).lower()


def list_entries(store: Store, prefix: str = "") -> dict[str, Entry]:
    """Every key of a store, or under ``prefix``, by one listing.

    Parameters
    ----------
    store : Store
    prefix : str
        A folder, without a slash at its end.

    Returns
    -------
    dict of key to Entry
    """
    inner = unwrapped(store)
    if isinstance(inner, LocalStore):
        return dict(_walk(Path(inner.root), prefix))
    if isinstance(inner, ObjectStore):
        return dict(_objects(inner, prefix))
    if isinstance(inner, FsspecStore):
        return sync(_files(inner, prefix))
    if isinstance(inner, MemoryStore):
        held = inner._store_dict
        return {k: Entry(len(held[k]), None) for k in held if _is_under(k, prefix)}
    if isinstance(inner, ZipStore):
        return dict(_members(inner, prefix))
    return {key: Entry(None, None) for key in list_keys(store, prefix)}


def list_keys(store: Store, prefix: str = "") -> list[str]:
    """Every key of a store, or under ``prefix``."""
    keys = store.list_prefix(f"{prefix}/") if prefix else store.list()
    return sync(_gathered(keys))


def unwrapped(store: Store) -> Store:
    """The store inside of wrappers, which log or count what it does."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    return store


def _is_under(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(f"{prefix}/")


def _walk(root: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
    folders = [str(root / prefix) if prefix else str(root)]
    start = len(str(root)) + 1
    while folders:
        try:
            found = os.scandir(folders.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with found:
            for entry in found:
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                about = entry.stat()
                key = entry.path[start:].replace(os.sep, "/")
                yield key, Entry(about.st_size, str(about.st_mtime_ns))


def _objects(store: ObjectStore, prefix: str) -> Iterator[tuple[str, Entry]]:
    import obstore

    for batch in obstore.list(store.store, prefix=prefix or None):
        for one in batch:
            yield str(one["path"]), Entry(int(one["size"]), _stamp(one, "e_tag", "last_modified"))


async def _files(store: FsspecStore, prefix: str) -> dict[str, Entry]:
    folder = f"{store.path}/{prefix}" if prefix else store.path
    try:
        found = await store.fs._find(folder, detail=True, withdirs=False)
    except FileNotFoundError:
        return {}
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return {
        path.removeprefix(f"{store.path}/"): Entry(about.get("size"), _stamp(about, *names))
        for path, about in found.items()
    }


def _members(store: ZipStore, prefix: str) -> Iterator[tuple[str, Entry]]:
    if not store._is_open:
        store._sync_open()
    for one in store._zf.infolist():
        if _is_under(one.filename, prefix):
            yield one.filename, Entry(one.file_size, f"{one.CRC:08x}")


def _stamp(about: Any, *names: str) -> str | None:
    """The first of what a listing may say of a value's version or time."""
    return next((str(about[n]) for n in names if about.get(n) is not None), None)


async def _gathered(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]
