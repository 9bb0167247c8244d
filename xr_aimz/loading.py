"""A fit from a store: the spec verified, then its arrays, and then the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import LAYOUTS, Argument, Binding, Source
from xr_aimz.bound import Bound
from xr_aimz.errors import DamagedStoreError
from xr_aimz.further import Kept, Origin
from xr_aimz.identity import kept_name
from xr_aimz.inputs import Inputs
from xr_aimz.model import Plate, Site
from xr_aimz.packing import unpack
from xr_aimz.posterior import Fit, token_of
from xr_aimz.reopened import Reopened, Unkept
from xr_aimz.saving import FORMAT
from xr_aimz.source import found_again
from xr_aimz.storable import restored
from xr_aimz.verified import Vault

__all__ = ["load_fit"]

# What reading something else than a spec as one comes to.
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
    """A fit as :meth:`xr_aimz.Fit.save` wrote it.

    Parameters
    ----------
    store : path, URL or Zarr store
    model : callable, optional
        The model of the fit. Its source must be what it was.
    method : optional
        What :func:`xr_aimz.fit` was given as ``method``, where :meth:`Fit.sample` needs it: a
        kernel, an SVI or a guide of the caller's own. Names, HMC, NUTS and autoguides with
        plain settings are made again from the store.
    trust_import : bool
        Import the model by the path in the store. That runs the module of that name, so trust
        both; by default nothing is imported and none of the store's content can run.

    Returns
    -------
    Fit
        With the same draws, token and predictions. What was lazy is lazy.

    Raises
    ------
    IncompleteStoreError
        There is no store, or it was not written to its end.
    StoreKindError
        The store is not that of a saved fit, but of a fit per cell or of results, say.
    DamagedStoreError
        The store was changed or damaged, or has something in it that no fit has: the message
        says what and where.
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
    vault = Vault.opened(store)
    if vault.spec.get("format") != FORMAT:
        raise DamagedStoreError(
            f"{vault.name} has format {vault.spec.get('format')!r}; this version reads {FORMAT}"
        )
    reader = _Reader(vault)
    try:
        vault.verify()
        fields = _fields(vault.spec, reader)
        further = vault.spec["further"]
        kept = None if further is None else _kept(further, fields, reader)
        told, token = vault.spec["model"], str(vault.spec["token"])
        known = {name: told[name] for name in ("name", "path", "sha256")}
    except DamagedStoreError:
        raise
    except _NOT_A_SPEC as error:
        raise DamagedStoreError(
            f"{vault.name}: the spec is none that a fit has ({type(error).__name__}: {error})"
        ) from error
    if token_of(fields["posterior"], fields["params"]) != token:
        raise DamagedStoreError(f"{vault.name}: the draws are not those of the fit {token!r}")
    # Last: nothing is imported before all else was found to be as it was written.
    fit = Fit(model=found_again(known, model, trust_import), **fields)
    more = _more(fit, further is not None, kept, method, trust_import)
    return replace(fit, more=more)


def _kept(spec: Mapping[str, Any], fields: Mapping[str, Any], reader: _Reader) -> Kept | None:
    """What further draws are taken from; None where the method has nothing to keep."""
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
    inputs = Inputs(arrays, dict(spec["sizes"]), labels, coords, tuple(spec["scalars"]))
    tree, by = reader.unpack(spec["tree"]), reader.unpack(spec["by"])
    origin = Origin(spec["kind"], reader.unpack(spec["settings"]), tree, by)
    return Kept(origin, inputs, int(spec["first"]))


def _more(
    fit: Fit, further: bool, kept: Kept | None, method: Any, trust_import: bool
) -> Callable[[int, int], Fit] | None:
    if not further:
        return None
    if kept is None:
        return Unkept(fit.method)
    bound = Bound(fit.model, fit.binding, kept.inputs, fit.sites)
    return Reopened(bound, kept, fit, method, trust_import)


class _Reader:
    """Arrays and Datasets by what the spec says of them."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def array(self, entry: Mapping[str, Any]) -> np.ndarray:
        return restored(self._vault.values(entry["path"]), entry)

    def index(self, dim: str, entry: Mapping[str, Any]) -> pd.Index:
        found = xr.IndexVariable(dim, self.array(entry)).to_index()
        return found.astype("str") if entry.get("index") == "str" else found

    def unpack(self, found: Any) -> Any:
        return unpack(found, self.array)

    def dataset(self, entry: Mapping[str, Any]) -> xr.Dataset:
        variables = {n: self._variable(v) for n, v in entry["variables"].items()}
        coords = {n: variables.pop(n) for n in entry["coords"]}
        return xr.Dataset(variables, coords, attrs=self.unpack(entry["attrs"]))

    def _variable(self, entry: Mapping[str, Any]) -> xr.Variable:
        attrs = self.unpack(entry["attrs"])
        if "lazy" not in entry:
            return xr.Variable(entry["dims"], self.array(entry), attrs)
        chunks = tuple(map(tuple, entry["lazy"]["chunks"]))
        # Under the name that it had: equal names, equal values, and so the token is the same.
        name = kept_name(entry["lazy"]["name"])
        found = self._vault.chunked(entry["path"], entry["dims"], chunks, name)
        found.attrs = attrs
        return found


def _fields(spec: Mapping[str, Any], reader: _Reader) -> dict[str, Any]:
    datasets = {name: reader.dataset(entry) for name, entry in spec["datasets"].items()}
    losses = datasets["losses"]["loss"] if "losses" in datasets else None
    concerns = spec["concerns"]
    return {
        "binding": _binding(spec["binding"], reader),
        "sites": {name: _site(name, entry) for name, entry in spec["sites"].items()},
        "posterior": datasets["posterior"],
        "sample_stats": datasets["sample_stats"],
        "observed_data": datasets["observed_data"],
        "constant_data": datasets["constant_data"],
        "losses": losses,
        # Fits of the first release have none.
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


def _binding(spec: Mapping[str, Any], reader: _Reader) -> Binding:
    if spec["layout"] not in LAYOUTS:
        raise ValueError(f"layout {spec['layout']!r}")
    labels = {d: reader.index(d, entry) for d, entry in spec["labels"].items()}
    return Binding(
        arguments=tuple(_argument(a, reader) for a in spec["arguments"]),
        constants={n: reader.unpack(v) for n, v in spec["constants"].items()},
        dims=tuple(spec["dims"]),
        core_dims=tuple(spec["core_dims"]),
        layout=spec["layout"],
        labels=labels,
        per=tuple(spec["per"]),
        concrete={n: reader.unpack(v) for n, v in spec.get("concrete", {}).items()},
    )


def _argument(spec: Mapping[str, Any], reader: _Reader) -> Argument:
    sources = tuple(_source(s, reader) for s in spec["sources"])
    return Argument(spec["name"], sources, spec["stacked"], spec["outcome"])


def _source(spec: Mapping[str, Any], reader: _Reader) -> Source:
    data = None
    if spec["data"] is not None:
        data = reader.dataset(spec["data"])["data"].rename(spec["data_name"])
    return Source(
        key=spec["key"],
        name=spec["name"],
        dims=tuple(spec["dims"]),
        units=spec["units"],
        data=data,
        shadowed=spec["shadowed"],
    )


def _site(name: str, spec: Mapping[str, Any]) -> Site:
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
        trained=spec["trained"],
        dims=tuple(spec["dims"]),
        # Not in a store of version 0.1.0.
        lengths=frozenset(spec.get("lengths", ())),
        reads=frozenset(spec["reads"]),
        seen=frozenset(spec["seen"]),
    )
