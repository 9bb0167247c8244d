"""Checks of what depends on the order of labels, on a Dataset that is not that of the fit.

Draws are selected by label wherever they have any. A recursion starts at the first label, and a
latent whose length the model makes from that of the data has places and no labels: both are
right on the labels of the fit, and the recursion on labels that follow those too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import inf
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.axes import dims_in_dataset
from xr_aimz.errors import LabelError
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import CONDITION, KNOWN
from xr_aimz.labelling import result_name
from xr_aimz.model import Site
from xr_aimz.posterior import Fit, labels_at_fit
from xr_aimz.recursion import Dependence, ancestors

__all__ = ["check_places", "check_recursions"]

Labels = pd.Index | None


def check_places(fit: Fit, inputs: Inputs, latents: Collection[str]) -> None:
    """
    Refuse draws that are selected by place, on other labels than those of the fit.

    Parameters
    ----------
    fit : Fit
    inputs : Inputs
    latents : collection of str
        The latent sites that have draws.

    Raises
    ------
    LabelError
    """
    for name in latents:
        site = fit.sites[name]
        for dim in sorted(site.lengths):
            if _are_the_fits(fit, inputs, dim):
                continue
            dims = [d for d in dims_in_dataset(site, fit.binding) if d not in fit.binding.cut_dims]
            differs = _difference(inputs.labels.get(dim), labels_at_fit(fit, dim))
            raise LabelError(
                f"latent site {name!r} has dims {dims!r} of its own, whose length the model makes "
                f"from that of {dim!r}: its draws belong to the labels of {dim!r} at the fit, in "
                f"their order, and {differs}. Predict on the labels of the fit and select from "
                "the result, or give the site a value for each label: with "
                f"xr_aimz.plate({dim!r})"
            )


def check_recursions(
    fit: Fit,
    inputs: Inputs,
    returned: Collection[str],
    sampled: Collection[str],
    find: Callable[[str], Mapping[str, Dependence]],
) -> None:
    """
    Refuse a recursion that would restart, or take other steps than at the fit.

    Parameters
    ----------
    fit : Fit
    inputs : Inputs
        With the values of conditioned sites.
    returned, sampled : collection of str
        The sites that are returned; those that are drawn, or whose densities are taken.
    find : callable
        The dependences of sites along a dimension. Called where the labels are not the fit's.

    Raises
    ------
    LabelError
    """
    for dim in fit.binding.dims:
        if _are_the_fits(fit, inputs, dim):
            continue
        begins, ends = _begins(fit, inputs, dim), _ends(fit, inputs, dim)
        dependences = {} if begins and ends else find(dim)
        relevant = ancestors(returned, dependences)
        for name in (n for n in dependences if n in relevant):
            site, dependence = fit.sites[name], dependences[name]
            if name not in sampled and site.kind != "deterministic":
                continue
            restarts = dependence.past and not begins
            if restarts and not _starts_given(fit, inputs, dim, site, dependence):
                raise _restarted(fit, inputs, site, dim, dependence)
            if dependence.future and not ends:
                raise _restarted(fit, inputs, site, dim, dependence)


def _are_the_fits(fit: Fit, inputs: Inputs, dim: str) -> bool:
    """Whether a dimension has the labels of the fit, in order; or none, and as many places."""
    labels, fitted = inputs.labels.get(dim), labels_at_fit(fit, dim)
    if labels is not None and fitted is not None:
        return len(labels) == len(fitted) and _equal(labels, fitted)
    sizes = {**fit.constant_data.sizes, **fit.observed_data.sizes}
    size = inputs.sizes[dim]
    return labels is None and fitted is None and sizes.get(dim, size) == size


def _begins(fit: Fit, inputs: Inputs, dim: str) -> bool:
    """Whether labels are the first of the fit's, or follow all of them."""
    return _leads(fit, dim) and _is_prefix(inputs.labels.get(dim), labels_at_fit(fit, dim))


def _ends(fit: Fit, inputs: Inputs, dim: str) -> bool:
    """Whether labels are the last of the fit's, or precede all of them."""
    pair = _reversed(inputs.labels.get(dim)), _reversed(labels_at_fit(fit, dim))
    return _leads(fit, dim) and _is_prefix(*pair)


def _leads(fit: Fit, dim: str) -> bool:
    """Whether steps follow one another along a dim: in a table, along its first alone."""
    return fit.binding.layout != "table" or dim == fit.binding.dims[0]


def _is_prefix(labels: Labels, fitted: Labels) -> bool:
    """Whether one of them begins with the other."""
    if labels is None or fitted is None:
        # Places are labels too, and begin at 0.
        return labels is fitted
    count = min(len(labels), len(fitted))
    return _equal(labels[:count], fitted[:count])


def _equal(labels: pd.Index, fitted: pd.Index) -> bool:
    """Whether labels are the same in the same order, whatever their dtype."""
    if labels.equals(fitted):
        return True
    # The first alone before the rest: a hash table of the labels of a long dim takes a while.
    first = np.array_equal(fitted[:1].get_indexer(labels[:1]), np.arange(len(fitted[:1])))
    return first and np.array_equal(fitted.get_indexer(labels), np.arange(len(fitted)))


def _reversed(labels: Labels) -> Labels:
    return None if labels is None else labels[::-1]


def _starts_given(fit: Fit, inputs: Inputs, dim: str, site: Site, dependence: Dependence) -> bool:
    """Whether a condition gives a site at all of the first steps that others depend on."""
    mask = inputs.arrays.get(KNOWN + site.name)
    if CONDITION + site.name not in inputs.arrays or not _leads(fit, dim):
        return False
    if not _are_consecutive(inputs.labels.get(dim), labels_at_fit(fit, dim)):
        return False
    if mask is None:
        return True
    if mask.chunks is not None:
        return False
    steps = int(min(dependence.past, inputs.sizes[dim]))
    return bool((mask.isel({dim: slice(0, steps)}) if dim in mask.dims else mask).all())


def _are_consecutive(labels: Labels, fitted: Labels) -> bool:
    """Whether labels follow one another as those of the fit did, new ones after its last."""
    if labels is None or fitted is None:
        return False
    places = fitted.get_indexer(labels)
    count = int((places >= 0).sum())
    if count and not np.array_equal(places[:count], np.arange(places[0], places[0] + count)):
        return False
    return count in (0, len(labels)) or places[count - 1] == len(fitted) - 1


def _restarted(
    fit: Fit, inputs: Inputs, site: Site, dim: str, dependence: Dependence
) -> LabelError:
    labels, fitted = inputs.labels.get(dim), labels_at_fit(fit, dim)
    if dependence.past and not _begins(fit, inputs, dim):
        differs = _difference(labels, fitted)
    else:
        differs = _difference(_reversed(labels), _reversed(fitted), ("ends", "ended"))
    kind = "the density of" if _has_outcomes(fit, inputs) else "site"
    return LabelError(
        f"{kind} {result_name(fit.binding, site)!r} is made step by step along {dim!r}, by a "
        f"recursion (a scan or a running sum), and {differs}: it would restart from its initial "
        f"value. {_remedy(fit, inputs, site, dim, dependence)}"
    )


def _has_outcomes(fit: Fit, inputs: Inputs) -> bool:
    """Whether the outcomes are among the inputs, as for a log-likelihood."""
    return any(s.key in inputs.arrays for a in fit.binding.outcomes for s in a.sources)


def _remedy(fit: Fit, inputs: Inputs, site: Site, dim: str, dependence: Dependence) -> str:
    if _has_outcomes(fit, inputs) or dependence.future or site.kind == "deterministic":
        return (
            f"Take a Dataset with all labels of {dim!r} at the fit, in that order, and select "
            f"from the result: .sel({dim}=...)"
        )
    name = result_name(fit.binding, site)
    recipe = (
        f"Give the past as well, and say what is known of it: xr.concat([past, future], {dim!r})"
        f".aimz.predict(fit, condition={name!r})"
    )
    if dependence.past == inf:
        return recipe
    return (
        f"{recipe}; of the past the last {int(dependence.past)} before what is drawn will do, if "
        "the condition gives them, in memory"
    )


def _difference(
    labels: Labels, fitted: Labels, verbs: tuple[str, str] = ("begins", "began")
) -> str:
    """Say where the labels of a Dataset leave those of the fit."""
    if labels is None or fitted is None:
        lacks = "the fit has labels there and the Dataset none"
        return lacks if labels is None else "the Dataset has labels there and the fit had none"
    count = min(len(labels), len(fitted))
    places = np.flatnonzero(np.asarray(labels[:count] != fitted[:count]))
    if not places.size:
        return f"the Dataset has {len(labels)} labels where the fit had {len(fitted)}"
    first = int(places[0])
    label, expected = _label(labels, first), _label(fitted, first)
    if first == 0:
        return f"the Dataset {verbs[0]} at {label!r}, where the fit {verbs[1]} at {expected!r}"
    before = _label(labels, first - 1)
    return f"in the Dataset {label!r} follows {before!r}, where the fit had {expected!r}"


def _label(labels: pd.Index, place: int) -> Any:
    # Of Python's own types, whose repr is what one would write.
    return labels[place : place + 1].tolist()[0]
