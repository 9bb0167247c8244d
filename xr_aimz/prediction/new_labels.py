"""Find the cells of local latents at new labels, which the fit did not have: they are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import (
    TABLE,
    AlignedInputs,
    Binding,
    check_float_labels,
    select_labels,
)
from xr_aimz.errors import LabelError, ModelError
from xr_aimz.kernel import known_key
from xr_aimz.tracing import Site


def check_posterior(posterior: xr.Dataset, sites: Mapping[str, Site]) -> None:
    """Refuse a posterior without draws of some latent."""
    latent = {n: s.variable for n, s in sites.items() if s.kind == "latent"}
    absent = [name for name, variable in latent.items() if variable not in posterior]
    if absent:
        raise ModelError(
            f"latent sites {absent!r} have no draws in the posterior, which has "
            f"{sorted(map(str, posterior.data_vars))!r}; a discrete site that the fit summed over "
            "has none: write the outcome as a mixture, MixtureSameFamily"
        )


def known_label_masks(
    posterior: xr.Dataset, sites: Mapping[str, Site], binding: Binding, inputs: AlignedInputs
) -> dict[str, xr.DataArray]:
    """Make a mask of the labels that the fit had, for each latent with new labels.

    Raises
    ------
    ModelError
        A latent that is coupled along the dimension: its new labels cannot be sampled alone.
    LabelError
        New labels that differ from the fit's by rounding, or in a scan are not at its end.
    """
    masks: dict[str, xr.DataArray] = {}
    for name in (n for n, s in sites.items() if s.kind == "latent"):
        site, mask = sites[name], None
        positions = _find_positions(posterior, site, binding, inputs)
        for dim, indices in positions.items():
            _check_can_sample(
                site, dim, indices, binding, posterior.indexes[dim], inputs.labels[dim]
            )
            dim_mask = xr.DataArray(indices >= 0, dims=dim)
            mask = dim_mask if mask is None else mask & dim_mask
        if mask is not None:
            masks[known_key(name)] = mask.transpose(*[d for d in binding.dims if d in mask.dims])
    return masks


def posterior_draws(
    posterior: xr.Dataset, site: Site, binding: Binding, inputs: AlignedInputs
) -> xr.DataArray:
    """Select a latent's draws at the labels of the inputs; values at new labels are arbitrary."""
    if known_key(site.name) not in inputs.arrays:
        return select_labels(posterior, site, binding, inputs)
    positions = _find_positions(posterior, site, binding, inputs)
    labels = {**inputs.labels, **{d: posterior.indexes[d] for d in positions}}
    array = select_labels(posterior, site, binding, replace(inputs, labels=labels))
    # At new labels a value of the site itself, so that the model meets no unusual value.
    return array.isel({d: np.maximum(indices, 0) for d, indices in positions.items()})


def _find_positions(
    posterior: xr.Dataset, site: Site, binding: Binding, inputs: AlignedInputs
) -> dict[str, np.ndarray]:
    """Find positions of the inputs' labels in the posterior, -1 for new, of dims that have new."""
    array = posterior[site.variable]
    positions = {}
    for dim in site.dataset_dims:
        labels, fit_labels = inputs.labels.get(dim), array.indexes.get(dim)
        if dim in binding.dims and labels is not None and fit_labels is not None:
            indices = fit_labels.get_indexer(labels)
            if (indices < 0).any():
                positions[dim] = indices
    return positions


def _check_can_sample(
    site: Site,
    dim: str,
    indices: np.ndarray,
    binding: Binding,
    fit_labels: pd.Index,
    labels: pd.Index,
) -> None:
    """Check that new labels can be sampled independently of the others."""
    what = (
        f"latent site {site.name!r} has no draws for {int((indices < 0).sum())} labels of {dim!r}"
    )
    check_float_labels(what, dim, labels[indices < 0], fit_labels)
    batch = site.dims[: site.batch_ndim]
    if dim not in batch and TABLE not in batch:
        raise ModelError(
            f"{what}, which is an event dimension of its {site.distribution}: the new entries "
            "cannot be drawn without the old. Predict at labels that the fit saw, or write it "
            "as a scan, whose steps follow one another"
        )
    if site.scanned and dim == site.dataset_dims[len(binding.per)]:
        length = len(fit_labels)
        if (
            not np.array_equal(indices[:length], np.arange(length))
            or (indices[length:] >= 0).any()
        ):
            raise LabelError(
                f"{what}, along which it is scanned: steps can be drawn only after the fit's own, "
                f"which run from {fit_labels[0]} to {fit_labels[-1]}. Give those whole and in "
                "order, then the new ones"
            )
    elif dim in binding.core_dims:
        raise ModelError(
            f"{what}, a core_dim: the model couples its labels, so they cannot be drawn one by "
            "one. Predict at labels that the fit saw, or write the recursion as a scan"
        )
