"""Dataflow of a traced program: the inputs that each result is computed from, and its scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from numpyro.primitives import Messenger

from xr_aimz.errors import ModelError

Labels = frozenset[Any]
Rule = Callable[[Any, Sequence[Labels]], list[Labels]]
_NO_LABELS: Labels = frozenset()


class Node(NamedTuple):
    """Input of a traced function: its kind, the keyword it is passed under, and its name."""

    kind: str
    name: str


def dependencies(call: Callable[..., Any], **inputs: Mapping[str, Any]) -> Any:
    """
    Trace a function on shapes, and find the inputs that each of its results is computed from.

    Parameters
    ----------
    call : callable
        Takes mappings by keyword, one for each kind of input.
    **inputs : mapping of name to pytree of arrays or ShapeDtypeStruct

    Returns
    -------
    pytree of frozenset of Node
        Like the results of ``call``.
    """

    def call_with(inputs: dict[str, Any]) -> Any:
        return call(**inputs)

    closed, results = jax.make_jaxpr(call_with, return_shape=True)(inputs)
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(inputs)[0])
    labels = [frozenset({Node(kind.key, name.key)}) for kind, name, *_ in paths]
    return jax.tree.unflatten(jax.tree.structure(results), reaches(closed, labels))


def reaches(
    program: ClosedJaxpr | Jaxpr, labels: Sequence[Labels], rule: Rule | None = None
) -> list[Labels]:
    """
    Propagate labels from the arguments of a program to its results.

    Parameters
    ----------
    program : ClosedJaxpr or Jaxpr
    labels : sequence of frozenset
        The labels of each argument. Constants have none.
    rule : callable, optional
        From an operation without an inner program, and the labels of its operands, to the labels
        of its results. By default each result has the labels of all operands.

    Returns
    -------
    list of frozenset
    """
    rule = _pass_all_labels if rule is None else rule
    jaxpr, _ = split_constants(program)
    labels_of = dict(zip(jaxpr.invars, labels, strict=True))

    def read(atom: Any) -> Labels:
        return _NO_LABELS if isinstance(atom, Literal) else labels_of.get(atom, _NO_LABELS)

    for equation in jaxpr.eqns:
        results = _propagate(equation, [read(atom) for atom in equation.invars], rule)
        labels_of.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def split_constants(program: Any) -> tuple[Any, Sequence[Any]]:
    """Split a program from its constants; from jax 0.12 on open and closed ones are one class."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def inner_programs(equation: Any) -> list[Any]:
    """List the programs among the parameters of an operation."""
    values: list[Any] = []
    for value in equation.params.values():
        values.extend(value if isinstance(value, tuple | list) else (value,))
    return [value for value in values if isinstance(value, ClosedJaxpr | Jaxpr)]


def scan_counts(equation: Any) -> tuple[int, int]:
    """Count the arguments of a scan that are constants, and those that are its carry.

    Raises
    ------
    LookupError
        In a version of JAX whose scans have other parameters.
    """
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    try:
        # From jax 0.12 on the arguments are a tuple of trees: constants, carry and slices.
        constants, carry, _ = params["ft_in"].unpack()
    except (AttributeError, KeyError, ValueError) as error:
        raise LookupError(f"no counts of arguments in a scan's {sorted(params)!r}") from error
    return len(constants), len(carry)


def _propagate(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    name, programs = equation.primitive.name, inner_programs(equation)
    if not programs:
        return rule(equation, labels)
    if name == "scan":
        return _propagate_scan(equation, labels, rule)
    if name == "while":
        return _propagate_while(equation, labels, rule)
    if name == "cond":
        return _propagate_cond(equation, labels, rule)
    if len(programs) == 1:
        inner, _ = split_constants(programs[0])
        if (len(inner.invars), len(inner.outvars)) == (len(labels), len(equation.outvars)):
            return reaches(programs[0], labels, rule)
    for program in programs:
        # How these programs map to the results is unknown; the rule still has to be applied to
        # their operations.
        all_labels = _NO_LABELS.union(*labels)
        reaches(program, [all_labels] * len(split_constants(program)[0].invars), rule)
    return _pass_all_labels(equation, labels)


def _pass_all_labels(equation: Any, labels: Sequence[Labels]) -> list[Labels]:
    return [_NO_LABELS.union(*labels)] * len(equation.outvars)


def _propagate_cond(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    predicate, arguments = labels[0], labels[1:]
    branches = [reaches(branch, arguments, rule) for branch in equation.params["branches"]]
    return [predicate.union(*alternatives) for alternatives in zip(*branches, strict=True)]


def _propagate_scan(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    try:
        constants, carried = scan_counts(equation)
    except LookupError:
        return _pass_all_labels(equation, labels)
    fixed, slices = labels[:constants], labels[constants + carried :]
    carry = labels[constants : constants + carried]
    while True:
        results = reaches(equation.params["jaxpr"], [*fixed, *carry, *slices], rule)
        merged = [before | after for before, after in zip(carry, results, strict=False)]
        if merged == carry:
            return [*carry, *results[carried:]]
        carry = merged


def _propagate_while(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    params = equation.params
    n_condition, n_body = params["cond_nconsts"], params["body_nconsts"]
    of_condition, of_body = labels[:n_condition], labels[n_condition : n_condition + n_body]
    carry = labels[n_condition + n_body :]
    while True:
        results = reaches(params["body_jaxpr"], [*of_body, *carry], rule)
        merged = [before | after for before, after in zip(carry, results, strict=True)]
        if merged == carry:
            # The condition decides how often the body runs, so every result depends on it.
            (predicate,) = reaches(params["cond_jaxpr"], [*of_condition, *carry], rule)
            return [carried | predicate for carried in carry]
        carry = merged


# The name that marks the carry of a NumPyro scan in a traced program.
CARRY = "xr_aimz carry"
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


class ForwardScans(Messenger):  # type: ignore[misc] # NumPyro's own has no types
    """Handler that refuses sites in a scan that runs backwards.

    NumPyro counts the steps from where the scan starts, and keeps a site's draws in that order:
    the draw of the last label would come first.
    """

    def postprocess_message(self, message: dict[str, Any]) -> None:
        if message["type"] != "control_flow" or message["args"][4:] != (True,):
            return
        _, (trace, _) = message["value"]
        names = [n for n, m in trace.trace.items() if m["type"] == "sample"]
        if names:
            raise ModelError(
                f"sites {names!r} are in a scan with reverse=True, whose steps NumPyro counts "
                "from the last label: their draws would have each other's labels. Scan forwards, "
                "on a Dataset in reversed order: ds.isel(time=slice(None, None, -1))"
            )


class MarkedCarry(Messenger):  # type: ignore[misc] # NumPyro's own has no types
    """Handler that marks the carry of the model in a traced program, under the name ``CARRY``.

    NumPyro carries a count of steps and a random key beside it, which are no part of the model.
    """

    def process_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "control_flow":
            step, *rest = message["args"]
            message["args"] = (_mark_carry(step), *rest)


def _mark_carry(step: Callable) -> Callable:
    def marked(carry: Any, x: Any) -> Any:
        # An extra mark, so that a scan without a carry is recognized as NumPyro's too.
        checkpoint_name(jnp.zeros(()), CARRY)
        return step(jax.tree.map(lambda leaf: checkpoint_name(leaf, CARRY), carry), x)

    return marked


def recursion_length(equation: Any) -> int | None:
    """Count the steps of a scan or a running sum; None for another operation."""
    if equation.primitive.name == "scan":
        return int(equation.params["length"])
    if equation.primitive.name in _CUMULATIVE:
        return int(equation.invars[0].aval.shape[equation.params["axis"]])
    return None


def largest_product(program: ClosedJaxpr | Jaxpr) -> int:
    """Return the number of elements of a program's largest matrix product, at any depth."""
    jaxpr, _ = split_constants(program)
    sizes = [e.outvars[0].aval.size for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    inner = [largest_product(p) for e in jaxpr.eqns for p in inner_programs(e)]
    return max([*sizes, *inner], default=0)


def recursion_lengths(program: ClosedJaxpr | Jaxpr) -> frozenset[int]:
    """Collect the lengths of all scans and running sums of a program, at any depth."""
    jaxpr, _ = split_constants(program)
    lengths = {recursion_length(e) for e in jaxpr.eqns} - {None}
    inner = (recursion_lengths(p) for e in jaxpr.eqns for p in inner_programs(e))
    return frozenset(n for n in lengths if n is not None).union(*inner)
