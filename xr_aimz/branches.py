"""Which arguments decide what branch a program takes.

Values show a coupling only as far as they lead to it: where a branch is chosen by a mean over
cells, a probe and its halves may all take the same. So it is read off the trace: whatever goes
into the index of a ``cond`` decides for every cell that the branch is about. Of what a scan
goes through, a step has its own slice, and decides for nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = ["deciding"]

Marks = frozenset[str]
_NONE: Marks = frozenset()
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def deciding(closed: ClosedJaxpr, given: Sequence[Marks]) -> Marks:
    """
    Collect the marks of everything that a branch depends on.

    Parameters
    ----------
    closed : ClosedJaxpr
    given : sequence of frozenset of str
        The marks of each argument. What is made of several has the marks of all.

    Returns
    -------
    frozenset of str
    """
    return _walk(closed.jaxpr, [_NONE] * len(closed.consts) + list(given))[1]


def _walk(jaxpr: Jaxpr, given: Sequence[Marks]) -> tuple[list[Marks], Marks]:
    """The marks of each result, and those that decide."""
    marks = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))
    decide = _NONE
    for operation in jaxpr.eqns:
        read = [_NONE if isinstance(v, Literal) else marks[v] for v in operation.invars]
        made, inside = _made(operation, read)
        decide |= inside
        marks |= zip(operation.outvars, made, strict=True)
    results = [_NONE if isinstance(v, Literal) else marks[v] for v in jaxpr.outvars]
    return results, decide


def _made(operation: Any, read: list[Marks]) -> tuple[list[Marks], Marks]:
    name, params = operation.primitive.name, operation.params
    everything = _NONE.union(*read)
    made = [everything] * len(operation.outvars)
    if name in _CALLS:
        return _inner(params[_CALLS[name]], read)
    if name == "cond":
        within = [_inner(branch, read[1:])[1] for branch in params["branches"]]
        return made, read[0].union(*within)
    if name == "scan":
        return made, _scanned(operation, read)
    return made, _NONE


def _scanned(operation: Any, read: list[Marks]) -> Marks:
    body = operation.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)
    # By shapes, for JAX counts them otherwise from 0.12 on: what is scanned over, or stacked, has
    # an axis more than a step's part of it.
    stacked = sum(_wider(*both) for both in zip(operation.invars, inner.invars, strict=True))
    carried = sum(not _wider(*both) for both in zip(operation.outvars, inner.outvars, strict=True))
    held = len(read) - stacked - carried
    # A step has a slice of its own of what is scanned over, which may be a cell's alone.
    carry, decide = read[held : held + carried], _NONE
    while True:
        results, decide = _inner(body, [*read[:held], *carry, *[_NONE] * stacked])
        after = [a | b for a, b in zip(carry, results, strict=False)]
        if after == carry:
            return decide
        carry = after


def _wider(whole: Any, part: Any) -> bool:
    return len(whole.aval.shape) > len(part.aval.shape)


def _inner(program: Any, read: list[Marks]) -> tuple[list[Marks], Marks]:
    """A program within the program: closed, or without constants of its own."""
    consts = len(getattr(program, "consts", ()))
    return _walk(getattr(program, "jaxpr", program), [_NONE] * consts + read)
