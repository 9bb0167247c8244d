"""The kernel of one cell, mapped over a block of cells.

A model that is fitted for every label of some dimensions sees arrays without them. Its
kernel is mapped over those dimensions, one after another, each array along those that it
has; the labels of a cell are folded into the keys of its sites, so that a draw is still a
function of its labels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from xr_aimz import keys

__all__ = ["over_cells"]

Call = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]


def over_cells(call: Call, per: tuple[str, ...], dims: Mapping[str, tuple[str, ...]]) -> Call:
    """A kernel of a block whose arrays lead with the dims ``per``, from that of one cell.

    Parameters
    ----------
    call : callable
        The kernel of one cell: see :mod:`xr_aimz.kernel` for what it takes.
    per : tuple of str
        Latents have all of these as their leading axes, and outputs will.
    dims : mapping of source key to tuple of str
        The dims of each array; those of ``per`` lead, in order.
    """

    def one(draw: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, jax.Array]:
        words = shared["words"]
        # A sum, so that the order in which the dims were named moves no draw.
        cell = sum((words[d] for d in per[1:]), start=words[per[0]])
        addressed = {name: keys.fold(key, cell) for name, key in draw["keys"].items()}
        own = {d: w for d, w in words.items() if d not in per}
        return call({**draw, "keys": addressed}, {**shared, "words": own})

    mapped: Call = one
    for dim in reversed(per):
        mapped = _along(mapped, dim, dims)
    return mapped


def _along(call: Call, dim: str, dims: Mapping[str, tuple[str, ...]]) -> Call:
    def mapped(draw: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, jax.Array]:
        draws = {**dict.fromkeys(draw), "latents": 0}
        rest = {
            **dict.fromkeys(shared),
            "arrays": {key: 0 if dim in dims[key] else None for key in shared["arrays"]},
            "words": {d: 0 if d == dim else None for d in shared["words"]},
        }
        return jax.vmap(call, in_axes=(draws, rest))(draw, shared)

    return mapped
