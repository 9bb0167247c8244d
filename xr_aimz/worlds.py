"""What a block's arrays and sites are in each of several worlds, side by side.

A world is the model with some arguments replaced and some sites set. All worlds of a block
share their inputs, latents and random words, and are run by one mapped program: the same
instructions, so that equal inputs give equal bits, and what no world changes is worked out
once. A contrast is then taken of every world with the first, the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from xr_aimz.axes import TABLE, dims_in_dataset
from xr_aimz.binding import Binding
from xr_aimz.errors import ModelError
from xr_aimz.model import Site

__all__ = ["Change", "Forced", "Value", "Worlds", "contrasted", "replaced", "settings"]

_LEFT, _VALUE, _FUNCTION = 0, 1, 2  # the first function's code; the next ones count on
Dims = tuple[str, ...]
# For each target: the value and the code of one world; stacked, of all of them.
Now = Mapping[str, tuple[jax.Array, jax.Array]]


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
        return tuple(w for w in self.worlds if w is not None and not isinstance(w, Value))


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
    """For every target its value and code, with the worlds as leading axis."""
    found = {}
    for change in worlds.arguments:
        over = _dims_replaced(change, binding, dims)
        found[f"argument {change.target}"] = _stacked(change, dims, arrays, over)
    for change in worlds.sites:
        site = sites[change.target]
        over = dims_in_dataset(site, binding)
        value, code = _stacked(change, dims, arrays, over)
        found[f"site {site.name}"] = _in_model(value, site, binding, sizes), code
    return found


def _dims_replaced(change: Change, binding: Binding, dims: Mapping[str, Dims]) -> Dims:
    """Those that the argument has, and what observation dims its new values add."""
    own = dims[change.target]
    there = set(own).union(*(dims[v.key] for v in change.values))
    return (*(d for d in binding.dims if d in there), *(d for d in own if d not in binding.dims))


def _stacked(
    change: Change, dims: Mapping[str, Dims], arrays: Mapping[str, jax.Array], over: Dims
) -> tuple[jax.Array, jax.Array]:
    codes, values = [], []
    functions = change.functions
    for setting in change.worlds:
        if isinstance(setting, Value):
            values.append(_laid(setting, dims[setting.key], arrays[setting.key], over))
            codes.append(_VALUE)
        else:
            # By identity: functions may be equal and yet not the same.
            values.append(jnp.zeros((1,) * len(over), _least(change, arrays)))
            place = next((i for i, f in enumerate(functions) if f is setting), None)
            codes.append(_LEFT if place is None else _FUNCTION + place)
    return jnp.stack(jnp.broadcast_arrays(*values)), jnp.asarray(np.array(codes, np.int32))


def _least(change: Change, arrays: Mapping[str, jax.Array]) -> Any:
    """A dtype that promotes none of the values."""
    kinds = [arrays[v.key].dtype for v in change.values]
    return jnp.result_type(*kinds) if kinds else jnp.bool_


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


def replaced(
    worlds: Worlds,
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
    now: Now,
) -> tuple[dict[str, jax.Array], dict[str, Dims]]:
    """The arrays of one world, and their dims: a new value may bring observation dims."""
    arrays, dims = dict(arrays), dict(dims)
    for change in worlds.arguments:
        key, over = change.target, _dims_replaced(change, binding, dims)
        lengths = dict(zip(dims[key], arrays[key].shape, strict=True)) | dict(sizes)
        current = _laid(Value(key, {}), dims[key], arrays[key], over)
        shape = tuple(lengths[d] for d in over)
        arrays[key] = jnp.broadcast_to(_changed(change, current, now[f"argument {key}"]), shape)
        dims[key] = over
    return arrays, dims


def _changed(change: Change, current: jax.Array, now: tuple[jax.Array, jax.Array]) -> jax.Array:
    value, code = now
    dtype = _dtype(change, current, value)
    result = current.astype(dtype)
    if change.values:
        told = code == _VALUE
        if jnp.issubdtype(value.dtype, jnp.floating):
            told = told & ~jnp.isnan(value)
            # NaN has no integer, and is not taken.
            value = jnp.where(told, value, 0)
        result = jnp.where(told, value.astype(dtype), result)
    for place, function in enumerate(change.functions):
        made = jnp.asarray(function(current))
        if made.shape != current.shape:
            raise ModelError(
                f"do={{{change.target!r}: ...}}: the function made shape {made.shape!r} of "
                f"{current.shape!r}; it must keep the shape of the site's value"
            )
        wider = jnp.promote_types(result.dtype, made.dtype)
        result = jnp.where(code == _FUNCTION + place, made.astype(wider), result.astype(wider))
    return result


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
        made = _changed(change, current, self._now[f"site {change.target}"])
        if made.shape != current.shape:
            raise ModelError(
                f"do={{{change.target!r}: ...}} is of shape {made.shape!r} in the model, where "
                f"the site's value is of shape {current.shape!r}"
            )
        msg["value"] = made


def contrasted(worlds: Worlds, values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
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
