"""Results in an Icechunk repository: one commit, or nothing.

What is written in a session is seen by nobody until it is committed, so there is no
half-written store to tell from a whole one, and nothing to resume: a run that dies
leaves the branch as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import xarray as xr
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from xr_aimz import manifest
from xr_aimz.errors import StoreError
from xr_aimz.manifest import Manifest
from xr_aimz.results_identity import differences
from xr_aimz.template import with_strings

__all__ = ["commit", "is_repository", "opened"]

BRANCH = "main"
_FINGERPRINT, _MANIFEST = "xr_aimz", "xr_aimz_manifest"


def is_repository(store: Any) -> bool:
    """Whether a store is an Icechunk repository; imports nothing."""
    return type(store).__module__.partition(".")[0] == "icechunk" and hasattr(
        store, "writable_session"
    )


def commit(
    repository: Any,
    template: Callable[[], MemoryStore],
    write: Callable[..., None],
    mine: Manifest,
    *,
    replace: bool,
    resume: bool,
) -> xr.Dataset:
    """Write everything in one session and commit it.

    Parameters
    ----------
    repository : icechunk.Repository
    template : callable
        Lays the arrays out in a store in memory.
    write : callable of ``into`` and ``note``
        Writes the blocks.
    mine : Manifest
        Kept with the commit: results that are there already are only opened.
    replace, resume : bool
        As ``mode="w"`` and ``resume`` of :func:`xr_aimz.to_zarr`.
    """
    session = repository.writable_session(BRANCH)
    if manifest.occupied(session.store) and not replace:
        newest = next(iter(repository.ancestry(branch=BRANCH)))
        if not resume or newest.metadata.get(_FINGERPRINT) != mine.fingerprint:
            why = f": {differences(_kept(newest), mine)}" if resume else ""
            raise StoreError(
                f"branch {BRANCH!r} of the repository holds other results (snapshot "
                f"{newest.id}, {newest.message!r}){why}; give another repository, or mode='w'"
            )
        return opened(repository)
    if replace:
        sync(session.store.clear())
    manifest.put(session.store, manifest.contents(template()))
    write(into=session.store, note=_nothing)
    kept = {_FINGERPRINT: mine.fingerprint, _MANIFEST: asdict(mine)}
    session.commit("xr_aimz: results of to_zarr", metadata=kept)
    return opened(repository)


def _nothing(name: str, index: tuple[int, ...]) -> None:
    """A block needs no mark: it counts with all the others, or not."""


def opened(repository: Any, **options: Any) -> xr.Dataset:
    """The results of the last commit, lazily."""
    newest = next(iter(repository.ancestry(branch=BRANCH)))
    store = repository.readonly_session(BRANCH).store
    ds = xr.open_zarr(store, **{"consolidated": False, **options})
    return with_strings(ds, _kept(newest).strings)


def _kept(snapshot: Any) -> Manifest:
    """The manifest of a commit; of one by another hand, or an earlier version, an empty one."""
    return Manifest(**snapshot.metadata.get(_MANIFEST, {"fingerprint": "", "blocks": {}}))
