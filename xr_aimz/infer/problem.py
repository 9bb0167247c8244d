"""What an inference is given, and what it gives back, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xr_aimz.binding import Binding
from xr_aimz.further import Origin
from xr_aimz.inputs import Inputs
from xr_aimz.model import Block, Site
from xr_aimz.requirements import Requirement

__all__ = ["Draws", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A model and the arguments it is to be fitted to.

    ``arguments`` are arrays and constants by name, outcomes included. Where the data stream
    in batches there are none: they come from ``inputs``, by way of ``binding``, and what lazy
    ones must satisfy is among the ``requirements``.
    """

    model: Callable
    arguments: Mapping[str, Any]
    block: Block
    sites: Mapping[str, Site]
    binding: Binding | None = None
    inputs: Inputs | None = None
    requirements: tuple[Requirement, ...] = ()

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
    loss_every : int
        Each loss is the mean over so many steps.
    epoch_steps : float
        How many steps take a pass over the data.
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
    more : callable, optional
        Further draws: of a number of draws and a seed, a mapping like ``samples``; or Draws,
        where the next further ones start elsewhere, as a chain does.
    state : mapping of name to array
        What a later fit goes on from, where the method can.
    origin : Origin, optional
        What ``more`` draws from, where a store can keep it.
    max_tree_depth : int, optional
        Of the trees of NUTS.
    concerns : tuple of str
        What the inference itself found to speak against the draws.
    """

    samples: Mapping[str, np.ndarray]
    shape: tuple[int, int]
    method: str
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    losses: np.ndarray | None = None
    full_rate_steps: int = 0
    more: Callable[[int, int], Mapping[str, np.ndarray] | Draws] | None = None
    loss_every: int = 1
    epoch_steps: float = 1.0
    state: Mapping[str, Any] = field(default_factory=dict)
    loss_steps: tuple[int, ...] = ()
    status: np.ndarray | None = None
    origin: Origin | None = None
    max_tree_depth: int | None = None
    concerns: tuple[str, ...] = ()
