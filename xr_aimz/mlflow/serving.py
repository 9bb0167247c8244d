"""Serve a fit: parse the parameters of a request, predict with cached traces, return tables.

:class:`PyfuncModel` is the model behind ``mlflow.pyfunc.load_model``. It makes Datasets from the
rows of a table, predicts on them with shapes padded to a few sizes, and returns rows.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import (
    AimzError,
    DtypeError,
    InterventionError,
    MissingValueError,
    ModelError,
    OptionError,
    list_names,
)
from xr_aimz.fits import Fit
from xr_aimz.mlflow.columns import table_schema
from xr_aimz.mlflow.tables import draws_table, summary_table, tables_to_datasets
from xr_aimz.prediction import (
    ChunkPlan,
    Dependence,
    Prediction,
    PredictionRequest,
    Tracer,
    build_result,
    check_posterior,
    check_split_along,
    prepare,
    result_attrs,
)

DEFAULTS: Mapping[str, Any] = {
    "summary": ["mean", "std"],
    "quantiles": [0.05, 0.5, 0.95],
    "returns": "summary",
    "draws": None,
    "seed": 0,
    "do": None,
    "sites": [],
    "new_labels": "raise",
}
_RETURNS = ("summary", "draws")


@dataclass(frozen=True)
class ServingRequest:
    """Request to a served fit.

    ``prediction_request`` is what is predicted, ``draws`` is true if draws are returned, and
    ``key`` identifies what must be traced.
    """

    prediction_request: PredictionRequest
    draws: bool
    key: tuple[Any, ...]


def with_defaults(request_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete the parameters of a request with their defaults.

    Raises
    ------
    OptionError
        A parameter does not exist.
    """
    unknown = sorted(set(request_params or {}) - set(DEFAULTS))
    if unknown:
        raise OptionError(
            f"no parameter {unknown!r}; there are {list_names(sorted(DEFAULTS), unknown)}"
        )
    return {**DEFAULTS, **(request_params or {})}


def parse_params(params: Mapping[str, Any] | None) -> ServingRequest:
    """Parse the parameters of a request.

    Raises
    ------
    OptionError, InterventionError
        A parameter does not exist, or has an invalid value.
    """
    values = with_defaults(params)
    returns = values["returns"]
    if returns not in _RETURNS:
        raise OptionError(f"returns={returns!r}: there are {list_names(_RETURNS, [returns])}")
    lists = {name: _parse_list(name, values[name]) for name in ("summary", "quantiles", "sites")}
    statistics = [*lists["summary"], *(_parse_float("quantiles", q) for q in lists["quantiles"])]
    if returns == "summary" and not statistics:
        raise OptionError(
            "summary=[] and quantiles=[] ask for nothing; give statistics, or returns='draws'"
        )
    request = PredictionRequest(
        sites=lists["sites"] or None,
        do=_parse_do(values["do"]),
        draws=None if values["draws"] is None else _parse_int("draws", values["draws"]),
        seed=_seed(values["seed"]),
        new_labels=values["new_labels"],
        summary=statistics if returns == "summary" else None,
    )
    key = (tuple(lists["sites"]), json.dumps(request.do), request.new_labels)
    return ServingRequest(request, returns == "draws", key)


def _parse_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise OptionError(f"{name}={value!r}: give a list, {DEFAULTS[name]!r}")
    return list(value)


def _parse_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name}: {value!r} is no number") from None


def _parse_int(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != value:
        raise OptionError(f"{name}={value!r} is no whole number")
    return number


def _seed(value: Any) -> int:
    seed = _parse_int("seed", value)
    if not -(2**63) <= seed < 2**64:
        raise OptionError(f"seed={seed!r}: a seed has at most 64 bits")
    return seed


def _parse_do(value: Any) -> dict[str, Any] | None:
    """Parse an intervention, or scenarios of interventions, from JSON or mappings of numbers."""
    if value is None or value == "":
        return None
    try:
        targets = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise InterventionError(
            f"do={value!r} is not JSON: {error}. Give it as text, '{{\"co2\": 280.0}}'"
        ) from None
    if not isinstance(targets, Mapping) or not all(_is_setting(v) for v in targets.values()):
        raise InterventionError(
            f"do={value!r}: a request sets names to numbers, {{'co2': 280.0}}, or names scenarios "
            "of these, {'low': {'co2': 280.0}, 'high': {'co2': 560.0}}"
        )
    if targets and all(isinstance(v, Mapping) and not v for v in targets.values()):
        raise InterventionError(
            f"do={value!r}: scenarios that set nothing; give names and numbers"
        )
    return dict(targets)


def _is_setting(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_number(v) for v in value.values())
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


# Lengths are padded to 1, 8, 16, 32 ..., unless a block in several dimensions would grow to
# more than twice its size, and to more than _SMALL_BLOCK cells.
_MIN_LENGTH = 8
_MAX_GROWTH = 2
_SMALL_BLOCK = 4096
# Limit of cached traces: a service runs for months, and its requests may have any shape.
_MAX_TRACES = 10_000


@dataclass(frozen=True)
class TraceCache:
    """Cache of a served fit: traces, dependences and checks.

    ``traces`` are outputs and names of programs by request key and shapes; ``dependences`` are
    those of sites along a dim; ``checked`` has the request keys that were proven to be computed
    cell by cell; ``lock`` keeps two requests from computing the same entry.
    """

    traces: dict[Any, Any] = field(default_factory=dict)
    dependences: dict[Any, Mapping[str, Dependence]] = field(default_factory=dict)
    checked: set[Any] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass(frozen=True)
class _CachingTracer(Tracer):
    """Tracer of requests with the same ``key``: caches traces, and pads blocks to a few sizes."""

    cache: TraceCache
    key: tuple[Any, ...]

    def trace(
        self, prediction: Prediction, sizes: Mapping[str, int]
    ) -> tuple[dict[str, Any], str]:
        key = (self._key_of(prediction, sizes), tuple(sorted(sizes.items())))
        return self._cached(self.cache.traces, key, lambda: self._trace(prediction, sizes))

    def dependences(self, prediction: Prediction, dim: str) -> Mapping[str, Dependence]:
        key = (self._key_of(prediction, prediction.inputs.sizes), dim)
        return self._cached(self.cache.dependences, key, lambda: prediction.dependences(dim))

    def padded_sizes(self, prediction: Prediction, plan: ChunkPlan) -> dict[str, int]:
        self._check_alone(prediction, plan)
        sizes = super().padded_sizes(prediction, plan)
        core = prediction.fit.binding.core_dims
        grown = {d: n if d in core else _padded_length(n) for d, n in sizes.items()}
        if prod(grown.values()) > max(_SMALL_BLOCK, _MAX_GROWTH * prod(sizes.values())):
            return sizes
        try:
            self.trace(prediction, {**prediction.inputs.sizes, **grown})
        except Exception:
            # The model has sizes written into it, so it runs with those only.
            return sizes
        return grown

    def _key_of(self, prediction: Prediction, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """Return the request key with the structs of a prediction's arguments."""
        leaves, structure = jax.tree.flatten(prediction.structs(sizes))
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        return (self.key, prediction.intervention is None, structure, shapes)

    def _cached(self, entries: dict[Any, Any], key: Any, compute: Callable[[], Any]) -> Any:
        with self.cache.lock:
            if key not in entries:
                if len(entries) >= _MAX_TRACES:
                    entries.clear()
                entries[key] = compute()
            return entries[key]

    def _trace(
        self, prediction: Prediction, sizes: Mapping[str, int]
    ) -> tuple[dict[str, Any], str]:
        try:
            return prediction.trace(sizes)
        except (TypeError, ModelError) as error:
            cause = error.__cause__ if isinstance(error, ModelError) else error
            if prediction.intervention is None or cause is None or isinstance(cause, AimzError):
                raise
            # The model ran at the fit, so that the numbers of do= must be the cause.
            raise InterventionError(
                f"with do={json.loads(self.key[1])!r} the model does not run: "
                f"{type(cause).__name__}: {cause}. Give numbers of the kind that it takes there, "
                "2 and not 2.0 for an int"
            ) from error

    def _check_alone(self, prediction: Prediction, plan: ChunkPlan) -> None:
        """Raise ModelError if the result of a row could depend on another row."""
        with self.cache.lock:
            if self.key in self.cache.checked:
                return
            binding = prediction.fit.binding
            free = [d for d in binding.dims if d not in binding.core_dims]
            try:
                check_split_along(prediction, plan, free)
            except ModelError as error:
                error.add_note(
                    "xr_aimz: a table is answered row by row, and may come in pieces of any size"
                )
                raise
            self.cache.checked.add(self.key)


def predict_rows(
    ds: xr.Dataset, fit: Fit, request: ServingRequest, cache: TraceCache
) -> xr.Dataset:
    """Predict as :func:`xr_aimz.predict` does, and compute the result.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, without the outcomes.
    fit : Fit
    request : ServingRequest
    cache : TraceCache
        The cache of this fit, the same for all its requests.

    Returns
    -------
    Dataset
        In memory; equal to the result of ``predict`` but for the rounding of another program.

    Raises
    ------
    ModelError
        The model couples cells along a dimension that is no ``core_dim``: a result would
        depend on the other rows of its request.
    InterventionError
        The model does not run with the numbers of ``do``.
    """
    check_posterior(fit.posterior, fit.sites)
    prediction = prepare(ds, fit, request.prediction_request)
    tracer = _CachingTracer(cache, request.key)
    return build_result(ds, prediction, result_attrs(prediction), "predict", tracer).load()


def _padded_length(length: int) -> int:
    return length if length == 1 else max(_MIN_LENGTH, 1 << (length - 1).bit_length())


_ROWS_SHOWN = 3


class PyfuncModel:
    """Model behind ``mlflow.pyfunc.load_model``: predicts for tables with a fit.

    Threads may share an instance. The first request of a size compiles; requests of up to twice
    as many rows often run the same program.

    Parameters
    ----------
    fit : Fit
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.columns = table_schema(fit)
        self._cache = TraceCache()

    def get_raw_model(self) -> Fit:
        """Return the fit."""
        return self.fit

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """Predict for the rows of a table.

        Parameters
        ----------
        model_input : pandas.DataFrame
            A row for each cell, in any order: a column for each observation dimension, with
            its labels, and one for each variable that the model takes; other columns are
            ignored. If the fit had one dimension, without labels, its column may be left out,
            and the positions of the rows are their labels.
        params : mapping, optional
            ``summary``, a list of statistics as in :func:`xr_aimz.summary`, by default
            ``["mean", "std"]``; ``quantiles``, by default ``[0.05, 0.5, 0.95]``; ``returns``,
            ``"summary"`` or ``"draws"``; and ``draws``, ``seed``, ``sites``, ``new_labels``, as
            in :func:`xr_aimz.predict`; ``do``, JSON of numbers by name, or of scenarios of
            these.

        Returns
        -------
        pandas.DataFrame
            The rows of the input, in their order, with their index: ``tas_mean``, ``tas_std``,
            ``tas_quantile[0.05]``, named as ``predict(..., summary=...)`` names them, with the
            labels of other dimensions in brackets. With ``returns="draws"`` a row for each
            draw of each row, with columns ``row`` (counted from 0), ``chain`` and ``draw``.
            Floats are float32 unless JAX's 64 bits are enabled.

        Raises
        ------
        MissingVariableError, LabelError, DtypeError, DimensionError
            A column is missing, or has invalid values.
        MissingValueError
            A row lacks a value, and an outcome of ints or bools has no missing value.
        OptionError, InterventionError
            A parameter does not exist, or has an invalid value.
        ModelError
            The model couples rows.
        """
        if not isinstance(model_input, pd.DataFrame):
            raise DtypeError(
                f"got a {type(model_input).__name__}; give a pandas DataFrame with columns "
                f"{list(self.columns.required)!r}"
            )
        request = parse_params(params)
        results = (
            (group, predict_rows(ds, self.fit, request, self._cache))
            for group, ds in tables_to_datasets(model_input, self.columns, self.fit.constant_data)
        )
        try:
            if request.draws:
                return draws_table(results, len(model_input))
            return summary_table(results, model_input.index)
        except MissingValueError as error:
            raise self._with_row_numbers(model_input, error) from error

    def _with_row_numbers(
        self, table: pd.DataFrame, error: MissingValueError
    ) -> MissingValueError:
        """Rewrite a MissingValueError in terms of rows and columns of the table."""
        columns = [c for v in self.columns.variables for c in v.columns if c in table]
        missing_mask = table[columns].isna()
        rows = np.flatnonzero(missing_mask.any(axis=1)).tolist()
        if not rows:
            return error
        incomplete = [c for c in columns if missing_mask[c].any()]
        return MissingValueError(
            f"rows {rows[:_ROWS_SHOWN]!r} of the table ({len(rows)} in all) have no value in "
            f"columns {incomplete!r}, and an outcome of ints or bools has no missing value: "
            "leave those rows out; or give them any number and drop their answers; or ask for "
            "other outcomes, sites=[...]"
        )
