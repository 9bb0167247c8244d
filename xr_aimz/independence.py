"""Proof that the cells of a program's results are computed each by itself.

The program is traced twice, for the whole and for a block that is shorter along each split
dim. Both traces are read side by side, operation by operation. If they do the same, and nothing
that combines entries along an axis whose length differs reaches a result, then a cell's value
depends neither on another cell nor on which of the two it is computed in. What is not known
here to be safe is not proven, and the first operation that stood in the way is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.extend.core import ClosedJaxpr, Literal

from xr_aimz.axis_rules import (
    CONSTANT,
    RULES,
    NotProvenError,
    Pair,
    Tags,
    joined,
    joined_tags,
)
from xr_aimz.dataflow import inner_programs, open_program, scan_counts
from xr_aimz.fingerprint import operation_fingerprint
from xr_aimz.index_rules import INDEX_RULES

__all__ = ["Obstacle", "find_obstacles"]

_RULES = {**RULES, **INDEX_RULES}
# What a rule raises on an operation that this version of JAX writes down otherwise than it knows.
_SURPRISES = (AttributeError, LookupError, TypeError, ValueError)
_LIBRARIES = tuple(
    str(Path(file).parent) for file in (jax.__file__, numpyro.__file__, np.__file__, __file__)
)


@dataclass(frozen=True)
class Obstacle:
    """What keeps a result from being proven: an operation, and where the model has it."""

    operation: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.operation} ({self.where})" if self.where else self.operation


Proof = Tags | Obstacle


def find_obstacles(
    whole: ClosedJaxpr, block: ClosedJaxpr, given: Sequence[Tags], wanted: Sequence[Tags]
) -> list[Obstacle | None]:
    """
    Read two traces of a program, and find what couples the cells of its results.

    Parameters
    ----------
    whole, block : ClosedJaxpr
        The program for all cells, and for a block that is shorter along each split dim.
    given : sequence of Tags
        Of each argument: the split dim of each axis, None for any other axis.
    wanted : sequence of Tags
        The same of each result.

    Returns
    -------
    list of Obstacle or None
        For each result; None where it is proven.
    """
    try:
        found = _program(whole, block, [tuple(tags) for tags in given])
    except NotProvenError as error:
        return [Obstacle(f"the model {error}")] * len(wanted)
    return [_unmet(own, tags) for own, tags in zip(found, wanted, strict=True)]


def _unmet(own: Proof, wanted: Tags) -> Obstacle | None:
    if isinstance(own, Obstacle):
        return own
    pairs = list(zip(own, wanted, strict=False))
    if len(own) == len(wanted) and all(
        a == b or (a == CONSTANT and b is not None) for a, b in pairs
    ):
        return None
    return Obstacle("a result has its cells along other axes than its site")


def _program(whole: Any, block: Any, given: Sequence[Proof]) -> list[Proof]:
    """The tags of each result of a program with constants, or what stands in its way."""
    (_, first), (_, second) = open_program(whole), open_program(block)
    if len(first) != len(second):
        raise NotProvenError("holds other constants for another number of cells")
    consts = [_constant(a, b) for a, b in zip(first, second, strict=True)]
    return _walk(whole, block, [*consts, *given])


def _constant(whole: Any, block: Any) -> Proof:
    """An array that the program holds: the same for any block, or one number everywhere."""
    if isinstance(whole, jax.Array) and jnp.issubdtype(whole.dtype, jax.dtypes.prng_key):
        whole, block = jax.random.key_data(whole), jax.random.key_data(block)
        return (None,) * (whole.ndim - 1) if _identical(whole, block) else _other_constant()
    whole, block = np.asarray(whole), np.asarray(block)
    if _identical(whole, block):
        return (None,) * whole.ndim
    if whole.dtype == block.dtype and whole.ndim == block.ndim and whole.size and block.size:
        flat = np.concatenate([whole.ravel(), block.ravel()])
        if (flat == flat[0]).all() or np.isnan(flat.astype(complex)).all():
            lengths = zip(whole.shape, block.shape, strict=True)
            return tuple(None if n == m else CONSTANT for n, m in lengths)
    return _other_constant()


def _identical(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _other_constant() -> Obstacle:
    return Obstacle("the model holds another array for another number of cells")


def _walk(whole: Any, block: Any, given: Sequence[Proof]) -> list[Proof]:
    """The same of a program whose constants are among its arguments."""
    (whole, _), (block, _) = open_program(whole), open_program(block)
    known: dict[Any, tuple[Any, Proof]] = {}
    arguments = [*whole.constvars, *whole.invars], [*block.constvars, *block.invars]
    for a, b, proof in zip(*arguments, given, strict=True):
        known[a] = (b, _checked(a, b, proof))
    rest = list(reversed(block.eqns))
    for equation in whole.eqns:
        if _is_stretched(equation, rest[-1] if rest else None, known):
            other, proof = known[equation.invars[0]]
            (stretched,) = equation.outvars
            known[stretched] = (
                other,
                _checked(stretched, other, _constant_along(stretched, other, proof)),
            )
            continue
        if not rest:
            raise NotProvenError("does other work for another number of cells")
        pair = Pair(equation, rest.pop())
        results = _results(pair, known)
        for a, b, proof in zip(pair.whole.outvars, pair.block.outvars, results, strict=True):
            known[a] = (b, _checked(a, b, proof))
    if rest:
        raise NotProvenError("does other work for another number of cells")
    return [_read(a, b, known) for a, b in zip(whole.outvars, block.outvars, strict=True)]


def _is_stretched(equation: Any, following: Any, known: Mapping[Any, tuple[Any, Proof]]) -> bool:
    """Whether the whole stretches an axis of length 1 which, in a block of one, is long enough."""
    if equation.primitive.name != "broadcast_in_dim" or isinstance(equation.invars[0], Literal):
        return False
    (out,), other = equation.outvars, known[equation.invars[0]][0]
    same_axes = equation.params["broadcast_dimensions"] == tuple(range(len(out.aval.shape)))
    if not same_axes or len(other.aval.shape) != len(out.aval.shape):
        return False
    lengths = zip(equation.invars[0].aval.shape, out.aval.shape, other.aval.shape, strict=True)
    is_long_enough = all(n == m or (n, k) == (1, 1) for n, m, k in lengths)
    as_well = (
        following is not None
        and following.primitive is equation.primitive
        and following.invars[0] is other
    )
    return is_long_enough and not as_well


def _constant_along(a: Any, b: Any, proof: Proof) -> Proof:
    if isinstance(proof, Obstacle):
        return proof
    lengths = zip(a.aval.shape, b.aval.shape, proof, strict=True)
    return tuple(CONSTANT if tag is None and n != m else tag for n, m, tag in lengths)


def _results(pair: Pair, known: Mapping[Any, tuple[Any, Proof]]) -> Sequence[Proof]:
    """The tags of an operation's results. What is not proven may not matter, if unread."""
    whole, block = pair
    name = whole.primitive.name
    if whole.primitive is not block.primitive or len(whole.invars) != len(block.invars):
        raise NotProvenError("does other work for another number of cells")
    operands = [_read(a, b, known) for a, b in zip(whole.invars, block.invars, strict=True)]
    try:
        apply = _PROGRAMS.get(name, _operation)
        found = apply(pair, operands)
    except NotProvenError as error:
        found = [Obstacle(f"`{name}` {error}")] * len(whole.outvars)
    except _SURPRISES:
        found = [Obstacle(f"`{name}` is not known well enough")] * len(whole.outvars)
    return [_placed(proof, whole) for proof in found]


def _operation(pair: Pair, operands: Sequence[Proof]) -> Sequence[Proof]:
    """Of an operation that calls no program, or one of those that combine two numbers."""
    if any(isinstance(operand, Obstacle) for operand in operands):
        return [_first_obstacle(operands)] * len(pair.whole.outvars)
    tags = [operand for operand in operands if not isinstance(operand, Obstacle)]
    rule = _RULES.get(pair.whole.primitive.name, _unknown)
    try:
        return rule(pair, tags)
    except (NotProvenError, *_SURPRISES):
        if _is_shared(pair, tags):
            return [(None,) * len(out.aval.shape) for out in pair.whole.outvars]
        raise


def _unknown(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    raise NotProvenError("is not known to keep cells apart")


def _is_shared(pair: Pair, tags: Sequence[Tags]) -> bool:
    """Whether an operation takes nothing of cells: then it is one and the same in both traces."""
    if any(tag is not None for own in tags for tag in own) or pair.whole.effects:
        return False
    shapes = [[out.aval.shape for out in equation.outvars] for equation in pair]
    return shapes[0] == shapes[1] and (
        operation_fingerprint(pair.whole) == operation_fingerprint(pair.block)
    )


def _first_obstacle(operands: Sequence[Proof]) -> Obstacle:
    return next(operand for operand in operands if isinstance(operand, Obstacle))


def _read(a: Any, b: Any, known: Mapping[Any, tuple[Any, Proof]]) -> Proof:
    if isinstance(a, Literal) and isinstance(b, Literal) and a.aval.dtype == b.aval.dtype:  # type: ignore[attr-defined] # of arrays
        return _constant(a.val, b.val)
    if isinstance(a, Literal) or isinstance(b, Literal):
        return Obstacle("the model reads other numbers for another number of cells")
    other, proof = known[a]
    return proof if other is b else Obstacle("the model reads others of its values")


def _checked(a: Any, b: Any, proof: Proof) -> Proof:
    """Tags that say of exactly those axes that they differ which do."""
    if isinstance(proof, Obstacle):
        return proof
    if a.aval.dtype != b.aval.dtype or len(proof) != len(a.aval.shape):
        return Obstacle("a value has another dtype or rank for another number of cells")
    lengths = zip(a.aval.shape, b.aval.shape, proof, strict=True)
    if all((n == m) == (tag is None) for n, m, tag in lengths):
        return proof
    return Obstacle("an axis of a value has another length than its cells")


def _placed(proof: Proof, equation: Any) -> Proof:
    """An obstacle with the line of the model that has it, the innermost that is known."""
    if not isinstance(proof, Obstacle) or proof.where:
        return proof
    traceback = getattr(equation.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith(_LIBRARIES) and frame.line_num:
            where = f"{Path(frame.file_name).name}:{frame.line_num} in {frame.function_name}"
            return replace(proof, where=where)
    return proof


def _called(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    """Of an operation that calls one program on all its arguments."""
    whole, block = (inner_programs(equation)[0] for equation in pair)
    return _program(whole, block, operands)


def _of_slice(pair: Pair, operands: Sequence[Proof]) -> Sequence[Proof]:
    """Of a slice that starts where values say; along an axis taken whole, it starts at 0."""
    update = pair.whole.primitive.name == "dynamic_update_slice"
    taken = pair.shapes("invars", 1) if update else pair.param("slice_sizes")
    lengths = zip(*pair.shapes("invars"), *taken, strict=True)
    whole = [(n, m) == (k, j) for n, m, k, j in lengths]
    arrays, starts = operands[: 1 + update], operands[1 + update :]
    needed = [() if free else start for free, start in zip(whole, starts, strict=True)]
    return _operation(pair, [*arrays, *needed])


def _of_cond(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    decides, arguments = operands[0], operands[1:]
    if isinstance(decides, Obstacle):
        return [_decided(decides)] * len(pair.whole.outvars)
    branches = zip(*pair.param("branches"), strict=True)
    results = [_program(whole, block, arguments) for whole, block in branches]
    return [_any_of(each) for each in zip(*results, strict=True)]


def _decided(obstacle: Obstacle) -> Obstacle:
    return replace(obstacle, operation=f"cells decide a branch together: {obstacle.operation}")


def _any_of(proofs: Sequence[Proof]) -> Proof:
    """Of a value that is one of several."""
    if any(isinstance(proof, Obstacle) for proof in proofs):
        return _first_obstacle(proofs)
    tags = [proof for proof in proofs if not isinstance(proof, Obstacle)]
    found = tags[0]
    for own in tags[1:]:
        found = joined_tags(found, own)
    return found


def _of_scan(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    constants, carried = scan_counts(pair.whole)
    fixed, carry = operands[:constants], operands[constants : constants + carried]
    slices = operands[constants + carried :]
    pair.same("reverse")
    walk = partial(_program, *pair.param("jaxpr"))
    lead = _step_axis(pair, slices)
    if lead is not None:
        _check_carry_stays(pair, constants, carried)
    each_step = [s if isinstance(s, Obstacle) else s[1:] for s in slices]
    carry, results = _settled(lambda now: walk([*fixed, *now, *each_step]), list(carry))
    stacked = [r if isinstance(r, Obstacle) else (lead, *r) for r in results[carried:]]
    return [*carry, *stacked]


def _step_axis(pair: Pair, slices: Sequence[Proof]) -> Any:
    """The tag of the axis that a scan goes along: None, or that of cells, one a step."""
    lengths = pair.param("length")
    leads = [own[0] for own in slices if not isinstance(own, Obstacle)]
    if lengths[0] == lengths[1]:
        return None
    tag: Any = CONSTANT
    for lead in leads:
        tag = joined(tag, lead)
    return tag


def _check_carry_stays(pair: Pair, constants: int, carried: int) -> None:
    """A scan along cells passes nothing on from one to the next."""
    for program in pair.param("jaxpr"):
        jaxpr, _ = open_program(program)
        if jaxpr.outvars[:carried] != jaxpr.invars[constants : constants + carried]:
            raise NotProvenError("carries a value from cell to cell")


def _settled(step: Any, carry: list[Proof]) -> tuple[list[Proof], list[Proof]]:
    """What a loop carries once another step adds no tag to it, and the step's results."""
    while True:
        results = step(carry)
        after = [_any_of(both) for both in zip(carry, results, strict=False)]
        if after == carry:
            return carry, results
        carry = after


def _of_while(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    pair.same("cond_nconsts", "body_nconsts")
    first, second = (pair.whole.params[n] for n in ("cond_nconsts", "body_nconsts"))
    of_condition, of_body = operands[:first], operands[first : first + second]
    body = partial(_program, *pair.param("body_jaxpr"))
    carry, _ = _settled(lambda now: body([*of_body, *now]), list(operands[first + second :]))
    (decides,) = _program(*pair.param("cond_jaxpr"), [*of_condition, *carry])
    if isinstance(decides, Obstacle):
        return [_decided(decides)] * len(carry)
    # A condition with axes is that of a mapped loop, which leaves a cell alone once it is done.
    return [_led(proof, decides) for proof in carry]


def _led(proof: Proof, lead: Tags) -> Proof:
    if isinstance(proof, Obstacle):
        return proof
    return (*joined_tags(proof[: len(lead)], lead), *proof[len(lead) :])


def _of_linear_solve(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    """A system of equations, by the program that solves it."""
    lengths = pair.whole.params["const_lengths"]
    if tuple(lengths) != tuple(pair.block.params["const_lengths"]):
        raise NotProvenError("holds other constants for another number of cells")
    start = lengths.matvec + lengths.vecmat
    sides = operands[sum(lengths) :]
    whole, block = (params.solve for params in pair.param("jaxprs"))
    return _program(whole, block, [*operands[start : start + lengths.solve], *sides])


_CALLS = (
    *("call", "checkpoint", "closed_call", "composite", "core_call", "custom_jvp_call"),
    *("custom_vjp_call", "jit", "pjit", "remat", "remat2"),
)
_PROGRAMS: dict[str, Callable[[Pair, Sequence[Proof]], Sequence[Proof]]] = {
    **dict.fromkeys(_CALLS, _called),
    "cond": _of_cond,
    "custom_linear_solve": _of_linear_solve,
    "dynamic_slice": _of_slice,
    "dynamic_update_slice": _of_slice,
    "scan": _of_scan,
    "while": _of_while,
}
