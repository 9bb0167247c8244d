"""Files and Zarr arrays that data are read from: what of them stays the same in another process.

Nothing of the data is read. A file is known by its path, size and time; a Zarr array by its
store and path, and one listing of its metadata and chunks with their sizes and times. What a
server does not list, or says neither size nor time of, is known by its address.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore

from xr_aimz.listing import can_list, list_entries, unwrapped

__all__ = ["file_facts", "zarr_facts"]


def file_facts(path: str | os.PathLike) -> tuple[str, str]:
    """The absolute path of a file, and its size and time; of what is no local file nothing."""
    text = os.fspath(path)
    local = Path(text).expanduser()
    try:
        about = local.stat()
    except (OSError, ValueError):
        # An address: a server says neither size nor time of a variable.
        return text, ""
    changed = datetime.fromtimestamp(about.st_mtime_ns / 1e9, UTC).isoformat(" ", "microseconds")
    return str(local.resolve()), f"{about.st_size} bytes, {about.st_mtime_ns} ns ({changed})"


def zarr_facts(array: zarr.Array) -> tuple[str, str]:
    """The address of a Zarr array, and a digest of a listing of its metadata and chunks."""
    path, store = array.store_path.path, unwrapped(array.store_path.store)
    found = hashlib.sha256(repr((array.shape, str(array.dtype))).encode())
    for part in _version(store, path):
        found.update(part)
    where = _address(store)
    return f"{where}/{path}" if path else where, found.hexdigest()


def _address(store: Store) -> str:
    """Where a store lies, without what differs from process to process."""
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


def _version(store: Store, path: str) -> list[bytes]:
    """What changes when a chunk is written anew."""
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
