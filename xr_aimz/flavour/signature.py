"""What a served fit takes and gives, as MLflow writes it down: signature and example.

Both come from the binding: columns from its dims and variables, their types and the example
from the fit's own data, parameters with their defaults. The example is answered once, which
tells the columns of an answer, and that there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from xr_aimz.errors import MissingValueError
from xr_aimz.flavour.asking import asked_for, defaults_with
from xr_aimz.flavour.columns import Columns, columns_of
from xr_aimz.flavour.example import input_example
from xr_aimz.flavour.predictor import Predictor
from xr_aimz.posterior import Fit

__all__ = ["infer_signature"]

_TYPES = {"f": DataType.double, "i": DataType.long, "u": DataType.long, "b": DataType.boolean}
_PARAMS: Mapping[str, tuple[DataType, tuple[int, ...] | None]] = {
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
    """The signature of a fit that is served: columns in, columns out, parameters.

    Parameters
    ----------
    fit : Fit
    params : mapping, optional
        Defaults of the parameters of a request, where they are to be others than
        ``mean``, ``std`` and the quantiles 0.05, 0.5 and 0.95 of all draws.

    Returns
    -------
    mlflow.models.ModelSignature
        Dates of cftime are strings, as are timedeltas: MLflow has neither. Outputs are those
        of the defaults.

    Raises
    ------
    OptionError, InterventionError
        A parameter that there is not, or a value that it cannot take.
    ModelError
        The model couples rows, so that no row has an answer of its own.

    Examples
    --------
    >>> signature = infer_signature(fit, {"quantiles": [0.1, 0.9]})  # doctest: +SKIP
    """
    defaults = defaults_with(params)
    asked_for(defaults)
    specs = [
        ParamSpec(name, dtype, _plain(defaults[name]), shape)
        for name, (dtype, shape) in _PARAMS.items()
    ]
    return ModelSignature(
        inputs=Schema(_inputs(columns_of(fit))),
        outputs=_outputs(fit, defaults),
        params=ParamSchema(specs),
    )


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, (list, tuple)) else default


def _inputs(columns: Columns) -> list[ColSpec]:
    labels = [ColSpec(_label_type(c.like), c.dim, required=c.required) for c in columns.labels]
    values = [
        ColSpec(
            _TYPES.get("f" if v.dtype is None else v.dtype.kind, DataType.double),
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
    return DataType.datetime if kind == "M" else _TYPES.get(kind, DataType.string)


def _outputs(fit: Fit, defaults: Mapping[str, Any]) -> Schema | None:
    """The columns of an answer; None where the example has a gap that nothing can fill."""
    try:
        answer = Predictor(fit).predict(input_example(fit), defaults)
    except MissingValueError:
        return None
    return Schema([ColSpec(_output_type(column.dtype), name) for name, column in answer.items()])


def _output_type(dtype: Any) -> DataType:
    return DataType.float if dtype == np.float32 else _TYPES[dtype.kind]
