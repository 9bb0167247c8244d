"""Posterior predictions and log-likelihoods as lazy, labelled Datasets.

Building one checks the Dataset against the fit, traces the kernel on the shapes of one
block, and lays out the graph. Nothing is computed, and nothing that could be wrong is
left for a task to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import jax
import numpy as np
import xarray as xr
from dask.base import tokenize

from xr_aimz import keys
from xr_aimz.axes import dims_in_dataset
from xr_aimz.binding import block_of
from xr_aimz.blocks import Factory, Task, lazy_sites
from xr_aimz.device import device_dtype, fingerprint, output_shapes
from xr_aimz.errors import DimensionError, LabelError, MissingVariableError, OptionError
from xr_aimz.inputs import Inputs, gather
from xr_aimz.kernel import Program, log_likelihood as density_kernel, predictive
from xr_aimz.labelling import result_name, with_coords
from xr_aimz.labels import label_words
from xr_aimz.options import get_options
from xr_aimz.plan import plan
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
        JAX's dtype, float32 by default.

    Raises
    ------
    MissingVariableError, DimensionError, DtypeError, UnitsError, LabelError, ChunkError
        Before any task runs.

    Examples
    --------
    >>> pred = future.chunk(lat=10).aimz.predict(fit)  # doctest: +SKIP
    >>> pred.tas.mean(("chain", "draw")).plot()  # doctest: +SKIP
    """
    names = _chosen(fit, sites)
    posterior = _thinned(fit.posterior, draws)
    inputs = gather(fit.binding, ds, outcomes=False)
    return _lazy(ds, fit, inputs, posterior, names, seed, predictive, "predict")


def log_likelihood(
    ds: xr.Dataset, fit: Fit, *, draws: int | None = None
) -> xr.Dataset:
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
    absent = [s.name for a in fit.binding.outcomes for s in a.sources if s.name not in ds.variables]
    if absent or not fit.binding.outcomes:
        raise MissingVariableError(
            f"a log-likelihood needs the outcomes; {absent!r} are not in the Dataset, which has "
            f"{sorted(map(str, ds.variables))!r}"
        )
    inputs = gather(fit.binding, ds, outcomes=True)
    return _lazy(ds, fit, inputs, posterior, fit.observed, 0, density_kernel, "log_likelihood")


def _lazy(
    ds: xr.Dataset,
    fit: Fit,
    inputs: Inputs,
    posterior: xr.Dataset,
    names: tuple[str, ...],
    seed: int,
    factory: Factory,
    verb: str,
) -> xr.Dataset:
    binding = fit.binding.without_data()
    program = Program(fit.model, binding, fit.sites, inputs.dims, names)
    latents = _latents(fit, inputs, posterior)
    key = np.asarray(keys.seed_key(seed))
    shape = (posterior.sizes.get("chain", 1), posterior.sizes.get("draw", 1))

    def structs(sizes: Mapping[str, int]) -> dict[str, Any]:
        return _structs(factory, program, inputs, latents, fit.params, key, sizes)

    weight = sum(o.size * o.dtype.itemsize for o in structs(inputs.sizes).values())
    cut = plan(binding, inputs, shape, weight, get_options()["block_bytes"])
    padded = {d: cut.largest(d) for d in binding.dims}
    outputs = structs({**inputs.sizes, **padded})
    name = fingerprint(factory.__name__, program, tuple(sorted(fit.params)))
    task = Task(name, factory, program, key, fit.params, padded, inputs.sizes)
    words = {
        d: label_words(d, posterior.indexes.get(d), size=n)
        for d, n in zip(("chain", "draw"), shape, strict=True)
    }
    lazy = lazy_sites(
        task, cut, inputs, latents, words,
        {n: (_dims(fit, n, o), o) for n, o in outputs.items()},
        _token(fit, name, seed, inputs, posterior, cut),
    )
    arrays = {
        result_name(fit.binding, fit.sites[n]): xr.DataArray(
            array, dims=("chain", "draw", *_dims(fit, n, outputs[n])), attrs=_attrs(fit, n, verb)
        )
        for n, array in lazy.items()
    }
    return _dressed(xr.Dataset(arrays), ds, fit, inputs, posterior, verb)


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


def _latents(fit: Fit, inputs: Inputs, posterior: xr.Dataset) -> dict[str, xr.DataArray]:
    """Draws of each latent site, a local one on the labels of this Dataset."""
    found = {}
    for name, site in fit.sites.items():
        if site.kind == "latent":
            array = posterior[result_name(fit.binding, site)]
            dims = ("chain", "draw", *dims_in_dataset(site, fit.binding))
            found[name] = _on_labels(fit, inputs, name, array.transpose(*dims))
    return found


def _on_labels(fit: Fit, inputs: Inputs, name: str, array: xr.DataArray) -> xr.DataArray:
    for dim in (d for d in fit.binding.dims if d in array.dims):
        here, there = inputs.labels.get(dim), array.indexes.get(dim)
        if here is None or there is None:
            if (here is None) != (there is None) or inputs.sizes[dim] != array.sizes[dim]:
                raise DimensionError(
                    f"latent site {name!r} has {array.sizes[dim]} entries along {dim!r}, "
                    f"{'without' if there is None else 'with'} labels; the Dataset has "
                    f"{inputs.sizes[dim]}, {'without' if here is None else 'with'} labels. "
                    "Give both the same coordinate"
                )
        elif not here.equals(there):
            absent = here.difference(there)
            if len(absent):
                raise LabelError(
                    f"latent site {name!r} has no draws for {len(absent)} labels of {dim!r}, "
                    f"{list(absent[:3])!r} among them: the fit never saw them. Select those "
                    "that it saw, or fit with them"
                )
            array = array.sel({dim: here})
    return array


def _structs(
    factory: Factory,
    program: Program,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    params: Mapping[str, Any],
    key: np.ndarray,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Shape and dtype of each output for one draw of a block of those sizes."""

    def struct(array: xr.DataArray) -> jax.ShapeDtypeStruct:
        dims = [str(d) for d in array.dims if d not in ("chain", "draw")]
        lengths = tuple(sizes[d] if d in program.binding.dims else array.sizes[d] for d in dims)
        return jax.ShapeDtypeStruct(lengths, device_dtype(array.dtype))

    word = jax.ShapeDtypeStruct((2,), np.uint32)
    draw = {
        "chain": word,
        "draw": word,
        "latents": {name: struct(a) for name, a in latents.items()},
    }
    shared = {
        "seed": key,
        "arrays": {name: struct(a) for name, a in inputs.arrays.items()},
        "words": {
            d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in program.binding.dims
        },
        "params": params,
    }
    block = block_of(program.binding, sizes)
    return output_shapes(factory(program, sizes), block, draw, shared)


def _dims(fit: Fit, name: str, struct: Any) -> tuple[str, ...]:
    return dims_in_dataset(fit.sites[name], fit.binding)[: len(struct.shape)]


def _token(fit: Fit, name: str, seed: int, inputs: Inputs, posterior: xr.Dataset, cut: Any) -> str:
    arrays = {n: a.variable for n, a in inputs.arrays.items()}
    draws = {d: posterior.indexes.get(d) for d in ("chain", "draw")}
    return tokenize(fit.token, name, seed, arrays, dict(inputs.labels), draws, cut)


def _attrs(fit: Fit, name: str, verb: str) -> dict[str, Any]:
    site = fit.sites[name]
    if site.obs_argument is None:
        return {}
    attrs = dict(fit.attrs.get(result_name(fit.binding, site), {}))
    if verb == "log_likelihood":
        known = attrs.get("long_name", result_name(fit.binding, site))
        return {"long_name": f"log-likelihood of {known}", "units": "1"}
    return attrs


def _dressed(
    result: xr.Dataset, ds: xr.Dataset, fit: Fit, inputs: Inputs, posterior: xr.Dataset, verb: str
) -> xr.Dataset:
    """The coordinates and attrs that a result has from its Dataset and its fit."""
    draws = {d: posterior[d] for d in ("chain", "draw") if d in posterior.coords}
    result = with_coords(result.assign_coords(draws), fit.binding, inputs)
    result = result.squeeze([d for d in inputs.scalars if d in result.dims])
    line = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}: xr_aimz {verb} of {fit.method}"
    history = "\n".join(filter(None, [str(ds.attrs.get("history", "")), line]))
    return result.assign_attrs({**ds.attrs, "history": history})
