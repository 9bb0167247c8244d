"""What a block's arrays and sites are in each of several worlds, side by side.

A world is the model with some arguments replaced and some sites set. All worlds of a block
share their inputs, latents and random words, and are run by one mapped program: the same
instructions, so that equal inputs give equal bits, and what no world changes is worked out
once. A contrast is then taken of every world with the first, the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from xr_aimz.axes import TABLE, dims_in_dataset, shape_in_model
from xr_aimz.binding import Binding
from xr_aimz.differing import differing, subtracts
from xr_aimz.errors import ModelError
from xr_aimz.model import Site

__all__ = ["Change", "Forced", "Value", "Worlds", "across", "dims_replaced", "settings"]

Dims = tuple[str, ...]
# What changes from world to world; stacked, with the worlds as leading axis. "arrays" are those
# of the arguments, replaced; "sites" the value of each site and where it, or a function, is taken.
Now = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Value:
    """One of the arrays, at a place along the dims of the scenarios. NaN leaves a cell alone.

    ``whole`` values are integers, whatever the dtype that they travel in.
    """

    key: str
    at: Mapping[str, int]
    whole: bool = False


@dataclass(frozen=True)
class Change:
    """What becomes of one target: in each world a value, a function of it, or nothing."""

    target: str
    worlds: tuple[Value | Callable | None, ...]

    @property
    def values(self) -> tuple[Value, ...]:
        return tuple(w for w in self.worlds if isinstance(w, Value))

    @property
    def functions(self) -> tuple[Callable, ...]:
        """Each once."""
        made = (w for w in self.worlds if w is not None and not isinstance(w, Value))
        return tuple({id(f): f for f in made}.values())


@dataclass(frozen=True)
class Worlds:
    """The worlds of a program.

    Parameters
    ----------
    arguments, sites : tuple of Change
        By source key, and by name of site.
    dims : mapping of dim to int
        The dims of the scenarios: a result's first ones.
    redrawn : frozenset of str
        Latent sites that are drawn given what is changed, in all worlds.
    contrast : callable, optional
        Of a scenario and the baseline, which is then the first world. Without one, the
        worlds are returned side by side.
    """

    arguments: tuple[Change, ...]
    sites: tuple[Change, ...]
    dims: Mapping[str, int]
    redrawn: frozenset[str] = frozenset()
    contrast: Callable | None = None


def settings(
    worlds: Worlds,
    sites: Mapping[str, Site],
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
) -> Now:
    """All that differs between the worlds, stacked: to be mapped over."""
    # Arguments are replaced and masks spread out here, before the map: a program that chose by
    # world in its loop would be compiled to a branch for each, and those round differently.
    made = {c.target: _replaced(c, binding, dims, arrays, sizes) for c in worlds.arguments}
    told = {
        c.target: _told(c, sites[c.target], binding, dims, arrays, sizes) for c in worlds.sites
    }
    return {"arrays": made, "sites": told}


def dims_replaced(worlds: Worlds, binding: Binding, dims: Mapping[str, Dims]) -> dict[str, Dims]:
    """The dims of the arrays: those replaced may have gained observation dims."""
    return {**dims, **{c.target: _dims_over(c, binding, dims) for c in worlds.arguments}}


def _dims_over(change: Change, binding: Binding, dims: Mapping[str, Dims]) -> Dims:
    own = dims[change.target]
    there = set(own).union(*(dims[v.key] for v in change.values))
    return (*(d for d in binding.dims if d in there), *(d for d in own if d not in binding.dims))


def _replaced(
    change: Change,
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
) -> jax.Array:
    key, over = change.target, _dims_over(change, binding, dims)
    lengths = dict(zip(dims[key], arrays[key].shape, strict=True)) | dict(sizes)
    current = _laid(Value(key, {}), dims[key], arrays[key], over)
    value, told = _stacked(change, dims, arrays, over)
    made = _either(change, current, value, told)
    return jnp.broadcast_to(made, (len(change.worlds), *(lengths[d] for d in over)))


def _told(
    change: Change,
    site: Site,
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """The value, where it is taken, and where each function is, on the site's own axes."""
    # Of a fit with ``per`` this is one cell: its site has no dims of the cells.
    own = dims_in_dataset(site, binding)[len(binding.per) :]
    value, told = _stacked(change, dims, arrays, own)
    shape = (len(change.worlds), *shape_in_model(site, binding, sizes))

    def whole(array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(_in_model(array, site, binding, sizes), shape)

    by_function = [np.array([w is f for w in change.worlds]) for f in change.functions]
    ones = (1,) * (len(shape) - 1)
    masks = tuple(jnp.broadcast_to(m.reshape(-1, *ones), shape) for m in by_function)
    return whole(value), whole(told), masks


def _stacked(
    change: Change, dims: Mapping[str, Dims], arrays: Mapping[str, jax.Array], over: Dims
) -> tuple[jax.Array, jax.Array]:
    """The values of all worlds, and where they are taken: in their world, and if not NaN."""
    values = [
        _laid(w, dims[w.key], arrays[w.key], over) if isinstance(w, Value) else None
        for w in change.worlds
    ]
    there = [v for v in values if v is not None]
    blank = jnp.zeros((1,) * len(over), jnp.result_type(*there) if there else bool)
    stacked = jnp.stack(jnp.broadcast_arrays(*(blank if v is None else v for v in values)))
    given = np.array([v is not None for v in values]).reshape(-1, *blank.shape)
    if not jnp.issubdtype(stacked.dtype, jnp.floating):
        return stacked, jnp.broadcast_to(given, stacked.shape)
    return stacked, jnp.asarray(given) & ~jnp.isnan(stacked)


def _laid(value: Value, dims: Dims, array: jax.Array, over: Dims) -> jax.Array:
    """The value with an axis for each of the dims ``over``, of length 1 where it has none."""
    array = array[tuple(value.at.get(d, slice(None)) for d in dims)]
    rest = [d for d in dims if d not in value.at]
    array = jnp.transpose(array, [rest.index(d) for d in over if d in rest])
    lengths = iter(array.shape)
    return jnp.reshape(array, tuple(next(lengths) if d in rest else 1 for d in over))


def _in_model(
    value: jax.Array, site: Site, binding: Binding, sizes: Mapping[str, int]
) -> jax.Array:
    """Values along a site's dims in a Dataset, on the axes that it has in the model."""
    if TABLE in site.dims:
        before = site.dims.index(TABLE) + 1
        after = before + len(binding.dims)
        grid = tuple(sizes[d] for d in binding.dims)
        value = jnp.broadcast_to(value, value.shape[:before] + grid + value.shape[after:])
        value = jnp.reshape(value, (*value.shape[:before], prod(grid), *value.shape[after:]))
    lengths = iter(value.shape[1:])
    axes = tuple(1 if d is None else next(lengths) for d in site.dims)
    return jnp.reshape(value, value.shape[:1] + axes)


def _either(change: Change, current: jax.Array, value: jax.Array, told: jax.Array) -> jax.Array:
    dtype = _dtype(change, current, value)
    # NaN has no integer, and is not taken.
    value = jnp.where(told, value, jnp.zeros_like(value))
    return jnp.where(told, value.astype(dtype), current.astype(dtype))


def _dtype(change: Change, current: jax.Array, value: jax.Array) -> Any:
    """Whole numbers leave an integer an integer; other values make it a float."""
    whole = all(v.whole for v in change.values)
    if whole and jnp.issubdtype(current.dtype, jnp.number):
        return current.dtype
    return jnp.promote_types(current.dtype, value.dtype)


class Forced(Messenger):  # type: ignore[misc] # NumPyro is untyped
    """Sets sites to what they are in one world, whatever they were drawn or known to be."""

    def __init__(self, fn: Callable, worlds: Worlds, now: Now) -> None:
        self._changes = {change.target: change for change in worlds.sites}
        self._now = now
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        # Handlers see a message from the innermost outwards: by now the site has its value.
        change = self._changes.get(msg["name"]) if msg["type"] == "sample" else None
        if change is None:
            return
        current = jnp.asarray(msg["value"])
        value, told, masks = self._now["sites"][change.target]
        if told.shape != current.shape:
            raise ModelError(
                f"do={{{change.target!r}: ...}} is of shape {told.shape!r} in the model, where "
                f"the site's value is of shape {current.shape!r}"
            )
        made = _either(change, current, value, told)
        for function, mask in zip(change.functions, masks, strict=True):
            made = _by_function(change, function, mask, current, made)
        msg["value"] = made


def _by_function(
    change: Change, function: Callable, mask: jax.Array, current: jax.Array, made: jax.Array
) -> jax.Array:
    found = jnp.asarray(function(current))
    if found.shape != current.shape:
        raise ModelError(
            f"do={{{change.target!r}: ...}}: the function made shape {found.shape!r} of "
            f"{current.shape!r}; it must keep the shape of the site's value"
        )
    return jnp.where(mask, found, made)


def across(
    worlds: Worlds, one: Callable[[Now], dict[str, jax.Array]], now: Now
) -> dict[str, jax.Array]:
    """The values that ``one`` has in every world, and of those the contrasts."""
    if worlds.contrast is not None:
        world = jax.tree.map(lambda each: each[0], now)
        one = differing(one, world, partial(subtracts, worlds.contrast))
    # A map, not a vmap: in other lanes of a vector the same numbers may round otherwise.
    # XLA takes out of its loop what no world changes.
    return _contrasted(worlds, jax.lax.map(one, now))


def _contrasted(worlds: Worlds, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Each scenario against the baseline; axes ``(*dims of the scenarios, *the site's)``."""
    # Fused with what it contrasts, a difference would be rounded once and not twice: the
    # effect of nothing would not be nothing.
    values = jax.lax.optimization_barrier(dict(values))
    lead = tuple(worlds.dims.values())
    found = {}
    for name, value in values.items():
        shown = value
        if worlds.contrast is not None:
            shown = jax.vmap(worlds.contrast, (0, None))(value[1:], value[0])
            if shown.shape != value[1:].shape:
                raise ModelError(
                    f"contrast= made shape {shown.shape[1:]!r} of {value.shape[1:]!r} for "
                    f"{name!r}; a contrast is taken cell by cell, and reductions come after it"
                )
        found[name] = jnp.reshape(shown, lead + value.shape[1:])
    return found
