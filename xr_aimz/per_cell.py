"""An independent fit for every label of some dimensions, block of cells by block.

Blocks of the Dataset are loaded one after another; the cells of a block that have data
are fitted tile by tile (:mod:`xr_aimz.tiles`), and what they give is put on a shelf: in
memory, or in a store (:mod:`xr_aimz.shelf`). No value depends on the blocks.
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

from xr_aimz import keys
from xr_aimz.binding import Binding, block_of
from xr_aimz.bound import Bound
from xr_aimz.casting import device_dtype, to_device_dtype
from xr_aimz.infer.cells import NO_DATA, CellMethod
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.labels import label_words
from xr_aimz.options import get_options
from xr_aimz.requirements import Requirement, check_values, label_part, resize
from xr_aimz.tiles import Cells, Tiles, tiles

__all__ = ["Memory", "Place", "Plan", "Shelf", "fit_cells", "plan_cells"]

Arrays = dict[str, np.ndarray]
# A block has at least so many tiles, so that little of the last one is spent on filling.
_LEAST_TILES = 8


@dataclass(frozen=True)
class Place:
    """Where a block of cells lies: its number along each dim, and its slices."""

    numbers: tuple[int, ...]
    slices: tuple[slice, ...]


@dataclass(frozen=True)
class Plan:
    """What a fit of all cells is made of, before any is made.

    Parameters
    ----------
    bound : Bound
    method : CellMethod
    tiles : Tiles
    seed : int
    block : tuple of int
        The size of a block along each dim of ``per``.
    """

    bound: Bound
    method: CellMethod
    tiles: Tiles
    seed: int
    block: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.bound.inputs.sizes[d] for d in self.bound.binding.per)

    def places(self, block: tuple[int, ...]) -> Iterator[Place]:
        """The blocks of that size, in order."""
        counts = [-(-n // b) for n, b in zip(self.sizes, block, strict=True)]
        for numbers in product(*map(range, counts)):
            cut = zip(numbers, block, self.sizes, strict=True)
            yield Place(numbers, tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in cut))

    def arrays(self) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
        """Of each array of the whole fit: its leading axes before the cells', shape, dtype."""
        found = {}
        for name, struct in _flat(self.tiles.outputs).items():
            lead = _lead(name)
            rest = struct.shape[1:]
            found[name] = (lead, rest[:lead] + self.sizes + rest[lead:], np.dtype(struct.dtype))
        return found

    def identity(self) -> dict[str, str]:
        """What two fits have in common if one may be finished as the other, data apart."""
        binding, inputs = self.bound.binding, self.bound.inputs
        labels = hashlib.sha256()
        for d, n in zip(binding.per, self.sizes, strict=True):
            labels.update(label_words(d, inputs.labels.get(d), size=n).tobytes())
        return {
            "model, method and options": self.tiles.digest,
            "seed": str(self.seed),
            "per": repr(binding.per),
            "labels": labels.hexdigest(),
        }


class Shelf(Protocol):
    """Where the draws of finished blocks are kept."""

    block: tuple[int, ...]

    def holds(self, place: Place, data: str) -> bool:
        """Whether a block is there already, made from data of that digest."""

    def put(self, place: Place, data: str, arrays: Arrays) -> None:
        """Keep a block."""

    def arrays(self) -> dict[str, Any]:
        """All blocks, as whole arrays."""


class Memory:
    """A shelf of numpy arrays."""

    def __init__(self, plan: Plan) -> None:
        self.block = plan.block
        self._leads = {name: lead for name, (lead, _, _) in plan.arrays().items()}
        self._arrays = {name: np.empty(shape, d) for name, (_, shape, d) in plan.arrays().items()}

    def holds(self, place: Place, data: str) -> bool:
        return False

    def put(self, place: Place, data: str, arrays: Arrays) -> None:
        for name, array in arrays.items():
            self._arrays[name][(slice(None),) * self._leads[name] + place.slices] = array

    def arrays(self) -> dict[str, Any]:
        return self._arrays


def plan_cells(bound: Bound, method: CellMethod, seed: int, wanted: tuple[str, ...]) -> Plan:
    """Check, trace and compile; nothing is loaded.

    Raises
    ------
    ModelError
        A model that the method cannot take.
    """
    binding, cell = bound.binding, bound.inputs.of_cell(bound.binding.per)
    problem = Problem(bound.model, {}, block_of(binding, cell.sizes), bound.sites)
    method.check(problem)
    structs = {
        k: jax.ShapeDtypeStruct(a.shape, device_dtype(a.dtype)) for k, a in cell.arrays.items()
    }
    made = tiles(method, problem, binding.without_data(), bound.inputs.dims, structs, wanted)
    return Plan(bound, method, made, seed, _block(bound, made))


def _block(bound: Bound, made: Tiles) -> tuple[int, ...]:
    """The size of a block of cells: whole chunks if it can be, and neither tiny nor huge."""
    inputs, per = bound.inputs, bound.binding.per
    sizes = {d: inputs.sizes[d] for d in per}
    outputs = _flat(made.outputs).values()
    bytes_a_cell = sum(prod(o.shape) * o.dtype.itemsize for o in outputs) // made.cells
    most = max(get_options()["block_bytes"] // max(bytes_a_cell, 1), made.cells)
    least = min(_LEAST_TILES * made.cells, most)
    size = {d: max(inputs.chunks.get(d, (n,))) for d, n in sizes.items()}
    for d in per:
        size[d] = max(1, min(size[d], most // max(prod(size.values()) // size[d], 1)))
    for d in reversed(per):
        times = max(least // prod(size.values()), 1)
        size[d] = min(size[d] * times, sizes[d])
    return tuple(size.values())


def fit_cells(
    plan: Plan, shelf: Shelf, requirements: Iterable[Requirement], *, progress: bool
) -> Draws:
    """Fit every cell that the shelf does not hold yet.

    Parameters
    ----------
    plan : Plan
    shelf : Shelf
    requirements : iterable of Requirement
        What the values of lazy arrays must satisfy, block by block.
    progress : bool

    Returns
    -------
    Draws
        Samples and stats ``(chain, draw, *per, ...)``, as the shelf has them.
    """
    per, inputs = plan.bound.binding.per, plan.bound.inputs
    blocks = {**inputs.sizes, **dict(zip(per, shelf.block, strict=True))}
    checks = resize(requirements, blocks)
    with tqdm(total=prod(plan.sizes), desc="cells", disable=not progress) as bar:
        for place in plan.places(shelf.block):
            loaded = _load(plan.bound, place)
            check_values(
                checks, label_part(inputs, loaded, dict(zip(per, place.slices, strict=True)))
            )
            data = _digest(loaded)
            if not shelf.holds(place, data):
                shelf.put(place, data, _fit_block(plan, place, loaded))
            bar.update(prod(s.stop - s.start for s in place.slices))
    return _draws(plan, shelf.arrays())


def _load(bound: Bound, place: Place) -> Arrays:
    """The arrays of a block, in memory, in JAX's dtypes."""
    cut = dict(zip(bound.binding.per, place.slices, strict=True))
    numbered = {
        f"array {i}": a.isel({d: s for d, s in cut.items() if d in a.dims}).variable
        for i, a in enumerate(bound.inputs.arrays.values())
    }
    # One Dataset, so that dask reads what variables share only once.
    loaded = xr.Dataset(numbered).compute()
    names = {s.key: s.name for a in bound.binding.arguments for s in a.sources}
    return {
        key: to_device_dtype(names[key], loaded[number].values)
        for key, number in zip(bound.inputs.arrays, numbered, strict=True)
    }


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _fit_block(plan: Plan, place: Place, loaded: Arrays) -> Arrays:
    """The draws of a block, NaN where a cell has no data; cells' axes after the leading ones."""
    binding, dims = plan.bound.binding, plan.bound.inputs.dims
    sizes = tuple(s.stop - s.start for s in place.slices)
    own = {
        k: _by_cell(a, dims[k], binding.per, sizes)
        for k, a in loaded.items()
        if _varies(dims[k], binding.per)
    }
    shared = {k: a for k, a in loaded.items() if k not in own}
    cells = np.flatnonzero(_has_data(own, shared, dims, binding, prod(sizes)))
    words = _words(plan, place)[cells]
    seed = keys.seed_key(plan.seed)
    parts = plan.tiles.run(seed, words, {k: a[cells] for k, a in own.items()}, shared)
    found = _blank(plan.tiles.outputs, prod(sizes))
    start = 0
    for part in parts:
        flat = _flat(part)
        at = cells[start : start + len(flat["status"])]
        for name, values in flat.items():
            found[name][at] = values
        start += len(at)
    return {name: _unfolded(a, _lead(name), sizes) for name, a in found.items()}


def _varies(dims: tuple[str, ...], per: tuple[str, ...]) -> bool:
    return bool(set(dims) & set(per))


def _by_cell(
    array: np.ndarray, dims: tuple[str, ...], per: tuple[str, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """The array of each cell, the cells' axis first."""
    has = [d in dims for d in per]
    rest = array.shape[sum(has) :]
    lengths = tuple(n if there else 1 for n, there in zip(sizes, has, strict=True))
    whole = np.broadcast_to(array.reshape(*lengths, *rest), (*sizes, *rest))
    return whole.reshape(prod(sizes), *rest)


def _has_data(
    own: Mapping[str, np.ndarray],
    shared: Mapping[str, np.ndarray],
    dims: Mapping[str, tuple[str, ...]],
    binding: Binding,
    count: int,
) -> np.ndarray:
    """Which cells have an observation: a value of an outcome where all inputs are there."""
    outcomes = {s.key for a in binding.outcomes for s in a.sources}
    some: Any = xr.Variable((), not outcomes)
    every: Any = xr.Variable("cell", np.ones(count, bool))
    for key, array in {**own, **shared}.items():
        names = [
            *(["cell"] if key in own else []),
            *(d for d in dims[key] if d not in binding.per),
        ]
        there = xr.Variable(
            names, ~np.isnan(array) if array.dtype.kind == "f" else np.ones(array.shape, bool)
        )
        whole = there.all([d for d in names if d not in ("cell", *binding.dims)])
        some, every = (some | whole, every) if key in outcomes else (some, every & whole)
    found = every & some
    return found.any([d for d in found.dims if d != "cell"]).values


def _words(plan: Plan, place: Place) -> np.ndarray:
    """The words of the cells of a block: of each, the sum of its labels'."""
    inputs = plan.bound.inputs
    each = [
        label_words(d, inputs.labels.get(d), size=inputs.sizes[d])[s]
        for d, s in zip(plan.bound.binding.per, place.slices, strict=True)
    ]
    return np.asarray(keys.combine(each)).reshape(-1, 2)


def _blank(outputs: Cells, count: int) -> Arrays:
    """What cells without data have: NaN, or nought where there is no NaN."""
    found = {}
    for name, struct in _flat(outputs).items():
        empty = np.nan if np.dtype(struct.dtype).kind == "f" else 0
        found[name] = np.full((count, *struct.shape[1:]), empty, struct.dtype)
    found["status"][:] = NO_DATA
    return found


def _unfolded(array: np.ndarray, lead: int, sizes: tuple[int, ...]) -> np.ndarray:
    moved = np.moveaxis(array, 0, lead)
    return moved.reshape(*moved.shape[:lead], *sizes, *moved.shape[lead + 1 :])


def _flat(cell: Cells) -> dict[str, Any]:
    """The arrays of cells by a name of their own."""
    found = {f"posterior {n}": a for n, a in cell.samples.items()}
    found |= {f"sample_stats {n}": a for n, a in cell.stats.items()}
    found |= {} if cell.losses is None else {"losses": cell.losses}
    return {**found, "status": cell.status}


def _lead(name: str) -> int:
    return {"losses": 1, "status": 0}.get(name, 2)


def _draws(plan: Plan, arrays: Mapping[str, Any]) -> Draws:
    def group(title: str) -> dict[str, Any]:
        found = {n: a for n, a in arrays.items() if n.startswith(f"{title} ")}
        return {n.removeprefix(f"{title} "): a for n, a in found.items()}

    losses, steps = arrays.get("losses"), plan.method.loss_steps
    return Draws(
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
