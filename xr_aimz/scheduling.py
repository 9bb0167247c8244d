"""How a graph is computed where nobody said how, and the bar that shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import dask
import dask.threaded
from dask.callbacks import Callback
from dask.system import CPU_COUNT
from tqdm.auto import tqdm

from xr_aimz.options import shows_progress

__all__ = ["bar", "scheduler"]


def scheduler() -> Any:
    """Threads, where nobody asked for anything else: two more than there are cores."""
    # Without a scheduler dask imports distributed, half a second, to look for a client:
    # there is none where nobody has imported it.
    asked = [dask.config.get(name, None) for name in ("scheduler", "num_workers", "pool")]
    if "distributed" in sys.modules or any(a is not None for a in asked):
        return nullcontext()
    # Tasks that wait for the disk, or for a piece to be encoded, leave their cores to others.
    return dask.config.set(scheduler=dask.threaded.get, num_workers=CPU_COUNT + 2)


def bar(progress: bool | None) -> Any:
    """A progress bar over what is computed inside, where one is wanted."""
    return _Bar() if shows_progress(progress) else nullcontext()


class _Bar(Callback):
    """A progress bar over the tasks of dask's local schedulers."""

    def _start_state(self, dsk: Mapping[Any, Any], state: Mapping[str, Any]) -> None:
        count = sum(len(state[kind]) for kind in ("ready", "waiting"))
        self._tqdm = tqdm(total=count, desc="to_zarr", unit="task")

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        self._tqdm.update()

    def _finish(self, dsk: Any, state: Any, failed: bool) -> None:
        self._tqdm.close()
