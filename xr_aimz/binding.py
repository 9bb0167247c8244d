"""Which variable is which argument, and how its array reaches the model.

A :class:`Binding` is made once, at the fit, from names: arguments are variables. It is
then applied to any Dataset (:func:`xr_aimz.inputs.gather`), which checks that the
Dataset is one that the fit could have seen, and to any block of arrays
(:func:`arrange`), which lays them out against the outcome. It holds names, dims, labels
and units; data only where a DataArray was given in place of a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import BindingError, DimensionError, MissingVariableError
from xr_aimz.model import Block, Parameter
from xr_aimz.plates import FEATURE
from xr_aimz.spelling import list_names

__all__ = [
    "FEATURE",
    "LAYOUTS",
    "Argument",
    "Binding",
    "Source",
    "arrange",
    "arrange_values",
    "block_of",
    "find",
    "labels_of",
    "observation_dims",
    "resolve",
]

LAYOUTS = ("grid", "table")


@dataclass(frozen=True)
class Source:
    """One variable behind an argument, as the fit had it.

    ``key`` is its own in the binding: one variable may serve two arguments. ``data`` is the
    DataArray given in place of a name; ``shadowed``, that the fit's Dataset had a variable
    of the argument's name all the same, which is not what is meant.
    """

    key: str
    name: str
    dims: tuple[str, ...]
    units: str | None = None
    data: xr.DataArray | None = field(default=None, compare=False, repr=False)
    shadowed: bool = False


@dataclass(frozen=True)
class Argument:
    """A model's argument and the variables it is bound to.

    ``stacked`` arguments have several, stacked on a last axis ``feature``.
    """

    name: str
    sources: tuple[Source, ...]
    stacked: bool = False
    outcome: bool = False


@dataclass(frozen=True)
class Binding:
    """How a model's arguments are made from a Dataset's variables.

    Parameters
    ----------
    arguments : tuple of Argument
        Those bound to variables.
    constants : mapping
        Those passed to the model as they are.
    dims, core_dims : tuple of str
        Observation dimensions, in the outcome's order; those never split.
    layout : {"grid", "table"}
    labels : mapping
        The index of each dimension that is not an observation dimension: its order at
        the fit is the order that the model knows.
    per : tuple of str
        Dimensions over which the model is fitted independently; it sees arrays without them.
    concrete : mapping of argument to array
        Arguments whose values the model reads while it is traced, as they were at the fit: they
        are passed as NumPy arrays, and have their part in the traced program.
    """

    arguments: tuple[Argument, ...]
    constants: Mapping[str, Any]
    dims: tuple[str, ...]
    core_dims: tuple[str, ...] = ()
    layout: str = "grid"
    labels: Mapping[str, pd.Index] = field(default_factory=dict)
    per: tuple[str, ...] = ()
    concrete: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def whole_dims(self) -> tuple[str, ...]:
        """The dims that no block is cut along: those of core, and of values that are read."""
        named = [a for a in self.arguments if a.name in self.concrete]
        return (*self.core_dims, *(d for a in named for s in a.sources for d in s.dims))

    @property
    def cut_dims(self) -> tuple[str, ...]:
        """The dims along which blocks are cut and draws are addressed, in arrays' order."""
        return self.per + self.dims

    @property
    def outcomes(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if a.outcome)

    @property
    def inputs(self) -> tuple[Argument, ...]:
        return tuple(a for a in self.arguments if not a.outcome)

    def argument(self, name: str) -> Argument:
        return next(a for a in self.arguments if a.name == name)

    def without_data(self) -> Binding:
        """The same names without the DataArrays given at the fit: what a task needs."""
        bare = tuple(
            replace(a, sources=tuple(replace(s, data=None) for s in a.sources))
            for a in self.arguments
        )
        return replace(self, arguments=bare)

    def of_cell(self) -> Binding:
        """The binding of one label of ``per``, whose arrays have no such dims."""
        within = tuple(
            replace(
                a,
                sources=tuple(
                    replace(s, dims=tuple(d for d in s.dims if d not in self.per))
                    for s in a.sources
                ),
            )
            for a in self.arguments
        )
        return replace(self, arguments=within, per=())


def find(ds: xr.Dataset, name: str, argument: str) -> xr.DataArray:
    """A variable or coordinate by name, or an error that lists what there is."""
    try:
        # ds[...] and not ds.variables: "time.dayofyear" is a name that xarray knows.
        return ds[name]
    except KeyError:
        there = sorted(map(str, [*ds.data_vars, *ds.coords]))
        raise MissingVariableError(
            f"argument {argument!r} is bound to {name!r}, and the Dataset has no such variable "
            f"or coordinate; it has {list_names(there, name)}. Rename one, or say "
            f"variables={{{argument!r}: ...}}"
        ) from None


def resolve(
    ds: xr.Dataset, parameters: tuple[Parameter, ...], variables: Mapping[str, Any] | None
) -> tuple[tuple[Argument, ...], dict[str, Any]]:
    """The bound arguments and the constants of a model, by the rules of names.

    An argument in ``variables`` is bound as it says; any other to the variable of its own
    name; one with a default needs neither.
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
        given = variables.get(parameter.name, parameter.name)
        if parameter.name not in variables and not _has(ds, parameter.name):
            if parameter.required:
                missing.append(parameter.name)
            continue
        if _is_constant(given):
            constants[parameter.name] = given
        else:
            bound.append(_bind(ds, parameter.name, given))
    if missing:
        there = sorted(map(str, [*ds.data_vars, *ds.coords]))
        raise BindingError(
            f"arguments {missing!r} of the model are bound to nothing: the Dataset has "
            f"{list_names(there, missing)}. Say variables={{{missing[0]!r}: 'a name, a DataArray "
            "or a constant'}"
        )
    return tuple(bound), constants


def _has(ds: xr.Dataset, name: str) -> bool:
    return name in ds.variables


def _is_constant(given: Any) -> bool:
    if isinstance(given, (str, xr.DataArray)):
        return False
    return not (isinstance(given, (list, tuple)) and any(isinstance(g, str) for g in given))


def _bind(ds: xr.Dataset, argument: str, given: Any) -> Argument:
    if isinstance(given, xr.DataArray):
        made = _source(argument, argument, given)
        return Argument(argument, (replace(made, data=given, shadowed=_has(ds, argument)),))
    if isinstance(given, str):
        return Argument(argument, (_source(argument, given, find(ds, given, argument)),))
    strays = [g for g in given if not isinstance(g, str)]
    if strays:
        raise BindingError(
            f"variables={{{argument!r}: ...}}: a list names variables; found {strays!r} in it"
        )
    sources = tuple(
        _source(f"{argument}[{i}]", name, find(ds, name, argument)) for i, name in enumerate(given)
    )
    return Argument(argument, sources, stacked=True)


def _source(key: str, name: str, array: xr.DataArray) -> Source:
    units = array.attrs.get("units")
    dims = tuple(map(str, array.dims))
    return Source(key, name, dims, None if units is None else str(units))


def observation_dims(
    ds: xr.Dataset,
    arguments: tuple[Argument, ...],
    dim: Any,
    event_ndim: int,
    per: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The observation dimensions: ``dim``, or the outcome's less its event dimensions and per."""
    if dim is not None:
        dims = (dim,) if isinstance(dim, str) else tuple(dim)
        known = {d for a in arguments for s in a.sources for d in s.dims} | set(map(str, ds.dims))
        absent = [d for d in dims if d not in known]
        if absent:
            raise DimensionError(
                f"dim={absent!r}: the Dataset has no such dimension; it has "
                f"{list_names(sorted(known), absent)}"
            )
        return dims
    candidates = [a for a in arguments if a.outcome] or list(arguments)
    if not candidates:
        return tuple(str(d) for d in ds.dims if d not in per)
    seen = [tuple(d for d in s.dims if d not in per) for a in candidates for s in a.sources]
    longest = max(seen, key=len)
    return longest[: len(longest) - event_ndim]


def labels_of(
    ds: xr.Dataset, arguments: tuple[Argument, ...], dims: tuple[str, ...]
) -> dict[str, pd.Index]:
    """The index of each dimension of the arguments that is not an observation dimension."""
    found: dict[str, pd.Index] = {}
    for argument in arguments:
        for source in argument.sources:
            array = (
                source.data if source.data is not None else find(ds, source.name, argument.name)
            )
            extra = set(array.dims) - set(dims)
            found |= {str(d): i for d, i in array.indexes.items() if d in extra}
    return found


def arrange(
    binding: Binding, arrays: Mapping[str, Any], dims: Mapping[str, tuple[str, ...]], block: Block
) -> dict[str, Any]:
    """The model's keyword arguments for one block of arrays; traceable.

    Parameters
    ----------
    binding : Binding
    arrays : mapping of source key to array
        Outcomes left out are left to their default, ``None``.
    dims : mapping of source key to tuple of str
        The dims of each array: observation dims first, in order.
    block : Block
    """
    passed = {**binding.constants, **binding.concrete}
    for argument in binding.arguments:
        keys = [source.key for source in argument.sources]
        if argument.name not in binding.concrete and all(key in arrays for key in keys):
            passed[argument.name] = _laid_out(binding, argument, arrays, dims, block, jnp)
    return passed


def arrange_values(
    binding: Binding,
    name: str,
    arrays: Mapping[str, np.ndarray],
    dims: Mapping[str, tuple[str, ...]],
    block: Block,
) -> np.ndarray:
    """One argument of the model, laid out as :func:`arrange` does, as a NumPy array."""
    return np.array(_laid_out(binding, binding.argument(name), arrays, dims, block, np))


def _laid_out(
    binding: Binding,
    argument: Argument,
    arrays: Mapping[str, Any],
    dims: Mapping[str, tuple[str, ...]],
    block: Block,
    xp: Any,
) -> Any:
    place = _table if binding.layout == "table" else _grid
    keys = [source.key for source in argument.sources]
    laid = [place(arrays[k], dims[k], binding.dims, block.sizes, xp) for k in keys]
    return xp.stack(xp.broadcast_arrays(*laid), axis=-1) if argument.stacked else laid[0]


def _grid(
    array: Any, dims: tuple[str, ...], observation: tuple[str, ...], sizes: Any, xp: Any
) -> Any:
    if not set(dims) & set(observation):
        return array
    extra = tuple(n for d, n in zip(dims, array.shape, strict=True) if d not in observation)
    shape = tuple(sizes[d] if d in dims else 1 for d in observation) + extra
    return xp.reshape(array, shape)


def _table(
    array: Any, dims: tuple[str, ...], observation: tuple[str, ...], sizes: Any, xp: Any
) -> Any:
    if not set(dims) & set(observation):
        return array
    grid = _grid(array, dims, observation, sizes, xp)
    extra = tuple(grid.shape[len(observation) :])
    whole = xp.broadcast_to(grid, tuple(sizes[d] for d in observation) + extra)
    rows = int(np.prod([sizes[d] for d in observation]))
    return xp.reshape(whole, (rows, *extra))


def block_of(binding: Binding, sizes: Mapping[str, int]) -> Block:
    """The block of those sizes, with the batch axis of each observation dimension."""
    rank = len(binding.dims)
    table = binding.layout == "table"
    places = {d: -1 if table else i - rank for i, d in enumerate(binding.dims)}
    seen = {d: n for d, n in sizes.items() if d not in binding.per}
    stacked = {a.name: len(a.sources) for a in binding.arguments if a.stacked}
    return Block(seen, places, table, binding.per, stacked)
