"""Fit every label of some dimensions independently, block of cells by block.

Blocks of the Dataset are loaded one after another; the cells of a block that have data are
fitted tile by tile (:mod:`xr_aimz.inference.per_cell_program`), and their draws are put into a
:class:`CellStore`: in memory, or on disk (:mod:`xr_aimz.inference.per_cell_store`). No value
depends on the blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Protocol

import jax
import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from xr_aimz.binding import (
    Binding,
    BoundModel,
    Requirement,
    as_jax_arrays,
    block_of,
    check_values,
    jax_dtype,
    part_block,
    resize,
)
from xr_aimz.inference.per_cell_program import (
    NO_DATA,
    CellMethod,
    TileProgram,
    TileResult,
    make_tile_program,
)
from xr_aimz.inference.problem import InferenceProblem, PosteriorDraws
from xr_aimz.options import get_options
from xr_aimz.random import combine_axes, hash_labels, seed_key

Arrays = dict[str, np.ndarray]
# A block has at least so many tiles, so that filling up the last one costs little.
_MIN_TILES = 8


@dataclass(frozen=True)
class CellBlock:
    """Position of a block of cells: its number and its slice along each dim of ``per``."""

    numbers: tuple[int, ...]
    slices: tuple[slice, ...]


@dataclass(frozen=True)
class CellPlan:
    """Plan for fitting all cells: the model, the compiled tiles, the seed and the block size.

    Parameters
    ----------
    bound : BoundModel
    method : CellMethod
    tiles : TileProgram
    seed : int
    block : tuple of int
        The size of a block along each dim of ``per``.
    """

    bound: BoundModel
    method: CellMethod
    tiles: TileProgram
    seed: int
    block: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.bound.inputs.sizes[d] for d in self.bound.binding.per)

    def places(self, block: tuple[int, ...]) -> Iterator[CellBlock]:
        """Yield the blocks of that size, in order."""
        counts = [-(-n // b) for n, b in zip(self.sizes, block, strict=True)]
        for numbers in product(*map(range, counts)):
            axes = zip(numbers, block, self.sizes, strict=True)
            yield CellBlock(numbers, tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in axes))

    def arrays(self) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
        """Return leading axes, shape and dtype of each array of the whole fit.

        Leading axes are those before the axes of the cells, such as chain and draw.
        """
        result = {}
        for name, struct in _flatten_tile(self.tiles.outputs).items():
            lead = _leading_axes(name)
            rest = struct.shape[1:]
            result[name] = (lead, rest[:lead] + self.sizes + rest[lead:], np.dtype(struct.dtype))
        return result

    def identity(self) -> dict[str, str]:
        """Return what two runs must have in common, data apart, for one to continue the other."""
        binding, inputs = self.bound.binding, self.bound.inputs
        labels = hashlib.sha256()
        for d, n in zip(binding.per, self.sizes, strict=True):
            labels.update(hash_labels(d, inputs.labels.get(d), size=n).tobytes())
        return {
            "model, method and options": self.tiles.digest,
            "seed": str(self.seed),
            "per": repr(binding.per),
            "labels": labels.hexdigest(),
        }


class CellStore(Protocol):
    """Store of the draws of finished blocks."""

    block: tuple[int, ...]

    def holds(self, place: CellBlock, data: str) -> bool:
        """Return whether a block is stored already, computed from data of that digest."""

    def put(self, place: CellBlock, data: str, arrays: Arrays) -> None:
        """Store the arrays of a block."""

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of all blocks, joined."""


class InMemoryCells:
    """Store of numpy arrays in memory."""

    def __init__(self, plan: CellPlan) -> None:
        self.block = plan.block
        self._leads = {name: lead for name, (lead, _, _) in plan.arrays().items()}
        self._arrays = {name: np.empty(shape, d) for name, (_, shape, d) in plan.arrays().items()}

    def holds(self, place: CellBlock, data: str) -> bool:
        return False

    def put(self, place: CellBlock, data: str, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self._arrays[name][(slice(None),) * self._leads[name] + place.slices] = array

    def arrays(self) -> dict[str, Any]:
        return self._arrays


def plan_cell_fits(
    bound: BoundModel, method: CellMethod, seed: int, names: tuple[str, ...]
) -> CellPlan:
    """Check, trace and compile the fit of one tile, without loading data.

    Raises
    ------
    ModelError
        The method does not support the model.
    """
    binding, cell = bound.binding, bound.inputs.of_cell(bound.binding.per)
    problem = InferenceProblem(bound.model, {}, block_of(binding, cell.sizes), bound.sites)
    method.check(problem)
    structs = {
        k: jax.ShapeDtypeStruct(a.shape, jax_dtype(a.dtype)) for k, a in cell.arrays.items()
    }
    tile_program = make_tile_program(
        method, problem, binding.without_data(), bound.inputs.dims, structs, names
    )
    return CellPlan(bound, method, tile_program, seed, _block_size(bound, tile_program))


def _block_size(bound: BoundModel, program: TileProgram) -> tuple[int, ...]:
    """Return the size of a block of cells: whole chunks if possible, neither tiny nor huge."""
    inputs, per = bound.inputs, bound.binding.per
    sizes = {d: inputs.sizes[d] for d in per}
    outputs = _flatten_tile(program.outputs).values()
    bytes_a_cell = sum(prod(o.shape) * o.dtype.itemsize for o in outputs) // program.cells
    most = max(get_options()["block_bytes"] // max(bytes_a_cell, 1), program.cells)
    least = min(_MIN_TILES * program.cells, most)
    size = {d: max(inputs.chunks.get(d, (n,))) for d, n in sizes.items()}
    for d in per:
        size[d] = max(1, min(size[d], most // max(prod(size.values()) // size[d], 1)))
    for d in reversed(per):
        times = max(least // prod(size.values()), 1)
        size[d] = min(size[d] * times, sizes[d])
    return tuple(size.values())


def fit_cells(
    plan: CellPlan, store: CellStore, requirements: Iterable[Requirement], *, progress: bool
) -> PosteriorDraws:
    """Fit every cell that is not in the store yet.

    Parameters
    ----------
    plan : CellPlan
    store : CellStore
    requirements : iterable of Requirement
        Requirements on the values of lazy arrays, checked block by block.
    progress : bool

    Returns
    -------
    PosteriorDraws
        Samples and stats ``(chain, draw, *per, ...)``, numpy or lazy as in the store.
    """
    per, inputs = plan.bound.binding.per, plan.bound.inputs
    blocks = {**inputs.sizes, **dict(zip(per, store.block, strict=True))}
    checks = resize(requirements, blocks)
    with tqdm(total=prod(plan.sizes), desc="cells", disable=not progress) as bar:
        for block in plan.places(store.block):
            part = dict(zip(per, block.slices, strict=True))
            loaded = as_jax_arrays(plan.bound.binding, inputs.load(part))
            check_values(checks, part_block(inputs, loaded, part))
            data = _digest(loaded)
            if not store.holds(block, data):
                store.put(block, data, _fit_block(plan, block, loaded))
            bar.update(prod(s.stop - s.start for s in block.slices))
    return _posterior_draws(plan, store.arrays())


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _fit_block(plan: CellPlan, block: CellBlock, loaded: Arrays) -> Arrays:
    """Fit a block: draws with the axes of the cells after the leading ones, NaN without data."""
    binding, dims = plan.bound.binding, plan.bound.inputs.dims
    sizes = tuple(s.stop - s.start for s in block.slices)
    cell_arrays = {
        k: _split_by_cell(a, dims[k], binding.per, sizes)
        for k, a in loaded.items()
        if _depends_on_cell(dims[k], binding.per)
    }
    shared = {k: a for k, a in loaded.items() if k not in cell_arrays}
    cells = np.flatnonzero(_data_mask(cell_arrays, shared, dims, binding, prod(sizes)))
    hashes = _hash_cells(plan, block)[cells]
    seed = seed_key(plan.seed)
    tiles = plan.tiles.run(seed, hashes, {k: a[cells] for k, a in cell_arrays.items()}, shared)
    arrays = _empty_arrays(plan.tiles.outputs, prod(sizes))
    start = 0
    for tile in tiles:
        flat = _flatten_tile(tile)
        tile_cells = cells[start : start + len(flat["status"])]
        for name, values in flat.items():
            arrays[name][tile_cells] = values
        start += len(tile_cells)
    return {name: _unflatten(a, _leading_axes(name), sizes) for name, a in arrays.items()}


def _depends_on_cell(dims: tuple[str, ...], per: tuple[str, ...]) -> bool:
    return bool(set(dims) & set(per))


def _split_by_cell(
    array: np.ndarray, dims: tuple[str, ...], per: tuple[str, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """Broadcast an array to ``(cell, ...)``, the cells of the block flattened."""
    has_dim = [d in dims for d in per]
    rest = array.shape[sum(has_dim) :]
    lengths = tuple(n if is_dim else 1 for n, is_dim in zip(sizes, has_dim, strict=True))
    result = np.broadcast_to(array.reshape(*lengths, *rest), (*sizes, *rest))
    return result.reshape(prod(sizes), *rest)


def _data_mask(
    cell_arrays: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray],
    dims: Mapping[str, tuple[str, ...]],
    binding: Binding,
    count: int,
) -> np.ndarray:
    """Return a bool mask ``(cell,)`` of the cells with an observation.

    An observation is a value of an outcome at which no input is missing.
    """
    outcomes = {s.key for a in binding.outcomes for s in a.sources}
    outcome_mask: Any = xr.Variable((), not outcomes)
    input_mask: Any = xr.Variable("cell", np.ones(count, bool))
    for key, array in {**cell_arrays, **shared}.items():
        names = [
            *(["cell"] if key in cell_arrays else []),
            *(d for d in dims[key] if d not in binding.per),
        ]
        value_mask = xr.Variable(
            names, ~np.isnan(array) if array.dtype.kind == "f" else np.ones(array.shape, bool)
        )
        mask = value_mask.all([d for d in names if d not in ("cell", *binding.dims)])
        outcome_mask, input_mask = (
            (outcome_mask | mask, input_mask)
            if key in outcomes
            else (outcome_mask, input_mask & mask)
        )
    result = input_mask & outcome_mask
    return result.any([d for d in result.dims if d != "cell"]).values


def _hash_cells(plan: CellPlan, block: CellBlock) -> np.ndarray:
    """Return hashes of the cells of a block, uint32 ``(cell, 2)``, combined from their labels."""
    inputs = plan.bound.inputs
    hashes = [
        hash_labels(d, inputs.labels.get(d), size=inputs.sizes[d])[s]
        for d, s in zip(plan.bound.binding.per, block.slices, strict=True)
    ]
    return np.asarray(combine_axes(hashes)).reshape(-1, 2)


def _empty_arrays(outputs: TileResult, count: int) -> Arrays:
    """Make arrays ``(cell, ...)`` for cells without data: NaN, or 0 where a dtype has no NaN."""
    arrays = {}
    for name, struct in _flatten_tile(outputs).items():
        fill_value = np.nan if np.dtype(struct.dtype).kind == "f" else 0
        arrays[name] = np.full((count, *struct.shape[1:]), fill_value, struct.dtype)
    arrays["status"][:] = NO_DATA
    return arrays


def _unflatten(array: np.ndarray, lead: int, sizes: tuple[int, ...]) -> np.ndarray:
    moved = np.moveaxis(array, 0, lead)
    return moved.reshape(*moved.shape[:lead], *sizes, *moved.shape[lead + 1 :])


def _flatten_tile(tile: TileResult) -> dict[str, Any]:
    """Flatten the arrays of a tile into one mapping, with names such as ``posterior slope``."""
    arrays = {f"posterior {n}": a for n, a in tile.samples.items()}
    arrays |= {f"sample_stats {n}": a for n, a in tile.stats.items()}
    arrays |= {} if tile.losses is None else {"losses": tile.losses}
    return {**arrays, "status": tile.status}


def _leading_axes(name: str) -> int:
    return {"losses": 1, "status": 0}.get(name, 2)


def _posterior_draws(plan: CellPlan, arrays: Mapping[str, Any]) -> PosteriorDraws:
    def group(title: str) -> dict[str, Any]:
        members = {n: a for n, a in arrays.items() if n.startswith(f"{title} ")}
        return {n.removeprefix(f"{title} "): a for n, a in members.items()}

    losses, steps = arrays.get("losses"), plan.method.loss_steps
    return PosteriorDraws(
        samples=group("posterior"),
        stats=group("sample_stats"),
        shape=plan.method.shape,
        method=plan.method.name,
        losses=losses,
        loss_steps=steps,
        full_rate_steps=int(plan.method.full_rate * steps[-1]) if steps else 0,
        status=np.asarray(arrays["status"]),
        max_tree_depth=plan.method.max_tree_depth,
    )
