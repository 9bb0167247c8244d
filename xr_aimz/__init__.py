"""NumPyro models on labelled xarray Datasets.

Importing this package registers ``Dataset.aimz`` and imports neither JAX nor NumPyro:
those come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from xr_aimz import accessor as accessor
from xr_aimz import errors
from xr_aimz.options import get_options, set_options

if TYPE_CHECKING:
    from xr_aimz.fits import Fit, describe, fit, from_posterior, load_fit
    from xr_aimz.prediction import (
        intervene,
        log_likelihood,
        predict,
        prior_predictive,
        summary,
    )
    from xr_aimz.storage import open_zarr, to_zarr
    from xr_aimz.tracing import plate

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

# The folder of each public name: imported with the first one that is used.
_FOLDERS = {
    "Fit": "fits",
    "describe": "fits",
    "fit": "fits",
    "from_posterior": "fits",
    "intervene": "prediction",
    "load_fit": "fits",
    "log_likelihood": "prediction",
    "open_zarr": "storage",
    "plate": "tracing",
    "predict": "prediction",
    "prior_predictive": "prediction",
    "summary": "prediction",
    "to_zarr": "storage",
}


def __getattr__(name: str) -> Any:
    if name == "mlflow":
        # An extra, and so in no list of names: all of them are there without it.
        return import_module("xr_aimz.mlflow")
    if name not in _FOLDERS:
        raise AttributeError(f"module 'xr_aimz' has no attribute {name!r}")
    return getattr(import_module(f"xr_aimz.{_FOLDERS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
