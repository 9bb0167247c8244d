"""A fit as an MLflow model: saved, logged and registered, loaded, served.

The folder holds ``fit/fit.zarr``, what ``fit.save`` writes, and MLflow's own files. Nothing in
it is a pickle unless that is asked for. The model is code, and code is imported only where
whoever loads says so: docs/decisions/serving.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import pyfunc
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _add_code_from_conf_to_system_path,
    _copy_extra_files,
    _get_flavor_configuration,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)

from xr_aimz.errors import ModelError, OptionError
from xr_aimz.flavour.environment import FILES, Environment, write_environment
from xr_aimz.flavour.example import input_example as example_of
from xr_aimz.flavour.predictor import Predictor
from xr_aimz.flavour.signature import infer_signature
from xr_aimz.posterior import Fit
from xr_aimz.saving import load_fit, save

__all__ = ["load_model", "load_pyfunc", "log_model", "save_model"]

FLAVOUR = "xr_aimz"
_LOADER = "xr_aimz.mlflow"
_FOLDER = "fit"
_STORE = "fit.zarr"
_PICKLE = "model.pkl"
_TRUST = "trust_import"
