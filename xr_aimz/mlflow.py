"""Fits in MLflow: ``log_model``, ``save_model``, ``load_model``, and models that are served.

Needs the extra ``mlflow``. What a served fit takes and gives is told in the rooms of
:mod:`xr_aimz.flavour`.
"""

from __future__ import annotations

from xr_aimz.errors import MissingExtraError

try:
    import mlflow as _  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f'xr_aimz.mlflow needs {error.name}, which is not installed: pip install "xr_aimz[mlflow]"'
    ) from error

from xr_aimz.flavour.environment import get_default_conda_env, get_default_pip_requirements
from xr_aimz.flavour.example import input_example
from xr_aimz.flavour.loaded import load_model
from xr_aimz.flavour.loaded import load_pyfunc as _load_pyfunc  # noqa: F401 (MLflow calls it)
from xr_aimz.flavour.models import log_model, save_model
from xr_aimz.flavour.signature import infer_signature

__all__ = [
    "get_default_conda_env",
    "get_default_pip_requirements",
    "infer_signature",
    "input_example",
    "load_model",
    "log_model",
    "save_model",
]
