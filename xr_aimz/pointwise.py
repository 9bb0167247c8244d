"""Whether two traces of a program, for blocks of two sizes, prove that it works cell by cell.

What a program computes is written down twice: for a block, and for a part of it. If both read
alike, operation by operation, number by number, and no operation looks along an axis whose
length differs between them, then no cell's result can depend on another cell, nor on which of
the two sizes it is in. An axis that differs belongs to the dimension of the input that it came
from, or its values are all the same. Whatever is not known here to be safe is not proven, which
says nothing against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from xr_aimz.axiswise import CONSTANT, RULES, Rule, Tags, UnprovenError

__all__ = ["proven"]


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
    except (UnprovenError, TypeError, ValueError):
        return False


def _meets(own: Tags | None, asked: Tags) -> bool:
    if own is None or len(own) != len(asked):
        return False
    return all(
        a == b or (a == CONSTANT and b is not None) for a, b in zip(own, asked, strict=True)
    )


def _closed(whole: ClosedJaxpr, part: ClosedJaxpr, given: Sequence[Tags | None]) -> list:
    if len(whole.consts) != len(part.consts):
        raise UnprovenError
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
        raise UnprovenError
    known: dict[Any, tuple[Any, Tags | None]] = {}
    inputs = [*whole.constvars, *whole.invars], [*part.constvars, *part.invars]
    for a, b, tags in zip(*inputs, given, strict=True):
        known[a] = (b, _checked(a, b, tags))
    for here, there in zip(whole.eqns, part.eqns, strict=True):
        if here.primitive is not there.primitive or len(here.invars) != len(there.invars):
            raise UnprovenError
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
    except (UnprovenError, KeyError, TypeError, ValueError):
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


def _inner(name: str) -> Rule:
    """Of an operation that calls a program."""

    def rule(here: Any, there: Any, operands: Sequence[Tags]) -> Sequence[Tags | None]:
        a, b = here.params[name], there.params[name]
        if isinstance(a, ClosedJaxpr):
            return _closed(a, b, operands)
        return _walk(a, b, operands)

    return rule


_RULES: dict[str, Rule] = {
    **RULES,
    **dict.fromkeys(("jit", "pjit"), _inner("jaxpr")),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _inner("call_jaxpr")),
}
