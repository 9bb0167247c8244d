"""Run one block under several scenarios, and contrast each scenario with the baseline.

Values that differ between scenarios are stacked along a leading scenario axis, and the kernel
is mapped over it.
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

from xr_aimz.binding import TABLE, Binding, shape_in_model
from xr_aimz.errors import ModelError
from xr_aimz.tracing import Site, is_difference, without_shared_terms

Dims = tuple[str, ...]
# The values that differ between scenarios, stacked along a leading scenario axis. "arrays" are
# replaced arguments; "sites" has for each site a value, the mask of the cells that take it, and
# for each function the mask of the cells that take its result.
ScenarioValues = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ValueRef:
    """Reference to an array, at one index along the dims of the scenarios.

    Cells that are NaN in it are left unchanged. ``is_integer`` says that its values are integers,
    whatever its dtype.
    """

    key: str
    at: Mapping[str, int]
    is_integer: bool = False


@dataclass(frozen=True)
class TargetChange:
    """Change of one argument or site: in each scenario a value, a function, or None."""

    target: str
    by_scenario: tuple[ValueRef | Callable | None, ...]

    @property
    def values(self) -> tuple[ValueRef, ...]:
        """References to values among the changes."""
        return tuple(w for w in self.by_scenario if isinstance(w, ValueRef))

    @property
    def functions(self) -> tuple[Callable, ...]:
        """Functions among the changes, without duplicates."""
        functions = (w for w in self.by_scenario if w is not None and not isinstance(w, ValueRef))
        return tuple({id(f): f for f in functions}.values())


@dataclass(frozen=True)
class ScenarioSet:
    """Scenarios under which a kernel is run, and their contrast.

    Parameters
    ----------
    arguments, sites : tuple of TargetChange
        Changes of arguments, by source key, and of sites, by name.
    dims : mapping of dim to int
        Sizes of the dims of the scenarios, which are the leading dims of a result.
    resampled : frozenset of str
        Latent sites that are drawn again, given the changes, in all scenarios.
    contrast : callable, optional
        Function of the values under a scenario and under the baseline, which is then the
        first scenario. Without one, the scenarios are stacked in the result.
    """

    arguments: tuple[TargetChange, ...]
    sites: tuple[TargetChange, ...]
    dims: Mapping[str, int]
    resampled: frozenset[str] = frozenset()
    contrast: Callable | None = None


def stack_values(
    scenarios: ScenarioSet,
    sites: Mapping[str, Site],
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
) -> ScenarioValues:
    """Stack the arguments and site values that differ between scenarios along a leading axis."""
    # Arguments are replaced and masks broadcast before the map: a program that chose by scenario
    # within its loop would be compiled to a branch for each, and branches round differently.
    inputs = {
        c.target: _stack_argument(c, binding, dims, arrays, sizes) for c in scenarios.arguments
    }
    site_values = {
        c.target: _stack_site(c, sites[c.target], binding, dims, arrays, sizes)
        for c in scenarios.sites
    }
    return {"arrays": inputs, "sites": site_values}


def dims_replaced(
    scenarios: ScenarioSet, binding: Binding, dims: Mapping[str, Dims]
) -> dict[str, Dims]:
    """Return the dims of the arrays; a replaced one may have gained observation dims."""
    return {**dims, **{c.target: _new_dims(c, binding, dims) for c in scenarios.arguments}}


def _new_dims(change: TargetChange, binding: Binding, dims: Mapping[str, Dims]) -> Dims:
    """Return an argument's dims after its change, which may add observation dims."""
    old = dims[change.target]
    names = set(old).union(*(dims[v.key] for v in change.values))
    return (*(d for d in binding.dims if d in names), *(d for d in old if d not in binding.dims))


def _stack_argument(
    change: TargetChange,
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
) -> jax.Array:
    """Return an argument stacked over scenarios: axes ``(scenario, *dims after the change)``."""
    key, axes = change.target, _new_dims(change, binding, dims)
    lengths = dict(zip(dims[key], arrays[key].shape, strict=True)) | dict(sizes)
    current = _to_axes(ValueRef(key, {}), dims[key], arrays[key], axes)
    value, mask = _stack_scenarios(change, dims, arrays, axes)
    values = _replace_cells(change, current, value, mask)
    return jnp.broadcast_to(values, (len(change.by_scenario), *(lengths[d] for d in axes)))


def _stack_site(
    change: TargetChange,
    site: Site,
    binding: Binding,
    dims: Mapping[str, Dims],
    arrays: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Return a site's stacked values, their mask, and a mask for each function, on its axes."""
    # In a fit with ``per`` the kernel runs one cell, whose sites lack the dims in ``per``.
    site_dims = site.dataset_dims[len(binding.per) :]
    value, mask = _stack_scenarios(change, dims, arrays, site_dims)
    shape = (len(change.by_scenario), *shape_in_model(site, binding, sizes))

    def to_full_shape(array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(_to_model_axes(array, site, binding, sizes), shape)

    is_function = [np.array([w is f for w in change.by_scenario]) for f in change.functions]
    ones = (1,) * (len(shape) - 1)
    masks = tuple(jnp.broadcast_to(m.reshape(-1, *ones), shape) for m in is_function)
    return to_full_shape(value), to_full_shape(mask), masks


def _stack_scenarios(
    change: TargetChange, dims: Mapping[str, Dims], arrays: Mapping[str, jax.Array], axes: Dims
) -> tuple[jax.Array, jax.Array]:
    """Stack the values of all scenarios on the dims ``axes``, with the mask of those not NaN."""
    values = [
        _to_axes(w, dims[w.key], arrays[w.key], axes) if isinstance(w, ValueRef) else None
        for w in change.by_scenario
    ]
    present = [v for v in values if v is not None]
    zeros = jnp.zeros((1,) * len(axes), jnp.result_type(*present) if present else bool)
    stacked = jnp.stack(jnp.broadcast_arrays(*(zeros if v is None else v for v in values)))
    is_value = np.array([v is not None for v in values]).reshape(-1, *zeros.shape)
    if not jnp.issubdtype(stacked.dtype, jnp.floating):
        return stacked, jnp.broadcast_to(is_value, stacked.shape)
    return stacked, jnp.asarray(is_value) & ~jnp.isnan(stacked)


def _to_axes(value: ValueRef, dims: Dims, array: jax.Array, axes: Dims) -> jax.Array:
    """Select and transpose a value to ``axes``, with length 1 along dims that it lacks."""
    array = array[tuple(value.at.get(d, slice(None)) for d in dims)]
    rest = [d for d in dims if d not in value.at]
    array = jnp.transpose(array, [rest.index(d) for d in axes if d in rest])
    lengths = iter(array.shape)
    return jnp.reshape(array, tuple(next(lengths) if d in rest else 1 for d in axes))


def _to_model_axes(
    value: jax.Array, site: Site, binding: Binding, sizes: Mapping[str, int]
) -> jax.Array:
    """Reshape stacked values from a site's dims in a Dataset to its axes in the model."""
    if TABLE in site.dims:
        before = site.dims.index(TABLE) + 1
        after = before + len(binding.dims)
        grid = tuple(sizes[d] for d in binding.dims)
        value = jnp.broadcast_to(value, value.shape[:before] + grid + value.shape[after:])
        value = jnp.reshape(value, (*value.shape[:before], prod(grid), *value.shape[after:]))
    lengths = iter(value.shape[1:])
    axes = tuple(1 if d is None else next(lengths) for d in site.dims)
    return jnp.reshape(value, value.shape[:1] + axes)


def _replace_cells(
    change: TargetChange, current: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
    """Return ``value`` in the cells of ``mask``, and ``current`` in all others."""
    dtype = _result_dtype(change, current, value)
    # NaN cannot be cast to an integer; cells outside the mask become zero first.
    value = jnp.where(mask, value, jnp.zeros_like(value))
    return jnp.where(mask, value.astype(dtype), current.astype(dtype))


def _result_dtype(change: TargetChange, current: jax.Array, value: jax.Array) -> Any:
    """Return the dtype after a change: integer values keep an integer dtype, others promote it."""
    all_integer = all(v.is_integer for v in change.values)
    if all_integer and jnp.issubdtype(current.dtype, jnp.number):
        return current.dtype
    return jnp.promote_types(current.dtype, value.dtype)


class SetSites(Messenger):  # type: ignore[misc] # NumPyro is untyped
    """NumPyro handler that sets sites to their values in one scenario, over any other value."""

    def __init__(self, fn: Callable, scenarios: ScenarioSet, now: ScenarioValues) -> None:
        self._changes = {change.target: change for change in scenarios.sites}
        self._now = now
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the value of a sample site that has a change."""
        # Handlers process a message from the innermost outwards: the site has its value by now.
        change = self._changes.get(msg["name"]) if msg["type"] == "sample" else None
        if change is None:
            return
        current = jnp.asarray(msg["value"])
        value, is_set, masks = self._now["sites"][change.target]
        if is_set.shape != current.shape:
            raise ModelError(
                f"do={{{change.target!r}: ...}} is of shape {is_set.shape!r} in the model, where "
                f"the site's value is of shape {current.shape!r}"
            )
        new_value = _replace_cells(change, current, value, is_set)
        for function, mask in zip(change.functions, masks, strict=True):
            new_value = _apply_function(change, function, mask, current, new_value)
        msg["value"] = new_value


def _apply_function(
    change: TargetChange, function: Callable, mask: jax.Array, current: jax.Array, value: jax.Array
) -> jax.Array:
    """Return a function's result in the cells of ``mask``, and ``value`` in all others."""
    result = jnp.asarray(function(current))
    if result.shape != current.shape:
        raise ModelError(
            f"do={{{change.target!r}: ...}}: the function made shape {result.shape!r} of "
            f"{current.shape!r}; it must keep the shape of the site's value"
        )
    return jnp.where(mask, result, value)


def map_scenarios(
    scenarios: ScenarioSet,
    one: Callable[[ScenarioValues], dict[str, jax.Array]],
    now: ScenarioValues,
) -> dict[str, jax.Array]:
    """Map ``one`` over stacked scenario values, and contrast each scenario with the baseline."""
    if scenarios.contrast is not None:
        baseline = jax.tree.map(lambda x: x[0], now)
        one = without_shared_terms(one, baseline, partial(is_difference, scenarios.contrast))
    # A map, not a vmap: the same numbers may round differently in other lanes of a vector.
    # XLA moves out of the loop all that is the same in every scenario.
    return _apply_contrast(scenarios, jax.lax.map(one, now))


def _apply_contrast(
    scenarios: ScenarioSet, values: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Contrast scenarios with the baseline; axes ``(*dims of the scenarios, *the site's)``."""
    # Without the barrier, XLA would fuse a difference with its operands and round once instead
    # of twice: the effect of an intervention that changes nothing would not be zero.
    values = jax.lax.optimization_barrier(dict(values))
    lead = tuple(scenarios.dims.values())
    results = {}
    for name, value in values.items():
        effect = value
        if scenarios.contrast is not None:
            effect = jax.vmap(scenarios.contrast, (0, None))(value[1:], value[0])
            if effect.shape != value[1:].shape:
                raise ModelError(
                    f"contrast= made shape {effect.shape[1:]!r} of {value.shape[1:]!r} for "
                    f"{name!r}; a contrast is taken cell by cell, and reductions come after it"
                )
        results[name] = jnp.reshape(effect, lead + value.shape[1:])
    return results
