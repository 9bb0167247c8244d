"""What further draws of a posterior are taken from, as data that a store can keep.

A chain goes on from its last state, a guide is drawn from with its params. Either is a tree
of arrays, and words for the kernel or the guide that takes it up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xr_aimz.inputs import Inputs

__all__ = ["Kept", "Origin"]


@dataclass(frozen=True)
class Origin:
    """Where further draws start, whatever the method.

    Parameters
    ----------
    kind : {"chains", "guide", "batches"}
    settings : mapping of name to value
        What the method took: chains, warmup, sizes of batches.
    tree : pytree
        The chains' last state, or the guide's params.
    by : object
        The kernel or the guide; in :class:`Kept` words for it.
    """

    kind: str
    settings: Mapping[str, Any]
    tree: Any
    by: Any


@dataclass(frozen=True)
class Kept:
    """An origin with its kernel or guide in words, the data, and the number of the next draw."""

    origin: Origin
    inputs: Inputs
    first: int
