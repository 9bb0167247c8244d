"""One dask task a block: a lazy array for every site, and nothing computed.

The graph has one task for each block of the Dataset and each run of draws. It calls one
compiled program and gives a dict of arrays, from which each site's own dask array takes
its block. Blocks at a ragged edge are padded to the size of the others, so that one
program serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, TaskRef
from dask._task_spec import Task as GraphTask
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from xr_aimz.binding import block_of
from xr_aimz.device import run, to_device_dtype
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Call, Program
from xr_aimz.keys import site_keys
from xr_aimz.labels import label_words
from xr_aimz.plan import Plan

__all__ = ["Task", "lazy_sites"]

Factory = Callable[[Program, Mapping[str, int]], Call]


@dataclass(frozen=True, eq=False)
class Task:
    """What every task of a graph shares.

    Parameters
    ----------
    name : str
        The fingerprint under which the compiled program is kept.
    identity : str
        The token of the fit: which draws of the latents and values of params these are.
    factory : callable
        Makes the kernel: :func:`xr_aimz.kernel.predictive` or ``log_likelihood``.
    program : Program
    seed : array of uint32 (2,)
    params : mapping
    padded : mapping of dim to int
        The size to which a block is padded.
    sizes : mapping of dim to int
        Of the dimensions that are never cut.
    after : callable
        What a task makes of its sites' draws ``(chain, draw, *dims)`` before they leave it.
    """

    name: str
    identity: str
    factory: Factory
    program: Program
    seed: np.ndarray
    params: Mapping[str, Any]
    padded: Mapping[str, int]
    sizes: Mapping[str, int]
    operands: tuple[tuple[str, str, tuple[str, ...]], ...] = field(default=())
    after: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict


def lazy_sites(
    task: Task,
    plan: Plan,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    words: Mapping[str, np.ndarray],
    outputs: Mapping[str, tuple[tuple[str, ...], Any]],
) -> dict[str, da.Array]:
    """A dask array for each output of a task.

    Parameters
    ----------
    task : Task
    plan : Plan
    inputs : Inputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    words : mapping of ``chain`` and ``draw`` to array of uint32 (n, 2)
    outputs : mapping of site to (dims, struct)
        ``struct`` has the dtype, and the shape along ``dims`` of one whole padded block, less
        chain and draw.
    """
    # Equal tokens, equal values: what dask may share between two graphs.
    labels = {d: inputs.labels.get(d) for d in task.program.binding.cut_dims}
    arrays = dict(inputs.arrays)
    parts = (task.identity, task.name, task.seed, task.after, plan, words, labels, arrays)
    token = tokenize(*parts)
    chunks = {"chain": plan.chain, "draw": plan.draw, **plan.chunks}
    operands = _operands(task, inputs, latents, words, chunks)
    described = replace(task, operands=tuple((kind, n, dims) for kind, n, dims, _ in operands))
    lazy = [_chunked(a, dims, chunks, f"{kind}-{n}-{token}") for kind, n, dims, a in operands]
    dims_of = [dims for _, _, dims, _ in operands]
    blocks = _task_layer(described, lazy, dims_of, chunks, token)
    return {
        site: _pick(blocks, tuple(chunks), site, dims, struct, f"aimz-{site}-{token}")
        for site, (dims, struct) in outputs.items()
    }


def _task_layer(
    task: Task,
    operands: list[da.Array],
    dims_of: list[tuple[str, ...]],
    chunks: Mapping[str, tuple[int, ...]],
    token: str,
) -> da.Array:
    """An array of dicts, one a block, from one task each.

    Written out rather than by ``blockwise``, which dask would fuse with what makes the
    inputs: every run of draws of a block would then read and compute the block anew.
    """
    name, shared = f"aimz-block-{token}", f"aimz-task-{token}"
    graph: dict[Any, Any] = {shared: DataNode(shared, task)}
    for place in product(*(range(len(c)) for c in chunks.values())):
        at = dict(zip(chunks, place, strict=True))
        keys = [
            TaskRef((operand.name, *(at.get(d, 0) for d in dims)))
            for operand, dims in zip(operands, dims_of, strict=True)
        ]
        key = (name, *place)
        graph[key] = GraphTask(key, _run_block, TaskRef(shared), *keys)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=operands)  # type: ignore[arg-type] # dask's own arrays
    meta = np.empty((0,) * len(chunks), dtype=object)
    return da.Array(layers, name, chunks=tuple(chunks.values()), meta=meta)


def _operands(
    task: Task,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    words: Mapping[str, np.ndarray],
    chunks: Mapping[str, tuple[int, ...]],
) -> list[tuple[str, str, tuple[str, ...], Any]]:
    """(kind, name, dims, array) of everything that a block takes its own part of."""
    found: list[tuple[str, str, tuple[str, ...], Any]] = [
        ("words", d, (d, "word"), words[d]) for d in ("chain", "draw")
    ]
    for d in task.program.binding.cut_dims:
        found.append(("words", d, (d, "word"), _words(d, inputs, chunks[d])))
    for name, array in inputs.arrays.items():
        found.append(("array", name, tuple(map(str, array.dims)), array.data))
    for name, latent in latents.items():
        found.append(("latent", name, tuple(map(str, latent.dims)), latent.data))
    return found


def _words(dim: str, inputs: Inputs, chunks: tuple[int, ...]) -> Any:
    labels = inputs.labels.get(dim)
    if labels is not None:
        return label_words(dim, labels, size=inputs.sizes[dim])
    # Positions are labels that a block can count for itself: there may be very many.
    positions = da.arange(inputs.sizes[dim], chunks=(chunks,), dtype=np.int64)
    return positions.map_blocks(
        _position_words,
        name_of=dim,
        new_axis=1,
        chunks=(chunks, (2,)),
        meta=np.empty((0, 0), np.uint32),
    )


def _position_words(positions: np.ndarray, name_of: str) -> np.ndarray:
    return label_words(name_of, positions)


def _chunked(
    array: Any, dims: tuple[str, ...], chunks: Mapping[str, tuple[int, ...]], name: str
) -> da.Array:
    wanted = tuple(chunks.get(d, -1) for d in dims)
    if isinstance(array, da.Array):
        return array.rechunk(wanted)
    return da.from_array(np.asarray(array), chunks=wanted, name=f"aimz-input-{name}")


def _pick(
    blocks: da.Array,
    index: tuple[str, ...],
    site: str,
    dims: tuple[str, ...],
    struct: Any,
    name: str,
) -> da.Array:
    # What does not vary along a dimension is the same in each of its blocks: the first.
    here = tuple(slice(None) if d in dims else slice(0, 1) for d in index)
    own = tuple(d for d in dims if d not in ("chain", "draw"))
    lengths = dict(zip(own, struct.shape, strict=True))
    return da.blockwise(
        _take,
        dims,
        blocks.blocks[here],
        index,
        site=site,
        name=name,
        new_axes={d: n for d, n in lengths.items() if d not in index},
        concatenate=None,
        dtype=struct.dtype,
        meta=np.empty((0,) * len(dims), struct.dtype),
        align_arrays=False,
    )


def _take(block: Any, site: str) -> np.ndarray:
    # A contracted index arrives as a list of its blocks; there is one.
    while isinstance(block, list):
        block = block[0]
    return block[site]


def _run_block(task: Task, *blocks: np.ndarray) -> dict[str, np.ndarray]:
    """The task: pad, run the compiled program over the draws, cut back."""
    binding = task.program.binding
    parts: dict[str, dict[str, np.ndarray]] = {"words": {}, "array": {}, "latent": {}}
    dims_of: dict[str, tuple[str, ...]] = {}
    for (kind, name, dims), block in zip(task.operands, blocks, strict=True):
        value = block if kind == "words" else to_device_dtype(name, block)
        parts[kind][name] = _padded(value, dims, task.padded)
        dims_of[name] = dims
    lengths = {
        d: len(b) for (kind, d, _), b in zip(task.operands, blocks, strict=True) if kind == "words"
    }
    sizes = {**task.sizes, **task.padded}
    shape = (lengths["chain"], lengths["draw"])
    outputs = run(
        task.name,
        lambda: task.factory(task.program, sizes),
        block_of(binding, sizes),
        _over_draws(task, parts, shape),
        {
            "arrays": parts["array"],
            "words": {d: parts["words"][d] for d in binding.cut_dims},
            "params": task.params,
        },
    )
    draws = {
        site: _cut(value, task.program.result_dims(site), lengths, shape)
        for site, value in outputs.items()
    }
    return task.after(draws)


def _over_draws(
    task: Task, parts: Mapping[str, Mapping[str, np.ndarray]], shape: tuple[int, int]
) -> dict:
    chains = np.repeat(parts["words"]["chain"], shape[1], axis=0)
    draws = np.tile(parts["words"]["draw"], (shape[0], 1))
    count = shape[0] * shape[1]
    return {
        "keys": site_keys(task.seed, chains, draws, task.program.keyed),
        "latents": {n: v.reshape(count, *v.shape[2:]) for n, v in parts["latent"].items()},
    }


def _padded(block: np.ndarray, dims: tuple[str, ...], padded: Mapping[str, int]) -> np.ndarray:
    spare = [padded.get(d, n) - n for d, n in zip(dims, block.shape, strict=True)]
    if not any(spare):
        return block
    # The last value again: a value of the data's own, so the model meets nothing new.
    return np.pad(block, [(0, n) for n in spare], mode="edge")


def _cut(
    value: np.ndarray, dims: tuple[str, ...], lengths: Mapping[str, int], shape: tuple[int, int]
) -> np.ndarray:
    whole = value.reshape(*shape, *value.shape[1:])
    kept = tuple(slice(0, lengths.get(d)) for d in dims[: whole.ndim - 2])
    return whole[(slice(None), slice(None), *kept)]
