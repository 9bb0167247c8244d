"""Find recursions along a dimension, and check that labels are in the order they need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import jax
import numpy as np
import pandas as pd
from jax.extend.core import Jaxpr, Literal

from xr_aimz.binding import AlignedInputs, block_of
from xr_aimz.errors import LabelError
from xr_aimz.fits import Fit, labels_at_fit
from xr_aimz.kernel import (
    BlockData,
    DrawState,
    KernelSpec,
    condition_key,
    distributions,
    known_key,
)
from xr_aimz.tracing import (
    CARRY,
    MarkedCarry,
    Site,
    inner_programs,
    recursion_length,
    recursion_lengths,
    scan_counts,
    split_constants,
    trace_lock,
)

# The body of a scan and the number of a leaf of its carry.
Leaf = tuple[int, int]


@dataclass(frozen=True)
class Dependence:
    """Sites and steps along a dimension on which a value depends.

    Parameters
    ----------
    names : frozenset of str
        Sites, at the label of the value or at others.
    past, future : float
        Number of steps before and after its label that the value depends on, infinity for all
        of them. A number is exact: given the sites' values at so many steps, the value depends
        on nothing beyond.
    carried : frozenset
        Leaves of the carries of the enclosing scans, while these are traversed.
    """

    names: frozenset[str] = frozenset()
    past: float = 0
    future: float = 0
    carried: frozenset[Leaf] = frozenset()


_NO_DEPENDENCE = Dependence()


def find_dependences(
    program: KernelSpec,
    sizes: Mapping[str, int],
    dim: str,
    draw: DrawState,
    shared: BlockData,
) -> dict[str, Dependence]:
    """Find what each of ``program.returns`` depends on along a dimension.

    Parameters
    ----------
    program : KernelSpec
    sizes : mapping of dim to int
        A scan as long as ``dim`` is taken for one along it, so no other dim should have its size.
    dim : str
        An observation dimension.
    draw, shared : DrawState, BlockData
        Of jax.ShapeDtypeStruct; ``draw.latents`` has every site that is sampled.

    Returns
    -------
    dict of Dependence
    """
    call = distributions(replace(program, model=MarkedCarry(program.model)), sizes)
    latents = dict(draw.latents)

    def leaves(latents: Any, keys: Any, shared: Any) -> dict[str, Any]:
        distributions_by_site = call(DrawState(keys, latents), shared)
        return {name: jax.tree.leaves(fn) for name, fn in distributions_by_site.items()}

    others = (draw.keys, shared)
    with trace_lock(block_of(program.binding, sizes)):
        closed, out = jax.make_jaxpr(leaves, return_shape=True)(latents, *others)
    sources = [Dependence(frozenset({n})) for n in jax.tree.leaves({n: n for n in latents})]
    sources += [_NO_DEPENDENCE] * len(jax.tree.leaves(others))
    lengths = {sizes[dim]}
    if program.binding.layout == "table":
        lengths.add(prod(sizes[d] for d in program.binding.dims))
    results = _propagate(closed, sources, frozenset(lengths))
    by_site = jax.tree.unflatten(jax.tree.structure(out), results)
    return {name: _join(parts) for name, parts in by_site.items()}


def collect_ancestors(names: Iterable[str], dependences: Mapping[str, Dependence]) -> set[str]:
    """Collect the sites that some sites depend on, including these."""
    reached: set[str] = set()
    front = set(names)
    while front:
        reached |= front
        parents = (dependences[n].names for n in front if n in dependences)
        front = set().union(*parents) - reached
    return reached


def _join(parts: Iterable[Dependence]) -> Dependence:
    parts = tuple(parts)
    return Dependence(
        frozenset().union(*(p.names for p in parts)),
        max((p.past for p in parts), default=0),
        max((p.future for p in parts), default=0),
        frozenset().union(*(p.carried for p in parts)),
    )


def _propagate(
    program: Any, inputs: Sequence[Dependence], lengths: frozenset[int]
) -> list[Dependence]:
    """Propagate dependences through a program; a loop of one of ``lengths`` is a recursion."""
    jaxpr, _ = split_constants(program)
    values: dict[Any, Dependence] = dict(zip(jaxpr.invars, inputs, strict=True))

    def value_of(variable: Any) -> Dependence:
        return (
            _NO_DEPENDENCE
            if isinstance(variable, Literal)
            else values.get(variable, _NO_DEPENDENCE)
        )

    for equation in jaxpr.eqns:
        operands = [value_of(v) for v in equation.invars]
        values.update(
            zip(equation.outvars, _propagate_equation(equation, operands, lengths), strict=True)
        )
    return [value_of(v) for v in jaxpr.outvars]


def _propagate_equation(
    equation: Any, operands: list[Dependence], lengths: frozenset[int]
) -> list[Dependence]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _propagate_scan(equation, operands, lengths)
    if name == "cond":
        branches = [_propagate(b, operands[1:], lengths) for b in params["branches"]]
        return [_join([operands[0], *parts]) for parts in zip(*branches, strict=True)]
    inner = inner_programs(equation)
    n_inputs = [len(split_constants(program)[0].invars) for program in inner]
    if n_inputs == [len(operands)] and name != "while":
        results = _propagate(inner[0], operands, lengths)
        if len(results) == len(equation.outvars):
            return results
    joined = _join(operands)
    if recursion_length(equation) in lengths:
        joined = _extend(joined, bool(params.get("reverse", False)), inf)
    elif any(recursion_lengths(program) & lengths for program in inner):
        # A recursion within an unknown operation: it depends on all steps, in both directions.
        joined = replace(joined, past=inf, future=inf)
    return [joined] * len(equation.outvars)


def _extend(dependence: Dependence, reverse: bool, steps: float) -> Dependence:
    """Extend a dependence by a number of steps, to later ones if ``reverse``."""
    if reverse:
        return replace(dependence, future=_add_steps(dependence.future, steps))
    return replace(dependence, past=_add_steps(dependence.past, steps))


def _add_steps(old_steps: float, steps: float) -> float:
    # A recursion over a recursion counts as a dependence on all steps.
    return inf if old_steps and steps else max(old_steps, steps)


def _propagate_scan(
    equation: Any, operands: list[Dependence], lengths: frozenset[int]
) -> list[Dependence]:
    """Propagate dependences through a scan: to its last carry, then to its outputs per step."""
    try:
        constants, count = scan_counts(equation)
    except LookupError:
        return [replace(_join(operands), past=inf, future=inf)] * len(equation.outvars)
    (body, _), reverse = (
        split_constants(equation.params["jaxpr"]),
        bool(equation.params["reverse"]),
    )
    is_along_dim = equation.params["length"] in lengths
    leaves, leaf_of = _find_carry_leaves(body, constants, count) if is_along_dim else ({}, {})
    carry = operands[constants : constants + count]
    while True:
        entering = [
            replace(c, carried=c.carried | {leaves[i]}) if i in leaves else c
            for i, c in enumerate(carry)
        ]
        body_inputs = [*operands[:constants], *entering, *operands[constants + count :]]
        out = _propagate(body, body_inputs, lengths)
        unmarked = [replace(r, carried=r.carried - set(leaves.values())) for r in out]
        next_carry = [_join([old, new]) for old, new in zip(carry, unmarked, strict=False)]
        if next_carry == carry:
            break
        carry = next_carry
    steps = _count_steps_back(body, out, leaves, leaf_of)
    last_carry = [
        _extend(c, reverse, inf if i in leaves and steps[leaves[i]] else 0)
        for i, c in enumerate(carry)
    ]
    per_step = [
        _extend(r, reverse, max((steps[leaf] for leaf in o.carried if leaf in steps), default=0))
        for r, o in zip(unmarked[count:], out[count:], strict=True)
    ]
    return [*last_carry, *per_step]


def _find_carry_leaves(
    body: Jaxpr, constants: int, count: int
) -> tuple[dict[int, Leaf], dict[Any, Leaf]]:
    """Return the leaves of a scan's carry by number and by variable, without NumPyro's own."""
    numbers = {body.invars[constants + i]: i for i in range(count)}
    marks = [e for e in body.eqns if e.primitive.name == "name" and e.params["name"] == CARRY]
    marked = {e.invars[0]: e.outvars[0] for e in marks if not isinstance(e.invars[0], Literal)}
    leaves = {i: (id(body), i) for v, i in numbers.items() if v in marked or not marks}
    leaf_of = {v: leaves[i] for v, i in numbers.items() if i in leaves}
    leaf_of |= {marked[v]: leaves[i] for v, i in numbers.items() if i in leaves and v in marked}
    return leaves, leaf_of


def _count_steps_back(
    body: Jaxpr,
    out: Sequence[Dependence],
    leaves: Mapping[int, Leaf],
    leaf_of: Mapping[Any, Leaf],
) -> dict[Leaf, float]:
    """Return how many steps back each leaf of a carry depends; 0 where it never changes."""
    parents: dict[Leaf, frozenset[Leaf]] = {}
    steps: dict[Leaf, float] = {}
    for i, leaf in leaves.items():
        variable = body.outvars[i]
        parents[leaf] = out[i].carried & set(leaves.values())
        if not isinstance(variable, Literal) and leaf_of.get(variable) == leaf:
            steps[leaf] = 0
    remaining = set(parents) - set(steps)
    while ready := {leaf for leaf in remaining if parents[leaf] <= set(steps)}:
        for leaf in ready:
            steps[leaf] = 1 + max((steps[parent] for parent in parents[leaf]), default=0)
        remaining -= ready
    # A leaf that depends on itself depends on all steps.
    return steps | dict.fromkeys(remaining, inf)


Labels = pd.Index | None


def check_positions(fit: Fit, inputs: AlignedInputs, latents: Collection[str]) -> None:
    """Refuse draws that are selected by position, on labels other than those of the fit.

    Parameters
    ----------
    fit : Fit
    inputs : AlignedInputs
    latents : collection of str
        The latent sites that have draws.

    Raises
    ------
    LabelError
    """
    for name in latents:
        site = fit.sites[name]
        for dim in sorted(site.lengths):
            if _has_fit_labels(fit, inputs, dim):
                continue
            dims = [d for d in site.dataset_dims if d not in fit.binding.block_dims]
            differs = _describe_difference(inputs.labels.get(dim), labels_at_fit(fit, dim))
            raise LabelError(
                f"latent site {name!r} has dims {dims!r} of its own, whose length the model makes "
                f"from that of {dim!r}: its draws belong to the labels of {dim!r} at the fit, in "
                f"their order, and {differs}. Predict on the labels of the fit and select from "
                "the result, or give the site a value for each label: with "
                f"xr_aimz.plate({dim!r})"
            )


def check_recursions(
    fit: Fit,
    inputs: AlignedInputs,
    returned: Collection[str],
    sampled: Collection[str],
    find: Callable[[str], Mapping[str, Dependence]],
) -> None:
    """Refuse a recursion that would restart, or take other steps than at the fit.

    Parameters
    ----------
    fit : Fit
    inputs : AlignedInputs
        With the values of conditioned sites.
    returned, sampled : collection of str
        The sites that are returned; those that are sampled, or whose densities are computed.
    find : callable
        Function from a dim to the dependences of sites along it. Called where the labels are not
        the fit's.

    Raises
    ------
    LabelError
    """
    for dim in fit.binding.dims:
        if _has_fit_labels(fit, inputs, dim):
            continue
        begins, ends = _begins_like_fit(fit, inputs, dim), _ends_like_fit(fit, inputs, dim)
        dependences = {} if begins and ends else find(dim)
        relevant = collect_ancestors(returned, dependences)
        for name in (n for n in dependences if n in relevant):
            site, dependence = fit.sites[name], dependences[name]
            if name not in sampled and site.kind != "deterministic":
                continue
            restarts = dependence.past and not begins
            if restarts and not _has_fixed_start(fit, inputs, dim, site, dependence):
                raise _make_restart_error(fit, inputs, site, dim, dependence)
            if dependence.future and not ends:
                raise _make_restart_error(fit, inputs, site, dim, dependence)


def _has_fit_labels(fit: Fit, inputs: AlignedInputs, dim: str) -> bool:
    """Return whether a dim has the fit's labels in order; or no labels, and the fit's size."""
    labels, fitted = inputs.labels.get(dim), labels_at_fit(fit, dim)
    if labels is not None and fitted is not None:
        return len(labels) == len(fitted) and _are_equal(labels, fitted)
    sizes = {**fit.constant_data.sizes, **fit.observed_data.sizes}
    size = inputs.sizes[dim]
    return labels is None and fitted is None and sizes.get(dim, size) == size


def _begins_like_fit(fit: Fit, inputs: AlignedInputs, dim: str) -> bool:
    """Return whether labels are the first of the fit's, or begin with all of them."""
    return _is_sequential(fit, dim) and _is_prefix(inputs.labels.get(dim), labels_at_fit(fit, dim))


def _ends_like_fit(fit: Fit, inputs: AlignedInputs, dim: str) -> bool:
    """Return whether labels are the last of the fit's, or end with all of them."""
    pair = _reversed(inputs.labels.get(dim)), _reversed(labels_at_fit(fit, dim))
    return _is_sequential(fit, dim) and _is_prefix(*pair)


def _is_sequential(fit: Fit, dim: str) -> bool:
    """Return whether labels of a dim are consecutive steps: in a table, its first dim only."""
    return fit.binding.layout != "table" or dim == fit.binding.dims[0]


def _is_prefix(labels: Labels, fitted: Labels) -> bool:
    """Return whether one index begins with the other."""
    if labels is None or fitted is None:
        # Without labels, positions count as labels, and begin at 0.
        return labels is fitted
    count = min(len(labels), len(fitted))
    return _are_equal(labels[:count], fitted[:count])


def _are_equal(labels: pd.Index, fitted: pd.Index) -> bool:
    """Return whether labels are the same in the same order, whatever their dtype."""
    if labels.equals(fitted):
        return True
    # Compare the first before the rest: a hash table of the labels of a long dim is slow.
    first = np.array_equal(fitted[:1].get_indexer(labels[:1]), np.arange(len(fitted[:1])))
    return first and np.array_equal(fitted.get_indexer(labels), np.arange(len(fitted)))


def _reversed(labels: Labels) -> Labels:
    return None if labels is None else labels[::-1]


def _has_fixed_start(
    fit: Fit, inputs: AlignedInputs, dim: str, site: Site, dependence: Dependence
) -> bool:
    """Return whether a condition fixes a site at all of the first steps that others depend on."""
    mask = inputs.arrays.get(known_key(site.name))
    if condition_key(site.name) not in inputs.arrays or not _is_sequential(fit, dim):
        return False
    if not _are_consecutive(inputs.labels.get(dim), labels_at_fit(fit, dim)):
        return False
    if mask is None:
        return True
    if mask.chunks is not None:
        return False
    steps = int(min(dependence.past, inputs.sizes[dim]))
    return bool((mask.isel({dim: slice(0, steps)}) if dim in mask.dims else mask).all())


def _are_consecutive(labels: Labels, fitted: Labels) -> bool:
    """Return whether labels are consecutive at the fit, with new labels after its last only."""
    if labels is None or fitted is None:
        return False
    indices = fitted.get_indexer(labels)
    count = int((indices >= 0).sum())
    if count and not np.array_equal(indices[:count], np.arange(indices[0], indices[0] + count)):
        return False
    return count in (0, len(labels)) or indices[count - 1] == len(fitted) - 1


def _make_restart_error(
    fit: Fit, inputs: AlignedInputs, site: Site, dim: str, dependence: Dependence
) -> LabelError:
    labels, fitted = inputs.labels.get(dim), labels_at_fit(fit, dim)
    if dependence.past and not _begins_like_fit(fit, inputs, dim):
        differs = _describe_difference(labels, fitted)
    else:
        differs = _describe_difference(_reversed(labels), _reversed(fitted), ("ends", "ended"))
    kind = "the density of" if _has_outcomes(fit, inputs) else "site"
    return LabelError(
        f"{kind} {site.variable!r} is made step by step along {dim!r}, by a "
        f"recursion (a scan or a running sum), and {differs}: it would restart from its initial "
        f"value. {_suggest_remedy(fit, inputs, site, dim, dependence)}"
    )


def _has_outcomes(fit: Fit, inputs: AlignedInputs) -> bool:
    """Return whether the outcomes are among the inputs, as for a log-likelihood."""
    return any(s.key in inputs.arrays for a in fit.binding.outcomes for s in a.sources)


def _suggest_remedy(
    fit: Fit, inputs: AlignedInputs, site: Site, dim: str, dependence: Dependence
) -> str:
    if _has_outcomes(fit, inputs) or dependence.future or site.kind == "deterministic":
        return (
            f"Take a Dataset with all labels of {dim!r} at the fit, in that order, and select "
            f"from the result: .sel({dim}=...)"
        )
    name = site.variable
    recipe = (
        f"Give the past as well, and say what is known of it: xr.concat([past, future], {dim!r})"
        f".aimz.predict(fit, condition={name!r})"
    )
    if dependence.past == inf:
        return recipe
    return (
        f"{recipe}; of the past the last {int(dependence.past)} before what is drawn will do, if "
        "the condition gives them, in memory"
    )


def _describe_difference(
    labels: Labels, fitted: Labels, verbs: tuple[str, str] = ("begins", "began")
) -> str:
    """Describe the first difference between the labels of a Dataset and those of the fit."""
    if labels is None or fitted is None:
        lacks = "the fit has labels there and the Dataset none"
        return lacks if labels is None else "the Dataset has labels there and the fit had none"
    count = min(len(labels), len(fitted))
    indices = np.flatnonzero(np.asarray(labels[:count] != fitted[:count]))
    if not indices.size:
        return f"the Dataset has {len(labels)} labels where the fit had {len(fitted)}"
    first = int(indices[0])
    label, expected = _get_label(labels, first), _get_label(fitted, first)
    if first == 0:
        return f"the Dataset {verbs[0]} at {label!r}, where the fit {verbs[1]} at {expected!r}"
    previous = _get_label(labels, first - 1)
    return f"in the Dataset {label!r} follows {previous!r}, where the fit had {expected!r}"


def _get_label(labels: pd.Index, index: int) -> Any:
    # As a Python object, whose repr is valid input.
    return labels[index : index + 1].tolist()[0]
