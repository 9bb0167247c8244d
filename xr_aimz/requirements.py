"""Conditions on the values of input arrays, checked before a model is run on them.

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

from xr_aimz.binding import Binding
from xr_aimz.inputs import Inputs

__all__ = [
    "BlockValues",
    "Requirement",
    "check_in_memory",
    "check_values",
    "describe_variables",
    "is_in_memory",
    "label_part",
    "label_whole",
    "resize",
]


@dataclass(frozen=True, eq=False)
class BlockValues:
    """Arrays of one block as they were read, with dims and labels.

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
        """The labels of an entry in words, such as ``" at time=2001, lat=10.0"``."""
        shown = [self._label(d, i) for d, i in zip(dims, position, strict=True)]
        return f" at {', '.join(shown)}" if shown else ""

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
        """The keys of the arrays that decide."""

    def check(self, values: BlockValues) -> None:
        """Raise an error of the package's own unless the values meet the condition."""

    def at(self, sizes: Mapping[str, int]) -> Requirement | None:
        """The same on blocks that are at most of those sizes; None where it cannot be checked."""


def describe_variables(binding: Binding) -> dict[str, str]:
    """Say of each array which variable and argument it is."""
    return {
        source.key: f"variable {source.name!r} (argument {argument.name!r})"
        for argument in binding.arguments
        for source in argument.sources
    }


def resize(
    requirements: Iterable[Requirement], sizes: Mapping[str, int]
) -> tuple[Requirement, ...]:
    """The requirements on blocks that are at most of those sizes."""
    found = (requirement.at(sizes) for requirement in requirements)
    return tuple(r for r in found if r is not None)


def is_in_memory(array: xr.DataArray) -> bool:
    """Whether an array is neither dask's nor in a file that xarray has opened."""
    return bool(array.variable._in_memory)


def check_values(requirements: Iterable[Requirement], values: BlockValues) -> None:
    """Check the arrays of one block."""
    for requirement in requirements:
        requirement.check(values)


def check_in_memory(
    requirements: Iterable[Requirement], inputs: Inputs
) -> tuple[Requirement, ...]:
    """Check now what is in memory.

    Returns
    -------
    tuple of Requirement
        Those on lazy arrays, for the tasks that read them.
    """
    now: list[Requirement] = []
    later: list[Requirement] = []
    for requirement in requirements:
        here = all(is_in_memory(inputs.arrays[key]) for key in requirement.keys)
        (now if here else later).append(requirement)
    if now:
        read = frozenset[str]().union(*(r.keys for r in now))
        arrays = {k: inputs.arrays[k].values for k in read}
        check_values(now, label_whole(inputs, arrays))
    return tuple(later)


def label_whole(inputs: Inputs, arrays: Mapping[str, np.ndarray]) -> BlockValues:
    """Arrays of the whole Dataset as one block."""
    return label_part(inputs, arrays, {})


def label_part(
    inputs: Inputs, arrays: Mapping[str, np.ndarray], part: Mapping[str, Any]
) -> BlockValues:
    """Arrays of a part of the Dataset, given by slices or positions along some dims."""
    labels = {
        d: inputs.labels[d] if d in inputs.labels else np.arange(n)
        for d, n in inputs.sizes.items()
    }
    labels |= {d: labels[d][where] for d, where in part.items()}
    return BlockValues(arrays, inputs.dims, labels, frozenset(labels) - set(inputs.labels))
