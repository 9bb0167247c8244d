"""Which dimension each axis of a site is.

A site's shape says how long its axes are, not what they are. The model is traced a
second time on a *probe*: the same arrays with every observation dimension set to a
length of its own. An axis that changes with a dimension is that dimension, whatever its
place. What does not change is told by its plates: by name and size, else it is a
dimension of its own, named after the plate; event axes by ``infer={"event_dims": ...}``.
A model with sizes written into it cannot be probed; its axes are then matched by
position against the outcome's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import jax.numpy as jnp

from xr_aimz.binding import Binding
from xr_aimz.model import Site

__all__ = [
    "TABLE",
    "broadcast_in_model",
    "dims_in_dataset",
    "probe_sizes",
    "shape_in_dataset",
    "shape_in_model",
    "with_dims",
    "with_lengths",
]

TABLE = "__table__"
# Primes far from any likely size, so that no two dims, nor a dim and a fixed size, agree.
_PRIMES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179)


def probe_sizes(binding: Binding, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of a probe: a length of its own for each observation dimension."""
    free = [p for p in _PRIMES if p not in sizes.values()]
    # Far from the sizes themselves, so that half of a length is another half too.
    free.sort(key=lambda p: min((abs(p - n) for n in sizes.values()), default=0), reverse=True)
    return {**sizes, **dict(zip(binding.dims, free, strict=False))}


def with_dims(
    sites: tuple[Site, ...],
    probed: tuple[Site, ...] | None,
    binding: Binding,
    sizes: Mapping[str, int],
) -> tuple[Site, ...]:
    """The sites with their ``dims`` filled in, from a trace and (if any) its probe."""
    lengths = _lengths(binding, sizes)
    probe = {s.name: s for s in probed or ()}
    probe_lengths = _lengths(binding, probe_sizes(binding, sizes))
    around = {(p.name, p.dim) for s in sites if s.kind == "observed" for p in s.plates}
    found = []
    for site in sites:
        moved = _moved(site, probe.get(site.name), lengths, probe_lengths)
        found.append(replace(site, dims=_dims(site, moved, binding, sizes, lengths, around)))
    return tuple(found)


def with_lengths(
    sites: tuple[Site, ...],
    probed: tuple[Site, ...] | None,
    binding: Binding,
    sizes: Mapping[str, int],
    trace: Callable[[Mapping[str, int]], tuple[Site, ...] | None],
) -> tuple[Site, ...]:
    """The sites with their ``lengths`` filled in, from the probe and one more trace a dim.

    Parameters
    ----------
    sites : tuple of Site
        With their dims.
    probed : tuple of Site, optional
        Those of the probe.
    binding : Binding
    sizes : mapping of dim to int
    trace : callable
        Traces the model on other sizes; None for those that it does not run on.
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
            # A model that does not run when this dim alone changes may go by it.
            if other is None or _has_other_lengths(site, other, binding):
                lengths[site.name].add(dim)
    return tuple(replace(s, lengths=frozenset(lengths.get(s.name, ()))) for s in sites)


def _has_other_lengths(site: Site, other: Site, binding: Binding) -> bool:
    """Whether an axis that is no dimension of the Dataset has another length in ``other``."""
    if len(site.shape) != len(other.shape):
        return True
    axes = zip(site.dims, site.shape, other.shape, strict=True)
    return any(n != m and dim not in (*binding.dims, TABLE) for dim, n, m in axes)


def _lengths(binding: Binding, sizes: Mapping[str, int]) -> dict[str, int]:
    if binding.layout == "table":
        return {TABLE: prod(sizes[d] for d in binding.dims)}
    return {d: sizes[d] for d in binding.dims}


def _moved(
    site: Site, probe: Site | None, lengths: dict[str, int], probe_lengths: dict[str, int]
) -> dict[int, str] | None:
    """Axes whose length followed a dimension to the probe; None where there is no probe."""
    if probe is None or len(probe.shape) != len(site.shape):
        return None
    found = {}
    for axis, pair in enumerate(zip(site.shape, probe.shape, strict=True)):
        for dim, length in lengths.items():
            if pair == (length, probe_lengths[dim]):
                found[axis] = dim
    return found


def _dims(
    site: Site,
    moved: dict[int, str] | None,
    binding: Binding,
    sizes: Mapping[str, int],
    lengths: dict[str, int],
    around: set[tuple[str, int]],
) -> tuple[str | None, ...]:
    observed = tuple(lengths)
    own = _outcome_dims(site, binding, observed)
    if own is not None:
        return own
    batch = site.batch_ndim if site.kind != "deterministic" else _batch_ndim(site, lengths)
    frames = {batch + p.dim: p for p in site.plates if batch + p.dim >= 0}
    dims: list[str | None] = []
    for axis, size in enumerate(site.shape):
        place = axis - batch + len(observed)
        positional = None
        spans = site.kind != "deterministic" or site.plates or len(site.shape) >= len(observed) > 1
        if moved is None and spans and 0 <= place < len(observed) and axis < batch:
            # With a probe, an axis that did not move only happens to be as long.
            positional = observed[place]
        frame = frames.get(axis)
        if moved is not None and axis in moved:
            dims.append(moved[axis])
        elif axis >= batch:
            dims.append(_event_dim(site, binding, axis - batch))
        elif frame is not None and size == frame.size:
            by_place = positional if (frame.name, frame.dim) in around else None
            fits = by_place is not None and size == lengths[by_place]
            other = sizes.get(frame.name, size) != size
            named = f"{site.name}_dim_{axis}" if other else frame.name
            dims.append(by_place if fits else named)
        elif positional and size == lengths[positional] and site.kind != "latent":
            dims.append(positional)
        elif size == 1 and (site.plates or site.kind != "latent"):
            dims.append(None)
        else:
            dims.append(f"{site.name}_dim_{axis}")
    return _distinct(site, dims)


def _batch_ndim(site: Site, lengths: Mapping[str, int]) -> int:
    """How many leading axes of a deterministic broadcast against the outcome's batch."""
    depth = max(
        [len(lengths) if len(site.shape) >= len(lengths) else 0] + [-p.dim for p in site.plates]
    )
    return min(depth, len(site.shape))


def _outcome_dims(
    site: Site, binding: Binding, observed: tuple[str, ...]
) -> tuple[str | None, ...] | None:
    """An outcome's dims are those of its variable, as it was laid out for the model."""
    if site.obs_argument is None:
        return None
    source = binding.argument(site.obs_argument).sources[0]
    first: list[str | None] = [d if d in (*source.dims, TABLE) else None for d in observed]
    extra: list[str | None] = [d for d in source.dims if d not in binding.cut_dims]
    dims = tuple(first + extra) if set(source.dims) & set(binding.dims) else tuple(extra)
    return dims if len(dims) == len(site.shape) else None


def _event_dim(site: Site, binding: Binding, index: int) -> str:
    if site.event_dims is not None and index < len(site.event_dims):
        return site.event_dims[index]
    if site.obs_argument is not None:
        # A multivariate outcome has the names of its variable's own trailing dims.
        source = binding.argument(site.obs_argument).sources[0]
        trailing = [d for d in source.dims if d not in binding.cut_dims]
        if index < len(trailing):
            return trailing[index]
    return f"{site.name}_dim_{site.batch_ndim + index}"


def _distinct(site: Site, dims: list[str | None]) -> tuple[str | None, ...]:
    """Two axes of one site never bear the same name: the later one gets its own."""
    seen: set[str] = set()
    result: list[str | None] = []
    for axis, dim in enumerate(dims):
        name = f"{site.name}_dim_{axis}" if dim in seen else dim
        result.append(name)
        if name is not None:
            seen.add(name)
    return tuple(result)


def dims_in_dataset(site: Site, binding: Binding) -> tuple[str, ...]:
    """The dims of a site's array in a Dataset: those of ``per``, then the site's own.

    Broadcast axes are gone, and a table is unfolded.
    """
    spread = [binding.dims if d == TABLE else (d,) for d in site.dims if d is not None]
    return binding.per + tuple(d for dims in spread for d in dims)


def shape_in_dataset(
    dims: tuple[str | None, ...],
    binding: Binding,
    sizes: Mapping[str, int],
    shape: tuple[int, ...],
) -> tuple[int, ...]:
    """The shape, in a Dataset, of a block's value with those dims and that shape."""
    lengths: list[int] = []
    for dim, length in zip(dims, shape, strict=True):
        if dim == TABLE:
            lengths.extend(sizes[d] for d in binding.dims)
        elif dim is not None:
            lengths.append(length)
    return tuple(lengths)


def shape_in_model(site: Site, binding: Binding, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that the model gives a site, for one block: the way back."""
    lengths = _lengths(binding, sizes)
    fixed = zip(site.dims, site.shape, strict=True)
    return tuple(1 if d is None else lengths.get(d, n) for d, n in fixed)


def broadcast_in_model(
    array: Any, dims: tuple[str, ...], site: Site, binding: Binding, sizes: Mapping[str, int]
) -> Any:
    """A block's array with some of a site's dims, so that it broadcasts against the site."""
    own = dict(zip(dims, array.shape, strict=True))
    whole = dims_in_dataset(site, binding)
    value = jnp.reshape(array, tuple(own.get(d, 1) for d in whole))
    if TABLE in site.dims:
        lengths = {d: sizes[d] for d in binding.dims}
        value = jnp.broadcast_to(value, tuple(lengths.get(d, own.get(d, 1)) for d in whole))
        own[TABLE] = prod(lengths.values())
    return jnp.reshape(value, tuple(1 if d is None else own.get(d, 1) for d in site.dims))
