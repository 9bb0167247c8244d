"""A few labels of data that stay lazy, such that they show a missing value if there is one.

A fit in batches never holds its data. What missing values do to a model is looked at on a
sample: one pass finds where they are, and some labels with them and some without are
loaded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from xr_aimz.binding import Binding
from xr_aimz.inputs import Inputs

__all__ = ["cell_with_gaps", "sample_with_gaps"]

_LABELS = 8


def sample_with_gaps(binding: Binding, inputs: Inputs) -> Inputs:
    """The inputs at a few labels; without arrays where nothing is missing.

    Reads all of the data once, block by block. Core dims stay whole.
    """
    floats = {key: a for key, a in inputs.arrays.items() if a.dtype.kind == "f"}
    free = [d for d in binding.dims if d not in binding.core_dims]
    counts = {
        f"{d} {i}": a.variable.isnull().sum([e for e in a.dims if e != d])
        for i, a in enumerate(floats.values())
        for d in free
        if d in a.dims
    }
    # One Dataset, so that dask reads what variables share only once.
    missing = xr.Dataset(counts).compute()
    if not any(bool(m.any()) for m in missing.values()):
        return replace(inputs, arrays={})
    chosen = {d: _labels(missing, d, inputs.sizes[d]) for d in free}
    arrays = {
        key: a.isel({d: at for d, at in chosen.items() if d in a.dims})
        for key, a in inputs.arrays.items()
    }
    sizes = {**inputs.sizes, **{d: len(at) for d, at in chosen.items()}}
    labels = {d: index[chosen[d]] if d in chosen else index for d, index in inputs.labels.items()}
    return replace(inputs, arrays=arrays, sizes=sizes, labels=labels, chunks={})


def cell_with_gaps(binding: Binding, inputs: Inputs) -> Inputs:
    """The inputs of one cell of a fit with ``per``, some but not all of its values missing.

    Without arrays where there is no such cell. Reads all of the data once.
    """
    cells = {
        str(i): a.variable.isnull().mean([d for d in a.dims if d not in binding.per])
        for i, a in enumerate(inputs.arrays.values())
        if a.dtype.kind == "f" and any(d in binding.dims for d in a.dims)
    }
    for missing in xr.Dataset(cells).compute().values():
        gappy = (missing > 0) & (missing < 1)
        if bool(gappy.any()):
            place = np.argwhere(gappy.values)[0]
            chosen = {str(d): int(i) for d, i in zip(gappy.dims, place, strict=True)}
            return _at(inputs, chosen).of_cell(binding.per)
    return replace(inputs.of_cell(binding.per), arrays={})


def _at(inputs: Inputs, chosen: dict[str, int]) -> Inputs:
    arrays = {
        key: a.isel({d: [i] for d, i in chosen.items() if d in a.dims})
        for key, a in inputs.arrays.items()
    }
    return replace(inputs, arrays=arrays)


def _labels(missing: xr.Dataset, dim: str, size: int) -> np.ndarray:
    """Positions of the labels with most missing and of those with least."""
    count = sum((m.values for m in missing.values() if m.dims == (dim,)), np.zeros(size))
    order = np.argsort(count, kind="stable")
    return np.unique(np.concatenate([order[:_LABELS], order[-_LABELS:]]))
