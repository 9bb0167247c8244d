"""Prove that the cells of a program's results are computed independently of each other.

The program is traced twice, for the whole and for a block that is shorter along each split
dim. Both traces are compared, operation by operation. If they do the same, and nothing
that combines entries along an axis whose length differs reaches a result, then a cell's value
depends neither on another cell nor on which of the two it is computed in. An operation without
a rule that shows it to be safe is not proven, and the first such operation is named.
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

from xr_aimz.tracing.axis_rules import (
    CONSTANT,
    RULES,
    NotProvenError,
    Pair,
    Tags,
    join_all_tags,
    join_tags,
)
from xr_aimz.tracing.dataflow import inner_programs, scan_counts, split_constants
from xr_aimz.tracing.fingerprint import operation_fingerprint
from xr_aimz.tracing.index_rules import INDEX_RULES

_RULES = {**RULES, **INDEX_RULES}
# Errors of a rule on an operation whose parameters differ in this version of JAX.
_VERSION_ERRORS = (AttributeError, LookupError, TypeError, ValueError)
_LIBRARY_FOLDERS = tuple(
    str(folder)
    for folder in (
        *(Path(str(library.__file__)).parent for library in (jax, numpyro, np)),
        Path(__file__).parents[1],
    )
)


@dataclass(frozen=True)
class Obstacle:
    """Operation that keeps a result from being proven, and its location in the model."""

    operation: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.operation} ({self.where})" if self.where else self.operation


Proof = Tags | Obstacle


def find_obstacles(
    full: ClosedJaxpr, block: ClosedJaxpr, arguments: Sequence[Tags], results: Sequence[Tags]
) -> list[Obstacle | None]:
    """
    Compare two traces of a program, and find the operations that couple the cells of its results.

    Parameters
    ----------
    full, block : ClosedJaxpr
        The program for all cells, and for a block that is shorter along each split dim.
    arguments : sequence of Tags
        For each argument the split dim of each axis, None for any other axis.
    results : sequence of Tags
        The same for each result.

    Returns
    -------
    list of Obstacle or None
        For each result; None where it is proven.
    """
    try:
        proofs = _prove_program(full, block, [tuple(tags) for tags in arguments])
    except NotProvenError as error:
        return [Obstacle(f"the model {error}")] * len(results)
    return [_compare_tags(proof, tags) for proof, tags in zip(proofs, results, strict=True)]


def _compare_tags(proof: Proof, expected: Tags) -> Obstacle | None:
    if isinstance(proof, Obstacle):
        return proof
    pairs = list(zip(proof, expected, strict=False))
    if len(proof) == len(expected) and all(
        a == b or (a == CONSTANT and b is not None) for a, b in pairs
    ):
        return None
    return Obstacle("a result has its cells along other axes than its site")


def _prove_program(full: Any, block: Any, arguments: Sequence[Proof]) -> list[Proof]:
    """Tags of each result of a program with constants, or the obstacle to its proof."""
    (_, first), (_, second) = split_constants(full), split_constants(block)
    if len(first) != len(second):
        raise NotProvenError("has other constants for another number of cells")
    consts = [_prove_constant(a, b) for a, b in zip(first, second, strict=True)]
    return _prove_equations(full, block, [*consts, *arguments])


def _prove_constant(full: Any, block: Any) -> Proof:
    """Tags of a constant array: the same for any block, or one number everywhere."""
    if isinstance(full, jax.Array) and jnp.issubdtype(full.dtype, jax.dtypes.prng_key):
        full, block = jax.random.key_data(full), jax.random.key_data(block)
        return (None,) * (full.ndim - 1) if _identical(full, block) else _constant_obstacle()
    full, block = np.asarray(full), np.asarray(block)
    if _identical(full, block):
        return (None,) * full.ndim
    if full.dtype == block.dtype and full.ndim == block.ndim and full.size and block.size:
        flat = np.concatenate([full.ravel(), block.ravel()])
        if (flat == flat[0]).all() or np.isnan(flat.astype(complex)).all():
            lengths = zip(full.shape, block.shape, strict=True)
            return tuple(None if n == m else CONSTANT for n, m in lengths)
    return _constant_obstacle()


def _identical(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _constant_obstacle() -> Obstacle:
    return Obstacle("the model has another constant array for another number of cells")


def _prove_equations(full: Any, block: Any, proofs: Sequence[Proof]) -> list[Proof]:
    """Tags of each result of a program whose constants are among its arguments, or obstacles."""
    (full, _), (block, _) = split_constants(full), split_constants(block)
    values: dict[Any, tuple[Any, Proof]] = {}
    arguments = [*full.constvars, *full.invars], [*block.constvars, *block.invars]
    for a, b, proof in zip(*arguments, proofs, strict=True):
        values[a] = (b, _check_lengths(a, b, proof))
    block_equations = list(reversed(block.eqns))
    for equation in full.eqns:
        if _is_stretched(equation, block_equations[-1] if block_equations else None, values):
            other, proof = values[equation.invars[0]]
            (stretched,) = equation.outvars
            values[stretched] = (
                other,
                _check_lengths(stretched, other, _constant_along(stretched, other, proof)),
            )
            continue
        if not block_equations:
            raise NotProvenError("does other work for another number of cells")
        pair = Pair(equation, block_equations.pop())
        results = _prove_results(pair, values)
        for a, b, proof in zip(pair.full.outvars, pair.block.outvars, results, strict=True):
            values[a] = (b, _check_lengths(a, b, proof))
    if block_equations:
        raise NotProvenError("does other work for another number of cells")
    return [
        _proof_of_operand(a, b, values) for a, b in zip(full.outvars, block.outvars, strict=True)
    ]


def _is_stretched(equation: Any, following: Any, values: Mapping[Any, tuple[Any, Proof]]) -> bool:
    """Return whether only the whole stretches an axis of length 1: a block of one need not."""
    if equation.primitive.name != "broadcast_in_dim" or isinstance(equation.invars[0], Literal):
        return False
    (out,), other = equation.outvars, values[equation.invars[0]][0]
    same_axes = equation.params["broadcast_dimensions"] == tuple(range(len(out.aval.shape)))
    if not same_axes or len(other.aval.shape) != len(out.aval.shape):
        return False
    lengths = zip(equation.invars[0].aval.shape, out.aval.shape, other.aval.shape, strict=True)
    is_long_enough = all(n == m or (n, k) == (1, 1) for n, m, k in lengths)
    block_stretches = (
        following is not None
        and following.primitive is equation.primitive
        and following.invars[0] is other
    )
    return is_long_enough and not block_stretches


def _constant_along(a: Any, b: Any, proof: Proof) -> Proof:
    if isinstance(proof, Obstacle):
        return proof
    lengths = zip(a.aval.shape, b.aval.shape, proof, strict=True)
    return tuple(CONSTANT if tag is None and n != m else tag for n, m, tag in lengths)


def _prove_results(pair: Pair, values: Mapping[Any, tuple[Any, Proof]]) -> Sequence[Proof]:
    """Tags of the results of an operation. An obstacle does not matter if it is never read."""
    full, block = pair
    name = full.primitive.name
    if full.primitive is not block.primitive or len(full.invars) != len(block.invars):
        raise NotProvenError("does other work for another number of cells")
    operands = [
        _proof_of_operand(a, b, values) for a, b in zip(full.invars, block.invars, strict=True)
    ]
    try:
        apply = _PROGRAMS.get(name, _apply_rule)
        proofs = apply(pair, operands)
    except NotProvenError as error:
        proofs = [Obstacle(f"`{name}` {error}")] * len(full.outvars)
    except _VERSION_ERRORS:
        proofs = [Obstacle(f"`{name}` has no rule for these parameters")] * len(full.outvars)
    return [_with_location(proof, full) for proof in proofs]


def _apply_rule(pair: Pair, operands: Sequence[Proof]) -> Sequence[Proof]:
    """Apply the rule of an operation with no inner program, or one that combines two numbers."""
    if any(isinstance(operand, Obstacle) for operand in operands):
        return [_first_obstacle(operands)] * len(pair.full.outvars)
    tags = [operand for operand in operands if not isinstance(operand, Obstacle)]
    rule = _RULES.get(pair.full.primitive.name, _raise_unknown)
    try:
        return rule(pair, tags)
    except (NotProvenError, *_VERSION_ERRORS):
        if _is_shared(pair, tags):
            return [(None,) * len(out.aval.shape) for out in pair.full.outvars]
        raise


def _raise_unknown(pair: Pair, operands: Sequence[Tags]) -> Sequence[Tags]:
    raise NotProvenError("is not known to keep cells independent")


def _is_shared(pair: Pair, tags: Sequence[Tags]) -> bool:
    """Return whether an operation reads no cells, and is the same in both traces."""
    if any(tag is not None for operand_tags in tags for tag in operand_tags) or pair.full.effects:
        return False
    shapes = [[out.aval.shape for out in equation.outvars] for equation in pair]
    return shapes[0] == shapes[1] and (
        operation_fingerprint(pair.full) == operation_fingerprint(pair.block)
    )


def _first_obstacle(operands: Sequence[Proof]) -> Obstacle:
    return next(operand for operand in operands if isinstance(operand, Obstacle))


def _proof_of_operand(a: Any, b: Any, values: Mapping[Any, tuple[Any, Proof]]) -> Proof:
    if isinstance(a, Literal) and isinstance(b, Literal) and a.aval.dtype == b.aval.dtype:  # type: ignore[attr-defined] # of arrays
        return _prove_constant(a.val, b.val)
    if isinstance(a, Literal) or isinstance(b, Literal):
        return Obstacle("the model uses different numbers in a block")
    other, proof = values[a]
    return proof if other is b else Obstacle("the model uses different values in a block")


def _check_lengths(a: Any, b: Any, proof: Proof) -> Proof:
    """Return the tags if exactly the axes whose lengths differ are tagged, else an Obstacle."""
    if isinstance(proof, Obstacle):
        return proof
    if a.aval.dtype != b.aval.dtype or len(proof) != len(a.aval.shape):
        return Obstacle("a value has another dtype or rank for another number of cells")
    lengths = zip(a.aval.shape, b.aval.shape, proof, strict=True)
    if all((n == m) == (tag is None) for n, m, tag in lengths):
        return proof
    return Obstacle("an axis of a value has another length than its cells")


def _with_location(proof: Proof, equation: Any) -> Proof:
    """Add to an obstacle the innermost line of the model that is known."""
    if not isinstance(proof, Obstacle) or proof.where:
        return proof
    traceback = getattr(equation.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith(_LIBRARY_FOLDERS) and frame.line_num:
            where = f"{Path(frame.file_name).name}:{frame.line_num} in {frame.function_name}"
            return replace(proof, where=where)
    return proof


def _prove_call(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    """Tags of the results of an operation that calls one program on all its arguments."""
    full, block = (inner_programs(equation)[0] for equation in pair)
    return _prove_program(full, block, operands)


def _prove_slice(pair: Pair, operands: Sequence[Proof]) -> Sequence[Proof]:
    """Tags of a slice whose start is computed; along an axis that it covers, the start is 0."""
    update = pair.full.primitive.name == "dynamic_update_slice"
    sizes = pair.shapes("invars", 1) if update else pair.param("slice_sizes")
    lengths = zip(*pair.shapes("invars"), *sizes, strict=True)
    is_full = [(n, m) == (k, j) for n, m, k, j in lengths]
    arrays, starts = operands[: 1 + update], operands[1 + update :]
    needed_starts = [() if full else start for full, start in zip(is_full, starts, strict=True)]
    return _apply_rule(pair, [*arrays, *needed_starts])


def _prove_cond(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    predicate, arguments = operands[0], operands[1:]
    if isinstance(predicate, Obstacle):
        return [_branch_obstacle(predicate)] * len(pair.full.outvars)
    branches = zip(*pair.param("branches"), strict=True)
    results = [_prove_program(full, block, arguments) for full, block in branches]
    return [_join_proofs(alternatives) for alternatives in zip(*results, strict=True)]


def _branch_obstacle(obstacle: Obstacle) -> Obstacle:
    return replace(obstacle, operation=f"cells decide a branch together: {obstacle.operation}")


def _join_proofs(proofs: Sequence[Proof]) -> Proof:
    """Join the tags of several values of which one is used."""
    if any(isinstance(proof, Obstacle) for proof in proofs):
        return _first_obstacle(proofs)
    tags = [proof for proof in proofs if not isinstance(proof, Obstacle)]
    joined = tags[0]
    for other in tags[1:]:
        joined = join_all_tags(joined, other)
    return joined


def _prove_scan(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    constants, carried = scan_counts(pair.full)
    fixed, carry = operands[:constants], operands[constants : constants + carried]
    slices = operands[constants + carried :]
    pair.same("reverse")
    body = partial(_prove_program, *pair.param("jaxpr"))
    lead = _step_axis_tag(pair, slices)
    if lead is not None:
        _check_carry_stays(pair, constants, carried)
    steps = [s if isinstance(s, Obstacle) else s[1:] for s in slices]
    carry, results = _iterate(lambda state: body([*fixed, *state, *steps]), list(carry))
    stacked = [r if isinstance(r, Obstacle) else (lead, *r) for r in results[carried:]]
    return [*carry, *stacked]


def _step_axis_tag(pair: Pair, slices: Sequence[Proof]) -> Any:
    """Return the tag of the axis that a scan runs along: None, or that of cells, one a step."""
    lengths = pair.param("length")
    leads = [proof[0] for proof in slices if not isinstance(proof, Obstacle)]
    if lengths[0] == lengths[1]:
        return None
    tag: Any = CONSTANT
    for lead in leads:
        tag = join_tags(tag, lead)
    return tag


def _check_carry_stays(pair: Pair, constants: int, carried: int) -> None:
    """Raise NotProvenError if a scan along cells passes a value from one to the next."""
    for program in pair.param("jaxpr"):
        jaxpr, _ = split_constants(program)
        if jaxpr.outvars[:carried] != jaxpr.invars[constants : constants + carried]:
            raise NotProvenError("carries a value from cell to cell")


def _iterate(step: Any, carry: list[Proof]) -> tuple[list[Proof], list[Proof]]:
    """Repeat a step until its carry gets no more tags; return the carry and the step's results."""
    while True:
        results = step(carry)
        after = [_join_proofs(proofs) for proofs in zip(carry, results, strict=False)]
        if after == carry:
            return carry, results
        carry = after


def _prove_while(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    pair.same("cond_nconsts", "body_nconsts")
    n_cond, n_body = (pair.full.params[n] for n in ("cond_nconsts", "body_nconsts"))
    of_condition, of_body = operands[:n_cond], operands[n_cond : n_cond + n_body]
    body = partial(_prove_program, *pair.param("body_jaxpr"))
    carry, _ = _iterate(lambda state: body([*of_body, *state]), list(operands[n_cond + n_body :]))
    (predicate,) = _prove_program(*pair.param("cond_jaxpr"), [*of_condition, *carry])
    if isinstance(predicate, Obstacle):
        return [_branch_obstacle(predicate)] * len(carry)
    # A condition with axes is that of a mapped loop, which leaves a cell alone once it is done.
    return [_join_leading(proof, predicate) for proof in carry]


def _join_leading(proof: Proof, lead: Tags) -> Proof:
    if isinstance(proof, Obstacle):
        return proof
    return (*join_all_tags(proof[: len(lead)], lead), *proof[len(lead) :])


def _prove_linear_solve(pair: Pair, operands: Sequence[Proof]) -> list[Proof]:
    """Tags of a system of equations, from the program that solves it."""
    lengths = pair.full.params["const_lengths"]
    if tuple(lengths) != tuple(pair.block.params["const_lengths"]):
        raise NotProvenError("has other constants for another number of cells")
    start = lengths.matvec + lengths.vecmat
    sides = operands[sum(lengths) :]
    full, block = (params.solve for params in pair.param("jaxprs"))
    return _prove_program(full, block, [*operands[start : start + lengths.solve], *sides])


_CALLS = (
    *("call", "checkpoint", "closed_call", "composite", "core_call", "custom_jvp_call"),
    *("custom_vjp_call", "jit", "pjit", "remat", "remat2"),
)
_PROGRAMS: dict[str, Callable[[Pair, Sequence[Proof]], Sequence[Proof]]] = {
    **dict.fromkeys(_CALLS, _prove_call),
    "cond": _prove_cond,
    "custom_linear_solve": _prove_linear_solve,
    "dynamic_slice": _prove_slice,
    "dynamic_update_slice": _prove_slice,
    "scan": _prove_scan,
    "while": _prove_while,
}
