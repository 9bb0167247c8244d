"""What a site's distribution is made from, and what a given value would therefore tell of.

To give a site a value is to learn something of everything that it depends on. The latents
of a posterior have learned what they were to learn at the fit. What is *drawn* in a
prediction has not, so a value given downstream of a draw would leave that draw as if the
value were not known. Such a request is found here, on shapes alone, and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import xarray as xr

from xr_aimz.axes import TABLE, dims_in_dataset
from xr_aimz.binding import Binding, block_of
from xr_aimz.dataflow import dependencies
from xr_aimz.errors import ModelError
from xr_aimz.kernel import Program, distributions
from xr_aimz.model import Site, tracing

__all__ = ["Origin", "check_told", "origins", "step_dim"]

Names = frozenset[str]
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Origin:
    """What a site's distribution is made from, and what it is.

    Parameters
    ----------
    names : frozenset of str
        The sites that reach it.
    discrete : bool
    joint : int
        How many trailing axes are drawn as one: less than its event where ``to_event`` made
        an event of independent cells.
    """

    names: Names
    discrete: bool
    joint: int


def origins(
    program: Program, sizes: Mapping[str, int], draw: Mapping[str, Any], shared: Mapping[str, Any]
) -> dict[str, Origin]:
    """The origin of each of ``program.returns``, from one trace on shapes.

    Parameters
    ----------
    program : Program
    sizes : mapping of dim to int
    draw, shared : pytree of jax.ShapeDtypeStruct
        What a kernel is called with; ``draw["latents"]`` with every site that is drawn.
    """
    call = distributions(program, sizes)
    kinds: dict[str, tuple[bool, int]] = {}
    # Inputs that are no sites, and so have no name that a site can have.
    others = {"\0keys": draw["keys"], "\0arrays": shared}

    def leaves(**named: Any) -> dict[str, Any]:
        latents = {name: named[name] for name in draw["latents"]}
        found = call({"keys": named["\0keys"], "latents": latents}, named["\0arrays"])
        kinds.update({name: (bool(fn.is_discrete), _joint(fn)) for name, fn in found.items()})
        return {name: jax.tree.leaves(fn) for name, fn in found.items()}

    with tracing(block_of(program.binding, sizes)):
        reached_by = dependencies(leaves, {**draw["latents"], **others})
    return {
        name: Origin(frozenset().union(*parts) - set(others), *kinds[name])
        for name, parts in reached_by.items()
    }


def _joint(fn: Any) -> int:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return int(fn.event_dim)


def check_told(
    given: Mapping[str, xr.DataArray | None],
    free: Mapping[str, xr.DataArray | None],
    origin: Mapping[str, Origin],
    sites: Mapping[str, Site],
    binding: Binding,
) -> None:
    """Refuse values that would tell of another site that is drawn.

    Parameters
    ----------
    given : mapping of site to mask
        The cells in which each conditioned site has a value; None for all of them.
    free : mapping of site to mask
        The cells in which each drawn site is drawn; None for all of them.
    origin : mapping of site to Origin
        Of the conditioned sites.

    Raises
    ------
    ModelError
    """
    for name, cells in given.items():
        for other in sorted((origin[name].names & set(free)) - {name}):
            if _meet(sites[name], cells, sites[other], free[other], binding):
                raise ModelError(
                    f"condition={name!r}: site {other!r} is drawn in this prediction, and values "
                    f"of {name!r} made from it would tell of it, so its draws would be those of a "
                    f"model that does not know them. Fit with those values, or give {other!r} too"
                )


def _meet(
    site: Site,
    given: xr.DataArray | None,
    other: Site,
    free: xr.DataArray | None,
    binding: Binding,
) -> bool:
    """Whether some given cell may depend on some free cell of another site."""
    mine, theirs = dims_in_dataset(site, binding), dims_in_dataset(other, binding)
    step = step_dim(site, binding)
    # Cells of a fit with ``per`` tell nothing of each other.
    shared = [d for d in mine if d in theirs and d in binding.cut_dims]
    kept = [d for d in shared if d not in binding.core_dims and d != step]
    if step is None or step != step_dim(other, binding):
        return bool((_over(given, kept) & _over(free, kept)).any())
    last, first = (
        _last(_over(given, [step, *kept]), step),
        _first(_over(free, [step, *kept]), step),
    )
    return bool((first <= last).any())


def _first(mask: xr.DataArray, step: str) -> xr.DataArray:
    """The first step of a mask; a mask without the dimension holds for all steps."""
    where = mask.argmax(step) if step in mask.dims else 0
    return xr.where(mask.any(step) if step in mask.dims else mask, where, _NEVER)


def _last(mask: xr.DataArray, step: str) -> xr.DataArray:
    if step not in mask.dims:
        return xr.where(mask, _NEVER - 1, -1)
    back = mask.isel({step: slice(None, None, -1)})
    return xr.where(mask.any(step), mask.sizes[step] - 1 - back.argmax(step), -1)


def _over(mask: xr.DataArray | None, kept: list[Any]) -> xr.DataArray:
    if mask is None:
        return xr.DataArray(True)
    return mask.any([d for d in mask.dims if d not in kept])


def step_dim(site: Site, binding: Binding) -> str | None:
    """The dimension along which a site is scanned, if it is one of the Dataset's."""
    if not site.scanned or not site.dims:
        return None
    if site.dims[0] == TABLE:
        return binding.dims[0] if len(binding.dims) == 1 else None
    return site.dims[0] if site.dims[0] in binding.dims else None
