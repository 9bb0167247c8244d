"""What an inference is given, and what it gives back, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xr_aimz.model import Block, Site

__all__ = ["Draws", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A model and the arguments it is to be fitted to.

    ``arguments`` are arrays and constants by name, outcomes included.
    """

    model: Callable
    arguments: Mapping[str, Any]
    block: Block
    sites: Mapping[str, Site]

    def named(self, kind: str) -> list[str]:
        return [name for name, site in self.sites.items() if site.kind == kind]


@dataclass(frozen=True)
class Draws:
    """Draws from a posterior, not yet labelled.

    Parameters
    ----------
    samples, stats : mapping of name to array ``(chain, draw, ...)``
    params : mapping of name to pytree
        Values of ``param`` sites (and mutable state), the same for all draws.
    losses : array ``(step,)``, optional
    full_rate_steps : int
        How many of the steps were taken at the optimizer's full rate.
    loss_steps : tuple of int
        After which steps the losses were taken, where not after each.
    status : array, optional
        Of each cell of a fit with ``per``: which of :data:`xr_aimz.infer.cells.FLAGS`. The
        cells' dims follow ``chain`` and ``draw`` in samples and stats, and ``step`` in losses.
    shape : tuple of int
        The number of chains, and of draws a chain.
    method : str
        A line about how they were made.
    """

    samples: Mapping[str, np.ndarray]
    shape: tuple[int, int]
    method: str
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    losses: np.ndarray | None = None
    full_rate_steps: int = 0
    loss_steps: tuple[int, ...] = ()
    status: np.ndarray | None = None
