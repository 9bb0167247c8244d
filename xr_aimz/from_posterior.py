"""Draws made elsewhere become a Fit: a model, a Dataset, and a posterior by site name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.assembly import assemble
from xr_aimz.axes import dims_in_dataset
from xr_aimz.bound import Bound, bind
from xr_aimz.casting import measure_sd
from xr_aimz.conversions import find_converted
from xr_aimz.errors import LabelError, ModelError
from xr_aimz.infer.problem import Draws
from xr_aimz.inputs import reordered
from xr_aimz.kernel import Program
from xr_aimz.kinds import check_model
from xr_aimz.labelling import extra_labels, label, result_name
from xr_aimz.posterior import Fit
from xr_aimz.record import options_of, versions

__all__ = ["from_posterior"]


def from_posterior(
    ds: xr.Dataset,
    model: Callable,
    posterior: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
    layout: str = "grid",
    params: Mapping[str, Any] | None = None,
) -> Fit:
    """A Fit from draws made elsewhere; nothing is run.

    Parameters
    ----------
    ds : Dataset
        Whose variables the model's arguments are; the outcome need not be in it.
    model : callable
    posterior : mapping, Dataset or DataTree
        Draws by site name: arrays ``(chain, draw, ...)``; a Dataset with those dims; or
        an ArviZ DataTree with a group ``posterior``.
    variables, dim, core_dim, layout
        As in :func:`fit`.
    params : mapping, optional
        Values of ``param`` sites.

    Raises
    ------
    ModelError
        A latent site without draws.
    """
    check_model(ds, model, "from_posterior")
    given = _with_draws(_as_dataset(posterior))
    bound = bind(
        ds, model, variables, dim=dim, core_dim=core_dim, layout=layout, known=_sites_in(given)
    )
    untrained = [n for n, s in bound.sites.items() if s.trained and n not in (params or {})]
    if untrained:
        raise ModelError(
            f"param sites {untrained!r} would be left at their initial values; give what they "
            "were trained to: params={...}"
        )
    latent = [name for name, s in bound.sites.items() if s.kind == "latent"]
    known = {name: _find_draws(given, name) for name in latent}
    labelled = [_relabel(known[name], name, bound) for name in latent]
    draws = (
        xr.merge([a.to_dataset() for a in labelled], join="exact") if labelled else xr.Dataset()
    )
    # Draws are addressed by label too: without any, a part of them would be other draws.
    draws = draws.assign_coords({d: draws[d] for d in ("chain", "draw") if d in draws.dims})
    shape = (draws.sizes.get("chain", 1), draws.sizes.get("draw", 1))
    made = Draws({}, shape, "draws made elsewhere", params=dict(params or {}))
    number = {"chains": shape[0], "draws": shape[1]}
    options = options_of(bound.binding, made.method, number, seed=None)
    found = assemble(bound, draws, made)
    sd = _sd_in_memory(bound, made.params)
    return replace(found, options=options, versions=versions(), data_sd=sd)


def _sd_in_memory(bound: Bound, params: Mapping[str, Any]) -> xr.Dataset:
    """The standard deviations of the variables that are in memory; nothing lazy is read."""
    arrays = {k: a.variable for k, a in bound.inputs.arrays.items() if a.variable._in_memory}
    program = Program(bound.model, bound.binding, bound.sites, bound.inputs.dims, ())
    converted = partial(find_converted, program, bound.inputs, params)
    return measure_sd(bound.binding, bound.inputs, arrays, converted)


def _as_dataset(posterior: Any) -> xr.Dataset:
    if isinstance(posterior, xr.DataTree):
        return posterior["posterior"].to_dataset()
    if isinstance(posterior, xr.Dataset):
        return posterior
    if isinstance(posterior, Mapping):
        arrays = {str(n): np.asarray(v) for n, v in posterior.items()}
        flat = [n for n, v in arrays.items() if v.ndim < 2]
        if flat:
            raise ModelError(f"draws of {flat!r} must have dims (chain, draw, ...)")
        return xr.Dataset(
            {
                n: (("chain", "draw", *(f"{n}_dim_{i}" for i in range(v.ndim - 2))), v)
                for n, v in arrays.items()
            }
        )
    # arviz < 1 hands out an InferenceData: its groups are attributes.
    if hasattr(posterior, "posterior"):
        return posterior.posterior
    raise ModelError(
        f"posterior={type(posterior).__name__}: give a mapping of arrays (chain, draw, ...), a "
        "Dataset or a DataTree"
    )


def _with_draws(given: xr.Dataset) -> xr.Dataset:
    """The draws with a chain and a draw dimension, whose labels tell every draw apart."""
    given = given.expand_dims([d for d in ("chain", "draw") if d not in given.dims])
    for d in ("chain", "draw"):
        index = given.indexes.get(d)
        if index is not None and not index.is_unique:
            raise LabelError(
                f"the posterior has duplicate labels of {d!r}, "
                f"{list(index[index.duplicated()][:3])!r} among them, and their draws would share "
                "their noise; number them anew"
            )
    return given


def _sites_in(given: xr.Dataset) -> set[str]:
    return {str(n) for n in given.data_vars} | {str(n).replace(".", "/") for n in given.data_vars}


def _find_draws(given: xr.Dataset, site: str) -> xr.DataArray:
    for name in (site, site.replace("/", ".")):
        if name in given.data_vars:
            return given[name]
    raise AssertionError(site)  # bind() has refused a latent site without draws


def _relabel(array: xr.DataArray, name: str, bound: Bound) -> xr.DataArray:
    """Draws with the site's dims: their own labels if they have them, else the Dataset's."""
    site = bound.sites[name]
    dims = ("chain", "draw", *dims_in_dataset(site, bound.binding))
    own = result_name(bound.binding, site)
    if set(array.dims) == set(dims):
        return _in_order(array.transpose(*dims).rename(own), bound)
    values = array.transpose("chain", "draw", ...).values
    shape = tuple(n for d, n in zip(site.dims, site.shape, strict=True) if d is not None)
    if values.shape[2:] not in (shape, site.shape):
        raise ModelError(
            f"draws of {name!r} have dims {array.dims!r} and shape {array.shape!r}; the model's "
            f"site has dims {dims!r} and shape {site.shape!r}"
        )
    values = values.reshape(values.shape[:2] + site.shape)
    coords = {d: array.coords[d].values for d in ("chain", "draw") if d in array.coords}
    return label({name: values}, bound.sites, bound.binding, bound.inputs, **coords)[own]


def _in_order(array: xr.DataArray, bound: Bound) -> xr.DataArray:
    """Dimensions that are not observed in the order of labels that the model knows."""
    for d, index in extra_labels(bound.binding).items():
        if d not in bound.binding.dims:
            own = f"the posterior of {array.name!r}"
            array = reordered(array, d, index, own, f"give all labels of {d!r} that the model has")
    return array
