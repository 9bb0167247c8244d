"""An MLflow model as a fit again, or as what a scoring server asks.

The model is code, and code is imported only where whoever loads says so: in the call, or for a
server in the configuration of the saved model, which the server's environment overrides
(docs/decisions/serving.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.utils.model_utils import (
    _add_code_from_conf_to_system_path,
    _get_flavor_configuration,
)

from xr_aimz.errors import AimzError, ModelError
from xr_aimz.flavour import archive
from xr_aimz.flavour.layout import FLAVOUR, STORE, TRUST
from xr_aimz.flavour.predictor import Predictor
from xr_aimz.posterior import Fit

__all__ = ["load_model", "load_pyfunc"]


def load_model(
    model_uri: str | Path,
    model: Callable | None = None,
    *,
    trust_import: bool = False,
    dst_path: str | None = None,
) -> Fit:
    """The fit behind an MLflow model.

    Parameters
    ----------
    model_uri : str
        ``models:/melt@champion``, ``runs:/<run_id>/model``, a folder, as MLflow takes it.
    model : callable, optional
        The NumPyro model. No code of the saved one is then imported.
    trust_import : bool, default False
        Import the model from the code saved with it, or from where it was defined. This runs
        code of whoever saved it. What the saved model says of trust is not looked at.
    dst_path : str, optional
        A folder to download to.

    Returns
    -------
    Fit
        Which predicts as before, with the run that logged it in its lineage.

    Raises
    ------
    ModelError, DamagedStoreError
        As :func:`xr_aimz.load_fit` does.

    Examples
    --------
    >>> fit = xr_aimz.mlflow.load_model("models:/melt@champion", melting)  # doctest: +SKIP
    >>> ds.aimz.predict(fit)  # doctest: +SKIP
    """
    folder = Path(_download_artifact_from_uri(str(model_uri), output_path=dst_path))
    flavour = _get_flavor_configuration(str(folder), FLAVOUR)
    if trust_import and model is None:
        # Which puts a folder of the saver's before all others: not without trust.
        _add_code_from_conf_to_system_path(str(folder), flavour)
    fit = archive.read(folder / STORE, model, trust_import=trust_import)
    run = Model.load(str(folder)).run_id
    return fit if run is None else replace(fit, lineage={"mlflow_run_id": run, **fit.lineage})


class _Answering(Predictor):
    """What is wrong with a request is told to whoever sent it, by MLflow's own exception."""

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        try:
            return super().predict(model_input, params)
        except AimzError as error:
            # Of any other the scoring server keeps the message to itself, and shows a traceback.
            raise MlflowException.invalid_parameter_value(
                f"{type(error).__name__}: {error}"
            ) from error


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """What ``mlflow.pyfunc.load_model`` calls; ``model_config`` says whether code is trusted."""
    # Nothing but true is a yes: "false" as text would be one.
    if (model_config or {}).get(TRUST) is not True:
        raise ModelError(
            "this model was saved without trust_import=True, and serving it imports its code. If "
            "you trust whoever saved it, say so: mlflow.pyfunc.load_model(uri, model_config="
            "{'trust_import': True}), or for a server the environment variable "
            "MLFLOW_PYFUNC_INFERENCE_CONFIG='{\"trust_import\": true}'"
        )
    return _Answering(archive.read(Path(path), None, trust_import=True))
