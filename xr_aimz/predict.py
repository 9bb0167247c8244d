"""Posterior predictions and log-likelihoods as lazy, labelled Datasets.

Building one checks the Dataset against the fit, traces the kernel on the shapes of one
block, and lays out the graph. Nothing is computed, and nothing that could be wrong is
left for a task to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpyro.ops.provenance import eval_provenance

from xr_aimz import keys
from xr_aimz.axes import dims_in_dataset, shape_in_model
from xr_aimz.binding import block_of
from xr_aimz.blocks import Factory, Task, lazy_sites
from xr_aimz.device import device_dtype, to_device_dtype, traced
from xr_aimz.errors import MissingVariableError, ModelError, OptionError
from xr_aimz.given import Condition, conditioned, resolved
from xr_aimz.guard import check_split
from xr_aimz.inputs import Inputs, gather
from xr_aimz.kernel import KNOWN, Program, predictive
from xr_aimz.kernel import log_likelihood as density_kernel
from xr_aimz.labelling import result_name, with_coords
from xr_aimz.labels import label_words
from xr_aimz.model import tracing
from xr_aimz.options import get_options
from xr_aimz.plan import Plan, plan, plan_cells
from xr_aimz.posterior import Fit
from xr_aimz.reduction import Statistic, parse, reduce, suffixed
from xr_aimz.reduction import outputs as reduced
from xr_aimz.summary import dressed
from xr_aimz.unseen import check_draws, latent_draws, seen
from xr_aimz.upstream import Origin, origins

__all__ = ["draw_sites", "log_likelihood", "predict"]

_NEW_LABELS = ("raise", "sample")


def predict(
    ds: xr.Dataset,
    fit: Fit,
    *,
    sites: str | Sequence[str] | None = None,
    condition: Condition | None = None,
    draws: int | None = None,
    seed: int = 0,
    new_labels: str = "raise",
    summary: Any = None,
) -> xr.Dataset:
    """Posterior predictive draws for a Dataset, lazily.

    Gaps in the outcome are filled, for an outcome is never read. A missing input (NaN) makes
    its cell of the outcome NaN; an outcome of ints or bools has none, and its task raises
    ``MissingValueError``. Deterministics are what the model makes of NaN.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, less the outcomes. Chunked, each chunk is a
        block; numpy-backed, blocks are cut to ``set_options(block_bytes=...)``.
    fit : Fit
    sites : str or sequence of str, optional
        Sites to return, by their own name or by their outcome's. By default the outcomes
        and the deterministics.
    condition : str, sequence of str, or mapping, optional
        Outcomes that are known in some cells, by their variable's or their site's name: a
        history, then a forecast. A name alone means the Dataset's own variable; a mapping
        gives a DataArray, a number, or the name of another variable. A DataArray is aligned
        by label; where it is NaN or lacks a label, the outcome is drawn, given what comes
        before it in the model. Values are the site's own and come back as they are.

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
        scan, the steps after the fit's last are drawn on from it.
    summary : str, float or sequence of them, optional
        Statistics in place of the draws, as :func:`xr_aimz.summary` names them: ``("mean",
        "std", 0.05, 0.5, 0.95, "prob>x", "hdi")``. They are taken inside each task, which then
        has all draws of fewer cells, and the draws leave no task.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims, *event dims)``, with
        the coordinates of ``ds`` and the attrs of the outcome's variable. Floats have
        JAX's dtype, float32 by default. With ``summary``, ``tas_mean`` and its like in place
        of ``tas``, without ``chain`` and ``draw``.

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, UnitsError, LabelError, ChunkError
        Before any task runs.
    ModelError
        A condition on what is not an outcome, or that would tell of a draw; new labels of a
        latent that the model couples along their dimension.
    BlockSizeError
        With ``summary``, if all draws of the least block are over ``block_bytes``.

    Examples
    --------
    >>> pred = ds.chunk(lat=10).aimz.predict(fit)  # doctest: +SKIP
    >>> pred.tas.mean(("chain", "draw")).plot()  # doctest: +SKIP
    >>> # the history as it was, the years after it as they may be
    >>> pred = future.aimz.predict(fit, condition={"tas": past.tas})  # doctest: +SKIP
    """
    if new_labels not in _NEW_LABELS:
        raise OptionError(f"new_labels={new_labels!r}: there are {_NEW_LABELS!r}")
    check_draws(fit.posterior, fit.sites, fit.binding)
    posterior = _thinned(fit.posterior, draws)
    inputs = gather(fit.binding, ds, outcomes=False)
    statistics = () if summary is None else parse(summary)
    if new_labels == "sample":
        inputs = _and(inputs, seen(posterior, fit.sites, fit.binding, inputs))
    if condition is not None:
        given = resolved(ds, fit.sites, fit.binding, condition)
        wanted = _Evaluation(fit, inputs, posterior, predictive, tuple(given), seed)
        known = conditioned(given, wanted.origins, wanted.drawn, fit.sites, fit.binding, inputs)
        inputs = _and(inputs, known)
    chosen = _chosen(fit, sites)
    wanted = _Evaluation(fit, inputs, posterior, predictive, chosen, seed, statistics)
    return _drawn(ds, wanted, "predict")


def draw_sites(
    ds: xr.Dataset,
    fit: Fit,
    posterior: xr.Dataset,
    inputs: Inputs,
    sites: str | Sequence[str] | None,
    seed: int,
    verb: str,
) -> xr.Dataset:
    """Values of sites, lazily: what ``posterior`` has is taken from it, all else is drawn."""
    wanted = _Evaluation(fit, inputs, posterior, predictive, _chosen(fit, sites), seed)
    return _drawn(ds, wanted, verb)


def _drawn(ds: xr.Dataset, wanted: _Evaluation, verb: str) -> xr.Dataset:
    fit, result = wanted.fit, _lazy(wanted)
    observed = {name: fit.sites[name].obs_argument for name in wanted.sites}
    attrs = {
        result_name(fit.binding, fit.sites[name]): {} if argument is None else fit.attrs[argument]
        for name, argument in observed.items()
    }
    if wanted.statistics:
        result = dressed(result, wanted.statistics, attrs)
    else:
        result = result.assign({n: result[n].assign_attrs(a) for n, a in attrs.items()})
    return _dressed(result, ds, wanted, verb)


def _and(inputs: Inputs, more: Mapping[str, xr.DataArray]) -> Inputs:
    return replace(inputs, arrays={**inputs.arrays, **more})


def log_likelihood(ds: xr.Dataset, fit: Fit, *, draws: int | None = None) -> xr.Dataset:
    """The log density of each observation under each draw, lazily.

    Parameters
    ----------
    ds : Dataset
        With the outcomes and the variables that the fit took.
    fit : Fit
    draws : int, optional
        Use this many draws of each chain, evenly spaced. By default all.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims)``: event dims are
        summed, as NumPyro does. In nats; NaN where the outcome or an input is missing.

    Examples
    --------
    >>> tree = fit.to_datatree(log_likelihood=ds.aimz.log_likelihood(fit))  # doctest: +SKIP
    """
    posterior = _thinned(fit.posterior, draws)
    absent = [
        s.name for a in fit.binding.outcomes for s in a.sources if s.name not in ds.variables
    ]
    if absent or not fit.binding.outcomes:
        raise MissingVariableError(
            f"a log-likelihood needs the outcomes; {absent!r} are not in the Dataset, which has "
            f"{sorted(map(str, ds.variables))!r}"
        )
    inputs = gather(fit.binding, ds, outcomes=True)
    wanted = _Evaluation(fit, inputs, posterior, density_kernel, fit.observed, seed=0)
    result = _lazy(wanted)
    for name, array in result.items():
        array.attrs.update(long_name=f"log-likelihood of {name}", units="1")
    return _dressed(result, ds, wanted, "log_likelihood")


@dataclass(frozen=True)
class _Evaluation:
    """Which kernel is to be evaluated, on what, for which draws."""

    fit: Fit
    inputs: Inputs
    posterior: xr.Dataset
    factory: Factory
    sites: tuple[str, ...]
    seed: int
    statistics: tuple[Statistic, ...] = ()

    @cached_property
    def program(self) -> Program:
        binding = self.fit.binding.without_data()
        return Program(self.fit.model, binding, self.fit.sites, self.inputs.dims, self.sites)

    @cached_property
    def latents(self) -> dict[str, xr.DataArray]:
        """Draws of each latent site, a local one on the labels of this Dataset."""
        return {
            name: latent_draws(self.posterior, site, self.fit.binding, self.inputs)
            for name, site in self.fit.sites.items()
            if site.kind == "latent" and name not in self.drawn
        }

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """The sites that are drawn in every cell, unless they are given."""
        return tuple(
            name
            for name, site in self.fit.sites.items()
            if site.kind == "observed"
            or (
                site.kind == "latent" and result_name(self.fit.binding, site) not in self.posterior
            )
        )

    @property
    def origins(self) -> dict[str, Origin]:
        """What the distribution of each site is made from."""
        sizes = self.inputs.sizes
        return origins(self.program, sizes, *self.structs(sizes, drawn=True))

    @property
    def shape(self) -> tuple[int, int]:
        return self.posterior.sizes.get("chain", 1), self.posterior.sizes.get("draw", 1)

    def structs(
        self, sizes: Mapping[str, int], *, drawn: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a kernel is called with, for one draw of a block of those sizes.

        With ``drawn``, the sites that it would draw are passed in as latents are.
        """
        binding = self.fit.binding

        def struct(array: xr.DataArray) -> jax.ShapeDtypeStruct:
            dims = [str(d) for d in array.dims if d not in ("chain", "draw")]
            lengths = tuple(sizes[d] if d in binding.dims else array.sizes[d] for d in dims)
            return jax.ShapeDtypeStruct(lengths, device_dtype(array.dtype))

        word = jax.ShapeDtypeStruct((2,), np.uint32)
        latents = {name: struct(a) for name, a in self.latents.items()}
        for name in self.drawn if drawn else ():
            site = self.fit.sites[name]
            shape = shape_in_model(site, binding, sizes)
            latents[name] = jax.ShapeDtypeStruct(shape, site.dtype)
        shared = {
            "arrays": {key: struct(a) for key, a in self.inputs.arrays.items()},
            "words": {d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in binding.dims},
            "params": self.fit.params,
        }
        return {"keys": dict.fromkeys(self.program.keyed, word), "latents": latents}, shared

    def traced(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        """Outputs for one draw of a block of those sizes, and the name of the program."""
        block = block_of(self.fit.binding, sizes)
        return traced(self.factory(self.program, sizes), block, *self.structs(sizes))

    def reached(self, site: str) -> set[str]:
        """The arrays and sites that a site is made from."""
        sizes = self.inputs.sizes
        draw, shared = self.structs(sizes, drawn=True)
        call = self.factory(self.program, sizes)

        def value(**named: Any) -> Any:
            latents = {n: named[n] for n in draw["latents"]}
            arrays = {k: named[f"array {k}"] for k in shared["arrays"]}
            return call({"keys": blank, "latents": latents}, {**rest, "arrays": arrays})[site]

        named = {**draw["latents"], **{f"array {k}": a for k, a in shared["arrays"].items()}}
        blank = dict.fromkeys(draw["keys"], np.zeros(2, np.uint32))
        words = {d: np.zeros(w.shape, np.uint32) for d, w in shared["words"].items()}
        rest = {"words": words, "params": shared["params"]}
        with tracing(block_of(self.fit.binding, sizes)):
            found = eval_provenance(value, **named)
        return {str(n).removeprefix("array ") for n in found}


def _lazy(wanted: _Evaluation) -> xr.Dataset:
    """The sites as lazy arrays with dims, without coordinates."""
    fit, inputs, binding = wanted.fit, wanted.inputs, wanted.fit.binding
    for key, array in inputs.arrays.items():
        if array.chunks is None and array.dtype.kind in "iu":
            # A task would find it too; values in memory can be looked at now.
            to_device_dtype(key, array.values)
    structs, name = wanted.traced(inputs.sizes)
    weight = sum(o.size * o.dtype.itemsize for o in structs.values())
    planned = plan_cells if wanted.statistics else plan
    cut = planned(binding, inputs, wanted.shape, weight, get_options()["block_bytes"])
    _check_cut(wanted, cut)
    _check_coupling(wanted, cut, name)
    padded = {d: cut.largest(d) for d in binding.dims}
    if any(padded[d] != inputs.sizes[d] for d in padded):
        structs, name = wanted.traced({**inputs.sizes, **padded})
    outputs = {
        site: (dims_in_dataset(fit.sites[site], binding)[: len(struct.shape)], struct)
        for site, struct in structs.items()
    }
    task = Task(
        name=name,
        identity=fit.token,
        factory=wanted.factory,
        program=wanted.program,
        seed=np.asarray(keys.seed_key(wanted.seed)),
        params=fit.params,
        padded=padded,
        sizes=inputs.sizes,
    )
    words = {
        d: label_words(d, wanted.posterior.indexes.get(d), size=n)
        for d, n in zip(("chain", "draw"), wanted.shape, strict=True)
    }
    return _named(wanted, task, cut, words, outputs)


def _named(
    wanted: _Evaluation,
    task: Task,
    cut: Plan,
    words: Mapping[str, np.ndarray],
    outputs: Mapping[str, tuple[tuple[str, ...], Any]],
) -> xr.Dataset:
    """The draws of the outputs, or what is asked of them, under their names in a Dataset."""
    names = {n: result_name(wanted.fit.binding, wanted.fit.sites[n]) for n in outputs}
    if wanted.statistics:
        task = replace(task, after=partial(reduce, statistics=wanted.statistics))
        names, outputs = suffixed(names, wanted.statistics), reduced(outputs, wanted.statistics)
    else:
        outputs = {n: (("chain", "draw", *dims), one) for n, (dims, one) in outputs.items()}
    lazy = lazy_sites(task, cut, wanted.inputs, wanted.latents, words, outputs)
    result = xr.Dataset({names[n]: (outputs[n][0], array) for n, array in lazy.items()})
    if not wanted.statistics:
        return result
    # Cells were cut to have room for all draws; what is left of those is small.
    return result.chunk({d: c for d, c in wanted.inputs.chunks.items() if d in result.dims})


def _check_cut(wanted: _Evaluation, cut: Plan) -> None:
    """What has no part in a dimension that is cut must be the same in all its blocks."""
    pieces = {d for d, chunks in cut.chunks.items() if len(chunks) > 1}
    reads = {k: pieces & set(map(str, a.dims)) for k, a in wanted.inputs.arrays.items()}
    reads |= {n: pieces & set(map(str, a.dims)) for n, a in wanted.latents.items()}
    sites = {n: wanted.fit.sites[n] for n in wanted.drawn}
    reads |= {n: pieces & set(dims_in_dataset(s, wanted.fit.binding)) for n, s in sites.items()}
    # What a scan draws, all of its block depends on, asked for or not.
    partly = [n for n in wanted.latents if KNOWN + n in wanted.inputs.arrays]
    for name in dict.fromkeys((*wanted.sites, *wanted.drawn, *partly)):
        site = wanted.fit.sites[name]
        dims = dims_in_dataset(site, wanted.fit.binding)
        if site.scanned and dims and dims[0] in pieces:
            raise ModelError(
                f"site {name!r} is inside a scan along {dims[0]!r}, which is cut into blocks; "
                f"fit with core_dim={dims[0]!r}"
            )
        through = {k: d - set(dims) for k, d in reads.items() if d - set(dims)}
        if site.kind == "deterministic" and through:
            reached = wanted.reached(name) & set(through)
            if reached:
                lost = sorted(set().union(*(through[k] for k in reached)))
                raise ModelError(
                    f"deterministic {name!r} has no dimension {lost!r} but is made from "
                    f"{sorted(reached)!r}, which have: each block would give another. Leave it "
                    f"out, sites=..., or keep the dimension whole: core_dim={lost!r} at the fit"
                )


def _check_coupling(wanted: _Evaluation, cut: Plan, name: str) -> None:
    fit = wanted.fit
    pieces = [d for d, chunks in cut.chunks.items() if len(chunks) > 1]
    seen = {str(n): a for ds in (fit.constant_data, fit.observed_data) for n, a in ds.items()}
    check_split(name, wanted.program, wanted.inputs, wanted.latents, fit.params, pieces, seen)


def _chosen(fit: Fit, sites: str | Sequence[str] | None) -> tuple[str, ...]:
    if sites is None:
        return tuple(n for n, s in fit.sites.items() if s.kind in ("observed", "deterministic"))
    asked = (sites,) if isinstance(sites, str) else tuple(sites)
    known = {n: n for n, s in fit.sites.items() if s.kind != "param"}
    known = {result_name(fit.binding, fit.sites[n]): n for n in known} | known
    strangers = [n for n in asked if n not in known]
    if strangers or not asked:
        raise MissingVariableError(f"sites={asked!r}: the model has {sorted(known)!r}")
    return tuple(dict.fromkeys(known[n] for n in asked))


def _thinned(posterior: xr.Dataset, draws: int | None) -> xr.Dataset:
    if draws is None:
        return posterior
    there = posterior.sizes.get("draw", 1)
    if isinstance(draws, bool) or not isinstance(draws, int) or not 1 <= draws <= there:
        raise OptionError(f"draws={draws!r}: the posterior has {there} draws a chain")
    return posterior.isel(draw=np.arange(draws) * there // draws)


def _dressed(result: xr.Dataset, ds: xr.Dataset, wanted: _Evaluation, verb: str) -> xr.Dataset:
    """The coordinates and attrs that a result has from its Dataset and its fit."""
    draws = {d: wanted.posterior[d] for d in ("chain", "draw") if d in wanted.posterior.coords}
    draws = {d: labels for d, labels in draws.items() if d in result.dims}
    result = with_coords(result.assign_coords(draws), wanted.fit.binding, wanted.inputs)
    result = result.squeeze([d for d in wanted.inputs.scalars if d in result.dims])
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}: xr_aimz {verb} of {wanted.fit.method}"
    history = "\n".join(filter(None, [str(ds.attrs.get("history", "")), line]))
    return result.assign_attrs({**ds.attrs, "history": history})
