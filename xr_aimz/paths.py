"""Which sites an intervention reaches: the arrows of a model, from one abstract trace.

Every site is given as an input of its own, so that what its distribution is made of is seen
one step at a time: these are its parents. What lies below a target is drawn anew given it;
what lies above keeps its posterior.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import xarray as xr
from numpyro import handlers

from xr_aimz.axes import shape_in_model
from xr_aimz.binding import arrange, block_of
from xr_aimz.casting import device_dtype
from xr_aimz.dataflow import dependencies
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Program
from xr_aimz.model import tracing
from xr_aimz.posterior import Fit

__all__ = ["arrows_of", "below", "parents"]

Parents = Mapping[str, frozenset[str]]


def arrows_of(fit: Fit, inputs: Inputs, arrays: Mapping[str, xr.DataArray]) -> Parents:
    """The parents of each site of a fit, given arrays of those dtypes; see :func:`parents`."""
    cell = replace(inputs, arrays=arrays).of_cell(fit.binding.per)
    program = Program(fit.model, fit.binding.without_data(), fit.sites, cell.dims, ())
    structs = {
        key: jax.ShapeDtypeStruct(tuple(cell.sizes[str(d)] for d in a.dims), device_dtype(a.dtype))
        for key, a in cell.arrays.items()
    }
    return parents(program, structs, fit.params, cell.sizes)


def parents(
    program: Program,
    arrays: Mapping[str, Any],
    params: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> Parents:
    """What each site is directly made from.

    Parameters
    ----------
    program : Program
    arrays : mapping of source key to jax.ShapeDtypeStruct
    params : mapping of name to pytree
    sizes : mapping of dim to int

    Returns
    -------
    mapping of ``"site {name}"`` to frozenset
        Of ``"array {key}"`` and ``"site {name}"``. Deterministics are looked through.
    """
    block = block_of(program.binding, sizes)
    drawn = [s for s in program.sites.values() if s.kind in ("latent", "observed")]
    blank = {
        f"site {s.name}": jax.ShapeDtypeStruct(
            shape_in_model(s, program.binding, block.sizes), s.dtype
        )
        for s in drawn
    }

    def made(**named: Any) -> dict[str, Any]:
        known = dict(params) | {s.name: named[f"site {s.name}"] for s in drawn}
        given = {key: named[f"array {key}"] for key in arrays}
        passed = arrange(program.binding, given, program.dims, block)
        seeded = handlers.seed(program.model, jax.random.key(0))
        trace = handlers.trace(handlers.substitute(seeded, data=known)).get_trace(**passed)
        return {
            f"site {name}": _ingredients(message)
            for name, message in trace.items()
            if name in program.sites and message["type"] != "param"
        }

    with tracing(block):
        found = dependencies(
            made, {**blank, **{f"array {key}": struct for key, struct in arrays.items()}}
        )
    return {
        name: frozenset().union(*jax.tree.leaves(leaves, is_leaf=_is_set)) - {name}
        for name, leaves in found.items()
    }


def _is_set(leaf: Any) -> bool:
    return isinstance(leaf, frozenset)


def _ingredients(message: Mapping[str, Any]) -> Any:
    if message["type"] != "sample":
        return message["value"]
    fn = message["fn"]
    # Both: a masked distribution has no density, and one of a user's own may hide its arrays.
    try:
        density = fn.log_prob(message["value"])
    except NotImplementedError:
        # A distribution that is only drawn from.
        density = None
    return jax.tree.leaves(fn), density


def below(
    parents: Parents, targets: Iterable[str], cut: Collection[str] = frozenset()
) -> frozenset[str]:
    """All that the targets reach, themselves left out; nothing reaches what is ``cut``."""
    reached: set[str] = set()
    front = set(targets)
    while front:
        found = {name for name, made_of in parents.items() if made_of & front} - set(cut)
        front = found - reached
        reached |= found
    return frozenset(reached)
