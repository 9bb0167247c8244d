"""Fits in MLflow: ``autolog``, ``log_fit``, and models that are logged, loaded and served.

Needs the extra ``mlflow``. What is logged, and what happens when the server does not answer,
is told in the rooms of :mod:`xr_aimz.tracking`; what a served fit takes and gives, in those of
:mod:`xr_aimz.flavour`.
"""

from __future__ import annotations

from collections.abc import Mapping

from xr_aimz.errors import MissingExtraError
from xr_aimz.kinds import check_fit
from xr_aimz.posterior import Fit
from xr_aimz.watch import watch

try:
    from mlflow.utils.autologging_utils import autologging_integration
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
from xr_aimz.tracking.autologging import NAME, log_now, logged
from xr_aimz.tracking.runs import Wanted

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


@autologging_integration(NAME)  # type: ignore[untyped-decorator] # MLflow is untyped
def autolog(
    *,
    log_datasets: bool = True,
    log_diagnostics: bool = True,
    log_pictures: bool = True,
    log_models: bool = False,
    registered_model_name: str | None = None,
    disable: bool = False,
    exclusive: bool = False,
    silent: bool = False,
    extra_tags: Mapping[str, str] | None = None,
) -> None:
    """Log every fit from now on to MLflow; again with other settings, or ``disable=True``.

    A fit goes into the active run, if there is one and no other fit is in it; else a run is
    made when the fit begins, nested in the active one if there is one, and ended with it:
    ``FAILED`` if the fit raised. Fits in several threads have a run each.

    Logged are the options, binding, dims and sizes as parameters; versions, concerns and the
    hash of the model's source as tags; the loss as a metric by step, in means over runs of steps
    where there are more than 1000; and as files ``fit.json``, ``model.py``, ``requirements.txt``
    and what is named below. How much does not depend on how large the fit is.

    Parameters
    ----------
    log_datasets : bool, default True
        A digest of the data as an input of the run. Lazy data are not loaded for it: a dask
        array is told by its graph, another by its file's name, size and time.
    log_diagnostics : bool, default True
        The worst R-hat and effective sample sizes, divergences, counts of cells by status; and
        the tables ``posterior.csv`` (a row an entry, 1000 at most, small variables first) and
        ``posterior_variables.csv`` (a row a variable). Takes about as long as
        ``fit.diagnostics()``, and reads a lazy posterior anew.
    log_pictures : bool, default True
        ``loss.png`` or ``trace.png``; needs Matplotlib (the extra ``plot``).
    log_models : bool, default False
        The fit itself, as :func:`log_model` does with its defaults; a posterior may be large.
    registered_model_name : str, optional
        With ``log_models``: make each a version of this registered model.
    disable : bool, default False
        Log nothing.
    exclusive : bool, default False
        Log nothing while a run of the caller's own is active.
    silent : bool, default False
        Neither warnings of ours nor log lines of MLflow's.
    extra_tags : mapping of str to str, optional
        Tags of the runs that are made.

    Warns
    -----
    TrackingWarning
        Something could not be logged, and why. The fit is returned all the same. A server that
        refuses costs some five seconds, one that hangs about a minute; a longer wait is had by
        ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` and ``MLFLOW_HTTP_REQUEST_TIMEOUT``.

    Notes
    -----
    ``fit.lineage["mlflow_run_id"]`` is the run, and results of the fit carry it in their attrs.

    Examples
    --------
    >>> import xr_aimz
    >>> xr_aimz.mlflow.autolog()  # doctest: +SKIP
    >>> fit = ds.aimz.fit(model)  # doctest: +SKIP
    >>> fit.lineage["mlflow_run_id"]  # doctest: +SKIP
    '5e3f0f6a7f0b4d1c9f6e2a1b8c7d6e5f'
    """
    watch("mlflow", logged)


def log_fit(
    fit: Fit,
    *,
    log_datasets: bool = True,
    log_diagnostics: bool = True,
    log_pictures: bool = True,
) -> Fit:
    """Log a fit that is there already, as :func:`autolog` would have.

    Parameters
    ----------
    fit : Fit
        Made by :func:`xr_aimz.fit`, loaded, or from draws made elsewhere.
    log_datasets, log_diagnostics, log_pictures : bool, default True
        As in :func:`autolog`.

    Returns
    -------
    Fit
        With the run in its lineage; the very same fit where nothing could be logged.

    Warns
    -----
    TrackingWarning
        As in :func:`autolog`.

    Examples
    --------
    >>> with mlflow.start_run():  # doctest: +SKIP
    ...     fit = xr_aimz.mlflow.log_fit(fit)
    """
    check_fit(fit, "log_fit")
    wanted = Wanted(log_datasets, log_diagnostics, log_pictures)
    return log_now(fit, wanted)
