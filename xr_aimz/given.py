"""Outcomes that are given in some cells of a prediction: a history, then a forecast.

Given values come with labels of their own. Here they are put on the Dataset's, and become
two arrays that travel with the inputs: the values, and a mask of the cells that have one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.axes import dims_in_dataset
from xr_aimz.binding import Binding
from xr_aimz.errors import (
    DimensionError,
    DtypeError,
    LabelError,
    MissingVariableError,
    ModelError,
    OptionError,
    UnitsError,
)
from xr_aimz.inputs import Inputs, reordered
from xr_aimz.kernel import CONDITION, KNOWN
from xr_aimz.labelling import result_name
from xr_aimz.model import Site
from xr_aimz.spelling import list_names
from xr_aimz.unseen import check_rounding
from xr_aimz.upstream import Origin, check_told, step_dim

__all__ = ["Condition", "conditioned", "resolved"]

Condition = str | Sequence[str] | Mapping[str, Any]


def resolved(
    ds: xr.Dataset, sites: Mapping[str, Site], binding: Binding, condition: Condition
) -> dict[str, xr.DataArray]:
    """The array that each conditioned site is given, by the rules of names.

    Raises
    ------
    MissingVariableError, ModelError, OptionError
    """
    found: dict[str, xr.DataArray] = {}
    for name in _names(condition):
        site = _target(sites, binding, name)
        if not isinstance(condition, Mapping) and site.obs_argument is None:
            raise OptionError(
                f"condition={name!r}: the fit knows of no variable that the site observes as it "
                f"is; say which values the site takes: condition={{{name!r}: ...}}"
            )
        if site.name in found:
            raise OptionError(f"condition= names the site {site.name!r} twice, once as {name!r}")
        own = result_name(binding, site)
        value = condition[name] if isinstance(condition, Mapping) else own
        found[site.name] = _as_array(ds, name, value)
    return found


def _names(condition: Condition) -> list[str]:
    names = [condition] if isinstance(condition, str) else condition
    if not isinstance(names, Sequence | Mapping) or not all(isinstance(n, str) for n in names):
        raise OptionError(
            f"condition={condition!r}: give the name of an outcome, a list of names, or a mapping "
            "of names to DataArrays, numbers or names of variables"
        )
    return list(names)


def _target(sites: Mapping[str, Site], binding: Binding, name: str) -> Site:
    named = {result_name(binding, s): s for s in sites.values() if s.kind != "param"}
    site = {**named, **{s.name: s for s in named.values()}}.get(name)
    outcomes = sorted(n for n, s in named.items() if s.kind == "observed")
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


def conditioned(
    given: Mapping[str, xr.DataArray],
    origin: Mapping[str, Origin],
    drawn: Collection[str],
    sites: Mapping[str, Site],
    binding: Binding,
    inputs: Inputs,
) -> dict[str, xr.DataArray]:
    """The values and masks of conditioned sites, on the Dataset's labels.

    Parameters
    ----------
    given : mapping of site to DataArray
    origin : mapping of site to Origin
        Of each of them.
    drawn : collection of str
        Sites that are drawn in every cell, were none given.
    sites, binding, inputs
        With the masks of latents that are drawn in some cells.

    Raises
    ------
    DimensionError, DtypeError, LabelError, UnitsError
    ModelError
        A value would tell of what is drawn.
    """
    found: dict[str, xr.DataArray] = {}
    told: dict[str, xr.DataArray | None] = {}
    free: dict[str, xr.DataArray | None] = {n: None for n in drawn if n not in given}
    free |= {n: ~inputs.arrays[KNOWN + n] for n in sites if KNOWN + n in inputs.arrays}
    for name, array in given.items():
        values = _whole_numbers(name, array) if origin[name].discrete else array
        values, labelled = _on_labels(name, values, sites[name], binding, inputs)
        found[CONDITION + name] = values
        known = _known(values, labelled)
        if known is None:
            told[name] = None
            continue
        found[KNOWN + name] = _checked(name, known, sites[name], origin[name], binding)
        # A lazy mask is not looked at: any labelled cell may be given, and any may be free.
        lazy = known.chunks is not None
        told[name], free[name] = (labelled, None) if lazy else (known, ~known)
    check_told(told, free, origin, sites, binding)
    return found


def _on_labels(
    name: str, array: xr.DataArray, site: Site, binding: Binding, inputs: Inputs
) -> tuple[xr.DataArray, xr.DataArray | None]:
    """A conditioned site's values on the Dataset's labels, and which labels it had."""
    what = f"condition={name!r}"
    _check_units(what, array, site, binding)
    dims = dims_in_dataset(site, binding)
    held = [d for d in binding.cut_dims if d in dims and d not in array.dims and d in array.coords]
    array = array.expand_dims(held)
    strange = [d for d in array.dims if d not in dims]
    if strange:
        raise DimensionError(
            f"{what} has dims {array.dims!r}, and the site {dims!r}: {strange!r} is not of it"
        )
    array = array.transpose(*[d for d in dims if d in array.dims])
    labelled: xr.DataArray | None = None
    for dim in map(str, array.dims):
        array, here = _aligned(what, array, dim, site, binding, inputs)
        if here is not None:
            labelled = here if labelled is None else labelled & here
    return array.drop_vars(list(array.coords)), labelled


def _known(values: xr.DataArray, labelled: xr.DataArray | None) -> xr.DataArray | None:
    """The mask of the cells that have a value; None if all have one."""
    known = labelled
    if values.dtype.kind == "f" and (values.chunks is not None or values.isnull().any()):
        known = values.notnull() if labelled is None else values.notnull() & labelled
    return None if known is None else known.transpose(*[d for d in values.dims if d in known.dims])


def _checked(
    name: str, known: xr.DataArray, site: Site, origin: Origin, binding: Binding
) -> xr.DataArray:
    """The mask, which gives what is drawn as one whole, and a recursion from its start.

    A lazy mask is looked at in its task: to do so now would be to compute it.
    """
    held = [d for d in site.dims[len(site.dims) - origin.joint :] if d in known.dims]
    if held:
        known = _each(_check_event, known, held, f"{name!r} gives a part of {held!r}, which its")
    if name not in origin.names:
        return known
    step = step_dim(site, binding)
    if step is None:
        raise ModelError(
            f"condition={name!r} is given in some cells of a scan whose steps are no dimension of "
            "the Dataset; give it whole"
        )
    if step in known.dims:
        known = _each(_check_start, known, [step], f"{name!r} has a gap along {step!r}, where")
    return known


def _each(check: Any, known: xr.DataArray, dims: list[Any], what: str) -> xr.DataArray:
    """The mask itself, each part of it along some dims passed through a check."""
    checked = xr.apply_ufunc(
        check,
        known,
        kwargs={"what": f"condition={what}", "axes": len(dims)},
        input_core_dims=[dims],
        output_core_dims=[dims],
        dask="parallelized",
        dask_gufunc_kwargs={"allow_rechunk": True},
        output_dtypes=[bool],
    )
    return checked.transpose(*known.dims)


def _check_event(known: np.ndarray, what: str, axes: int) -> np.ndarray:
    last = tuple(range(-axes, 0))
    if (known.any(last) != known.all(last)).any():
        raise ModelError(
            f"{what} distribution draws as one: the rest would be drawn without it. Give all "
            "entries or none"
        )
    return known


def _check_start(known: np.ndarray, what: str, axes: int) -> np.ndarray:
    if (known[..., 1:] & ~known[..., :-1]).any():
        raise ModelError(
            f"{what} the model makes each step from those before: the values after the gap would "
            "tell of what is drawn in it. Give each history without a gap, from the first step on"
        )
    return known


def _check_units(what: str, array: xr.DataArray, site: Site, binding: Binding) -> None:
    if site.obs_argument is None:
        return
    wanted, units = binding.argument(site.obs_argument).sources[0].units, array.attrs.get("units")
    if units is not None and wanted is not None and str(units) != wanted:
        raise UnitsError(
            f"{what} is in {str(units)!r}; the fit was in {wanted!r}. Convert it, or set its "
            "attrs['units'] if only the name differs"
        )


def _aligned(
    what: str, array: xr.DataArray, dim: str, site: Site, binding: Binding, inputs: Inputs
) -> tuple[xr.DataArray, xr.DataArray | None]:
    """The array on the Dataset's labels of one dimension, and which of those it had."""
    here, there = inputs.labels.get(dim), array.indexes.get(dim)
    if dim not in binding.cut_dims:
        index = binding.labels.get(dim)
        if index is not None:
            array = reordered(array, dim, index, what, "give all that the fit had, and no others")
        size = dict(zip(site.dims, site.shape, strict=True)).get(dim, array.sizes[dim])
        here = there = None
    else:
        size = inputs.sizes[dim]
    if here is None and there is None:
        if array.sizes[dim] != size:
            raise DimensionError(
                f"{what} has {array.sizes[dim]} entries along {dim!r}, where {size} are wanted, "
                "and no labels tell which; give both the same coordinate"
            )
        return array, None
    if here is None or there is None:
        raise LabelError(
            f"{what}: {'it' if here is None else 'the Dataset'} has labels on {dim!r} and "
            f"{'the Dataset' if here is None else 'it'} has none; give both the same coordinate"
        )
    return _placed(what, array, dim, here, there)


def _placed(
    what: str, array: xr.DataArray, dim: str, here: pd.Index, there: pd.Index
) -> tuple[xr.DataArray, xr.DataArray | None]:
    if not there.is_unique:
        raise LabelError(f"{what} has duplicate labels of {dim!r}; give each value one label")
    place = there.get_indexer(here)
    if (place < 0).all():
        raise LabelError(
            f"{what} has labels {list(there[:3])!r} ... on {dim!r}, and none of them is in the "
            f"Dataset, which has {list(here[:3])!r} ...; nothing would be given. For a forecast "
            f"the Dataset has the past as well: xr.concat([past, future], {dim!r})"
        )
    check_rounding(f"{what} lacks labels of {dim!r}", dim, here[place < 0], there)
    array = array.isel({dim: np.maximum(place, 0)})
    return array, None if (place >= 0).all() else xr.DataArray(place >= 0, dims=dim)


def _whole_numbers(name: str, array: xr.DataArray) -> xr.DataArray:
    """The values given to a discrete site; a lazy array is looked at in its task."""
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
    parts = array[np.isfinite(array) & (array != np.floor(array))]
    if parts.size:
        raise DtypeError(
            f"condition={name!r} has the value {parts.flat[0]!r}, and the site's distribution is "
            "of whole numbers"
        )
    return array
