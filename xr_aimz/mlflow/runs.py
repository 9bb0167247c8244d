"""Fill the MLflow run of a fit, with limits on the time lost to a slow or absent server."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from xr_aimz.fits import Fit
from xr_aimz.mlflow.artifacts import artifact_writers, missing_figure_reason
from xr_aimz.mlflow.run_data import (
    TAG,
    Curve,
    DataDigest,
    chain_diagnostics,
    describe_data,
    fit_metrics,
    fit_params,
    fit_tags,
    loss_curves,
    truncated_text,
)

T = TypeVar("T")

# Two retries, at once and after some two seconds: a server that restarts needs about that.
_SHORT_TIMEOUTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_MAX_SECONDS_LOST = 5.0
_MAX_LENGTH = 300


class _SharedEnvironment:
    """Context manager that sets environment variables while any user is inside; reentrant."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values, self._lock = values, threading.Lock()
        self._users, self._set = 0, dict[str, str]()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._set = {k: v for k, v in self._values.items() if k not in os.environ}
                os.environ.update(self._set)
            self._users += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for name, value in self._set.items():
                    if os.environ.get(name) == value:
                        del os.environ[name]


_short_timeouts = _SharedEnvironment(_SHORT_TIMEOUTS)


def short_timeouts() -> AbstractContextManager[None]:
    """Return a context manager in which requests of MLflow time out soon.

    MLflow reads its timeouts from the environment at each request, and nowhere else. Variables
    that are set already stay; the environment is restored after the last exit.
    """
    return _short_timeouts


class TrackingCalls:
    """Runner of calls that may fail: collects errors, and skips calls after too much lost time.

    Parameters
    ----------
    lost : float
        Seconds that failing calls may take in all. The call in progress is not interrupted.
    """

    def __init__(self, lost: float = _MAX_SECONDS_LOST) -> None:
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self._left = lost

    def __call__(self, what: str, call: Callable[[], T]) -> T | None:
        """Return the result of a call, or None if it failed or was skipped."""
        if self._left <= 0:
            self.left_out.append(what)
            return None
        return self.always(what, call)

    def always(self, what: str, call: Callable[[], T]) -> T | None:
        """Run a call no matter how much time was lost before."""
        start = time.monotonic()
        try:
            return call()
        except Exception as error:
            # A server, a disk or a library may raise any class; the fit is returned all the same.
            self._left -= time.monotonic() - start
            self.failed.append(f"{what}: {_describe_error(error)}")
            return None

    def said(self) -> str:
        """Return one sentence on failed and skipped calls; empty if all went well."""
        failures = "; ".join(self.failed)
        skipped = ", ".join(dict.fromkeys(self.left_out))
        return f"{failures}; not tried after that: {skipped}" if skipped else failures


def _describe_error(error: BaseException) -> str:
    """Describe an error and its root cause, which MLflow's message may hide."""
    root = error
    while (cause := root.__cause__ or root.__context__) is not None:
        root = cause
    message = _error_line(error)
    return (
        message
        if root is error or str(root) in message
        else f"{message} (for {_error_line(root)})"
    )


def _error_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


# A tag of runs that have a fit already.
STATE = "xr_aimz.state"
_PARAMS_A_REQUEST, _METRICS_A_REQUEST = 100, 1000


@dataclass(frozen=True)
class Run:
    """Run by its id; ``is_ours`` is true if it was started for the fit, and so ends with it."""

    id: str
    is_ours: bool


@dataclass(frozen=True)
class LogOptions:
    """Options for logging beyond parameters, tags, the loss and the model's source."""

    datasets: bool = True
    diagnostics: bool = True
    pictures: bool = True


def begin_run(marks: Mapping[str, str], extra: Mapping[str, str]) -> Run:
    """Return the active run, or start one, with the tags ``marks`` and the caller's ``extra``."""
    active, client = mlflow.active_run(), mlflow.MlflowClient()
    if active is not None:
        name = active.info.run_id
        if STATE not in client.get_run(name).data.tags:
            client.set_tag(name, STATE, "running")
            return Run(name, is_ours=False)
    started = mlflow.start_run(
        nested=active is not None, tags={**marks, **extra, STATE: "running"}
    )
    return Run(started.info.run_id, is_ours=True)


def end_run(run: Run, attempts: TrackingCalls, error: BaseException | None = None) -> None:
    """Log the outcome of the fit as tags, and end the run if it was started for the fit."""
    tags = {STATE: "logged in part" if attempts.failed else "logged"}
    if error is not None:
        tags = {STATE: "failed", "xr_aimz.error": f"{type(error).__name__}: {error}"}
    run_tags = [RunTag(name, truncated_text(value, TAG)) for name, value in tags.items()]
    attempts("how the fit went", lambda: mlflow.MlflowClient().log_batch(run.id, tags=run_tags))
    if run.is_ours:
        status = "FINISHED" if error is None else "FAILED"
        # No matter how much failed before: the run must leave the stack of this thread.
        attempts.always("the end of the run", partial(_end, run.id, status))


def fill_run(run: Run, fit: Fit, log_options: LogOptions, attempts: TrackingCalls) -> bool:
    """Log a fit as far as possible; return whether its parameters and tags were logged."""
    client = attempts("a client", mlflow.MlflowClient)
    if client is None:
        return False
    facts_logged = attempts("parameters and tags", lambda: _log_facts(client, run.id, fit))
    table = (
        attempts("diagnostics", lambda: chain_diagnostics(fit))
        if log_options.diagnostics
        else None
    )
    if table is not None:
        attempts("metrics", lambda: _log_values(client, run.id, fit_metrics(fit, table)))
    losses = fit.losses
    if losses is not None:
        attempts("the loss curve", lambda: _log_curves(client, run.id, loss_curves(losses)))
    data = (
        attempts("the data's digest", lambda: describe_data(fit)) if log_options.datasets else None
    )
    if data is not None:
        attempts("the data's digest", lambda: _log_input(client, run.id, data))
    reason = attempts("the picture", missing_figure_reason) if log_options.pictures else None
    if reason is not None:
        attempts(
            "why there is no picture", lambda: client.set_tag(run.id, "xr_aimz.picture", reason)
        )
    with_figure = log_options.pictures and reason is None
    writers = attempts(
        "artifacts", lambda: dict(artifact_writers(fit, table, data, pictures=with_figure))
    )
    if writers is not None:
        attempts("artifacts", lambda: _log_files(client, run.id, writers, attempts))
    return facts_logged is not None


def _end(run_id: str, status: str) -> None:
    active = mlflow.active_run()
    if active is not None and active.info.run_id == run_id:
        mlflow.end_run(status)
    else:
        mlflow.MlflowClient().set_terminated(run_id, status)


def _log_facts(client: Any, run_id: str, fit: Fit) -> bool:
    existing = client.get_run(run_id).data.params
    # A parameter can be written only once: ours gets a prefix if the caller has used its name.
    values = {
        (k if existing.get(k, v) == v else f"xr_aimz.{k}"): v for k, v in fit_params(fit).items()
    }
    params = [Param(k, v) for k, v in values.items()]
    tags = [RunTag(k, v) for k, v in fit_tags(fit).items()]
    for batch in _batches(params, _PARAMS_A_REQUEST):
        client.log_batch(run_id, params=batch)
    for batch in _batches(tags, _PARAMS_A_REQUEST):
        client.log_batch(run_id, tags=batch)
    return True


def _log_values(client: Any, run_id: str, values: Mapping[str, float]) -> None:
    now = _milliseconds()
    client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in values.items()])


def _log_curves(client: Any, run_id: str, curves: Iterable[Curve]) -> None:
    now = _milliseconds()
    for curve in curves:
        points = zip(curve.values.tolist(), curve.steps.tolist(), strict=True)
        for batch in _batches(
            [Metric(curve.name, v, now, int(s)) for v, s in points], _METRICS_A_REQUEST
        ):
            client.log_batch(run_id, metrics=batch)
        if curve.every > 1:
            client.set_tag(
                run_id, f"xr_aimz.{curve.name}", f"each value is the mean of {curve.every} losses"
            )


def _log_input(client: Any, run_id: str, data: DataDigest) -> None:
    run_tags = client.get_run(run_id).data.tags
    source = {"tags": {k: v for k, v in run_tags.items() if k.startswith("mlflow.source.")}}
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="code",
        source=json.dumps(source),
        schema=json.dumps(data.schema),
        profile=json.dumps({"digest_of": data.of, "variables": data.variables}),
    )
    context = [InputTag("mlflow.data.context", "training")]
    client.log_inputs(run_id, [DatasetInput(dataset, context)])
    client.set_tag(run_id, "xr_aimz.digest_of", data.of)


def _log_files(
    client: Any,
    run_id: str,
    writers: Mapping[str, Callable[[], bytes | None]],
    attempts: TrackingCalls,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file, make in writers.items():
            content = attempts(file, make)
            if content is not None:
                (Path(folder) / file).write_bytes(content)
        client.log_artifacts(run_id, folder)


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _milliseconds() -> int:
    return int(time.time() * 1000)
