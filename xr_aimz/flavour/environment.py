"""The environment that a served fit needs, written next to it in MLflow's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import yaml
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
from mlflow.utils.requirements_utils import _get_pinned_requirement

__all__ = [
    "FILES",
    "Environment",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "write_environment",
]

FILES = {"conda_env": _CONDA_ENV_FILE_NAME, "python_env": _PYTHON_ENV_FILE_NAME}
_PINNED = ("xr_aimz", "dask", "jax", "numpy", "numpyro", "pandas", "xarray", "zarr")
_TRUSTED = {"MLFLOW_PYFUNC_INFERENCE_CONFIG": '{"trust_import": true}'}


@dataclass(frozen=True)
class Environment:
    """What the caller says of it, in MLflow's words, of which some exclude others."""

    conda_env: Mapping[str, Any] | str | None = None
    pip_requirements: Iterable[str] | str | None = None
    extra_pip_requirements: Iterable[str] | str | None = None

    def __post_init__(self) -> None:
        _validate_env_arguments(self.conda_env, self.pip_requirements, self.extra_pip_requirements)


def get_default_pip_requirements() -> list[str]:
    """The requirements of a fit that is served: this package and what it computes with, pinned.

    Examples
    --------
    >>> get_default_pip_requirements()  # doctest: +SKIP
    ['xr_aimz==0.1.0', 'dask==2026.3.0', ...]
    """
    return [_get_pinned_requirement(name) for name in _PINNED]


def get_default_conda_env() -> dict[str, Any]:
    """The same as :func:`get_default_pip_requirements`, as a Conda environment."""
    return _mlflow_conda_env(additional_pip_deps=get_default_pip_requirements())


def write_environment(path: Path, given: Environment, flavour: str) -> None:
    """Write the files of the environment into a model's folder, whose MLmodel is there already.

    Where nothing is said, a process of its own loads the model, as MLflow does for its own
    flavours, to see what else it imports.

    Parameters
    ----------
    path : Path
    given : Environment
    flavour : str
    """
    if given.conda_env is not None:
        conda, pip, constraints = _process_conda_env(given.conda_env)
    else:
        default = None
        if given.pip_requirements is None:
            pinned = get_default_pip_requirements()
            # The saver's own code, in a process of the saver's own: it was imported here too.
            inferred = mlflow.models.infer_pip_requirements(
                str(path), flavour, fallback=pinned, extra_env_vars=_TRUSTED
            )
            default = sorted({*inferred, *pinned})
        conda, pip, constraints = _process_pip_requirements(
            default, given.pip_requirements, given.extra_pip_requirements
        )
    (path / _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(conda, default_flow_style=False))
    if constraints:
        (path / _CONSTRAINTS_FILE_NAME).write_text("\n".join(constraints))
    (path / _REQUIREMENTS_FILE_NAME).write_text("\n".join(pip))
    _PythonEnv.current().to_yaml(str(path / _PYTHON_ENV_FILE_NAME))
