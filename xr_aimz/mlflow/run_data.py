"""Describe a fit as params, tags, metrics, curves and data digests, within MLflow's limits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.fits import Fit, model_reference
from xr_aimz.storage import identify

# Limits of current MLflow, in characters; older servers have lower ones, and would refuse.
KEY, VALUE, TAG = 250, 6000, 8000
_INVALID = re.compile(r"[^\w.\- ]")


def fit_params(fit: Fit) -> dict[str, str]:
    """Return options, the binding, dims and sizes as text within MLflow's limits.

    Returns
    -------
    dict of str to str
        Mappings are flattened with a dot, ``batch.time``; lists are joined by commas, and
        left out if they are empty.
    """
    return {
        valid_key(name): truncated_text(value, VALUE)
        for name, value in _flatten_mapping(fit_facts(fit))
        if value != []
    }


def fit_facts(fit: Fit) -> dict[str, Any]:
    """Return model, binding, options, arguments and sizes of a fit as nested mappings for JSON."""
    binding = fit.binding
    bound = {a.name: [s.name for s in a.sources] for a in binding.arguments}
    constants = {name: _short_constant(value) for name, value in binding.constants.items()}
    model_facts = {
        "model": getattr(fit.model, "__name__", type(fit.model).__name__),
        "dim": list(binding.dims),
        "core_dim": list(binding.core_dims),
        "per": list(binding.per),
        "layout": binding.layout,
    }
    sizes = {**fit.constant_data.sizes, **fit.observed_data.sizes}
    mappings = {"argument": {**bound, **constants}, "size": {str(d): n for d, n in sizes.items()}}
    return {**model_facts, **fit.options, **mappings}


def fit_tags(fit: Fit) -> dict[str, str]:
    """Return the fit's token, its concerns, the hash of the model's source, and versions."""
    concerns = "not looked for" if fit.concerns is None else "; ".join(fit.concerns) or "none"
    digest = model_reference(fit.model)["sha256"]
    tags = {
        "xr_aimz.fit": fit.token,
        "xr_aimz.method": fit.method,
        "xr_aimz.concerns": concerns,
        **({} if digest is None else {"xr_aimz.model_sha256": digest}),
        **{f"xr_aimz.version.{name}": version for name, version in fit.versions.items()},
    }
    return {valid_key(name): truncated_text(value, TAG) for name, value in tags.items()}


def valid_key(name: str) -> str:
    """Make a name valid for MLflow: other characters become ``_``, and a long name ends in a hash.

    Examples
    --------
    >>> valid_key("size.lat/lon (deg)")
    'size.lat_lon _deg_'
    """
    # A name that starts with a dot could be a path out of its folder.
    plain = _INVALID.sub("_", name).lstrip(".")
    if plain and len(plain) <= KEY:
        return plain
    return f"{plain[: KEY - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def truncated_text(value: Any, limit: int) -> str:
    """Return a value as text of at most ``limit`` characters, ending in ``...`` if truncated."""
    if isinstance(value, (list, tuple)):
        plain = all(isinstance(part, (str, int, float)) for part in value)
        value = ",".join(map(str, value)) if plain else json.dumps(value)
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _flatten_mapping(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flatten_mapping(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short_constant(value: Any) -> Any:
    """Return a plain constant unchanged, an array as dtype and shape, other values as a name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"array of {value.dtype} {tuple(value.shape)}"
    return getattr(value, "__name__", type(value).__name__)


_WORST: dict[str, Callable] = {"rhat": np.nanmax, "ess_bulk": np.nanmin, "ess_tail": np.nanmin}


def has_chains(fit: Fit) -> bool:
    """Return whether R-hat and effective sample sizes apply to the draws, as at the fit."""
    return fit.losses is None and ("diverging" in fit.sample_stats or not fit.binding.per)


def chain_diagnostics(fit: Fit) -> xr.Dataset:
    """Return R-hat and effective sample sizes of chains; an empty Dataset for other draws."""
    return fit.diagnostics() if has_chains(fit) else xr.Dataset()


def fit_metrics(fit: Fit, table: xr.Dataset) -> dict[str, float]:
    """Return metrics of the fit as a whole, and for ``per`` the number of cells by status.

    Parameters
    ----------
    fit : Fit
    table : Dataset
        From :func:`chain_diagnostics`.

    Returns
    -------
    dict of str to float
        Finite numbers: ``rhat_max``, ``ess_bulk_min``, ``ess_tail_min``, ``divergences``,
        ``loss_last`` and ``concerns``, as far as the method has them; with ``per`` also ``cells``
        and ``cells_ok``, ``cells_no_data`` ... by status.
    """
    metrics = {"concerns": float(len(fit.concerns))} if fit.concerns is not None else {}
    metrics |= _worst_values(table)
    if "diverging" in fit.sample_stats:
        metrics["divergences"] = float(fit.sample_stats.diverging.sum())
    if fit.losses is not None and fit.losses.size:
        last = fit.losses.isel(step=-1).values
        metrics["loss_last"] = float(np.median(last[np.isfinite(last)])) if last.size else np.nan
    metrics |= _cell_counts(fit)
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _worst_values(table: xr.Dataset) -> dict[str, float]:
    names = {"rhat": "rhat_max", "ess_bulk": "ess_bulk_min", "ess_tail": "ess_tail_min"}
    result = {}
    for kind, worst in _WORST.items():
        arrays = [a.sel(diagnostic=kind).values for a in table.values() if "diagnostic" in a.dims]
        values = np.concatenate([a.ravel() for a in arrays]) if arrays else np.empty(0)
        if np.isfinite(values).any():
            result[names[kind]] = float(worst(values))
    return result


def _cell_counts(fit: Fit) -> dict[str, float]:
    status = fit.sample_stats.get("status")
    if status is None:
        return {}
    flags = enumerate(status.attrs["flag_meanings"].split())
    counts = {valid_key(f"cells_{flag}"): float((status == i).sum()) for i, flag in flags}
    return {"cells": float(status.size), **counts}


POINTS = 1000
_OVER_CELLS = {"loss_median": 0.5, "loss_q05": 0.05, "loss_q95": 0.95}


@dataclass(frozen=True)
class Curve:
    """Values by step; each is the mean of ``every`` losses of the fit."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    every: int


def loss_curves(losses: xr.DataArray, points: int = POINTS) -> list[Curve]:
    """Return the curves of a fit's losses, with at most ``points`` points each.

    Parameters
    ----------
    losses : DataArray
        ``(step, *per)``.
    """
    count = losses.sizes["step"]
    steps = losses["step"].values if "step" in losses.coords else np.arange(count)
    values = losses.transpose("step", ...).values.reshape(count, -1)
    every = max(-(-count // points), 1)
    edges = np.arange(0, count, every)
    ends = np.append(edges[1:], count)
    means = np.add.reduceat(values, edges, axis=0, dtype=float) / (ends - edges)[:, None]
    last_steps = steps[ends - 1]
    if losses.ndim == 1:
        return [Curve("loss", last_steps, means[:, 0], every)]
    return [
        Curve(name, last_steps, over, every) for name, over in _quantiles_over_cells(means).items()
    ]


def _quantiles_over_cells(values: np.ndarray) -> dict[str, np.ndarray]:
    """Compute quantiles of each row over the cells that have any finite loss."""
    finite_cells = values[:, np.isfinite(values).any(axis=0)]
    if not finite_cells.size:
        return {}
    # A loss that is not finite counts as infinite: worse than any other.
    worst = np.where(np.isfinite(finite_cells), finite_cells, np.inf)
    quantiles = np.quantile(worst, list(_OVER_CELLS.values()), axis=1, method="nearest")
    return dict(zip(_OVER_CELLS, quantiles, strict=True))


# MLflow's limits are 36 characters for a digest, 500 for a name.
DIGEST, DATA_NAME = 32, 500
LISTED = 200
CONTENT, GRAPH, FILE = "content", "dask graph", "file name, size and time"
_CHUNK_SIZE = 2**24


@dataclass(frozen=True)
class DataDigest:
    """Digest of the data of a fit.

    ``of`` names the kinds of content that were hashed. ``schema`` is in MLflow's own form;
    ``variables`` has for each variable its digest and the kind of content that was hashed.
    """

    name: str
    digest: str
    of: str
    schema: dict[str, Any]
    variables: dict[str, dict[str, Any]]


def describe_data(fit: Fit) -> DataDigest:
    """Describe the outcomes and inputs of a fit, hashed by content if they are in memory."""
    outcomes = {str(name): a for name, a in fit.observed_data.items()}
    inputs = {str(name): a for name, a in fit.constant_data.items()}
    # Labels are inputs, whichever variables have the dim.
    for group in (fit.observed_data, fit.constant_data):
        inputs |= {str(d): group.coords[d] for d in group.dims if d in group.coords}
    variables = {name: _describe_array(a) for name, a in {**inputs, **outcomes}.items()}
    hasher = hashlib.sha256()
    for name, description in sorted(variables.items()):
        hasher.update(repr((name, description["digest"])).encode())
    schema = {
        "mlflow_tensorspec": {"features": _schema_json(inputs), "targets": _schema_json(outcomes)}
    }
    return DataDigest(
        name=",".join(outcomes)[:DATA_NAME] or "data",
        digest=hasher.hexdigest()[:DIGEST],
        of="; ".join(sorted({v["digest_of"] for v in variables.values()})),
        schema=schema,
        variables=dict(list(variables.items())[:LISTED]),
    )


def _describe_array(array: xr.DataArray) -> dict[str, Any]:
    digest, kind = _digest(array.variable)
    return {
        "dims": list(map(str, array.dims)),
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "digest": digest,
        "digest_of": kind,
    }


def _digest(variable: xr.Variable) -> tuple[str, str]:
    hasher = hashlib.sha256(repr((variable.dims, variable.dtype, variable.shape)).encode())
    if variable.chunks is not None or not variable._in_memory:
        hasher.update(identify(variable).digest.encode())
        kind = GRAPH if variable.chunks is not None else FILE
    else:
        for part in _content_bytes(variable.values):
            hasher.update(part)
        kind = CONTENT
    return hasher.hexdigest()[:DIGEST], kind


def _content_bytes(values: np.ndarray) -> Iterable[bytes]:
    if values.dtype.kind == "O":
        # Strings and cftime dates: their text, since the bytes are addresses.
        yield from (f"{part!r}\0".encode() for part in values.flat)
        return
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK_SIZE):
        yield flat[start : start + _CHUNK_SIZE].tobytes()


def _schema_json(arrays: dict[str, xr.DataArray]) -> str:
    """Return names, dtypes and shapes of up to :data:`LISTED` variables, as JSON for MLflow."""
    listed = list(arrays.items())[:LISTED]
    specs = [
        {
            "name": name,
            "type": "tensor",
            "tensor-spec": {"dtype": str(a.dtype), "shape": list(a.shape)},
        }
        for name, a in listed
    ]
    return json.dumps(specs)
