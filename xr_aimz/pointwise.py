"""Whether a traced program works cell by cell along an axis, as far as its text shows.

The axis is followed through every operation of the trace. An operation that keeps each
position to itself passes it on; one that does not, or that is not known here, ends the
proof. What does not come from the cells must be uniform along the axis, or it would count
positions. So True is a proof, and False says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["follows", "literals"]

# Of equal shapes, element by element.
# fmt: off
_EACH = frozenset(
    {
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
        "atanh", "cbrt", "ceil", "clamp", "clz", "convert_element_type", "copy", "copy_p",
        "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
        "expm1", "floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow",
        "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min",
        "mul", "ne", "neg", "nextafter", "not", "or", "pow", "real",
        "regularized_incomplete_beta_p", "rem", "round", "rsqrt", "select_n",
        "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin",
        "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
    }
)
# fmt: on
# fmt: off
_REDUCE = frozenset(
    {
        "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and",
        "reduce_or", "argmax", "argmin",
    }
)
# fmt: on
_ALONG = frozenset(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"])
_INSIDE = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class _UnproofError(Exception):
    """The text does not show it."""


@dataclass(frozen=True)
class _Trail:
    """Where the cells' axis is in an array, or None; and along which axes it is uniform."""

    axis: int | None
    uniform: frozenset[int] = frozenset()


def follows(jaxpr: ClosedJaxpr, into: Sequence[int | None], out: Sequence[int | None]) -> bool:
    """Whether each output is made, position by position of an axis, from the same of the inputs.

    Parameters
    ----------
    jaxpr : ClosedJaxpr
    into, out : sequence of int or None
        Where the axis is in each input and output. An output without it must not depend on
        inputs that have it.
    """
    inputs = [_Trail(axis, _ones(v)) for axis, v in zip(into, jaxpr.jaxpr.invars, strict=True)]
    try:
        found = _run(jaxpr.jaxpr, [_constant(c) for c in jaxpr.consts], inputs)
    except _UnproofError:
        return False
    return all(trail.axis == axis for trail, axis in zip(found, out, strict=True))


def literals(jaxpr: ClosedJaxpr) -> list[Any]:
    """The numbers written in a trace, with the operations that take them: not its shapes."""
    return list(_written(jaxpr.jaxpr))


def _written(jaxpr: Jaxpr) -> Iterable[Any]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for var in eqn.invars:
            if isinstance(var, Literal):
                # As text, in which NaN is NaN.
                yield repr(np.asarray(var.val).tolist())
        for inner in _inner(eqn):
            yield from _written(inner.jaxpr)


def _inner(eqn: Any) -> list[ClosedJaxpr]:
    return [eqn.params[name] for name in _INSIDE if isinstance(eqn.params.get(name), ClosedJaxpr)]


def _ones(var: Any) -> frozenset[int]:
    return frozenset(i for i, n in enumerate(var.aval.shape) if n == 1)


def _constant(value: Any) -> _Trail:
    array = np.asarray(value)
    same = (i for i in range(array.ndim) if (array == array.take([0], axis=i)).all())
    return _Trail(None, frozenset(same) if array.size else frozenset())


def _run(jaxpr: Jaxpr, consts: list[_Trail], inputs: list[_Trail]) -> list[_Trail]:
    trails: dict[Any, _Trail] = dict(zip(jaxpr.constvars, consts, strict=True))
    trails |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(var: Any) -> _Trail:
        return _constant(var.val) if isinstance(var, Literal) else trails[var]

    for eqn in jaxpr.eqns:
        found = _step(eqn, [read(v) for v in eqn.invars])
        trails |= dict(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: Any, trails: list[_Trail]) -> list[_Trail]:
    name = eqn.primitive.name
    if inner := _inner(eqn):
        if name in ("scan", "while", "cond"):
            return _unless_cells(eqn, trails)
        return _run(inner[0].jaxpr, [_constant(c) for c in inner[0].consts], trails)
    if name in _EACH:
        return [_each(eqn, trails)]
    if name in ("concatenate", "stack"):
        return [_joined(eqn, trails)]
    if name == "iota":
        whole = frozenset(range(len(eqn.params["shape"])))
        return [_Trail(None, whole - {eqn.params["dimension"]})]
    if name in _MOVES:
        shape = eqn.invars[0].aval.shape
        new = eqn.outvars[0].aval.shape
        place = _MOVES[name](eqn.params, shape, new)
        return [_moved(trails[0], place) if len(trails) == 1 else _end()]
    if name == "dot_general":
        return [_dot(eqn, *trails)]
    return _unless_cells(eqn, trails)


def _end() -> Any:
    raise _UnproofError


def _unless_cells(eqn: Any, trails: list[_Trail]) -> list[_Trail]:
    """An operation that is not known may be anything, as long as it sees no cells."""
    if any(t.axis is not None for t in trails):
        raise _UnproofError
    return [_Trail(None, _ones(v)) for v in eqn.outvars]


def _each(eqn: Any, trails: list[_Trail]) -> _Trail:
    rank = len(eqn.outvars[0].aval.shape)
    # A scalar may stand beside arrays.
    return _alike(
        [t for t, v in zip(trails, eqn.invars, strict=True) if len(v.aval.shape) == rank]
    )


def _joined(eqn: Any, trails: list[_Trail]) -> _Trail:
    """Arrays put one behind the other, along an axis of theirs or along a new one."""
    found = _alike(trails)
    if "axis" in eqn.params:
        at = eqn.params["axis"]
        to = {i: i + (i >= at) for i in range(len(eqn.invars[0].aval.shape))}
    else:
        at = eqn.params["dimension"]
        to = {i: i for i in range(len(eqn.invars[0].aval.shape)) if i != at}
    return _moved(found, (to, frozenset()))


def _alike(trails: list[_Trail]) -> _Trail:
    """What arrays of one shape have in common, element by element."""
    axes = {t.axis for t in trails if t.axis is not None}
    uniform = frozenset.intersection(*(t.uniform for t in trails))
    if not axes:
        return _Trail(None, uniform)
    (axis, *others) = axes
    if others or any(t.axis is None and axis not in t.uniform for t in trails):
        raise _UnproofError
    return _Trail(axis, uniform)


def _moved(trail: _Trail, place: tuple[dict[int, int], frozenset[int]]) -> _Trail:
    """The trail in an array whose axes are elsewhere: ``place``, and axes new and uniform."""
    to, new = place
    if trail.axis is not None and trail.axis not in to:
        raise _UnproofError
    axis = None if trail.axis is None else to[trail.axis]
    return _Trail(axis, frozenset(to[i] for i in trail.uniform if i in to) | new)


def _broadcast(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    at = params["broadcast_dimensions"]
    to = {i: j for i, j in enumerate(at) if shape[i] == new[j]}
    grown = {j for i, j in enumerate(at) if shape[i] != new[j]}
    return to, frozenset(set(range(len(new))) - set(at) | grown)


def _transpose(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    return {i: j for j, i in enumerate(params["permutation"])}, frozenset()


def _dropped(axes: Iterable[int], rank: int) -> dict[int, int]:
    kept = [i for i in range(rank) if i not in set(axes)]
    return {i: j for j, i in enumerate(kept)}


def _squeeze(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    return _dropped(params["dimensions"], len(shape)), frozenset()


def _reduce(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    return _dropped(params["axes"], len(shape)), frozenset()


def _cumulate(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    return {i: i for i in range(len(shape)) if i != params["axis"]}, frozenset()


def _reshape(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    """An axis stays itself if as much lies before it as did, and it is as long."""
    if params.get("dimensions") is not None:
        raise _UnproofError
    to = {
        i: j
        for i, n in enumerate(shape)
        for j, m in enumerate(new)
        if n == m and n > 1 and prod(shape[:i]) == prod(new[:j])
    }
    return to, frozenset(j for j, m in enumerate(new) if m == 1)


def _slice(params: Any, shape: Any, new: Any) -> tuple[dict[int, int], frozenset[int]]:
    return {i: i for i, n in enumerate(shape) if n == new[i]}, frozenset()


_MOVES = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "slice": _slice,
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_ALONG, _cumulate),
}


def _dot(eqn: Any, left: _Trail, right: _Trail) -> _Trail:
    summed, batch = eqn.params["dimension_numbers"]
    ranks = [len(v.aval.shape) for v in eqn.invars]
    places = [_places_in_product(side, summed, batch, ranks) for side in range(2)]
    both = len(batch[0])
    moved = [_moved(t, (to, frozenset())) for t, to in zip((left, right), places, strict=True)]
    # A batch axis is of both sides, any other of one.
    shared = moved[0].uniform & moved[1].uniform
    own = frozenset(i for t in moved for i in t.uniform if i >= both)
    axes = {t.axis for t in moved if t.axis is not None}
    if not axes:
        return _Trail(None, shared | own)
    (axis, *others) = axes
    # Where the other side has a position too, it must be the cell's own or all the same.
    alone = [t for t in moved if t.axis is None and axis < both and axis not in t.uniform]
    if others or alone or (axis >= both and None not in {t.axis for t in moved}):
        raise _UnproofError
    return _Trail(axis, shared | own)


def _places_in_product(side: int, summed: Any, batch: Any, ranks: list[int]) -> dict[int, int]:
    """Where the axes of one side are in a product: batch axes, the left's own, the right's."""
    free = [[i for i in range(ranks[s]) if i not in (*summed[s], *batch[s])] for s in range(2)]
    before = len(batch[0]) + (len(free[0]) if side else 0)
    return {i: j for j, i in enumerate(batch[side])} | {
        i: before + j for j, i in enumerate(free[side])
    }
