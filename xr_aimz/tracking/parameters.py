"""A fit as parameters and tags: short texts by name, as a tracking server can search them.

A server bounds names and values. What is cut here is whole in the artifact ``fit.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xr_aimz.posterior import Fit
from xr_aimz.source import told

__all__ = ["KEY", "facts", "key", "parameters", "tags", "text"]

# MLflow's own limits; older servers cut at less, and would refuse.
KEY, VALUE, TAG = 250, 6000, 8000
_STRANGE = re.compile(r"[^\w.\- ]")


def parameters(fit: Fit) -> dict[str, str]:
    """Options, the binding, dims and sizes, as texts within MLflow's limits.

    Returns
    -------
    dict of str to str
        Mappings are flattened with a dot, ``batch.time``; lists are joined by commas, and
        left out where they are empty.
    """
    return {key(name): text(value, VALUE) for name, value in _flat(facts(fit)) if value != []}


def facts(fit: Fit) -> dict[str, Any]:
    """How a fit was made, nested and uncut: what JSON can hold."""
    binding = fit.binding
    bound = {a.name: [s.name for s in a.sources] for a in binding.arguments}
    constants = {name: _short(value) for name, value in binding.constants.items()}
    own = {
        "model": getattr(fit.model, "__name__", type(fit.model).__name__),
        "dim": list(binding.dims),
        "core_dim": list(binding.core_dims),
        "per": list(binding.per),
        "layout": binding.layout,
    }
    sizes = {**fit.constant_data.sizes, **fit.observed_data.sizes}
    more = {"argument": {**bound, **constants}, "size": {str(d): n for d, n in sizes.items()}}
    return {**own, **fit.options, **more}


def tags(fit: Fit) -> dict[str, str]:
    """The fit's token, what speaks against it, the model's hash, and versions."""
    concerns = "not looked for" if fit.concerns is None else "; ".join(fit.concerns) or "none"
    digest = told(fit.model)["sha256"]
    found = {
        "xr_aimz.fit": fit.token,
        "xr_aimz.method": fit.method,
        "xr_aimz.concerns": concerns,
        **({} if digest is None else {"xr_aimz.model_sha256": digest}),
        **{f"xr_aimz.version.{name}": version for name, version in fit.versions.items()},
    }
    return {key(name): text(value, TAG) for name, value in found.items()}


def key(name: str) -> str:
    """A name that MLflow takes: other characters become ``_``, and a long one ends in a hash.

    Examples
    --------
    >>> key("size.lat/lon (deg)")
    'size.lat_lon _deg_'
    """
    # A name that starts with a dot could be a path out of its folder.
    plain = _STRANGE.sub("_", name).lstrip(".")
    if plain and len(plain) <= KEY:
        return plain
    return f"{plain[: KEY - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def text(value: Any, limit: int) -> str:
    """A value as text of at most ``limit`` characters; what is cut ends in ``...``."""
    if isinstance(value, (list, tuple)):
        plain = all(isinstance(part, (str, int, float)) for part in value)
        value = ",".join(map(str, value)) if plain else json.dumps(value)
    whole = str(value)
    return whole if len(whole) <= limit else f"{whole[: limit - 3]}..."


def _flat(nested: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _short(value: Any) -> Any:
    """A constant as it is if it is plain; an array by its shape, anything else by its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"array of {value.dtype} {tuple(value.shape)}"
    return getattr(value, "__name__", type(value).__name__)
