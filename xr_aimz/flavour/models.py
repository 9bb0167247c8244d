"""A fit as an MLflow model: saved, logged and registered, loaded, served.

The folder holds ``fit/fit.zarr``, what ``fit.save`` writes, and MLflow's own files. Nothing in
it is a pickle unless that is asked for. The model is code, and code is imported only where
whoever loads says so: docs/decisions/serving.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient, pyfunc
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


@dataclass(frozen=True)
class _Code:
    """How a process that loads the model is to come by it."""

    trust_import: bool
    pickled: bool
    paths: list[str] | None

    def check(self, model: Callable) -> None:
        """Refuse what no other process could import."""
        where, name = getattr(model, "__module__", None), getattr(model, "__qualname__", "")
        importable = where not in (None, "__main__") and "<" not in name and name
        if self.trust_import and not self.pickled and not importable:
            raise ModelError(
                f"trust_import=True, and the model {name or model!r} of module {where!r} cannot be "
                "imported elsewhere. Define it at the top of a module, and give that: "
                "code_paths=['my_models.py']; or ask for a pickle: pickle_model=True"
            )


def save_model(
    fit: Fit,
    path: str | Path,
    *,
    trust_import: bool = False,
    pickle_model: bool = False,
    defaults: Mapping[str, Any] | None = None,
    signature: Any = None,
    input_example: Any = None,
    code_paths: list[str] | None = None,
    conda_env: Any = None,
    pip_requirements: Any = None,
    extra_pip_requirements: Any = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[Any] | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Save a fit as an MLflow model in a folder.

    Parameters
    ----------
    fit : Fit
    path : path
        A folder that is not there yet, or is empty.
    trust_import : bool, default False
        What is written down for processes that *serve* the model: whether they may import its
        code. They can be told otherwise, ``MLFLOW_PYFUNC_INFERENCE_CONFIG='{"trust_import":
        false}'``. :func:`load_model` does not look at it.
    pickle_model : bool, default False
        Keep the model's function as a pickle of cloudpickle, for one that is in no module.
    defaults : mapping, optional
        Defaults of a request's parameters: ``{"quantiles": [0.1, 0.9], "draws": 200}``.
    signature : ModelSignature or False, optional
        By default that of the binding, for which the input example is answered once; ``False``
        for none.
    input_example : DataFrame or False, optional
        By default the first rows of the fit's own data; ``False`` for none.
    code_paths : list of path, optional
        Files and folders that the model is imported from; they are copied into the model.
    conda_env, pip_requirements, extra_pip_requirements, metadata, extra_files, mlflow_model
        As MLflow's own flavours take them. Where no requirements are given, a process of its
        own loads the model to see what it imports, some ten seconds.

    Raises
    ------
    ModelError
        A model that cannot be imported elsewhere, with ``trust_import``; one that couples rows,
        and so cannot be served (``signature=False`` saves it all the same).
    OptionError
        ``defaults`` with a signature of the caller's, which has its own.

    Examples
    --------
    >>> xr_aimz.mlflow.save_model(fit, "melt")  # doctest: +SKIP
    >>> xr_aimz.mlflow.load_model("melt", model=melting)  # doctest: +SKIP
    """
    environment = Environment(conda_env, pip_requirements, extra_pip_requirements)
    code = _Code(trust_import, pickle_model, code_paths)
    code.check(fit.model)
    folder = Path(path).absolute()
    described = mlflow_model or Model()
    _describe(described, fit, defaults, signature)
    if metadata is not None:
        described.metadata = metadata
    _validate_and_prepare_target_save_path(str(folder))
    example = example_of(fit) if input_example is None else input_example
    _save_example(described, None if example is False else example, str(folder))
    _write_fit(fit, folder / _FOLDER, pickle_model)
    _add_flavours(described, folder, code, extra_files)
    described.save(str(folder / MLMODEL_FILE_NAME))
    write_environment(folder, environment, FLAVOUR, cloudpickle=pickle_model)


def _describe(
    described: Model, fit: Fit, defaults: Mapping[str, Any] | None, signature: Any
) -> None:
    if defaults is not None and signature is not None:
        raise OptionError(
            f"defaults={defaults!r} go into a signature, and signature= is given; make it with "
            "xr_aimz.mlflow.infer_signature(fit, defaults)"
        )
    if signature is None:
        signature = infer_signature(fit, defaults)
    if signature is not False:
        described.signature = signature


def _write_fit(fit: Fit, folder: Path, pickle_model: bool) -> None:
    folder.mkdir()
    save(fit, folder / _STORE)
    if pickle_model:
        import cloudpickle

        (folder / _PICKLE).write_bytes(cloudpickle.dumps(fit.model))


def _add_flavours(
    described: Model, folder: Path, code: _Code, extra_files: list[Any] | None
) -> None:
    copied = _validate_and_copy_code_paths(code.paths, str(folder))
    extra = _copy_extra_files(extra_files, str(folder))
    pyfunc.add_to_model(
        described,
        loader_module=_LOADER,
        data=_FOLDER,
        code=copied,
        # There whatever it says, so that whoever serves the model can say otherwise.
        model_config={_TRUST: code.trust_import},
        **FILES,
    )
    pickled = {"pickled_model": f"{_FOLDER}/{_PICKLE}"} if code.pickled else {}
    described.add_flavor(
        FLAVOUR, xr_aimz_version=version("xr_aimz"), data=_FOLDER, code=copied, **pickled, **extra
    )
    if size := get_total_file_size(str(folder)):
        described.model_size_bytes = size


def log_model(
    fit: Fit,
    name: str = "model",
    *,
    registered_model_name: str | None = None,
    alias: str | None = None,
    await_registration_for: int | None = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    params: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    model_id: str | None = None,
    trust_import: bool = False,
    **saving: Any,
) -> Any:
    """Log a fit as a model of the active run, or of none, and register it.

    Parameters
    ----------
    fit : Fit
    name : str, default "model"
    registered_model_name : str, optional
        Make a version of this registered model, which is made if it is not there.
    alias : str, optional
        An alias for that version: ``models:/melt@champion``.
    await_registration_for, params, tags, model_type, step, model_id
        As MLflow's own flavours take them; ``params`` are those that MLflow shows with the model.
    trust_import, **saving
        As in :func:`save_model`.

    Returns
    -------
    mlflow.models.model.ModelInfo

    Raises
    ------
    OptionError
        An alias without a registered model.
    ModelError
        As :func:`save_model` does.

    Examples
    --------
    >>> with mlflow.start_run():  # doctest: +SKIP
    ...     xr_aimz.mlflow.log_model(
    ...         fit, registered_model_name="melt", alias="champion",
    ...         code_paths=["my_models.py"], trust_import=True,
    ...     )
    """
    if alias is not None and registered_model_name is None:
        raise OptionError(f"alias={alias!r} is of a registered model; say registered_model_name=")
    info = Model.log(
        artifact_path=None,
        name=name,
        flavor=_Saver(),
        flavor_name=FLAVOUR,
        registered_model_name=registered_model_name,
        await_registration_for=await_registration_for,
        params=params,
        tags=tags,
        model_type=model_type,
        step=step,
        model_id=model_id,
        # Loads the model as a server would, which may not import it if nobody said so.
        validate_serving_input=trust_import,
        fit=fit,
        trust_import=trust_import,
        **saving,
    )
    if alias is not None:
        version = info.registered_model_version
        MlflowClient().set_registered_model_alias(registered_model_name, alias, version)
    return info


class _Saver:
    """What ``Model.log`` calls: :func:`save_model`, less a word that is meant for itself."""

    def save_model(self, *, validate_serving_input: bool, **saving: Any) -> None:
        save_model(**saving)


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
        Import the model from where it was defined, or from the code saved with it; or read its
        pickle, if one was asked for. This runs code of whoever saved it. What the saved model
        says of trust is not looked at.
    dst_path : str, optional
        A folder to download to.

    Returns
    -------
    Fit
        Which predicts as before, with the run that logged it in its lineage.

    Raises
    ------
    ModelError
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
    fit = _loaded(folder / _FOLDER, model, trust_import)
    run = Model.load(str(folder)).run_id
    return fit if run is None else replace(fit, lineage={"mlflow_run_id": run, **fit.lineage})


def load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Predictor:
    """What ``mlflow.pyfunc.load_model`` calls; ``model_config`` says whether code is trusted."""
    if not (model_config or {}).get(_TRUST, False):
        raise ModelError(
            "this model was saved without trust_import=True, and serving it imports its code. If "
            "you trust whoever saved it, say so: mlflow.pyfunc.load_model(uri, model_config="
            "{'trust_import': True}), or for a server the environment variable "
            "MLFLOW_PYFUNC_INFERENCE_CONFIG='{\"trust_import\": true}'"
        )
    return Predictor(_loaded(Path(path), None, True))


def _loaded(folder: Path, model: Callable | None, trust_import: bool) -> Fit:
    pickled = folder / _PICKLE
    if model is None and trust_import and pickled.exists():
        model = _unpickled(pickled)
    return load_fit(folder / _STORE, model, trust_import=trust_import)


def _unpickled(path: Path) -> Callable:
    if not MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get():
        raise ModelError(
            "the model is a pickle, and MLFLOW_ALLOW_PICKLE_DESERIALIZATION is false; give the "
            "model itself: load_model(uri, model=...)"
        )
    import cloudpickle

    return cloudpickle.loads(path.read_bytes())
