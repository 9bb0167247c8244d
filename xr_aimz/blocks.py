"""One dask task a block: a lazy array for every site, and nothing computed.

The graph has one task for each block of the Dataset and each run of draws. It calls one
compiled program and gives a dict of arrays, from which each site's own dask array takes
its block. Blocks at a ragged edge are padded to the size of the others, so that one
program serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, TaskRef
from dask._task_spec import Task as GraphTask
from dask.highlevelgraph import HighLevelGraph

from xr_aimz.binding import block_of
from xr_aimz.casting import to_device_dtype
from xr_aimz.device import run
from xr_aimz.identity import identify
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Call, Program
from xr_aimz.operands import KINDS, Dims, Operand, operands
from xr_aimz.plan import Plan
from xr_aimz.requirements import BlockValues, Requirement, check_values

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
    params : mapping
    padded : mapping of dim to int
        The size to which a block is padded.
    sizes : mapping of dim to int
        Of the dimensions that are never cut.
    after : callable
        What a task makes of its sites' draws ``(chain, draw, *dims)`` before they leave it.
    origins : mapping of str to str
        What the results are made from, in words, with a digest of each: what may be said of two
        that differ.
    requirements : tuple of Requirement
        What the values of lazy arrays must satisfy.
    unlabelled : frozenset of str
        The dims without a coordinate.
    """

    name: str
    identity: str
    factory: Factory
    program: Program
    params: Mapping[str, Any]
    padded: Mapping[str, int]
    sizes: Mapping[str, int]
    operands: tuple[tuple[str, str, Dims], ...] = field(default=())
    after: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    origins: Mapping[str, str] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()
    unlabelled: frozenset[str] = frozenset()


def lazy_sites(
    task: Task,
    plan: Plan,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    keys: np.ndarray,
    outputs: Mapping[str, tuple[tuple[str, ...], Any]],
) -> dict[str, da.Array]:
    """A dask array for each output of a task.

    Parameters
    ----------
    task : Task
    plan : Plan
    inputs : Inputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    keys : array of uint32 ``(chain, draw, site, 2)``
        For each draw, the key of each site of ``task.program.keyed``.
    outputs : mapping of site to (dims, struct)
        ``struct`` has the dtype, and the shape along ``dims`` of one whole padded block, less
        chain and draw.
    """
    # Equal tokens, equal values, in any process: what dask may share between two graphs, and
    # what a write that was cut short is taken up by.
    cut_dims = task.program.binding.cut_dims
    chunks = {"chain": plan.chain, "draw": plan.draw, **plan.chunks}
    arrays = inputs.arrays
    labelled = [d for d in inputs.sizes if task.requirements and d in _dims_of(arrays)]
    passed = operands(inputs, latents, keys, cut_dims, chunks, labelled)
    own = {
        "the draws of the fit": task.identity,
        "the model, its sites or its options": task.name,
        "the statistics": identify(task.after).digest,
    }
    origins = own | {o.title: identify(o.dims, o.array).digest for o in passed}
    token = identify(origins, tuple(chunks.items())).digest
    described = replace(
        task,
        operands=tuple((o.kind, o.name, o.dims) for o in passed),
        unlabelled=frozenset(labelled) - set(inputs.labels),
        origins=origins,
    )
    blocks = _task_layer(described, passed, chunks, token)
    return {
        site: _pick(blocks, tuple(chunks), site, dims, struct, f"aimz-{site}-{token}")
        for site, (dims, struct) in outputs.items()
    }


def _dims_of(arrays: Mapping[str, xr.DataArray]) -> set[str]:
    return {str(d) for a in arrays.values() for d in a.dims}


def _task_layer(
    task: Task, passed: Sequence[Operand], chunks: Mapping[str, tuple[int, ...]], token: str
) -> da.Array:
    """An array of dicts, one a block, from one task each.

    Written out rather than by ``blockwise``, which dask would fuse with what makes the
    inputs: every run of draws of a block would then read and compute the block anew.
    """
    name, shared = f"aimz-block-{token}", f"aimz-task-{token}"
    graph: dict[Any, Any] = {shared: DataNode(shared, task)}
    for place in product(*(range(len(c)) for c in chunks.values())):
        at = dict(zip(chunks, place, strict=True))
        sources, parts = zip(*(operand.part(at) for operand in passed), strict=True)
        key = (name, *place)
        graph[key] = GraphTask(key, _run_block, TaskRef(shared), parts, *map(TaskRef, sources))
    arrays = [operand.array for operand in passed]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=arrays)  # type: ignore[arg-type] # dask's own arrays
    meta = np.empty((0,) * len(chunks), dtype=object)
    return da.Array(layers, name, chunks=tuple(chunks.values()), meta=meta)


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


def _run_block(
    task: Task, parts: tuple[tuple[slice, ...], ...], *sources: np.ndarray
) -> dict[str, np.ndarray]:
    """The task: cut out, check, pad, run the compiled program over the draws, cut back."""
    program = task.program
    lengths: dict[str, int] = {}
    read: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    passed: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    for (kind, name, dims), source, part in zip(task.operands, sources, parts, strict=True):
        read[kind][name] = block = source[part]
        if kind in ("keys", "words"):
            lengths |= {d: n for d, n in zip(dims, block.shape, strict=True) if d is not None}
    if task.requirements:
        values = BlockValues(read["array"], program.dims, read["labels"], task.unlabelled)
        check_values(task.requirements, values)
    for kind, name, dims in task.operands:
        if kind != "labels":
            value = read[kind][name]
            value = to_device_dtype(name, value) if kind in ("array", "latent") else value
            passed[kind][name] = _padded(value, dims, task.padded)
    sizes = {**task.sizes, **task.padded}
    shape = (lengths["chain"], lengths["draw"])
    outputs = run(
        task.name,
        lambda: task.factory(program, sizes),
        block_of(program.binding, sizes),
        _over_draws(program.keyed, passed["keys"][""], passed["latent"]),
        {"arrays": passed["array"], "words": passed["words"], "params": task.params},
    )
    draws = {
        site: _cut(value, program.result_dims(site), lengths, shape)
        for site, value in outputs.items()
    }
    return task.after(draws)


def _over_draws(
    keyed: Sequence[str], keys: np.ndarray, latents: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What changes from draw to draw, chains and draws on one leading axis."""
    flat = keys.reshape(-1, *keys.shape[2:])
    return {
        "keys": {name: flat[:, i] for i, name in enumerate(keyed)},
        "latents": {n: v.reshape(len(flat), *v.shape[2:]) for n, v in latents.items()},
    }


def _padded(block: np.ndarray, dims: Dims, padded: Mapping[Any, int]) -> np.ndarray:
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
