"""Integer inputs that a model converts to floats as they are.

JAX keeps integers, and a model that multiplies one by a float converts it: seconds since 1970 in
32 bits are then as coarse as a float64 variable of theirs that was cast. What a model makes of
integers first, by a difference say, is exact, and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from xr_aimz.binding import block_of
from xr_aimz.dataflow import inner_programs, open_program
from xr_aimz.device import trace
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Dims, Program, reading
from xr_aimz.model import Site
from xr_aimz.supports import call_structs, structs_of

__all__ = ["find_converted"]

# Primitives whose results are values of their operands, and which of these have the values.
_ALL = slice(None)
_KEEP_VALUES = {
    "broadcast_in_dim": slice(0, 1),
    "concatenate": _ALL,
    "copy": _ALL,
    "copy_p": _ALL,
    "dynamic_slice": slice(0, 1),
    "expand_dims": _ALL,
    "gather": slice(0, 1),
    "optimization_barrier": _ALL,
    "reshape": slice(0, 1),
    "rev": _ALL,
    "select_n": slice(1, None),
    "slice": _ALL,
    "squeeze": _ALL,
    "stop_gradient": _ALL,
    "transpose": _ALL,
}
_Marks = list[frozenset[str]]


def find_converted(program: Program, inputs: Inputs, params: Mapping[str, Any]) -> frozenset[str]:
    """The keys of the arrays of integers that a model converts to floats as they are.

    Parameters
    ----------
    program : Program
    inputs : Inputs
    params : mapping of name to pytree
    """
    structs = structs_of(program, inputs)
    draw, shared = call_structs(program, structs, params, inputs.sizes)
    kinds = ("latent", "observed", "deterministic")
    own = tuple(n for n, s in program.sites.items() if s.kind in kinds)
    call = reading(replace(program, returns=own, worlds=None), inputs.sizes, _read)
    try:
        closed, _, _ = trace(call, block_of(program.binding, inputs.sizes), draw, shared)
    except Exception:
        # Whatever a model may raise where it is evaluated for its densities: nothing is known.
        return frozenset()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path((draw, shared))]
    marks = [
        frozenset({path[2].key}) if path[1].key == "arrays" else frozenset[str]() for path in paths
    ]
    found: set[str] = set()
    _follow(closed.jaxpr, marks, found)
    return frozenset(found)


def _read(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    if message["type"] != "sample":
        return site.dims, message["value"]
    return site.dims[: site.batch_ndim], message["fn"].log_prob(message["value"])


def _follow(jaxpr: Jaxpr, marks: _Marks, found: set[str]) -> _Marks:
    """Follow inputs through a program; ``found`` has those that are converted."""
    known: dict[Any, frozenset[str]] = dict(zip(jaxpr.invars, marks, strict=True))

    def marks_of(variables: Sequence[Any]) -> _Marks:
        return [
            frozenset() if isinstance(v, Literal) else known.get(v, frozenset()) for v in variables
        ]

    for equation in jaxpr.eqns:
        given = marks_of(equation.invars)
        known.update(zip(equation.outvars, _through(equation, given, found), strict=True))
    return marks_of(jaxpr.outvars)


def _through(equation: Any, given: _Marks, found: set[str]) -> _Marks:
    name, outputs = equation.primitive.name, len(equation.outvars)
    if name == "convert_element_type":
        integer = jnp.issubdtype(equation.invars[0].aval.dtype, jnp.integer)
        if integer and jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
            found |= given[0]
        return [given[0]]
    if name in _KEEP_VALUES:
        return [frozenset().union(*given[_KEEP_VALUES[name]])] * outputs
    every = frozenset[str]().union(*given)
    made: set[str] = set()
    for program in inner_programs(equation):
        jaxpr, _ = open_program(program)
        aligned = given if len(jaxpr.invars) == len(given) else [every] * len(jaxpr.invars)
        made |= set().union(*_follow(jaxpr, aligned, found))
    return [frozenset(made)] * outputs
