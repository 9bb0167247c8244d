"""A few labels of data that stay lazy, such that they show a missing value if there is one.

A fit in batches never holds its data, and a fit with ``per`` a few cells of them. What
missing values do to a model is looked at on samples: passes over the data find where they
are, and a little is loaded, with a gap of every variable that has one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import reduce
from operator import and_, or_

import numpy as np
import xarray as xr

from xr_aimz.binding import Binding
from xr_aimz.casting import check_moments, reduce_moments
from xr_aimz.inputs import Inputs

__all__ = ["cells_with_gaps", "sample_with_gaps"]

_LABELS = 8


def sample_with_gaps(
    binding: Binding, inputs: Inputs, converted: Callable[[], Collection[str]]
) -> tuple[Inputs, xr.Dataset]:
    """The inputs at a few labels, and the standard deviation of every variable.

    Without arrays where nothing is missing. Reads all of the data once, block by block, and
    again where there are gaps. Core dims stay whole. ``converted`` is as in
    :func:`xr_aimz.casting.measure_sd`.

    Raises
    ------
    DtypeError
        A variable loses in JAX's float dtype what tells its values apart.
    """
    floats = {key: a.variable for key, a in inputs.arrays.items() if a.dtype.kind == "f"}
    free = [d for d in binding.dims if d not in binding.core_dims]
    # One Dataset, so that dask reads what variables share only once; and one block after
    # another, for those of a large store weigh much.
    arrays = {key: a.variable for key, a in inputs.arrays.items()}
    counted = {f"missing {key}": a.isnull().sum() for key, a in floats.items()}
    known = xr.Dataset({**counted, **reduce_moments(arrays, binding.per)})
    known = known.compute(scheduler="synchronous")
    sd = check_moments(binding, inputs, known, arrays, converted)
    gappy = [key for key in floats if int(known[f"missing {key}"])]
    if not gappy:
        return replace(inputs, arrays={}), sd
    # Along each dim only now: of very many labels the counts weigh as much as data.
    counts = {
        f"{d} {key}": floats[key].isnull().sum([e for e in floats[key].dims if e != d])
        for key in gappy
        for d in free
        if d in floats[key].dims
    }
    missing = xr.Dataset(counts).compute(scheduler="synchronous")
    gaps = [_gap(floats[key], free) for key in gappy]
    chosen = {d: _labels(missing, d, inputs.sizes[d], gaps) for d in free}
    part = {
        key: a.isel({d: at for d, at in chosen.items() if d in a.dims})
        for key, a in inputs.arrays.items()
    }
    sizes = {**inputs.sizes, **{d: len(at) for d, at in chosen.items()}}
    labels = {d: index[chosen[d]] if d in chosen else index for d, index in inputs.labels.items()}
    return replace(inputs, arrays=part, sizes=sizes, labels=labels, chunks={}), sd


def _gap(array: xr.Variable, free: list[str]) -> dict[str, int]:
    """Where one missing value of a variable is: along each dim in turn, where most are."""
    found: dict[str, int] = {}
    for d in (d for d in free if d in array.dims):
        counts = array.isnull().sum([e for e in array.dims if e != d]).compute()
        found[d] = int(counts.values.argmax())
        array = array.isel({d: found[d]})
    return found


def _labels(missing: xr.Dataset, dim: str, size: int, gaps: list[dict[str, int]]) -> np.ndarray:
    """Positions of the labels with most missing, of those with least, and of known gaps."""
    count = sum((m.values for m in missing.values() if m.dims == (dim,)), np.zeros(size))
    order = np.argsort(count, kind="stable")
    known = [gap[dim] for gap in gaps if dim in gap]
    return np.unique(np.concatenate([order[:_LABELS], order[-_LABELS:], known]).astype(int))


def cells_with_gaps(binding: Binding, inputs: Inputs) -> Iterator[Inputs]:
    """For each variable with gaps, the inputs of a cell that has one, and has data.

    Reads all of the data once.
    """
    floats = {k: a.variable for k, a in inputs.arrays.items() if a.dtype.kind == "f"}
    outcomes = {s.key for a in binding.outcomes for s in a.sources}
    there = {k: _whole(a, binding) for k, a in floats.items()}
    some = [t for k, t in there.items() if k in outcomes]
    every = [t for k, t in there.items() if k not in outcomes]
    if not there:
        return
    data = reduce(and_, [*every, *([reduce(or_, some)] if some else [])])
    cells = {
        f"gaps {k}": a.isnull().any([d for d in a.dims if d not in binding.per])
        for k, a in floats.items()
    }
    known = xr.Dataset({**cells, "data": data.any([d for d in data.dims if d in binding.dims])})
    known = known.compute()
    for key in floats:
        gappy = known[f"gaps {key}"].variable & known["data"].variable
        if bool(gappy.any()):
            place = np.argwhere(gappy.values)[0]
            chosen = {str(d): int(i) for d, i in zip(gappy.dims, place, strict=True)}
            yield _at(inputs, chosen).of_cell(binding.per)


def _whole(array: xr.Variable, binding: Binding) -> xr.Variable:
    """Where a value is there with all that makes it up."""
    return array.notnull().all([d for d in array.dims if d not in binding.cut_dims])


def _at(inputs: Inputs, chosen: dict[str, int]) -> Inputs:
    arrays = {
        key: a.isel({d: [i] for d, i in chosen.items() if d in a.dims})
        for key, a in inputs.arrays.items()
    }
    return replace(inputs, arrays=arrays)
