"""Load a fit from a store: verify its spec, then read its arrays, and resolve the model last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import (
    LAYOUTS,
    AlignedInputs,
    Binding,
    BoundArgument,
    BoundModel,
    VariableRef,
    assign_variables,
)
from xr_aimz.errors import DamagedStoreError
from xr_aimz.fits.configuration import resolve_model
from xr_aimz.fits.more_draws import NoSampler, RestoredSampler
from xr_aimz.fits.posterior import Fit, fit_token
from xr_aimz.fits.saving import FORMAT
from xr_aimz.fits.serialization import decode_array, decode_tree
from xr_aimz.inference import SamplerState, SavedSampler
from xr_aimz.storage import VerifiedStore, saved_name
from xr_aimz.tracing import Plate, Site

# Errors of reading JSON that is no spec of a fit as one.
_NOT_A_SPEC = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def load_fit(
    store: Any,
    model: Callable | None = None,
    *,
    method: Any = None,
    trust_import: bool = False,
) -> Fit:
    """Load a fit that :meth:`xr_aimz.Fit.save` wrote.

    Parameters
    ----------
    store : path, URL or Zarr store
    model : callable, optional
        The model of the fit. Its source must be unchanged.
    method : optional
        The ``method`` of :func:`xr_aimz.fit`, if :meth:`Fit.sample` needs it: a kernel, an SVI
        or a guide of the caller's own. Names, HMC, NUTS and autoguides with plain settings are
        restored from the store.
    trust_import : bool
        Import the model by the path in the store. That runs the module of that name, so trust
        both; by default nothing is imported and none of the store's content can run.

    Returns
    -------
    Fit
        With the same draws, token and predictions. Arrays that were lazy are lazy.

    Raises
    ------
    IncompleteStoreError
        There is no store, or it was not written to its end.
    StoreKindError
        The store is not that of a saved fit, but of a fit per cell or of results, say.
    DamagedStoreError
        The store was changed or damaged, or has content that no fit has: the message names it
        and its path.
    MemoryLimitError
        An array that is read at once does not fit in memory.
    ModelError
        No model is given, or its source is not that of the fit.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
    >>> def centre(y=None):
    ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
    ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
    >>> ds = xr.Dataset({"y": ("time", np.arange(5.0))})
    >>> fit = ds.aimz.from_posterior(centre, {"mu": np.zeros((2, 10))})
    >>> folder = tempfile.TemporaryDirectory()
    >>> fit.save(f"{folder.name}/fit.zarr")
    >>> loaded = xr_aimz.load_fit(f"{folder.name}/fit.zarr", centre)
    >>> loaded.token == fit.token
    True
    >>> folder.cleanup()
    """
    bundle = VerifiedStore.opened(store)
    if bundle.spec.get("format") != FORMAT:
        raise DamagedStoreError(
            f"{bundle.name} has format {bundle.spec.get('format')!r}; this version reads {FORMAT}"
        )
    reader = _Reader(bundle)
    try:
        bundle.verify()
        fields = _load_fields(bundle.spec, reader)
        sampler_spec = bundle.spec["further"]
        sampler = None if sampler_spec is None else _load_sampler(sampler_spec, fields, reader)
        model_spec, token = bundle.spec["model"], str(bundle.spec["token"])
        reference = {name: model_spec[name] for name in ("name", "path", "sha256")}
    except DamagedStoreError:
        raise
    except _NOT_A_SPEC as error:
        raise DamagedStoreError(
            f"{bundle.name}: the spec is none that a fit has ({type(error).__name__}: {error})"
        ) from error
    if fit_token(fields["posterior"], fields["params"]) != token:
        raise DamagedStoreError(f"{bundle.name}: the draws are not those of the fit {token!r}")
    # Last: nothing is imported before all else was verified.
    fit = Fit(model=resolve_model(reference, model, trust_import), **fields)
    continuation = _make_sampler(fit, sampler_spec is not None, sampler, method, trust_import)
    return replace(fit, sampler=continuation)


def _load_sampler(
    spec: Mapping[str, Any], fields: Mapping[str, Any], reader: _Reader
) -> SavedSampler | None:
    """Load the sampler of further draws; None for a method whose sampler is not stored."""
    if spec["kind"] is None:
        return None
    if spec["kind"] not in ("batches", "chains", "guide"):
        raise ValueError(f"further draws of {spec['kind']!r}")
    coords = reader.dataset(spec["coords"])
    groups = (fields["observed_data"], fields["constant_data"])
    arrays = {}
    for source in (s for a in fields["binding"].arguments for s in a.sources):
        group = next((g for g in groups if source.name in g), coords)
        arrays[source.key] = group[source.name]
    labels = {d: reader.index(d, entry) for d, entry in spec["labels"].items()}
    inputs = AlignedInputs(arrays, dict(spec["sizes"]), labels, coords, tuple(spec["scalars"]))
    tree, by = reader.unpack(spec["tree"]), reader.unpack(spec["by"])
    origin = SamplerState(spec["kind"], reader.unpack(spec["settings"]), tree, by)
    return SavedSampler(origin, inputs, int(spec["first"]))


def _make_sampler(
    fit: Fit, has_sampler: bool, sampler: SavedSampler | None, method: Any, trust_import: bool
) -> Callable[[int, int], Fit] | None:
    if not has_sampler:
        return None
    if sampler is None:
        return NoSampler(fit.method)
    bound = BoundModel(fit.model, fit.binding, sampler.inputs, fit.sites)
    return RestoredSampler(bound, sampler, fit, method, trust_import)


class _Reader:
    """Read arrays and Datasets of a store by their entries in the spec."""

    def __init__(self, store: VerifiedStore) -> None:
        self._store = store

    def array(self, entry: Mapping[str, Any]) -> np.ndarray:
        return decode_array(self._store.values(entry["path"]), entry)

    def index(self, dim: str, entry: Mapping[str, Any]) -> pd.Index:
        value = xr.IndexVariable(dim, self.array(entry)).to_index()
        return value.astype("str") if entry.get("index") == "str" else value

    def unpack(self, value: Any) -> Any:
        return decode_tree(value, self.array)

    def dataset(self, entry: Mapping[str, Any]) -> xr.Dataset:
        variables = {n: self._variable(v) for n, v in entry["variables"].items()}
        coords = {n: variables.pop(n) for n in entry["coords"]}
        return xr.Dataset(variables, coords, attrs=self.unpack(entry["attrs"]))

    def _variable(self, entry: Mapping[str, Any]) -> xr.Variable:
        attrs = self.unpack(entry["attrs"])
        if "lazy" not in entry:
            return xr.Variable(entry["dims"], self.array(entry), attrs)
        chunks = tuple(map(tuple, entry["lazy"]["chunks"]))
        # Under its name at the fit: the same name stands for the same values, and keeps the token.
        name = saved_name(entry["lazy"]["name"])
        value = self._store.chunked(entry["path"], entry["dims"], chunks, name)
        value.attrs = attrs
        return value


def _load_fields(spec: Mapping[str, Any], reader: _Reader) -> dict[str, Any]:
    datasets = {name: reader.dataset(entry) for name, entry in spec["datasets"].items()}
    losses = datasets["losses"]["loss"] if "losses" in datasets else None
    concerns = spec["concerns"]
    binding = _load_binding(spec["binding"], reader)
    sites = {name: _load_site(name, entry) for name, entry in spec["sites"].items()}
    return {
        "binding": binding,
        "sites": assign_variables(sites, binding),
        "posterior": datasets["posterior"],
        "sample_stats": datasets["sample_stats"],
        "observed_data": datasets["observed_data"],
        "constant_data": datasets["constant_data"],
        "losses": losses,
        # Absent from fits of the first release.
        "data_sd": datasets.get("data_sd", xr.Dataset()),
        "params": reader.unpack(spec["params"]),
        "state": reader.unpack(spec["state"]),
        "attrs": reader.unpack(spec["attrs"]),
        "method": str(spec["method"]),
        "concerns": None if concerns is None else tuple(map(str, concerns)),
        "options": dict(spec["options"]),
        "versions": dict(spec["versions"]),
        "lineage": dict(spec["lineage"]),
    }


def _load_binding(spec: Mapping[str, Any], reader: _Reader) -> Binding:
    if spec["layout"] not in LAYOUTS:
        raise ValueError(f"layout {spec['layout']!r}")
    labels = {d: reader.index(d, entry) for d, entry in spec["labels"].items()}
    return Binding(
        arguments=tuple(_load_argument(a, reader) for a in spec["arguments"]),
        constants={n: reader.unpack(v) for n, v in spec["constants"].items()},
        dims=tuple(spec["dims"]),
        core_dims=tuple(spec["core_dims"]),
        layout=spec["layout"],
        labels=labels,
        per=tuple(spec["per"]),
        concrete={n: reader.unpack(v) for n, v in spec.get("concrete", {}).items()},
    )


def _load_argument(spec: Mapping[str, Any], reader: _Reader) -> BoundArgument:
    sources = tuple(_load_source(s, reader) for s in spec["sources"])
    return BoundArgument(spec["name"], sources, spec["stacked"], spec["outcome"])


def _load_source(spec: Mapping[str, Any], reader: _Reader) -> VariableRef:
    data = None
    if spec["data"] is not None:
        data = reader.dataset(spec["data"])["data"].rename(spec["data_name"])
    return VariableRef(
        key=spec["key"],
        name=spec["name"],
        dims=tuple(spec["dims"]),
        units=spec["units"],
        data=data,
        name_is_taken=spec["shadowed"],
    )


def _load_site(name: str, spec: Mapping[str, Any]) -> Site:
    dtype = None if spec["dtype"] is None else jnp.dtype(spec["dtype"])
    event_dims = None if spec["event_dims"] is None else tuple(spec["event_dims"])
    return Site(
        name=name,
        kind=spec["kind"],
        shape=tuple(spec["shape"]),
        event_ndim=spec["event_ndim"],
        dtype=dtype,
        plates=tuple(Plate(*p) for p in spec["plates"]),
        event_dims=event_dims,
        distribution=spec["distribution"],
        obs_argument=spec["obs_argument"],
        scanned=spec["scanned"],
        has_initial_value=spec["trained"],
        dims=tuple(spec["dims"]),
        # Absent from stores of version 0.1.0.
        lengths=frozenset(spec.get("lengths", ())),
        density_inputs=frozenset(spec["reads"]),
        observed_inputs=frozenset(spec["seen"]),
    )
