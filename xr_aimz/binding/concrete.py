"""Find arguments whose values a model reads in Python, such as ``np.unique(group)``.

A model is traced on shapes, without values. The arguments whose values it needs, as in
``int(x.max())``, are found by tracing it again with the values of all, then with those of fewer.
They are passed as NumPy arrays and are part of the traced program, which is valid for these values
only: a prediction with other values, or with a part of them, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xr_aimz.binding.alignment import AlignedInputs
from xr_aimz.binding.casting import as_jax_array
from xr_aimz.binding.layout import arrange_values, block_of
from xr_aimz.binding.requirements import BlockValues
from xr_aimz.binding.spec import Binding, BoundArgument
from xr_aimz.errors import ChunkError, MissingValueError, ModelError

_REMEDY = (
    "Use jax.numpy in place of NumPy on it; or pass what is computed from it as a constant, "
    "variables={'n': 7}, or take the size of a dimension, xr_aimz.plate(dim)"
)


def find_concrete(
    trace: Callable[[Binding], Any], binding: Binding, inputs: AlignedInputs
) -> frozenset[str] | None:
    """Find the arguments whose values a model needs; None if it fails with all values too.

    Parameters
    ----------
    trace : callable
        Traces the model with a binding; it has failed with ``binding``.
    binding : Binding
    inputs : AlignedInputs

    Raises
    ------
    ModelError, ChunkError, MissingValueError
        Such an argument is an outcome, is lazy, has a dim of ``per``, or has NaN.
    """

    def runs(names: Collection[str]) -> bool:
        try:
            trace(with_concrete_values(binding, inputs, names))
        except Exception:
            # A model may raise any error; only whether it runs matters.
            return False
        return True

    # Outcomes cannot be passed by their values, so they are left out first.
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


def with_concrete_values(
    binding: Binding, inputs: AlignedInputs, names: Collection[str]
) -> Binding:
    """Return the binding with the values of some arguments; zeros for lazy arrays."""
    cell = inputs.of_cell(binding.per)
    return replace(binding, concrete=_read_values(binding, cell, names, cell.sizes))


def resize_values(binding: Binding, inputs: AlignedInputs, sizes: Mapping[str, int]) -> Binding:
    """Return the binding with its values repeated, or cut, to other sizes of observation dims."""
    return replace(binding, concrete=_read_values(binding, inputs, binding.concrete, sizes))


def _read_values(
    binding: Binding, inputs: AlignedInputs, names: Collection[str], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    by_name = {}
    for name in sorted(names):
        arrays = {}
        for source in binding.argument(name).sources:
            array = inputs.arrays[source.key]
            is_lazy = array.chunks is not None
            values = (
                np.zeros(array.shape, array.dtype) if is_lazy else _fill_for_trace(array.values)
            )
            for axis, d in enumerate(map(str, array.dims)):
                values = np.take(values, np.arange(sizes[d]) % values.shape[axis], axis)
            arrays[source.key] = as_jax_array(source.name, values)
        by_name[name] = arrange_values(
            binding, name, arrays, inputs.dims, block_of(binding, sizes)
        )
    return by_name


def _fill_for_trace(values: np.ndarray) -> np.ndarray:
    """Fill NaN, only to trace: an argument with NaN is refused later, by its name."""
    if values.dtype.kind != "f" or not np.isnan(values).any():
        return values
    filled = np.nan_to_num(values)
    # Ints with missing values are stored as floats, which a model of ints may not accept.
    return filled.astype(int) if (filled == np.round(filled)).all() else filled


def _check_can_be_read(binding: Binding, inputs: AlignedInputs, argument: BoundArgument) -> None:
    what = _describe_reading(argument)
    if argument.outcome:
        raise ModelError(
            f"{what}, and its default is None, as for an outcome, of which a prediction has no "
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
                f"{what}, and per={cells!r} gives each fit other values of it, but all fits share "
                f"one program. {_REMEDY}"
            )
        if array.dtype.kind == "f" and bool(array.isnull().any()):
            raise MissingValueError(
                f"{what}, and variable {source.name!r} has missing values (NaN), and how the "
                "model treats them is unknown. Fill them, ds.fillna(...), or drop their labels"
            )


def _describe_reading(argument: BoundArgument) -> str:
    names = ", ".join(repr(s.name) for s in argument.sources)
    return (
        f"the model reads the values of argument {argument.name!r} (variable {names}) in Python, "
        "as np.unique, int(...), len(set(...)) and other functions of NumPy do"
    )


def check_not_cut(binding: Binding, dims: Collection[str], how: str) -> None:
    """Check that arguments whose values the model reads have none of the dims that are split.

    Raises
    ------
    ModelError
        An argument has such a dim; the message gives a replacement.
    """
    for name in binding.concrete:
        argument = binding.argument(name)
        if split_dims := sorted({d for s in argument.sources for d in s.dims} & set(dims)):
            raise ModelError(
                f"{_describe_reading(argument)}, and its dims {split_dims!r} are cut {how}, "
                f"but a part has other values. Do not split them, "
                f"ds.chunk({dict.fromkeys(split_dims, -1)!r}). Or: {_REMEDY}"
            )


def check_sizes(binding: Binding, inputs: AlignedInputs) -> None:
    """Check that arguments whose values the model reads have the shapes that they had at the fit.

    Raises
    ------
    ModelError
    """
    cell = inputs.of_cell(binding.per)
    zeros = {k: np.broadcast_to(np.zeros((), bool), a.shape) for k, a in cell.arrays.items()}
    for name, fit_values in binding.concrete.items():
        block = block_of(binding, cell.sizes)
        values = arrange_values(binding, name, zeros, cell.dims, block)
        if values.shape != fit_values.shape:
            raise _other_values_error(binding.argument(name))


def _other_values_error(argument: BoundArgument) -> ModelError:
    return ModelError(
        f"{_describe_reading(argument)}, and here it has others than at the fit: what is computed "
        "from them, such as codes of categories, would differ between Datasets. Predict with the "
        f"values of the fit, all of them in their order. Or: {_REMEDY}"
    )


@dataclass(frozen=True, eq=False)
class SameValues:
    """Requirement that an argument whose values the model reads has its values at the fit.

    Parameters
    ----------
    name : str
        Name of the argument.
    binding : Binding
    """

    name: str
    binding: Binding

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(s.key for s in self.binding.argument(self.name).sources)

    def at(self, sizes: Mapping[str, int]) -> SameValues:
        """Return the requirement itself: no dim of the argument is split."""
        return self

    def check(self, values: BlockValues) -> None:
        """Compare the values with those of the fit.

        Raises
        ------
        ModelError
        """
        argument = self.binding.argument(self.name)
        arrays = {s.key: as_jax_array(s.name, values.arrays[s.key]) for s in argument.sources}
        block = block_of(self.binding, values.sizes)
        block_values = arrange_values(self.binding, self.name, arrays, values.dims, block)
        if not np.array_equal(block_values, self.binding.concrete[self.name]):
            raise _other_values_error(argument)


def require_same_values(binding: Binding) -> tuple[SameValues, ...]:
    """Return the requirements on arguments whose values the model reads."""
    return tuple(SameValues(name, binding.without_data()) for name in binding.concrete)
