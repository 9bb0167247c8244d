"""Check a prediction request, align its Dataset with the fit, and label the lazy result.

:func:`prepare` makes a :class:`~xr_aimz.prediction.spec.Prediction` from a
:class:`PredictionRequest`; :func:`build_result` makes a Dataset from the Prediction. Both public
verbs, :func:`predict` and :func:`intervene`, are these two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import AlignedInputs, align, check_sizes, with_coords
from xr_aimz.errors import DimensionError, MissingVariableError, OptionError, list_names
from xr_aimz.fits import Fit
from xr_aimz.kernel import predictive
from xr_aimz.options import parse_count, parse_seed
from xr_aimz.prediction.conditioning import Condition, align_condition, resolve_condition
from xr_aimz.prediction.evaluation import build_lazy
from xr_aimz.prediction.new_labels import known_label_masks
from xr_aimz.prediction.scenarios import resolve_intervention
from xr_aimz.prediction.spec import Prediction, Tracer
from xr_aimz.prediction.statistics import parse_statistics, with_statistic_attrs
from xr_aimz.provenance import ASSUMED

Attrs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PredictionRequest:
    """Arguments of :func:`predict` and :func:`intervene`, before they are checked."""

    sites: str | Sequence[str] | None = None
    do: Mapping[str, Any] | None = None
    baseline: Mapping[str, Any] | None = None
    contrast: Callable | None = None
    condition: Condition | None = None
    draws: int | None = None
    seed: int = 0
    new_labels: str = "raise"
    summary: Any = None
    assume_independent: str | Sequence[str] | None = None


def prepare(ds: xr.Dataset, fit: Fit, request: PredictionRequest) -> Prediction:
    """Check a request and align its Dataset: return the Prediction to evaluate.

    Values that ``do`` sets, values of ``condition`` and masks of new labels are among its arrays.
    """
    if request.new_labels not in ("raise", "sample"):
        choices = list_names(("raise", "sample"), [request.new_labels])
        raise OptionError(f"new_labels={request.new_labels!r}: there are {choices}")
    inputs = align(fit.binding, ds, outcomes=False)
    check_sizes(fit.binding, inputs)
    prediction = Prediction(
        fit,
        inputs,
        thin_draws(fit.posterior, request.draws),
        predictive,
        _select_sites(fit, request.sites),
        parse_seed(request.seed),
        () if request.summary is None else parse_statistics(request.summary),
        assumed=check_observation_dims(fit, request.assume_independent),
    )
    if request.do is not None:
        prediction = _with_intervention(ds, prediction, request, request.do)
    if request.new_labels == "sample":
        masks = known_label_masks(prediction.posterior, fit.sites, fit.binding, prediction.inputs)
        prediction = replace(prediction, inputs=_add_arrays(prediction.inputs, masks))
    return (
        prediction
        if request.condition is None
        else _with_condition(ds, prediction, request.condition)
    )


def _with_intervention(
    ds: xr.Dataset, prediction: Prediction, request: PredictionRequest, do: Mapping[str, Any]
) -> Prediction:
    """Add an intervention; with a contrast and no ``sites``, keep only the sites it reaches."""
    intervention = resolve_intervention(
        ds,
        prediction.fit,
        prediction.inputs,
        prediction.sites,
        do=do,
        baseline=request.baseline,
        contrast=request.contrast,
    )
    sites = prediction.sites
    if request.contrast is not None and request.sites is None:
        sites = tuple(name for name in sites if name in intervention.affected_sites)
    return replace(
        prediction,
        inputs=intervention.added_to(prediction.inputs),
        sites=sites,
        intervention=intervention,
    )


def _with_condition(ds: xr.Dataset, prediction: Prediction, condition: Condition) -> Prediction:
    """Add the values and masks of the conditioned sites to the inputs."""
    fit, inputs = prediction.fit, prediction.inputs
    values = resolve_condition(ds, fit.sites, fit.binding, condition)
    conditioned = replace(prediction, sites=tuple(values))
    arrays = align_condition(
        values, conditioned.origins, conditioned.sampled_sites, fit.sites, fit.binding, inputs
    )
    return replace(prediction, inputs=_add_arrays(inputs, arrays))


def _add_arrays(inputs: AlignedInputs, arrays: Mapping[str, xr.DataArray]) -> AlignedInputs:
    return replace(inputs, arrays={**inputs.arrays, **arrays})


def result_attrs(prediction: Prediction) -> dict[str, dict[str, Any]]:
    """Return the attrs of each result variable: an outcome has those of its variable."""
    fit, attrs = prediction.fit, {}
    for name in prediction.sites:
        argument = fit.sites[name].obs_argument
        variable_attrs = {} if argument is None else dict(fit.attrs[argument])
        attrs[fit.sites[name].variable] = variable_attrs
    return attrs


def build_result(
    ds: xr.Dataset,
    prediction: Prediction,
    attrs: Attrs,
    verb: str,
    tracer: Tracer | None = None,
) -> xr.Dataset:
    """Build the lazy Dataset of a Prediction: coordinates, attrs, and a line of history."""
    result = build_lazy(prediction, tracer or Tracer())
    if prediction.statistics:
        result = with_statistic_attrs(result, prediction.statistics, attrs)
    else:
        result = result.assign({n: result[n].assign_attrs(a) for n, a in attrs.items()})
    draws = {
        d: prediction.posterior[d] for d in ("chain", "draw") if d in prediction.posterior.coords
    }
    coords: dict[Any, Any] = {d: labels for d, labels in draws.items() if d in result.dims}
    coords |= {} if prediction.intervention is None else dict(prediction.intervention.coords)
    result = with_coords(result.assign_coords(coords), prediction.fit.binding, prediction.inputs)
    result = result.squeeze([d for d in prediction.inputs.scalars if d in result.dims])
    result = _select_labels(result, ds, prediction.inputs)
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}: xr_aimz {verb} of {prediction.fit.method}"
    line += "" if prediction.intervention is None else f"; {prediction.intervention}"
    if prediction.assumed:
        line += f"; cells assumed independent along {list(prediction.assumed)!r}"
    history = "\n".join(filter(None, [str(ds.attrs.get("history", "")), line]))
    global_attrs: dict[Any, Any] = {n: a for n, a in ds.attrs.items() if n != ASSUMED}
    global_attrs |= {ASSUMED: " ".join(prediction.assumed)} if prediction.assumed else {}
    return result.assign_attrs({**global_attrs, "history": history})


def _select_labels(result: xr.Dataset, ds: xr.Dataset, inputs: AlignedInputs) -> xr.Dataset:
    """Select the labels of ``ds`` where the model was run on all labels of the fit."""
    selection = {d: labels for d, labels in inputs.selection.items() if d in result.dims}
    if not selection:
        return result
    result = result.sel(selection)
    coords = {n: c for n, c in ds.coords.items() if set(c.dims) & set(selection)}
    return result.assign_coords(
        {n: c for n, c in coords.items() if set(c.dims) <= set(result.dims)}
    )


def _select_sites(fit: Fit, sites: str | Sequence[str] | None) -> tuple[str, ...]:
    if sites is None:
        return tuple(n for n, s in fit.sites.items() if s.kind in ("observed", "deterministic"))
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    by_name = {n: n for n, s in fit.sites.items() if s.kind != "param"}
    by_name = {fit.sites[n].variable: n for n in by_name} | by_name
    unknown = [n for n in names if n not in by_name]
    if unknown or not names:
        raise MissingVariableError(
            f"sites={names!r}: the model has {list_names(sorted(by_name), unknown)}"
        )
    return tuple(dict.fromkeys(by_name[n] for n in names))


def check_observation_dims(fit: Fit, dims: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return ``assume_independent`` as a tuple; refuse dims that are not observation dims."""
    names = (dims,) if isinstance(dims, str) else tuple(dims or ())
    unknown = [d for d in names if d not in fit.binding.dims]
    if unknown:
        raise DimensionError(
            f"assume_independent={dims!r}: {unknown!r} is not among the observation dimensions "
            f"of the fit, {fit.binding.dims!r}"
        )
    return names


def thin_draws(posterior: xr.Dataset, draws: int | None) -> xr.Dataset:
    """Select ``draws`` evenly spaced draws of each chain; None keeps all."""
    if draws is None:
        return posterior
    n_draws = posterior.sizes.get("draw", 1)
    count = parse_count("draws", draws, most=n_draws, why=f", for a chain has {n_draws} draws")
    return posterior.isel(draw=np.arange(count) * n_draws // count)
