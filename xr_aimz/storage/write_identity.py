"""Identify a write by digests of everything it is computed from, and describe how two differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from xr_aimz.provenance import package_versions, transient_attrs
from xr_aimz.storage.blocks import json_attrs
from xr_aimz.storage.canonical import form_digest
from xr_aimz.storage.completeness import Manifest
from xr_aimz.storage.identity import identify

_SHOWN = 6


def make_manifest(
    ds: xr.Dataset,
    lazy: Mapping[str, xr.Variable],
    options: Mapping[str, Any],
    strings: Mapping[str, str],
) -> Manifest:
    """Return the manifest of a write, from digests that are equal in another process.

    Parameters
    ----------
    ds : Dataset
    lazy : mapping of name to Variable
        Variables that are written block by block.
    options : mapping of str to value
        Settings of the write: precision, chunks and shards.
    strings : mapping of variable to dtype
    """
    parts: dict[str, str] = {}
    origins: dict[str, str] = {}
    unnamed: dict[str, None] = {}
    for name, variable in ds.variables.items():
        identity = identify(variable)
        title = f"{'coordinate' if name in ds.coords else 'variable'} {str(name)!r}"
        # A store lists its variables, and so their attrs, in an order that may differ each time.
        attrs = sorted(json_attrs(variable.attrs).items())
        parts[title] = form_digest((identity.digest, str(variable.dtype), attrs))
        origins |= identity.origins
        unnamed |= dict.fromkeys(f"{what} in {str(name)!r}" for what in identity.unnamed)
    # The history contains the time of day. Where a fit was tracked changes no draw; other versions
    # of JAX and NumPyro may.
    skipped = {"history", *transient_attrs(ds.attrs)}
    for name, value in json_attrs(ds.attrs).items():
        parts |= {} if name in skipped else {f"attribute {name!r}": repr(value)[:200]}
    parts |= {name: _format_option(value) for name, value in options.items()}
    parts |= {f"the version of {name}": package_versions()[name] for name in ("jax", "numpyro")}
    return Manifest(
        form_digest(sorted(parts.items())),
        {name: v.data.npartitions for name, v in lazy.items()},
        parts=parts,
        origins=origins,
        unnamed=tuple(unnamed),
        strings=dict(strings),
    )


def _format_option(value: Any) -> str:
    return repr(dict(sorted(value.items())) if isinstance(value, Mapping) else value)


def describe_differences(stored: Manifest, new: Manifest) -> str:
    """Describe how two writes differ: in their source data, or else values, and in options."""
    if not stored.parts:
        return "another fit, Dataset, seed, option or version of JAX, NumPyro or this package"
    causes = _list_differences(stored.origins, new.origins)
    parts = _list_differences(stored.parts, new.parts)
    values = [p for p in parts if p.startswith(("variable ", "coordinate "))]
    others = [p for p in parts if p not in values]
    listed = [*causes, *others] if causes else [*values, *others]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    text = f"they differ in {'; '.join(listed[:_SHOWN])}{more}"
    if causes and values:
        text += f", which {', '.join(v.partition(' ')[2] for v in values[:_SHOWN])} depends on"
    if unnamed := sorted({*stored.unnamed, *new.unnamed}):
        text += (
            f". There are {'; '.join(unnamed[:_SHOWN])}: another process cannot tell them to be "
            "the same, so a write of them is taken up by the process that began it alone"
        )
    return text


def _list_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    return [_describe_part(n, old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)]


def _describe_part(name: str, old: str | None, new: str | None) -> str:
    """Describe a part that differs, with both values where they are short text."""
    if old is None or new is None:
        return f"{name} ({'only there' if new is None else 'only here'})"
    plain_text = len(old) < 100 and len(new) < 100 and not {len(old), len(new)} & {32, 64}
    return f"{name} ({old} there, {new} here)" if plain_text else name
