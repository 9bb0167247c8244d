"""What is kept of a fit as files: facts, tables, the model's text, packages, a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import xarray as xr

from xr_aimz.posterior import Fit
from xr_aimz.source import told
from xr_aimz.tracking.datasets import Described
from xr_aimz.tracking.environment import machine, requirements
from xr_aimz.tracking.parameters import facts
from xr_aimz.tracking.pictures import drawing
from xr_aimz.tracking.tables import by_entry, by_variable

__all__ = ["files"]

Made = tuple[str, Callable[[], bytes]]


def files(
    fit: Fit, table: xr.Dataset | None, data: Described | None, *, pictures: bool
) -> Iterator[Made]:
    """Names of files, and what makes the content of each.

    Parameters
    ----------
    fit : Fit
    table : Dataset, optional
        Diagnostics; with them come the tables of the posterior.
    data : Described, optional
    pictures : bool
    """
    yield "fit.json", lambda: _facts(fit, data)
    yield "requirements.txt", lambda: requirements().encode()
    source = told(fit.model)["source"]
    if source is not None:
        yield "model.py", source.encode
    if table is not None:
        yield "posterior.csv", lambda: _csv(by_entry(fit.posterior, table))
        yield "posterior_variables.csv", lambda: _csv(by_variable(fit.posterior, table))
    drawn = drawing(fit) if pictures else None
    if drawn is not None:
        yield drawn


def _facts(fit: Fit, data: Described | None) -> bytes:
    """Everything that parameters and tags cut short, whole."""
    found: dict[str, Any] = {
        **facts(fit),
        "fit": fit.token,
        "concerns": fit.concerns,
        "versions": dict(fit.versions),
        "machine": machine(),
    }
    if data is not None:
        found["data"] = {"digest": data.digest, "digest_of": data.of, "variables": data.variables}
    return json.dumps(found, indent=1, default=str).encode()


def _csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(float_format="%.6g").encode()
