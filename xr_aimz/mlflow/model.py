"""Save and log a fit as an MLflow model, with its signature, input example and environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient, pyfunc
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _CONSTRAINTS_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _mlflow_conda_env,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _copy_extra_files,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)
from mlflow.utils.requirements_utils import _get_pinned_requirement

from xr_aimz.errors import ModelError, OptionError
from xr_aimz.fits import Fit, check_fit, model_reference
from xr_aimz.mlflow.loading import FLAVOUR, LOADER, STORE, TRUST, write_archive
from xr_aimz.mlflow.signature import infer_signature
from xr_aimz.mlflow.signature import input_example as example_of
from xr_aimz.provenance import package_versions

FILES = {"conda_env": _CONDA_ENV_FILE_NAME, "python_env": _PYTHON_ENV_FILE_NAME}
_PINNED_PACKAGES = ("xr_aimz", "dask", "jax", "numpy", "numpyro", "pandas", "xarray", "zarr")
_TRUST_VARIABLES = {"MLFLOW_PYFUNC_INFERENCE_CONFIG": '{"trust_import": true}'}


@dataclass(frozen=True)
class Environment:
    """Environment of a model, given in MLflow's terms, some of which exclude each other."""

    conda_env: Mapping[str, Any] | str | None = None
    pip_requirements: Iterable[str] | str | None = None
    extra_pip_requirements: Iterable[str] | str | None = None

    def __post_init__(self) -> None:
        _validate_env_arguments(self.conda_env, self.pip_requirements, self.extra_pip_requirements)


def get_default_pip_requirements() -> list[str]:
    """Return the pinned requirements of a served fit: this package and its numerical libraries.

    Examples
    --------
    >>> get_default_pip_requirements()  # doctest: +SKIP
    ['xr_aimz==0.1.0', 'dask==2026.3.0', ...]
    """
    return [_get_pinned_requirement(name) for name in _PINNED_PACKAGES]


def get_default_conda_env() -> dict[str, Any]:
    """Return :func:`get_default_pip_requirements` as a Conda environment."""
    return _mlflow_conda_env(additional_pip_deps=get_default_pip_requirements())


def write_environment(path: Path, default_params: Environment, flavour: str) -> None:
    """Write the files of the environment into the folder of a model that has its MLmodel already.

    If no requirements are given, a separate process loads the model, as MLflow does for its own
    flavours, to find its other imports.

    Parameters
    ----------
    path : Path
    default_params : Environment
    flavour : str
    """
    if default_params.conda_env is not None:
        conda, pip, constraints = _process_conda_env(default_params.conda_env)
    else:
        default = None
        if default_params.pip_requirements is None:
            pinned = get_default_pip_requirements()
            # The code of the caller, which this process has imported too, so it is trusted.
            inferred = mlflow.models.infer_pip_requirements(
                str(path), flavour, fallback=pinned, extra_env_vars=_TRUST_VARIABLES
            )
            default = sorted({*inferred, *pinned})
        conda, pip, constraints = _process_pip_requirements(
            default, default_params.pip_requirements, default_params.extra_pip_requirements
        )
    (path / _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(conda, default_flow_style=False))
    if constraints:
        (path / _CONSTRAINTS_FILE_NAME).write_text("\n".join(constraints))
    (path / _REQUIREMENTS_FILE_NAME).write_text("\n".join(pip))
    _PythonEnv.current().to_yaml(str(path / _PYTHON_ENV_FILE_NAME))


def _check_importable(model: Callable) -> None:
    """Raise ModelError for a model that no other process can import."""
    if model_reference(model)["path"] is None:
        raise ModelError(
            f"trust_import=True, and the model {model!r} cannot be imported elsewhere: it is in "
            "__main__ or a notebook, within a function, or no function. Define it at the top of a "
            "module, and give that: code_paths=['my_models.py']"
        )


def save_model(
    fit: Fit,
    path: str | Path,
    *,
    trust_import: bool = False,
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
    """Save a fit as an MLflow model in a folder, completely or not at all.

    Parameters
    ----------
    fit : Fit
    path : path
        A folder that does not exist yet, or is empty.
    trust_import : bool, default False
        The saved setting for processes that *serve* the model: whether they may import its
        code. It can be overridden there, ``MLFLOW_PYFUNC_INFERENCE_CONFIG='{"trust_import":
        false}'``. :func:`load_model` ignores it.
    defaults : mapping, optional
        Defaults of a request's parameters: ``{"quantiles": [0.1, 0.9], "draws": 200}``.
    signature : ModelSignature or False, optional
        By default that of the binding, for which one prediction is made for the input example;
        ``False`` for none.
    input_example : DataFrame or False, optional
        By default the first rows of the data of the fit; ``False`` for none.
    code_paths : list of path, optional
        Files and folders that the model is imported from; they are copied into the model.
    conda_env, pip_requirements, extra_pip_requirements, metadata, extra_files, mlflow_model
        As MLflow's own flavours take them. If no requirements are given, a separate process
        loads the model to find its imports, which takes some ten seconds.

    Raises
    ------
    ModelError
        With ``trust_import``, a model that cannot be imported elsewhere; a model that couples
        rows, and so cannot be served (``signature=False`` saves it all the same).
    OptionError
        ``defaults`` together with ``signature``, which has defaults of its own.

    Examples
    --------
    >>> xr_aimz.mlflow.save_model(fit, "melt")  # doctest: +SKIP
    >>> xr_aimz.mlflow.load_model("melt", model=melting)  # doctest: +SKIP
    """
    check_fit(fit, "save_model")
    environment = Environment(conda_env, pip_requirements, extra_pip_requirements)
    if trust_import:
        _check_importable(fit.model)
    folder = Path(path).absolute()
    mlmodel = mlflow_model or Model()
    _set_signature(mlmodel, fit, defaults, signature)
    if metadata is not None:
        mlmodel.metadata = metadata
    example = example_of(fit) if input_example is None else input_example
    with _temporary_folder(folder) as staging:
        _save_example(mlmodel, None if example is False else example, str(staging))
        write_archive(fit, staging / STORE)
        code = _validate_and_copy_code_paths(code_paths, str(staging))
        _add_flavours(mlmodel, code, trust_import, _copy_extra_files(extra_files, str(staging)))
        if size := get_total_file_size(str(staging)):
            mlmodel.model_size_bytes = size
        mlmodel.save(str(staging / MLMODEL_FILE_NAME))
        write_environment(staging, environment, FLAVOUR)


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder for a model, whose files are moved into ``folder`` at the end.

    So ``folder`` never has part of a model. The temporary folder lies within ``folder``, which
    may be a disk of its own, or lie in a folder that may not be written.
    """
    existed = folder.exists()
    _validate_and_prepare_target_save_path(str(folder))
    try:
        with TemporaryDirectory(prefix=".", dir=folder) as parent:
            staging = Path(parent, folder.name)
            staging.mkdir()
            yield staging
            # The MLmodel file comes last: it makes a folder a model.
            for file in sorted(staging.iterdir(), key=lambda file: file.name == MLMODEL_FILE_NAME):
                file.rename(folder / file.name)
    except BaseException:
        if not existed and not os.listdir(folder):
            folder.rmdir()
        raise


def _set_signature(
    mlmodel: Model, fit: Fit, defaults: Mapping[str, Any] | None, signature: Any
) -> None:
    if defaults is not None and signature is not None:
        raise OptionError(
            f"defaults={defaults!r} go into a signature, and signature= is given; make it with "
            "xr_aimz.mlflow.infer_signature(fit, defaults)"
        )
    if signature is None:
        signature = infer_signature(fit, defaults)
    if signature is not False:
        mlmodel.signature = signature


def _add_flavours(
    mlmodel: Model, code: str | None, trust_import: bool, extra: Mapping[str, Any]
) -> None:
    pyfunc.add_to_model(
        mlmodel,
        loader_module=LOADER,
        data=STORE,
        code=code,
        # Written even if false: MLflow lets a server override only keys that exist.
        model_config={TRUST: trust_import},
        **FILES,
    )
    mlmodel.add_flavor(
        FLAVOUR, xr_aimz_version=package_versions()["xr_aimz"], data=STORE, code=code, **extra
    )


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
    """Log a fit as a model of the active run, or without a run, and register it.

    Parameters
    ----------
    fit : Fit
    name : str, default "model"
    registered_model_name : str, optional
        Make a version of this registered model, which is created if it does not exist.
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
        As in :func:`save_model`.

    Examples
    --------
    >>> with mlflow.start_run():  # doctest: +SKIP
    ...     xr_aimz.mlflow.log_model(
    ...         fit, registered_model_name="melt", alias="champion",
    ...         code_paths=["my_models.py"], trust_import=True,
    ...     )
    """
    check_fit(fit, "log_model")
    if alias is not None and registered_model_name is None:
        raise OptionError(f"alias={alias!r} is of a registered model; give registered_model_name=")
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
        # The validation loads the model as a server would, which needs trust to import it.
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
    """Adapter for ``Model.log``: calls :func:`save_model` without ``validate_serving_input``."""

    def save_model(self, *, validate_serving_input: bool, **saving: Any) -> None:
        save_model(**saving)
