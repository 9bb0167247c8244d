"""Find the positions that a program computes from its inputs, and the axes that they index.

JAX clips a position beyond an axis to the nearest entry, and counts a negative one from the
end, as Python does: without a check, a group that the fit did not have is predicted with the
mean of another. So every position that is computed from inputs alone is found in the trace,
with the axis that it indexes, and can be computed by itself and compared with its bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from xr_aimz.tracing.dataflow import Labels, inner_programs, scan_counts, split_constants

# Operations that change the layout of their operand and compute nothing.
_LAYOUT = {
    *("broadcast_in_dim", "copy", "copy_p", "expand_dims", "optimization_barrier", "reshape"),
    *("squeeze", "stop_gradient", "transpose"),
}
_CALLS = {"closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
_SCATTERS = {"scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub"}
_INDEXING = {"dynamic_slice", "dynamic_update_slice", "gather", *_SCATTERS}


@dataclass(frozen=True)
class Position:
    """A position on an axis, computed from inputs.

    Parameters
    ----------
    sources : frozenset of str
        The inputs that it is computed from.
    highest : int
        The last valid position on the axis; the first is 0.
    is_input : bool
        True if it is an input unchanged, except for its layout.
    indexed : tuple of (int, int), optional
        The number of the program's argument that is indexed, and its axis; None where a computed
        array is indexed.
    """

    sources: Labels
    highest: int
    is_input: bool
    indexed: tuple[int, int] | None = None


@dataclass(eq=False)
class _Value:
    """Value of a program as computed from inputs; ``value`` is None where it depends on more.

    ``argument`` is the number of the argument that it is, except for its layout. ``unwrapped`` is
    a position before negative ones are counted from the end. ``negative`` and ``shifted`` are the
    values from which this one is a step of that computation. ``columns`` are the operands of a
    concatenation along the last axis, ``integer_of`` the value before a change of integer dtype.
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
        """Return the value that this one is, in another integer dtype."""
        return self if self.integer_of is None else self.integer_of.base


@dataclass(eq=False)
class _PositionLog:
    positions: list[Position] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


def has_positions(program: Any) -> bool:
    """Return whether any operation of a program, at any depth, reads entries by position."""
    jaxpr, _ = split_constants(program)
    return any(
        equation.primitive.name in _INDEXING or any(map(has_positions, inner_programs(equation)))
        for equation in jaxpr.eqns
    )


def find_positions(closed: ClosedJaxpr, names: Sequence[str | None]) -> tuple[Position, ...]:
    """
    Find the positions that a program computes from named inputs; nothing is computed.

    Parameters
    ----------
    closed : ClosedJaxpr
    names : sequence of str or None
        Name of each argument; None for one that is no input, such as a draw.

    Returns
    -------
    tuple of Position
    """
    result: list[Position] = []

    def collect(*arguments: Any) -> list[Any]:
        positions, values = _collect_positions(closed, names, arguments)
        result.extend(positions)
        return values

    jax.eval_shape(collect, *(_struct(var) for var in closed.jaxpr.invars))
    return tuple(result)


def positions_of(
    closed: ClosedJaxpr, names: Sequence[str | None]
) -> Callable[[Mapping[str, Any]], list[Any]]:
    """
    Make a function that computes the positions of a program from its inputs; traceable.

    Parameters
    ----------
    closed : ClosedJaxpr
    names : sequence of str or None

    Returns
    -------
    callable
        From a mapping of name to array to a list with an integer array for each position of
        :func:`find_positions`.
    """

    def compute(inputs: Mapping[str, Any]) -> list[Any]:
        structs = [_struct(var) for var in closed.jaxpr.invars]
        arguments = [
            jnp.zeros(s.shape, s.dtype) if name is None else jnp.asarray(inputs[name], s.dtype)
            for name, s in zip(names, structs, strict=True)
        ]
        return _collect_positions(closed, names, arguments)[1]

    return compute


def _struct(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _collect_positions(
    closed: ClosedJaxpr, names: Sequence[str | None], arguments: Sequence[Any]
) -> tuple[list[Position], list[Any]]:
    log = _PositionLog()
    operands = [
        _Value(None, argument=number)
        if name is None
        else _Value(argument, frozenset({name}), number)
        for number, (name, argument) in enumerate(zip(names, arguments, strict=True))
    ]
    _run(closed, operands, log)
    return log.positions, log.values


def _run(program: Any, inputs: Sequence[_Value], log: _PositionLog) -> list[_Value]:
    jaxpr, consts = split_constants(program)
    values: dict[Any, _Value] = {}
    arguments = [*jaxpr.constvars, *jaxpr.invars]
    values.update(zip(arguments, [*map(_Value, consts), *inputs], strict=True))

    def read(atom: Any) -> _Value:
        return _Value(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        _record_positions(equation, operands, log)
        results = _compute_results(equation, operands, log)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _compute_results(equation: Any, operands: Sequence[_Value], log: _PositionLog) -> list[_Value]:
    name, programs = equation.primitive.name, inner_programs(equation)
    if name in _CALLS and len(programs) == 1:
        return _run(programs[0], operands, log)
    if name == "scan":
        _record_in_scan(equation, operands, log)
    elif name == "while":
        _record_in_while(equation, operands, log)
    elif name == "cond":
        _record_in_cond(equation, operands, log)
    if any(operand.value is None for operand in operands) or equation.effects:
        return [_Value(None)] * len(equation.outvars)
    labels: Labels = frozenset().union(*(operand.labels for operand in operands))
    values = _apply(equation, [operand.value for operand in operands])
    results = [_Value(value, labels) for value in values]
    if any(operand.unwrapped is not None for operand in operands):
        raws = _apply(equation, [operand.raw for operand in operands])
        results = [replace(r, unwrapped=raw) for r, raw in zip(results, raws, strict=True)]
    return _record_operation(equation, operands, results)


def _apply(equation: Any, values: Sequence[Any]) -> list[Any]:
    results = equation.primitive.bind(*values, **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def _record_operation(
    equation: Any, operands: Sequence[_Value], results: list[_Value]
) -> list[_Value]:
    """Return the results with a record of the operation that computed them."""
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
        position, wrapped = others
        if first.negative is not None and first.negative is position.base is wrapped.shifted:
            return [replace(results[0], unwrapped=position.raw, argument=position.argument)]
    return results


def _is_integer(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.integer))


def _is_zero(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer) and bool(np.asarray(value) == 0)


def _record_positions(equation: Any, operands: Sequence[_Value], log: _PositionLog) -> None:
    name = equation.primitive.name
    if name == "gather" or name in _SCATTERS:
        _record_indices(equation, operands, log)
    elif name in ("dynamic_slice", "dynamic_update_slice"):
        first = 1 if name == "dynamic_slice" else 2
        lengths = equation.invars[0].aval.shape
        sizes = equation.params["slice_sizes"] if first == 1 else equation.invars[1].aval.shape
        for axis, start in enumerate(operands[first:]):
            if lengths[axis] != sizes[axis]:
                _record(start, start.raw, lengths[axis] - sizes[axis], (operands[0], axis), log)


def _record_indices(equation: Any, operands: Sequence[_Value], log: _PositionLog) -> None:
    numbers, (target, indices) = equation.params["dimension_numbers"], operands[:2]
    lengths = equation.invars[0].aval.shape
    if equation.primitive.name == "gather":
        axes, sizes = numbers.start_index_map, equation.params["slice_sizes"]
    else:
        axes = numbers.scatter_dims_to_operand_dims
        removed = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        windows = iter(numbers.update_window_dims)
        updates = equation.invars[2].aval.shape
        sizes = [1 if a in removed else updates[next(windows)] for a in range(len(lengths))]
    if indices.value is None:
        return
    # Positions on several axes are columns, each of one operand of a concatenation.
    columns = indices.columns if len(indices.columns) == len(axes) else (indices,) * len(axes)
    for column, (axis, index) in enumerate(zip(axes, columns, strict=True)):
        if lengths[axis] != sizes[axis]:
            raw = indices.raw[..., column]
            _record(index, raw, lengths[axis] - sizes[axis], (target, axis), log)


def _record(
    index: _Value, raw: Any, highest: int, indexed: tuple[_Value, int], log: _PositionLog
) -> None:
    if index.value is None or not index.labels:
        return
    target, axis = indexed
    argument_axis = None if target.argument is None else (target.argument, axis)
    is_input = index.argument is not None
    log.positions.append(Position(index.labels, highest, is_input, argument_axis))
    log.values.append(raw)


def _record_in_scan(equation: Any, operands: Sequence[_Value], log: _PositionLog) -> None:
    """Record the positions in the body of a scan, stacked over all its steps."""
    try:
        constants, carried = scan_counts(equation)
    except LookupError:
        return
    fixed, slices = list(operands[:constants]), operands[constants + carried :]
    carry = [_Value(None)] * carried
    stacked = [s.raw for s in slices if s.value is not None]
    body_log = _PositionLog()

    def step(inputs: list[Any]) -> list[Any]:
        step_inputs, step_log = iter(inputs), _PositionLog()
        step_slices = [
            s if s.value is None else _Value(next(step_inputs), s.labels, s.argument)
            for s in slices
        ]
        _run(equation.params["jaxpr"], [*fixed, *carry, *step_slices], step_log)
        body_log.positions[:] = step_log.positions
        return step_log.values

    values = jax.vmap(step)(stacked) if stacked else step([])
    log.positions.extend(body_log.positions)
    log.values.extend(values)


def _record_in_while(equation: Any, operands: Sequence[_Value], log: _PositionLog) -> None:
    n_cond, n_body = (equation.params[n] for n in ("cond_nconsts", "body_nconsts"))
    carry = [_Value(None)] * (len(operands) - n_cond - n_body)
    _run(equation.params["cond_jaxpr"], [*operands[:n_cond], *carry], log)
    _run(equation.params["body_jaxpr"], [*operands[n_cond : n_cond + n_body], *carry], log)


def _record_in_cond(equation: Any, operands: Sequence[_Value], log: _PositionLog) -> None:
    """Record the positions in each branch; 0 where another branch is taken."""
    branch_index, arguments = operands[0], operands[1:]
    for number, branch in enumerate(equation.params["branches"]):
        branch_log = _PositionLog()
        _run(branch, arguments, branch_log)
        if branch_index.value is None:
            log.positions.extend(branch_log.positions)
            log.values.extend(branch_log.values)
        else:
            # Where another branch is taken the position is 0, so it is not an input unchanged.
            log.positions.extend(replace(p, is_input=False) for p in branch_log.positions)
            is_taken = jnp.asarray(branch_index.value, int) == number
            log.values.extend(jnp.where(is_taken, value, 0) for value in branch_log.values)
