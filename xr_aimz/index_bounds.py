"""Positions that a program computes from its inputs, and the axes that they must lie in.

JAX takes the nearest entry for a position beyond an axis, and counts a negative one from the
end, as Python does: a group that a fit never had predicts another's mean. So every position
that is computed from inputs alone is found in the trace, with the axis that it is a position
on, and can be computed by itself and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from xr_aimz.dataflow import Labels, inner_programs, open_program, scan_counts

__all__ = ["Position", "find_positions", "has_positions", "positions_of"]

# What lays its operand out otherwise and computes nothing.
_LAYOUT = {
    *("broadcast_in_dim", "copy", "copy_p", "expand_dims", "optimization_barrier", "reshape"),
    *("squeeze", "stop_gradient", "transpose"),
}
_CALLS = {"closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
_SCATTERS = {"scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"}
_TAKING = {"dynamic_slice", "dynamic_update_slice", "gather", *_SCATTERS}


@dataclass(frozen=True)
class Position:
    """A position on an axis, computed from inputs.

    Parameters
    ----------
    sources : frozenset of str
        The inputs that it is computed from.
    highest : int
        The last position on the axis that may be taken; the first is 0.
    is_input : bool
        Whether it is an input as it is, but for its layout.
    indexed : tuple of (int, int), optional
        The argument of the program that entries are taken of, by number, and which of its axes;
        None where they are taken of what the program computes.
    """

    sources: Labels
    highest: int
    is_input: bool
    indexed: tuple[int, int] | None = None


@dataclass(eq=False)
class _Value:
    """A value of the program; None where it depends on more than inputs.

    ``argument`` is the number of the argument that it is, but for its layout. ``unwrapped`` is a
    position before negative ones are counted from the end. ``negative`` and ``shifted`` are values
    that this one is a step of that computation from.
    """

    value: Any
    labels: Labels = frozenset()
    argument: int | None = None
    unwrapped: Any = None
    negative: _Value | None = None
    shifted: _Value | None = None
    columns: tuple[_Value, ...] = ()
    integer_of: _Value | None = None

    @property
    def raw(self) -> Any:
        return self.value if self.unwrapped is None else self.unwrapped

    @property
    def base(self) -> _Value:
        """The value that this one is, in another integer dtype."""
        return self if self.integer_of is None else self.integer_of.base


@dataclass(eq=False)
class _Found:
    positions: list[Position] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


def has_positions(program: Any) -> bool:
    """Whether any operation of a program, at any depth, takes entries by position."""
    jaxpr, _ = open_program(program)
    return any(
        equation.primitive.name in _TAKING or any(map(has_positions, inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def find_positions(closed: ClosedJaxpr, names: Sequence[str | None]) -> tuple[Position, ...]:
    """
    Find the positions that a program computes from named inputs; nothing is computed.

    Parameters
    ----------
    closed : ClosedJaxpr
    names : sequence of str or None
        Of each argument; None for one that is no input, such as a draw.

    Returns
    -------
    tuple of Position
    """
    found: list[Position] = []

    def collect(*arguments: Any) -> list[Any]:
        positions, values = _collect(closed, names, arguments)
        found.extend(positions)
        return values

    jax.eval_shape(collect, *(_struct(var) for var in closed.jaxpr.invars))
    return tuple(found)


def positions_of(
    closed: ClosedJaxpr, names: Sequence[str | None]
) -> Callable[[Mapping[str, Any]], list[Any]]:
    """
    Make a function that computes those positions from the inputs; traceable.

    Parameters
    ----------
    closed : ClosedJaxpr
    names : sequence of str or None

    Returns
    -------
    callable
        From a mapping of name to array to an array for each of :func:`find_positions`.
    """

    def compute(inputs: Mapping[str, Any]) -> list[Any]:
        structs = [_struct(var) for var in closed.jaxpr.invars]
        arguments = [
            jnp.zeros(s.shape, s.dtype) if name is None else jnp.asarray(inputs[name], s.dtype)
            for name, s in zip(names, structs, strict=True)
        ]
        return _collect(closed, names, arguments)[1]

    return compute


def _struct(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _collect(
    closed: ClosedJaxpr, names: Sequence[str | None], arguments: Sequence[Any]
) -> tuple[list[Position], list[Any]]:
    found = _Found()
    given = [
        _Value(None, argument=number)
        if name is None
        else _Value(argument, frozenset({name}), number)
        for number, (name, argument) in enumerate(zip(names, arguments, strict=True))
    ]
    _run(closed, given, found)
    return found.positions, found.values


def _run(program: Any, given: Sequence[_Value], found: _Found) -> list[_Value]:
    jaxpr, consts = open_program(program)
    known: dict[Any, _Value] = {}
    arguments = [*jaxpr.constvars, *jaxpr.invars]
    known.update(zip(arguments, [*map(_Value, consts), *given], strict=True))

    def read(atom: Any) -> _Value:
        return _Value(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        _note_positions(equation, operands, found)
        results = _results(equation, operands, found)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: Any, operands: Sequence[_Value], found: _Found) -> list[_Value]:
    name, programs = equation.primitive.name, inner_programs(equation)
    if name in _CALLS and len(programs) == 1:
        return _run(programs[0], operands, found)
    if name == "scan":
        _look_into_scan(equation, operands, found)
    elif name == "while":
        _look_into_while(equation, operands, found)
    elif name == "cond":
        _look_into_cond(equation, operands, found)
    if any(operand.value is None for operand in operands) or equation.effects:
        return [_Value(None)] * len(equation.outvars)
    labels: Labels = frozenset().union(*(operand.labels for operand in operands))
    values = _apply(equation, [operand.value for operand in operands])
    results = [_Value(value, labels) for value in values]
    if any(operand.unwrapped is not None for operand in operands):
        raws = _apply(equation, [operand.raw for operand in operands])
        results = [replace(r, unwrapped=raw) for r, raw in zip(results, raws, strict=True)]
    return _described(equation, operands, results)


def _apply(equation: Any, values: Sequence[Any]) -> list[Any]:
    made = equation.primitive.bind(*values, **equation.params)
    return list(made) if equation.primitive.multiple_results else [made]


def _described(equation: Any, operands: Sequence[_Value], results: list[_Value]) -> list[_Value]:
    """The results with what is known of how they were made."""
    name, (first, *others) = equation.primitive.name, operands or [_Value(None)]
    if name in _LAYOUT:
        return [replace(results[0], argument=first.argument)]
    if name == "convert_element_type" and _is_integer(first.value):
        if _is_integer(results[0].value):
            return [replace(results[0], argument=first.argument, integer_of=first.base)]
    elif name == "lt" and not others[0].labels and not np.ndim(others[0].value):
        if _is_integer(first.value) and _is_zero(others[0].value):
            return [replace(results[0], negative=first.base)]
    elif name == "add" and not others[0].labels and _is_integer(first.value):
        return [replace(results[0], shifted=first.base)]
    elif name == "concatenate" and equation.params["dimension"] == np.ndim(first.value) - 1:
        return [replace(results[0], columns=tuple(operands))]
    elif name == "select_n" and len(others) == 2:
        kept, turned = others
        if first.negative is not None and first.negative is kept.base is turned.shifted:
            return [replace(results[0], unwrapped=kept.raw, argument=kept.argument)]
    return results


def _is_integer(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.integer))


def _is_zero(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer) and bool(np.asarray(value) == 0)


def _note_positions(equation: Any, operands: Sequence[_Value], found: _Found) -> None:
    name = equation.primitive.name
    if name == "gather" or name in _SCATTERS:
        _note_indices(equation, operands, found)
    elif name in ("dynamic_slice", "dynamic_update_slice"):
        first = 1 if name == "dynamic_slice" else 2
        lengths = equation.invars[0].aval.shape
        taken = equation.params["slice_sizes"] if first == 1 else equation.invars[1].aval.shape
        for axis, start in enumerate(operands[first:]):
            if lengths[axis] != taken[axis]:
                _note(start, start.raw, lengths[axis] - taken[axis], (operands[0], axis), found)


def _note_indices(equation: Any, operands: Sequence[_Value], found: _Found) -> None:
    numbers, (target, indices) = equation.params["dimension_numbers"], operands[:2]
    lengths = equation.invars[0].aval.shape
    if equation.primitive.name == "gather":
        axes, sizes = numbers.start_index_map, equation.params["slice_sizes"]
    else:
        axes = numbers.scatter_dims_to_operand_dims
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        windows = iter(numbers.update_window_dims)
        updates = equation.invars[2].aval.shape
        sizes = [1 if a in gone else updates[next(windows)] for a in range(len(lengths))]
    if indices.value is None:
        return
    # Positions on several axes are columns, each of one operand of a concatenation.
    each = indices.columns if len(indices.columns) == len(axes) else (indices,) * len(axes)
    for column, (axis, index) in enumerate(zip(axes, each, strict=True)):
        if lengths[axis] != sizes[axis]:
            own = indices.raw[..., column]
            _note(index, own, lengths[axis] - sizes[axis], (target, axis), found)


def _note(
    index: _Value, raw: Any, highest: int, indexed: tuple[_Value, int], found: _Found
) -> None:
    if index.value is None or not index.labels:
        return
    target, axis = indexed
    named = None if target.argument is None else (target.argument, axis)
    is_input = index.argument is not None
    found.positions.append(Position(index.labels, highest, is_input, named))
    found.values.append(raw)


def _look_into_scan(equation: Any, operands: Sequence[_Value], found: _Found) -> None:
    """The positions in the body of a scan, of all its steps at once."""
    try:
        constants, carried = scan_counts(equation)
    except LookupError:
        return
    fixed, slices = list(operands[:constants]), operands[constants + carried :]
    carry = [_Value(None)] * carried
    stacked = [s.raw for s in slices if s.value is not None]
    within = _Found()

    def step(parts: list[Any]) -> list[Any]:
        each, inner = iter(parts), _Found()
        own = [s if s.value is None else _Value(next(each), s.labels, s.argument) for s in slices]
        _run(equation.params["jaxpr"], [*fixed, *carry, *own], inner)
        within.positions[:] = inner.positions
        return inner.values

    values = jax.vmap(step)(stacked) if stacked else step([])
    found.positions.extend(within.positions)
    found.values.extend(values)


def _look_into_while(equation: Any, operands: Sequence[_Value], found: _Found) -> None:
    first, second = (equation.params[n] for n in ("cond_nconsts", "body_nconsts"))
    carry = [_Value(None)] * (len(operands) - first - second)
    _run(equation.params["cond_jaxpr"], [*operands[:first], *carry], found)
    _run(equation.params["body_jaxpr"], [*operands[first : first + second], *carry], found)


def _look_into_cond(equation: Any, operands: Sequence[_Value], found: _Found) -> None:
    """The positions in each branch, where it is the one that is taken."""
    chosen, arguments = operands[0], operands[1:]
    for number, branch in enumerate(equation.params["branches"]):
        inner = _Found()
        _run(branch, arguments, inner)
        if chosen.value is None:
            found.positions.extend(inner.positions)
            found.values.extend(inner.values)
        else:
            # Where another branch is taken, an input is no position: these are computed.
            found.positions.extend(replace(p, is_input=False) for p in inner.positions)
            taken = jnp.asarray(chosen.value, int) == number
            found.values.extend(jnp.where(taken, value, 0) for value in inner.values)
