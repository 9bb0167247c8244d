"""Convert between dims of a Dataset and axes of a model's arrays: shapes and blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from xr_aimz.binding.spec import Binding, BoundArgument
from xr_aimz.tracing import Block, Site


def arrange(
    binding: Binding, arrays: Mapping[str, Any], dims: Mapping[str, tuple[str, ...]], block: Block
) -> dict[str, Any]:
    """Arrange the arrays of one block as the model's keyword arguments; traceable by JAX.

    Parameters
    ----------
    binding : Binding
    arrays : mapping of source key to array
        Absent outcomes keep their default, ``None``.
    dims : mapping of source key to tuple of str
        The dims of each array: observation dims first, in order.
    block : Block
    """
    passed = {**binding.constants, **binding.concrete}
    for argument in binding.arguments:
        keys = [source.key for source in argument.sources]
        if argument.name not in binding.concrete and all(key in arrays for key in keys):
            passed[argument.name] = _lay_out(binding, argument, arrays, dims, block, jnp)
    return passed


def arrange_values(
    binding: Binding,
    name: str,
    arrays: Mapping[str, np.ndarray],
    dims: Mapping[str, tuple[str, ...]],
    block: Block,
) -> np.ndarray:
    """Arrange one argument of the model as :func:`arrange` does, as a NumPy array."""
    return np.array(_lay_out(binding, binding.argument(name), arrays, dims, block, np))


def _lay_out(
    binding: Binding,
    argument: BoundArgument,
    arrays: Mapping[str, Any],
    dims: Mapping[str, tuple[str, ...]],
    block: Block,
    xp: Any,
) -> Any:
    convert = _to_table if binding.layout == "table" else _to_grid
    keys = [source.key for source in argument.sources]
    converted = [convert(arrays[k], dims[k], binding.dims, block.sizes, xp) for k in keys]
    return xp.stack(xp.broadcast_arrays(*converted), axis=-1) if argument.stacked else converted[0]


def _to_grid(
    array: Any, dims: tuple[str, ...], observation: tuple[str, ...], sizes: Any, xp: Any
) -> Any:
    if not set(dims) & set(observation):
        return array
    extra = tuple(n for d, n in zip(dims, array.shape, strict=True) if d not in observation)
    shape = tuple(sizes[d] if d in dims else 1 for d in observation) + extra
    return xp.reshape(array, shape)


def _to_table(
    array: Any, dims: tuple[str, ...], observation: tuple[str, ...], sizes: Any, xp: Any
) -> Any:
    if not set(dims) & set(observation):
        return array
    grid = _to_grid(array, dims, observation, sizes, xp)
    extra = tuple(grid.shape[len(observation) :])
    full_grid = xp.broadcast_to(grid, tuple(sizes[d] for d in observation) + extra)
    rows = int(np.prod([sizes[d] for d in observation]))
    return xp.reshape(full_grid, (rows, *extra))


def block_of(binding: Binding, sizes: Mapping[str, int]) -> Block:
    """Return the block of the given sizes, with the batch axis of each observation dim."""
    rank = len(binding.dims)
    table = binding.layout == "table"
    axes = {d: -1 if table else i - rank for i, d in enumerate(binding.dims)}
    model_sizes = {d: n for d, n in sizes.items() if d not in binding.per}
    stacked = {a.name: len(a.sources) for a in binding.arguments if a.stacked}
    return Block(model_sizes, axes, table, binding.per, stacked)


TABLE = "__table__"
# Primes far from any likely size, so that no two dims, nor a dim and a fixed size, agree.
_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179)


def probe_sizes(binding: Binding, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of a probe: a distinct length for each observation dim."""
    free = [p for p in _PRIMES if p not in sizes.values()]
    # Lengths far from the sizes, so that what is derived from them, such as a half, differs too.
    free.sort(key=lambda p: min((abs(p - n) for n in sizes.values()), default=0), reverse=True)
    return {**sizes, **dict(zip(binding.dims, free, strict=False))}


def assign_dims(
    sites: tuple[Site, ...],
    probed: tuple[Site, ...] | None,
    binding: Binding,
    sizes: Mapping[str, int],
) -> tuple[Site, ...]:
    """Fill in the ``dims`` of sites, from a trace and (if any) the trace on a probe."""
    lengths = _axis_lengths(binding, sizes)
    probe = {s.name: s for s in probed or ()}
    probe_lengths = _axis_lengths(binding, probe_sizes(binding, sizes))
    plates = {(p.name, p.dim) for s in sites if s.kind == "observed" for p in s.plates}
    named = []
    for site in sites:
        axes = _match_axes(site, probe.get(site.name), lengths, probe_lengths)
        named.append(replace(site, dims=_infer_dims(site, axes, binding, sizes, lengths, plates)))
    return tuple(named)


def assign_lengths(
    sites: tuple[Site, ...],
    probed: tuple[Site, ...] | None,
    binding: Binding,
    sizes: Mapping[str, int],
    trace: Callable[[Mapping[str, int]], tuple[Site, ...] | None],
) -> tuple[Site, ...]:
    """Fill in the ``lengths`` of sites, from the probe and one more trace for each dim.

    Parameters
    ----------
    sites : tuple of Site
        Sites with their dims.
    probed : tuple of Site, optional
        Sites traced on the probe.
    binding : Binding
    sizes : mapping of dim to int
    trace : callable
        Traces the model on other sizes; returns None for sizes on which it does not run.
    """
    probe = {s.name: s for s in probed or ()}
    latents = [s for s in sites if s.kind == "latent" and s.name in probe]
    derived = {s.name for s in latents if _has_other_lengths(s, probe[s.name], binding)}
    if not derived:
        return sites
    probe_lengths = probe_sizes(binding, sizes)
    lengths: dict[str, set[str]] = {name: set() for name in derived}
    for dim in binding.dims:
        longer = trace({**sizes, dim: probe_lengths[dim]})
        by_name = None if longer is None else {s.name: s for s in longer}
        for site in (s for s in latents if s.name in derived):
            other = None if by_name is None else by_name.get(site.name)
            # If the model does not run when only this dim changes, the length may depend on it.
            if other is None or _has_other_lengths(site, other, binding):
                lengths[site.name].add(dim)
    return tuple(replace(s, lengths=frozenset(lengths.get(s.name, ()))) for s in sites)


def _has_other_lengths(site: Site, other: Site, binding: Binding) -> bool:
    """Return whether an axis that is not a dim of the Dataset has another length in ``other``."""
    if len(site.shape) != len(other.shape):
        return True
    axes = zip(site.dims, site.shape, other.shape, strict=True)
    return any(n != m and dim not in (*binding.dims, TABLE) for dim, n, m in axes)


def _axis_lengths(binding: Binding, sizes: Mapping[str, int]) -> dict[str, int]:
    if binding.layout == "table":
        return {TABLE: prod(sizes[d] for d in binding.dims)}
    return {d: sizes[d] for d in binding.dims}


def _match_axes(
    site: Site, probe: Site | None, lengths: dict[str, int], probe_lengths: dict[str, int]
) -> dict[int, str] | None:
    """Match axes to dims by lengths that changed with the probe; return None without a probe."""
    if probe is None or len(probe.shape) != len(site.shape):
        return None
    dim_of_axis = {}
    for axis, pair in enumerate(zip(site.shape, probe.shape, strict=True)):
        for dim, length in lengths.items():
            if pair == (length, probe_lengths[dim]):
                dim_of_axis[axis] = dim
    return dim_of_axis


def _infer_dims(
    site: Site,
    dim_of_axis: dict[int, str] | None,
    binding: Binding,
    sizes: Mapping[str, int],
    lengths: dict[str, int],
    outcome_plates: set[tuple[str, int]],
) -> tuple[str | None, ...]:
    observed = tuple(lengths)
    outcome_dims = _outcome_dims(site, binding, observed)
    if outcome_dims is not None:
        return outcome_dims
    batch = site.batch_ndim if site.kind != "deterministic" else _count_batch_axes(site, lengths)
    plates = {batch + p.dim: p for p in site.plates if batch + p.dim >= 0}
    dims: list[str | None] = []
    for axis, size in enumerate(site.shape):
        position = axis - batch + len(observed)
        positional = None
        spans = site.kind != "deterministic" or site.plates or len(site.shape) >= len(observed) > 1
        if dim_of_axis is None and spans and 0 <= position < len(observed) and axis < batch:
            # With a probe, an axis whose length stayed has the length of the dim by coincidence.
            positional = observed[position]
        plate = plates.get(axis)
        if dim_of_axis is not None and axis in dim_of_axis:
            dims.append(dim_of_axis[axis])
        elif axis >= batch:
            dims.append(_event_dim(site, binding, axis - batch))
        elif plate is not None and size == plate.size:
            by_position = positional if (plate.name, plate.dim) in outcome_plates else None
            fits = by_position is not None and size == lengths[by_position]
            other_size = sizes.get(plate.name, size) != size
            named = f"{site.name}_dim_{axis}" if other_size else plate.name
            dims.append(by_position if fits else named)
        elif positional and size == lengths[positional] and site.kind != "latent":
            dims.append(positional)
        elif size == 1 and (site.plates or site.kind != "latent"):
            dims.append(None)
        else:
            dims.append(f"{site.name}_dim_{axis}")
    return _make_distinct(site, dims)


def _count_batch_axes(site: Site, lengths: Mapping[str, int]) -> int:
    """Count the leading axes of a deterministic that broadcast against the outcome's batch."""
    depth = max(
        [len(lengths) if len(site.shape) >= len(lengths) else 0] + [-p.dim for p in site.plates]
    )
    return min(depth, len(site.shape))


def _outcome_dims(
    site: Site, binding: Binding, observed: tuple[str, ...]
) -> tuple[str | None, ...] | None:
    """Return an outcome's dims, those of its variable as laid out for the model; else None."""
    if site.obs_argument is None:
        return None
    source = binding.argument(site.obs_argument).sources[0]
    first: list[str | None] = [d if d in (*source.dims, TABLE) else None for d in observed]
    extra: list[str | None] = [d for d in source.dims if d not in binding.block_dims]
    dims = tuple(first + extra) if set(source.dims) & set(binding.dims) else tuple(extra)
    return dims if len(dims) == len(site.shape) else None


def _event_dim(site: Site, binding: Binding, index: int) -> str:
    if site.event_dims is not None and index < len(site.event_dims):
        return site.event_dims[index]
    if site.obs_argument is not None:
        # The event axes of a multivariate outcome are the trailing dims of its variable.
        source = binding.argument(site.obs_argument).sources[0]
        trailing = [d for d in source.dims if d not in binding.block_dims]
        if index < len(trailing):
            return trailing[index]
    return f"{site.name}_dim_{site.batch_ndim + index}"


def _make_distinct(site: Site, dims: list[str | None]) -> tuple[str | None, ...]:
    """Rename repeated dims of a site: the later axis gets a name of its own."""
    names: set[str] = set()
    result: list[str | None] = []
    for axis, dim in enumerate(dims):
        name = f"{site.name}_dim_{axis}" if dim in names else dim
        result.append(name)
        if name is not None:
            names.add(name)
    return tuple(result)


def assign_variables(sites: Mapping[str, Site], binding: Binding) -> dict[str, Site]:
    """Fill in the ``variable`` and ``dataset_dims`` of sites, from their ``dims``.

    The variable is that of an outcome, or bears the name of the site. Dims of ``per`` come first;
    broadcast axes are dropped, and a table's axis becomes the observation dims.
    """
    assigned = {}
    for name, site in sites.items():
        # A slash separates groups of a DataTree and of a Zarr store.
        variable = site.name.replace("/", ".")
        if site.obs_argument is not None:
            variable = binding.argument(site.obs_argument).sources[0].name
        spread = [binding.dims if d == TABLE else (d,) for d in site.dims if d is not None]
        dims = binding.per + tuple(d for dims in spread for d in dims)
        assigned[name] = replace(site, variable=variable, dataset_dims=dims)
    return assigned


def cell_binding(binding: Binding, sites: Mapping[str, Site]) -> tuple[Binding, dict[str, Site]]:
    """Return the binding of one cell of ``per``, and its sites: without the dims of ``per``."""
    cell = binding.of_cell()
    return cell, assign_variables(sites, cell)


def shape_in_dataset(
    dims: tuple[str | None, ...],
    binding: Binding,
    sizes: Mapping[str, int],
    shape: tuple[int, ...],
) -> tuple[int, ...]:
    """Return the shape in a Dataset of a block's array, given its dims and shape in the model."""
    lengths: list[int] = []
    for dim, length in zip(dims, shape, strict=True):
        if dim == TABLE:
            lengths.extend(sizes[d] for d in binding.dims)
        elif dim is not None:
            lengths.append(length)
    return tuple(lengths)


def shape_in_model(site: Site, binding: Binding, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape in the model of a site's array; inverse of :func:`shape_in_dataset`."""
    lengths = _axis_lengths(binding, sizes)
    fixed = zip(site.dims, site.shape, strict=True)
    return tuple(1 if d is None else lengths.get(d, n) for d, n in fixed)


def broadcast_in_model(
    array: Any, dims: tuple[str, ...], site: Site, binding: Binding, sizes: Mapping[str, int]
) -> Any:
    """Reshape a block's array with some of a site's dims to broadcast against the site."""
    shape = dict(zip(dims, array.shape, strict=True))
    site_dims = site.dataset_dims
    value = jnp.reshape(array, tuple(shape.get(d, 1) for d in site_dims))
    if TABLE in site.dims:
        lengths = {d: sizes[d] for d in binding.dims}
        value = jnp.broadcast_to(value, tuple(lengths.get(d, shape.get(d, 1)) for d in site_dims))
        shape[TABLE] = prod(lengths.values())
    return jnp.reshape(value, tuple(1 if d is None else shape.get(d, 1) for d in site.dims))


def is_float(value: Any) -> bool:
    """Return whether a value is an array of floats, which can hold NaN."""
    return hasattr(value, "dtype") and bool(jnp.issubdtype(value.dtype, jnp.floating))
