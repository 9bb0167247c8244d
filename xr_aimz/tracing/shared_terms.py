"""Drop the terms that every scenario adds alike, before scenarios are differenced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

_CALLS = ("jit", "pjit")


@dataclass(frozen=True)
class Operation:
    """Operation that computes the values numbered ``results`` from those numbered ``read``.

    ``name`` is that of the primitive. An operation that ``has_effects``, such as printing, is run
    even if no result needs its values.
    """

    name: str
    operate: Callable[..., Sequence[Any]]
    read: tuple[int, ...]
    results: tuple[int, ...]
    has_effects: bool = False


@dataclass(frozen=True, eq=False)
class InnerCall:
    """Call of a function within a program: its name, its arguments by number, its program."""

    name: str
    read: tuple[int, ...]
    program: ClosedJaxpr


@dataclass(eq=False)
class OpList:
    """Operations of a program, on numbered values.

    Parameters
    ----------
    steps : list of Operation
        In the order in which they are run: after the operations whose values they read.
    maker : mapping of number to Operation
        The operation that computes a value; no entry for an argument or a constant.
    values : mapping of number to array
        The constants.
    avals : mapping of number to abstract value
    calls : mapping of number to InnerCall
        The call that returns a value, for values that a function within the program returns.
    """

    steps: list[Operation] = field(default_factory=list)
    maker: dict[int, Operation] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    avals: dict[int, Any] = field(default_factory=dict)
    calls: dict[int, InnerCall] = field(default_factory=dict)

    def value(self, aval: Any) -> int:
        """Number a value."""
        number = len(self.avals)
        self.avals[number] = aval
        return number

    def constant(self, value: Any, aval: Any) -> int:
        """Number a constant and record its value."""
        number = self.value(aval)
        self.values[number] = value
        return number

    def write(
        self,
        name: str,
        operate: Callable[..., Sequence[Any]],
        read: Sequence[int],
        avals: Sequence[Any],
        has_effects: bool = False,
    ) -> tuple[int, ...]:
        """Append an operation, and return the numbers of its results."""
        outputs = tuple(self.value(aval) for aval in avals)
        step = Operation(name, operate, tuple(read), outputs, has_effects)
        self.steps.append(step)
        self.maker |= dict.fromkeys(outputs, step)
        return outputs

    def run(self, arguments: Mapping[int, Any], results: Sequence[int]) -> list[Any]:
        """Compute the numbered values from those of the arguments; traceable."""
        values = {**self.values, **arguments}
        for step in self._needed(results):
            outputs = step.operate(*(values[number] for number in step.read))
            values |= zip(step.results, outputs, strict=True)
        return [values[number] for number in results]

    def _needed(self, results: Sequence[int]) -> Iterator[Operation]:
        needed, steps = set(results), []
        for step in reversed(self.steps):
            if step.has_effects or not needed.isdisjoint(step.results):
                needed.update(step.read)
                steps.append(step)
        return reversed(steps)


def inline_calls(closed: ClosedJaxpr) -> tuple[OpList, list[int], list[int]]:
    """List the operations of a traced program, and number its arguments and its results."""
    ops = OpList()
    arguments = [ops.value(variable.aval) for variable in closed.jaxpr.invars]
    return ops, arguments, _inline(ops, closed, arguments)


def _inline(ops: OpList, closed: ClosedJaxpr, arguments: Sequence[int]) -> list[int]:
    jaxpr = closed.jaxpr
    consts = zip(jaxpr.constvars, closed.consts, strict=True)
    numbers = {variable: ops.constant(value, variable.aval) for variable, value in consts}
    numbers |= zip(jaxpr.invars, arguments, strict=True)

    def number_of(atom: Any) -> int:
        return ops.constant(atom.val, atom.aval) if isinstance(atom, Literal) else numbers[atom]

    for operation in jaxpr.eqns:
        name, inputs = operation.primitive.name, [number_of(atom) for atom in operation.invars]
        outputs: Sequence[int]
        if name in _CALLS:
            outputs = _inline(ops, operation.params["jaxpr"], inputs)
            call = InnerCall(operation.params["name"], tuple(inputs), operation.params["jaxpr"])
            ops.calls |= dict.fromkeys(outputs, call)
        else:
            avals = [variable.aval for variable in operation.outvars]
            operate = _make_operate(operation, jaxpr)
            outputs = ops.write(name, operate, inputs, avals, bool(operation.effects))
        numbers |= zip(operation.outvars, outputs, strict=True)
    return [number_of(atom) for atom in jaxpr.outvars]


def _make_operate(operation: Any, within: Jaxpr) -> Callable[..., Sequence[Any]]:
    """Make a function that runs one operation: a jaxpr of it alone, run by JAX."""

    def operate(*values: Any) -> Sequence[Any]:
        pairs = zip(operation.invars, values, strict=True)
        arguments = {atom: value for atom, value in pairs if not isinstance(atom, Literal)}
        single = within.replace(
            constvars=[],
            invars=list(arguments),
            outvars=operation.outvars,
            eqns=[operation],
            effects=operation.effects,
        )
        outputs: Sequence[Any] = jaxpr_as_fun(ClosedJaxpr(single, ()))(*arguments.values())
        return outputs

    return operate


# Operations that change the layout of their first operand and compute nothing.
_LAYOUT = ("broadcast_in_dim", "copy", "reshape", "squeeze", "transpose")
_CONVERT = "convert_element_type"
_SUMS = ("add", "mul", "sub")
# Functions of jax.random by the names that they have in a trace; from a key alone they draw
# finite numbers. Noise of a function under another name is not dropped, only drawn in vain.
_SAMPLERS = {
    "_gumbel": jax.random.gumbel,
    "_laplace": jax.random.laplace,
    "_logistic": jax.random.logistic,
    "_normal": jax.random.normal,
}


def is_difference(contrast: Callable, like: Any) -> bool:
    """Return whether a contrast of two arrays like this is the first minus the second."""
    closed = jax.make_jaxpr(contrast)(like, like)
    return [(e.primitive.name, e.invars, e.outvars) for e in closed.jaxpr.eqns] == [
        ("sub", closed.jaxpr.invars, closed.jaxpr.outvars)
    ]


def without_shared_terms(
    one: Callable[[Any], Any], scenario: Any, subtracted: Callable[[Any], bool]
) -> Callable[[Any], Any]:
    """
    Drop from a program's results the terms that it adds alike in every scenario.

    Parameters
    ----------
    one : callable
        From the values of one scenario to a pytree of arrays. Its other inputs are the same in
        all scenarios.
    scenario : pytree of arrays or structs
        Values of one scenario, as ``one`` takes them: shapes and dtypes are used.
    subtracted : callable
        Return whether the scenarios of a result with this shape and dtype are subtracted; other
        results are computed in full.

    Returns
    -------
    callable
        Like ``one``. Its subtracted results differ between two scenarios as those of ``one`` do.
    """
    closed, results = jax.make_jaxpr(one, return_shape=True)(scenario)
    ops, arguments, outputs = inline_calls(closed)
    parts = _Parts(ops, set(arguments))
    structs, structure = jax.tree.flatten(results)
    numbers = [
        parts.of(number) if subtracted(struct) else number
        for number, struct in zip(outputs, structs, strict=True)
    ]

    def without(scenario: Any) -> Any:
        values = dict(zip(arguments, jax.tree.leaves(scenario), strict=True))
        return jax.tree.unflatten(structure, ops.run(values, numbers))

    return without


@dataclass(eq=False)
class _Parts:
    """Reduced forms of a program's values, by number, for a difference between scenarios.

    Values in ``moving`` differ between scenarios. Those in ``finite``, noise and finite constants,
    make nothing NaN by being added or multiplied. ``reduced`` has the number of the reduced value.
    """

    ops: OpList
    moving: set[int]
    noise: set[int] = field(default_factory=set)
    finite: set[int] = field(default_factory=set)
    reduced: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        constants, calls = self.ops.values.items(), self.ops.calls.items()
        self.noise.update(number for number, call in calls if self._is_drawn(number, call))
        self.finite.update(
            number for number, v in constants if _is_finite(v, self.ops.avals[number])
        )
        # A copy, because reduced values are appended as new operations.
        for step in tuple(self.ops.steps):
            self._look(step)
            if len(step.results) == 1 and step.results[0] in self.moving:
                self.reduced[step.results[0]] = self._part(step, step.results[0])

    def of(self, number: int) -> int:
        """Return the number of a value without the terms that all scenarios add alike."""
        return self.reduced.get(number, number)

    def _look(self, step: Operation) -> None:
        if not self.moving.isdisjoint(step.read):
            self.moving.update(step.results)
        if self._lays_out(step):
            for kind in (self.noise, self.finite):
                kind.update(step.results if step.read[0] in kind else ())

    def _is_drawn(self, number: int, call: InnerCall) -> bool:
        """Return whether a call draws noise: a sampler of JAX, whose only argument is a key."""
        aval, read = self.ops.avals[number], [self.ops.avals[i] for i in call.read]
        single = len(read) == 1 and not read[0].shape
        if call.name not in _SAMPLERS or not single:
            return False
        if not jnp.issubdtype(read[0].dtype, jax.dtypes.prng_key):
            return False
        sampler = partial(_SAMPLERS[call.name], shape=aval.shape, dtype=aval.dtype)
        reference = jax.make_jaxpr(sampler)(read[0])
        # Compared by program: a function of the model may have the same name.
        inner = [
            e.params["jaxpr"] for e in reference.jaxpr.eqns if e.params.get("name") == call.name
        ]
        return str(call.program) in map(str, inner)

    def _part(self, step: Operation, number: int) -> int:
        read = step.read
        if step.name in ("add", "sub"):
            return self._of_sum(number, step.name, *read)
        if self._lays_out(step):
            return self._of_parts(step, (self.of(read[0]), *read[1:]))
        if step.name == "select_n":
            # Each cell takes the same case in all scenarios, or in one scenario the case that
            # makes any difference NaN.
            cases = [case for case in read[1:] if not self._missing(case)]
            if read[0] not in self.moving or len(cases) == 1:
                return self._of_parts(step, (read[0], *map(self.of, read[1:])))
        return number

    def _of_sum(self, number: int, name: str, first: int, second: int) -> int:
        if second not in self.moving:
            varying, shared = first, second
        elif first not in self.moving and name == "add":
            varying, shared = second, first
        else:
            return number
        has_noise, nan_sources = self._apart(shared)
        aval = self.ops.avals[number]
        # A scalar may be added to an array as it is.
        if not has_noise or self.ops.avals[varying].shape != aval.shape:
            return number
        if not nan_sources:
            return self.of(varying)
        return self.ops.write("zeros", _add_zeros, (self.of(varying), *nan_sources), [aval])[0]

    def _apart(self, number: int) -> tuple[bool, list[int]]:
        """Return whether a value includes noise, and the values by which alone it can be NaN."""
        has_noise, nan_sources, visited, stack = False, [], {number}, [number]
        while stack:
            current = stack.pop()
            step = self.ops.maker.get(current)
            if current in self.noise:
                has_noise = True
            elif step is not None and step.name in _SUMS:
                stack.extend(i for i in step.read if i not in visited)
                visited.update(step.read)
            elif current not in self.finite:
                nan_sources.append(current)
        return has_noise, nan_sources

    def _missing(self, number: int) -> bool:
        """Return whether a value is NaN, everywhere and in all scenarios."""
        step = self.ops.maker.get(number)
        while step and self._lays_out(step):
            number = step.read[0]
            step = self.ops.maker.get(number)
        value = self.ops.values.get(number)
        # A constant may be a tracer of the surrounding trace.
        is_constant = isinstance(value, (float, np.ndarray, np.generic))
        return is_constant and bool(np.isnan(np.asarray(value, float)).all())

    def _lays_out(self, step: Operation) -> bool:
        """Return whether an operation keeps every number, or rounds it: floats stay floats."""
        if step.name != _CONVERT:
            return step.name in _LAYOUT
        dtypes = (self.ops.avals[number].dtype for number in (step.read[0], step.results[0]))
        return all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)

    def _of_parts(self, step: Operation, read: Sequence[int]) -> int:
        if tuple(read) == step.read:
            return step.results[0]
        aval = self.ops.avals[step.results[0]]
        return self.ops.write(step.name, step.operate, read, [aval])[0]


def _is_finite(value: Any, aval: Any) -> bool:
    """Return whether a constant is a finite float scalar, not a tracer of an outer trace."""
    is_scalar = not aval.shape and jnp.issubdtype(aval.dtype, jnp.floating)
    return is_scalar and not isinstance(value, jax.core.Tracer) and bool(np.isfinite(value))


def _add_zeros(value: jax.Array, *others: jax.Array) -> tuple[jax.Array]:
    return (sum((0 * other for other in others), start=value),)
