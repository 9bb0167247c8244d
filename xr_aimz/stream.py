"""The windows of a minibatch fit, read from a Dataset and made ready one ahead.

A window's chunks are computed together, by whatever scheduler dask has, and its rows put
in their permuted order, so that a batch is a slice. A thread does so while the window
before it is being trained on. Data that fit into one window are read once and kept, and
the rows of a batch taken from them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from dask.base import compute

from xr_aimz.batches import Batches, Deck, Visit, batches, decks
from xr_aimz.binding import Binding
from xr_aimz.casting import device_dtype, to_device_dtype
from xr_aimz.inputs import Inputs
from xr_aimz.requirements import Requirement, check_values, label_part, label_whole, resize

__all__ = ["Stream", "ahead", "stream"]

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """The arrays of a Dataset, as a minibatch fit reads them.

    Parameters
    ----------
    inputs : Inputs
        Lazy or not.
    names : mapping of source key to str
        The variable of each array.
    batches : Batches
    first : mapping of source key to array
        The first batch in the Dataset's own order, with the static arrays.
    static : mapping of source key to array
        Those without a batched dimension: loaded, and passed whole to every step.
    kept : mapping of source key to array
        All others, where they fit into one window: on the device, in the order of ``decks``,
        and then the first of them again, so that a batch may begin at any row.
    decks : mapping of dim to Deck
    requirements : tuple of Requirement
        What the values of a window must satisfy.
    """

    inputs: Inputs
    names: Mapping[str, str]
    batches: Batches
    first: Arrays = field(default_factory=dict)
    static: Arrays = field(default_factory=dict)
    kept: Arrays | None = None
    decks: Mapping[str, Deck] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()

    @property
    def batched(self) -> dict[str, tuple[str, ...]]:
        """The dims of each array that has a batched one."""
        return {k: d for k, d in self.inputs.dims.items() if set(d) & set(self.batches.sizes)}

    def positions(self, visit: Visit, dim: str) -> np.ndarray:
        """Where in the Dataset the rows of a window are, in their order."""
        if dim in self.decks:
            return self.decks[dim].order(visit.turns[dim])
        rows = np.concatenate([np.arange(*chunk) for chunk in visit.chunks[dim]])
        return rows[visit.order[dim]]

    def load(self, visit: Visit) -> Arrays:
        """The arrays of a window, rows permuted; padded to the size of the longest window.

        Those that are kept are given as they are: a step takes its rows from them.
        """
        if self.kept is not None:
            return self.kept
        found = _read(self, visit, {d: self.batches.longest(d) for d in self.batches.sizes})
        if self.requirements:
            # Less the padding of a window that is shorter than others.
            rows = {d: self.positions(visit, d) for d in self.batches.sizes}
            lengths = {d: slice(0, len(own)) for d, own in rows.items()}
            arrays = {
                k: a[tuple(lengths.get(d, slice(None)) for d in self.inputs.dims[k])]
                for k, a in {**self.static, **found}.items()
            }
            check_values(self.requirements, label_part(self.inputs, arrays, rows))
        return found


def stream(
    binding: Binding,
    inputs: Inputs,
    sizes: Mapping[str, int],
    budget: int,
    seed: int,
    requirements: tuple[Requirement, ...] = (),
) -> Stream:
    """Plan the windows, and load what every one of them needs.

    Parameters
    ----------
    binding : Binding
    inputs : Inputs
    sizes : mapping of dim to int
        Of a batch, from :func:`xr_aimz.batches.batch_sizes`.
    budget : int
        Bytes. Data of no more are kept; else windows of a quarter stream, and some four times
        the budget is in memory with the one being read.
    seed : int
    requirements : tuple of Requirement
        What the values of lazy arrays must satisfy.
    """
    names = {s.key: s.name for a in binding.arguments for s in a.sources}
    weights = []
    for array in inputs.arrays.values():
        other = prod(n for d, n in array.sizes.items() if d not in sizes)
        own = tuple(d for d in sizes if d in array.dims)
        if own:
            weights.append((own, other * device_dtype(array.dtype).itemsize))
    made = batches(sizes, inputs, weights, budget)
    bare = Stream(inputs, names, made)
    still = [k for k in inputs.arrays if k not in bare.batched]
    static = _on_device(_computed(names, {k: [inputs.arrays[k].data] for k in still}))
    if not made.resident:
        windows = {**inputs.sizes, **{d: made.longest(d) for d in sizes}}
        first = {**static, **_first(bare)}
        checks = resize(requirements, windows)
        return replace(bare, static=static, first=first, requirements=checks)
    loaded = _computed(names, {k: [inputs.arrays[k].data] for k in bare.batched})
    whole = {k: pieces[0] for k, pieces in loaded.items()}
    check_values(requirements, label_whole(inputs, {**static, **whole}))
    order = decks(made, seed)
    kept = {k: _dealt(whole[k], dims, order, sizes) for k, dims in bare.batched.items()}
    first = {
        k: whole[k][tuple(slice(0, sizes.get(d)) for d in dims)]
        for k, dims in bare.batched.items()
    }
    return Stream(inputs, names, made, {**static, **first}, static, kept, order)


def _on_device(loaded: Mapping[str, list[np.ndarray]]) -> Arrays:
    return {k: jnp.asarray(pieces[0]) for k, pieces in loaded.items()}


def _dealt(
    values: np.ndarray, dims: tuple[str, ...], order: Mapping[str, Deck], sizes: Mapping[str, int]
) -> Any:
    for axis, d in enumerate(dims):
        if d in order:
            rows = np.resize(order[d].kept, values.shape[axis] + sizes[d] - 1)
            values = np.take(values, rows, axis=axis)
    return jnp.asarray(values)


def _first(made: Stream) -> Arrays:
    sizes = made.batches.sizes
    head = {d: ((0, n),) for d, n in sizes.items()}
    order = {d: np.arange(n) for d, n in sizes.items()}
    return _read(made, Visit(0, 0, head, order, {}, np.zeros((1, len(sizes)), int)), sizes)


def ahead(made: Stream, visits: Iterator[Visit]) -> Generator[tuple[Visit, Arrays], None, None]:
    """Each visit with its arrays, the next one being loaded by a thread meanwhile."""

    def following() -> tuple[Visit, Arrays] | None:
        visit = next(visits, None)
        return None if visit is None else (visit, made.load(visit))

    with ThreadPoolExecutor(1, "xr_aimz-stream") as pool:
        coming = pool.submit(following)
        while (found := coming.result()) is not None:
            coming = pool.submit(following)
            yield found


def _computed(
    names: Mapping[str, str], lazy: Mapping[str, list[Any]]
) -> dict[str, list[np.ndarray]]:
    # Together, so that what arrays share is read once.
    (loaded,) = compute(dict(lazy))
    return {
        k: [to_device_dtype(names[k], np.asarray(piece)) for piece in pieces]
        for k, pieces in loaded.items()
    }


def _read(made: Stream, visit: Visit, lengths: Mapping[str, int]) -> Arrays:
    cuts = {
        key: list(product(*(visit.chunks.get(d, ((0, made.inputs.sizes[d]),)) for d in dims)))
        for key, dims in made.batched.items()
    }
    lazy = {
        key: [made.inputs.arrays[key].data[tuple(slice(*c) for c in cut)] for cut in each]
        for key, each in cuts.items()
    }
    inverse = {d: np.argsort(order) for d, order in visit.order.items()}
    loaded = _computed(made.names, lazy)
    found = {}
    for key, dims in made.batched.items():
        shape = tuple(lengths.get(d, made.inputs.sizes[d]) for d in dims)
        out = np.zeros(shape, loaded[key][0].dtype)
        places = product(*(_places(d, visit, inverse, made.inputs.sizes) for d in dims))
        for place in places:
            out[_index(place)] = loaded[key].pop(0)
        found[key] = out
    return found


def _places(
    dim: str, visit: Visit, inverse: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> list[Any]:
    """Where the rows of each chunk go, in the order of the chunks."""
    if dim not in visit.chunks:
        return [slice(0, sizes[dim])]
    lengths = [stop - start for start, stop in visit.chunks[dim]]
    ends = list(accumulate(lengths))
    return [inverse[dim][e - n : e] for e, n in zip(ends, lengths, strict=True)]


def _index(place: tuple[Any, ...]) -> Any:
    """An index that takes several arrays as the axes that they are, not as pairs."""
    if sum(isinstance(p, np.ndarray) for p in place) < 2:
        return place
    return np.ix_(*(np.arange(p.stop) if isinstance(p, slice) else p for p in place))
