"""NumPyro models on labelled xarray Datasets.

Importing this package registers ``Dataset.aimz`` and imports neither JAX nor NumPyro:
those come with the first name that needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from xr_aimz import accessor as accessor
from xr_aimz import errors
from xr_aimz.options import get_options, set_options

if TYPE_CHECKING:
    from xr_aimz.describe import describe
    from xr_aimz.effects import intervene
    from xr_aimz.fit import fit
    from xr_aimz.from_posterior import from_posterior
    from xr_aimz.loading import load_fit
    from xr_aimz.plates import plate
    from xr_aimz.posterior import Fit
    from xr_aimz.predict import log_likelihood, predict
    from xr_aimz.prior import prior_predictive
    from xr_aimz.store import open_zarr, to_zarr
    from xr_aimz.summary import summary

__version__ = _version("xr_aimz")
__all__ = [
    "Fit",
    "describe",
    "errors",
    "fit",
    "from_posterior",
    "get_options",
    "intervene",
    "load_fit",
    "log_likelihood",
    "open_zarr",
    "plate",
    "predict",
    "prior_predictive",
    "set_options",
    "summary",
    "to_zarr",
]

_ROOMS = {
    "Fit": "posterior",
    "describe": "describe",
    "fit": "fit",
    "from_posterior": "from_posterior",
    "intervene": "effects",
    "load_fit": "loading",
    "log_likelihood": "predict",
    "open_zarr": "store",
    "plate": "plates",
    "predict": "predict",
    "prior_predictive": "prior",
    "summary": "summary",
    "to_zarr": "store",
}


class _Package(ModuleType):
    """Keeps ``xr_aimz.fit`` the function: importing the room ``fit`` would put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # A model that names the package is pickled with it; a module's subclass is not known.
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "mlflow":
        # An extra, and so in no list of names: all of them are there without it.
        return import_module("xr_aimz.mlflow")
    if name not in _ROOMS:
        raise AttributeError(f"module 'xr_aimz' has no attribute {name!r}")
    return getattr(import_module(f"xr_aimz.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
