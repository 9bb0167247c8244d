"""Whether two traces of a program, for blocks of two sizes, prove that it works cell by cell.

What a program computes is written down twice: for a block, and for a part of it. If both read
alike, operation by operation, number by number, and no operation looks along an axis whose
length differs between them, then no cell's result can depend on another cell, nor on how many
there are. An axis that differs belongs to the dimension of the input that it came from, or its
values are all the same. Whatever is not known here to be safe is not proven, which says nothing
against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["CONSTANT", "Tags", "proven"]

# Of each axis: None where it is as long in both traces; else the dim that it belongs to, or
# CONSTANT where the values along it are all the same.
CONSTANT = "\0constant"
Tags = tuple[str | None, ...]
Rule = Callable[[Any, Any, Sequence[Tags]], Sequence[Tags | None]]


class _UnprovenError(Exception):
    """An operation that may look at other cells, or is not known."""


def proven(
    whole: ClosedJaxpr, part: ClosedJaxpr, given: Sequence[Tags], wanted: Sequence[Tags]
) -> bool:
    """
    Prove that a program's results are made cell by cell.

    Parameters
    ----------
    whole, part : ClosedJaxpr
        The program for a block, and for a part of it that is shorter along each split dim.
    given : sequence of Tags
        Of each argument: the split dim of each axis, None for any other axis.
    wanted : sequence of Tags
        The same of each result.

    Returns
    -------
    bool
        False where it is not proven.
    """
    try:
        found = _closed(whole, part, [tuple(tags) for tags in given])
        return all(_meets(own, asked) for own, asked in zip(found, wanted, strict=True))
    except (_UnprovenError, TypeError, ValueError):
        return False


def _meets(own: Tags | None, asked: Tags) -> bool:
    if own is None or len(own) != len(asked):
        return False
    return all(
        a == b or (a == CONSTANT and b is not None) for a, b in zip(own, asked, strict=True)
    )


def _closed(whole: ClosedJaxpr, part: ClosedJaxpr, given: Sequence[Tags | None]) -> list:
    if len(whole.consts) != len(part.consts):
        raise _UnprovenError
    consts = [_constant(a, b) for a, b in zip(whole.consts, part.consts, strict=True)]
    return _walk(whole.jaxpr, part.jaxpr, [*consts, *given])


def _constant(whole: Any, part: Any) -> Tags | None:
    """An array that the program holds is the same for any block, or proves nothing."""
    whole, part = np.asarray(whole), np.asarray(part)
    same = whole.shape == part.shape and whole.dtype == part.dtype
    return (None,) * whole.ndim if same and whole.tobytes() == part.tobytes() else None


def _walk(whole: Jaxpr, part: Jaxpr, given: Sequence[Tags | None]) -> list[Tags | None]:
    """The tags of each result; None for one that is not proven."""
    if len(whole.eqns) != len(part.eqns):
        raise _UnprovenError
    known: dict[Any, tuple[Any, Tags | None]] = {}
    inputs = [*whole.constvars, *whole.invars], [*part.constvars, *part.invars]
    for a, b, tags in zip(*inputs, given, strict=True):
        known[a] = (b, _checked(a, b, tags))
    for here, there in zip(whole.eqns, part.eqns, strict=True):
        if here.primitive is not there.primitive or len(here.invars) != len(there.invars):
            raise _UnprovenError
        found = _applied(here, there, known)
        for a, b, tags in zip(here.outvars, there.outvars, found, strict=True):
            known[a] = (b, _checked(a, b, tags))
    return [_of(a, b, known) for a, b in zip(whole.outvars, part.outvars, strict=True)]


def _applied(here: Any, there: Any, known: Any) -> Sequence[Tags | None]:
    operands = [_of(a, b, known) for a, b in zip(here.invars, there.invars, strict=True)]
    rule = _RULES.get(here.primitive.name)
    # What is not proven may not matter: a result that nobody reads.
    unproven: Sequence[Tags | None] = [None] * len(here.outvars)
    if rule is None or any(tags is None for tags in operands):
        return unproven
    try:
        return rule(here, there, [tags for tags in operands if tags is not None])
    except (_UnprovenError, KeyError, TypeError, ValueError):
        # The others: an operation that this JAX writes down otherwise than the rules know.
        return unproven


def _of(a: Any, b: Any, known: Any) -> Tags | None:
    if isinstance(a, Literal) or isinstance(b, Literal):
        both = isinstance(a, Literal) and isinstance(b, Literal)
        return _constant(a.val, b.val) if both and a.aval.dtype == b.aval.dtype else None
    other, tags = known[a]
    return tags if other is b else None


def _checked(a: Any, b: Any, tags: Tags | None) -> Tags | None:
    """Tags that say of exactly those axes that they differ which do."""
    if tags is None or a.aval.dtype != b.aval.dtype or len(tags) != len(a.aval.shape):
        return None
    lengths = zip(a.aval.shape, b.aval.shape, tags, strict=True)
    return tags if all((n == m) == (tag is None) for n, m, tag in lengths) else None


def _joined(here: Any, there: Any, operands: Sequence[Tags]) -> Tags:
    """Of an operation on arrays of one shape, those of length 1 and scalars among them."""
    shape = here.outvars[0].aval.shape
    found = [_new_axis(here, there, axis) for axis in range(len(shape))]
    for var, tags in zip(here.invars, operands, strict=True):
        if tags and len(tags) != len(found):
            raise _UnprovenError
        for axis, (n, tag) in enumerate(zip(var.aval.shape, tags, strict=True)):
            stretched = tag is None and n == 1 and shape[axis] != 1
            found[axis] = found[axis] if stretched else _one(found[axis], tag)
    return tuple(found)


def _one(a: str | None, b: str | None) -> str | None:
    if b in (a, CONSTANT):
        return a
    if a == CONSTANT:
        return b
    raise _UnprovenError


def _same(here: Any, there: Any, *names: str) -> None:
    if any(here.params[name] != there.params[name] for name in names):
        raise _UnprovenError


def _ordinary(tags: Tags, axes: Iterable[int]) -> None:
    if any(tags[axis] is not None for axis in axes):
        raise _UnprovenError


def _new_axis(here: Any, there: Any, axis: int) -> str | None:
    n, m = here.outvars[0].aval.shape[axis], there.outvars[0].aval.shape[axis]
    return None if n == m else CONSTANT


def _elementwise(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, *here.params)
    return [_joined(here, there, operands)] * len(here.outvars)


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
    """Axes that differ stay as they are; the others may be joined and split among them."""
    groups = _groups(here)
    if here.params["dimensions"] is not None or groups != _groups(there):
        raise _UnprovenError
    found: list[str | None] = [None] * len(here.outvars[0].aval.shape)
    for before, after in groups:
        if any(operands[0][axis] is not None for axis in before):
            (axis,), (place,) = before, after
            found[place] = operands[0][axis]
    return [tuple(found)]


def _groups(equation: Any) -> list[tuple[list[int], list[int]]]:
    """The least runs of axes, before and after, that have as many entries; without ones."""
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if 0 in old:
        raise _UnprovenError
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
        joined = _joined(here, there, operands)
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
        found = tuple(_one(a, b) for a, b in zip(found, tags, strict=True))
    return [(*found[:axis], None, *found[axis:])]


def _dot(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "dimension_numbers", "precision", "preferred_element_type")
    (left, right), (left_batch, right_batch) = here.params["dimension_numbers"]
    _ordinary(operands[0], left)
    _ordinary(operands[1], right)
    batch = [
        _one(operands[0][a], operands[1][b]) for a, b in zip(left_batch, right_batch, strict=True)
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
    return [(*(_one(a, b) for a, b in batch), *sides[-2:])]


def _slice(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    strides = [e.params["strides"] or (1,) * len(operands[0]) for e in (here, there)]
    for axis, tag in enumerate(operands[0]):
        ends = []
        for equation, stride in zip((here, there), strides, strict=True):
            start, stop = (equation.params[k][axis] for k in ("start_indices", "limit_indices"))
            # An axis that differs is taken whole.
            whole = (0, equation.invars[0].aval.shape[axis], 1)
            if tag is not None and (start, stop, stride[axis]) != whole:
                raise _UnprovenError
            ends.append((start, stop, stride[axis]))
        if tag is None and ends[0] != ends[1]:
            raise _UnprovenError
    return [operands[0]]


def _gather(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    """Entries of an array without split dims, by numbers that may have them."""
    _same(here, there, *here.params)
    numbers = here.params["dimension_numbers"]
    if any(operands[0]) or numbers.operand_batching_dims:
        raise _UnprovenError
    _ordinary(operands[1], (-1,))
    cells, rank = list(operands[1][:-1]), len(here.outvars[0].aval.shape)
    return [tuple(None if a in numbers.offset_dims else cells.pop(0) for a in range(rank))]


def _inner(name: str) -> Rule:
    """Of an operation that calls a program."""

    def rule(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
        a, b = here.params[name], there.params[name]
        if isinstance(a, ClosedJaxpr):
            return _closed(a, b, operands)
        return _walk(a, b, operands)

    return rule


def _scan(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
    _same(here, there, "length", "reverse", "num_consts", "num_carry")
    fixed, carried = here.params["num_consts"], here.params["num_carry"]
    rows = operands[fixed + carried :]
    for tags in rows:
        _ordinary(tags, (0,))
    carry = list(operands[fixed : fixed + carried])
    programs = here.params["jaxpr"], there.params["jaxpr"]
    # What is carried may gain a dim in one step; after as many steps as there are it cannot.
    for _ in range(len(carry) + 2):
        found = _closed(*programs, [*operands[:fixed], *carry, *(tags[1:] for tags in rows)])
        after = [_joined_carry(a, b) for a, b in zip(carry, found[:carried], strict=True)]
        if after == carry:
            return [*carry, *(None if t is None else (None, *t) for t in found[carried:])]
        carry = after
    raise _UnprovenError


def _joined_carry(before: Tags, after: Tags | None) -> Tags:
    if after is None or len(before) != len(after):
        raise _UnprovenError
    return tuple(_one(a, b) for a, b in zip(before, after, strict=True))


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
clz convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt
igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg
nextafter not or polygamma population_count pow real reduce_precision regularized_incomplete_beta
rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
square stop_gradient sub tan tanh xor zeta
""".split()  # noqa: SIM905 -- one word a line is three screens
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"), _reduce),
    **dict.fromkeys(("reduce_and", "reduce_or", "argmax", "argmin"), _reduce),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
    **dict.fromkeys(("jit", "pjit"), _inner("jaxpr")),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _inner("call_jaxpr")),
    "cholesky": _matrices,
    "triangular_solve": _triangular,
    "broadcast_in_dim": _broadcast,
    "concatenate": _along("dimension"),
    "dot_general": _dot,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _each,
    "reshape": _reshape,
    "scan": _scan,
    "slice": _slice,
    "sort": _along("dimension"),
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
}
