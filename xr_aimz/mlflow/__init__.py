"""Log fits to MLflow; save, load and serve them as MLflow models.

A Fit comes in; a run with its params, metrics and files comes out (``autolog``, ``log_fit``), or
a model that predicts for tables whose rows are labels of the observation dims. Needs the extra
``mlflow``.
"""

from xr_aimz.errors import MissingExtraError

try:
    import mlflow as _mlflow  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f'xr_aimz.mlflow needs {error.name}, which is not installed: pip install "xr_aimz[mlflow]"'
    ) from error

from xr_aimz.mlflow.autolog import autolog, log_fit
from xr_aimz.mlflow.loading import load_model
from xr_aimz.mlflow.loading import load_pyfunc as _load_pyfunc  # noqa: F401 (MLflow calls it)
from xr_aimz.mlflow.model import (
    get_default_conda_env,
    get_default_pip_requirements,
    log_model,
    save_model,
)
from xr_aimz.mlflow.signature import infer_signature, input_example

__all__ = [
    "autolog",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "infer_signature",
    "input_example",
    "load_model",
    "log_fit",
    "log_model",
    "save_model",
]
