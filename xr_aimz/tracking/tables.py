"""The posterior as two tables of bounded length: one row an entry, one row a variable.

Small variables are listed entry by entry, smallest first, as long as there is room; a field of
a million cells has its row among the variables, with the range of its means and its worst
R-hat, and none among the entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

__all__ = ["ENTRIES", "by_entry", "by_variable"]

ENTRIES = 1000
_QUANTILES = (0.05, 0.5, 0.95)
_DRAWS = ("chain", "draw")


def by_entry(posterior: xr.Dataset, table: xr.Dataset, limit: int = ENTRIES) -> pd.DataFrame:
    """Mean, sd, quantiles and diagnostics of single entries, at most ``limit`` of them.

    Parameters
    ----------
    posterior : Dataset
        With dims ``(chain, draw, ...)``; of a lazy one only what is listed is read.
    table : Dataset
        R-hat and effective sample sizes of the same variables, or empty.

    Returns
    -------
    DataFrame
        With an index such as ``slope[lat=10.0]``.
    """
    parts = [_entries(posterior[name], table) for name in _listed(posterior, limit)]
    return pd.concat(parts) if parts else pd.DataFrame()


def by_variable(posterior: xr.Dataset, table: xr.Dataset, limit: int = ENTRIES) -> pd.DataFrame:
    """A row for each variable: its size, and over its entries the range of means and sds."""
    listed, rows = set(_listed(posterior, limit)), {}
    for name, array in list(_numeric(posterior))[:limit]:
        mean = array.mean(_DRAWS, skipna=False).values
        sd = array.std(_DRAWS, skipna=False).values
        rows[name] = {
            "dims": ",".join(str(d) for d in array.dims if d not in _DRAWS),
            "entries": mean.size,
            "listed": name in listed,
            **_range("mean", mean),
            **_range("sd", sd),
            **_extremes(name, table),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variable")


def _numeric(posterior: xr.Dataset) -> Iterator[tuple[Any, xr.DataArray]]:
    return ((name, a) for name, a in posterior.items() if a.dtype.kind in "fiub")


def _size(array: xr.DataArray) -> int:
    return int(np.prod([n for d, n in array.sizes.items() if d not in _DRAWS], dtype=int))


def _listed(posterior: xr.Dataset, limit: int) -> list[Any]:
    """The variables that there is room for, in their order."""
    room, kept = limit, []
    for name, array in sorted(_numeric(posterior), key=lambda item: _size(item[1])):
        room -= _size(array)
        if room < 0:
            break
        kept.append(name)
    return [name for name in posterior if name in kept]


def _entries(array: xr.DataArray, table: xr.Dataset) -> pd.DataFrame:
    ordered = array.transpose(*_DRAWS, ...)
    x = ordered.values.astype(float).reshape(ordered.shape[0] * ordered.shape[1], -1)
    columns = {"mean": x.mean(axis=0), "sd": x.std(axis=0)}
    columns |= {
        f"q{q:g}": v for q, v in zip(_QUANTILES, np.quantile(x, _QUANTILES, 0), strict=True)
    }
    if array.name in table:
        found = table[array.name].transpose("diagnostic", ...)
        kinds = found.diagnostic.values
        columns |= {str(k): v.reshape(-1) for k, v in zip(kinds, found.values, strict=True)}
    return pd.DataFrame(columns, index=pd.Index(_names(ordered), name="entry"))


def _names(ordered: xr.DataArray) -> list[str]:
    """``slope[lat=10.0, lon=20.0]`` for each entry, in the order of the array."""
    if ordered.ndim == 2:
        return [str(ordered.name)]
    along = [[f"{d}={label}" for label in ordered[d].values] for d in ordered.dims[2:]]
    return [f"{ordered.name}[{', '.join(at)}]" for at in product(*along)]


def _range(what: str, values: np.ndarray) -> dict[str, float]:
    seen = values[np.isfinite(values)]
    if not seen.size:
        return {f"{what}_{end}": np.nan for end in ("min", "median", "max")}
    return {
        f"{what}_min": float(seen.min()),
        f"{what}_median": float(np.median(seen)),
        f"{what}_max": float(seen.max()),
    }


def _extremes(name: Any, table: xr.Dataset) -> dict[str, float]:
    if name not in table:
        return {}
    found = table[name]
    return {
        "rhat_max": float(found.sel(diagnostic="rhat").max()),
        "ess_bulk_min": float(found.sel(diagnostic="ess_bulk").min()),
        "ess_tail_min": float(found.sel(diagnostic="ess_tail").min()),
    }
