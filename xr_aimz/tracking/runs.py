"""The MLflow run that a fit is logged to: found or made, filled, ended.

The run that is active is taken if no fit is in it yet, for parameters can be written once;
else a run is made, nested in the active one if there is one. MLflow keeps a stack of active
runs for each thread, so fits in two threads have a run each.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from xr_aimz.posterior import Fit
from xr_aimz.tracking.curve import Curve, curves
from xr_aimz.tracking.datasets import Described, described
from xr_aimz.tracking.files import files
from xr_aimz.tracking.measures import diagnosed, measures
from xr_aimz.tracking.parameters import TAG, parameters, tags, text
from xr_aimz.tracking.patience import Attempts
from xr_aimz.tracking.pictures import missing

__all__ = ["STATE", "Run", "Wanted", "begin", "end", "fill"]

# Which says that a fit is in the run already.
STATE = "xr_aimz.state"
_PARAMS, _METRICS = 100, 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run by its id, and whether it was made for the fit, and so ends with it."""

    id: str
    made: bool


@dataclass(frozen=True)
class Wanted:
    """What is logged beside parameters, tags, the loss and the model's source."""

    datasets: bool = True
    diagnostics: bool = True
    pictures: bool = True


def begin(marks: Mapping[str, str], extra: Mapping[str, str]) -> Run:
    """The active run, or one that is made, with these tags and ``extra`` ones of the caller's."""
    active, client = mlflow.active_run(), mlflow.MlflowClient()
    if active is not None:
        name = active.info.run_id
        if STATE not in client.get_run(name).data.tags:
            client.set_tag(name, STATE, "running")
            return Run(name, made=False)
    made = mlflow.start_run(nested=active is not None, tags={**marks, **extra, STATE: "running"})
    return Run(made.info.run_id, made=True)


def end(run: Run, attempts: Attempts, error: BaseException | None = None) -> None:
    """Say how the fit went; a run that was made for it is over."""
    found = {STATE: "logged in part" if attempts.failed else "logged"}
    if error is not None:
        found = {STATE: "failed", "xr_aimz.error": f"{type(error).__name__}: {error}"}
    said = [RunTag(name, text(value, TAG)) for name, value in found.items()]
    attempts("how the fit went", lambda: mlflow.MlflowClient().log_batch(run.id, tags=said))
    if run.made:
        status = "FINISHED" if error is None else "FAILED"
        # However much failed before: the run must leave the stack of this thread.
        attempts.always("the end of the run", partial(_over, run.id, status))


def fill(run: Run, fit: Fit, wanted: Wanted, attempts: Attempts) -> bool:
    """Log a fit, as much of it as goes; whether its parameters and tags are there."""
    client = attempts("a client", mlflow.MlflowClient)
    if client is None:
        return False
    named = attempts("parameters and tags", lambda: _log_facts(client, run.id, fit))
    table = attempts("diagnostics", lambda: diagnosed(fit)) if wanted.diagnostics else None
    if table is not None:
        attempts("metrics", lambda: _log_values(client, run.id, measures(fit, table)))
    losses = fit.losses
    if losses is not None:
        attempts("the loss curve", lambda: _log_curves(client, run.id, curves(losses)))
    data = attempts("the data's digest", lambda: described(fit)) if wanted.datasets else None
    if data is not None:
        attempts("the data's digest", lambda: _log_input(client, run.id, data))
    why = attempts("the picture", missing) if wanted.pictures else None
    if why is not None:
        attempts("why there is no picture", lambda: client.set_tag(run.id, "xr_aimz.picture", why))
    drawn = wanted.pictures and why is None
    made = attempts("artifacts", lambda: dict(files(fit, table, data, pictures=drawn)))
    if made is not None:
        attempts("artifacts", lambda: _log_files(client, run.id, made, attempts))
    return named is not None


def _over(name: str, status: str) -> None:
    active = mlflow.active_run()
    if active is not None and active.info.run_id == name:
        mlflow.end_run(status)
    else:
        mlflow.MlflowClient().set_terminated(name, status)


def _log_facts(client: Any, name: str, fit: Fit) -> bool:
    there = client.get_run(name).data.params
    # Written once: where the caller has a parameter of that name, ours goes beside it.
    own = {(k if there.get(k, v) == v else f"xr_aimz.{k}"): v for k, v in parameters(fit).items()}
    params = [Param(k, v) for k, v in own.items()]
    said = [RunTag(k, v) for k, v in tags(fit).items()]
    for part in _pieces(params, _PARAMS):
        client.log_batch(name, params=part)
    for part in _pieces(said, _PARAMS):
        client.log_batch(name, tags=part)
    return True


def _log_values(client: Any, name: str, values: Mapping[str, float]) -> None:
    now = _now()
    client.log_batch(name, metrics=[Metric(k, v, now, 0) for k, v in values.items()])


def _log_curves(client: Any, name: str, found: Iterable[Curve]) -> None:
    now = _now()
    for curve in found:
        points = zip(curve.values.tolist(), curve.steps.tolist(), strict=True)
        for part in _pieces([Metric(curve.name, v, now, int(s)) for v, s in points], _METRICS):
            client.log_batch(name, metrics=part)
        if curve.every > 1:
            client.set_tag(
                name, f"xr_aimz.{curve.name}", f"each value is the mean of {curve.every} losses"
            )


def _log_input(client: Any, name: str, data: Described) -> None:
    made_by = client.get_run(name).data.tags
    source = {"tags": {k: v for k, v in made_by.items() if k.startswith("mlflow.source.")}}
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="code",
        source=json.dumps(source),
        schema=json.dumps(data.schema),
        profile=json.dumps({"digest_of": data.of, "variables": data.variables}),
    )
    context = [InputTag("mlflow.data.context", "training")]
    client.log_inputs(name, [DatasetInput(dataset, context)])
    client.set_tag(name, "xr_aimz.digest_of", data.of)


def _log_files(
    client: Any, name: str, made: Mapping[str, Callable[[], bytes | None]], attempts: Attempts
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file, make in made.items():
            content = attempts(file, make)
            if content is not None:
                (Path(folder) / file).write_bytes(content)
        client.log_artifacts(name, folder)


def _pieces(items: list[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _now() -> int:
    return int(time.time() * 1000)
