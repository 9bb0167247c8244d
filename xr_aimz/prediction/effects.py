"""Compute the effect of an intervention: each scenario contrasted with a baseline, draw by draw.

Scenarios and baseline are run in one task for each block, on the same inputs, the same posterior
draws and the same random numbers. The contrast therefore has the uncertainty of the effect only:
noise that is common to scenario and baseline cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import xarray as xr

from xr_aimz.binding import check_dataset
from xr_aimz.errors import OptionError, list_names
from xr_aimz.fits import Fit, check_fit
from xr_aimz.options import parse_seed
from xr_aimz.prediction.conditioning import Condition
from xr_aimz.prediction.new_labels import check_posterior
from xr_aimz.prediction.request import PredictionRequest, build_result, prepare, result_attrs
from xr_aimz.provenance import add_provenance

Attrs = Mapping[str, Any]


def intervene(
    ds: xr.Dataset,
    fit: Fit,
    do: Mapping[str, Any],
    *,
    baseline: Mapping[str, Any] | None = None,
    contrast: str | Callable | None = "difference",
    sites: str | Sequence[str] | None = None,
    condition: Condition | None = None,
    draws: int | None = None,
    seed: int = 0,
    new_labels: str = "raise",
    summary: Any = None,
    assume_independent: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Compute the effect of setting variables or sites, lazily, with paired draws.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, less the outcomes; see :func:`predict`.
    fit : Fit
    do : mapping
        Mapping of targets to values. A target is the name of an argument, of the variable
        that it is bound to, or of a latent or observed site. A value is a number; a
        DataArray, aligned by label and broadcast by name, where NaN and absent labels leave
        a cell unchanged; or a callable of the current DataArray, such as
        ``lambda co2: co2 + 100``, which keeps its dims (for a site, of the current array,
        cell by cell). A DataArray's dimension that neither the Dataset nor the model has is
        one of scenarios; values that share such a dimension vary together. Or a mapping of
        names of scenarios to such mappings, for a dimension ``scenario``.
    baseline : mapping, optional
        Targets and values of the baseline, with which scenarios are contrasted. By default
        nothing is set. Scenarios do not inherit from it.
    contrast : {"difference", "ratio", "percent"} or callable or None
        A function of ``(scenario, baseline)``, cell by cell, within each draw. With ``None``,
        the scenarios side by side, after the baseline as the first label of ``scenario``; a
        sweep over a dimension of levels has no label for a baseline, and leaves it out.
    sites : str or sequence of str, optional
        Sites to return, by their own name or by their outcome's. By default those of the
        outcomes and deterministics that the intervention reaches.
    draws : int, optional
        Use this many draws of each chain, evenly spaced. By default all.
    condition, new_labels, summary, assume_independent : optional
        As for :func:`predict`: outcomes that are known in some cells, labels that the fit
        did not have, statistics over chains and draws in place of these, dimensions along which
        no cell depends on another. Callables in ``do`` and ``contrast`` are part of the model.
    seed : int
        As for :func:`predict`: the same seed gives the same noise.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *scenarios, *observation dims, *event
        dims)``. Differences keep their units; ratios have ``"1"`` and percentages ``"%"``.
        The cost is that of a prediction for every scenario, less the computations that they
        share.

    Raises
    ------
    MissingVariableError
        ``do`` has a name that the model does not have.
    InterventionError
        It names a deterministic, a site in a scan or an ambiguous name; or its targets can
        reach none of the returned sites.
    LabelError, DimensionError, UnitsError, DtypeError
        A value does not fit the Dataset.

    Notes
    -----
    A latent site that descends from a target is sampled given the target, in the baseline too;
    ancestors keep their posterior (Pearl, *Causality*, 2009, section 3.4). This takes the edges
    of the model for causes: the user decides whether they are.

    A difference equals that of two predictions to the last few ulp of these. Noise that all
    scenarios add alike, as that of a Normal whose scale no scenario changes, is left out of it.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
    >>> def trend(co2, tas=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
    ...     numpyro.sample("tas", dist.Normal(slope * co2, 0.1), obs=tas)
    >>> co2 = np.linspace(0, 1, 30)
    >>> ds = xr.Dataset({"co2": ("year", co2), "tas": ("year", 2 * co2)})
    >>> fit = ds.aimz.from_posterior(trend, {"slope": np.full((4, 100), 2.0)})
    >>> effect = ds.aimz.intervene(fit, {"co2": 0.0})
    >>> effect.tas.mean(("chain", "draw")).isel(year=[0, -1]).values
    array([ 0., -2.], dtype=float32)
    >>> effect.tas.mean("year").compute().quantile([0.05, 0.95], ("chain", "draw")).values
    array([-1., -1.])
    """
    check_dataset(ds, "intervene")
    check_fit(fit, "intervene")
    parsed_contrast = _parse_contrast(contrast)
    request = PredictionRequest(
        sites=sites,
        do=do,
        baseline={} if baseline is None else baseline,
        contrast=parsed_contrast.function,
        condition=condition,
        draws=draws,
        seed=parse_seed(seed),
        new_labels=new_labels,
        summary=summary,
        assume_independent=assume_independent,
    )
    check_posterior(fit.posterior, fit.sites)
    prediction = prepare(ds, fit, request)
    targets = " and ".join(prediction.intervention.names if prediction.intervention else ())
    attrs = result_attrs(prediction)
    if parsed_contrast.function is not None:
        attrs = {name: parsed_contrast.attrs(name, old, targets) for name, old in attrs.items()}
    result = build_result(ds, prediction, attrs, f"intervene ({parsed_contrast.name})")
    return add_provenance(result, fit.token, fit.lineage, request.seed)


@dataclass(frozen=True)
class _Contrast:
    """Contrast function and the attrs of its result: ``{of}`` a variable, ``{on}`` the targets."""

    name: str
    function: Callable | None
    long_name: str = ""
    units: str | None = None
    keeps_units: bool = False

    def attrs(self, name: str, attrs: Attrs, on: str) -> dict[str, Any]:
        of = attrs.get("long_name", name)
        units = attrs.get("units") if self.keeps_units else self.units
        new_attrs = {"long_name": self.long_name.format(of=of, on=on)}
        return new_attrs | ({} if units is None else {"units": units})


def _as_signed(array: jax.Array) -> jax.Array:
    return array.astype(int) if array.dtype == bool else array


def _difference(scenario: jax.Array, baseline: jax.Array) -> jax.Array:
    return _as_signed(scenario) - _as_signed(baseline)


def _ratio(scenario: jax.Array, baseline: jax.Array) -> jax.Array:
    return jnp.true_divide(scenario, baseline)


def _percent(scenario: jax.Array, baseline: jax.Array) -> jax.Array:
    return 100 * jnp.true_divide(_difference(scenario, baseline), baseline)


_CONTRASTS = {
    "difference": _Contrast("difference", _difference, "effect of {on} on {of}", None, True),
    "ratio": _Contrast("ratio", _ratio, "ratio of {of} under {on} to baseline", "1"),
    "percent": _Contrast("percent", _percent, "relative effect of {on} on {of}", "%"),
}


def _parse_contrast(contrast: str | Callable | None) -> _Contrast:
    if contrast is None:
        return _Contrast("side by side", None)
    if callable(contrast):
        name = getattr(contrast, "__name__", type(contrast).__name__)
        return _Contrast(name, contrast, f"{name} of {{of}} under {{on}} and baseline")
    if contrast not in _CONTRASTS:
        raise OptionError(
            f"contrast={contrast!r}: there are {list_names(_CONTRASTS, [contrast])}, a callable "
            "of (scenario, baseline), and None"
        )
    return _CONTRASTS[contrast]
