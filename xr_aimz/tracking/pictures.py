"""One picture of a fit: its loss by step, or the traces of its chains.

Drawn on a Figure of its own with a canvas of its own: pyplot's figures, its current axes and
its backend are the user's, and are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.posterior import Fit
from xr_aimz.tracking.curve import curves
from xr_aimz.tracking.measures import has_chains

__all__ = ["drawing", "missing"]

ROWS = 8


def drawing(fit: Fit) -> tuple[str, Callable[[], bytes]] | None:
    """A file name and what draws the PNG; none where there is nothing to look at."""
    if fit.losses is not None and fit.losses.size:
        return "loss.png", partial(_loss, fit.losses)
    if has_chains(fit) and not fit.binding.per:
        return "trace.png", partial(_traces, fit.posterior)
    return None


def missing() -> str | None:
    """Why no picture can be drawn, if so."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return 'not drawn, for want of matplotlib: pip install "xr_aimz[plot]"'
    return None


def _entries(posterior: xr.Dataset) -> list[tuple[str, np.ndarray]]:
    """The first entry of as many variables as there are rows: enough to see chains mix."""
    found = []
    for name, array in list(posterior.items())[:ROWS]:
        if array.dtype.kind not in "fiub" or not array.size:
            continue
        rest = [d for d in array.dims if d not in ("chain", "draw")]
        one = array.isel(dict.fromkeys(rest, 0)).transpose("chain", "draw")
        at = ", ".join(f"{d}={one[d].item()}" for d in rest if d in one.coords)
        found.append((f"{name}[{at}]" if rest else str(name), one.values))
    return found


def _loss(losses: xr.DataArray) -> bytes:
    found = curves(losses)
    figure = _figure(1)
    axes = figure.subplots()
    for curve in found:
        axes.plot(curve.steps, curve.values, label=curve.name, lw=1)
    finite = np.concatenate([c.values for c in found]) if found else np.empty(0)
    finite = finite[np.isfinite(finite)]
    if finite.size:
        # A first loss far above the rest would leave no room for the others.
        low, high = finite.min(), np.quantile(finite, 0.95)
        axes.set_ylim(low - 0.05 * (high - low or 1), high + 0.1 * (high - low or 1))
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return _png(figure)


def _traces(posterior: xr.Dataset) -> bytes:
    entries = _entries(posterior)
    figure = _figure(len(entries))
    rows = figure.subplots(len(entries), squeeze=False)[:, 0]
    for axes, (name, draws) in zip(rows, entries, strict=True):
        axes.plot(draws.T, lw=0.5)
        axes.set_ylabel(name[:40], fontsize="small")
    rows[-1].set_xlabel("draw")
    return _png(figure)


def _figure(rows: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.5 + 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()
