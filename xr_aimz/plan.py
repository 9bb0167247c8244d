"""How a prediction is cut: into blocks of the Dataset, and into runs of draws.

A chunked Dataset keeps its own chunks; a numpy-backed one is cut so that a block with
all its draws stays under ``set_options(block_bytes=...)``. Where a block is too heavy
for that, its draws are cut instead. No value depends on the cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from xr_aimz.binding import Binding
from xr_aimz.errors import BlockSizeError
from xr_aimz.inputs import Inputs

__all__ = ["Plan", "finer", "plan", "plan_cells"]

# A block of fewer cells spends its time on being a task; the draws are cut before that.
_LEAST_CELLS = 1024
# A task holds its outputs many times over: XLA's buffers, the arrays cut from them, the piece
# being encoded, the bytes to write. Outputs of an eighth also stay well under the 32 MiB above
# which glibc maps fresh pages for every buffer; those page faults took as long as the draws
# themselves (docs/decisions/block-size.md).
_COPIES = 8


@dataclass(frozen=True)
class Plan:
    """The chunks of each observation dimension, and of ``chain`` and ``draw``."""

    chunks: Mapping[str, tuple[int, ...]]
    chain: tuple[int, ...]
    draw: tuple[int, ...]

    def largest(self, dim: str) -> int:
        return max(self.chunks[dim])


def plan(
    binding: Binding,
    inputs: Inputs,
    shape: tuple[int, int],
    bytes_per_draw: int,
    limit: int,
) -> Plan:
    """Cut a prediction of ``shape`` (chain, draw) draws.

    Parameters
    ----------
    binding : Binding
    inputs : Inputs
    shape : tuple of int
        The number of chains and of draws a chain.
    bytes_per_draw : int
        What one draw of all outputs weighs over the whole Dataset.
    limit : int
        The most bytes that a task may hold.
    """
    limit = max(limit // _COPIES, 1)
    sizes = {d: inputs.sizes[d] for d in binding.cut_dims}
    per_cell = max(bytes_per_draw / max(prod(sizes.values()), 1), 1e-9)
    if inputs.chunks:
        chunks = {d: inputs.chunks.get(d, (n,)) for d, n in sizes.items()}
    else:
        cells = max(int(limit / (per_cell * prod(shape))), _LEAST_CELLS)
        chunks = _cut(sizes, binding.whole_dims, cells)
    block = prod(max(c) for c in chunks.values()) * per_cell
    chain, draw = _cut_draws(shape, max(int(limit / block), 1))
    return Plan(chunks, chain, draw)


def plan_cells(
    binding: Binding,
    inputs: Inputs,
    shape: tuple[int, int],
    bytes_per_draw: int,
    limit: int,
) -> Plan:
    """Plan blocks that have all draws of their cells: cells are cut, never draws.

    Parameters
    ----------
    binding, inputs, shape, bytes_per_draw, limit
        As in :func:`plan`.

    Raises
    ------
    BlockSizeError
        The draws of one cell, or of one whole length of a core dim, are over the limit.
    """
    sizes = {d: inputs.sizes[d] for d in binding.cut_dims}
    per_cell = max(bytes_per_draw / max(prod(sizes.values()), 1), 1e-9) * prod(shape)
    whole = {d: inputs.chunks.get(d, (n,)) for d, n in sizes.items()}
    chunks = finer(whole, binding.whole_dims, int(limit / _COPIES / per_cell))
    lengths = {d: max(c) for d, c in chunks.items()}
    weight = prod(lengths.values()) * per_cell
    if weight > limit:
        kept = f"core_dim={binding.core_dims!r}"
        if read := [d for d in binding.whole_dims if d not in binding.core_dims]:
            kept += f" and {read!r}, along which the model reads values,"
        raise BlockSizeError(
            f"a summary needs all draws of a cell in one task: {shape[0]} chains x {shape[1]} "
            f"draws of a block of {lengths!r}, the smallest with {kept} whole, "
            f"weigh {weight:.3g} bytes, and block_bytes is {limit}; take fewer draws, "
            f"draws=..., or allow more, xr_aimz.set_options(block_bytes={_COPIES * int(weight)})"
        )
    return Plan(chunks, (shape[0],), (shape[1],))


def finer(
    chunks: Mapping[str, tuple[int, ...]], core: Iterable[str], cells: int
) -> dict[str, tuple[int, ...]]:
    """The same chunks, each cut evenly, so that none has more than ``cells`` cells."""
    lengths = {d: max(c) for d, c in chunks.items()}
    most = {d: max(c) for d, c in _cut(lengths, tuple(core), max(cells, 1)).items()}
    return {d: tuple(n for c in own for n in _even(c, most[d])) for d, own in chunks.items()}


def _cut(sizes: Mapping[str, int], core: Iterable[str], cells: int) -> dict[str, tuple[int, ...]]:
    """Equal chunks of at most ``cells`` cells: leading dims are cut first, as dask does rows."""
    lengths = dict(sizes)
    for dim in (d for d in sizes if d not in core):
        rest = prod(n for d, n in lengths.items() if d != dim)
        lengths[dim] = max(1, min(lengths[dim], cells // max(rest, 1)))
        if prod(lengths.values()) <= cells:
            break
    return {d: _even(n, lengths[d]) for d, n in sizes.items()}


def _even(length: int, most: int) -> tuple[int, ...]:
    """Chunks of at most ``most``, as even as can be, so that padding wastes little."""
    pieces = -(-length // most)
    size = -(-length // pieces)
    return tuple(min(size, length - start) for start in range(0, length, size))


def _cut_draws(shape: tuple[int, int], most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    chains, draws = shape
    if most >= chains:
        return (chains,), _runs(draws, min(most // chains, draws))
    return (1,) * chains, _runs(draws, min(most, draws))


def _runs(draws: int, most: int) -> tuple[int, ...]:
    """Runs of at most ``most`` draws, all equal if that takes few more of them."""
    # Each length of run is a program to compile; a length with divisors maps evenly.
    least = -(-draws // most)
    for pieces in range(least, 2 * least + 1):
        length = draws // pieces
        if draws % pieces == 0 and (length < 8 or any(length % n == 0 for n in range(8, 17))):
            return (length,) * pieces
    return _even(draws, most)
