"""Make the files that a run stores for a fit: facts, tables, source, packages and a figure.

:func:`artifact_writers` yields the name of each file with a function that returns its bytes.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distributions
from io import BytesIO
from itertools import product
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.fits import Fit, model_reference
from xr_aimz.mlflow.run_data import DataDigest, fit_facts, has_chains, loss_curves


def installed_packages() -> str:
    """Return the installed packages with their versions, one a line, in the format of pip."""
    versions = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    lines = [
        f"{name}=={version}" for name, version in sorted(versions.items(), key=_lower_case_name)
    ]
    return "\n".join(
        [f"# Python {platform.python_version()} on {platform.platform()}", *lines, ""]
    )


def machine_facts() -> dict[str, str | int]:
    """Return the Python version, the platform, and the devices of JAX."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
    }


def _lower_case_name(item: tuple[str, str]) -> str:
    return item[0].lower()


ENTRIES = 1000
_QUANTILES = (0.05, 0.5, 0.95)
_DRAWS = ("chain", "draw")


def entry_table(posterior: xr.Dataset, table: xr.Dataset, limit: int = ENTRIES) -> pd.DataFrame:
    """Compute mean, sd, quantiles and diagnostics of single entries, at most ``limit`` of them.

    Parameters
    ----------
    posterior : Dataset
        With dims ``(chain, draw, ...)``; if lazy, only the listed variables are read.
    table : Dataset
        R-hat and effective sample sizes of the same variables, or empty.

    Returns
    -------
    DataFrame
        With an index such as ``slope[lat=10.0]``.
    """
    parts = [_entry_rows(posterior[name], table) for name in _listed_variables(posterior, limit)]
    return pd.concat(parts) if parts else pd.DataFrame()


def variable_table(posterior: xr.Dataset, table: xr.Dataset, limit: int = ENTRIES) -> pd.DataFrame:
    """Compute a row for each variable: its size, and the range over entries of means and sds."""
    listed, rows = set(_listed_variables(posterior, limit)), {}
    for name, array in list(_numeric_variables(posterior))[:limit]:
        mean = array.mean(_DRAWS, skipna=False).values
        sd = array.std(_DRAWS, skipna=False).values
        rows[name] = {
            "dims": ",".join(str(d) for d in array.dims if d not in _DRAWS),
            "entries": mean.size,
            "listed": name in listed,
            **_value_range("mean", mean),
            **_value_range("sd", sd),
            **_worst_diagnostics(name, table),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variable")


def _numeric_variables(posterior: xr.Dataset) -> Iterator[tuple[Any, xr.DataArray]]:
    return ((name, a) for name, a in posterior.items() if a.dtype.kind in "fiub")


def _entry_count(array: xr.DataArray) -> int:
    return int(np.prod([n for d, n in array.sizes.items() if d not in _DRAWS], dtype=int))


def _listed_variables(posterior: xr.Dataset, limit: int) -> list[Any]:
    """Select small variables first, up to ``limit`` entries in all; return them in their order."""
    room, fitting = limit, []
    for name, array in sorted(
        _numeric_variables(posterior), key=lambda item: _entry_count(item[1])
    ):
        room -= _entry_count(array)
        if room < 0:
            break
        fitting.append(name)
    return [name for name in posterior if name in fitting]


def _entry_rows(array: xr.DataArray, table: xr.Dataset) -> pd.DataFrame:
    ordered = array.transpose(*_DRAWS, ...)
    x = ordered.values.astype(float).reshape(ordered.shape[0] * ordered.shape[1], -1)
    columns = {"mean": x.mean(axis=0), "sd": x.std(axis=0)}
    columns |= {
        f"q{q:g}": v for q, v in zip(_QUANTILES, np.quantile(x, _QUANTILES, 0), strict=True)
    }
    if array.name in table:
        diagnostics = table[array.name].transpose("diagnostic", ...)
        kinds = diagnostics.diagnostic.values
        columns |= {str(k): v.reshape(-1) for k, v in zip(kinds, diagnostics.values, strict=True)}
    return pd.DataFrame(columns, index=pd.Index(_entry_names(ordered), name="entry"))


def _entry_names(ordered: xr.DataArray) -> list[str]:
    """Return the names of entries, such as ``slope[lat=10.0, lon=20.0]``, in the array's order."""
    if ordered.ndim == 2:
        return [str(ordered.name)]
    along = [[f"{d}={label}" for label in ordered[d].values] for d in ordered.dims[2:]]
    return [f"{ordered.name}[{', '.join(at)}]" for at in product(*along)]


def _value_range(what: str, values: np.ndarray) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {f"{what}_{end}": np.nan for end in ("min", "median", "max")}
    return {
        f"{what}_min": float(finite.min()),
        f"{what}_median": float(np.median(finite)),
        f"{what}_max": float(finite.max()),
    }


def _worst_diagnostics(name: Any, table: xr.Dataset) -> dict[str, float]:
    if name not in table:
        return {}
    diagnostics = table[name]
    return {
        "rhat_max": float(diagnostics.sel(diagnostic="rhat").max()),
        "ess_bulk_min": float(diagnostics.sel(diagnostic="ess_bulk").min()),
        "ess_tail_min": float(diagnostics.sel(diagnostic="ess_tail").min()),
    }


ROWS = 8


def figure(fit: Fit) -> tuple[str, Callable[[], bytes]] | None:
    """Return the file name of a PNG and a function that draws it, or None without a plot."""
    if fit.losses is not None and fit.losses.size:
        return "loss.png", partial(_plot_losses, fit.losses)
    if has_chains(fit) and not fit.binding.per:
        return "trace.png", partial(_plot_traces, fit.posterior)
    return None


def missing_figure_reason() -> str | None:
    """Return the reason why no figure can be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return 'not drawn, for want of matplotlib: pip install "xr_aimz[plot]"'
    return None


def _plotted_entries(posterior: xr.Dataset) -> list[tuple[str, np.ndarray]]:
    """Return the first entry of at most :data:`ROWS` variables: enough to judge mixing."""
    entries = []
    for name, array in list(posterior.items())[:ROWS]:
        if array.dtype.kind not in "fiub" or not array.size:
            continue
        rest = [d for d in array.dims if d not in ("chain", "draw")]
        first_entry = array.isel(dict.fromkeys(rest, 0)).transpose("chain", "draw")
        at = ", ".join(f"{d}={first_entry[d].item()}" for d in rest if d in first_entry.coords)
        entries.append((f"{name}[{at}]" if rest else str(name), first_entry.values))
    return entries


def _plot_losses(losses: xr.DataArray) -> bytes:
    curves = loss_curves(losses)
    figure = _new_figure(1)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.steps, curve.values, label=curve.name, lw=1)
    finite = np.concatenate([c.values for c in curves]) if curves else np.empty(0)
    finite = finite[np.isfinite(finite)]
    if finite.size:
        # A first loss far above the rest would leave no room for the others.
        low, high = finite.min(), np.quantile(finite, 0.95)
        axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return _png_bytes(figure)


def _plot_traces(posterior: xr.Dataset) -> bytes:
    entries = _plotted_entries(posterior)
    figure = _new_figure(len(entries))
    rows = figure.subplots(len(entries), squeeze=False)[:, 0]
    for axes, (name, draws) in zip(rows, entries, strict=True):
        axes.plot(draws.T, lw=0.5)
        axes.set_ylabel(name[:40], fontsize="small")
    rows[-1].set_xlabel("draw")
    return _png_bytes(figure)


def _new_figure(rows: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.5 + 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png_bytes(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


Made = tuple[str, Callable[[], bytes]]


def artifact_writers(
    fit: Fit, table: xr.Dataset | None, data: DataDigest | None, *, pictures: bool
) -> Iterator[Made]:
    """Yield names of files, and functions that return the content of each.

    Parameters
    ----------
    fit : Fit
    table : Dataset, optional
        Diagnostics; the tables of the posterior are written if these are given.
    data : DataDigest, optional
    pictures : bool
    """
    yield "fit.json", lambda: _facts_json(fit, data)
    yield "requirements.txt", lambda: installed_packages().encode()
    source = model_reference(fit.model)["source"]
    if source is not None:
        yield "model.py", source.encode
    if table is not None:
        yield "posterior.csv", lambda: _csv_bytes(entry_table(fit.posterior, table))
        yield "posterior_variables.csv", lambda: _csv_bytes(variable_table(fit.posterior, table))
    figure_writer = figure(fit) if pictures else None
    if figure_writer is not None:
        yield figure_writer


def _facts_json(fit: Fit, data: DataDigest | None) -> bytes:
    """Return all facts of the fit as JSON, where params and tags are truncated."""
    facts: dict[str, Any] = {
        **fit_facts(fit),
        "fit": fit.token,
        "concerns": fit.concerns,
        "versions": dict(fit.versions),
        "machine": machine_facts(),
    }
    if data is not None:
        facts["data"] = {"digest": data.digest, "digest_of": data.of, "variables": data.variables}
    return json.dumps(facts, indent=1, default=str).encode()


def _csv_bytes(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(float_format="%.6g").encode()
