"""Find the parents of each site's distribution, and refuse informative conditioned values.

A conditioned value is informative about every sampled parent, which a prediction cannot account
for, so it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import xarray as xr
from numpyro import handlers

from xr_aimz.binding import (
    TABLE,
    AlignedInputs,
    Binding,
    arrange,
    block_of,
    jax_dtype,
    shape_in_model,
)
from xr_aimz.errors import ModelError
from xr_aimz.fits import Fit
from xr_aimz.kernel import BlockData, DrawState, KernelSpec, distributions
from xr_aimz.tracing import Node, Site, dependencies, trace_lock

Parents = Mapping[Node, frozenset[Node]]


def site_graph(fit: Fit, inputs: AlignedInputs, arrays: Mapping[str, xr.DataArray]) -> Parents:
    """Find the parents of each site of a fit, for ``arrays`` with their dtypes.

    See :func:`site_parents`.
    """
    cell = replace(inputs, arrays=arrays).of_cell(fit.binding.per)
    program = KernelSpec(fit.model, fit.binding.without_data(), fit.sites, cell.dims, ())
    structs = {
        key: jax.ShapeDtypeStruct(tuple(cell.sizes[str(d)] for d in a.dims), jax_dtype(a.dtype))
        for key, a in cell.arrays.items()
    }
    return site_parents(program, structs, fit.params, cell.sizes)


def site_parents(
    program: KernelSpec,
    arrays: Mapping[str, Any],
    params: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> Parents:
    """Find the arrays and sites on which each site directly depends.

    Parameters
    ----------
    program : KernelSpec
    arrays : mapping of source key to jax.ShapeDtypeStruct
    params : mapping of name to pytree
    sizes : mapping of dim to int

    Returns
    -------
    mapping of Node to frozenset of Node
        Nodes of kinds ``"array"`` and ``"site"``. A deterministic is replaced by its parents.
    """
    block = block_of(program.binding, sizes)
    sampled = {
        s.name: jax.ShapeDtypeStruct(shape_in_model(s, program.binding, block.sizes), s.dtype)
        for s in program.sites.values()
        if s.kind in ("latent", "observed")
    }

    def trace_parts(array: Mapping[str, Any], site: Mapping[str, Any]) -> dict[str, Any]:
        values = {**params, **site}
        arguments = arrange(program.binding, array, program.dims, block)
        seeded = handlers.seed(program.model, jax.random.key(0))
        trace = handlers.trace(handlers.substitute(seeded, data=values)).get_trace(**arguments)
        return {
            name: _get_distribution_parts(message)
            for name, message in trace.items()
            if name in program.sites and message["type"] != "param"
        }

    with trace_lock(block):
        nodes = dependencies(trace_parts, array=arrays, site=sampled)
    return {
        Node("site", name): frozenset().union(*jax.tree.leaves(leaves, is_leaf=_is_set))
        - {Node("site", name)}
        for name, leaves in nodes.items()
    }


def _is_set(leaf: Any) -> bool:
    return isinstance(leaf, frozenset)


def _get_distribution_parts(message: Mapping[str, Any]) -> Any:
    if message["type"] != "sample":
        return message["value"]
    fn = message["fn"]
    # Both parts: a masked distribution has no density, and a user's class may hide its arrays.
    try:
        density = fn.log_prob(message["value"])
    except NotImplementedError:
        # A distribution that can only be sampled.
        density = None
    return jax.tree.leaves(fn), density


def descendants(
    parents: Parents, targets: Iterable[Node], cut: Collection[Node] = frozenset()
) -> frozenset[Node]:
    """Return the nodes that the targets reach, less the targets; ``cut`` nodes are not reached."""
    reached: set[Node] = set()
    front = set(targets)
    while front:
        children = {name for name, nodes in parents.items() if nodes & front} - set(cut)
        front = children - reached
        reached |= children
    return frozenset(reached)


Names = frozenset[str]
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class DistributionInfo:
    """Parents of a site's distribution, and its kind.

    Parameters
    ----------
    names : frozenset of str
        The sites that it depends on.
    discrete : bool
    joint : int
        Number of trailing axes that are sampled jointly: fewer than the event axes where
        ``to_event`` made an event of independent cells.
    """

    names: Names
    discrete: bool
    joint: int


def distribution_info(
    program: KernelSpec,
    sizes: Mapping[str, int],
    draw: DrawState,
    shared: BlockData,
) -> dict[str, DistributionInfo]:
    """Find the parents and kind of each of ``program.returns``, from one trace on shapes.

    Parameters
    ----------
    program : KernelSpec
    sizes : mapping of dim to int
    draw, shared : DrawState, BlockData
        Of jax.ShapeDtypeStruct; ``draw.latents`` has every site that is sampled.
    """
    kernel = distributions(program, sizes)
    kinds: dict[str, tuple[bool, int]] = {}

    def leaves(
        keys: Mapping[str, Any], site: Mapping[str, Any], data: Mapping[str, Any]
    ) -> dict[str, Any]:
        by_site = kernel(DrawState(keys, site), BlockData(**data))
        kinds.update(
            {name: (bool(fn.is_discrete), _count_joint_axes(fn)) for name, fn in by_site.items()}
        )
        return {name: jax.tree.leaves(fn) for name, fn in by_site.items()}

    with trace_lock(block_of(program.binding, sizes)):
        sources = dependencies(leaves, keys=draw.keys, site=draw.latents, data=shared._asdict())
    return {
        name: DistributionInfo(
            frozenset(n.name for part in parts for n in part if n.kind == "site"), *kinds[name]
        )
        for name, parts in sources.items()
    }


def _count_joint_axes(fn: Any) -> int:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return int(fn.event_dim)


def check_not_informative(
    conditioned: Mapping[str, xr.DataArray | None],
    free: Mapping[str, xr.DataArray | None],
    origin: Mapping[str, DistributionInfo],
    sites: Mapping[str, Site],
    binding: Binding,
) -> None:
    """Refuse conditioned values that are informative about another site that is sampled.

    Parameters
    ----------
    conditioned : mapping of site to mask
        The cells in which each conditioned site has a value; None for all of them.
    free : mapping of site to mask
        The cells in which each sampled site is sampled; None for all of them.
    origin : mapping of site to DistributionInfo
        Parents of the conditioned sites.

    Raises
    ------
    ModelError
    """
    for name, cells in conditioned.items():
        for other in sorted((origin[name].names & set(free)) - {name}):
            if _overlap(sites[name], cells, sites[other], free[other], binding):
                raise ModelError(
                    f"condition={name!r}: site {other!r} is drawn in this prediction, and values "
                    f"of {name!r} made from it would tell of it, so its draws would be those of a "
                    f"model that does not know them. Fit with those values, or give {other!r} too"
                )


def _overlap(
    site: Site,
    fixed_mask: xr.DataArray | None,
    other: Site,
    free_mask: xr.DataArray | None,
    binding: Binding,
) -> bool:
    """Return whether a conditioned cell may depend on a free cell of another site."""
    dims, other_dims = site.dataset_dims, other.dataset_dims
    step_dim = scan_dim(site, binding)
    # Cells of a fit with ``per`` are independent of each other.
    cut_dims = [d for d in dims if d in other_dims and d in binding.block_dims]
    shared_dims = [d for d in cut_dims if d not in binding.core_dims and d != step_dim]
    if step_dim is None or step_dim != scan_dim(other, binding):
        return bool(
            (
                _reduce_to_dims(fixed_mask, shared_dims) & _reduce_to_dims(free_mask, shared_dims)
            ).any()
        )
    last, first = (
        _find_last_step(_reduce_to_dims(fixed_mask, [step_dim, *shared_dims]), step_dim),
        _find_first_step(_reduce_to_dims(free_mask, [step_dim, *shared_dims]), step_dim),
    )
    return bool((first <= last).any())


def _find_first_step(mask: xr.DataArray, dim: str) -> xr.DataArray:
    """Return the first true step along a dim; a mask without the dim holds for all steps."""
    index = mask.argmax(dim) if dim in mask.dims else 0
    return xr.where(mask.any(dim) if dim in mask.dims else mask, index, _NEVER)


def _find_last_step(mask: xr.DataArray, dim: str) -> xr.DataArray:
    if dim not in mask.dims:
        return xr.where(mask, _NEVER - 1, -1)
    reversed_mask = mask.isel({dim: slice(None, None, -1)})
    return xr.where(mask.any(dim), mask.sizes[dim] - 1 - reversed_mask.argmax(dim), -1)


def _reduce_to_dims(mask: xr.DataArray | None, dims: list[Any]) -> xr.DataArray:
    if mask is None:
        return xr.DataArray(True)
    return mask.any([d for d in mask.dims if d not in dims])


def scan_dim(site: Site, binding: Binding) -> str | None:
    """Return the dim along which a site is scanned, or None if the Dataset does not have it."""
    if not site.scanned or not site.dims:
        return None
    if site.dims[0] == TABLE:
        return binding.dims[0] if len(binding.dims) == 1 else None
    return site.dims[0] if site.dims[0] in binding.dims else None
