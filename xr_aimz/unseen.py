"""Local latents at labels that the fit never saw: which cells are to be drawn.

A latent with a dimension of the Dataset has draws at the labels of the fit. At any other
label its prior, given the globals of each draw, is all that is known, and label by label is
how it is drawn. That holds where labels are independent given the globals. Where the model
couples them it does not, but for one case: the steps of a scan after those of the fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.axes import TABLE, dims_in_dataset
from xr_aimz.binding import Binding
from xr_aimz.errors import LabelError, ModelError
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import KNOWN
from xr_aimz.labelling import on_labels, result_name
from xr_aimz.model import Site

__all__ = ["check_draws", "check_rounding", "latent_draws", "seen"]

# Of a label's size: what arithmetic in 64 bits leaves between two ways to the same label.
_SLACK = 1e-12


def check_draws(posterior: xr.Dataset, sites: Mapping[str, Site], binding: Binding) -> None:
    """Refuse a latent of which there are no draws at all."""
    latent = {n: result_name(binding, s) for n, s in sites.items() if s.kind == "latent"}
    absent = [name for name, own in latent.items() if own not in posterior]
    if absent:
        raise ModelError(
            f"latent sites {absent!r} have no draws in the posterior, which has "
            f"{sorted(map(str, posterior.data_vars))!r}; a discrete site that the fit summed over "
            "has none: write the outcome as a mixture, MixtureSameFamily"
        )


def seen(
    posterior: xr.Dataset, sites: Mapping[str, Site], binding: Binding, inputs: Inputs
) -> dict[str, xr.DataArray]:
    """For each latent with labels that the fit never saw, a mask of those that it saw.

    Raises
    ------
    ModelError
        A latent that is coupled along the dimension: its new labels cannot be drawn alone.
    LabelError
        New labels that are old ones but for rounding, or a scan's that are not at its end.
    """
    found: dict[str, xr.DataArray] = {}
    for name in (n for n, s in sites.items() if s.kind == "latent"):
        site, mask = sites[name], None
        places = _places(posterior, site, binding, inputs)
        for dim, place in places.items():
            _check_alone(site, dim, place, binding, posterior.indexes[dim], inputs.labels[dim])
            here = xr.DataArray(place >= 0, dims=dim)
            mask = here if mask is None else mask & here
        if mask is not None:
            found[KNOWN + name] = mask.transpose(*[d for d in binding.dims if d in mask.dims])
    return found


def latent_draws(
    posterior: xr.Dataset, site: Site, binding: Binding, inputs: Inputs
) -> xr.DataArray:
    """A latent site's draws on the labels of the inputs, any value where there are none."""
    if KNOWN + site.name not in inputs.arrays:
        return on_labels(posterior, site, binding, inputs)
    places = _places(posterior, site, binding, inputs)
    labels = {**inputs.labels, **{d: posterior.indexes[d] for d in places}}
    array = on_labels(posterior, site, binding, replace(inputs, labels=labels))
    # A value of the site's own where nothing is known: the model meets nothing odd.
    return array.isel({d: np.maximum(place, 0) for d, place in places.items()})


def _places(
    posterior: xr.Dataset, site: Site, binding: Binding, inputs: Inputs
) -> dict[str, np.ndarray]:
    """Where the labels of the inputs are in the posterior, -1 for new: of dims that have new."""
    array = posterior[result_name(binding, site)]
    found = {}
    for dim in dims_in_dataset(site, binding):
        here, there = inputs.labels.get(dim), array.indexes.get(dim)
        if dim in binding.dims and here is not None and there is not None:
            place = there.get_indexer(here)
            if (place < 0).any():
                found[dim] = place
    return found


def _check_alone(
    site: Site, dim: str, place: np.ndarray, binding: Binding, there: pd.Index, here: pd.Index
) -> None:
    """New labels that can be drawn without a thought of the others."""
    what = f"latent site {site.name!r} has no draws for {int((place < 0).sum())} labels of {dim!r}"
    check_rounding(what, dim, here[place < 0], there)
    batch = site.dims[: site.batch_ndim]
    if dim not in batch and TABLE not in batch:
        raise ModelError(
            f"{what}, which is an event dimension of its {site.distribution}: the new entries "
            "cannot be drawn without the old. Predict at labels that the fit saw, or write it "
            "as a scan, whose steps follow one another"
        )
    if site.scanned and dim == dims_in_dataset(site, binding)[len(binding.per)]:
        length = len(there)
        if not np.array_equal(place[:length], np.arange(length)) or (place[length:] >= 0).any():
            raise LabelError(
                f"{what}, along which it is scanned: steps can be drawn only after the fit's own, "
                f"which run from {there[0]} to {there[-1]}. Give those whole and in order, "
                "then the new ones"
            )
    elif dim in binding.core_dims:
        raise ModelError(
            f"{what}, a core_dim: the model couples its labels, so they cannot be drawn one by "
            "one. Predict at labels that the fit saw, or write the recursion as a scan"
        )


def check_rounding(what: str, dim: str, new: pd.Index, there: pd.Index) -> None:
    """Refuse a new label that is one of the others but for rounding."""
    if {new.dtype.kind, there.dtype.kind} - set("fiu") or not len(new) or not len(there):
        return
    wanted, ordered = new.to_numpy(np.float64), np.sort(there.to_numpy(np.float64))
    after = np.searchsorted(ordered, wanted)
    for place in (after - 1, after):
        near = ordered[np.clip(place, 0, len(ordered) - 1)]
        if (alike := _alike(wanted, near)).any():
            raise LabelError(
                f"{what}, {float(wanted[alike][0])!r} among them, which is "
                f"{float(near[alike][0])!r} but for rounding; give {dim!r} the same values in both"
            )


def _alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether two numbers differ by rounding alone: in the last places, or to 32 bits."""
    near = np.abs(left - right) <= _SLACK * np.abs(left)
    short = [x.astype(np.float32) for x in (left, right)]
    rounded = (short[0] == short[1]) & ((short[0] == left) != (short[1] == right))
    # Whole numbers, such as seconds since 1970, are meant as they are.
    whole = (left == np.floor(left)) & (right == np.floor(right))
    return (left != right) & (near | (rounded & ~whole))
