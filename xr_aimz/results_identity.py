"""What a write of results is known by, part by part, and in what two writes differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from xr_aimz.identity import identify
from xr_aimz.lineage import passing
from xr_aimz.manifest import Manifest
from xr_aimz.record import versions
from xr_aimz.template import plain
from xr_aimz.words import digest

__all__ = ["differences", "manifest_of"]

_SHOWN = 6


def manifest_of(
    ds: xr.Dataset,
    lazy: Mapping[str, xr.Variable],
    options: Mapping[str, Any],
    strings: Mapping[str, str],
) -> Manifest:
    """What is to be written, known by what stays the same in another process.

    Parameters
    ----------
    ds : Dataset
    lazy : mapping of name to Variable
        Those that are written block by block.
    options : mapping of str to value
        How it is written: precision, chunks and shards.
    strings : mapping of variable to dtype
    """
    parts: dict[str, str] = {}
    origins: dict[str, str] = {}
    unnamed: dict[str, None] = {}
    for name, variable in ds.variables.items():
        found = identify(variable)
        title = f"{'coordinate' if name in ds.coords else 'variable'} {str(name)!r}"
        # A store lists its variables, and so their attrs, in another order each time.
        attrs = sorted(plain(variable.attrs).items())
        parts[title] = digest((found.digest, str(variable.dtype), attrs))
        origins |= found.origins
        unnamed |= dict.fromkeys(f"{what} in {str(name)!r}" for what in found.unnamed)
    # The history has the time of day. What was tracked where moves no draw; other versions of
    # these two may.
    left_out = {"history", *passing(ds.attrs)}
    for name, value in plain(ds.attrs).items():
        parts |= {} if name in left_out else {f"attribute {name!r}": repr(value)[:200]}
    parts |= {name: _sorted(value) for name, value in options.items()}
    parts |= {f"the version of {name}": versions()[name] for name in ("jax", "numpyro")}
    return Manifest(
        digest(sorted(parts.items())),
        {name: v.data.npartitions for name, v in lazy.items()},
        parts=parts,
        origins=origins,
        unnamed=tuple(unnamed),
        strings=dict(strings),
    )


def _sorted(value: Any) -> str:
    return repr(dict(sorted(value.items())) if isinstance(value, Mapping) else value)


def differences(there: Manifest, here: Manifest) -> str:
    """In what two writes differ: what they are made from, where that says it, and how."""
    if not there.parts:
        return "another fit, Dataset, seed, option or version of JAX, NumPyro or this package"
    causes = _differing(there.origins, here.origins)
    parts = _differing(there.parts, here.parts)
    values = [p for p in parts if p.startswith(("variable ", "coordinate "))]
    how = [p for p in parts if p not in values]
    listed = [*causes, *how] if causes else [*values, *how]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    text = f"they differ in {'; '.join(listed[:_SHOWN])}{more}"
    if causes and values:
        text += f", which {', '.join(v.partition(' ')[2] for v in values[:_SHOWN])} depends on"
    if lost := sorted({*there.unnamed, *here.unnamed}):
        text += (
            f". There are {'; '.join(lost[:_SHOWN])}: another process cannot tell them to be the "
            "same, so a write of them is taken up by the process that began it alone"
        )
    return text


def _differing(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys([*there, *here])
    return [_told(n, there.get(n), here.get(n)) for n in names if there.get(n) != here.get(n)]


def _told(name: str, there: str | None, here: str | None) -> str:
    """A part, with what it was and is where a person can read that."""
    if there is None or here is None:
        return f"{name} ({'only there' if here is None else 'only here'})"
    plain_text = len(there) < 100 and len(here) < 100 and not {len(there), len(here)} & {32, 64}
    return f"{name} ({there} there, {here} here)" if plain_text else name
