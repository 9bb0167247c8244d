"""Write a fit into a store as arrays and a JSON spec.

Nothing is written before every array and value was encoded or, if lazy, checked: one that
cannot be saved without code is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import Binding, BoundArgument
from xr_aimz.errors import StoreError
from xr_aimz.fits.configuration import model_reference
from xr_aimz.fits.serialization import encode_array, encode_tree
from xr_aimz.inference import SavedSampler
from xr_aimz.storage import ArrayBundle, json_attrs, lazy_name, write_bundle
from xr_aimz.tracing import Site

FORMAT = 1
# Fields of a Site under the names that they have on disk since the first release.
_SITE_WORDS = {
    "density_inputs": "reads",
    "observed_inputs": "seen",
    "has_initial_value": "trained",
}


def save_fit(fit: Any, store: Any, *, mode: str = "w-") -> None:
    """Write a fit into a Zarr store. See :meth:`xr_aimz.Fit.save`."""
    writer = _SpecWriter()
    write_bundle(store, writer.content, _build_spec(fit, writer), mode)


class _SpecWriter:
    """Collect the arrays of a spec under paths, with records of their dtypes."""

    def __init__(self) -> None:
        self.content = ArrayBundle()

    def put(self, group: str, values: np.ndarray, what: str) -> Any:
        """Add an array under a number; return its path and dtype record."""
        number = sum(path.startswith(f"{group}/") for path in self.content.eager)
        path = f"{group}/{number}"
        stored, how, _ = encode_array(values, what)
        self.content.eager[path] = stored
        self.content.dims[path] = tuple(f"{group}_{number}_dim_{i}" for i in range(stored.ndim))
        return {"path": path, **how}

    def index(self, dim: str, index: pd.Index) -> Any:
        """Add the labels of a dimension; return their entry in the spec."""
        entry = self.put("labels", xr.IndexVariable(dim, index).values, f"labels of {dim!r}")
        # The string dtype of pandas is neither of NumPy's two.
        return {**entry, "index": "str"} if index.dtype == "str" else entry

    def pack(self, value: Any, group: str, what: str) -> Any:
        return encode_tree(value, partial(self.put, group, what=what), what)

    def dataset(self, group: str, ds: xr.Dataset) -> dict[str, Any]:
        """Add a Dataset as a group that xarray and ArviZ read; return its entry in the spec."""
        stacked = [n for n, i in ds.indexes.items() if isinstance(i, pd.MultiIndex)]
        if stacked:
            raise StoreError(
                f"coordinates {stacked!r} of {group} are a MultiIndex, which Zarr cannot "
                f"hold; fit on ds.reset_index({stacked[:1]!r})"
            )
        names = [str(n) for n in ds.coords if n not in ds.dims]
        self.content.attrs[group] = _readable_attrs(ds.attrs, {"coordinates": names})
        variables = {str(n): self._variable(group, str(n), v) for n, v in ds.variables.items()}
        attrs = self.pack(dict(ds.attrs), "attrs", f"attrs of {group}")
        return {"variables": variables, "coords": [str(n) for n in ds.coords], "attrs": attrs}

    def _variable(self, group: str, name: str, variable: xr.Variable) -> dict[str, Any]:
        path, what = f"{group}/{name}", f"variable {name!r} of {group}"
        entry: dict[str, Any] = {"path": path, "dims": [str(d) for d in variable.dims]}
        entry["attrs"] = self.pack(dict(variable.attrs), "attrs", f"attrs of {what}")
        self.content.dims[path] = tuple(map(str, variable.dims))
        if variable.chunks is None:
            self.content.eager[path], how, time_attrs = encode_array(variable.values, what)
        else:
            self.content.lazy[path], how = _with_uniform_blocks(variable, what)
            time_attrs = {}
            entry["lazy"] = {"name": lazy_name(variable.data), "chunks": list(variable.chunks)}
        self.content.attrs[path] = _readable_attrs(variable.attrs, time_attrs)
        return {**entry, **how}


def _with_uniform_blocks(variable: xr.Variable, what: str) -> tuple[xr.Variable, dict[str, str]]:
    """Rechunk a dask-backed variable to blocks of one size, in the dtype that is stored."""
    empty, how, _ = encode_array(np.empty(0, variable.dtype), what)
    if variable.dtype.kind not in "fiubc":
        raise StoreError(f"{what} is lazy and has dtype {variable.dtype}; load it first")
    block_sizes = {d: max(c) for d, c in variable.chunksizes.items()}
    return variable.chunk(block_sizes).astype(empty.dtype), how


def _readable_attrs(attrs: Mapping[Any, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Select the attrs that JSON can represent, for other readers; the spec has all of them."""
    readable = {
        k: v for k, v in json_attrs(attrs).items() if isinstance(v, (str, int, float, list))
    }
    return {**readable, **{k: v for k, v in extra.items() if v}}


def _build_spec(fit: Any, writer: _SpecWriter) -> dict[str, Any]:
    groups = {
        "posterior": fit.posterior,
        "sample_stats": fit.sample_stats,
        "observed_data": fit.observed_data,
        "constant_data": fit.constant_data,
    }
    if fit.losses is not None:
        groups["losses"] = fit.losses.to_dataset(name="loss")
    if fit.data_sd.data_vars:
        groups["data_sd"] = fit.data_sd
    return {
        "format": FORMAT,
        "token": fit.token,
        "method": fit.method,
        "concerns": None if fit.concerns is None else list(fit.concerns),
        "options": dict(fit.options),
        "versions": dict(fit.versions),
        "lineage": dict(fit.lineage),
        "model": model_reference(fit.model),
        "binding": _binding_spec(fit.binding, writer),
        "sites": {name: _site_spec(site) for name, site in fit.sites.items()},
        "attrs": writer.pack({n: dict(a) for n, a in fit.attrs.items()}, "attrs", "attrs"),
        "datasets": {name: writer.dataset(name, ds) for name, ds in groups.items()},
        "params": writer.pack(dict(fit.params), "params", "params"),
        "state": writer.pack(dict(fit.state), "state", "state"),
        "further": None
        if fit.sampler is None
        else _sampler_spec(fit.sampler.saved_state(), writer),
    }


def _sampler_spec(sampler: SavedSampler | None, writer: _SpecWriter) -> dict[str, Any]:
    """Encode the sampler of further draws, without the data, which are in the groups."""
    if sampler is None:
        return {"kind": None}
    origin, inputs = sampler.origin, sampler.inputs
    return {
        "kind": origin.kind,
        "settings": writer.pack(dict(origin.settings), "further", "settings"),
        "by": writer.pack(origin.by, "further", "the method"),
        "tree": writer.pack(origin.tree, "further", f"the state of {origin.kind}"),
        "first": sampler.first,
        "sizes": dict(inputs.sizes),
        "labels": {d: writer.index(d, index) for d, index in inputs.labels.items()},
        "coords": writer.dataset("coordinates", inputs.coords),
        "scalars": list(inputs.scalars),
    }


def _binding_spec(binding: Binding, writer: _SpecWriter) -> dict[str, Any]:
    constants = {
        n: writer.pack(v, "constants", f"constant {n!r}") for n, v in binding.constants.items()
    }
    labels = {d: writer.index(d, index) for d, index in binding.labels.items()}
    concrete = {
        n: writer.pack(v, "concrete", f"argument {n!r}") for n, v in binding.concrete.items()
    }
    return {
        "arguments": [_argument_spec(a, writer) for a in binding.arguments],
        # A key only of fits with such arguments: other specs stay as the first release wrote them.
        **({"concrete": concrete} if concrete else {}),
        "constants": constants,
        "dims": list(binding.dims),
        "core_dims": list(binding.core_dims),
        "layout": binding.layout,
        "labels": labels,
        "per": list(binding.per),
    }


def _argument_spec(argument: BoundArgument, writer: _SpecWriter) -> dict[str, Any]:
    sources = []
    for source in argument.sources:
        entry: dict[str, Any] = {"key": source.key, "name": source.name}
        entry["dims"] = list(source.dims)
        entry |= {"units": source.units, "shadowed": source.name_is_taken, "data": None}
        if source.data is not None:
            group = f"given {len([g for g in writer.content.attrs if g.startswith('given ')])}"
            entry["data"] = writer.dataset(group, source.data.to_dataset(name="data"))
            entry["data_name"] = source.data.name
        sources.append(entry)
    flags = {"stacked": argument.stacked, "outcome": argument.outcome}
    return {"name": argument.name, "sources": sources, **flags}


def _site_spec(site: Site) -> dict[str, Any]:
    # A site's name and dims in a Dataset follow from its dims and the binding.
    fields = {n: v for n, v in asdict(site).items() if n not in ("variable", "dataset_dims")}
    spec = {_SITE_WORDS.get(name, name): value for name, value in fields.items()}
    spec["dtype"] = None if site.dtype is None else np.dtype(site.dtype).name
    for name in ("shape", "dims"):
        spec[name] = list(spec[name])
    for name in ("lengths", "reads", "seen"):
        spec[name] = sorted(spec[name])
    spec["event_dims"] = None if site.event_dims is None else list(site.event_dims)
    spec["plates"] = [list(p.values()) for p in spec["plates"]]
    return spec
