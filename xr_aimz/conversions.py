"""Integer inputs that a model converts to floats as they are.

JAX keeps integers, and a model that multiplies one by a float converts it: seconds since 1970 in
32 bits are then as coarse as a float64 variable of theirs that was cast. What a model makes of
integers first, by a difference say, is exact, and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from xr_aimz.binding import block_of
from xr_aimz.dataflow import Labels, reaches
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
    converted: set[str] = set()
    reaches(closed, marks, partial(_pass_values, converted))
    return frozenset(converted)


def _read(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    if message["type"] != "sample":
        return site.dims, message["value"]
    return site.dims[: site.batch_ndim], message["fn"].log_prob(message["value"])


def _pass_values(converted: set[str], equation: Any, labels: Sequence[Labels]) -> list[Labels]:
    """Labels of the arrays whose values an operation passes on; those it converts are noted."""
    name = equation.primitive.name
    if name == "convert_element_type":
        integer = jnp.issubdtype(equation.invars[0].aval.dtype, jnp.integer)
        if integer and jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
            converted |= labels[0]
        return [labels[0]]
    operands = labels[_KEEP_VALUES[name]] if name in _KEEP_VALUES else []
    return [frozenset[str]().union(*operands)] * len(equation.outvars)
