"""Rules for operations that take or put entries by their positions: slices, gathers, scatters.

See :mod:`xr_aimz.axis_rules`. A tagged axis is taken whole, or paired, cell by cell, with an
axis of the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xr_aimz.axis_rules import (
    AxisTag,
    NotProvenError,
    Pair,
    Rule,
    Tags,
    check_untagged,
    joined,
    tag_name,
)

__all__ = ["INDEX_RULES"]


def _whole_axis(tag: AxisTag) -> NotProvenError:
    return NotProvenError(f"takes cells along {tag_name(tag)} by their position")


def _slice(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    rank = len(operands[0])
    for axis, tag in enumerate(operands[0]):
        bounds = [
            (
                equation.params["start_indices"][axis],
                equation.params["limit_indices"][axis],
                (equation.params["strides"] or (1,) * rank)[axis],
            )
            for equation in pair
        ]
        whole = [(0, shape[axis], 1) for shape in pair.shapes("invars")]
        if tag is not None and bounds != whole:
            raise _whole_axis(tag)
        if tag is None and bounds[0] != bounds[1]:
            raise NotProvenError("takes other entries for another number of cells")
    return [operands[0]]


def _dynamic_slice(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    taken = list(zip(*pair.param("slice_sizes"), strict=True))
    lengths = list(zip(*pair.shapes("invars"), strict=True))
    for tag, sizes, whole in zip(operands[0], taken, lengths, strict=True):
        # Of a slice as long as its axis the start is clamped to 0.
        if tag is not None and sizes != whole:
            raise _whole_axis(tag)
        if tag is None and sizes[0] != sizes[1]:
            raise NotProvenError("takes other entries for another number of cells")
    return [operands[0]]


def _dynamic_update_slice(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    target, update = operands[:2]
    shapes = zip(*pair.shapes("invars", 0), *pair.shapes("invars", 1), strict=True)
    tags: list[AxisTag] = []
    for a, b, (n, m, k, j) in zip(target, update, shapes, strict=True):
        if (a is not None or b is not None) and (n, m) != (k, j):
            raise _whole_axis(a if a is not None else b)
        tags.append(joined(a, b))
    return [tuple(tags)]


def _gather(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension_numbers", "mode", "fill_value")
    numbers = pair.whole.params["dimension_numbers"]
    source, positions = operands
    sizes = list(zip(*pair.param("slice_sizes"), strict=True))
    lengths = list(zip(*pair.shapes("invars"), strict=True))
    cells = list(positions[:-1])
    check_untagged(positions, (-1,))
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for axis, place in pairs:
        cells[place] = joined(source[axis], cells[place])
    for axis, tag in enumerate(source):
        if axis in numbers.operand_batching_dims:
            continue
        if tag is not None and (sizes[axis] != lengths[axis] or axis in numbers.start_index_map):
            raise _whole_axis(tag)
        if tag is None and sizes[axis][0] != sizes[axis][1]:
            raise NotProvenError("takes other entries for another number of cells")
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [tag for axis, tag in enumerate(source) if axis not in gone]
    return [
        tuple(
            (window if axis in numbers.offset_dims else cells).pop(0)
            for axis in range(pair.rank())
        )
    ]


def _scatter(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension_numbers", "mode")
    numbers = pair.whole.params["dimension_numbers"]
    target, positions, updates = operands
    check_untagged(positions, (-1,))
    places = [axis for axis in range(len(updates)) if axis not in numbers.update_window_dims]
    # Of each axis of positions, its place among the axes of the updates.
    tags = list(target)
    paired = dict(
        zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    for index, place in enumerate(places):
        if index in paired:
            axis = paired[index]
            tags[axis] = joined(joined(tags[axis], positions[index]), updates[place])
        else:
            check_untagged(positions, (index,), "puts together")
            check_untagged(updates, (place,), "puts together")
    for axis, place in _windows(numbers, len(target)):
        lengths = [pair.shapes("invars", 0), pair.shapes("invars", 2)]
        whole = all(a[axis] == b[place] for a, b in zip(*lengths, strict=True))
        tag = joined(tags[axis], updates[place])
        if tag is not None and (not whole or axis in numbers.scatter_dims_to_operand_dims):
            raise _whole_axis(tag)
        tags[axis] = tag
    check_untagged(target, numbers.inserted_window_dims, "puts values at positions among")
    return [tuple(tags)]


def _windows(numbers: Any, rank: int) -> list[tuple[int, int]]:
    """Of each axis of the target that a window covers, its axis among those of the updates."""
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    covered = [axis for axis in range(rank) if axis not in gone]
    return list(zip(covered, numbers.update_window_dims, strict=True))


def _pad(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("padding_config")
    for tag, padding in zip(operands[0], pair.whole.params["padding_config"], strict=True):
        if tag is not None and tuple(padding) != (0, 0, 0):
            raise NotProvenError(f"puts values before or after the cells along {tag_name(tag)}")
    return [operands[0]]


def _high_level(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    """Of a function that jax from 0.12 on keeps as one operation: a search in a sorted array."""
    whole, block = (equation.params["_prim"] for equation in pair)
    if type(whole).__name__ != "SearchSorted" or vars(whole)["params"] != vars(block)["params"]:
        raise NotProvenError("is not known to keep cells apart")
    table, values = operands
    if whole.batch_dims:
        raise NotProvenError("searches in an array for each cell")
    check_untagged(table, range(len(table)), "searches among")
    return [values]


INDEX_RULES: dict[str, Rule] = {
    "call_hi_primitive": _high_level,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "pad": _pad,
    "slice": _slice,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul"), _scatter),
    **dict.fromkeys(("scatter-min", "scatter-max", "scatter-sub"), _scatter),
}
