"""A Dataset made ready for a binding: checked, aligned, its dims in the model's order.

:func:`gather` is where a Dataset meets the names, dims, labels and units of a fit. What
it lets through is a Dataset that the fit could have been made on; all else is an error
that names the variable and the dimension. It reads metadata and indexes only, so lazy
arrays stay lazy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import Argument, Binding, Source, find
from xr_aimz.errors import (
    ChunkError,
    DimensionError,
    DtypeError,
    LabelError,
    UnitsError,
)
from xr_aimz.spelling import list_names

__all__ = ["Inputs", "gather", "reordered"]

Labelled = TypeVar("Labelled", xr.Dataset, xr.DataArray)


@dataclass(frozen=True)
class Inputs:
    """What a Dataset gives to a binding.

    Parameters
    ----------
    arrays : mapping of source key to DataArray
        The dims of ``per``, then the observation dims, each in order, then the others.
    sizes : mapping of dim to int
    labels : mapping of dim to pandas.Index
        For each dimension that has an index.
    coords : Dataset
        The coordinates that results carry; no data variables.
    scalars : tuple of str
        Observation dims that the Dataset has as scalar coordinates: here of size 1, and
        scalar again in results.
    chunks : mapping of dim to tuple of int
        How the Dataset is chunked along observation dims; empty for a numpy-backed one.
    selection : mapping of dim to labels
        Those that the Dataset has, where the model is given all that the fit had.
    """

    arrays: Mapping[str, xr.DataArray]
    sizes: Mapping[str, int]
    labels: Mapping[str, pd.Index]
    coords: xr.Dataset
    scalars: tuple[str, ...] = ()
    chunks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)

    def of_cell(self, per: tuple[str, ...]) -> Inputs:
        """What one cell of the dims ``per`` gives: the arrays that a model of it sees."""
        if not per:
            return self
        arrays = {
            key: a.isel(dict.fromkeys((d for d in per if d in a.dims), 0), drop=True)
            for key, a in self.arrays.items()
        }
        sizes = {d: n for d, n in self.sizes.items() if d not in per}
        return replace(self, arrays=arrays, sizes=sizes)

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(map(str, a.dims)) for name, a in self.arrays.items()}


def gather(binding: Binding, ds: xr.Dataset, *, outcomes: bool) -> Inputs:
    """The arrays that a binding takes from a Dataset, checked.

    Parameters
    ----------
    binding : Binding
    ds : Dataset
    outcomes : bool
        Whether the outcomes must be there (a fit, a log-likelihood) or are left out (a
        prediction).

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, LabelError, ChunkError, UnitsError
    """
    arguments = binding.arguments if outcomes else binding.inputs
    scalars = tuple(d for d in binding.cut_dims if d not in ds.dims and _is_scalar(ds, d))
    ds = ds.assign_coords({d: (d, ds[d].values[None], ds[d].attrs) for d in scalars})
    ds, selection = _in_order(binding, ds, arguments)
    _check_dims(binding, ds, arguments)
    arrays: dict[str, xr.DataArray] = {}
    for argument in arguments:
        for source in argument.sources:
            arrays[source.key] = _fetch(binding, ds, argument, source, scalars)
    sizes = _sizes(ds, arrays)
    chunks = _chunks(binding, ds, arrays)
    return Inputs(arrays, sizes, _labels(ds, arrays), _coords(ds), scalars, chunks, selection)


def _sizes(ds: xr.Dataset, arrays: Mapping[str, xr.DataArray]) -> dict[str, int]:
    sizes = {str(d): n for d, n in ds.sizes.items()}
    for key, array in arrays.items():
        for dim, n in array.sizes.items():
            if sizes.setdefault(str(dim), n) != n:
                raise DimensionError(
                    f"argument {key!r} has {n} entries along {dim!r}, where the Dataset has "
                    f"{sizes[str(dim)]}, without labels to align them; give both a coordinate"
                )
    return sizes


def _is_scalar(ds: xr.Dataset, dim: str) -> bool:
    return dim in ds.coords and ds[dim].ndim == 0


def _check_dims(binding: Binding, ds: xr.Dataset, arguments: tuple[Argument, ...]) -> None:
    kept = {d for a in arguments for s in a.sources if s.data is not None for d in s.dims}
    for dim in binding.cut_dims:
        if dim not in ds.dims and dim not in kept:
            raise DimensionError(
                f"observation dimension {dim!r} is not in the Dataset, which has "
                f"{list_names(sorted(map(str, ds.dims)), dim)}; rename one, or add it with "
                f"expand_dims({dim!r})"
            )
        if dim in ds.dims and ds.sizes[dim] == 0:
            raise DimensionError(f"dimension {dim!r} is empty: there is nothing to compute on")
        index = ds.indexes.get(dim)
        if index is not None and not index.is_unique:
            twice = list(index[index.duplicated()][:3])
            raise LabelError(
                f"dimension {dim!r} has duplicate labels, {twice!r} among them; a draw is "
                f"addressed by its label, so make them unique: ds.drop_duplicates({dim!r})"
            )


def _fetch(
    binding: Binding, ds: xr.Dataset, argument: Argument, source: Source, scalars: tuple[str, ...]
) -> xr.DataArray:
    array = _aligned(ds, argument, source)
    for d in scalars:
        if d in source.dims and d not in array.dims:
            array = array.expand_dims({d: ds[d].values})
    array = array.reset_coords(drop=True)
    _check_array(binding, ds, argument, source, array)
    first = [d for d in binding.cut_dims if d in array.dims]
    return array.transpose(*first, *[d for d in source.dims if d not in binding.cut_dims])


def _aligned(ds: xr.Dataset, argument: Argument, source: Source) -> xr.DataArray:
    """The variable; or the DataArray given at the fit, on this Dataset's labels."""
    given_now = source.name in ds.variables and not source.shadowed
    if source.data is None or given_now:
        return find(ds, source.name, argument.name)
    array = source.data
    for dim, index in ds.indexes.items():
        if dim not in array.dims:
            continue
        if dim not in array.indexes:
            raise LabelError(f"argument {argument.name!r}: its DataArray has no labels on {dim!r}")
        absent = index.difference(array.indexes[dim])
        if len(absent):
            raise LabelError(
                f"argument {argument.name!r}: its DataArray lacks {len(absent)} labels of "
                f"{dim!r}, {list(absent[:3])!r} among them; bind the argument to a variable "
                "of the Dataset by name instead"
            )
        array = array.sel({dim: index})
    return array


def _check_array(
    binding: Binding, ds: xr.Dataset, argument: Argument, source: Source, array: xr.DataArray
) -> None:
    what = f"variable {source.name!r} (argument {argument.name!r})"
    _check_dtype(what, argument, source, array)
    new = [d for d in array.dims if d not in source.dims]
    if new:
        raise DimensionError(
            f"{what} has dims {array.dims!r}; the fit had {source.dims!r}. "
            f"{new!r} is new: select one label of it, or fit with it"
        )
    gone = [d for d in source.dims if d not in array.dims and d not in binding.cut_dims]
    if gone:
        raise DimensionError(f"{what} has dims {array.dims!r}; the fit also had {gone!r}")
    chunked = [d for d in binding.core_dims if len(array.chunksizes.get(d, (1,))) > 1]
    if chunked:
        raise ChunkError(
            f"{what} is chunked along core_dim {chunked!r}, in "
            f"{[len(array.chunksizes[d]) for d in chunked]!r} pieces; the model needs it whole: "
            f"ds.chunk({dict.fromkeys(chunked, -1)!r})"
        )
    units = array.attrs.get("units")
    if units is not None and source.units is not None and str(units) != source.units:
        raise UnitsError(
            f"{what} is in {str(units)!r}; the fit was in {source.units!r}. Convert it, or "
            f"set its attrs['units'] if only the name differs"
        )


def _check_dtype(what: str, argument: Argument, source: Source, array: xr.DataArray) -> None:
    kind, name = array.dtype.kind, source.name
    if kind in "fiub":
        return
    # An object array of dask's is refused unseen: to look at it would be to compute it.
    dates = (
        kind == "O"
        and array.chunks is None
        and xr.core.common.contains_cftime_datetimes(array.variable)
    )
    if kind == "M" or dates:
        remedy = (
            f"give it decimal years since one: ds.assign_coords(year=ds[{name!r}].dt.decimal_year "
            f"- 2000) and variables={{{argument.name!r}: 'year'}}"
        )
    elif kind == "m":
        remedy = (
            f"give it a number of days: ds.assign(days=ds[{name!r}] / np.timedelta64(1, 'D')) and "
            f"variables={{{argument.name!r}: 'days'}}"
        )
    else:
        remedy = (
            f"convert it: ds[{name!r}].astype(float), or to codes by "
            "np.unique(..., return_inverse=True)"
        )
    raise DtypeError(
        f"{what} has dtype {array.dtype}{' (dates)' if dates else ''}; a model takes floats, ints "
        f"and bools: {remedy}"
    )


def _in_order(
    binding: Binding, ds: xr.Dataset, arguments: tuple[Argument, ...]
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Dimensions that are not observed have the fit's own labels, in the fit's order.

    Also the labels that the Dataset has of those of which the model takes no array: it sees
    all of them, and results are selected. Not where it takes whole numbers: an index may count
    among the Dataset's labels or among the fit's, and which of them it is cannot be known.
    """
    selection: dict[str, Any] = {}
    sources = [s for a in arguments for s in a.sources]
    may_index = any(_dtype_kind(ds, s) in "iu" for s in sources)
    for d, index in binding.labels.items():
        labels, is_scalar = ds.indexes.get(d), _is_scalar(ds, d)
        as_input = any(d in s.dims for s in sources)
        if may_index or as_input or isinstance(index, pd.MultiIndex):
            ds = reordered(ds, d, index, "the Dataset")
        elif is_scalar or (labels is not None and not labels.equals(index)):
            selection[d] = ds[d].values
            new = pd.Index(np.atleast_1d(selection[d])).difference(index, sort=False)
            if len(new):
                raise _unknown_labels("the Dataset", d, new)
            along = [n for n, v in ds.variables.items() if d in v.dims or n == d]
            ds = ds.drop_vars(along).assign_coords({d: index})
    return ds, selection


def _dtype_kind(ds: xr.Dataset, source: Source) -> str:
    array = source.data if source.data is not None else ds.variables.get(source.name)
    return "f" if array is None else array.dtype.kind


def _unknown_labels(what: str, dim: str, new: pd.Index, remedy: str = "") -> LabelError:
    fit_with_them = (
        "new_labels='sample' draws latents for new labels of observation dimensions alone, and "
        "this is none. Select labels that the fit saw, or fit with these"
    )
    return LabelError(
        f"{what} has {len(new)} labels of {dim!r} that the fit never saw, {list(new[:3])!r} among "
        f"them; {remedy or fit_with_them}"
    )


def reordered(
    labelled: Labelled, dim: str, index: pd.Index, what: str, remedy: str = ""
) -> Labelled:
    """The same labels in the order of ``index``; without labels, as it is.

    Raises
    ------
    LabelError
        Other labels than those: ``what`` begins the sentence that says so, and ``remedy`` says
        what would work where some are lacking.
    """
    here = labelled.indexes.get(dim)
    if here is None or here.equals(index):
        return labelled
    new, absent = here.difference(index, sort=False), index.difference(here, sort=False)
    if not len(new) and not len(absent) and len(here) == len(index):
        return labelled.sel({dim: index})
    if len(new):
        raise _unknown_labels(what, dim, new, remedy)
    if not len(absent):
        raise LabelError(
            f"{what} has labels of {dim!r} more than once, "
            f"{list(here[here.duplicated()][:3])!r} among them; give each once"
        )
    all_of_them = (
        "the model may combine them (by a sum, or an index, which counts among all of them), so "
        f"give them all, in any order, and select from the result: .sel({dim}=...)"
    )
    raise LabelError(
        f"{what} lacks {len(absent)} of the {len(index)} labels of {dim!r} that the fit had, "
        f"{list(absent[:3])!r} among them; {remedy or all_of_them}"
    )


def _chunks(
    binding: Binding, ds: xr.Dataset, arrays: Mapping[str, xr.DataArray]
) -> dict[str, tuple[int, ...]]:
    """The chunks of the arrays taken; where those are not chunked, of the other variables."""
    # A prediction leaves the outcome out, and a chunked Dataset may have chunked nothing else.
    others = [v.chunksizes for v in ds.variables.values()]
    found: dict[str, tuple[int, ...]] = {}
    for chunked in ([a.chunksizes for a in arrays.values()], others):
        for dim in (d for d in binding.cut_dims if d not in (*found, *binding.core_dims)):
            if mine := [c[dim] for c in chunked if dim in c]:
                found[dim] = common_chunks(mine)
    return found


def common_chunks(found: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The coarsest chunks that every one of the given chunkings can be cut into."""
    edges = {0}.union(*(accumulate(chunks) for chunks in found))
    return tuple(stop - start for start, stop in pairwise(sorted(edges)))


def _labels(ds: xr.Dataset, arrays: Mapping[str, xr.DataArray]) -> dict[str, pd.Index]:
    own = {str(d): i for a in arrays.values() for d, i in a.indexes.items()}
    return own | {str(d): i for d, i in ds.indexes.items()}


def _coords(ds: xr.Dataset) -> xr.Dataset:
    return ds.drop_vars(list(ds.data_vars))
