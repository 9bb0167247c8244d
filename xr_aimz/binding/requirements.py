"""Check conditions on the values of input arrays, before a model is run on them.

Arrays in memory are checked when a fit or a prediction is built, lazy ones by the task that
reads them: the same check, on the arrays of one block with the labels of its entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding.alignment import AlignedInputs
from xr_aimz.binding.spec import Binding


@dataclass(frozen=True, eq=False)
class BlockValues:
    """Arrays of one block as they were read, with their dims and labels.

    Parameters
    ----------
    arrays : mapping of key to array
    dims : mapping of key to tuple of str
        The dims of each array.
    labels : mapping of dim to sequence
        One label for each entry of the block; without a coordinate the position in the Dataset.
    unlabelled : frozenset of str
        The dims without a coordinate.
    """

    arrays: Mapping[str, np.ndarray]
    dims: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, Any]
    unlabelled: frozenset[str] = field(default=frozenset())

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {d: len(labels) for d, labels in self.labels.items()}
        for key, array in self.arrays.items():
            sizes |= dict(zip(self.dims[key], array.shape, strict=True))
        return sizes

    def place(self, dims: Iterable[str], position: Iterable[int]) -> str:
        """Describe an entry by its labels, such as ``" at time=2001, lat=10.0"``."""
        descriptions = [self._label(d, i) for d, i in zip(dims, position, strict=True)]
        return f" at {', '.join(descriptions)}" if descriptions else ""

    def _label(self, dim: str, position: int) -> str:
        if dim not in self.labels:
            return f"entry {position} of {dim!r}"
        label = self.labels[dim][position]
        if dim in self.unlabelled:
            return f"entry {int(label)} of {dim!r}"
        if isinstance(label, np.datetime64):
            return f"{dim}={pd.Timestamp(label).isoformat()}"
        plain = label.item() if isinstance(label, np.generic) else label
        return f"{dim}={plain if hasattr(plain, 'isoformat') else repr(plain)}"


class Requirement(Protocol):
    """A condition on the values of some arrays."""

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the arrays to which the condition applies."""

    def check(self, values: BlockValues) -> None:
        """Raise an error of this package unless the values meet the condition."""

    def at(self, sizes: Mapping[str, int]) -> Requirement | None:
        """Return the condition for blocks of at most these sizes; None if it cannot be checked."""


def describe_variables(binding: Binding) -> dict[str, str]:
    """Describe each array, by key, as its variable and argument."""
    return {
        source.key: f"variable {source.name!r} (argument {argument.name!r})"
        for argument in binding.arguments
        for source in argument.sources
    }


def resize(
    requirements: Iterable[Requirement], sizes: Mapping[str, int]
) -> tuple[Requirement, ...]:
    """Return the requirements for blocks of at most these sizes."""
    resized = (requirement.at(sizes) for requirement in requirements)
    return tuple(r for r in resized if r is not None)


def is_in_memory(array: xr.DataArray) -> bool:
    """Return whether an array is in memory: neither of dask nor in a file opened by xarray."""
    return bool(array.variable._in_memory)


def check_values(requirements: Iterable[Requirement], values: BlockValues) -> None:
    """Check the arrays of one block against requirements."""
    for requirement in requirements:
        requirement.check(values)


def check_in_memory(
    requirements: Iterable[Requirement], inputs: AlignedInputs
) -> tuple[Requirement, ...]:
    """Check the requirements on arrays in memory, and return the others.

    Returns
    -------
    tuple of Requirement
        Requirements on lazy arrays, for the tasks that read them.
    """
    now: list[Requirement] = []
    later: list[Requirement] = []
    for requirement in requirements:
        in_memory = all(is_in_memory(inputs.arrays[key]) for key in requirement.keys)
        (now if in_memory else later).append(requirement)
    if now:
        keys = frozenset[str]().union(*(r.keys for r in now))
        arrays = {k: inputs.arrays[k].values for k in keys}
        check_values(now, whole_block(inputs, arrays))
    return tuple(later)


def whole_block(inputs: AlignedInputs, arrays: Mapping[str, np.ndarray]) -> BlockValues:
    """Return arrays of the whole Dataset as one block, with its labels."""
    return part_block(inputs, arrays, {})


def part_block(
    inputs: AlignedInputs, arrays: Mapping[str, np.ndarray], part: Mapping[str, Any]
) -> BlockValues:
    """Return arrays of a part of the Dataset, at slices or positions along dims, as a block."""
    labels = {
        d: inputs.labels[d] if d in inputs.labels else np.arange(n)
        for d, n in inputs.sizes.items()
    }
    labels |= {d: labels[d][where] for d, where in part.items()}
    return BlockValues(arrays, inputs.dims, labels, frozenset(labels) - set(inputs.labels))
