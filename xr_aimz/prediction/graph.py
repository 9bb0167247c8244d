"""Build the graph of a prediction: one dask task for each block.

The graph has one task for each block of the Dataset and each run of draws. It calls one compiled
program and gives a dict of arrays, from which each site's own dask array takes its block. Blocks
at a ragged edge are padded to the size of the others, so that one program serves all. A task
slices its part of each array itself: a dask task for every slice took longer than the draws of a
small block (docs/decisions/block-size.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import DataNode, TaskRef
from dask._task_spec import Task as GraphTask
from dask.highlevelgraph import HighLevelGraph

from xr_aimz.binding import (
    AlignedInputs,
    BlockValues,
    Requirement,
    align_memory,
    as_jax_array,
    block_of,
    check_values,
)
from xr_aimz.kernel import BlockData, DrawState, Kernel, KernelSpec, run_draws
from xr_aimz.prediction.chunk_plan import ChunkPlan
from xr_aimz.random import hash_labels
from xr_aimz.storage import identify, name_by_content

KINDS = ("keys", "words", "array", "latent", "labels")
Dims = tuple[str | None, ...]
_TITLES = {
    "keys": "the seed, or the labels of chains and draws",
    "words": "the labels of {!r}",
    "array": "the values of {!r}",
    "latent": "the draws of {!r}",
    "labels": "the coordinate {!r}",
}
# Dims of the keys: the last axes, sites and the two words of a key, are no dims of a block.
_KEYS: Dims = ("chain", "draw", None, None)


@dataclass(frozen=True, eq=False)
class BlockInput:
    """Dask array of which each block takes a part.

    Parameters
    ----------
    kind : {"keys", "words", "array", "latent", "labels"}
    name : str
        Name among its kind: a source key, a site, or the dim of the words or labels.
    dims : tuple of str or None
        None for an axis that every block has in full, whatever a Dataset's dims are called.
    array : dask.array.Array
    pieces : tuple of tuple of (int, slice)
        For each dim, and each block along it: the chunk, and the slice within that chunk.
    """

    kind: str
    name: str
    dims: Dims
    array: da.Array
    pieces: tuple[tuple[tuple[int, slice], ...], ...]

    @property
    def title(self) -> str:
        """Description for messages."""
        return _TITLES[self.kind].format(self.name)

    def part(self, at: Mapping[str, int]) -> tuple[tuple[Any, ...], tuple[slice, ...]]:
        """Return the dask key of the chunk that a block needs, and the slices to take of it."""
        axes = zip(self.dims, self.pieces, strict=True)
        locations = [pieces[0 if dim is None else at.get(dim, 0)] for dim, pieces in axes]
        return (self.array.name, *(i for i, _ in locations)), tuple(part for _, part in locations)


def block_inputs(
    inputs: AlignedInputs,
    latents: Mapping[str, xr.DataArray],
    site_keys: np.ndarray,
    cut_dims: tuple[str, ...],
    chunks: Mapping[str, tuple[int, ...]],
    labelled: Iterable[str] = (),
) -> list[BlockInput]:
    """Make the inputs of blocks; lazy arrays stay lazy.

    Parameters
    ----------
    inputs : AlignedInputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    site_keys : array of uint32 ``(chain, draw, site, 2)``
    cut_dims : tuple of str
        The dims whose words, hashes of labels, a block needs.
    chunks : mapping of dim to tuple of int
        Chunks of the blocks, along chain and draw too.
    labelled : iterable of str
        The dims whose labels, or positions where there are none, a block needs as well.
    """
    sources: list[tuple[str, str, Dims, Any]] = [("keys", "", _KEYS, site_keys)]
    sources += [("words", d, (d, None), _make_words(d, inputs, chunks[d])) for d in cut_dims]
    for kind, arrays in (("array", inputs.arrays), ("latent", latents)):
        sources += [(kind, n, tuple(map(str, a.dims)), a.data) for n, a in arrays.items()]
    sources += [("labels", d, (d,), _collect_labels(d, inputs, chunks)) for d in labelled]
    return [_make_block_input(*source, chunks) for source in sources]


def _make_block_input(
    kind: str, name: str, dims: Dims, array: Any, chunks: Mapping[str, tuple[int, ...]]
) -> BlockInput:
    block_chunks = tuple(
        (n,) if d is None else chunks.get(d, (n,)) for d, n in zip(dims, array.shape, strict=True)
    )
    if not isinstance(array, da.Array):
        array = np.asarray(array)
        content_name = name_by_content("input", array, block_chunks)
        if kind == "latent":
            array = _embed_in_place(content_name, as_jax_array(name, array), block_chunks)
        else:
            array = da.from_array(array, block_chunks, name=content_name)
    elif not all(map(_lies_in_chunks, block_chunks, array.chunks)):
        array = array.rechunk(block_chunks)
    locations = tuple(
        tuple(_locate_blocks(*chunk_pair))
        for chunk_pair in zip(block_chunks, array.chunks, strict=True)
    )
    return BlockInput(kind, name, dims, array, locations)


def _embed_in_place(name: str, array: np.ndarray, chunks: tuple[tuple[int, ...], ...]) -> da.Array:
    """Make a dask array of views of an array that all tasks read in place."""
    # dask's from_array would copy an array of one chunk, to where JAX copies it on every call.
    aligned = align_memory(array)
    starts = [tuple(accumulate((0, *sizes[:-1]))) for sizes in chunks]
    graph: dict[Any, Any] = {}
    for index in product(*(range(len(sizes)) for sizes in chunks)):
        corner = zip(index, starts, chunks, strict=True)
        part = tuple(slice(first[i], first[i] + sizes[i]) for i, first, sizes in corner)
        graph[name, *index] = DataNode((name, *index), aligned[part])
    layer = HighLevelGraph.from_collections(name, graph)
    return da.Array(layer, name, chunks, meta=np.empty((0,) * array.ndim, array.dtype))


def _lies_in_chunks(block_chunks: tuple[int, ...], chunks: tuple[int, ...]) -> bool:
    """Return whether every block lies in one chunk."""
    return set(accumulate(chunks)) <= set(accumulate(block_chunks))


def _locate_blocks(
    block_chunks: tuple[int, ...], chunks: tuple[int, ...]
) -> Iterator[tuple[int, slice]]:
    starts = tuple(accumulate((0, *chunks[:-1])))
    for start, length in zip(accumulate((0, *block_chunks[:-1])), block_chunks, strict=True):
        chunk = bisect_right(starts, start) - 1
        offset = start - starts[chunk]
        yield chunk, slice(offset, offset + length)


def _collect_labels(dim: str, inputs: AlignedInputs, chunks: Mapping[str, tuple[int, ...]]) -> Any:
    if dim in inputs.labels:
        return xr.IndexVariable(dim, inputs.labels[dim]).values
    size = inputs.sizes[dim]
    return da.arange(size, chunks=(chunks.get(dim, (size,)),))


def _make_words(dim: str, inputs: AlignedInputs, chunks: tuple[int, ...]) -> Any:
    labels = inputs.labels.get(dim)
    if labels is not None:
        return hash_labels(dim, labels, size=inputs.sizes[dim])
    # Without labels, positions are labels; each task makes its own, for there may be very many.
    name = name_by_content("words", dim, chunks)
    starts = accumulate((0, *chunks[:-1]))
    graph: dict[Any, Any] = {
        (name, i, 0): GraphTask((name, i, 0), _position_words, dim, start, length)
        for i, (start, length) in enumerate(zip(starts, chunks, strict=True))
    }
    layer = HighLevelGraph.from_collections(name, graph)
    return da.Array(layer, name, (chunks, (2,)), meta=np.empty((0, 0), np.uint32))


def _position_words(dim: str, start: int, length: int) -> np.ndarray:
    return hash_labels(dim, np.arange(start, start + length))


Factory = Callable[[KernelSpec, Mapping[str, int]], Kernel]


@dataclass(frozen=True, eq=False)
class BlockTask:
    """Static data that all tasks of a graph share.

    Parameters
    ----------
    name : str
        The fingerprint under which the compiled program is kept.
    identity : str
        The token of the fit: which draws of the latents and values of params these are.
    factory : callable
        Maker of the kernel: :func:`xr_aimz.kernel.program.predictive` or ``log_likelihood``.
    program : KernelSpec
    params : mapping
    padded_sizes : mapping of dim to int
        The size to which a block is padded.
    sizes : mapping of dim to int
        Sizes of the dimensions that are never cut.
    postprocess : callable
        Function of the sites' draws ``(chain, draw, *dims)``, applied before they leave a task.
    origins : mapping of str to str
        Digests of the sources of the results, by a description of each: the differences that may
        be reported between two results.
    requirements : tuple of Requirement
        Conditions that the values of lazy arrays must satisfy.
    unlabelled : frozenset of str
        The dims without a coordinate.
    """

    name: str
    identity: str
    factory: Factory
    program: KernelSpec
    params: Mapping[str, Any]
    padded_sizes: Mapping[str, int]
    sizes: Mapping[str, int]
    operands: tuple[tuple[str, str, Dims], ...] = field(default=())
    postprocess: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    origins: Mapping[str, str] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()
    unlabelled: frozenset[str] = frozenset()


def lazy_arrays(
    task: BlockTask,
    plan: ChunkPlan,
    inputs: AlignedInputs,
    latents: Mapping[str, xr.DataArray],
    keys: np.ndarray,
    outputs: Mapping[str, tuple[tuple[str, ...], Any]],
) -> dict[str, da.Array]:
    """Make a dask array for each output of a task.

    Parameters
    ----------
    task : BlockTask
    plan : ChunkPlan
    inputs : AlignedInputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    keys : array of uint32 ``(chain, draw, site, 2)``
        For each draw, the key of each site of ``task.program.random_sites``.
    outputs : mapping of site to (dims, struct)
        ``struct`` has the dtype, and the shape along ``dims`` of one whole padded block, less
        chain and draw.
    """
    # Equal tokens mean equal values, in any process: by them dask shares results of two graphs,
    # and an interrupted write is continued.
    cut_dims = task.program.binding.block_dims
    chunks = {"chain": plan.chain, "draw": plan.draw, **plan.chunks}
    arrays = inputs.arrays
    labelled = [d for d in inputs.sizes if task.requirements and d in _dims_of(arrays)]
    operands = block_inputs(inputs, latents, keys, cut_dims, chunks, labelled)
    digests = {
        "the draws of the fit": task.identity,
        "the model, its sites or its options": task.name,
        "the statistics": identify(task.postprocess).digest,
    }
    origins = digests | {o.title: identify(o.dims, o.array).digest for o in operands}
    token = identify(origins, tuple(chunks.items())).digest
    full_task = replace(
        task,
        operands=tuple((o.kind, o.name, o.dims) for o in operands),
        unlabelled=frozenset(labelled) - set(inputs.labels),
        origins=origins,
    )
    blocks = _task_layer(full_task, operands, chunks, token)
    return {
        site: _select_site(blocks, tuple(chunks), site, dims, struct, f"aimz-{site}-{token}")
        for site, (dims, struct) in outputs.items()
    }


def _dims_of(arrays: Mapping[str, xr.DataArray]) -> set[str]:
    return {str(d) for a in arrays.values() for d in a.dims}


def _task_layer(
    task: BlockTask,
    operands: Sequence[BlockInput],
    chunks: Mapping[str, tuple[int, ...]],
    token: str,
) -> da.Array:
    """Make an array of dicts, one for each block, from one task each.

    The graph is built explicitly rather than by ``blockwise``, which dask would fuse with the
    tasks of the inputs: every run of draws would then read and compute its block again.
    """
    name, shared = f"aimz-block-{token}", f"aimz-task-{token}"
    graph: dict[Any, Any] = {shared: DataNode(shared, task)}
    for indices in product(*(range(len(c)) for c in chunks.values())):
        at = dict(zip(chunks, indices, strict=True))
        sources, parts = zip(*(operand.part(at) for operand in operands), strict=True)
        key = (name, *indices)
        graph[key] = GraphTask(key, _run_block, TaskRef(shared), parts, *map(TaskRef, sources))
    arrays = [operand.array for operand in operands]
    layers = HighLevelGraph.from_collections(name, graph, dependencies=arrays)  # type: ignore[arg-type] # dask's own arrays
    meta = np.empty((0,) * len(chunks), dtype=object)
    return da.Array(layers, name, chunks=tuple(chunks.values()), meta=meta)


def _select_site(
    blocks: da.Array,
    index: tuple[str, ...],
    site: str,
    dims: tuple[str, ...],
    struct: Any,
    name: str,
) -> da.Array:
    # A site without a dim is the same in every block along it: take the first.
    selection = tuple(slice(None) if d in dims else slice(0, 1) for d in index)
    site_dims = tuple(d for d in dims if d not in ("chain", "draw"))
    lengths = dict(zip(site_dims, struct.shape, strict=True))
    return da.blockwise(
        _take_site,
        dims,
        blocks.blocks[selection],
        index,
        site=site,
        name=name,
        new_axes={d: n for d, n in lengths.items() if d not in index},
        concatenate=None,
        dtype=struct.dtype,
        meta=np.empty((0,) * len(dims), struct.dtype),
        align_arrays=False,
    )


def _take_site(block: Any, site: str) -> np.ndarray:
    # A contracted index arrives as a list of its blocks; there is one.
    while isinstance(block, list):
        block = block[0]
    return block[site]


def _run_block(
    task: BlockTask, parts: tuple[tuple[slice, ...], ...], *sources: np.ndarray
) -> dict[str, np.ndarray]:
    """Run one task: slice, check and pad arrays, run the program over draws, cut the padding."""
    program = task.program
    lengths: dict[str, int] = {}
    blocks: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    padded: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    for (kind, name, dims), source, part in zip(task.operands, sources, parts, strict=True):
        blocks[kind][name] = block = source[part]
        if kind in ("keys", "words"):
            lengths |= {d: n for d, n in zip(dims, block.shape, strict=True) if d is not None}
    if task.requirements:
        values = BlockValues(blocks["array"], program.dims, blocks["labels"], task.unlabelled)
        check_values(task.requirements, values)
    for kind, name, dims in task.operands:
        if kind != "labels":
            value = blocks[kind][name]
            value = as_jax_array(name, value) if kind in ("array", "latent") else value
            padded[kind][name] = _pad_block(value, dims, task.padded_sizes)
    sizes = {**task.sizes, **task.padded_sizes}
    shape = (lengths["chain"], lengths["draw"])
    outputs = run_draws(
        task.name,
        lambda: task.factory(program, sizes),
        block_of(program.binding, sizes),
        _flatten_draws(program.random_sites, padded["keys"][""], padded["latent"]),
        BlockData(padded["array"], task.params, padded["words"]),
    )
    draws = {
        site: _cut_padding(value, program.result_dims(site), lengths, shape)
        for site, value in outputs.items()
    }
    return task.postprocess(draws)


def _flatten_draws(
    keyed: Sequence[str], keys: np.ndarray, latents: Mapping[str, np.ndarray]
) -> DrawState:
    """Put the keys and latents on one leading axis ``(chain * draw, ...)``."""
    flat = keys.reshape(-1, *keys.shape[2:])
    return DrawState(
        {name: flat[:, i] for i, name in enumerate(keyed)},
        {n: v.reshape(len(flat), *v.shape[2:]) for n, v in latents.items()},
    )


def _pad_block(block: np.ndarray, dims: Dims, padded_sizes: Mapping[Any, int]) -> np.ndarray:
    padding = [padded_sizes.get(d, n) - n for d, n in zip(dims, block.shape, strict=True)]
    if not any(padding):
        return block
    # Repeat the last value: a value of the data, so the model meets no new value.
    return np.pad(block, [(0, n) for n in padding], mode="edge")


def _cut_padding(
    value: np.ndarray, dims: tuple[str, ...], lengths: Mapping[str, int], shape: tuple[int, int]
) -> np.ndarray:
    draws = value.reshape(*shape, *value.shape[1:])
    selection = tuple(slice(0, lengths.get(d)) for d in dims[: draws.ndim - 2])
    return draws[(slice(None), slice(None), *selection)]
