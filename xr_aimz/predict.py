"""Posterior predictions and log-likelihoods as lazy, labelled Datasets.

What is asked is checked against the fit and put into arrays: what is set, what is given,
what is new. The rest is :mod:`xr_aimz.evaluation`. Nothing is computed, and nothing that
could be wrong is left for a task to find.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.concrete import check_sizes
from xr_aimz.errors import DimensionError, MissingVariableError, OptionError
from xr_aimz.evaluation import Evaluation, evaluate
from xr_aimz.given import Condition, conditioned, resolved
from xr_aimz.inputs import Inputs, gather
from xr_aimz.interventions import intervention
from xr_aimz.kernel import log_likelihood as density_kernel
from xr_aimz.kernel import predictive
from xr_aimz.kinds import check_dataset, check_fit
from xr_aimz.labelling import result_name, with_coords
from xr_aimz.lineage import ASSUMED, traced_to
from xr_aimz.posterior import Fit
from xr_aimz.reduction import parse
from xr_aimz.spelling import list_names
from xr_aimz.summary import dressed
from xr_aimz.unseen import check_draws, seen
from xr_aimz.whole_numbers import parse_count, parse_seed

__all__ = [
    "Question",
    "answered",
    "asked",
    "attrs_of",
    "log_likelihood",
    "predict",
]

Attrs = Mapping[str, Mapping[str, Any]]


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
    """Posterior predictive draws for a Dataset, lazily.

    Gaps in the outcome are filled, for an outcome is never read. A missing input (NaN) makes
    its cell of the outcome NaN. An outcome of ints or bools has none: ``MissingValueError``,
    at once where the input is in memory, else from a task, also if it is made from that input
    through sites that are drawn. It does not matter what is missing where ``do`` replaces it,
    behind given values, nor in a cell of a fit with ``per`` that has no draws.
    Deterministics are what the model makes of NaN.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, less the outcomes. Chunked, each chunk is a
        block; numpy-backed, blocks are cut to ``set_options(block_bytes=...)``.
    fit : Fit
    sites : str or sequence of str, optional
        Sites to return, by their own name or by their outcome's. By default the outcomes
        and the deterministics.
    do : mapping, optional
        What variables or sites are set to, as in :func:`intervene`; scenarios become
        dimensions after ``draw``.
    condition : str, sequence of str, or mapping, optional
        Outcomes that are known in some cells, by their variable's or their site's name: a
        history, then a forecast. A name alone means the Dataset's own variable; a mapping
        gives a DataArray, a number, or the name of another variable. A DataArray is aligned
        by label; where it is NaN or lacks a label, the outcome is drawn, given what comes
        before it in the model. Values are the site's own and come back as they are.

        A recursion is drawn on from the values that it is given, and from its initial value where
        it is given none: the Dataset begins where the fit's began, or the condition gives the
        steps that the first of those to be drawn is made from.

        The posterior is not updated: a condition sets values and weighs no draw. Where a
        value would tell of something that this prediction draws, that is an error: a state
        of a scan at a later step than the fit's, a gap in a recursion, another outcome.
    draws : int, optional
        Use this many draws of each chain, evenly spaced. By default all.
    seed : int
        Draws are a function of the seed, the site, the chain and draw, and the labels.
    new_labels : {"raise", "sample"}
        What to do where the Dataset has labels, along a dimension of a latent, that the fit
        never saw: refuse, or draw that latent there from its prior given each draw's globals,
        label by label. Labels that the fit saw keep their posterior. Of a latent inside a
        scan, the steps after the fit's last are drawn on from it. Of a fit with ``per`` each
        cell's latents are drawn from that cell's globals; a new label of ``per`` has none, and
        is refused.
    summary : str, float or sequence of them, optional
        Statistics in place of the draws, as :func:`xr_aimz.summary` names them: ``("mean",
        "std", 0.05, 0.5, 0.95, "prob>x", "hdi")``. They are taken inside each task, which then
        has all draws of fewer cells, and the draws leave no task.
    assume_independent : str or sequence of str, optional
        Observation dimensions along which the caller vouches that no cell depends on another.
        A model whose independence along a dimension that is cut is not proven is refused
        without. A coupling that values show is refused all the same. It is written into
        ``history``, and into the attr ``aimz_assume_independent``.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims, *event dims)``, with
        the coordinates of ``ds`` and the attrs of the outcome's variable. Floats have
        JAX's dtype, float32 by default. With ``summary``, ``tas_mean`` and its like in place
        of ``tas``, without ``chain`` and ``draw``.
        Of a fit with ``per``, dims are in the outcome's own order, and cells without draws are
        NaN, given values or not; where the fit has such cells, ints and bools are therefore
        floats, as from ``DataArray.where``.

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, UnitsError, LabelError, ChunkError
        Before any task runs. A ``LabelError`` too: a recursion (a scan, a running sum) on labels
        that do not begin with the fit's first and go on as those did; and draws of a length that
        the model makes from that of the data, on labels that are not the fit's.
    MissingValueError
        An outcome of ints or bools would be drawn from a missing value.
    ModelError
        A condition on what is not an outcome, or that would tell of a draw; new labels of a
        latent that the model couples along their dimension; a dimension that is cut and along
        which the model couples cells, or is not proven not to; a model that does not run without
        its outcomes, or on a block of this size.
    BlockSizeError
        With ``summary``, if all draws of the least block are over ``block_bytes``.
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

    A forecast: the Dataset has the past as well, and ``condition`` says that it is known. Here
    the level of a lake is what is left of the year before, and rain:

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
    check_draws(fit.posterior, fit.sites, fit.binding)
    question = Question(
        sites=sites,
        do=do,
        condition=condition,
        draws=draws,
        seed=parse_seed(seed),
        new_labels=new_labels,
        summary=summary,
        assume_independent=assume_independent,
    )
    wanted = asked(ds, fit, question)
    return traced_to(fit, answered(ds, wanted, attrs_of(wanted), "predict"), question.seed)


def log_likelihood(
    ds: xr.Dataset,
    fit: Fit,
    *,
    draws: int | None = None,
    assume_independent: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """The log density of each observation under each draw, lazily.

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
    inputs = gather(fit.binding, ds, outcomes=True)
    check_sizes(fit.binding, inputs)
    posterior = _thinned(fit.posterior, draws)
    assumed = _observation_dims(fit, assume_independent)
    wanted = Evaluation(
        fit, inputs, posterior, density_kernel, fit.observed, seed=0, assumed=assumed
    )
    names = [result_name(fit.binding, fit.sites[n]) for n in fit.observed]
    attrs = {n: {"long_name": f"log-likelihood of {n}", "units": "1"} for n in names}
    return traced_to(fit, answered(ds, wanted, attrs, "log_likelihood"))


@dataclass(frozen=True)
class Question:
    """What is asked of a prediction, in the words of :func:`predict` and :func:`intervene`."""

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


def asked(ds: xr.Dataset, fit: Fit, question: Question) -> Evaluation:
    """What is to be evaluated: all that is set, given or new is among its arrays."""
    if question.new_labels not in ("raise", "sample"):
        there_are = list_names(("raise", "sample"), [question.new_labels])
        raise OptionError(f"new_labels={question.new_labels!r}: there are {there_are}")
    inputs = gather(fit.binding, ds, outcomes=False)
    check_sizes(fit.binding, inputs)
    wanted = Evaluation(
        fit,
        inputs,
        _thinned(fit.posterior, question.draws),
        predictive,
        _chosen(fit, question.sites),
        parse_seed(question.seed),
        () if question.summary is None else parse(question.summary),
        assumed=_observation_dims(fit, question.assume_independent),
    )
    if question.do is not None:
        wanted = _under(ds, wanted, question, question.do)
    if question.new_labels == "sample":
        new = seen(wanted.posterior, fit.sites, fit.binding, wanted.inputs)
        wanted = replace(wanted, inputs=_and(wanted.inputs, new))
    return wanted if question.condition is None else _given(ds, wanted, question.condition)


def _under(
    ds: xr.Dataset, wanted: Evaluation, question: Question, do: Mapping[str, Any]
) -> Evaluation:
    """With what is set, and of the sites only those that it reaches if effects are wanted."""
    under = intervention(
        ds,
        wanted.fit,
        wanted.inputs,
        wanted.sites,
        do=do,
        baseline=question.baseline,
        contrast=question.contrast,
    )
    sites = wanted.sites
    if question.contrast is not None and question.sites is None:
        sites = tuple(name for name in sites if name in under.reached)
    return replace(wanted, inputs=under.added_to(wanted.inputs), sites=sites, under=under)


def _given(ds: xr.Dataset, wanted: Evaluation, condition: Condition) -> Evaluation:
    fit, inputs = wanted.fit, wanted.inputs
    given = resolved(ds, fit.sites, fit.binding, condition)
    about = replace(wanted, sites=tuple(given))
    known = conditioned(given, about.origins, about.drawn, fit.sites, fit.binding, inputs)
    return replace(wanted, inputs=_and(inputs, known))


def _and(inputs: Inputs, more: Mapping[str, xr.DataArray]) -> Inputs:
    return replace(inputs, arrays={**inputs.arrays, **more})


def attrs_of(wanted: Evaluation) -> dict[str, dict[str, Any]]:
    """The attrs of each result: an outcome has its variable's."""
    fit, found = wanted.fit, {}
    for name in wanted.sites:
        argument = fit.sites[name].obs_argument
        own = {} if argument is None else dict(fit.attrs[argument])
        found[result_name(fit.binding, fit.sites[name])] = own
    return found


def answered(ds: xr.Dataset, wanted: Evaluation, attrs: Attrs, verb: str) -> xr.Dataset:
    """The evaluation as a lazy Dataset: coordinates, attrs, and a line of history."""
    result = evaluate(wanted)
    if wanted.statistics:
        result = dressed(result, wanted.statistics, attrs)
    else:
        result = result.assign({n: result[n].assign_attrs(a) for n, a in attrs.items()})
    draws = {d: wanted.posterior[d] for d in ("chain", "draw") if d in wanted.posterior.coords}
    coords: dict[Any, Any] = {d: labels for d, labels in draws.items() if d in result.dims}
    coords |= {} if wanted.under is None else dict(wanted.under.coords)
    result = with_coords(result.assign_coords(coords), wanted.fit.binding, wanted.inputs)
    result = result.squeeze([d for d in wanted.inputs.scalars if d in result.dims])
    result = _select(result, ds, wanted.inputs)
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}: xr_aimz {verb} of {wanted.fit.method}"
    line += "" if wanted.under is None else f"; {wanted.under}"
    if wanted.assumed:
        line += f"; cells assumed independent along {list(wanted.assumed)!r}"
    history = "\n".join(filter(None, [str(ds.attrs.get("history", "")), line]))
    global_attrs: dict[Any, Any] = {n: a for n, a in ds.attrs.items() if n != ASSUMED}
    global_attrs |= {ASSUMED: " ".join(wanted.assumed)} if wanted.assumed else {}
    return result.assign_attrs({**global_attrs, "history": history})


def _select(result: xr.Dataset, ds: xr.Dataset, inputs: Inputs) -> xr.Dataset:
    """Select the Dataset's own labels, where the model was given all that the fit had."""
    selection = {d: labels for d, labels in inputs.selection.items() if d in result.dims}
    if not selection:
        return result
    result = result.sel(selection)
    coords = {n: c for n, c in ds.coords.items() if set(c.dims) & set(selection)}
    return result.assign_coords(
        {n: c for n, c in coords.items() if set(c.dims) <= set(result.dims)}
    )


def _chosen(fit: Fit, sites: str | Sequence[str] | None) -> tuple[str, ...]:
    if sites is None:
        return tuple(n for n, s in fit.sites.items() if s.kind in ("observed", "deterministic"))
    asked = (sites,) if isinstance(sites, str) else tuple(sites)
    known = {n: n for n, s in fit.sites.items() if s.kind != "param"}
    known = {result_name(fit.binding, fit.sites[n]): n for n in known} | known
    strangers = [n for n in asked if n not in known]
    if strangers or not asked:
        raise MissingVariableError(
            f"sites={asked!r}: the model has {list_names(sorted(known), strangers)}"
        )
    return tuple(dict.fromkeys(known[n] for n in asked))


def _observation_dims(fit: Fit, dims: str | Sequence[str] | None) -> tuple[str, ...]:
    """The dims along which the caller says that cells are independent."""
    names = (dims,) if isinstance(dims, str) else tuple(dims or ())
    strange = [d for d in names if d not in fit.binding.dims]
    if strange:
        raise DimensionError(
            f"assume_independent={dims!r}: {strange!r} is not among the observation dimensions "
            f"of the fit, {fit.binding.dims!r}"
        )
    return names


def _thinned(posterior: xr.Dataset, draws: int | None) -> xr.Dataset:
    if draws is None:
        return posterior
    there = posterior.sizes.get("draw", 1)
    count = parse_count("draws", draws, most=there, why=f", for a chain has {there} draws")
    return posterior.isel(draw=np.arange(count) * there // count)
