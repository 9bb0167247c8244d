"""What a result says of where it comes from: the fit, the seed, the versions.

It is written into the attrs of the Dataset, where every store keeps it, and has no time
of day in it: equal calls give equal attrs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from xr_aimz.posterior import Fit
from xr_aimz.record import versions

__all__ = ["ASSUMED", "drawn_with", "passing", "traced_to"]

FIT, SEED, VERSIONS = "aimz_fit", "aimz_seed", "aimz_versions"
# The dims along which the caller said that cells are independent, separated by blanks.
ASSUMED = "aimz_assume_independent"
# The names of what else the fit's lineage says: who reads the attrs cannot know them.
MORE = "aimz_lineage"


def traced_to(fit: Fit, result: xr.Dataset, seed: int | None = None) -> xr.Dataset:
    """A result with the token of its fit, the versions and what else the fit's lineage says.

    Parameters
    ----------
    fit : Fit
    result : Dataset
    seed : int, optional
        Left out where nothing was drawn.
    """
    own: dict[str, Any] = {FIT: fit.token, **_now(seed), **fit.lineage}
    if fit.lineage:
        own[MORE] = " ".join(fit.lineage)
    return _bare(result).assign_attrs(own)


def drawn_with(result: xr.Dataset, seed: int) -> xr.Dataset:
    """A result that no fit stands behind: draws of a prior."""
    return _bare(result).assign_attrs(_now(seed))


def passing(attrs: Mapping[str, Any]) -> tuple[str, ...]:
    """The attrs that are not of the values: versions, and where the fit was tracked."""
    return (VERSIONS, MORE, *str(attrs.get(MORE, "")).split())


def _now(seed: int | None) -> dict[str, Any]:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {VERSIONS: found} | ({} if seed is None else {SEED: int(seed)})


def _bare(result: xr.Dataset) -> xr.Dataset:
    """Without what its inputs, which may be results themselves, come from."""
    strange = {FIT, SEED, *passing(result.attrs)}
    return result.drop_attrs(deep=False).assign_attrs(
        {name: value for name, value in result.attrs.items() if name not in strange}
    )
