"""A value in ``do``, on the labels of a Dataset: a scalar, a DataArray or a callable.

A DataArray is aligned by label and stays lazy. Labels that it lacks are filled with NaN,
which leaves their cells alone; dims that nothing else has are returned as levels. A
callable of an argument is applied to the Dataset's variable, here; one of a site's value
can only be applied where that is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.axes import dims_in_dataset
from xr_aimz.errors import (
    DimensionError,
    DtypeError,
    InterventionError,
    LabelError,
    UnitsError,
)
from xr_aimz.inputs import Inputs
from xr_aimz.labelling import extra_labels
from xr_aimz.posterior import Fit
from xr_aimz.targets import Target

__all__ = ["Context", "Setting", "setting"]

# float32 has every integer up to here, and not the next.
_EXACT = 2**24


@dataclass(frozen=True)
class Context:
    """What values are read against; ``taken`` are the dims that levels cannot be called."""

    fit: Fit
    inputs: Inputs
    taken: frozenset[str]

    def dims(self, target: Target) -> tuple[str, ...]:
        """The dims that a value may have: those of the site, or all that an argument can get."""
        binding = self.fit.binding
        if target.kind == "site":
            return dims_in_dataset(self.fit.sites[target.name], binding)
        own = self.inputs.dims[target.name]
        return (*binding.cut_dims, *(d for d in own if d not in binding.cut_dims))

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
        return self.inputs.labels.get(dim) if dim in self.fit.binding.cut_dims else fixed.get(dim)


@dataclass(frozen=True)
class Setting:
    """What one target is set to: an aligned value, or a function of the site's own.

    ``levels`` are the dims of ``value`` that are of scenarios, with their coordinates;
    ``whole`` says that it is made of integers, ``everywhere`` that no cell is left alone.
    """

    value: xr.DataArray | None = None
    function: Callable | None = None
    levels: Mapping[str, xr.DataArray] = field(default_factory=dict)
    whole: bool = False
    everywhere: bool = False


def setting(name: str, given: Any, target: Target, context: Context) -> Setting:
    """Read one value of ``do``.

    Parameters
    ----------
    name : str
        What the user calls the target.
    given : scalar, DataArray or callable
    target : Target
    context : Context

    Raises
    ------
    InterventionError, LabelError, DimensionError, UnitsError, DtypeError
    """
    if callable(given) and target.kind == "site":
        return Setting(function=given, everywhere=True)
    if callable(given):
        value = _applied(name, given, target, context)
    elif isinstance(given, xr.DataArray):
        value = given
    else:
        value = _scalar(name, given)
    if value.dtype.kind not in "fiub":
        raise DtypeError(
            f"do={{{name!r}: ...}} has dtype {value.dtype}; give floats, ints or bools"
        )
    _check_units(name, value, target, context)
    return _aligned(name, value.reset_coords(drop=True), target, context)


def _scalar(name: str, given: Any) -> xr.DataArray:
    scalar = isinstance(given, bool | int | float | np.generic) or getattr(given, "ndim", 1) == 0
    if not scalar:
        raise InterventionError(
            f"do={{{name!r}: ...}} is a {type(given).__name__}; give a number, a DataArray, whose "
            "labels say which cells it is for, or a callable of the current value"
        )
    value = np.asarray(given)
    if value.dtype.kind == "f" and np.isnan(value):
        raise InterventionError(f"do={{{name!r}: nan}} sets nothing: NaN leaves a cell as it is")
    return xr.DataArray(value)


def _applied(name: str, function: Callable, target: Target, context: Context) -> xr.DataArray:
    current = context.inputs.arrays[target.name]
    coords = context.inputs.coords.coords.items()
    current = current.assign_coords(
        {n: c for n, c in coords if n not in current.coords and set(c.dims) <= set(current.dims)}
    )
    made = function(current)
    if not isinstance(made, xr.DataArray) or dict(made.sizes) != dict(current.sizes):
        what = dict(made.sizes) if isinstance(made, xr.DataArray) else type(made).__name__
        raise DimensionError(
            f"do={{{name!r}: ...}}: the callable made {what!r} of a DataArray with dims "
            f"{dict(current.sizes)!r}; it must keep the dims. Give a DataArray instead of a "
            "callable for values that vary along others"
        )
    return made


def _check_units(name: str, value: xr.DataArray, target: Target, context: Context) -> None:
    units, there = value.attrs.get("units"), context.units(target)
    if units is not None and there is not None and str(units) != str(there):
        raise UnitsError(
            f"do={{{name!r}: ...}} is in {str(units)!r}; the variable is in {str(there)!r}. "
            "Convert it, or set its attrs['units'] if only the name differs"
        )


def _aligned(name: str, value: xr.DataArray, target: Target, context: Context) -> Setting:
    """The value on the Dataset's labels, its dims in order, those of scenarios last."""
    known = context.dims(target)
    levels = {str(d): value[d] for d in value.dims if d not in known}
    for dim, labels in levels.items():
        _check_level(name, dim, labels, target, context, known)
    whole = value.dtype.kind in "iub" or _is_whole(value)
    for dim in (str(d) for d in value.dims if d in known):
        value = _on_labels(name, value, dim, context)
    if whole and value.dtype.kind == "f" and context.dtype(target).kind in "iu":
        _check_exact(name, value)
    everywhere = value.chunks is None and not bool(value.isnull().any())
    value = value.transpose(*(d for d in known if d in value.dims), *levels)
    return Setting(value, None, levels, whole, everywhere)


def _is_whole(value: xr.DataArray) -> bool:
    """Whether floats in memory are integers with gaps: codes of part of a region."""
    if value.chunks is not None or not bool(value.isnull().any()):
        return False
    there = value.values[~np.isnan(value.values)]
    return bool((there == np.round(there)).all())


def _check_exact(name: str, value: xr.DataArray) -> None:
    if value.chunks is None and bool((abs(value) > _EXACT).any()):
        raise DtypeError(
            f"do={{{name!r}: ...}} has integers beyond {_EXACT!r} and cells left alone; floats "
            "that hold NaN do not tell such integers apart. Give a value for every cell"
        )


def _check_level(
    name: str,
    dim: str,
    labels: xr.DataArray,
    target: Target,
    context: Context,
    known: tuple[str, ...],
) -> None:
    if dim in context.taken:
        raise DimensionError(
            f"do={{{name!r}: ...}} has a dimension {dim!r}, a name that the Dataset or the model "
            f"has already, and {target.kind} {target.name!r} cannot vary along it: it has "
            f"{known!r}. A dimension of scenarios needs another name"
        )
    if labels.size == 0:
        raise DimensionError(f"do={{{name!r}: ...}} is empty along {dim!r}")
    _check_unique(name, dim, labels.indexes.get(dim))


def _check_unique(name: str, dim: str, index: pd.Index | None) -> None:
    if index is not None and not index.is_unique:
        twice = list(index[index.duplicated()][:3])
        raise LabelError(f"do={{{name!r}: ...}} has duplicate labels of {dim!r}: {twice!r}")


def _on_labels(name: str, value: xr.DataArray, dim: str, context: Context) -> xr.DataArray:
    here, there = value.indexes.get(dim), context.labels(dim)
    size = context.inputs.sizes.get(dim, value.sizes[dim])
    if here is None and there is None:
        if value.sizes[dim] != size:
            raise DimensionError(
                f"do={{{name!r}: ...}} has {value.sizes[dim]} entries along {dim!r}, where the "
                f"Dataset has {size}, without labels to align them; give both a coordinate"
            )
        return value
    if here is None or there is None:
        lacks = "the value" if here is None else "the Dataset"
        raise LabelError(
            f"do={{{name!r}: ...}}: {lacks} has no labels on {dim!r}, and the other has; give "
            "both the same coordinate"
        )
    _check_unique(name, dim, here)
    if here.equals(there):
        return value
    if not there.isin(here).any():
        raise LabelError(
            f"do={{{name!r}: ...}} has labels {list(here[:3])!r} on {dim!r}, and the Dataset "
            f"{list(there[:3])!r}: they do not meet, so nothing would be set"
        )
    return value.reindex({dim: there})
