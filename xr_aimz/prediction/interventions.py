"""Resolve the targets of ``do=``, and align their values to the Dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    Binding,
    check_units,
    extra_labels,
    match_labels,
)
from xr_aimz.errors import (
    DimensionError,
    DtypeError,
    InterventionError,
    LabelError,
    MissingVariableError,
    list_names,
)
from xr_aimz.fits import Fit
from xr_aimz.tracing import Node, Site


@dataclass(frozen=True)
class Target:
    """Target of an intervention: an array of an argument, by source key, or a site, by name."""

    kind: str  # "array" or "site"
    name: str

    @property
    def node(self) -> Node:
        """Node in the graph of the model."""
        return Node(self.kind, self.name)


def resolve_target(name: str, binding: Binding, sites: Mapping[str, Site]) -> tuple[Target, ...]:
    """Resolve a name of ``do`` to its targets: several where one variable is several arguments.

    Raises
    ------
    MissingVariableError
        The model has no such name.
    InterventionError
        The model has it, but it cannot be intervened on, or it is ambiguous.
    """
    candidates = {
        r for r in (_find_by_argument(name, binding), _find_by_variable(name, binding)) if r
    }
    candidates |= {r for r in (_find_by_site(name, sites),) if r}
    if len(candidates) > 1:
        texts = [", ".join(f"{t.kind} {t.name!r}" for t in r) for r in sorted(candidates, key=str)]
        raise InterventionError(
            f"do={{{name!r}: ...}} may mean {' or '.join(texts)}: an argument, a variable and a "
            "site share the name; use another of its names, or rename one"
        )
    if not candidates:
        raise _make_unknown_error(name, binding, sites)
    targets = candidates.pop()
    _check_arguments(name, targets, binding)
    _check_sites(name, targets, binding, sites)
    return targets


def _check_arguments(name: str, targets: tuple[Target, ...], binding: Binding) -> None:
    keys = {t.name for t in targets if t.kind == "array"}
    for argument in (a for a in binding.arguments if a.name in binding.concrete):
        if keys & {s.key for s in argument.sources}:
            raise InterventionError(
                f"do={{{name!r}: ...}}: the model reads the values of argument {argument.name!r} "
                "in Python, where nothing that is set reaches it. Use jax.numpy on it, so that "
                "the model takes any values, and fit anew"
            )


def _find_by_argument(name: str, binding: Binding) -> tuple[Target, ...]:
    for argument in binding.inputs:
        if argument.name == name and argument.stacked:
            columns = [s.name for s in argument.sources]
            if name in columns:
                return ()
            raise InterventionError(
                f"do={{{name!r}: ...}}: the argument is a stack of {columns!r}; set those, each "
                "by its own name"
            )
        if argument.name == name:
            return (Target("array", argument.sources[0].key),)
    return ()


def _find_by_variable(name: str, binding: Binding) -> tuple[Target, ...]:
    return tuple(
        Target("array", source.key)
        for argument in binding.inputs
        for source in argument.sources
        if source.name == name
    )


def _find_by_site(name: str, sites: Mapping[str, Site]) -> tuple[Target, ...]:
    """Find sites by their name, the name of their result, or that of the outcome they observe."""
    return tuple(
        Target("site", site.name)
        for site in sites.values()
        if name in (site.name, site.variable, site.obs_argument)
    )


def _make_unknown_error(name: str, binding: Binding, sites: Mapping[str, Site]) -> Exception:
    possible = _list_targets(binding, sites)
    if name in binding.constants:
        return InterventionError(
            f"do={{{name!r}: ...}}: at the fit {name!r} was the constant "
            f"{binding.constants[name]!r}, not a variable, and the model may rely on it; make it "
            f"a variable of the Dataset and fit anew. There are {possible!r}"
        )
    return MissingVariableError(
        f"do={{{name!r}: ...}}: the model has no argument, variable or site {name!r}; "
        f"there are {list_names(possible, name)}"
    )


def _list_targets(binding: Binding, sites: Mapping[str, Site]) -> list[str]:
    names = {s.name for a in binding.inputs for s in a.sources}
    names |= {n for n, s in sites.items() if s.kind in ("latent", "observed") and not s.scanned}
    return sorted(names)


def _check_sites(
    name: str, targets: tuple[Target, ...], binding: Binding, sites: Mapping[str, Site]
) -> None:
    for site in (sites[t.name] for t in targets if t.kind == "site"):
        if site.kind in ("latent", "observed") and not site.scanned:
            continue
        why = f"{name!r} is a {site.kind}"
        if site.kind == "deterministic":
            why = f"site {name!r} is deterministic: a function of others, which can be set"
        elif site.scanned:
            why = f"site {name!r} is inside a scan, whose steps cannot be set one by one"
        raise InterventionError(
            f"do={{{name!r}: ...}}: {why}. What can be set: {_list_targets(binding, sites)!r}"
        )


# Every integer up to this one is exact as a float32, the next is not.
_MAX_EXACT_INT = 2**24


@dataclass(frozen=True)
class TargetContext:
    """Fit and inputs to align values to; ``taken`` are names that no level dim may have."""

    fit: Fit
    inputs: AlignedInputs
    taken: frozenset[str]

    def dims(self, target: Target) -> tuple[str, ...]:
        """Return the dims that a value may have: all that the site has, or an input can have."""
        binding = self.fit.binding
        if target.kind == "site":
            return self.fit.sites[target.name].dataset_dims
        array_dims = self.inputs.dims[target.name]
        return (*binding.block_dims, *(d for d in array_dims if d not in binding.block_dims))

    def units(self, target: Target) -> str | None:
        if target.kind == "array":
            sources = [s for a in self.fit.binding.inputs for s in a.sources]
            at_fit = next(s.units for s in sources if s.key == target.name)
            return self.inputs.arrays[target.name].attrs.get("units", at_fit)
        argument = self.fit.sites[target.name].obs_argument
        return None if argument is None else self.fit.attrs[argument].get("units")

    def dtype(self, target: Target) -> np.dtype:
        if target.kind == "array":
            return self.inputs.arrays[target.name].dtype
        return np.dtype(self.fit.sites[target.name].dtype)

    def labels(self, dim: str) -> pd.Index | None:
        fixed = {**self.inputs.labels, **extra_labels(self.fit.binding)}
        return (
            self.inputs.labels.get(dim) if dim in self.fit.binding.block_dims else fixed.get(dim)
        )


@dataclass(frozen=True)
class AlignedValue:
    """Aligned value of one target, or a function of the current value of a site.

    ``levels`` are the scenario dims of ``value``, with their coordinates; ``is_integer`` tells if
    it consists of integers, ``everywhere`` if it sets every cell.
    """

    value: xr.DataArray | None = None
    function: Callable | None = None
    levels: Mapping[str, xr.DataArray] = field(default_factory=dict)
    is_integer: bool = False
    everywhere: bool = False


def align_value(name: str, raw_value: Any, target: Target, context: TargetContext) -> AlignedValue:
    """Align one value of ``do`` to the labels of the Dataset.

    Parameters
    ----------
    name : str
        The name of the target in ``do``.
    raw_value : scalar, DataArray or callable
    target : Target
    context : TargetContext

    Raises
    ------
    InterventionError, LabelError, DimensionError, UnitsError, DtypeError
    """
    if callable(raw_value) and target.kind == "site":
        return AlignedValue(function=raw_value, everywhere=True)
    if callable(raw_value):
        value = _apply(name, raw_value, target, context)
    elif isinstance(raw_value, xr.DataArray):
        value = raw_value
    else:
        value = _as_scalar(name, raw_value)
    if value.dtype.kind not in "fiub":
        raise DtypeError(
            f"do={{{name!r}: ...}} has dtype {value.dtype}; give floats, ints or bools"
        )
    check_units(f"do={{{name!r}: ...}}", value, context.units(target))
    return _align(name, value.reset_coords(drop=True), target, context)


def _as_scalar(name: str, value: Any) -> xr.DataArray:
    is_scalar = (
        isinstance(value, bool | int | float | np.generic) or getattr(value, "ndim", 1) == 0
    )
    if not is_scalar:
        raise InterventionError(
            f"do={{{name!r}: ...}} is a {type(value).__name__}; give a number, a DataArray, whose "
            "labels say which cells it is for, or a callable of the current value"
        )
    array = np.asarray(value)
    if array.dtype.kind == "f" and np.isnan(array):
        raise InterventionError(f"do={{{name!r}: nan}} sets nothing: NaN leaves a cell as it is")
    return xr.DataArray(array)


def _apply(name: str, function: Callable, target: Target, context: TargetContext) -> xr.DataArray:
    current = context.inputs.arrays[target.name]
    coords = context.inputs.coords.coords.items()
    current = current.assign_coords(
        {n: c for n, c in coords if n not in current.coords and set(c.dims) <= set(current.dims)}
    )
    result = function(current)
    if not isinstance(result, xr.DataArray) or dict(result.sizes) != dict(current.sizes):
        got = dict(result.sizes) if isinstance(result, xr.DataArray) else type(result).__name__
        raise DimensionError(
            f"do={{{name!r}: ...}}: the callable made {got!r} of a DataArray with dims "
            f"{dict(current.sizes)!r}; it must keep the dims. Give a DataArray instead of a "
            "callable for values that vary along others"
        )
    return result


def _align(name: str, value: xr.DataArray, target: Target, context: TargetContext) -> AlignedValue:
    """Align a value to the Dataset's labels: dims of the target in order, then of scenarios."""
    target_dims = context.dims(target)
    levels = {str(d): value[d] for d in value.dims if d not in target_dims}
    for dim, labels in levels.items():
        _check_level(name, dim, labels, target, context, target_dims)
    is_integer = value.dtype.kind in "iub" or _has_integers_only(value)
    for dim in (str(d) for d in value.dims if d in target_dims):
        value = _on_labels(name, value, dim, context)
    if is_integer and value.dtype.kind == "f" and context.dtype(target).kind in "iu":
        _check_exact(name, value)
    everywhere = value.chunks is None and not bool(value.isnull().any())
    value = value.transpose(*(d for d in target_dims if d in value.dims), *levels)
    return AlignedValue(value, None, levels, is_integer, everywhere)


def _has_integers_only(value: xr.DataArray) -> bool:
    """Return whether floats in memory are integers and NaN: codes for a part of a region."""
    if value.chunks is not None or not bool(value.isnull().any()):
        return False
    values = value.values[~np.isnan(value.values)]
    return bool((values == np.round(values)).all())


def _check_exact(name: str, value: xr.DataArray) -> None:
    if value.chunks is None and bool((abs(value) > _MAX_EXACT_INT).any()):
        raise DtypeError(
            f"do={{{name!r}: ...}} has integers beyond {_MAX_EXACT_INT!r} and cells left alone; "
            "floats that hold NaN do not tell such integers apart. Give a value for every cell"
        )


def _check_level(
    name: str,
    dim: str,
    labels: xr.DataArray,
    target: Target,
    context: TargetContext,
    target_dims: tuple[str, ...],
) -> None:
    if dim in context.taken:
        raise DimensionError(
            f"do={{{name!r}: ...}} has a dimension {dim!r}, a name that the Dataset or the model "
            f"has already, and {target.kind} {target.name!r} cannot vary along it: it has "
            f"{target_dims!r}. A dimension of scenarios needs another name"
        )
    if labels.size == 0:
        raise DimensionError(f"do={{{name!r}: ...}} is empty along {dim!r}")
    _check_unique(name, dim, labels.indexes.get(dim))


def _check_unique(name: str, dim: str, index: pd.Index | None) -> None:
    if index is not None and not index.is_unique:
        duplicates = list(index[index.duplicated()][:3])
        raise LabelError(f"do={{{name!r}: ...}} has duplicate labels of {dim!r}: {duplicates!r}")


def _on_labels(name: str, value: xr.DataArray, dim: str, context: TargetContext) -> xr.DataArray:
    what, labels = f"do={{{name!r}: ...}}", context.labels(dim)
    size = context.inputs.sizes.get(dim, value.sizes[dim])
    positions = match_labels(what, value, dim, labels, size)
    if positions is None or labels is None:
        return value
    if (positions < 0).all():
        raise LabelError(
            f"{what} has labels {list(value.indexes[dim][:3])!r} on {dim!r}, and the Dataset "
            f"{list(labels[:3])!r}: they do not meet, so nothing would be set"
        )
    return value.reindex({dim: labels})
