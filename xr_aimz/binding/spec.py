"""Resolve the arguments of a model to variables of a Dataset, and its observation dims.

A :class:`Binding` is made once, at the fit, by name: an argument is the variable of its
name. It is then applied to any Dataset (:func:`xr_aimz.binding.alignment.align`), which
checks that the Dataset agrees with that of the fit, and to any block of arrays
(:func:`arrange`), which lays them out against the outcome. It holds names, dims, labels
and units; data only where a DataArray was passed in place of a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import BindingError, DimensionError, MissingVariableError, list_names
from xr_aimz.tracing import Parameter

LAYOUTS = ("grid", "table")


@dataclass(frozen=True)
class VariableRef:
    """Variable to which an argument is bound, with its dims and units at the fit.

    ``key`` is unique in the binding, for one variable may serve two arguments. ``data`` is
    the DataArray passed in place of a name; ``name_is_taken`` is true if the fit's Dataset also
    had a variable of the argument's name, which is not the one that is bound.
    """

    key: str
    name: str
    dims: tuple[str, ...]
    units: str | None = None
    data: xr.DataArray | None = field(default=None, compare=False, repr=False)
    name_is_taken: bool = False


@dataclass(frozen=True)
class BoundArgument:
    """Argument of a model, with the variables to which it is bound.

    A ``stacked`` argument has several, stacked on a last axis ``feature``.
    """

    name: str
    sources: tuple[VariableRef, ...]
    stacked: bool = False
    outcome: bool = False


@dataclass(frozen=True)
class Binding:
    """Mapping of a model's arguments to variables of a Dataset, with dims and labels of the fit.

    Parameters
    ----------
    arguments : tuple of BoundArgument
        Arguments bound to variables.
    constants : mapping
        Arguments passed to the model as they are.
    dims, core_dims : tuple of str
        Observation dimensions, in the outcome's order; dimensions that are never split.
    layout : {"grid", "table"}
    labels : mapping
        The index of each dimension that is not an observation dimension, in the order of
        the fit, on which the model may depend.
    per : tuple of str
        Dimensions over which the model is fitted independently; its arrays are without them.
    concrete : mapping of argument to array
        Arguments whose values the model reads while it is traced, with their values at the fit:
        they are passed as NumPy arrays, and are part of the traced program.
    """

    arguments: tuple[BoundArgument, ...]
    constants: Mapping[str, Any]
    dims: tuple[str, ...]
    core_dims: tuple[str, ...] = ()
    layout: str = "grid"
    labels: Mapping[str, pd.Index] = field(default_factory=dict)
    per: tuple[str, ...] = ()
    concrete: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def whole_dims(self) -> tuple[str, ...]:
        """Dims along which no block is split: core dims, and the dims of concrete arguments."""
        named = [a for a in self.arguments if a.name in self.concrete]
        return (*self.core_dims, *(d for a in named for s in a.sources for d in s.dims))

    @property
    def block_dims(self) -> tuple[str, ...]:
        """Dims along which blocks are split and draws are addressed, in the order of arrays."""
        return self.per + self.dims

    @property
    def outcomes(self) -> tuple[BoundArgument, ...]:
        return tuple(a for a in self.arguments if a.outcome)

    @property
    def inputs(self) -> tuple[BoundArgument, ...]:
        return tuple(a for a in self.arguments if not a.outcome)

    def argument(self, name: str) -> BoundArgument:
        """Return an argument by name; raise KeyError if the model has no such argument."""
        return {a.name: a for a in self.arguments}[name]

    def without_data(self) -> Binding:
        """Return the binding without the DataArrays passed at the fit, which no task needs."""
        stripped = tuple(
            replace(a, sources=tuple(replace(s, data=None) for s in a.sources))
            for a in self.arguments
        )
        return replace(self, arguments=stripped)

    @property
    def variables(self) -> dict[str, str]:
        """Name of the variable of each source key."""
        return {s.key: s.name for a in self.arguments for s in a.sources}

    def of_cell(self) -> Binding:
        """Return the binding of one cell of ``per``, whose arrays lack these dims."""
        cell_arguments = tuple(
            replace(
                a,
                sources=tuple(
                    replace(s, dims=tuple(d for d in s.dims if d not in self.per))
                    for s in a.sources
                ),
            )
            for a in self.arguments
        )
        return replace(self, arguments=cell_arguments, per=())


def find_variable(ds: xr.Dataset, name: str, argument: str) -> xr.DataArray:
    """Return a variable or coordinate by name, or raise an error that lists the existing names."""
    try:
        # ds[...] and not ds.variables: xarray resolves a name such as "time.dayofyear".
        return ds[name]
    except KeyError:
        names = sorted(map(str, [*ds.data_vars, *ds.coords]))
        raise MissingVariableError(
            f"argument {argument!r} is bound to {name!r}, and the Dataset has no such variable "
            f"or coordinate; it has {list_names(names, name)}. Rename one, or say "
            f"variables={{{argument!r}: ...}}"
        ) from None


def resolve(
    ds: xr.Dataset, parameters: tuple[Parameter, ...], variables: Mapping[str, Any] | None
) -> tuple[tuple[BoundArgument, ...], dict[str, Any]]:
    """Resolve the parameters of a model to bound arguments and constants.

    An argument in ``variables`` is bound as specified there; any other to the variable of its
    own name; one with a default needs neither.
    """
    if variables is not None and not isinstance(variables, Mapping):
        raise BindingError(
            f"variables={variables!r} is a {type(variables).__name__}: give a mapping of the "
            f"model's arguments, {[p.name for p in parameters]!r}, to names of variables, lists "
            "of names, DataArrays or constants"
        )
    variables = dict(variables or {})
    unknown = [name for name in variables if name not in {p.name for p in parameters}]
    if unknown:
        raise BindingError(
            f"variables={unknown!r}: the model has no such argument; "
            f"it has {list_names([p.name for p in parameters], unknown)}"
        )
    bound, constants, missing = [], {}, []
    for parameter in parameters:
        value = variables.get(parameter.name, parameter.name)
        if parameter.name not in variables and not _has(ds, parameter.name):
            if parameter.required:
                missing.append(parameter.name)
            continue
        if _is_constant(value):
            constants[parameter.name] = value
        else:
            bound.append(_bind(ds, parameter.name, value))
    if missing:
        names = sorted(map(str, [*ds.data_vars, *ds.coords]))
        raise BindingError(
            f"arguments {missing!r} of the model are bound to nothing: the Dataset has "
            f"{list_names(names, missing)}. Say variables={{{missing[0]!r}: 'a name, a DataArray "
            "or a constant'}"
        )
    return tuple(bound), constants


def _has(ds: xr.Dataset, name: str) -> bool:
    return name in ds.variables


def _is_constant(value: Any) -> bool:
    if isinstance(value, (str, xr.DataArray)):
        return False
    return not (isinstance(value, (list, tuple)) and any(isinstance(g, str) for g in value))


def _bind(ds: xr.Dataset, argument: str, value: Any) -> BoundArgument:
    if isinstance(value, xr.DataArray):
        ref = _make_ref(argument, argument, value)
        return BoundArgument(
            argument, (replace(ref, data=value, name_is_taken=_has(ds, argument)),)
        )
    if isinstance(value, str):
        return BoundArgument(
            argument, (_make_ref(argument, value, find_variable(ds, value, argument)),)
        )
    strays = [g for g in value if not isinstance(g, str)]
    if strays:
        raise BindingError(
            f"variables={{{argument!r}: ...}}: a list names variables; found {strays!r} in it"
        )
    sources = tuple(
        _make_ref(f"{argument}[{i}]", name, find_variable(ds, name, argument))
        for i, name in enumerate(value)
    )
    return BoundArgument(argument, sources, stacked=True)


def _make_ref(key: str, name: str, array: xr.DataArray) -> VariableRef:
    units = array.attrs.get("units")
    dims = tuple(map(str, array.dims))
    return VariableRef(key, name, dims, None if units is None else str(units))


def observation_dims(
    ds: xr.Dataset,
    arguments: tuple[BoundArgument, ...],
    dim: Any,
    event_ndim: int,
    per: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Return the observation dims: ``dim``, or the outcome's dims less event dims and ``per``."""
    if dim is not None:
        dims = (dim,) if isinstance(dim, str) else tuple(dim)
        names = {d for a in arguments for s in a.sources for d in s.dims} | set(map(str, ds.dims))
        absent = [d for d in dims if d not in names]
        if absent:
            raise DimensionError(
                f"dim={absent!r}: the Dataset has no such dimension; it has "
                f"{list_names(sorted(names), absent)}"
            )
        return dims
    candidates = [a for a in arguments if a.outcome] or list(arguments)
    if not candidates:
        return tuple(str(d) for d in ds.dims if d not in per)
    dim_sets = [tuple(d for d in s.dims if d not in per) for a in candidates for s in a.sources]
    longest = max(dim_sets, key=len)
    return longest[: len(longest) - event_ndim]


def dimension_labels(
    ds: xr.Dataset, arguments: tuple[BoundArgument, ...], dims: tuple[str, ...]
) -> dict[str, pd.Index]:
    """Return the index of each dim of the arguments that is not an observation dim."""
    labels: dict[str, pd.Index] = {}
    for argument in arguments:
        for source in argument.sources:
            array = (
                source.data
                if source.data is not None
                else find_variable(ds, source.name, argument.name)
            )
            extra = set(array.dims) - set(dims)
            labels |= {str(d): i for d, i in array.indexes.items() if d in extra}
    return labels
