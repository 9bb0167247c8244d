"""Results in an Icechunk repository: one commit, or nothing.

What is written in a session is seen by nobody until it is committed, so there is no
half-written store to tell from a whole one, and nothing to resume: a run that dies
leaves the branch as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xarray as xr
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from xr_aimz import manifest
from xr_aimz.errors import StoreError

__all__ = ["commit", "is_repository"]

BRANCH = "main"
_FINGERPRINT = "xr_aimz"


def is_repository(store: Any) -> bool:
    """Whether a store is an Icechunk repository; imports nothing."""
    return type(store).__module__.partition(".")[0] == "icechunk" and hasattr(
        store, "writable_session"
    )


def commit(
    repository: Any,
    template: Callable[[], MemoryStore],
    write: Callable[..., None],
    fingerprint: str,
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
    fingerprint : str
        Kept with the commit: results that are there already are only opened.
    replace, resume : bool
        As ``mode="w"`` and ``resume`` of :func:`xr_aimz.to_zarr`.
    """
    session = repository.writable_session(BRANCH)
    if manifest.occupied(session.store) and not replace:
        newest = next(iter(repository.ancestry(branch=BRANCH)))
        if not resume or newest.metadata.get(_FINGERPRINT) != fingerprint:
            raise StoreError(
                f"branch {BRANCH!r} of the repository holds other results (snapshot "
                f"{newest.id}, {newest.message!r}); give another repository, or mode='w'"
            )
        return _opened(repository)
    if replace:
        sync(session.store.clear())
    manifest.put(session.store, manifest.contents(template()))
    write(into=session.store, note=_nothing)
    session.commit("xr_aimz: results of to_zarr", metadata={_FINGERPRINT: fingerprint})
    return _opened(repository)


def _nothing(name: str, index: tuple[int, ...]) -> None:
    """A block needs no mark: it counts with all the others, or not."""


def _opened(repository: Any) -> xr.Dataset:
    return xr.open_zarr(repository.readonly_session(BRANCH).store, consolidated=False)
