"""Log fits to MLflow: each fit as it is made (``autolog``), or an existing one (``log_fit``).

A failure of MLflow becomes a TrackingWarning, and the fit is returned all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import mlflow
from mlflow.utils import autologging_utils as autologging
from mlflow.utils.autologging_utils import autologging_integration
from mlflow.utils.autologging_utils.logging_and_warnings import (
    MlflowEventsAndWarningsBehaviorGlobally,
    NonMlflowWarningsBehaviorForCurrentThread,
)
from mlflow.utils.mlflow_tags import MLFLOW_AUTOLOGGING

from xr_aimz.errors import TrackingWarning, warn
from xr_aimz.fits import Fit, add_fit_hook, check_fit
from xr_aimz.mlflow.model import log_model
from xr_aimz.mlflow.runs import (
    LogOptions,
    Run,
    TrackingCalls,
    begin_run,
    end_run,
    fill_run,
    short_timeouts,
)

NAME = "xr_aimz"
RUN_ID = "mlflow_run_id"


@contextmanager
def log_around() -> Iterator[Callable[[Fit], Fit]]:
    """Start a run around one fit, if autologging is on; yield a function that logs the Fit."""
    if not _is_enabled():
        yield lambda fit: fit
        return
    extra = _setting("extra_tags") or {}
    session = _Session({MLFLOW_AUTOLOGGING: NAME}, extra, silent=bool(_setting("silent")))
    session.begin()
    try:
        yield session.fill
    except BaseException as error:
        # Where warnings are errors, this one must not stand in for the fit's own.
        with suppress(TrackingWarning):
            session.end(error)
        raise
    session.end()


def log_one(fit: Fit, log_options: LogOptions) -> Fit:
    """Log one existing fit."""
    session = _Session({}, {}, silent=False)
    session.begin()
    logged = session.fill(fit, log_options)
    session.end()
    return logged


class _Session:
    """Run of one fit, from its start to its end; only warnings are raised."""

    def __init__(self, marks: Mapping[str, str], extra: Any, *, silent: bool) -> None:
        self._marks, self._extra, self._silent = marks, extra, silent
        self._attempts = TrackingCalls()
        self._run: Run | None = None

    def begin(self) -> None:
        with self._calls():
            self._run = self._attempts(
                "the start of a run", lambda: begin_run(self._marks, self._extra)
            )

    def fill(self, fit: Fit, log_options: LogOptions | None = None) -> Fit:
        """Log the fit; return it with the id of the run, if it was logged."""
        if self._run is None:
            # Fits take hours: a server that was down may be up again.
            self._attempts = TrackingCalls()
            self.begin()
        if self._run is None:
            return fit
        with self._calls():
            if not fill_run(self._run, fit, log_options or _log_options(), self._attempts):
                return fit
        logged = replace(fit, lineage={**fit.lineage, RUN_ID: self._run.id})
        if log_options is None and _setting("log_models"):
            register = _setting("registered_model_name")
            with self._calls():
                self._attempts(
                    "the model", lambda: log_model(logged, registered_model_name=register)
                )
        return logged

    def end(self, error: BaseException | None = None) -> None:
        if self._run is not None:
            run = self._run
            with self._calls():
                end_run(run, self._attempts, error)
        if (problems := self._attempts.said()) and not self._silent:
            warn(
                f"MLflow has this fit only in part; the fit is complete. {problems}",
                TrackingWarning,
            )

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Limit the waiting of MLflow within, and reroute warnings into its log."""
        silent = {"disable_warnings": self._silent, "reroute_warnings": True}
        with ExitStack() as stack:
            stack.enter_context(short_timeouts())
            stack.enter_context(
                MlflowEventsAndWarningsBehaviorGlobally(disable_event_logs=self._silent, **silent)
            )
            stack.enter_context(NonMlflowWarningsBehaviorForCurrentThread(**silent))
            yield


def _setting(name: str) -> Any:
    return autologging.get_autologging_config(NAME, name, None)


def _log_options() -> LogOptions:
    return LogOptions(
        datasets=_setting("log_datasets"),
        diagnostics=_setting("log_diagnostics"),
        pictures=_setting("log_pictures"),
    )


def _is_enabled() -> bool:
    if autologging.autologging_is_disabled(NAME) or autologging._AUTOLOGGING_GLOBALLY_DISABLED:
        return False
    return not (_setting("exclusive") and mlflow.active_run() is not None)


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
    """Log every later fit to MLflow; call again to change settings, or with ``disable=True``.

    A fit is logged to the active run, if there is one and it has no fit yet; else a run is
    started when the fit begins, nested in the active one if there is one, and ended with the
    fit: ``FAILED`` if the fit raised. Fits in several threads have a run each.

    Logged are the options, binding, dims and sizes as parameters; versions, concerns and the
    hash of the model's source as tags; the loss as a metric by step, in means over runs of steps
    if there are more than 1000; and as files ``fit.json``, ``model.py``, ``requirements.txt``
    and those named below. The amount does not depend on the size of the fit.

    Parameters
    ----------
    log_datasets : bool, default True
        A digest of the data as an input of the run. Lazy data are not loaded for it: a dask
        array is identified by its graph, another by its file's name, size and time.
    log_diagnostics : bool, default True
        The worst R-hat and effective sample sizes, divergences, counts of cells by status; and
        the tables ``posterior.csv`` (a row for each entry, 1000 at most, small variables first)
        and ``posterior_variables.csv`` (a row for each variable). Takes about as long as
        ``fit.diagnostics()``, and reads a lazy posterior again.
    log_pictures : bool, default True
        ``loss.png`` or ``trace.png``; needs Matplotlib (the extra ``plot``).
    log_models : bool, default False
        The fit itself, as :func:`log_model` does with its defaults; a posterior may be large.
    registered_model_name : str, optional
        With ``log_models``: make each a version of this registered model.
    disable : bool, default False
        Log nothing.
    exclusive : bool, default False
        Log nothing while the caller has an active run.
    silent : bool, default False
        Suppress the warnings of this package and the log lines of MLflow.
    extra_tags : mapping of str to str, optional
        Tags of the runs that are started.

    Warns
    -----
    TrackingWarning
        Something could not be logged, with the reason. The fit is returned all the same. A
        server that refuses costs some five seconds, one that hangs about a minute; set
        ``MLFLOW_HTTP_REQUEST_MAX_RETRIES`` and ``MLFLOW_HTTP_REQUEST_TIMEOUT`` to wait longer.

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
    add_fit_hook("mlflow", log_around)


def log_fit(
    fit: Fit,
    *,
    log_datasets: bool = True,
    log_diagnostics: bool = True,
    log_pictures: bool = True,
) -> Fit:
    """Log an existing fit, as :func:`autolog` would have.

    Parameters
    ----------
    fit : Fit
        From :func:`xr_aimz.fit`, loaded, or made from draws of another sampler.
    log_datasets, log_diagnostics, log_pictures : bool, default True
        As in :func:`autolog`.

    Returns
    -------
    Fit
        With the run in its lineage; the same object if nothing could be logged.

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
    options = LogOptions(log_datasets, log_diagnostics, log_pictures)
    return log_one(fit, options)
