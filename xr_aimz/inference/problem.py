"""Define the input and the output of an inference: a problem, and posterior draws.

Every method takes an :class:`InferenceProblem`, a model with its arrays, and returns
:class:`PosteriorDraws`. A :class:`SamplerState` is what later draws of the same fit start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from xr_aimz.binding import AlignedInputs, Binding, Requirement
from xr_aimz.tracing import Block, Site

DRAWN = MappingProxyType({"draws": 1000})
CHAINS = MappingProxyType({**DRAWN, "chains": 4, "warmup": 1000})
STEPPED = MappingProxyType({**DRAWN, "steps": 10_000})
LEARNING_RATE = 0.05


@dataclass(frozen=True)
class SamplerState:
    """State of a sampler, from which more draws start, of any method.

    Parameters
    ----------
    kind : {"chains", "guide", "batches"}
    settings : mapping of name to value
        The settings of the method: chains, warmup, sizes of batches.
    tree : pytree
        The last state of the chains, or the params of the guide.
    by : object
        The kernel or the guide; in a :class:`SavedSampler` its description, by class name and
        settings.
    """

    kind: str
    settings: Mapping[str, Any]
    tree: Any
    by: Any


@dataclass(frozen=True)
class SavedSampler:
    """Sampler state to save: kernel or guide by description, the data, number of the next draw."""

    origin: SamplerState
    inputs: AlignedInputs
    first: int


@dataclass(frozen=True)
class InferenceProblem:
    """Model and the arguments to fit it to.

    ``arguments`` are arrays and constants by name, outcomes included. A fit in batches has
    none: its batches are read from ``inputs`` through ``binding``, and the conditions that lazy
    values must satisfy are among the ``requirements``.
    """

    model: Callable
    arguments: Mapping[str, Any]
    block: Block
    sites: Mapping[str, Site]
    binding: Binding | None = None
    inputs: AlignedInputs | None = None
    requirements: tuple[Requirement, ...] = ()

    def named(self, kind: str) -> list[str]:
        """Return the names of the sites of a kind, such as ``"latent"``."""
        return [name for name, site in self.sites.items() if site.kind == kind]


@dataclass(frozen=True)
class PosteriorDraws:
    """Posterior draws of each latent site, ``(chain, draw, ...)``, without labels.

    Parameters
    ----------
    samples, stats : mapping of name to array ``(chain, draw, ...)``
    params : mapping of name to pytree
        Values of ``param`` sites (and mutable state), the same for all draws.
    losses : array ``(step,)``, optional
    loss_every : int
        The number of steps over which each loss is a mean.
    epoch_steps : float
        The number of steps in one pass over the data.
    full_rate_steps : int
        The number of steps that were taken at the optimizer's full rate.
    loss_steps : tuple of int
        The steps after which the losses were taken, if not after every step.
    status : array, optional
        Flags of each cell of a fit with ``per``, from
        :data:`xr_aimz.inference.per_cell_program.FLAGS`. The cells' dims follow ``chain`` and
        ``draw`` in samples and stats, and ``step`` in losses.
    shape : tuple of int
        The number of chains, and the number of draws of each chain.
    method : str
        One line that describes the method and its settings.
    continue_ : callable, optional
        Takes a number of draws and a seed and returns more draws: a mapping like ``samples``,
        or PosteriorDraws if the draws after them start from another state, as those of a chain
        do.
    state : mapping of name to array
        The state that a later fit continues from, for methods that can.
    origin : SamplerState, optional
        The state that ``continue_`` draws from, if a store can hold it.
    max_tree_depth : int, optional
        The depth at which the trees of NUTS stop.
    concerns : tuple of str
        Reasons against trusting the draws that the inference itself detected.
    """

    samples: Mapping[str, np.ndarray]
    shape: tuple[int, int]
    method: str
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    losses: np.ndarray | None = None
    full_rate_steps: int = 0
    continue_: Callable[[int, int], Mapping[str, np.ndarray] | PosteriorDraws] | None = None
    loss_every: int = 1
    epoch_steps: float = 1.0
    state: Mapping[str, Any] = field(default_factory=dict)
    loss_steps: tuple[int, ...] = ()
    status: np.ndarray | None = None
    origin: SamplerState | None = None
    max_tree_depth: int | None = None
    concerns: tuple[str, ...] = ()


@dataclass(frozen=True)
class PreviousFit:
    """Fit to continue, as ``init=``: the state of its minibatch run, empty for other methods."""

    method: str
    state: Mapping[str, Any]
