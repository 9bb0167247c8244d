"""Arguments whose values a model reads in Python, as in ``np.unique(group)`` or ``int(x.max())``.

A model is traced on shapes, where there are no values to read. The arguments that it needs values
of are found by tracing it again with the values of all, then with those of fewer. They are passed
as NumPy arrays and are part of the traced program: it is one for these values and for no others,
so a prediction with other values, or with a part of them, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xr_aimz.binding import Argument, Binding, arrange_values, block_of
from xr_aimz.casting import to_device_dtype
from xr_aimz.errors import ChunkError, MissingValueError, ModelError
from xr_aimz.inputs import Inputs
from xr_aimz.requirements import BlockValues

__all__ = [
    "SameValues",
    "check_not_cut",
    "check_sizes",
    "find_concrete",
    "require_same_values",
    "resize_values",
    "with_values",
]

_REMEDY = (
    "Use jax.numpy in place of NumPy on it; or pass what is made of its values as a constant, "
    "variables={'n': 7}, or take the size of a dimension, xr_aimz.plate(dim)"
)


def find_concrete(
    trace: Callable[[Binding], Any], binding: Binding, inputs: Inputs
) -> frozenset[str] | None:
    """The arguments that a model needs values of; None if it fails with them all the same.

    Parameters
    ----------
    trace : callable
        Traces the model with a binding; it has failed with this one.
    binding : Binding
    inputs : Inputs

    Raises
    ------
    ModelError, ChunkError, MissingValueError
        An outcome, an argument of lazy data or with a dim of ``per``, or one with NaN.
    """

    def runs(names: Collection[str]) -> bool:
        try:
            trace(with_values(binding, inputs, names))
        except Exception:
            # Whatever a model may raise: only whether it runs matters.
            return False
        return True

    # What cannot be passed by its values is tried without them first.
    names = [a.name for a in sorted(binding.arguments, key=lambda a: not a.outcome)]
    needed = frozenset(names)
    if not names or not runs(needed):
        return None
    for name in names:
        if runs(needed - {name}):
            needed -= {name}
    for name in sorted(needed):
        _check_can_be_read(binding, inputs, binding.argument(name))
    return needed


def with_values(binding: Binding, inputs: Inputs, names: Collection[str]) -> Binding:
    """The binding with the values of some arguments; zeros for those of lazy arrays."""
    cell = inputs.of_cell(binding.per)
    return replace(binding, concrete=_values(binding, cell, names, cell.sizes))


def resize_values(binding: Binding, inputs: Inputs, sizes: Mapping[str, int]) -> Binding:
    """The binding with its values repeated, or cut, to other sizes of the observation dims."""
    return replace(binding, concrete=_values(binding, inputs, binding.concrete, sizes))


def _values(
    binding: Binding, inputs: Inputs, names: Collection[str], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    found = {}
    for name in sorted(names):
        arrays = {}
        for source in binding.argument(name).sources:
            array = inputs.arrays[source.key]
            lazy = array.chunks is not None
            values = np.zeros(array.shape, array.dtype) if lazy else _filled(array.values)
            for axis, d in enumerate(map(str, array.dims)):
                values = np.take(values, np.arange(sizes[d]) % values.shape[axis], axis)
            arrays[source.key] = to_device_dtype(source.name, values)
        found[name] = arrange_values(binding, name, arrays, inputs.dims, block_of(binding, sizes))
    return found


def _filled(values: np.ndarray) -> np.ndarray:
    """Values without NaN, to trace with: what has NaN is refused later, by its name."""
    if values.dtype.kind != "f" or not np.isnan(values).any():
        return values
    filled = np.nan_to_num(values)
    # Ints with missing values are floats, and a model that takes ints takes no float.
    return filled.astype(int) if (filled == np.round(filled)).all() else filled


def _check_can_be_read(binding: Binding, inputs: Inputs, argument: Argument) -> None:
    what = _what(argument)
    if argument.outcome:
        raise ModelError(
            f"{what}, and its default is None, as an outcome's is, of which a prediction has no "
            f"values. {_REMEDY}. If it is an input, give it no default: def model({argument.name}"
            ", ...)"
        )
    for source in argument.sources:
        array = inputs.arrays[source.key]
        if array.chunks is not None:
            raise ChunkError(
                f"{what}, and variable {source.name!r} is lazy. Load it, "
                f"ds.assign({source.name}=ds[{source.name!r}].load()). Or: {_REMEDY}"
            )
        if cells := [d for d in binding.per if d in array.dims]:
            raise ModelError(
                f"{what}, and per={cells!r} gives each fit other values of it, where one program "
                f"serves all. {_REMEDY}"
            )
        if array.dtype.kind == "f" and bool(array.isnull().any()):
            raise MissingValueError(
                f"{what}, and variable {source.name!r} has missing values (NaN): what becomes of "
                "them cannot be told. Fill them, ds.fillna(...), or drop their labels"
            )


def _what(argument: Argument) -> str:
    names = ", ".join(repr(s.name) for s in argument.sources)
    return (
        f"the model reads the values of argument {argument.name!r} (variable {names}) in Python, "
        "as np.unique, int(...), len(set(...)) and other functions of NumPy do"
    )


def check_not_cut(binding: Binding, dims: Collection[str], how: str) -> None:
    """Refuse to cut a dim of an argument whose values the model reads.

    Raises
    ------
    ModelError
        With the argument, and what to write in its place.
    """
    for name in binding.concrete:
        argument = binding.argument(name)
        if lost := sorted({d for s in argument.sources for d in s.dims} & set(dims)):
            raise ModelError(
                f"{_what(argument)}, and its dims {lost!r} are cut {how}: a part has other values "
                f"than the whole. Leave them whole, ds.chunk({dict.fromkeys(lost, -1)!r}). Or: "
                f"{_REMEDY}"
            )


def check_sizes(binding: Binding, inputs: Inputs) -> None:
    """Refuse a Dataset in which an argument that is read by its values has another shape.

    Raises
    ------
    ModelError
    """
    cell = inputs.of_cell(binding.per)
    blank = {k: np.broadcast_to(np.zeros((), bool), a.shape) for k, a in cell.arrays.items()}
    for name, known in binding.concrete.items():
        block = block_of(binding, cell.sizes)
        own = arrange_values(binding, name, blank, cell.dims, block)
        if own.shape != known.shape:
            raise _differs(binding.argument(name))


def _differs(argument: Argument) -> ModelError:
    return ModelError(
        f"{_what(argument)}, and here it has others than at the fit: what is made of them, such "
        "as codes of categories, would be another for each Dataset. Predict with the values of "
        f"the fit, all of them in their order. Or: {_REMEDY}"
    )


@dataclass(frozen=True, eq=False)
class SameValues:
    """A requirement: an argument whose values the model reads has those of the fit.

    Parameters
    ----------
    name : str
        Of the argument.
    binding : Binding
    """

    name: str
    binding: Binding

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(s.key for s in self.binding.argument(self.name).sources)

    def at(self, sizes: Mapping[str, int]) -> SameValues:
        """Itself: no dim of the argument is cut."""
        return self

    def check(self, values: BlockValues) -> None:
        """Compare the values with those of the fit.

        Raises
        ------
        ModelError
        """
        argument = self.binding.argument(self.name)
        arrays = {s.key: to_device_dtype(s.name, values.arrays[s.key]) for s in argument.sources}
        block = block_of(self.binding, values.sizes)
        own = arrange_values(self.binding, self.name, arrays, values.dims, block)
        if not np.array_equal(own, self.binding.concrete[self.name]):
            raise _differs(argument)


def require_same_values(binding: Binding) -> tuple[SameValues, ...]:
    """The requirements on arguments whose values the model reads."""
    return tuple(SameValues(name, binding.without_data()) for name in binding.concrete)
