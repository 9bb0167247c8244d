"""One task a block: its bytes go into the store, then the mark that they are there.

The graph has a writing task for each block that has no mark yet and nothing else, so
that what is finished is neither read nor computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, product
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from dask._task_spec import Task as GraphTask
from dask._task_spec import TaskRef
from dask.base import compute, tokenize
from dask.highlevelgraph import HighLevelGraph
from zarr import Array
from zarr.abc.store import Store

from xr_aimz.errors import WriteError
from xr_aimz.rounding import keep_bits
from xr_aimz.scheduling import bar, scheduler

__all__ = ["stores_read", "write"]

Note = Callable[[str, tuple[int, ...]], None]


def write(
    into: Store,
    lazy: Mapping[str, xr.Variable],
    done: Collection[tuple[str, tuple[int, ...]]],
    note: Note,
    precision: int | None,
    progress: bool | None,
) -> None:
    """Compute every block that is not done, into its store.

    Parameters
    ----------
    into : Store
        Where the arrays already are, without their blocks.
    lazy : mapping of name to Variable
    done : collection of (name, index)
    note : callable of (name, index)
        Called in the task when a block's bytes are in the store.
    precision, progress
        As in :func:`xr_aimz.to_zarr`.

    Raises
    ------
    WriteError
        The store failed; what the computation raises is raised as it is.
    """
    tasks = []
    # Looking for chunks that are all fill value costs a pass over every draw, and a chunk that
    # is absent is no sign of anything. An array keeps what was set when it was opened.
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name, variable in lazy.items():
            array = variable.data
            missing = _missing(name, array, done)
            if missing:
                target = zarr.open_array(into, path=name, mode="r+", zarr_format=3)
                tasks.append(_writers(name, array, target, note, missing, precision))
    with bar(progress), scheduler():
        compute(*tasks)


def stores_read(lazy: Mapping[str, xr.Variable]) -> Iterator[Store]:
    """The Zarr stores that the graphs of lazy variables read from."""
    for variable in lazy.values():
        for node in dict(variable.data.dask).values():
            # xarray wraps an array of a store in adapters, each of which holds the next.
            value: Any = getattr(node, "value", node)
            while hasattr(value, "array"):
                value = value.array
            held = getattr(value, "_array", None)
            if isinstance(held, Array):
                yield held.store_path.store


def _missing(
    name: str, array: da.Array, done: Collection[tuple[str, tuple[int, ...]]]
) -> list[tuple[int, ...]]:
    """The indices of the blocks without a mark."""
    every = product(*(range(n) for n in array.numblocks))
    return [index for index in every if (name, index) not in done]


def _writers(
    name: str,
    array: da.Array,
    target: Array,
    note: Note,
    missing: Sequence[tuple[int, ...]],
    precision: int | None,
) -> da.Array:
    """An array of nothing, one block for each that is missing: to compute it is to write."""
    starts = [tuple(accumulate((0, *chunks[:-1]))) for chunks in array.chunks]
    write = partial(_write, name=name, target=target, note=note, precision=precision)
    layer = f"aimz-write-{name}-{tokenize(array.name, missing)}"
    graph: dict[Any, Any] = {}
    for place, index in enumerate(missing):
        region = tuple(
            slice(start[i], start[i] + chunks[i])
            for start, chunks, i in zip(starts, array.chunks, index, strict=True)
        )
        key = (layer, place)
        graph[key] = GraphTask(key, write, TaskRef((array.name, *index)), region, index)
    layers = HighLevelGraph.from_collections(layer, graph, dependencies=[array])  # type: ignore[list-item] # dask's own
    chunks = ((1,) * len(missing),)
    return da.Array(layers, layer, chunks=chunks, meta=np.empty(0, bool))


def _write(
    block: np.ndarray,
    region: tuple[slice, ...],
    index: tuple[int, ...],
    *,
    name: str,
    target: Array,
    note: Note,
    precision: int | None,
) -> np.ndarray:
    values = np.asarray(block)
    rounded = values if precision is None else keep_bits(values, precision)
    try:
        target[region] = rounded
        note(name, index)
    except WriteError:
        raise
    except Exception as error:
        # A store's own errors are of any class; those of the computation are not its.
        raise WriteError(f"{type(error).__name__}: {error}") from error
    return np.ones(1, bool)
