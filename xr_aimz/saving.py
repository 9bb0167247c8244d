"""A fit as arrays and a spec, and into a store.

Nothing is written before all of it is known to have a place: what cannot be kept without
code is refused with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import Argument, Binding
from xr_aimz.errors import StoreError
from xr_aimz.further import Kept
from xr_aimz.identity import lazy_name
from xr_aimz.model import Site
from xr_aimz.packing import pack
from xr_aimz.source import told
from xr_aimz.storable import stored
from xr_aimz.template import plain
from xr_aimz.vault import Content, keep

__all__ = ["FORMAT", "save"]

FORMAT = 1


def save(fit: Any, store: Any, *, mode: str = "w-") -> None:
    """Write a fit into a Zarr store. See :meth:`xr_aimz.Fit.save`."""
    box = _Box()
    keep(store, box.content, _spec(fit, box), mode)


class _Box:
    """Gathers the arrays of a spec, and the dtypes that they had."""

    def __init__(self) -> None:
        self.content = Content()

    def put(self, group: str, values: np.ndarray, what: str) -> Any:
        """Keep an array under a number; gives its place in the store."""
        number = sum(path.startswith(f"{group}/") for path in self.content.eager)
        path = f"{group}/{number}"
        held, how, _ = stored(values, what)
        self.content.eager[path] = held
        self.content.dims[path] = tuple(f"{group}_{number}_dim_{i}" for i in range(held.ndim))
        return {"path": path, **how}

    def index(self, dim: str, index: pd.Index) -> Any:
        """Keep the labels of a dimension."""
        entry = self.put("labels", xr.IndexVariable(dim, index).values, f"labels of {dim!r}")
        # What pandas has for strings is neither of NumPy's.
        return {**entry, "index": "str"} if index.dtype == "str" else entry

    def pack(self, value: Any, group: str, what: str) -> Any:
        return pack(value, partial(self.put, group, what=what), what)

    def dataset(self, group: str, ds: xr.Dataset) -> dict[str, Any]:
        """Keep a Dataset as a group that xarray and ArviZ read."""
        stacked = [n for n, i in ds.indexes.items() if isinstance(i, pd.MultiIndex)]
        if stacked:
            raise StoreError(
                f"coordinates {stacked!r} of {group} are a MultiIndex, for which Zarr has no "
                f"place; fit on ds.reset_index({stacked[:1]!r})"
            )
        names = [str(n) for n in ds.coords if n not in ds.dims]
        self.content.attrs[group] = _readable(ds.attrs, {"coordinates": names})
        variables = {str(n): self._variable(group, str(n), v) for n, v in ds.variables.items()}
        attrs = self.pack(dict(ds.attrs), "attrs", f"attrs of {group}")
        return {"variables": variables, "coords": [str(n) for n in ds.coords], "attrs": attrs}

    def _variable(self, group: str, name: str, variable: xr.Variable) -> dict[str, Any]:
        path, what = f"{group}/{name}", f"variable {name!r} of {group}"
        entry: dict[str, Any] = {"path": path, "dims": [str(d) for d in variable.dims]}
        entry["attrs"] = self.pack(dict(variable.attrs), "attrs", f"attrs of {what}")
        self.content.dims[path] = tuple(map(str, variable.dims))
        if variable.chunks is None:
            self.content.eager[path], how, told_too = stored(variable.values, what)
        else:
            self.content.lazy[path], how = _lazily(variable, what)
            told_too = {}
            entry["lazy"] = {"name": lazy_name(variable.data), "chunks": list(variable.chunks)}
        self.content.attrs[path] = _readable(variable.attrs, told_too)
        return {**entry, **how}


def _lazily(variable: xr.Variable, what: str) -> tuple[xr.Variable, dict[str, str]]:
    """A dask-backed variable in blocks of one size, of a dtype that is stored as it is."""
    blank, how, _ = stored(np.empty(0, variable.dtype), what)
    if variable.dtype.kind not in "fiubc":
        raise StoreError(f"{what} is lazy and has dtype {variable.dtype}; load it first")
    even = {d: max(c) for d, c in variable.chunksizes.items()}
    return variable.chunk(even).astype(blank.dtype), how


def _readable(attrs: Mapping[Any, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Attrs for other readers, as far as JSON has words for them; the spec has them all."""
    shown = {k: v for k, v in plain(attrs).items() if isinstance(v, (str, int, float, list))}
    return {**shown, **{k: v for k, v in more.items() if v}}


def _spec(fit: Any, box: _Box) -> dict[str, Any]:
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
        "model": told(fit.model),
        "binding": _binding(fit.binding, box),
        "sites": {name: _site(site) for name, site in fit.sites.items()},
        "attrs": box.pack({n: dict(a) for n, a in fit.attrs.items()}, "attrs", "attrs"),
        "datasets": {name: box.dataset(name, ds) for name, ds in groups.items()},
        "params": box.pack(dict(fit.params), "params", "params"),
        "state": box.pack(dict(fit.state), "state", "state"),
        "further": None if fit.more is None else _further(fit.more.kept(), box),
    }


def _further(kept: Kept | None, box: _Box) -> dict[str, Any]:
    """What further draws are taken from; the data are in the groups."""
    if kept is None:
        return {"kind": None}
    origin, inputs = kept.origin, kept.inputs
    return {
        "kind": origin.kind,
        "settings": box.pack(dict(origin.settings), "further", "settings"),
        "by": box.pack(origin.by, "further", "the method"),
        "tree": box.pack(origin.tree, "further", f"the state of {origin.kind}"),
        "first": kept.first,
        "sizes": dict(inputs.sizes),
        "labels": {d: box.index(d, index) for d, index in inputs.labels.items()},
        "coords": box.dataset("coordinates", inputs.coords),
        "scalars": list(inputs.scalars),
    }


def _binding(binding: Binding, box: _Box) -> dict[str, Any]:
    constants = {
        n: box.pack(v, "constants", f"constant {n!r}") for n, v in binding.constants.items()
    }
    labels = {d: box.index(d, index) for d, index in binding.labels.items()}
    concrete = {n: box.pack(v, "concrete", f"argument {n!r}") for n, v in binding.concrete.items()}
    return {
        "arguments": [_argument(a, box) for a in binding.arguments],
        # A key that only such fits have: others are as the first release wrote them.
        **({"concrete": concrete} if concrete else {}),
        "constants": constants,
        "dims": list(binding.dims),
        "core_dims": list(binding.core_dims),
        "layout": binding.layout,
        "labels": labels,
        "per": list(binding.per),
    }


def _argument(argument: Argument, box: _Box) -> dict[str, Any]:
    sources = []
    for source in argument.sources:
        entry: dict[str, Any] = {"key": source.key, "name": source.name}
        entry["dims"] = list(source.dims)
        entry |= {"units": source.units, "shadowed": source.shadowed, "data": None}
        if source.data is not None:
            group = f"given {len([g for g in box.content.attrs if g.startswith('given ')])}"
            entry["data"] = box.dataset(group, source.data.to_dataset(name="data"))
            entry["data_name"] = source.data.name
        sources.append(entry)
    told_too = {"stacked": argument.stacked, "outcome": argument.outcome}
    return {"name": argument.name, "sources": sources, **told_too}


def _site(site: Site) -> dict[str, Any]:
    found = asdict(site)
    found["dtype"] = None if site.dtype is None else np.dtype(site.dtype).name
    for name in ("shape", "dims"):
        found[name] = list(found[name])
    for name in ("lengths", "reads", "seen"):
        found[name] = sorted(found[name])
    found["event_dims"] = None if site.event_dims is None else list(site.event_dims)
    found["plates"] = [list(p.values()) for p in found["plates"]]
    return found
