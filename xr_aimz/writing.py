"""One task a block: its bytes go into the store, then the mark that they are there.

The graph has a writing task for each block that has no mark yet and nothing else, so
that what is finished is neither read nor computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import accumulate, product
from typing import Any

import dask.array as da
import numpy as np
from dask._task_spec import Task as GraphTask
from dask._task_spec import TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph
from zarr import Array
from zarr.abc.store import Store

from xr_aimz.manifest import mark
from xr_aimz.rounding import keep_bits

__all__ = ["missing_blocks", "writers"]


def missing_blocks(
    name: str, array: da.Array, done: Collection[tuple[str, tuple[int, ...]]]
) -> list[tuple[int, ...]]:
    """The indices of the blocks without a mark."""
    every = product(*(range(n) for n in array.numblocks))
    return [index for index in every if (name, index) not in done]


def writers(
    name: str,
    array: da.Array,
    target: Array,
    store: Store,
    missing: Sequence[tuple[int, ...]],
    precision: int | None,
) -> da.Array:
    """An array of nothing, one block for each that is missing: to compute it is to write."""
    starts = [tuple(accumulate((0, *chunks[:-1]))) for chunks in array.chunks]
    write = partial(_write, name=name, target=target, store=store, precision=precision)
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
    store: Store,
    precision: int | None,
) -> np.ndarray:
    values = np.asarray(block)
    target[region] = values if precision is None else keep_bits(values, precision)
    mark(store, name, index)
    return np.ones(1, bool)
