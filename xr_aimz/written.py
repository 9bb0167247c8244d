"""A program as a list of steps that can be read, added to, and run in part.

JAX writes a traced program down as operations, some of which call programs of their own. Here
all are steps of one list, and every value has a number. What is wanted of it is then computed
by those steps alone that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

__all__ = ["Call", "Step", "Written", "write_down"]

_CALLS = ("jit", "pjit")


@dataclass(frozen=True)
class Step:
    """What the values ``made`` are made of those ``read``, by an operation called ``name``.

    One that ``tells`` is run whether anything is wanted of it or not: it prints, for example.
    """

    name: str
    operate: Callable[..., Sequence[Any]]
    read: tuple[int, ...]
    made: tuple[int, ...]
    tells: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A function within a program: its name, what it was called with, and what it does."""

    name: str
    read: tuple[int, ...]
    does: ClosedJaxpr


@dataclass(eq=False)
class Written:
    """The steps of a program.

    Parameters
    ----------
    steps : list of Step
        Each after those that make what it reads.
    maker : mapping of number to Step
        None of an argument or a constant.
    known : mapping of number to value
        The constants.
    avals : mapping of number to abstract value
    calls : mapping of number to Call
        Of what a function within the program returns.
    """

    steps: list[Step] = field(default_factory=list)
    maker: dict[int, Step] = field(default_factory=dict)
    known: dict[int, Any] = field(default_factory=dict)
    avals: dict[int, Any] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)

    def value(self, aval: Any) -> int:
        """A number for a value."""
        at = len(self.avals)
        self.avals[at] = aval
        return at

    def constant(self, value: Any, aval: Any) -> int:
        at = self.value(aval)
        self.known[at] = value
        return at

    def write(
        self,
        name: str,
        operate: Callable[..., Sequence[Any]],
        read: Sequence[int],
        avals: Sequence[Any],
        tells: bool = False,
    ) -> tuple[int, ...]:
        """Write a step; the numbers of what it makes."""
        made = tuple(self.value(aval) for aval in avals)
        step = Step(name, operate, tuple(read), made, tells)
        self.steps.append(step)
        self.maker |= dict.fromkeys(made, step)
        return made

    def run(self, given: Mapping[int, Any], wanted: Sequence[int]) -> list[Any]:
        """The values at some numbers, from those of the arguments; traceable."""
        values = {**self.known, **given}
        for step in self._needed(wanted):
            made = step.operate(*(values[at] for at in step.read))
            values |= zip(step.made, made, strict=True)
        return [values[at] for at in wanted]

    def _needed(self, wanted: Sequence[int]) -> Iterator[Step]:
        needed, steps = set(wanted), []
        for step in reversed(self.steps):
            if step.tells or not needed.isdisjoint(step.made):
                needed.update(step.read)
                steps.append(step)
        return reversed(steps)


def write_down(closed: ClosedJaxpr) -> tuple[Written, list[int], list[int]]:
    """A traced program as steps, and the numbers of its arguments and its results."""
    written = Written()
    arguments = [written.value(variable.aval) for variable in closed.jaxpr.invars]
    return written, arguments, _inlined(written, closed, arguments)


def _inlined(written: Written, closed: ClosedJaxpr, arguments: Sequence[int]) -> list[int]:
    jaxpr = closed.jaxpr
    consts = zip(jaxpr.constvars, closed.consts, strict=True)
    place = {variable: written.constant(value, variable.aval) for variable, value in consts}
    place |= zip(jaxpr.invars, arguments, strict=True)

    def at(atom: Any) -> int:
        return written.constant(atom.val, atom.aval) if isinstance(atom, Literal) else place[atom]

    for operation in jaxpr.eqns:
        name, read = operation.primitive.name, [at(atom) for atom in operation.invars]
        made: Sequence[int]
        if name in _CALLS:
            made = _inlined(written, operation.params["jaxpr"], read)
            call = Call(operation.params["name"], tuple(read), operation.params["jaxpr"])
            written.calls |= dict.fromkeys(made, call)
        else:
            avals = [variable.aval for variable in operation.outvars]
            operate = _operate(operation, jaxpr)
            made = written.write(name, operate, read, avals, bool(operation.effects))
        place |= zip(operation.outvars, made, strict=True)
    return [at(atom) for atom in jaxpr.outvars]


def _operate(operation: Any, within: Jaxpr) -> Callable[..., Sequence[Any]]:
    """A program of one operation: JAX's own way of running what it has written down."""

    def operate(*values: Any) -> Sequence[Any]:
        both = zip(operation.invars, values, strict=True)
        read = {atom: value for atom, value in both if not isinstance(atom, Literal)}
        alone = within.replace(
            constvars=[],
            invars=list(read),
            outvars=operation.outvars,
            eqns=[operation],
            effects=operation.effects,
        )
        made: Sequence[Any] = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*read.values())
        return made

    return operate
