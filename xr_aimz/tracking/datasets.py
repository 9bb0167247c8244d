"""The data of a fit as a tracked input: names, dims, and a digest, never the data.

Data in memory are told apart by content. Lazy data are not loaded for it: they go by the files
that they are read from, with size and time, and what is computed from them
(:mod:`xr_aimz.identity`). What a digest is of is said beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.identity import identify
from xr_aimz.posterior import Fit

__all__ = ["Described", "described"]

# MLflow's limits are 36 characters of a digest, 500 of a name.
DIGEST, NAME = 32, 500
LISTED = 200
CONTENT, GRAPH, FILE = "content", "dask graph", "file name, size and time"
_PIECE = 2**24


@dataclass(frozen=True)
class Described:
    """A fit's data for the record.

    ``schema`` is in MLflow's own form; ``variables`` says of each its digest and of what it is.
    """

    name: str
    digest: str
    of: str
    schema: dict[str, Any]
    variables: dict[str, dict[str, Any]]


def described(fit: Fit) -> Described:
    """The outcomes and inputs of a fit, by content where they are in memory."""
    outcomes = {str(name): a for name, a in fit.observed_data.items()}
    inputs = {str(name): a for name, a in fit.constant_data.items()}
    # Labels are given, whichever variables they are along.
    for group in (fit.observed_data, fit.constant_data):
        inputs |= {str(d): group.coords[d] for d in group.dims if d in group.coords}
    variables = {name: _described(a) for name, a in {**inputs, **outcomes}.items()}
    whole = hashlib.sha256()
    for name, found in sorted(variables.items()):
        whole.update(repr((name, found["digest"])).encode())
    schema = {"mlflow_tensorspec": {"features": _schema(inputs), "targets": _schema(outcomes)}}
    return Described(
        name=",".join(outcomes)[:NAME] or "data",
        digest=whole.hexdigest()[:DIGEST],
        of="; ".join(sorted({v["digest_of"] for v in variables.values()})),
        schema=schema,
        variables=dict(list(variables.items())[:LISTED]),
    )


def _described(array: xr.DataArray) -> dict[str, Any]:
    digest, of = _digest(array.variable)
    return {
        "dims": list(map(str, array.dims)),
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "digest": digest,
        "digest_of": of,
    }


def _digest(variable: xr.Variable) -> tuple[str, str]:
    found = hashlib.sha256(repr((variable.dims, variable.dtype, variable.shape)).encode())
    if variable.chunks is not None or not variable._in_memory:
        found.update(identify(variable).digest.encode())
        of = GRAPH if variable.chunks is not None else FILE
    else:
        for part in _content(variable.values):
            found.update(part)
        of = CONTENT
    return found.hexdigest()[:DIGEST], of


def _content(values: np.ndarray) -> Iterable[bytes]:
    if values.dtype.kind == "O":
        # Strings and dates of a calendar: their text, for the bytes are addresses.
        yield from (f"{part!r}\0".encode() for part in values.flat)
        return
    flat = values.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].tobytes()


def _schema(arrays: dict[str, xr.DataArray]) -> str:
    """Names, dtypes and shapes of at most so many variables, as MLflow's UI shows them."""
    listed = list(arrays.items())[:LISTED]
    specs = [
        {
            "name": name,
            "type": "tensor",
            "tensor-spec": {"dtype": str(a.dtype), "shape": list(a.shape)},
        }
        for name, a in listed
    ]
    return json.dumps(specs)
