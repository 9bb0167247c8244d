"""Arrays get the names, dims and labels that they have in a Dataset.

Sites get their dimensions from :mod:`xr_aimz.axes` and their labels from the Dataset,
so a local latent is indexed as the data are, and a prediction can find the part of it
that belongs to a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.axes import dims_in_dataset, shape_in_dataset
from xr_aimz.binding import FEATURE, Binding
from xr_aimz.errors import DimensionError, LabelError
from xr_aimz.inputs import Inputs
from xr_aimz.model import Site

__all__ = ["extra_labels", "label", "on_labels", "result_name", "with_coords"]


def result_name(binding: Binding, site: Site) -> str:
    """What a site is called in a Dataset: its outcome's variable, or its own name."""
    if site.obs_argument is not None:
        return binding.argument(site.obs_argument).sources[0].name
    # A slash separates groups of a DataTree and of a Zarr store.
    return site.name.replace("/", ".")


def label(
    values: Mapping[str, np.ndarray],
    sites: Mapping[str, Site],
    binding: Binding,
    inputs: Inputs,
    chain: Any = None,
    draw: Any = None,
) -> xr.Dataset:
    """Arrays ``(chain, draw, *per, *site axes)`` as a labelled Dataset."""
    lead = 2 + len(binding.per)
    found: dict[str, xr.DataArray] = {}
    for name, value in values.items():
        site = sites[name]
        kept = site.dims[: value.ndim - lead]
        shape = shape_in_dataset(kept, binding, inputs.sizes, value.shape[lead:])
        dims = dims_in_dataset(site, binding)[: len(binding.per) + len(shape)]
        found[result_name(binding, site)] = xr.DataArray(
            value.reshape(value.shape[:lead] + shape), dims=("chain", "draw", *dims)
        )
    first = next(iter(values.values())).shape[:2] if values else (0, 0)
    ds = xr.Dataset(
        found,
        coords={
            "chain": np.arange(first[0]) if chain is None else chain,
            "draw": np.arange(first[1]) if draw is None else draw,
        },
    )
    return with_coords(ds, binding, inputs)


def with_coords(ds: xr.Dataset, binding: Binding, inputs: Inputs) -> xr.Dataset:
    """The coordinates of the inputs that fit a result, and labels of its other dims."""
    # A name can mean another length in the posterior (a plate of its own); such a one is
    # not labelled.
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
    """Labels as xarray has them: strings as an array of strings, where pandas has objects."""
    values = index.to_numpy()
    is_text = values.dtype.kind == "O" and all(isinstance(v, str) for v in values)
    return values.astype(str) if is_text and len(values) else index


def extra_labels(binding: Binding) -> dict[str, pd.Index]:
    """Labels of dimensions that are not in the Dataset: those of stacked variables."""
    stacked = [a for a in binding.arguments if a.stacked]
    labels = dict(binding.labels)
    if len(stacked) == 1:
        labels[FEATURE] = pd.Index([s.name for s in stacked[0].sources], name=FEATURE)
    return labels


def on_labels(posterior: xr.Dataset, site: Site, binding: Binding, inputs: Inputs) -> xr.DataArray:
    """A latent site's draws, those of a local one on the labels that the inputs have.

    Raises
    ------
    DimensionError, LabelError
        The fit never saw a label, or there are none to tell entries apart.
    """
    dims = ("chain", "draw", *dims_in_dataset(site, binding))
    array = posterior[result_name(binding, site)].transpose(*dims)
    for dim in (d for d in binding.cut_dims if d in dims):
        here, there = inputs.labels.get(dim), array.indexes.get(dim)
        if here is None or there is None:
            _check_unlabelled(site, dim, array, inputs)
        elif not here.equals(there):
            absent = here.difference(there)
            if len(absent):
                raise _unseen(site, dim, absent, binding)
            array = array.sel({dim: here})
    return array


def _unseen(site: Site, dim: str, absent: pd.Index, binding: Binding) -> LabelError:
    own = f" Each label of per={binding.per!r} has globals of its own, and a new one none."
    drawn = "; or let predict draw them from their prior: new_labels='sample'"
    return LabelError(
        f"latent site {site.name!r} has no draws for {len(absent)} labels of {dim!r}, "
        f"{list(absent[:3])!r} among them: the fit never saw them."
        f"{own if dim in binding.per else ''} Select those that it saw, or fit with them"
        f"{'' if dim in binding.per else drawn}"
    )


def _check_unlabelled(site: Site, dim: str, array: xr.DataArray, inputs: Inputs) -> None:
    has = {"fit": dim in array.indexes, "Dataset": dim in inputs.labels}
    if any(has.values()) or inputs.sizes[dim] != array.sizes[dim]:
        labelled = ", ".join(f"the {k} {'has' if v else 'has no'} labels" for k, v in has.items())
        raise DimensionError(
            f"latent site {site.name!r} has {array.sizes[dim]} entries along {dim!r}, and the "
            f"Dataset {inputs.sizes[dim]}; {labelled} there. Give both the same coordinate"
        )
