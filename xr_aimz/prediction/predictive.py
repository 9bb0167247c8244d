"""Compute predictions, log-likelihoods and prior predictions as lazy, labelled Datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import xarray as xr

from xr_aimz.binding import (
    BoundModel,
    align,
    arrange,
    bind,
    block_of,
    check_dataset,
    check_sizes,
    jax_dtype,
)
from xr_aimz.errors import MissingVariableError, ModelError, list_names
from xr_aimz.fits import Fit, assemble_prior, check_fit, check_model
from xr_aimz.kernel import log_likelihood as density_kernel
from xr_aimz.options import parse_count, parse_seed
from xr_aimz.prediction.conditioning import Condition
from xr_aimz.prediction.new_labels import check_posterior
from xr_aimz.prediction.request import (
    PredictionRequest,
    build_result,
    check_observation_dims,
    prepare,
    result_attrs,
    thin_draws,
)
from xr_aimz.prediction.spec import Prediction
from xr_aimz.provenance import add_prior_provenance, add_provenance
from xr_aimz.tracing import Site, model_parameters, observed_inputs

_PROBE_KEY = "absent outcome"


def prior_predictive(
    ds: xr.Dataset,
    model: Callable,
    variables: Mapping[str, Any] | None = None,
    *,
    draws: int = 500,
    seed: int = 0,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
    layout: str = "grid",
    sites: str | Sequence[str] | None = None,
    do: Mapping[str, Any] | None = None,
    assume_independent: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Draw from the prior predictive distribution for a Dataset, lazily, before any fit.

    Parameters
    ----------
    ds : Dataset
        Its variables are the model's arguments; the outcome need not be in it. If it is
        chunked, each chunk is a block, as in :func:`predict`.
    model : callable
    variables, dim, core_dim, layout
        As in :func:`fit`. Without the outcome, ``dim`` is needed where several dimensions
        could be the observations'.
    draws : int, default 500
        Number of draws, in one chain.
    seed : int
        Draws are a function of the seed, the site, the draw, and the labels. More draws do
        not change the first ones.
    sites : str or sequence of str, optional
        Sites to return, latents among them, by their own name or by their outcome's. By
        default the outcomes and the deterministics: the contents of ArviZ's group
        ``prior_predictive``; latents are its ``prior``. Both are of the same draws.
    do : mapping, optional
        Values that variables or sites are set to, as in :func:`intervene`; scenarios become
        dimensions after ``draw``.
    assume_independent : str or sequence of str, optional
        As in :func:`predict`.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims, *event dims)`` with one
        chain, the coordinates of ``ds`` and the attrs of the outcome's variable. Floats have
        JAX's dtype, float32 by default.

    Raises
    ------
    BindingError, MissingVariableError, DimensionError, DtypeError, LabelError, ChunkError
        Before any task runs.
    ModelError
        A ``param`` site, which has no prior.
    RandomnessError
        A prior that cannot be drawn from, such as ``ImproperUniform``.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr
    >>> import xr_aimz
    >>> def line(x, y=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 10))
    ...     numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
    >>> ds = xr.Dataset({"x": ("time", np.linspace(-1, 1, 50))})
    >>> prior = ds.aimz.prior_predictive(line, sites=["slope", "y"], draws=100)
    >>> prior.y.dims
    ('chain', 'draw', 'time')
    >>> prior.slope.shape
    (1, 100)
    """
    check_model(ds, model, "prior_predictive")
    draws, seed = parse_count("draws", draws), parse_seed(seed)
    bound = _bind_with_outcomes(
        ds, model, variables, {"dim": dim, "core_dim": core_dim, "layout": layout}
    )
    _check_priors(bound)
    _check_has_results(bound, sites)
    request = PredictionRequest(
        sites=sites, do=do, seed=seed, assume_independent=assume_independent
    )
    prediction = prepare(ds, assemble_prior(bound, draws), request)
    return add_prior_provenance(
        build_result(ds, prediction, result_attrs(prediction), "prior_predictive"), seed
    )


class _AllNames:
    """Container that contains every name."""

    def __contains__(self, name: object) -> bool:
        return True


def _bind_with_outcomes(
    ds: xr.Dataset, model: Callable, variables: Mapping[str, Any] | None, options: dict[str, Any]
) -> BoundModel:
    """Bind the model to a Dataset, with its outcomes marked, also those that ``ds`` lacks."""
    bound = bind(ds, model, variables, data_sites=_AllNames(), **options)  # type: ignore[arg-type] # only `in` is used
    absent = _find_absent_outcomes(bound)
    if not absent:
        return bound
    return bind(ds, model, variables, data_sites=set(bound.sites) - absent, **options)


def _find_absent_outcomes(bound: BoundModel) -> set[str]:
    """Find the sites that would be observed if the arguments that are left out were passed."""
    passed = {a.name for a in bound.binding.arguments} | set(bound.binding.constants)
    arguments = [
        p.name
        for p in model_parameters(bound.model)
        if not p.required and p.default is None and p.name not in passed
    ]
    latent = [s for s in bound.sites.values() if s.kind == "latent"]
    outcomes: set[str] = set()
    for argument in arguments:
        # The outcome is most often the last of the sites.
        for site in reversed(latent):
            observed = _find_sites_observing(bound, argument, site)
            if site.name in observed:
                outcomes |= observed
                break
    return outcomes


def _find_sites_observing(bound: BoundModel, argument: str, site: Site) -> set[str]:
    """Return the sites that observe an argument, when it is an array of the shape of ``site``."""
    binding, inputs = bound.binding, bound.inputs
    block = block_of(binding, inputs.sizes)
    arrays = {
        key: jax.ShapeDtypeStruct(a.shape, jax_dtype(a.dtype)) for key, a in inputs.arrays.items()
    }
    arrays[_PROBE_KEY] = jax.ShapeDtypeStruct(site.shape, site.dtype)

    def pass_arrays(arrays_and_probe: dict[str, Any]) -> dict[str, Any]:
        return {
            **arrange(binding, arrays_and_probe, inputs.dims, block),
            argument: arrays_and_probe[_PROBE_KEY],
        }

    try:
        inputs_by_site = observed_inputs(bound.model, pass_arrays, arrays, block)
    except Exception:
        # The model does not take an array of this shape: the argument is for another site.
        return set()
    return {name for name, sources in inputs_by_site.items() if _PROBE_KEY in sources}


def _check_priors(bound: BoundModel) -> None:
    params = [n for n, s in bound.sites.items() if s.has_initial_value]
    if params:
        raise ModelError(
            f"param sites {params!r} are trained and have no prior to draw from; fit the model "
            "and predict, give the values to from_posterior(params=...), or give them priors"
        )


def _check_has_results(bound: BoundModel, sites: Any) -> None:
    kinds = {s.kind for s in bound.sites.values()}
    if sites is None and not kinds & {"observed", "deterministic"}:
        latent = [n for n, s in bound.sites.items() if s.kind == "latent"]
        raise ModelError(
            "the model has neither an outcome, an argument whose default is None and that a site "
            f"observes, nor a deterministic; name the sites to return, sites=...: {latent!r}"
        )


def predict(
    ds: xr.Dataset,
    fit: Fit,
    *,
    sites: str | Sequence[str] | None = None,
    do: Mapping[str, Any] | None = None,
    condition: Condition | None = None,
    draws: int | None = None,
    seed: int = 0,
    new_labels: str = "raise",
    summary: Any = None,
    assume_independent: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Draw from the posterior predictive distribution for a Dataset, lazily.

    Missing values of the outcome are filled, for an outcome is never read. A missing input
    (NaN) makes its cell of the outcome NaN. An outcome of ints or bools has no NaN:
    ``MissingValueError``, at once where the input is in memory, else from a task; also if the
    outcome depends on that input through sites that are sampled. A missing value does not
    matter where ``do`` replaces it, behind conditioned values, nor in a cell of a fit with
    ``per`` that has no draws. A deterministic is whatever the model computes from NaN.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, less the outcomes. If it is chunked, each chunk
        is a block; if numpy-backed, blocks are cut to ``set_options(block_bytes=...)``.
    fit : Fit
    sites : str or sequence of str, optional
        Sites to return, by their own name or by their outcome's. By default the outcomes
        and the deterministics.
    do : mapping, optional
        Values that variables or sites are set to, as in :func:`intervene`; scenarios become
        dimensions after ``draw``.
    condition : str, sequence of str, or mapping, optional
        Outcomes that are known in some cells, by their variable's or their site's name: a
        history, then a forecast. A name alone means the Dataset's own variable; a mapping
        gives a DataArray, a number, or the name of another variable. A DataArray is aligned
        by label; where it is NaN or lacks a label, the outcome is sampled, given the sites
        before it in the model. Values are values of the site itself and come back unchanged.

        A recursion continues from its conditioned values, and from its initial value where it
        has none: the Dataset must begin where the fit's Dataset began, or the condition must
        give the steps that the first sampled step depends on.

        The posterior is not updated: a condition sets values and weighs no draw. A value that
        is informative about something that this prediction samples is an error: a state of a
        scan at a later step than the fit's, a missing step in a recursion, another outcome.
    draws : int, optional
        Use this many draws of each chain, evenly spaced. By default all.
    seed : int
        Draws are a function of the seed, the site, the chain and draw, and the labels.
    new_labels : {"raise", "sample"}
        Treatment of new labels: labels of the Dataset, along a dimension of a latent, that the
        fit did not have. Refuse them, or sample the latent there from its prior given each
        draw's globals, label by label. Labels of the fit keep their posterior. A latent inside
        a scan is continued from the fit's last step. In a fit with ``per`` the latents of each
        cell are sampled from the globals of that cell; a new label of ``per`` has none, and is
        refused.
    summary : str, float or sequence of them, optional
        Statistics in place of the draws, as :func:`xr_aimz.summary` names them: ``("mean",
        "std", 0.05, 0.5, 0.95, "prob>x", "hdi")``. They are computed inside each task, which
        then has all draws of fewer cells, and the draws leave no task.
    assume_independent : str or sequence of str, optional
        Observation dimensions along which the caller guarantees that no cell depends on another.
        Without it, a model whose independence along a dimension that is cut is not proven is
        refused. A coupling that is seen in values is refused in either case. The dims are
        written into ``history``, and into the attr ``aimz_assume_independent``.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims, *event dims)``, with
        the coordinates of ``ds`` and the attrs of the outcome's variable. Floats have
        JAX's dtype, float32 by default. With ``summary``, ``tas_mean`` and the like in place
        of ``tas``, without ``chain`` and ``draw``.
        For a fit with ``per``, dims are in the order of the outcome, and cells without draws
        are NaN, conditioned or not; where the fit has such cells, ints and bools are therefore
        floats, as from ``DataArray.where``.

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, UnitsError, LabelError, ChunkError
        Before any task runs. Also a ``LabelError``: a recursion (a scan, a running sum) on labels
        that do not begin with the fit's first and continue in the same order; and draws of a
        length that the model derives from that of the data, on labels that are not the fit's.
    MissingValueError
        An outcome of ints or bools would be sampled from a missing value.
    ModelError
        A condition on a site that is not an outcome, or that is informative about a sampled
        site; new labels of a latent that the model couples along their dimension; a dimension
        that is cut and along which the model couples cells, or is not proven not to; a model
        that does not run without its outcomes, or on a block of this size.
    BlockSizeError
        With ``summary``, if all draws of the smallest block are over ``block_bytes``.
    InterventionError
        ``do`` cannot be made, or cannot act.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
    >>> def trend(co2, tas=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
    ...     numpyro.sample("tas", dist.Normal(slope * co2, 0.1), obs=tas)
    >>> co2 = np.linspace(0, 1, 30)
    >>> ds = xr.Dataset({"co2": ("year", co2), "tas": ("year", 2 * co2)})
    >>> fit = ds.aimz.from_posterior(trend, {"slope": np.full((4, 100), 2.0)})
    >>> pred = ds.chunk(year=10).aimz.predict(fit)
    >>> pred.tas.dims
    ('chain', 'draw', 'year')
    >>> pred.tas.chunksizes["year"]
    (10, 10, 10)

    A forecast: the Dataset has the past as well, and ``condition`` fixes it. Here the level of a
    lake is the rain plus a remaining fraction of the level of the year before:

    >>> from numpyro.contrib.control_flow import scan
    >>> def lake(rain, level=None):
    ...     left = numpyro.sample("left", dist.Uniform(0, 1))
    ...     def step(before, now):
    ...         rain, level = now
    ...         level = numpyro.sample("level", dist.Normal(left * before + rain, 0.1), obs=level)
    ...         return level, None
    ...     scan(step, 0.0, (rain, level))
    >>> past = xr.Dataset(
    ...     {"rain": ("year", np.ones(4)), "level": ("year", [1.0, 1.5, 1.8, 8.0])},
    ...     {"year": [2000, 2001, 2002, 2003]},
    ... )
    >>> future = xr.Dataset({"rain": ("year", np.ones(2))}, {"year": [2004, 2005]})
    >>> fit = past.aimz.from_posterior(lake, {"left": np.full((4, 100), 0.5)}, core_dim="year")
    >>> both = xr.concat([past, future], "year")
    >>> forecast = both.aimz.predict(fit, condition="level").sel(year=future.year)
    >>> forecast.level.mean(("chain", "draw")).round(1).values
    array([5. , 3.5], dtype=float32)
    """
    check_dataset(ds, "predict")
    check_fit(fit, "predict")
    check_posterior(fit.posterior, fit.sites)
    request = PredictionRequest(
        sites=sites,
        do=do,
        condition=condition,
        draws=draws,
        seed=parse_seed(seed),
        new_labels=new_labels,
        summary=summary,
        assume_independent=assume_independent,
    )
    prediction = prepare(ds, fit, request)
    result = build_result(ds, prediction, result_attrs(prediction), "predict")
    return add_provenance(result, fit.token, fit.lineage, request.seed)


def log_likelihood(
    ds: xr.Dataset,
    fit: Fit,
    *,
    draws: int | None = None,
    assume_independent: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Compute the log density of each observation under each draw, lazily.

    Parameters
    ----------
    ds : Dataset
        With the outcomes and the variables that the fit took.
    fit : Fit
    draws : int, optional
        Use this many draws of each chain, evenly spaced. By default all.
    assume_independent : str or sequence of str, optional
        As for :func:`predict`.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims)``: event dims are
        summed, as NumPyro does. In nats; NaN where the outcome or an input is missing.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
    >>> def trend(co2, tas=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
    ...     numpyro.sample("tas", dist.Normal(slope * co2, 0.1), obs=tas)
    >>> co2 = np.linspace(0, 1, 30)
    >>> ds = xr.Dataset({"co2": ("year", co2), "tas": ("year", 2 * co2)})
    >>> fit = ds.aimz.from_posterior(trend, {"slope": np.full((4, 100), 2.0)})
    >>> density = ds.aimz.log_likelihood(fit)
    >>> density.tas.dims
    ('chain', 'draw', 'year')
    >>> tree = fit.to_datatree(log_likelihood=density)
    >>> sorted(tree.children)
    ['constant_data', 'log_likelihood', 'observed_data', 'posterior']
    """
    check_dataset(ds, "log_likelihood")
    check_fit(fit, "log_likelihood")
    absent = [
        s.name for a in fit.binding.outcomes for s in a.sources if s.name not in ds.variables
    ]
    if absent or not fit.binding.outcomes:
        raise MissingVariableError(
            f"a log-likelihood needs the outcomes; {absent!r} are not in the Dataset, which has "
            f"{list_names(sorted(map(str, ds.variables)), absent)}"
        )
    inputs = align(fit.binding, ds, outcomes=True)
    check_sizes(fit.binding, inputs)
    posterior = thin_draws(fit.posterior, draws)
    assumed = check_observation_dims(fit, assume_independent)
    prediction = Prediction(
        fit, inputs, posterior, density_kernel, fit.observed, seed=0, assumed=assumed
    )
    names = [fit.sites[n].variable for n in fit.observed]
    attrs = {n: {"long_name": f"log-likelihood of {n}", "units": "1"} for n in names}
    result = build_result(ds, prediction, attrs, "log_likelihood")
    return add_provenance(result, fit.token, fit.lineage)
