"""Fits that log themselves: a run around each, in the way of MLflow's own integrations.

The settings are kept where MLflow keeps those of its integrations, and what turns those off for
a while turns this off too. No function is patched: :mod:`xr_aimz.watch` tells of fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import mlflow
from mlflow.utils import autologging_utils as autologging
from mlflow.utils.autologging_utils.logging_and_warnings import (
    MlflowEventsAndWarningsBehaviorGlobally,
    NonMlflowWarningsBehaviorForCurrentThread,
)
from mlflow.utils.mlflow_tags import MLFLOW_AUTOLOGGING

from xr_aimz.errors import TrackingWarning, warn
from xr_aimz.flavour.models import log_model
from xr_aimz.posterior import Fit
from xr_aimz.tracking.patience import Attempts, patience
from xr_aimz.tracking.runs import Run, Wanted, begin, end, fill

__all__ = ["NAME", "RUN_ID", "log_now", "logged"]

NAME = "xr_aimz"
RUN_ID = "mlflow_run_id"


@contextmanager
def logged() -> Iterator[Callable[[Fit], Fit]]:
    """A run around one fit, if the settings of this moment say so."""
    if not _is_on():
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


def log_now(fit: Fit, wanted: Wanted) -> Fit:
    """Log one fit that is there already."""
    session = _Session({}, {}, silent=False)
    session.begin()
    found = session.fill(fit, wanted)
    session.end()
    return found


class _Session:
    """One fit's run, from its start to its end; nothing in here raises but a warning."""

    def __init__(self, marks: Mapping[str, str], extra: Any, *, silent: bool) -> None:
        self._marks, self._extra, self._silent = marks, extra, silent
        self._attempts = Attempts()
        self._run: Run | None = None

    def begin(self) -> None:
        with self._calls():
            self._run = self._attempts(
                "the start of a run", lambda: begin(self._marks, self._extra)
            )

    def fill(self, fit: Fit, wanted: Wanted | None = None) -> Fit:
        """The fit, with the run's id if it can be found there."""
        if self._run is None:
            # Fits take hours: a server that was down may be there again.
            self._attempts = Attempts()
            self.begin()
        if self._run is None:
            return fit
        with self._calls():
            if not fill(self._run, fit, wanted or _wanted(), self._attempts):
                return fit
        found = replace(fit, lineage={**fit.lineage, RUN_ID: self._run.id})
        if wanted is None and _setting("log_models"):
            register = _setting("registered_model_name")
            with self._calls():
                self._attempts(
                    "the model", lambda: log_model(found, registered_model_name=register)
                )
        return found

    def end(self, error: BaseException | None = None) -> None:
        if self._run is not None:
            run = self._run
            with self._calls():
                end(run, self._attempts, error)
        if (said := self._attempts.said()) and not self._silent:
            warn(f"what MLflow has of this fit is not whole; the fit is. {said}", TrackingWarning)

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Within, MLflow gives up soon, and warnings on the way are lines of its log."""
        silent = {"disable_warnings": self._silent, "reroute_warnings": True}
        with ExitStack() as stack:
            stack.enter_context(patience())
            stack.enter_context(
                MlflowEventsAndWarningsBehaviorGlobally(disable_event_logs=self._silent, **silent)
            )
            stack.enter_context(NonMlflowWarningsBehaviorForCurrentThread(**silent))
            yield


def _setting(name: str) -> Any:
    return autologging.get_autologging_config(NAME, name, None)


def _wanted() -> Wanted:
    return Wanted(
        datasets=_setting("log_datasets"),
        diagnostics=_setting("log_diagnostics"),
        pictures=_setting("log_pictures"),
    )


def _is_on() -> bool:
    if autologging.autologging_is_disabled(NAME) or autologging._AUTOLOGGING_GLOBALLY_DISABLED:
        return False
    return not (_setting("exclusive") and mlflow.active_run() is not None)
