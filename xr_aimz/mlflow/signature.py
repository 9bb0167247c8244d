"""Infer the MLflow signature of a served fit, and make an input example from its data."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from xr_aimz.errors import MissingValueError
from xr_aimz.fits import Fit
from xr_aimz.mlflow.columns import TableSchema, VariableColumns, table_schema
from xr_aimz.mlflow.serving import PyfuncModel, parse_params, with_defaults


def input_example(fit: Fit, rows: int = 5) -> pd.DataFrame:
    """Make a table of the first cells of the data of a fit.

    Parameters
    ----------
    fit : Fit
    rows : int
        The approximate number; a series along ``core_dim`` is never split.

    Returns
    -------
    pandas.DataFrame
        Labels without an MLflow type, cftime dates and timedeltas, are text. Variables whose
        data the fit does not store are 0.

    Examples
    --------
    >>> input_example(fit)  # doctest: +SKIP
    """
    columns = table_schema(fit)
    positions = _first_cells({d: _dim_size(fit, d) for d in columns.dims}, columns, rows)
    table: dict[str, Any] = {
        label.dim: positions[label.dim]
        if label.like is None
        else _label_values(label.like[positions[label.dim]])
        for label in columns.labels
        if label.required
    }
    for variable in (v for v in columns.variables if not v.held):
        table |= dict(zip(variable.columns, _column_values(fit, variable, positions), strict=True))
    return pd.DataFrame(table)


def _dim_size(fit: Fit, dim: str) -> int:
    groups = (fit.observed_data, fit.constant_data, fit.posterior)
    return next((ds.sizes[dim] for ds in groups if dim in ds.sizes), 1)


def _first_cells(sizes: dict[str, int], columns: TableSchema, rows: int) -> dict[str, np.ndarray]:
    """Return positions ``(row,)`` by dim: all along core dims, the first along others."""
    core = prod(n for d, n in sizes.items() if d in columns.core_dims)
    free = {d: n for d, n in sizes.items() if d not in columns.core_dims}
    count = min(max(rows // core, 1), prod(free.values()))
    free_positions = np.unravel_index(np.arange(count), tuple(free.values())) if free else ()
    coupled = {d: n for d, n in sizes.items() if d in columns.core_dims}
    core_positions = np.unravel_index(np.arange(core), tuple(coupled.values())) if coupled else ()
    positions = {d: np.repeat(p, core) for d, p in zip(free, free_positions, strict=True)}
    positions |= {d: np.tile(p, count) for d, p in zip(coupled, core_positions, strict=True)}
    return {d: positions[d] for d in sizes}


def _label_values(labels: pd.Index) -> Any:
    kind = getattr(labels.dtype, "kind", "O")
    if kind == "m" or type(labels[0]).__module__.startswith("cftime"):
        return [label.isoformat() if kind == "O" else str(label) for label in labels]
    return labels


def _column_values(
    fit: Fit, variable: VariableColumns, positions: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Return the values ``(row,)`` of each column of a variable."""
    count = len(next(iter(positions.values())))
    if variable.name not in fit.constant_data:
        return [np.zeros(count, variable.dtype or float) for _ in variable.columns]
    array = fit.constant_data[variable.name].transpose(*variable.dims, *variable.extra)
    # Only the slice up to the last cell: the rest may be large, and on disk.
    block = array.isel(
        {d: slice(0, int(positions[d].max()) + 1) for d in variable.dims}
    ).to_numpy()
    cells = block[tuple(positions[d] for d in variable.dims)] if variable.dims else block[None]
    flattened = cells.reshape(len(cells), -1)
    return [np.broadcast_to(column, (count,)) for column in flattened.T]


_MLFLOW_TYPES = {
    "f": DataType.double,
    "i": DataType.long,
    "u": DataType.long,
    "b": DataType.boolean,
}
_PARAM_TYPES: Mapping[str, tuple[DataType, tuple[int, ...] | None]] = {
    "summary": (DataType.string, (-1,)),
    "quantiles": (DataType.double, (-1,)),
    "returns": (DataType.string, None),
    "draws": (DataType.long, None),
    "seed": (DataType.long, None),
    "do": (DataType.string, None),
    "sites": (DataType.string, (-1,)),
    "new_labels": (DataType.string, None),
}


def infer_signature(fit: Fit, params: Mapping[str, Any] | None = None) -> ModelSignature:
    """Infer the signature of a served fit: input columns, output columns, parameters.

    Parameters
    ----------
    fit : Fit
    params : mapping, optional
        Defaults of the parameters of a request, if they are to differ from
        ``mean``, ``std`` and the quantiles 0.05, 0.5 and 0.95 of all draws.

    Returns
    -------
    mlflow.models.ModelSignature
        cftime dates and timedeltas are strings, since MLflow has neither type. Outputs are
        those of the defaults.

    Raises
    ------
    OptionError, InterventionError
        A parameter does not exist, or has an invalid value.
    ModelError
        The model couples rows, so that a row cannot be predicted alone.

    Examples
    --------
    >>> signature = infer_signature(fit, {"quantiles": [0.1, 0.9]})  # doctest: +SKIP
    """
    defaults = with_defaults(params)
    parse_params(defaults)
    specs = [
        ParamSpec(name, dtype, _as_list(defaults[name]), shape)
        for name, (dtype, shape) in _PARAM_TYPES.items()
    ]
    return ModelSignature(
        inputs=Schema(_input_columns(table_schema(fit))),
        outputs=_output_columns(fit, defaults),
        params=ParamSchema(specs),
    )


def _as_list(default: Any) -> Any:
    return list(default) if isinstance(default, (list, tuple)) else default


def _input_columns(columns: TableSchema) -> list[ColSpec]:
    labels = [ColSpec(_label_type(c.like), c.dim, required=c.required) for c in columns.labels]
    values = [
        ColSpec(
            _MLFLOW_TYPES.get("f" if v.dtype is None else v.dtype.kind, DataType.double),
            name,
            required=not v.held,
        )
        for v in columns.variables
        for name in v.columns
    ]
    return [*labels, *values]


def _label_type(like: pd.Index | None) -> DataType:
    if like is None:
        return DataType.long
    kind = getattr(like.dtype, "kind", "O")
    return DataType.datetime if kind == "M" else _MLFLOW_TYPES.get(kind, DataType.string)


def _output_columns(fit: Fit, defaults: Mapping[str, Any]) -> Schema | None:
    """Return the columns of a result, or None if missing values of the example prevent one."""
    try:
        result = PyfuncModel(fit).predict(input_example(fit), defaults)
    except MissingValueError:
        return None
    return Schema([ColSpec(_output_type(column.dtype), name) for name, column in result.items()])


def _output_type(dtype: Any) -> DataType:
    return DataType.float if dtype == np.float32 else _MLFLOW_TYPES[dtype.kind]
