"""The loss of each step, thinned to what a server and a chart can take.

Long curves are means over runs of steps, each labelled by the last step of its run, as the
losses of a long minibatch fit are already. Of a fit in cells the curves are quantiles over the
cells, so that their number does not depend on how many cells there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

__all__ = ["POINTS", "Curve", "curves"]

POINTS = 1000
_OVER_CELLS = {"loss_median": 0.5, "loss_q05": 0.05, "loss_q95": 0.95}


@dataclass(frozen=True)
class Curve:
    """Values by step; ``every``, over how many of the fit's losses each is the mean."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    every: int


def curves(losses: xr.DataArray, points: int = POINTS) -> list[Curve]:
    """The curves of a fit's losses, of at most ``points`` points each.

    Parameters
    ----------
    losses : DataArray
        ``(step, *per)``.
    """
    count = losses.sizes["step"]
    steps = losses["step"].values if "step" in losses.coords else np.arange(count)
    values = losses.transpose("step", ...).values.reshape(count, -1)
    every = max(-(-count // points), 1)
    edges = np.arange(0, count, every)
    ends = np.append(edges[1:], count)
    means = np.add.reduceat(values, edges, axis=0, dtype=float) / (ends - edges)[:, None]
    at = steps[ends - 1]
    if losses.ndim == 1:
        return [Curve("loss", at, means[:, 0], every)]
    return [Curve(name, at, over, every) for name, over in _over_cells(means).items()]


def _over_cells(values: np.ndarray) -> dict[str, np.ndarray]:
    """Quantiles of each row, of the cells whose fit has losses at all."""
    alive = values[:, np.isfinite(values).any(axis=0)]
    if not alive.size:
        return {}
    # Where a cell's loss is not finite, it is infinite: worse than any other.
    worst = np.where(np.isfinite(alive), alive, np.inf)
    found = np.quantile(worst, list(_OVER_CELLS.values()), axis=1, method="nearest")
    return dict(zip(_OVER_CELLS, found, strict=True))
