"""Recursions along a dimension: how many steps back each site depends, from one abstract trace.

A recursion (a scan, a running sum) makes a label's value from those before it, so on a Dataset
that does not begin where the fit began it would restart from its initial value. In the trace
every site has a value, so a site depends on the sites that its distribution is made from and,
by way of what a scan carries, on a number of steps before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from xr_aimz.binding import block_of
from xr_aimz.dataflow import inner_programs, open_program, scan_counts
from xr_aimz.kernel import Program, distributions
from xr_aimz.model import tracing
from xr_aimz.scans import (
    CARRY,
    MarkedCarry,
    recursion_length,
    recursion_lengths,
)

__all__ = ["Dependence", "ancestors", "find_dependences"]

# The body of a scan and the number of a leaf of its carry.
Leaf = tuple[int, int]


@dataclass(frozen=True)
class Dependence:
    """What a value is made from.

    Parameters
    ----------
    names : frozenset of str
        Sites, at the value's own label or at others.
    past, future : float
        How many steps before and after its own label the value depends on, infinity for all
        of them. A number is exact: given the sites' values at so many steps, the value depends
        on nothing beyond.
    carried : frozenset
        Leaves of the carries of the scans that are being read.
    """

    names: frozenset[str] = frozenset()
    past: float = 0
    future: float = 0
    carried: frozenset[Leaf] = frozenset()


_NOTHING = Dependence()


def find_dependences(
    program: Program,
    sizes: Mapping[str, int],
    dim: str,
    draw: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> dict[str, Dependence]:
    """
    Find what each of ``program.returns`` depends on along a dimension.

    Parameters
    ----------
    program : Program
    sizes : mapping of dim to int
        A scan as long as ``dim`` is taken for one along it, so no other dim should have its size.
    dim : str
        An observation dimension.
    draw, shared : pytree of jax.ShapeDtypeStruct
        The arguments of a kernel; ``draw["latents"]`` with every site that is drawn.

    Returns
    -------
    dict of Dependence
    """
    call = distributions(replace(program, model=MarkedCarry(program.model)), sizes)
    latents = dict(draw["latents"])

    def leaves(latents: Any, keys: Any, shared: Any) -> dict[str, Any]:
        distributions_by_site = call({"keys": keys, "latents": latents}, shared)
        return {name: jax.tree.leaves(fn) for name, fn in distributions_by_site.items()}

    others = (draw["keys"], shared)
    with tracing(block_of(program.binding, sizes)):
        closed, out = jax.make_jaxpr(leaves, return_shape=True)(latents, *others)
    sources = [Dependence(frozenset({n})) for n in jax.tree.leaves({n: n for n in latents})]
    sources += [_NOTHING] * len(jax.tree.leaves(others))
    lengths = {sizes[dim]}
    if program.binding.layout == "table":
        lengths.add(prod(sizes[d] for d in program.binding.dims))
    results = _read(closed, sources, frozenset(lengths))
    by_site = jax.tree.unflatten(jax.tree.structure(out), results)
    return {name: _joined(parts) for name, parts in by_site.items()}


def ancestors(names: Iterable[str], dependences: Mapping[str, Dependence]) -> set[str]:
    """Collect the sites that some sites are made from, themselves among them."""
    reached: set[str] = set()
    front = set(names)
    while front:
        reached |= front
        parents = (dependences[n].names for n in front if n in dependences)
        front = set().union(*parents) - reached
    return reached


def _joined(parts: Iterable[Dependence]) -> Dependence:
    parts = tuple(parts)
    return Dependence(
        frozenset().union(*(p.names for p in parts)),
        max((p.past for p in parts), default=0),
        max((p.future for p in parts), default=0),
        frozenset().union(*(p.carried for p in parts)),
    )


def _read(program: Any, inputs: Sequence[Dependence], lengths: frozenset[int]) -> list[Dependence]:
    """The dependences of a program's results, recursions being loops of these lengths."""
    jaxpr, _ = open_program(program)
    values: dict[Any, Dependence] = dict(zip(jaxpr.invars, inputs, strict=True))

    def value_of(variable: Any) -> Dependence:
        return _NOTHING if isinstance(variable, Literal) else values.get(variable, _NOTHING)

    for equation in jaxpr.eqns:
        operands = [value_of(v) for v in equation.invars]
        values.update(zip(equation.outvars, _apply(equation, operands, lengths), strict=True))
    return [value_of(v) for v in jaxpr.outvars]


def _apply(equation: Any, operands: list[Dependence], lengths: frozenset[int]) -> list[Dependence]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, operands, lengths)
    if name == "cond":
        branches = [_read(b, operands[1:], lengths) for b in params["branches"]]
        return [_joined([operands[0], *each]) for each in zip(*branches, strict=True)]
    inner = inner_programs(equation)
    taken = [len(open_program(one)[0].invars) for one in inner]
    if taken == [len(operands)] and name != "while":
        results = _read(inner[0], operands, lengths)
        if len(results) == len(equation.outvars):
            return results
    joined = _joined(operands)
    if recursion_length(equation) in lengths:
        joined = _further(joined, bool(params.get("reverse", False)), inf)
    elif any(recursion_lengths(one) & lengths for one in inner):
        # A recursion within an operation that is not known here: both ways, without an end.
        joined = replace(joined, past=inf, future=inf)
    return [joined] * len(equation.outvars)


def _further(dependence: Dependence, reverse: bool, steps: float) -> Dependence:
    """A dependence on so many steps more, ``reverse`` on those that come after."""
    if reverse:
        return replace(dependence, future=_added(dependence.future, steps))
    return replace(dependence, past=_added(dependence.past, steps))


def _added(before: float, steps: float) -> float:
    # A recursion over a recursion: as good as all steps.
    return inf if before and steps else max(before, steps)


def _scan(equation: Any, operands: list[Dependence], lengths: frozenset[int]) -> list[Dependence]:
    """The dependences of a scan's results: its last carry, then what each step gives."""
    try:
        constants, count = scan_counts(equation)
    except LookupError:
        return [replace(_joined(operands), past=inf, future=inf)] * len(equation.outvars)
    (body, _), reverse = open_program(equation.params["jaxpr"]), bool(equation.params["reverse"])
    along = equation.params["length"] in lengths
    leaves, places = _leaves(body, constants, count) if along else ({}, {})
    carry = operands[constants : constants + count]
    while True:
        entering = [
            replace(c, carried=c.carried | {leaves[i]}) if i in leaves else c
            for i, c in enumerate(carry)
        ]
        step = [*operands[:constants], *entering, *operands[constants + count :]]
        out = _read(body, step, lengths)
        bare = [replace(r, carried=r.carried - set(leaves.values())) for r in out]
        after = [_joined([old, new]) for old, new in zip(carry, bare, strict=False)]
        if after == carry:
            break
        carry = after
    steps = _steps_back(body, out, leaves, places)
    last = [
        _further(c, reverse, inf if i in leaves and steps[leaves[i]] else 0)
        for i, c in enumerate(carry)
    ]
    each = [
        _further(r, reverse, max((steps[leaf] for leaf in o.carried if leaf in steps), default=0))
        for r, o in zip(bare[count:], out[count:], strict=True)
    ]
    return [*last, *each]


def _leaves(body: Jaxpr, constants: int, count: int) -> tuple[dict[int, Leaf], dict[Any, Leaf]]:
    """The leaves of a scan's carry by number, and by variable: of NumPyro's, the model's own."""
    numbers = {body.invars[constants + i]: i for i in range(count)}
    marks = [e for e in body.eqns if e.primitive.name == "name" and e.params["name"] == CARRY]
    marked = {e.invars[0]: e.outvars[0] for e in marks if not isinstance(e.invars[0], Literal)}
    leaves = {i: (id(body), i) for v, i in numbers.items() if v in marked or not marks}
    places = {v: leaves[i] for v, i in numbers.items() if i in leaves}
    places |= {marked[v]: leaves[i] for v, i in numbers.items() if i in leaves and v in marked}
    return leaves, places


def _steps_back(
    body: Jaxpr,
    out: Sequence[Dependence],
    leaves: Mapping[int, Leaf],
    places: Mapping[Any, Leaf],
) -> dict[Leaf, float]:
    """How many steps back each leaf of a carry depends; none where it never changes."""
    parents: dict[Leaf, frozenset[Leaf]] = {}
    steps: dict[Leaf, float] = {}
    for i, leaf in leaves.items():
        variable = body.outvars[i]
        parents[leaf] = out[i].carried & set(leaves.values())
        if not isinstance(variable, Literal) and places.get(variable) == leaf:
            steps[leaf] = 0
    left = set(parents) - set(steps)
    while ready := {leaf for leaf in left if parents[leaf] <= set(steps)}:
        for leaf in ready:
            steps[leaf] = 1 + max((steps[parent] for parent in parents[leaf]), default=0)
        left -= ready
    # A leaf that is made from itself depends on all steps.
    return steps | dict.fromkeys(left, inf)
