"""A fit as an MLflow model: saved, logged and registered.

The folder holds ``fit.zarr.zip``, what ``fit.save`` writes, and MLflow's own files. Nothing in
it is a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient, pyfunc
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _copy_extra_files,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)

from xr_aimz.errors import ModelError, OptionError
from xr_aimz.flavour import archive
from xr_aimz.flavour.environment import FILES, Environment, write_environment
from xr_aimz.flavour.example import input_example as example_of
from xr_aimz.flavour.layout import FLAVOUR, LOADER, STORE, TRUST
from xr_aimz.flavour.signature import infer_signature
from xr_aimz.kinds import check_fit
from xr_aimz.posterior import Fit
from xr_aimz.record import versions
from xr_aimz.source import told

__all__ = ["log_model", "save_model"]


def _check_importable(model: Callable) -> None:
    """Refuse to promise an import that no other process could make."""
    if told(model)["path"] is None:
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
    """Save a fit as an MLflow model in a folder, whole or not at all.

    Parameters
    ----------
    fit : Fit
    path : path
        A folder that is not there yet, or is empty.
    trust_import : bool, default False
        What is written down for processes that *serve* the model: whether they may import its
        code. They can be told otherwise, ``MLFLOW_PYFUNC_INFERENCE_CONFIG='{"trust_import":
        false}'``. :func:`load_model` does not look at it.
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
    check_fit(fit, "save_model")
    environment = Environment(conda_env, pip_requirements, extra_pip_requirements)
    if trust_import:
        _check_importable(fit.model)
    folder = Path(path).absolute()
    described = mlflow_model or Model()
    _describe(described, fit, defaults, signature)
    if metadata is not None:
        described.metadata = metadata
    example = example_of(fit) if input_example is None else input_example
    with _whole(folder) as made:
        _save_example(described, None if example is False else example, str(made))
        archive.write(fit, made / STORE)
        copied = _validate_and_copy_code_paths(code_paths, str(made))
        _add_flavours(described, copied, trust_import, _copy_extra_files(extra_files, str(made)))
        if size := get_total_file_size(str(made)):
            described.model_size_bytes = size
        described.save(str(made / MLMODEL_FILE_NAME))
        write_environment(made, environment, FLAVOUR)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A place to write a model, which is in its folder once all is written, and never in part.

    The place is in the folder itself, which may be a disk of its own, or one among others that
    may not be written.
    """
    before = folder.exists()
    _validate_and_prepare_target_save_path(str(folder))
    try:
        with TemporaryDirectory(prefix=".", dir=folder) as place:
            made = Path(place, folder.name)
            made.mkdir()
            yield made
            # By the last of them a folder is known as a model.
            for file in sorted(made.iterdir(), key=lambda file: file.name == MLMODEL_FILE_NAME):
                file.rename(folder / file.name)
    except BaseException:
        if not before and not os.listdir(folder):
            folder.rmdir()
        raise


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


def _add_flavours(
    described: Model, code: str | None, trust_import: bool, extra: Mapping[str, Any]
) -> None:
    pyfunc.add_to_model(
        described,
        loader_module=LOADER,
        data=STORE,
        code=code,
        # There whatever it says, so that whoever serves the model can say otherwise.
        model_config={TRUST: trust_import},
        **FILES,
    )
    described.add_flavor(
        FLAVOUR, xr_aimz_version=versions()["xr_aimz"], data=STORE, code=code, **extra
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
    check_fit(fit, "log_model")
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
