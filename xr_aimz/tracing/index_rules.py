"""Rules for operations that read or write entries by position: slices, gathers, scatters.

See :mod:`xr_aimz.tracing.axis_rules`. A tagged axis must be read in full, or be paired,
cell by cell, with an axis of the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xr_aimz.tracing.axis_rules import (
    AxisTag,
    NotProvenError,
    Pair,
    Rule,
    Tags,
    check_untagged,
    join_tags,
    tag_name,
)


def _position_error(tag: AxisTag) -> NotProvenError:
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
        full = [(0, shape[axis], 1) for shape in pair.shapes("invars")]
        if tag is not None and bounds != full:
            raise _position_error(tag)
        if tag is None and bounds[0] != bounds[1]:
            raise NotProvenError("takes other entries for another number of cells")
    return [operands[0]]


def _dynamic_slice(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    slice_sizes = list(zip(*pair.param("slice_sizes"), strict=True))
    lengths = list(zip(*pair.shapes("invars"), strict=True))
    for tag, sizes, axis_lengths in zip(operands[0], slice_sizes, lengths, strict=True):
        # A slice as long as its axis always starts at 0, because its start is clamped.
        if tag is not None and sizes != axis_lengths:
            raise _position_error(tag)
        if tag is None and sizes[0] != sizes[1]:
            raise NotProvenError("takes other entries for another number of cells")
    return [operands[0]]


def _dynamic_update_slice(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    target, update = operands[:2]
    shapes = zip(*pair.shapes("invars", 0), *pair.shapes("invars", 1), strict=True)
    tags: list[AxisTag] = []
    for a, b, (n, m, k, j) in zip(target, update, shapes, strict=True):
        if (a is not None or b is not None) and (n, m) != (k, j):
            raise _position_error(a if a is not None else b)
        tags.append(join_tags(a, b))
    return [tuple(tags)]


def _gather(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension_numbers", "mode", "fill_value")
    numbers = pair.full.params["dimension_numbers"]
    source, positions = operands
    sizes = list(zip(*pair.param("slice_sizes"), strict=True))
    lengths = list(zip(*pair.shapes("invars"), strict=True))
    cells = list(positions[:-1])
    check_untagged(positions, (-1,))
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for axis, cell_axis in pairs:
        cells[cell_axis] = join_tags(source[axis], cells[cell_axis])
    for axis, tag in enumerate(source):
        if axis in numbers.operand_batching_dims:
            continue
        if tag is not None and (sizes[axis] != lengths[axis] or axis in numbers.start_index_map):
            raise _position_error(tag)
        if tag is None and sizes[axis][0] != sizes[axis][1]:
            raise NotProvenError("takes other entries for another number of cells")
    removed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [tag for axis, tag in enumerate(source) if axis not in removed]
    return [
        tuple(
            (window if axis in numbers.offset_dims else cells).pop(0)
            for axis in range(pair.rank())
        )
    ]


def _scatter(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("dimension_numbers", "mode")
    numbers = pair.full.params["dimension_numbers"]
    target, positions, updates = operands
    check_untagged(positions, (-1,))
    update_axes = [axis for axis in range(len(updates)) if axis not in numbers.update_window_dims]
    # The axes of the updates that correspond to the axes of the positions, in order.
    tags = list(target)
    paired = dict(
        zip(numbers.scatter_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    for index, update_axis in enumerate(update_axes):
        if index in paired:
            axis = paired[index]
            tags[axis] = join_tags(join_tags(tags[axis], positions[index]), updates[update_axis])
        else:
            check_untagged(positions, (index,), "puts together")
            check_untagged(updates, (update_axis,), "puts together")
    for axis, update_axis in _window_axes(numbers, len(target)):
        lengths = [pair.shapes("invars", 0), pair.shapes("invars", 2)]
        is_full = all(a[axis] == b[update_axis] for a, b in zip(*lengths, strict=True))
        tag = join_tags(tags[axis], updates[update_axis])
        if tag is not None and (not is_full or axis in numbers.scatter_dims_to_operand_dims):
            raise _position_error(tag)
        tags[axis] = tag
    check_untagged(target, numbers.inserted_window_dims, "puts values at positions among")
    return [tuple(tags)]


def _window_axes(numbers: Any, rank: int) -> list[tuple[int, int]]:
    """List the axes of the target that a window covers, each with its axis of the updates."""
    removed = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    covered = [axis for axis in range(rank) if axis not in removed]
    return list(zip(covered, numbers.update_window_dims, strict=True))


def _pad(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    pair.same("padding_config")
    for tag, padding in zip(operands[0], pair.full.params["padding_config"], strict=True):
        if tag is not None and tuple(padding) != (0, 0, 0):
            raise NotProvenError(f"puts values before or after the cells along {tag_name(tag)}")
    return [operands[0]]


def _search_sorted(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    """Tags of a search in a sorted array, which jax from 0.12 on keeps as one operation."""
    full, block = (equation.params["_prim"] for equation in pair)
    if type(full).__name__ != "SearchSorted" or vars(full)["params"] != vars(block)["params"]:
        raise NotProvenError("is not known to keep cells independent")
    table, values = operands
    if full.batch_dims:
        raise NotProvenError("searches in an array for each cell")
    check_untagged(table, range(len(table)), "searches among")
    return [values]


INDEX_RULES: dict[str, Rule] = {
    "call_hi_primitive": _search_sorted,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "pad": _pad,
    "slice": _slice,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul"), _scatter),
    **dict.fromkeys(("scatter-min", "scatter-max", "scatter-sub"), _scatter),
}
