"""Which labels each step of a minibatch fit sees: an order of blocks, rows and batches.

A pass over the data is an *epoch*. It goes through *windows*: a few chunks of each batched
dimension, taken in a shuffled order, small enough to be in memory. The rows of a window are
permuted and cut into batches. What does not come out even is settled by chance, so that
every label is visited once an epoch in expectation, whatever the chunks. All of it is a
function of the seed and the number of the epoch: a run that was cut short finds its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from xr_aimz.binding import Binding
from xr_aimz.errors import DimensionError, OptionError
from xr_aimz.inputs import Inputs
from xr_aimz.spelling import list_names
from xr_aimz.whole_numbers import parse_count

__all__ = ["Batches", "Deck", "Visit", "batch_sizes", "batches", "decks", "epoch"]

# A numpy-backed dimension has no chunks: so many of its pieces make a window.
_PIECES = 4
# Of what may be kept, a window that streams is a quarter: one is trained on, the next lies
# decoded, permuted and on its way to the device (docs/decisions/minibatch.md).
_SHARE = 4


@dataclass(frozen=True)
class Batches:
    """How batched dimensions are cut.

    Parameters
    ----------
    sizes, lengths : mapping of dim to int
        Of a batch and of the Dataset, for each batched dimension.
    chunks : mapping of dim to tuple of int
    windows : mapping of dim to int
        Into how many windows the chunks of a dimension are shared out.
    """

    sizes: Mapping[str, int]
    lengths: Mapping[str, int]
    chunks: Mapping[str, tuple[int, ...]]
    windows: Mapping[str, int]

    @property
    def resident(self) -> bool:
        """Whether one window has all of the data, which then stay in memory."""
        return all(n == 1 for n in self.windows.values())

    @property
    def per_epoch(self) -> float:
        """The expected number of batches in an epoch."""
        return prod(n / self.sizes[d] for d, n in self.lengths.items())

    def longest(self, dim: str) -> int:
        """The most rows of a window along a dimension."""
        chunks = sorted(self.chunks[dim], reverse=True)
        return sum(chunks[: -(-len(chunks) // self.windows[dim])])

    @property
    def most(self) -> int:
        """The most batches in a window."""
        return prod(-(-self.longest(d) // n) for d, n in self.sizes.items())


@dataclass(frozen=True)
class Visit:
    """One window and the batches cut from it.

    Parameters
    ----------
    epoch, before : int
        The number of the epoch, and how many of its batches come before these.
    chunks : mapping of dim to tuple of (start, stop)
        The chunks of the window.
    order : mapping of dim to array of int
        The permutation of the window's rows; none where all data are one window.
    turns : mapping of dim to int
        Where all data are one window: where in a :class:`Deck`'s order it begins.
    starts : array of int (batch, dim)
        Where each batch begins among the permuted rows.
    """

    epoch: int
    before: int
    chunks: Mapping[str, tuple[tuple[int, int], ...]]
    order: Mapping[str, np.ndarray]
    turns: Mapping[str, int]
    starts: np.ndarray


@dataclass(frozen=True)
class Deck:
    """Orders of all rows of a dimension, one for each epoch, at no cost.

    A fresh permutation takes as long as all the steps of its epoch, and rows gathered from here
    and there as long as a step. So there is one, drawn once, in which data are held: an epoch
    begins at a uniform place of it and goes round, and a batch is a slice. Every row is as likely
    to be at every place of an epoch, and the batches of two epochs are cut at different places.
    """

    kept: np.ndarray

    def order(self, turn: int) -> np.ndarray:
        return np.roll(self.kept, -turn)


def decks(made: Batches, seed: int) -> dict[str, Deck]:
    """The orders of each batched dimension."""
    rng = np.random.default_rng(seed)
    return {d: Deck(rng.permutation(length)) for d, length in made.lengths.items()}


def batch_sizes(batch: Any, binding: Binding, inputs: Inputs) -> dict[str, int]:
    """The size of a batch along each batched dimension, checked.

    Raises
    ------
    OptionError
        A size that is no positive int, that is larger than the data, or along a core dim.
    DimensionError
        A dimension that is no observation dimension of the fit.
    """
    free = [d for d in binding.dims if d not in binding.core_dims]
    if not isinstance(batch, Mapping):
        return _leading(batch, free, {d: inputs.sizes[d] for d in binding.dims})
    if not batch:
        raise OptionError(f"batch={batch!r} names no dimension; there are {free!r}")
    for dim, size in batch.items():
        _check_int(batch, size)
        if dim in binding.core_dims:
            raise OptionError(
                f"batch={batch!r}: the model couples {dim!r} (core_dim), so it is never cut; "
                f"batches can be along {free!r}"
            )
        if dim not in free:
            raise DimensionError(
                f"batch={batch!r}: {dim!r} is no observation dimension; there are "
                f"{list_names(free, dim)}"
            )
        if size > inputs.sizes[dim]:
            raise OptionError(
                f"batch={batch!r} is larger than the data, which have {inputs.sizes[dim]} "
                f"entries along {dim!r}; leave batch= out, or give fewer"
            )
    return {d: int(batch[d]) for d in free if d in batch}


def _leading(batch: Any, free: list[str], lengths: Mapping[str, int]) -> dict[str, int]:
    """About so many observations, along the first dimension that may be cut."""
    _check_int(batch, batch)
    if not free:
        raise OptionError(f"batch={batch!r}: every dimension is a core_dim, which is never cut")
    count = prod(lengths.values())
    if batch > count:
        raise OptionError(
            f"batch={batch!r} is larger than the data, which have {count} observations; "
            "leave batch= out, or give fewer"
        )
    return {free[0]: max(1, round(batch * lengths[free[0]] / count))}


def _check_int(batch: Any, size: Any) -> None:
    try:
        parse_count("batch", size)
    except OptionError:
        raise OptionError(
            f"batch={batch!r}: a size is an int of at least 1; give a number of observations, "
            "or a mapping of dims to sizes"
        ) from None


def batches(sizes: Mapping[str, int], inputs: Inputs, weights: Any, budget: int) -> Batches:
    """Share out the chunks of the batched dimensions into windows.

    Parameters
    ----------
    sizes : mapping of dim to int
        Of a batch.
    inputs : Inputs
    weights : iterable of (dims, bytes)
        For each array, the batched dims it has and what one entry along them weighs.
    budget : int
        Bytes. Data of no more are one window; else a window has at most a quarter, but it
        holds a batch all the same, and at least one chunk.
    """
    lengths = {d: inputs.sizes[d] for d in sizes}

    def weigh(rows: Mapping[str, int]) -> int:
        return sum(prod(rows[d] for d in dims) * size for dims, size in weights)

    if weigh(lengths) <= budget:
        # Nothing to stream: the chunks need not be kept apart.
        whole = {d: (n,) for d, n in lengths.items()}
        return Batches(sizes, lengths, whole, dict.fromkeys(sizes, 1))
    rows, budget = dict(sizes), max(1, budget // _SHARE)
    chunks, windows = {}, {}
    for dim, length in lengths.items():
        one = max(1, weigh({**rows, dim: 1}))
        most = max(1, budget // one)
        chunks[dim] = inputs.chunks.get(dim) or _even(length, max(1, most // _PIECES))
        windows[dim] = _windows(chunks[dim], sizes[dim], most)
        made = Batches(sizes, lengths, chunks, windows)
        rows[dim] = made.longest(dim)
    return Batches(sizes, lengths, chunks, windows)


def _windows(chunks: tuple[int, ...], size: int, most: int) -> int:
    """As few windows as keep within ``most`` rows, but none with fewer rows than a batch."""
    rising = np.sort(chunks)
    least = int(np.searchsorted(np.cumsum(rising), size)) + 1
    fitting = int(np.searchsorted(np.cumsum(rising[::-1]), most, side="right"))
    return max(1, min(-(-len(chunks) // max(fitting, 1)), len(chunks) // least))


def _even(length: int, most: int) -> tuple[int, ...]:
    pieces = -(-length // most)
    return tuple(int(n) for n in np.diff(np.linspace(0, length, pieces + 1).astype(int)))


def epoch(made: Batches, seed: int, number: int) -> Iterator[Visit]:
    """The windows of one epoch, in order. Cheap: nothing is loaded.

    Each label is in one batch of the epoch in expectation: a window of ``R`` rows is cut
    into ``R / size`` batches, rounded up or down by chance; a last batch that lacks rows
    takes some that the one before it had.
    """
    rng = np.random.default_rng([seed, number])
    edges = {d: np.cumsum((0, *c)) for d, c in made.chunks.items()}
    shares = [
        np.array_split(rng.permutation(len(c)), made.windows[d]) for d, c in made.chunks.items()
    ]
    windows = list(product(*shares))
    before = 0
    for place in rng.permutation(len(windows)):
        chosen = zip(made.chunks, windows[place], strict=True)
        chunks = {
            d: tuple((int(edges[d][k]), int(edges[d][k + 1])) for k in np.sort(own))
            for d, own in chosen
        }
        rng_here = np.random.default_rng([seed, number, int(place)])
        starts = _starts(made, chunks, rng_here)
        if len(starts):
            order, turns = {}, {}
            if made.resident:
                turns = {d: int(rng_here.integers(n)) for d, n in made.lengths.items()}
            else:
                order = {d: rng_here.permutation(_rows(c)) for d, c in chunks.items()}
            yield Visit(number, before, chunks, order, turns, starts)
        before += len(starts)


def _starts(
    made: Batches, chunks: Mapping[str, tuple[tuple[int, int], ...]], rng: np.random.Generator
) -> np.ndarray:
    starts = []
    for d, size in made.sizes.items():
        rows = _rows(chunks[d])
        count = int(rows / size + rng.random())
        starts.append(np.minimum(size * np.arange(count), rows - size))
    grid = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(starts))
    return rng.permutation(grid)


def _rows(chunks: tuple[tuple[int, int], ...]) -> int:
    return sum(stop - start for start, stop in chunks)
