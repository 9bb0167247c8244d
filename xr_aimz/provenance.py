"""Record the origin of a result in its attrs: the token of its fit, the seed, the versions.

The attrs hold no time of day, so equal calls give equal attrs.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import xarray as xr

FIT, SEED, VERSIONS = "aimz_fit", "aimz_seed", "aimz_versions"
# The dims along which the caller declared that cells are independent, separated by spaces.
ASSUMED = "aimz_assume_independent"
# The names of the other attrs of the fit's lineage, which a reader of the attrs cannot infer.
MORE = "aimz_lineage"


def add_provenance(
    result: xr.Dataset, token: str, lineage: Mapping[str, str], seed: int | None = None
) -> xr.Dataset:
    """Add to a result's attrs the token of its fit, the versions, the seed and the fit's lineage.

    Parameters
    ----------
    result : Dataset
    token : str
        Token of the fit.
    lineage : mapping of str to str
        Attrs that record where the fit was tracked.
    seed : int, optional
        Omitted for a result without sampling.
    """
    attrs: dict[str, Any] = {FIT: token, **_version_attrs(seed), **lineage}
    if lineage:
        attrs[MORE] = " ".join(lineage)
    return _drop_provenance(result).assign_attrs(attrs)


def add_prior_provenance(result: xr.Dataset, seed: int) -> xr.Dataset:
    """Add to the attrs of prior draws, which have no fit, the versions and the seed."""
    return _drop_provenance(result).assign_attrs(_version_attrs(seed))


def transient_attrs(attrs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of attrs that do not depend on the values: versions and lineage."""
    return (VERSIONS, MORE, *str(attrs.get(MORE, "")).split())


def _version_attrs(seed: int | None) -> dict[str, Any]:
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return {VERSIONS: versions} | ({} if seed is None else {SEED: int(seed)})


def _drop_provenance(result: xr.Dataset) -> xr.Dataset:
    """Drop the provenance attrs inherited from inputs, which may be results themselves."""
    inherited = {FIT, SEED, *transient_attrs(result.attrs)}
    return result.drop_attrs(deep=False).assign_attrs(
        {name: value for name, value in result.attrs.items() if name not in inherited}
    )


_CORE_PACKAGES = ("dask", "jax", "jaxlib", "numpy", "numpyro", "xarray", "xr_aimz", "zarr")
# These take part in a fit only if they have been imported.
_OPTIONAL_PACKAGES = ("flax", "optax")


def package_versions() -> dict[str, str]:
    """Return the version of Python and of each package that affects a fit, by name."""
    names = [*_CORE_PACKAGES, *(n for n in _OPTIONAL_PACKAGES if n in sys.modules)]
    return {"python": platform.python_version(), **{n: _version(n) for n in sorted(names)}}


@functools.cache
def _version(package: str) -> str:
    return version(package)
