"""What an operation does with the axes that differ between two traces of one program.

A rule takes an operation as both traces have it, and of each operand's axes what is known of
them; it says the same of the result's, or refuses. Where it refuses, the operation may look
along such an axis, or is not known well enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

__all__ = [
    "CONSTANT",
    "RULES",
    "Rule",
    "Tag",
    "Tags",
    "UnprovenError",
]

# Of each axis: None where it is as long in both traces; else the dim that it belongs to, or
# CONSTANT where the values along it are all the same, or a Run where it was several axes.
CONSTANT = "\0constant"


class Run(NamedTuple):
    """Axes that were flattened to one: of each its tag, and its length in both traces."""

    axes: tuple[tuple[Any, int, int], ...]


Tag = str | Run | None
Tags = tuple[Tag, ...]
Rule = Callable[[Any, Any, Sequence[Tags]], Sequence[Tags | None]]


class UnprovenError(Exception):
    """An operation that may look at other cells, or is not known."""


def _broadcasted(here: Any, there: Any, operands: Sequence[Tags]) -> Tags:
    """Of an operation on arrays of one shape, those of length 1 and scalars among them."""
    shape = here.outvars[0].aval.shape
    found = [_new_axis(here, there, axis) for axis in range(len(shape))]
    for var, tags in zip(here.invars, operands, strict=True):
        if tags and len(tags) != len(found):
            raise UnprovenError
        for axis, (n, tag) in enumerate(zip(var.aval.shape, tags, strict=True)):
            stretched = tag is None and n == 1 and shape[axis] != 1
            found[axis] = found[axis] if stretched else _joined(found[axis], tag)
    return tuple(found)


def _joined(a: Tag, b: Tag) -> Tag:
    """The tag of an axis that two operands share."""
    if b in (a, CONSTANT):
        return a
    if a == CONSTANT:
        return b
    if isinstance(a, Run) and isinstance(b, Run) and _lengths(a) == _lengths(b):
        pairs = zip(a.axes, b.axes, strict=True)
        return Run(tuple((_joined(x, y), n, m) for (x, n, m), (y, _, _) in pairs))
    raise UnprovenError


def _lengths(run: Run) -> list[tuple[int, int]]:
    return [(n, m) for _, n, m in run.axes]


def _same(here: Any, there: Any, *names: str) -> None:
    """Refuse an operation whose settings of those names differ between the traces."""
    if any(here.params[name] != there.params[name] for name in names):
        raise UnprovenError


def _ordinary(tags: Tags, axes: Iterable[int]) -> None:
    """Refuse an operation along axes that differ."""
    if any(tags[axis] is not None for axis in axes):
        raise UnprovenError


def _new_axis(here: Any, there: Any, axis: int) -> Tag:
    n, m = here.outvars[0].aval.shape[axis], there.outvars[0].aval.shape[axis]
    return None if n == m else CONSTANT


def _elementwise(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, *here.params)
    return [_broadcasted(here, there, operands)] * len(here.outvars)


def _each(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    return operands


def _broadcast(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "broadcast_dimensions")
    rank = len(here.outvars[0].aval.shape)
    found = [_new_axis(here, there, axis) for axis in range(rank)]
    places = here.params["broadcast_dimensions"]
    for tag, axis in zip(operands[0], places, strict=True):
        found[axis] = found[axis] if tag is None else tag
    return [tuple(found)]


def _reshape(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    """Axes that differ stay, are flattened to a run, or come out of one as they went in."""
    groups = _groups(here)
    if here.params["dimensions"] is not None or groups != _groups(there):
        raise UnprovenError
    found: list[Tag] = [None] * len(here.outvars[0].aval.shape)
    for before, after in groups:
        old = [_spread(operands[0][a], *_both(here, there, "invars", a)) for a in before]
        whole = [axis for run in old for axis in run]
        lengths = [_both(here, there, "outvars", axis) for axis in after]
        if all(tag is None for tag, _, _ in whole):
            continue
        if all(tag == CONSTANT for tag, _, _ in whole):
            new = [_new_axis(here, there, axis) for axis in after]
        elif [(n, m) for _, n, m in whole] == lengths:
            new = [tag for tag, _, _ in whole]
        elif len(after) == 1:
            new = [Run(tuple(whole))]
        else:
            raise UnprovenError
        for axis, tag in zip(after, new, strict=True):
            found[axis] = tag
    return [tuple(found)]


def _both(here: Any, there: Any, side: str, axis: int) -> tuple[int, int]:
    n, m = (getattr(e, side)[0].aval.shape[axis] for e in (here, there))
    return n, m


def _spread(tag: Tag, n: int, m: int) -> tuple[tuple[Any, int, int], ...]:
    return tag.axes if isinstance(tag, Run) else ((tag, n, m),)


def _groups(equation: Any) -> list[tuple[list[int], list[int]]]:
    """The least runs of axes, before and after, that have as many entries; without ones."""
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if 0 in old:
        raise UnprovenError
    left, right = ([axis for axis, n in enumerate(shape) if n != 1] for shape in (old, new))
    groups = []
    while left:
        before, after = [left.pop(0)], [right.pop(0)]
        while (m := prod(old[a] for a in before)) != (n := prod(new[a] for a in after)):
            if m < n:
                before.append(left.pop(0))
            else:
                after.append(right.pop(0))
        groups.append((before, after))
    return groups


def _squeeze(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "dimensions")
    gone = here.params["dimensions"]
    _ordinary(operands[0], gone)
    return [tuple(tag for axis, tag in enumerate(operands[0]) if axis not in gone)]


def _transpose(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "permutation")
    return [tuple(operands[0][axis] for axis in here.params["permutation"])]


def _reduce(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, *here.params)
    _ordinary(operands[0], here.params["axes"])
    return [tuple(tag for axis, tag in enumerate(operands[0]) if axis not in here.params["axes"])]


def _along(name: str) -> Rule:
    """Of an operation that looks along one axis and keeps it."""

    def rule(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
        _same(here, there, *(key for key in here.params if key != "sizes"))
        joined = _broadcasted(here, there, operands)
        _ordinary(joined, (here.params[name],))
        return [joined] * len(here.outvars)

    return rule


def _iota(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "dimension", "dtype")
    found = tuple(_new_axis(here, there, a) for a in range(len(here.params["shape"])))
    _ordinary(found, (here.params["dimension"],))
    return [found]


def _stack(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "axis")
    axis = here.params["axis"]
    found = operands[0]
    for tags in operands[1:]:
        found = tuple(_joined(a, b) for a, b in zip(found, tags, strict=True))
    return [(*found[:axis], None, *found[axis:])]


def _dot(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "dimension_numbers", "precision", "preferred_element_type")
    (left, right), (left_batch, right_batch) = here.params["dimension_numbers"]
    _ordinary(operands[0], left)
    _ordinary(operands[1], right)
    batch = [
        _joined(operands[0][a], operands[1][b])
        for a, b in zip(left_batch, right_batch, strict=True)
    ]
    rest = [
        tag
        for tags, used in zip(
            operands, ((*left, *left_batch), (*right, *right_batch)), strict=True
        )
        for axis, tag in enumerate(tags)
        if axis not in used
    ]
    return [(*batch, *rest)]


def _matrices(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    """Of an operation on matrices in the last two axes."""
    _same(here, there, *here.params)
    _ordinary(operands[0], (-2, -1))
    return operands


def _triangular(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    """Systems of equations, one for each column, or row, of the right-hand side."""
    _same(here, there, *here.params)
    matrix, sides = operands
    _ordinary(matrix, (-2, -1))
    _ordinary(sides, (-2 if here.params["left_side"] else -1,))
    batch = zip(matrix[:-2], sides[:-2], strict=True)
    return [(*(_joined(a, b) for a, b in batch), *sides[-2:])]


def _slice(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    strides = [e.params["strides"] or (1,) * len(operands[0]) for e in (here, there)]
    for axis, tag in enumerate(operands[0]):
        ends = []
        for equation, stride in zip((here, there), strides, strict=True):
            start, stop = (equation.params[k][axis] for k in ("start_indices", "limit_indices"))
            # An axis that differs is taken whole.
            whole = (0, equation.invars[0].aval.shape[axis], 1)
            if tag is not None and (start, stop, stride[axis]) != whole:
                raise UnprovenError
            ends.append((start, stop, stride[axis]))
        if tag is None and ends[0] != ends[1]:
            raise UnprovenError
    return [operands[0]]


def _gather(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    """Entries by their numbers: along axes that do not differ, the others are taken whole."""
    _same(here, there, "dimension_numbers", "mode", "fill_value")
    numbers = here.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        raise UnprovenError
    for axis, tag in enumerate(operands[0]):
        taken = [e.params["slice_sizes"][axis] for e in (here, there)]
        whole = list(_both(here, there, "invars", axis))
        if tag is None and taken[0] != taken[1]:
            raise UnprovenError
        if tag is not None and (taken != whole or axis in numbers.start_index_map):
            raise UnprovenError
    _ordinary(operands[1], (-1,))
    gone = numbers.collapsed_slice_dims
    kept = [tag for axis, tag in enumerate(operands[0]) if axis not in gone]
    cells, rank = list(operands[1][:-1]), len(here.outvars[0].aval.shape)
    return [tuple((kept if a in numbers.offset_dims else cells).pop(0) for a in range(rank))]


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
nextafter not or polygamma population_count pow real reduce_precision regularized_incomplete_beta
rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
square stop_gradient sub tan tanh xor zeta
""".split()  # noqa: SIM905 -- one word a line is three screens
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduce),
    **dict.fromkeys(("reduce_and", "reduce_or", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    "cholesky": _matrices,
    "triangular_solve": _triangular,
    "broadcast_in_dim": _broadcast,
    "concatenate": _along("dimension"),
    "dot_general": _dot,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _each,
    "reshape": _reshape,
    "slice": _slice,
    "sort": _along("dimension"),
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
