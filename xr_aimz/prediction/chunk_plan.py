"""Plan the chunks of a prediction: how cells and draws are cut into tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from xr_aimz.binding import AlignedInputs, Binding
from xr_aimz.errors import BlockSizeError

# A block of fewer cells spends its time on task overhead; the draws are cut before that.
_LEAST_CELLS = 1024
# A task holds its outputs many times over: XLA's buffers, the arrays cut from them, the chunk
# being encoded, the bytes to write. Outputs of an eighth also stay well under the 32 MiB above
# which glibc maps fresh pages for every buffer; those page faults took as long as the draws
# themselves (docs/decisions/block-size.md).
_COPIES = 8


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of each observation dimension, and of ``chain`` and ``draw``."""

    chunks: Mapping[str, tuple[int, ...]]
    chain: tuple[int, ...]
    draw: tuple[int, ...]

    def largest(self, dim: str) -> int:
        """Return the size of the largest chunk along a dim."""
        return max(self.chunks[dim])


def plan_chunks(
    binding: Binding,
    inputs: AlignedInputs,
    shape: tuple[int, int],
    bytes_per_draw: int,
    limit: int,
) -> ChunkPlan:
    """Plan the chunks of a prediction of ``shape`` (chain, draw) draws.

    Parameters
    ----------
    binding : Binding
    inputs : AlignedInputs
    shape : tuple of int
        The number of chains and of draws a chain.
    bytes_per_draw : int
        Size of one draw of all outputs over the whole Dataset.
    limit : int
        The most bytes that a task may hold.
    """
    limit = max(limit // _COPIES, 1)
    sizes = {d: inputs.sizes[d] for d in binding.block_dims}
    per_cell = max(bytes_per_draw / max(prod(sizes.values()), 1), 1e-9)
    if inputs.chunks:
        chunks = {d: inputs.chunks.get(d, (n,)) for d, n in sizes.items()}
    else:
        cells = max(int(limit / (per_cell * prod(shape))), _LEAST_CELLS)
        chunks = _cut_cells(sizes, binding.whole_dims, cells)
    block = prod(max(c) for c in chunks.values()) * per_cell
    chain, draw = _cut_draws(shape, max(int(limit / block), 1))
    return ChunkPlan(chunks, chain, draw)


def plan_chunks_all_draws(
    binding: Binding,
    inputs: AlignedInputs,
    shape: tuple[int, int],
    bytes_per_draw: int,
    limit: int,
) -> ChunkPlan:
    """Plan blocks that have all draws of their cells: cells are cut, draws never.

    Parameters
    ----------
    binding, inputs, shape, bytes_per_draw, limit
        As in :func:`plan_chunks`.

    Raises
    ------
    BlockSizeError
        The draws of one cell, or of one whole length of a core dim, are over the limit.
    """
    sizes = {d: inputs.sizes[d] for d in binding.block_dims}
    per_cell = max(bytes_per_draw / max(prod(sizes.values()), 1), 1e-9) * prod(shape)
    uncut = {d: inputs.chunks.get(d, (n,)) for d, n in sizes.items()}
    chunks = split_chunks(uncut, binding.whole_dims, int(limit / _COPIES / per_cell))
    lengths = {d: max(c) for d, c in chunks.items()}
    n_bytes = prod(lengths.values()) * per_cell
    if n_bytes > limit:
        uncut_dims = f"core_dim={binding.core_dims!r}"
        if read_dims := [d for d in binding.whole_dims if d not in binding.core_dims]:
            uncut_dims += f" and {read_dims!r}, along which the model reads values,"
        raise BlockSizeError(
            f"a summary needs all draws of a cell in one task: {shape[0]} chains x {shape[1]} "
            f"draws of a block of {lengths!r}, the smallest with {uncut_dims} whole, "
            f"weigh {n_bytes:.3g} bytes, and block_bytes is {limit}; take fewer draws, "
            f"draws=..., or allow more, xr_aimz.set_options(block_bytes={_COPIES * int(n_bytes)})"
        )
    return ChunkPlan(chunks, (shape[0],), (shape[1],))


def split_chunks(
    chunks: Mapping[str, tuple[int, ...]], core: Iterable[str], cells: int
) -> dict[str, tuple[int, ...]]:
    """Cut each chunk evenly, so that no block has more than ``cells`` cells."""
    lengths = {d: max(c) for d, c in chunks.items()}
    max_sizes = {d: max(c) for d, c in _cut_cells(lengths, tuple(core), max(cells, 1)).items()}
    return {
        d: tuple(n for c in sizes for n in _split_evenly(c, max_sizes[d]))
        for d, sizes in chunks.items()
    }


def _cut_cells(
    sizes: Mapping[str, int], core: Iterable[str], cells: int
) -> dict[str, tuple[int, ...]]:
    """Cut dims into equal chunks of at most ``cells`` cells, leading dims first, as dask does."""
    lengths = dict(sizes)
    for dim in (d for d in sizes if d not in core):
        other_cells = prod(n for d, n in lengths.items() if d != dim)
        lengths[dim] = max(1, min(lengths[dim], cells // max(other_cells, 1)))
        if prod(lengths.values()) <= cells:
            break
    return {d: _split_evenly(n, lengths[d]) for d, n in sizes.items()}


def _split_evenly(length: int, max_size: int) -> tuple[int, ...]:
    """Split a length into chunks of at most ``max_size``, as equal as possible, to pad little."""
    n_chunks = -(-length // max_size)
    size = -(-length // n_chunks)
    return tuple(min(size, length - start) for start in range(0, length, size))


def _cut_draws(shape: tuple[int, int], max_draws: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    chains, draws = shape
    if max_draws >= chains:
        return (chains,), _split_draws(draws, min(max_draws // chains, draws))
    return (1,) * chains, _split_draws(draws, min(max_draws, draws))


def _split_draws(draws: int, max_draws: int) -> tuple[int, ...]:
    """Split draws into runs of at most ``max_draws``, all equal if that takes few more runs."""
    # Each length of run is a program to compile; a length with divisors maps evenly.
    min_runs = -(-draws // max_draws)
    for n_runs in range(min_runs, 2 * min_runs + 1):
        length = draws // n_runs
        if draws % n_runs == 0 and (length < 8 or any(length % n == 0 for n in range(8, 17))):
            return (length,) * n_runs
    return _split_evenly(draws, max_draws)
