"""Dataflow of a traced program: which of its inputs each result is computed from.

Every operation passes on the labels of all that it reads, except those that hold programs of
their own: a function is followed, a branch adds the labels of what decides it, and a loop is
followed until the labels of its carry settle. An operation that is not known passes everything
to everything, which can only name too many inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

__all__ = [
    "Labels",
    "Rule",
    "dependencies",
    "inner_programs",
    "open_program",
    "reaches",
    "scan_counts",
]

Labels = frozenset[str]
Rule = Callable[[Any, Sequence[Labels]], list[Labels]]
_NONE: Labels = frozenset()


def dependencies(call: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
    """
    Trace a function on shapes, and name the inputs that each of its results is computed from.

    Parameters
    ----------
    call : callable
        Takes the inputs by keyword.
    inputs : mapping of name to pytree of arrays or ShapeDtypeStruct

    Returns
    -------
    pytree of frozenset of str
        Like the results of ``call``.
    """

    def positional(named: dict[str, Any]) -> Any:
        return call(**named)

    closed, results = jax.make_jaxpr(positional, return_shape=True)(dict(inputs))
    named = {name: jax.tree.map(lambda _, n=name: n, tree) for name, tree in inputs.items()}
    labels = [frozenset({name}) for name in jax.tree.leaves(named)]
    return jax.tree.unflatten(jax.tree.structure(results), reaches(closed, labels))


def reaches(
    program: ClosedJaxpr | Jaxpr, labels: Sequence[Labels], rule: Rule | None = None
) -> list[Labels]:
    """
    Labels of each result of a program, from those of its arguments.

    Parameters
    ----------
    program : ClosedJaxpr or Jaxpr
    labels : sequence of frozenset of str
        One for each argument. Constants have none.
    rule : callable, optional
        From an operation without a program of its own, and the labels of all that it reads, to the
        labels of its results. By default it passes on all of them.

    Returns
    -------
    list of frozenset of str
    """
    rule = _everywhere if rule is None else rule
    jaxpr, _ = open_program(program)
    labels_of = dict(zip(jaxpr.invars, labels, strict=True))

    def read(atom: Any) -> Labels:
        return _NONE if isinstance(atom, Literal) else labels_of.get(atom, _NONE)

    for equation in jaxpr.eqns:
        results = _results(equation, [read(atom) for atom in equation.invars], rule)
        labels_of.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def open_program(program: Any) -> tuple[Any, Sequence[Any]]:
    """A program without its constants, and the constants; from jax 0.12 on both are one class."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())


def inner_programs(equation: Any) -> list[Any]:
    """Programs that an operation holds among its parameters."""
    values: list[Any] = []
    for value in equation.params.values():
        values.extend(value if isinstance(value, tuple | list) else (value,))
    return [value for value in values if isinstance(value, ClosedJaxpr | Jaxpr)]


def scan_counts(equation: Any) -> tuple[int, int]:
    """Of the arguments of a scan, how many are constants, and how many its carry.

    Raises
    ------
    LookupError
        In a version of JAX that writes scans down otherwise.
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


def _results(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    name, programs = equation.primitive.name, inner_programs(equation)
    if not programs:
        return rule(equation, labels)
    if name == "scan":
        return _of_scan(equation, labels, rule)
    if name == "while":
        return _of_while(equation, labels, rule)
    if name == "cond":
        return _of_cond(equation, labels, rule)
    if len(programs) == 1:
        inner, _ = open_program(programs[0])
        if (len(inner.invars), len(inner.outvars)) == (len(labels), len(equation.outvars)):
            return reaches(programs[0], labels, rule)
    for program in programs:
        # Their results are not known, but what they do is: for the rule to see.
        every = _NONE.union(*labels)
        reaches(program, [every] * len(open_program(program)[0].invars), rule)
    return _everywhere(equation, labels)


def _everywhere(equation: Any, labels: Sequence[Labels]) -> list[Labels]:
    return [_NONE.union(*labels)] * len(equation.outvars)


def _of_cond(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    decides, arguments = labels[0], labels[1:]
    branches = [reaches(branch, arguments, rule) for branch in equation.params["branches"]]
    return [decides.union(*each) for each in zip(*branches, strict=True)]


def _of_scan(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    try:
        constants, carried = scan_counts(equation)
    except LookupError:
        return _everywhere(equation, labels)
    fixed, slices = labels[:constants], labels[constants + carried :]
    carry = labels[constants : constants + carried]
    while True:
        results = reaches(equation.params["jaxpr"], [*fixed, *carry, *slices], rule)
        settled = [before | after for before, after in zip(carry, results, strict=False)]
        if settled == carry:
            return [*carry, *results[carried:]]
        carry = settled


def _of_while(equation: Any, labels: list[Labels], rule: Rule) -> list[Labels]:
    params = equation.params
    first, second = params["cond_nconsts"], params["body_nconsts"]
    of_condition, of_body = labels[:first], labels[first : first + second]
    carry = labels[first + second :]
    while True:
        results = reaches(params["body_jaxpr"], [*of_body, *carry], rule)
        settled = [before | after for before, after in zip(carry, results, strict=True)]
        if settled == carry:
            # The condition decides how often the body runs, and so every result.
            (decides,) = reaches(params["cond_jaxpr"], [*of_condition, *carry], rule)
            return [one | decides for one in carry]
        carry = settled
