"""Condition a prediction on outcomes that are known in some cells: a history, then a forecast."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    Binding,
    check_float_labels,
    check_units,
    match_labels,
    reorder_like,
)
from xr_aimz.errors import (
    DimensionError,
    DtypeError,
    LabelError,
    MissingVariableError,
    ModelError,
    OptionError,
    list_names,
)
from xr_aimz.kernel import condition_key, known_key
from xr_aimz.prediction.dependence import DistributionInfo, check_not_informative, scan_dim
from xr_aimz.tracing import Site

Condition = str | Sequence[str] | Mapping[str, Any]


def resolve_condition(
    ds: xr.Dataset, sites: Mapping[str, Site], binding: Binding, condition: Condition
) -> dict[str, xr.DataArray]:
    """Resolve the names of ``condition``: return the array of values of each conditioned site.

    Raises
    ------
    MissingVariableError, ModelError, OptionError
    """
    arrays: dict[str, xr.DataArray] = {}
    for name in _parse_names(condition):
        site = _find_site(sites, name)
        if not isinstance(condition, Mapping) and site.obs_argument is None:
            raise OptionError(
                f"condition={name!r}: the fit knows of no variable that the site observes as it "
                f"is; say which values the site takes: condition={{{name!r}: ...}}"
            )
        if site.name in arrays:
            raise OptionError(f"condition= names the site {site.name!r} twice, once as {name!r}")
        variable = site.variable
        value = condition[name] if isinstance(condition, Mapping) else variable
        arrays[site.name] = _as_array(ds, name, value)
    return arrays


def _parse_names(condition: Condition) -> list[str]:
    names = [condition] if isinstance(condition, str) else condition
    if not isinstance(names, Sequence | Mapping) or not all(isinstance(n, str) for n in names):
        raise OptionError(
            f"condition={condition!r}: give the name of an outcome, a list of names, or a mapping "
            "of names to DataArrays, numbers or names of variables"
        )
    return list(names)


def _find_site(sites: Mapping[str, Site], name: str) -> Site:
    by_name = {s.variable: s for s in sites.values() if s.kind != "param"}
    site = {**by_name, **{s.name: s for s in by_name.values()}}.get(name)
    outcomes = sorted(n for n, s in by_name.items() if s.kind == "observed")
    if site is None:
        raise MissingVariableError(
            f"condition={name!r}: the model has no such site; its outcomes are "
            f"{list_names(outcomes, name)}"
        )
    if site.kind == "latent":
        raise ModelError(
            f"condition={name!r}: a latent site has its draws from the posterior, and giving it "
            f"a value would leave the other latents as they were; outcomes are {outcomes!r}"
        )
    if site.kind == "deterministic":
        raise ModelError(
            f"condition={name!r}: a deterministic site follows from the others and cannot be "
            f"given; outcomes are {outcomes!r}"
        )
    return site


def _as_array(ds: xr.Dataset, name: str, value: Any) -> xr.DataArray:
    if isinstance(value, str):
        if value not in ds.variables:
            raise MissingVariableError(
                f"condition={name!r}: the Dataset has no variable {value!r}; it has "
                f"{list_names(sorted(map(str, ds.variables)), value)}. Give a DataArray, "
                f"condition={{{name!r}: ...}}"
            )
        value = ds[value]
    elif not isinstance(value, xr.DataArray):
        if np.ndim(value):
            raise OptionError(
                f"condition={name!r}: {type(value).__name__} has no labels; give a DataArray, a "
                "number, or the name of a variable of the Dataset"
            )
        value = xr.DataArray(np.asarray(value))
    if value.dtype.kind not in "fiub":
        raise DtypeError(
            f"condition={name!r} has dtype {value.dtype}; an outcome is a float, an int or a bool"
        )
    return value


def align_condition(
    conditioned: Mapping[str, xr.DataArray],
    origin: Mapping[str, DistributionInfo],
    sampled_sites: Collection[str],
    sites: Mapping[str, Site],
    binding: Binding,
    inputs: AlignedInputs,
) -> dict[str, xr.DataArray]:
    """Align the values of conditioned sites to the Dataset's labels, and make their masks.

    Parameters
    ----------
    conditioned : mapping of site to DataArray
    origin : mapping of site to DistributionInfo
        Parents of each conditioned site.
    sampled_sites : collection of str
        Sites that are sampled in every cell, unless they are conditioned.
    sites, binding, inputs
        The inputs have the masks of latents that are sampled in some cells.

    Raises
    ------
    DimensionError, DtypeError, LabelError, UnitsError
    ModelError
        A value is informative about a sampled site.
    """
    arrays: dict[str, xr.DataArray] = {}
    value_masks: dict[str, xr.DataArray | None] = {}
    free_masks: dict[str, xr.DataArray | None] = {
        n: None for n in sampled_sites if n not in conditioned
    }
    free_masks |= {n: ~inputs.arrays[known_key(n)] for n in sites if known_key(n) in inputs.arrays}
    for name, array in conditioned.items():
        values = _check_integers(name, array) if origin[name].discrete else array
        values, label_mask = _align_values(name, values, sites[name], binding, inputs)
        arrays[condition_key(name)] = values
        mask = _make_value_mask(values, label_mask)
        if mask is None:
            value_masks[name] = None
            continue
        arrays[known_key(name)] = _check_mask(name, mask, sites[name], origin[name], binding)
        # A lazy mask is not computed: any labelled cell may have a value, and any may be free.
        is_lazy = mask.chunks is not None
        value_masks[name], free_masks[name] = (label_mask, None) if is_lazy else (mask, ~mask)
    check_not_informative(value_masks, free_masks, origin, sites, binding)
    return arrays


def _align_values(
    name: str, array: xr.DataArray, site: Site, binding: Binding, inputs: AlignedInputs
) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Align the values of a conditioned site; return them and a mask of the labels they had."""
    what = f"condition={name!r}"
    if site.obs_argument is not None:
        check_units(what, array, binding.argument(site.obs_argument).sources[0].units)
    dims = site.dataset_dims
    scalar_dims = [
        d for d in binding.block_dims if d in dims and d not in array.dims and d in array.coords
    ]
    array = array.expand_dims(scalar_dims)
    unknown = [d for d in array.dims if d not in dims]
    if unknown:
        raise DimensionError(
            f"{what} has dims {array.dims!r}, and the site {dims!r}: {unknown!r} is not of it"
        )
    array = array.transpose(*[d for d in dims if d in array.dims])
    label_mask: xr.DataArray | None = None
    for dim in map(str, array.dims):
        array, dim_mask = _align_dim(what, array, dim, site, binding, inputs)
        if dim_mask is not None:
            label_mask = dim_mask if label_mask is None else label_mask & dim_mask
    return array.drop_vars(list(array.coords)), label_mask


def _make_value_mask(values: xr.DataArray, label_mask: xr.DataArray | None) -> xr.DataArray | None:
    """Return the mask of the cells that have a value; None if all have one."""
    mask = label_mask
    if values.dtype.kind == "f" and (values.chunks is not None or values.isnull().any()):
        mask = values.notnull() if label_mask is None else values.notnull() & label_mask
    return None if mask is None else mask.transpose(*[d for d in values.dims if d in mask.dims])


def _check_mask(
    name: str, mask: xr.DataArray, site: Site, origin: DistributionInfo, binding: Binding
) -> xr.DataArray:
    """Check that a mask has all or no entries of each event, and each recursion from its start.

    A lazy mask is checked in its task, for a check now would compute it.
    """
    event_dims = [d for d in site.dims[len(site.dims) - origin.joint :] if d in mask.dims]
    if event_dims:
        mask = _apply_check(
            _check_event, mask, event_dims, f"{name!r} gives a part of {event_dims!r}, which its"
        )
    if name not in origin.names:
        return mask
    step_dim = scan_dim(site, binding)
    if step_dim is None:
        raise ModelError(
            f"condition={name!r} is given in some cells of a scan whose steps are no dimension of "
            "the Dataset; give it whole"
        )
    if step_dim in mask.dims:
        mask = _apply_check(
            _check_start, mask, [step_dim], f"{name!r} has a gap along {step_dim!r}, where"
        )
    return mask


def _apply_check(check: Any, mask: xr.DataArray, dims: list[Any], what: str) -> xr.DataArray:
    """Pass each part of a mask along some dims through a check; return the same mask."""
    checked = xr.apply_ufunc(
        check,
        mask,
        kwargs={"what": f"condition={what}", "axes": len(dims)},
        input_core_dims=[dims],
        output_core_dims=[dims],
        dask="parallelized",
        dask_gufunc_kwargs={"allow_rechunk": True},
        output_dtypes=[bool],
    )
    return checked.transpose(*mask.dims)


def _check_event(mask: np.ndarray, what: str, axes: int) -> np.ndarray:
    event_axes = tuple(range(-axes, 0))
    if (mask.any(event_axes) != mask.all(event_axes)).any():
        raise ModelError(
            f"{what} distribution draws as one: the rest would be drawn without it. Give all "
            "entries or none"
        )
    return mask


def _check_start(mask: np.ndarray, what: str, axes: int) -> np.ndarray:
    if (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ModelError(
            f"{what} the model makes each step from those before: the values after the gap would "
            "tell of what is drawn in it. Give each history without a gap, from the first step on"
        )
    return mask


def _align_dim(
    what: str, array: xr.DataArray, dim: str, site: Site, binding: Binding, inputs: AlignedInputs
) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Align an array to the Dataset's labels of one dim; return it and a mask of labels it had."""
    if dim not in binding.block_dims:
        index = binding.labels.get(dim)
        if index is not None:
            array = reorder_like(
                array, dim, index, what, "give all that the fit had, and no others"
            )
        size = dict(zip(site.dims, site.shape, strict=True)).get(dim, array.sizes[dim])
        match_labels(what, array.drop_vars(dim, errors="ignore"), dim, None, size)
        return array, None
    labels = inputs.labels.get(dim)
    positions = match_labels(what, array, dim, labels, inputs.sizes[dim])
    if labels is None:
        return array, None
    if positions is None:
        # Selected all the same: stores that were cut short know a lazy array by its graph.
        positions = np.arange(len(labels))
    value_labels = array.indexes[dim]
    if (positions < 0).all():
        raise LabelError(
            f"{what} has labels {list(value_labels[:3])!r} ... on {dim!r}, and none of them is in "
            f"the Dataset, which has {list(labels[:3])!r} ...; nothing would be given. For a "
            f"forecast the Dataset has the past as well: xr.concat([past, future], {dim!r})"
        )
    absent = labels[positions < 0]
    check_float_labels(f"{what} lacks labels of {dim!r}", dim, absent, value_labels)
    array = array.isel({dim: np.maximum(positions, 0)})
    return array, None if (positions >= 0).all() else xr.DataArray(positions >= 0, dims=dim)


def _check_integers(name: str, array: xr.DataArray) -> xr.DataArray:
    """Check that values of a discrete site are integers; lazy ones are checked in their task."""
    if array.dtype.kind != "f":
        return array
    if array.chunks is None:
        _check_whole(array.values, name)
        return array
    return xr.apply_ufunc(
        _check_whole,
        array,
        kwargs={"name": name},
        dask="parallelized",
        output_dtypes=[array.dtype],
        keep_attrs=True,
    )


def _check_whole(array: np.ndarray, name: str) -> np.ndarray:
    fractions = array[np.isfinite(array) & (array != np.floor(array))]
    if fractions.size:
        raise DtypeError(
            f"condition={name!r} has the value {fractions.flat[0]!r}, and the site's distribution "
            "is of whole numbers"
        )
    return array
