"""Align a Dataset to a binding (names, dims, labels, units), and label arrays as results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding.labels import check_units, match_labels, new_labels_error, reorder_like
from xr_aimz.binding.layout import shape_in_dataset
from xr_aimz.binding.spec import Binding, BoundArgument, VariableRef, find_variable
from xr_aimz.errors import (
    ChunkError,
    DimensionError,
    DtypeError,
    LabelError,
    list_names,
)
from xr_aimz.tracing import FEATURE, Site


@dataclass(frozen=True)
class AlignedInputs:
    """Arrays, labels and chunks of a Dataset, aligned to a binding.

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
        Observation dims that the Dataset has as scalar coordinates: of size 1 in the arrays,
        and scalar again in results.
    chunks : mapping of dim to tuple of int
        Chunk sizes of the Dataset along observation dims; empty for a numpy-backed one.
    selection : mapping of dim to labels
        Labels of the Dataset along dims of which the model gets all labels of the fit; results
        are selected by them.
    """

    arrays: Mapping[str, xr.DataArray]
    sizes: Mapping[str, int]
    labels: Mapping[str, pd.Index]
    coords: xr.Dataset
    scalars: tuple[str, ...] = ()
    chunks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    selection: Mapping[str, Any] = field(default_factory=dict)

    def of_cell(self, per: tuple[str, ...]) -> AlignedInputs:
        """Return the inputs of one cell of ``per``: arrays and sizes without these dims."""
        if not per:
            return self
        arrays = {
            key: a.isel(dict.fromkeys((d for d in per if d in a.dims), 0), drop=True)
            for key, a in self.arrays.items()
        }
        sizes = {d: n for d, n in self.sizes.items() if d not in per}
        return replace(self, arrays=arrays, sizes=sizes)

    def load(self, part: Mapping[str, slice] | None = None) -> dict[str, xr.Variable]:
        """Load the arrays into memory, or a part of them, at slices along dims."""
        slices = part or {}
        # One Dataset, so that dask reads chunks that variables share only once.
        numbered = {
            f"array {i}": a.variable.isel({d: s for d, s in slices.items() if d in a.dims})
            for i, a in enumerate(self.arrays.values())
        }
        loaded = xr.Dataset(numbered).compute()
        return {key: loaded[n].variable for key, n in zip(self.arrays, numbered, strict=True)}

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(map(str, a.dims)) for name, a in self.arrays.items()}


def align(binding: Binding, ds: xr.Dataset, *, outcomes: bool) -> AlignedInputs:
    """Align a Dataset to a binding, and check names, dims, dtypes, labels, chunks and units.

    Parameters
    ----------
    binding : Binding
    ds : Dataset
    outcomes : bool
        Whether to require the outcomes (a fit, a log-likelihood) or to omit them (a prediction).

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, LabelError, ChunkError, UnitsError
    """
    arguments = binding.arguments if outcomes else binding.inputs
    scalars = tuple(d for d in binding.block_dims if d not in ds.dims and _is_scalar(ds, d))
    ds = ds.assign_coords({d: (d, ds[d].values[None], ds[d].attrs) for d in scalars})
    ds, selection = _restore_fit_labels(binding, ds, arguments)
    _check_dims(binding, ds, arguments)
    arrays: dict[str, xr.DataArray] = {}
    for argument in arguments:
        for source in argument.sources:
            arrays[source.key] = _fetch(binding, ds, argument, source, scalars)
    sizes = _merge_sizes(ds, arrays)
    chunks = _merge_chunks(binding, ds, arrays)
    return AlignedInputs(
        arrays, sizes, _merge_labels(ds, arrays), _drop_data_vars(ds), scalars, chunks, selection
    )


def _merge_sizes(ds: xr.Dataset, arrays: Mapping[str, xr.DataArray]) -> dict[str, int]:
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


def _check_dims(binding: Binding, ds: xr.Dataset, arguments: tuple[BoundArgument, ...]) -> None:
    argument_dims = {d for a in arguments for s in a.sources if s.data is not None for d in s.dims}
    for dim in binding.block_dims:
        if dim not in ds.dims and dim not in argument_dims:
            raise DimensionError(
                f"observation dimension {dim!r} is not in the Dataset, which has "
                f"{list_names(sorted(map(str, ds.dims)), dim)}; rename one, or add it with "
                f"expand_dims({dim!r})"
            )
        if dim in ds.dims and ds.sizes[dim] == 0:
            raise DimensionError(f"dimension {dim!r} is empty: there is nothing to compute on")
        index = ds.indexes.get(dim)
        if index is not None and not index.is_unique:
            duplicates = list(index[index.duplicated()][:3])
            raise LabelError(
                f"dimension {dim!r} has duplicate labels, {duplicates!r} among them; a draw is "
                f"addressed by its label, so make them unique: ds.drop_duplicates({dim!r})"
            )


def _fetch(
    binding: Binding,
    ds: xr.Dataset,
    argument: BoundArgument,
    source: VariableRef,
    scalars: tuple[str, ...],
) -> xr.DataArray:
    array = _align_variable(ds, argument, source)
    for d in scalars:
        if d in source.dims and d not in array.dims:
            array = array.expand_dims({d: ds[d].values})
    array = array.reset_coords(drop=True)
    _check_variable(binding, ds, argument, source, array)
    leading = [d for d in binding.block_dims if d in array.dims]
    return array.transpose(*leading, *[d for d in source.dims if d not in binding.block_dims])


def _align_variable(ds: xr.Dataset, argument: BoundArgument, source: VariableRef) -> xr.DataArray:
    """Return the variable, or the DataArray bound at the fit on the labels of this Dataset."""
    in_dataset = source.name in ds.variables and not source.name_is_taken
    if source.data is None or in_dataset:
        return find_variable(ds, source.name, argument.name)
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


def _check_variable(
    binding: Binding,
    ds: xr.Dataset,
    argument: BoundArgument,
    source: VariableRef,
    array: xr.DataArray,
) -> None:
    what = f"variable {source.name!r} (argument {argument.name!r})"
    _check_dtype(what, argument, source, array)
    new_dims = [d for d in array.dims if d not in source.dims]
    if new_dims:
        raise DimensionError(
            f"{what} has dims {array.dims!r}; the fit had {source.dims!r}. "
            f"{new_dims!r} is new: select one label of it, or fit with it"
        )
    absent_dims = [d for d in source.dims if d not in array.dims and d not in binding.block_dims]
    if absent_dims:
        raise DimensionError(f"{what} has dims {array.dims!r}; the fit also had {absent_dims!r}")
    chunked = [d for d in binding.core_dims if len(array.chunksizes.get(d, (1,))) > 1]
    if chunked:
        raise ChunkError(
            f"{what} is chunked along core_dim {chunked!r}, in "
            f"{[len(array.chunksizes[d]) for d in chunked]!r} chunks; the model needs one: "
            f"ds.chunk({dict.fromkeys(chunked, -1)!r})"
        )
    check_units(what, array, source.units)


def _check_dtype(
    what: str, argument: BoundArgument, source: VariableRef, array: xr.DataArray
) -> None:
    kind, name = array.dtype.kind, source.name
    if kind in "fiub":
        return
    # A dask array of objects is refused without reading its values, which would compute it.
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


def _restore_fit_labels(
    binding: Binding, ds: xr.Dataset, arguments: tuple[BoundArgument, ...]
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Restore the fit's labels, in the fit's order, along dims that are not observation dims.

    Also return the Dataset's own labels along those dims of which the model takes no array: the
    model gets all labels of the fit, and results are selected. Not if it takes integers: an index
    may count among the Dataset's labels or the fit's, and which of them cannot be determined.
    """
    selection: dict[str, Any] = {}
    sources = [s for a in arguments for s in a.sources]
    may_index = any(_dtype_kind(ds, s) in "iu" for s in sources)
    for d, index in binding.labels.items():
        labels, is_scalar = ds.indexes.get(d), _is_scalar(ds, d)
        has_input = any(d in s.dims for s in sources)
        if may_index or has_input or isinstance(index, pd.MultiIndex):
            ds = reorder_like(ds, d, index, "the Dataset")
        elif is_scalar or (labels is not None and not labels.equals(index)):
            selection[d] = ds[d].values
            new_labels = pd.Index(np.atleast_1d(selection[d])).difference(index, sort=False)
            if len(new_labels):
                raise new_labels_error("the Dataset", d, new_labels)
            along = [n for n, v in ds.variables.items() if d in v.dims or n == d]
            ds = ds.drop_vars(along).assign_coords({d: index})
    return ds, selection


def _dtype_kind(ds: xr.Dataset, source: VariableRef) -> str:
    array = source.data if source.data is not None else ds.variables.get(source.name)
    return "f" if array is None else array.dtype.kind


def _merge_chunks(
    binding: Binding, ds: xr.Dataset, arrays: Mapping[str, xr.DataArray]
) -> dict[str, tuple[int, ...]]:
    """Return the common chunks of the input arrays along observation dims.

    Where the arrays are not chunked, the chunks of the other variables count.
    """
    # A prediction omits the outcome, which may be the only chunked variable of a Dataset.
    others = [v.chunksizes for v in ds.variables.values()]
    common: dict[str, tuple[int, ...]] = {}
    for chunked in ([a.chunksizes for a in arrays.values()], others):
        for dim in (d for d in binding.block_dims if d not in (*common, *binding.core_dims)):
            if chunkings := [c[dim] for c in chunked if dim in c]:
                common[dim] = common_chunks(chunkings)
    return common


def common_chunks(lengths: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the coarsest chunks of one dim into which every given chunking can be split."""
    edges = {0}.union(*(accumulate(chunks) for chunks in lengths))
    return tuple(stop - start for start, stop in pairwise(sorted(edges)))


def _merge_labels(ds: xr.Dataset, arrays: Mapping[str, xr.DataArray]) -> dict[str, pd.Index]:
    labels = {str(d): i for a in arrays.values() for d, i in a.indexes.items()}
    return labels | {str(d): i for d, i in ds.indexes.items()}


def _drop_data_vars(ds: xr.Dataset) -> xr.Dataset:
    return ds.drop_vars(list(ds.data_vars))


def label_arrays(
    values: Mapping[str, np.ndarray],
    sites: Mapping[str, Site],
    binding: Binding,
    inputs: AlignedInputs,
    chain: Any = None,
    draw: Any = None,
) -> xr.Dataset:
    """Label arrays ``(chain, draw, *per, *site axes)`` as the variables of a Dataset."""
    n_leading = 2 + len(binding.per)
    arrays: dict[str, xr.DataArray] = {}
    for name, value in values.items():
        site = sites[name]
        site_dims = site.dims[: value.ndim - n_leading]
        shape = shape_in_dataset(site_dims, binding, inputs.sizes, value.shape[n_leading:])
        dims = site.dataset_dims[: len(binding.per) + len(shape)]
        arrays[site.variable] = xr.DataArray(
            value.reshape(value.shape[:n_leading] + shape), dims=("chain", "draw", *dims)
        )
    lengths = next(iter(values.values())).shape[:2] if values else (0, 0)
    ds = xr.Dataset(
        arrays,
        coords={
            "chain": np.arange(lengths[0]) if chain is None else chain,
            "draw": np.arange(lengths[1]) if draw is None else draw,
        },
    )
    return with_coords(ds, binding, inputs)


def with_coords(ds: xr.Dataset, binding: Binding, inputs: AlignedInputs) -> xr.Dataset:
    """Add to a result the coordinates of the inputs that match it, and other labels."""
    # A dim of this name can have another length in the posterior (that of a plate); it is
    # left without labels.
    misfits = [
        name
        for name, c in inputs.coords.coords.items()
        if name in ds.coords or any(ds.sizes.get(str(d)) != n for d, n in c.sizes.items())
    ]
    ds = ds.assign_coords(inputs.coords.drop_vars(misfits).coords)
    for d, index in extra_labels(binding).items():
        if d in ds.dims and d not in ds.coords and ds.sizes[d] == len(index):
            ds = ds.assign_coords({d: _as_coordinate(index)})
    return ds


def _as_coordinate(index: pd.Index) -> Any:
    """Return labels as xarray has them: strings as a string array, where pandas has objects."""
    values = index.to_numpy()
    is_text = values.dtype.kind == "O" and all(isinstance(v, str) for v in values)
    return values.astype(str) if is_text and len(values) else index


def extra_labels(binding: Binding) -> dict[str, pd.Index]:
    """Return the labels of dims that are not observation dims, ``feature`` included."""
    stacked = [a for a in binding.arguments if a.stacked]
    labels = dict(binding.labels)
    if len(stacked) == 1:
        labels[FEATURE] = pd.Index([s.name for s in stacked[0].sources], name=FEATURE)
    return labels


def select_labels(
    posterior: xr.Dataset, site: Site, binding: Binding, inputs: AlignedInputs
) -> xr.DataArray:
    """Select draws ``(chain, draw, *dims)`` of a latent site, at the labels of the inputs.

    Labels are selected along observation dims and ``per`` only.

    Raises
    ------
    DimensionError, LabelError
        A label is not in the fit, or the entries differ in number and have no labels.
    """
    dims = ("chain", "draw", *site.dataset_dims)
    array = posterior[site.variable].transpose(*dims)
    for dim in (d for d in binding.block_dims if d in dims):
        labels = inputs.labels.get(dim)
        what = f"latent site {site.name!r}"
        positions = match_labels(what, array, dim, labels, inputs.sizes[dim])
        if positions is None or labels is None:
            continue
        if (positions < 0).any():
            raise _no_draws_error(site, dim, labels[positions < 0], binding)
        array = array.isel({dim: positions})
    return array


def _no_draws_error(site: Site, dim: str, new_labels: pd.Index, binding: Binding) -> LabelError:
    per_note = f" Each label of per={binding.per!r} has globals of its own, and a new one none."
    sample_remedy = "; or let predict draw them from their prior: new_labels='sample'"
    return LabelError(
        f"latent site {site.name!r} has no draws for {len(new_labels)} labels of {dim!r}, "
        f"{list(new_labels[:3])!r} among them: the fit never saw them."
        f"{per_note if dim in binding.per else ''} Select those of the fit, or fit with them"
        f"{'' if dim in binding.per else sample_remedy}"
    )
