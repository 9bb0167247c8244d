"""Results on disk: a lazy Dataset streamed to Zarr, block by block, and reopened.

Chunks on disk are the blocks of the graph, so a task writes whole chunks and no two
tasks share one. Metadata is consolidated last: a store that was cut short says so.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import dask
import numpy as np
import xarray as xr
import zarr
from dask.callbacks import Callback
from dask.system import CPU_COUNT
from tqdm.auto import tqdm
from zarr.codecs import BloscCodec

from xr_aimz.errors import StoreError
from xr_aimz.options import shows_progress

__all__ = ["to_zarr"]

INCOMPLETE = "xr_aimz_incomplete"
_KEPT = ("units", "calendar")


def to_zarr(
    ds: xr.Dataset,
    store: str | Path,
    *,
    mode: Literal["w-", "w"] = "w-",
    progress: bool | None = None,
) -> xr.Dataset:
    """Compute a lazy Dataset into a Zarr store, block by block, and open it again.

    Parameters
    ----------
    ds : Dataset
        Lazy, as :func:`xr_aimz.predict` gives it.
    store : path
    mode : {"w-", "w"}
        ``"w-"`` refuses a store that exists; ``"w"`` replaces it.
    progress : bool, optional
        By default as :class:`xr_aimz.set_options` says.

    Returns
    -------
    Dataset
        The store, opened lazily.

    Raises
    ------
    StoreError
        The store exists and ``mode`` is not ``"w"``.

    Notes
    -----
    Blosc lz4 with bitshuffle: predictive draws are noise, on which a stronger codec
    spends time for nothing.
    """
    if mode not in ("w-", "w"):
        raise StoreError(f"mode={mode!r}: there are 'w-' and 'w'")
    if mode == "w-" and Path(store).exists():
        raise StoreError(f"{str(store)!r} exists; choose another path, or mode='w'")
    uniform = _uniform(ds)
    marked = uniform.assign_attrs({INCOMPLETE: "this store was not written to its end"})
    with _bar(progress), _scheduler():
        # Not compute=False and a later compute: dask.delayed would copy and rename the graph.
        marked.to_zarr(
            store,
            mode=mode,
            consolidated=False,
            encoding=_encoding(uniform),
            zarr_format=3,
            # Looking for chunks that are all fill value costs a pass over every draw.
            write_empty_chunks=True,
        )
    group = zarr.open_group(store, mode="r+")
    del group.attrs[INCOMPLETE]
    with warnings.catch_warnings():
        # Consolidated metadata is not in the v3 specification yet; xarray reads it all the
        # same, https://github.com/zarr-developers/zarr-specs/pull/309.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(store)
    return xr.open_zarr(store, consolidated=True)


def _uniform(ds: xr.Dataset) -> xr.Dataset:
    """As Zarr can hold it: chunks of one size, strings of any length."""
    ragged = {d: max(c) for d, c in ds.chunks.items() if set(c[:-1]) - {max(c)}}
    # A string of fixed length has no place in the v3 specification; one of any length has.
    strings = {
        name: v.astype(np.dtypes.StringDType())
        for name, v in ds.variables.items()
        if v.dtype.kind == "U"
    }
    coords = {name: v for name, v in strings.items() if name in ds.coords}
    data = {name: v for name, v in strings.items() if name not in ds.coords}
    uniform = ds.copy().chunk(ragged).assign_coords(coords).assign(data)
    for variable in uniform.variables.values():
        # How a source was stored (its codecs, its chunks) is no way to store this; how its
        # times were counted is.
        variable.encoding = {k: v for k, v in variable.encoding.items() if k in _KEPT}
    return uniform


def _encoding(ds: xr.Dataset) -> dict[str, dict[str, Any]]:
    codec = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
    return {
        str(name): {"compressors": (codec,), "chunks": _chunks(array)}
        for name, array in ds.data_vars.items()
        if array.chunks is not None
    }


def _chunks(array: xr.DataArray) -> tuple[int, ...]:
    return tuple(max(c) for c in array.chunks or ())


def _scheduler() -> Any:
    """Threads, where nobody asked for anything else: one more than there are cores."""
    # Without a scheduler dask imports distributed, half a second, to look for a client:
    # there is none where nobody has imported it.
    asked = [dask.config.get(name, None) for name in ("scheduler", "num_workers", "pool")]
    if "distributed" in sys.modules or any(a is not None for a in asked):
        return nullcontext()
    # A task that waits for the disk leaves its core to one that draws.
    return dask.config.set(scheduler=dask.threaded.get, num_workers=CPU_COUNT + 1)


def _bar(progress: bool | None) -> Any:
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
