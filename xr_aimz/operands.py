"""What every block of a graph takes its own part of: arrays, draws, keys, words of labels.

Each is a dask array, and a block's part lies within one of its chunks. The task cuts it out
itself: a task of dask's for every cut cost more than the draws of a small block
(docs/decisions/block-size.md).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task as GraphTask
from dask.highlevelgraph import HighLevelGraph

from xr_aimz.identity import named_by
from xr_aimz.inputs import Inputs
from xr_aimz.labels import label_words

__all__ = ["KINDS", "Dims", "Operand", "operands"]

KINDS = ("keys", "words", "array", "latent", "labels")
Dims = tuple[str | None, ...]
_TITLES = {
    "keys": "the seed, or the labels of chains and draws",
    "words": "the labels of {!r}",
    "array": "the values of {!r}",
    "latent": "the draws of {!r}",
    "labels": "the coordinate {!r}",
}
# Of the keys: the last axes, of sites and of the two words of a key, are no dims of a block's.
_KEYS: Dims = ("chain", "draw", None, None)


@dataclass(frozen=True, eq=False)
class Operand:
    """An array that blocks take their part of.

    Parameters
    ----------
    kind : {"keys", "words", "array", "latent", "labels"}
    name : str
        Of its kind: a source key, a site, or the dim of the words or labels.
    dims : tuple of str or None
        None for an axis that every block has whole, whatever a Dataset's dims are called.
    array : dask.array.Array
    pieces : tuple of tuple of (int, slice)
        For each dim, and each block along it: the chunk, and where in that.
    """

    kind: str
    name: str
    dims: Dims
    array: da.Array
    pieces: tuple[tuple[tuple[int, slice], ...], ...]

    @property
    def title(self) -> str:
        """What it is, for a message."""
        return _TITLES[self.kind].format(self.name)

    def part(self, at: Mapping[str, int]) -> tuple[tuple[Any, ...], tuple[slice, ...]]:
        """The chunk for the block at those places, by its key, and the part of it to take."""
        axes = zip(self.dims, self.pieces, strict=True)
        own = [pieces[0 if dim is None else at.get(dim, 0)] for dim, pieces in axes]
        return (self.array.name, *(i for i, _ in own)), tuple(part for _, part in own)


def operands(
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    site_keys: np.ndarray,
    cut_dims: tuple[str, ...],
    chunks: Mapping[str, tuple[int, ...]],
    labelled: Iterable[str] = (),
) -> list[Operand]:
    """The operands of blocks, lazy where they are lazy.

    Parameters
    ----------
    inputs : Inputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    site_keys : array of uint32 ``(chain, draw, site, 2)``
    cut_dims : tuple of str
        Whose words a block needs.
    chunks : mapping of dim to tuple of int
        Of the blocks, along chain and draw too.
    labelled : iterable of str
        The dims whose labels, or positions where there are none, a block needs as well.
    """
    found: list[tuple[str, str, Dims, Any]] = [("keys", "", _KEYS, site_keys)]
    found += [("words", d, (d, None), _words(d, inputs, chunks[d])) for d in cut_dims]
    for kind, arrays in (("array", inputs.arrays), ("latent", latents)):
        found += [(kind, n, tuple(map(str, a.dims)), a.data) for n, a in arrays.items()]
    found += [("labels", d, (d,), _labels(d, inputs, chunks)) for d in labelled]
    return [_operand(*each, chunks) for each in found]


def _operand(
    kind: str, name: str, dims: Dims, array: Any, chunks: Mapping[str, tuple[int, ...]]
) -> Operand:
    wanted = tuple(
        (n,) if d is None else chunks.get(d, (n,)) for d, n in zip(dims, array.shape, strict=True)
    )
    if not isinstance(array, da.Array):
        array = np.asarray(array)
        array = da.from_array(array, wanted, name=named_by("input", array, wanted))
    elif not all(map(_within, wanted, array.chunks)):
        array = array.rechunk(wanted)
    pieces = tuple(tuple(_pieces(*both)) for both in zip(wanted, array.chunks, strict=True))
    return Operand(kind, name, dims, array, pieces)


def _within(wanted: tuple[int, ...], chunks: tuple[int, ...]) -> bool:
    """Whether every block lies in one chunk."""
    return set(accumulate(chunks)) <= set(accumulate(wanted))


def _pieces(wanted: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    starts = tuple(accumulate((0, *chunks[:-1])))
    for start, length in zip(accumulate((0, *wanted[:-1])), wanted, strict=True):
        chunk = bisect_right(starts, start) - 1
        first = start - starts[chunk]
        yield chunk, slice(first, first + length)


def _labels(dim: str, inputs: Inputs, chunks: Mapping[str, tuple[int, ...]]) -> Any:
    if dim in inputs.labels:
        return xr.IndexVariable(dim, inputs.labels[dim]).values
    size = inputs.sizes[dim]
    return da.arange(size, chunks=(chunks.get(dim, (size,)),))


def _words(dim: str, inputs: Inputs, chunks: tuple[int, ...]) -> Any:
    labels = inputs.labels.get(dim)
    if labels is not None:
        return label_words(dim, labels, size=inputs.sizes[dim])
    # Positions are labels that a block can count for itself: there may be very many.
    name = named_by("words", dim, chunks)
    starts = accumulate((0, *chunks[:-1]))
    graph: dict[Any, Any] = {
        (name, i, 0): GraphTask((name, i, 0), _position_words, dim, start, length)
        for i, (start, length) in enumerate(zip(starts, chunks, strict=True))
    }
    layer = HighLevelGraph.from_collections(name, graph)
    return da.Array(layer, name, (chunks, (2,)), meta=np.empty((0, 0), np.uint32))


def _position_words(dim: str, start: int, length: int) -> np.ndarray:
    return label_words(dim, np.arange(start, start + length))
