"""List the keys of a Zarr store with sizes and times, and describe files that hold data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore


class Entry(NamedTuple):
    """Size in bytes of a stored value, and a stamp that changes when it is written again.

    Either is None where the store does not list it.
    """

    size: int | None
    stamp: str | None


def can_list(store: Store) -> bool:
    """Return whether a store lists its keys; a plain web server does not."""
    inner = unwrap_store(store)
    below = getattr(inner, "store", None) or getattr(inner, "fs", None)
    protocol = getattr(below, "protocol", None) or type(below).__name__
    return store.supports_listing and "http" not in str(protocol).lower()


def list_entries(store: Store, prefix: str = "") -> dict[str, Entry]:
    """List every key of a store, or every key under ``prefix``, in one listing.

    Parameters
    ----------
    store : Store
    prefix : str
        A folder, without a slash at its end.

    Returns
    -------
    dict of key to Entry
    """
    inner = unwrap_store(store)
    if isinstance(inner, LocalStore):
        return dict(_list_local(Path(inner.root), prefix))
    if isinstance(inner, ObjectStore):
        return dict(_list_objects(inner, prefix))
    if isinstance(inner, FsspecStore):
        return sync(_files(inner, prefix))
    if isinstance(inner, MemoryStore):
        values = inner._store_dict
        return {k: Entry(len(values[k]), None) for k in values if _is_under(k, prefix)}
    if isinstance(inner, ZipStore):
        return dict(_list_members(inner, prefix))
    return {key: Entry(None, None) for key in list_keys(store, prefix)}


def list_keys(store: Store, prefix: str = "") -> list[str]:
    """List every key of a store, or every key under ``prefix``, without sizes."""
    keys = store.list_prefix(f"{prefix}/") if prefix else store.list()
    return sync(_gathered(keys))


def unwrap_store(store: Store) -> Store:
    """Return the store inside of wrappers, which log or count its operations."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    return store


def _is_under(key: str, prefix: str) -> bool:
    return not prefix or key.startswith(f"{prefix}/")


def _list_local(root: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
    folders = [str(root / prefix) if prefix else str(root)]
    start = len(str(root)) + 1
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                stat = entry.stat()
                key = entry.path[start:].replace(os.sep, "/")
                yield key, Entry(stat.st_size, str(stat.st_mtime_ns))


def _list_objects(store: ObjectStore, prefix: str) -> Iterator[tuple[str, Entry]]:
    import obstore

    for batch in obstore.list(store.store, prefix=prefix or None):
        for meta in batch:
            yield (
                str(meta["path"]),
                Entry(int(meta["size"]), _find_stamp(meta, "e_tag", "last_modified")),
            )


async def _files(store: FsspecStore, prefix: str) -> dict[str, Entry]:
    folder = f"{store.path}/{prefix}" if prefix else store.path
    try:
        listing = await store.fs._find(folder, detail=True, withdirs=False)
    except FileNotFoundError:
        return {}
    names = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    return {
        path.removeprefix(f"{store.path}/"): Entry(info.get("size"), _find_stamp(info, *names))
        for path, info in listing.items()
    }


def _list_members(store: ZipStore, prefix: str) -> Iterator[tuple[str, Entry]]:
    if not store._is_open:
        store._sync_open()
    for member in store._zf.infolist():
        if _is_under(member.filename, prefix):
            yield member.filename, Entry(member.file_size, f"{member.CRC:08x}")


def _find_stamp(info: Any, *names: str) -> str | None:
    """Return the first of these fields that a listing has for a value: a version or a time."""
    return next((str(info[n]) for n in names if info.get(n) is not None), None)


async def _gathered(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]


def file_facts(path: str | os.PathLike) -> tuple[str, str]:
    """Return the absolute path of a file, with its size and time, or ``""`` if it is not local."""
    text = os.fspath(path)
    local = Path(text).expanduser()
    try:
        stat = local.stat()
    except (OSError, ValueError):
        # An address: a server gives neither size nor time of a variable.
        return text, ""
    changed = datetime.fromtimestamp(stat.st_mtime_ns / 1e9, UTC).isoformat(" ", "microseconds")
    return str(local.resolve()), f"{stat.st_size} bytes, {stat.st_mtime_ns} ns ({changed})"


def zarr_facts(array: zarr.Array) -> tuple[str, str]:
    """Return the address of a Zarr array, and a digest of the listed chunks and metadata."""
    path, store = array.store_path.path, unwrap_store(array.store_path.store)
    digest = hashlib.sha256(repr((array.shape, str(array.dtype))).encode())
    for part in _read_version(store, path):
        digest.update(part)
    address = _find_address(store)
    return f"{address}/{path}" if path else address, digest.hexdigest()


def _find_address(store: Store) -> str:
    """Return the address of a store, without what differs between processes."""
    if isinstance(store, LocalStore):
        return str(Path(store.root).resolve())
    if isinstance(store, ZipStore):
        return str(Path(store.path).resolve())
    if isinstance(store, FsspecStore):
        protocol = store.fs.protocol
        return f"{protocol if isinstance(protocol, str) else protocol[0]}://{store.path}"
    if isinstance(store, ObjectStore):
        config = getattr(store.store, "config", {})
        named = {k: config[k] for k in ("bucket", "container_name", "endpoint") if k in config}
        return f"{type(store.store).__name__} {named} {getattr(store.store, 'prefix', None) or ''}"
    return type(store).__name__


def _read_version(store: Store, path: str) -> list[bytes]:
    """Return bytes that change when a chunk is written again."""
    if isinstance(store, MemoryStore):
        prototype = default_buffer_prototype()
        keys = sorted(list_entries(store, path))
        values = [sync(store.get(key, prototype)) for key in keys]
        return [b"" if value is None else value.to_bytes() for value in values]
    session = getattr(store, "session", None)
    if snapshot := getattr(session, "snapshot_id", None):
        # Icechunk: a snapshot never changes.
        return [str(snapshot).encode()]
    return [repr(sorted(list_entries(store, path).items())).encode()] if can_list(store) else []
