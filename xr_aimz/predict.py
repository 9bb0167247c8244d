"""Posterior predictions and log-likelihoods as lazy, labelled Datasets.

Building one checks the Dataset against the fit, traces the kernel on the shapes of one
block, and lays out the graph. Nothing is computed, and nothing that could be wrong is
left for a task to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import jax
import numpy as np
import xarray as xr
from numpyro.ops.provenance import eval_provenance

from xr_aimz import keys
from xr_aimz.axes import dims_in_dataset
from xr_aimz.binding import block_of
from xr_aimz.blocks import Factory, Task, lazy_sites
from xr_aimz.cell_results import in_cells
from xr_aimz.device import device_dtype, to_device_dtype, traced
from xr_aimz.errors import MissingVariableError, ModelError, OptionError
from xr_aimz.inputs import Inputs, gather
from xr_aimz.kernel import Program, predictive
from xr_aimz.kernel import log_likelihood as density_kernel
from xr_aimz.labelling import on_labels, result_name, with_coords
from xr_aimz.labels import label_words
from xr_aimz.model import tracing
from xr_aimz.options import get_options
from xr_aimz.plan import Plan, plan
from xr_aimz.posterior import Fit

__all__ = ["log_likelihood", "predict"]


def predict(
    ds: xr.Dataset,
    fit: Fit,
    *,
    sites: str | Sequence[str] | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Posterior predictive draws for a Dataset, lazily.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, less the outcomes. Chunked, each chunk is a
        block; numpy-backed, blocks are cut to ``set_options(block_bytes=...)``.
    fit : Fit
    sites : str or sequence of str, optional
        Sites to return, by their own name or by their outcome's. By default the outcomes
        and the deterministics.
    draws : int, optional
        Use this many draws of each chain, evenly spaced. By default all.
    seed : int
        Draws are a function of the seed, the site, the chain and draw, and the labels.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims, *event dims)``, with
        the coordinates of ``ds`` and the attrs of the outcome's variable. Floats have
        JAX's dtype, float32 by default. Of a fit with ``per``, dims are in the outcome's own
        order, and cells without draws are NaN; where the fit has such cells, ints and bools
        are therefore floats, as from ``DataArray.where``.

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, UnitsError, LabelError, ChunkError
        Before any task runs.

    Examples
    --------
    >>> pred = ds.chunk(lat=10).aimz.predict(fit)  # doctest: +SKIP
    >>> pred.tas.mean(("chain", "draw")).plot()  # doctest: +SKIP
    """
    posterior = _thinned(fit.posterior, draws)
    inputs = gather(fit.binding, ds, outcomes=False)
    wanted = _Evaluation(fit, inputs, posterior, predictive, _chosen(fit, sites), seed)
    result = in_cells(_lazy(wanted), fit, inputs)
    for name in wanted.sites:
        argument = fit.sites[name].obs_argument
        if argument is not None:
            result[result_name(fit.binding, fit.sites[name])].attrs.update(fit.attrs[argument])
    return _dressed(result, ds, wanted, "predict")


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
        summed, as NumPyro does. In nats.

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
    result = in_cells(_lazy(wanted), fit, inputs)
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

    @cached_property
    def program(self) -> Program:
        binding = self.fit.binding.without_data()
        return Program(self.fit.model, binding, self.fit.sites, self.inputs.dims, self.sites)

    @cached_property
    def latents(self) -> dict[str, xr.DataArray]:
        """Draws of each latent site, a local one on the labels of this Dataset."""
        return {
            name: on_labels(self.posterior, site, self.fit.binding, self.inputs)
            for name, site in self.fit.sites.items()
            if site.kind == "latent"
        }

    @property
    def shape(self) -> tuple[int, int]:
        return self.posterior.sizes.get("chain", 1), self.posterior.sizes.get("draw", 1)

    def structs(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a kernel is called with, for one draw of a block of those sizes."""
        binding = self.fit.binding

        def struct(array: xr.DataArray) -> jax.ShapeDtypeStruct:
            dims = [str(d) for d in array.dims if d not in ("chain", "draw")]
            lengths = tuple(sizes[d] if d in binding.cut_dims else array.sizes[d] for d in dims)
            return jax.ShapeDtypeStruct(lengths, device_dtype(array.dtype))

        word = jax.ShapeDtypeStruct((2,), np.uint32)
        latents = {name: struct(a) for name, a in self.latents.items()}
        shared = {
            "arrays": {key: struct(a) for key, a in self.inputs.arrays.items()},
            "words": {d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in binding.cut_dims},
            "params": self.fit.params,
        }
        return {"keys": dict.fromkeys(self.program.keyed, word), "latents": latents}, shared

    def traced(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        """Outputs for one draw of a block of those sizes, and the name of the program."""
        block = block_of(self.fit.binding, sizes)
        return traced(self.factory(self.program, sizes), block, *self.structs(sizes))

    def reached(self, site: str) -> set[str]:
        """The arrays and latents that a site is made from."""
        sizes = self.inputs.sizes
        draw, shared = self.structs(sizes)
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
    cut = plan(binding, inputs, wanted.shape, weight, get_options()["block_bytes"])
    _check_cut(wanted, cut)
    padded = {d: cut.largest(d) for d in binding.cut_dims}
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
    lazy = lazy_sites(task, cut, inputs, wanted.latents, words, outputs)
    return xr.Dataset(
        {
            result_name(binding, fit.sites[name]): (("chain", "draw", *outputs[name][0]), array)
            for name, array in lazy.items()
        }
    )


def _check_cut(wanted: _Evaluation, cut: Plan) -> None:
    """What has no part in a dimension that is cut must be the same in all its blocks."""
    pieces = {d for d, chunks in cut.chunks.items() if len(chunks) > 1}
    reads = {k: pieces & set(map(str, a.dims)) for k, a in wanted.inputs.arrays.items()}
    reads |= {n: pieces & set(map(str, a.dims)) for n, a in wanted.latents.items()}
    for name in wanted.sites:
        site = wanted.fit.sites[name]
        dims = dims_in_dataset(site, wanted.fit.binding)
        step = next(iter(dims[len(wanted.fit.binding.per) :]), None) if site.scanned else None
        if step in pieces:
            raise ModelError(
                f"site {name!r} is inside a scan along {step!r}, which is cut into blocks; "
                f"fit with core_dim={step!r}"
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
    result = with_coords(result.assign_coords(draws), wanted.fit.binding, wanted.inputs)
    result = result.squeeze([d for d in wanted.inputs.scalars if d in result.dims])
    line = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}: xr_aimz {verb} of {wanted.fit.method}"
    history = "\n".join(filter(None, [str(ds.attrs.get("history", "")), line]))
    return result.assign_attrs({**ds.attrs, "history": history})
