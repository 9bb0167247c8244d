"""Plan the windows and batches of a minibatch fit, and read their arrays one window ahead.

A batch is a slice of permuted rows; a window is a set of chunks, loaded together, from which
batches are taken; an epoch goes through all windows once.
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

from xr_aimz.binding import (
    AlignedInputs,
    Binding,
    Requirement,
    as_jax_array,
    check_values,
    jax_dtype,
    part_block,
    resize,
    whole_block,
)
from xr_aimz.errors import DimensionError, OptionError, list_names
from xr_aimz.options import parse_count

# A numpy-backed dimension has no chunks: it is split so that this many parts make a window.
_PIECES = 4
# A streamed window takes a quarter of the budget: one is trained on, while the next is decoded,
# permuted and copied to the device (docs/decisions/minibatch.md).
_SHARE = 4


@dataclass(frozen=True)
class WindowSizes:
    """Sizes of batches, chunks and windows along the batched dims.

    Parameters
    ----------
    sizes, lengths : mapping of dim to int
        Of a batch and of the Dataset, for each batched dimension.
    chunks : mapping of dim to tuple of int
    windows : mapping of dim to int
        The number of windows that the chunks of a dimension are distributed over.
    """

    sizes: Mapping[str, int]
    lengths: Mapping[str, int]
    chunks: Mapping[str, tuple[int, ...]]
    windows: Mapping[str, int]

    @property
    def resident(self) -> bool:
        """Return whether one window has all of the data, which then stay in memory."""
        return all(n == 1 for n in self.windows.values())

    @property
    def per_epoch(self) -> float:
        """Expected number of batches in an epoch."""
        return prod(n / self.sizes[d] for d, n in self.lengths.items())

    def longest(self, dim: str) -> int:
        """Return the largest number of rows of a window along a dim."""
        chunks = sorted(self.chunks[dim], reverse=True)
        return sum(chunks[: -(-len(chunks) // self.windows[dim])])

    @property
    def most(self) -> int:
        """Largest number of batches in a window."""
        return prod(-(-self.longest(d) // n) for d, n in self.sizes.items())


@dataclass(frozen=True)
class Window:
    """One window and the batches taken from it.

    Parameters
    ----------
    epoch, before : int
        The number of the epoch, and the number of its batches before this window.
    chunks : mapping of dim to tuple of (start, stop)
        The chunks of the window.
    order : mapping of dim to array of int
        The permutation of the window's rows; empty if all data are one window.
    turns : mapping of dim to int
        If all data are one window: its first position in the :class:`ShuffledOrder`.
    starts : array of int (batch, dim)
        The first row of each batch among the permuted rows.
    """

    epoch: int
    before: int
    chunks: Mapping[str, tuple[tuple[int, int], ...]]
    order: Mapping[str, np.ndarray]
    turns: Mapping[str, int]
    starts: np.ndarray


@dataclass(frozen=True)
class ShuffledOrder:
    """Orders of all rows of a dimension, int ``(row,)``: one permutation, rotated for each epoch.

    A new permutation takes as long as all the steps of its epoch, and gathering scattered rows
    as long as a step. So one permutation is drawn once, and the data are stored in it: an epoch
    begins at a uniform position and wraps around, and a batch is a slice. Every row is equally
    likely at every position of an epoch, and the batches of two epochs begin at different rows.
    """

    rows: np.ndarray

    def order(self, turn: int) -> np.ndarray:
        return np.roll(self.rows, -turn)


def shuffled_orders(sizes: WindowSizes, seed: int) -> dict[str, ShuffledOrder]:
    """Draw the order of rows of each batched dim."""
    rng = np.random.default_rng(seed)
    return {d: ShuffledOrder(rng.permutation(length)) for d, length in sizes.lengths.items()}


def batch_sizes(batch: Any, binding: Binding, inputs: AlignedInputs) -> dict[str, int]:
    """Check ``batch=``, and return the size of a batch along each batched dim.

    Raises
    ------
    OptionError
        A size that is no positive int, that is larger than the data, or along a core dim.
    DimensionError
        A dimension that is no observation dimension of the fit.
    """
    free = [d for d in binding.dims if d not in binding.core_dims]
    if not isinstance(batch, Mapping):
        return _leading_size(batch, free, {d: inputs.sizes[d] for d in binding.dims})
    if not batch:
        raise OptionError(f"batch={batch!r} names no dimension; there are {free!r}")
    for dim, size in batch.items():
        _check_int(batch, size)
        if dim in binding.core_dims:
            raise OptionError(
                f"batch={batch!r}: the model couples {dim!r} (core_dim), so it is never "
                f"split into batches; batches can be along {free!r}"
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


def _leading_size(batch: Any, free: list[str], lengths: Mapping[str, int]) -> dict[str, int]:
    """Return a size along the first dim that may be batched, for about ``batch`` observations."""
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


def plan_windows(
    sizes: Mapping[str, int], inputs: AlignedInputs, weights: Any, budget: int
) -> WindowSizes:
    """Distribute the chunks of the batched dims over windows.

    Parameters
    ----------
    sizes : mapping of dim to int
        Of a batch.
    inputs : AlignedInputs
    weights : iterable of (dims, bytes)
        For each array, its batched dims and the bytes of one entry along them.
    budget : int
        Bytes. Data of no more are one window; else a window has at most a quarter of it, but
        always at least a batch and at least one chunk.
    """
    lengths = {d: inputs.sizes[d] for d in sizes}

    def weigh(rows: Mapping[str, int]) -> int:
        return sum(prod(rows[d] for d in dims) * size for dims, size in weights)

    if weigh(lengths) <= budget:
        # Nothing is streamed, so that the chunks do not matter.
        one_chunk = {d: (n,) for d, n in lengths.items()}
        return WindowSizes(sizes, lengths, one_chunk, dict.fromkeys(sizes, 1))
    rows, budget = dict(sizes), max(1, budget // _SHARE)
    chunks, windows = {}, {}
    for dim, length in lengths.items():
        bytes_a_row = max(1, weigh({**rows, dim: 1}))
        most = max(1, budget // bytes_a_row)
        chunks[dim] = inputs.chunks.get(dim) or _even_chunks(length, max(1, most // _PIECES))
        windows[dim] = _window_count(chunks[dim], sizes[dim], most)
        plan = WindowSizes(sizes, lengths, chunks, windows)
        rows[dim] = plan.longest(dim)
    return WindowSizes(sizes, lengths, chunks, windows)


def _window_count(chunks: tuple[int, ...], size: int, most: int) -> int:
    """Return the smallest number of windows of at most ``most`` rows, each with a whole batch."""
    ascending = np.sort(chunks)
    least_chunks = int(np.searchsorted(np.cumsum(ascending), size)) + 1
    fitting_chunks = int(np.searchsorted(np.cumsum(ascending[::-1]), most, side="right"))
    return max(1, min(-(-len(chunks) // max(fitting_chunks, 1)), len(chunks) // least_chunks))


def _even_chunks(length: int, most: int) -> tuple[int, ...]:
    count = -(-length // most)
    return tuple(int(n) for n in np.diff(np.linspace(0, length, count + 1).astype(int)))


def epoch_windows(sizes: WindowSizes, seed: int, number: int) -> Iterator[Window]:
    """Yield the windows of one epoch, in order; nothing is loaded.

    Each label is in one batch of the epoch in expectation: a window of ``R`` rows gives
    ``R / size`` batches, rounded up or down at random; a last batch that lacks rows
    takes some of the batch before it.
    """
    rng = np.random.default_rng([seed, number])
    edges = {d: np.cumsum((0, *c)) for d, c in sizes.chunks.items()}
    shares = [
        np.array_split(rng.permutation(len(c)), sizes.windows[d]) for d, c in sizes.chunks.items()
    ]
    windows = list(product(*shares))
    before = 0
    for window_number in rng.permutation(len(windows)):
        window_chunks = zip(sizes.chunks, windows[window_number], strict=True)
        chunks = {
            d: tuple((int(edges[d][k]), int(edges[d][k + 1])) for k in np.sort(chunk_numbers))
            for d, chunk_numbers in window_chunks
        }
        window_rng = np.random.default_rng([seed, number, int(window_number)])
        starts = _batch_starts(sizes, chunks, window_rng)
        if len(starts):
            order, turns = {}, {}
            if sizes.resident:
                turns = {d: int(window_rng.integers(n)) for d, n in sizes.lengths.items()}
            else:
                order = {d: window_rng.permutation(_row_count(c)) for d, c in chunks.items()}
            yield Window(number, before, chunks, order, turns, starts)
        before += len(starts)


def _batch_starts(
    plan: WindowSizes, chunks: Mapping[str, tuple[tuple[int, int], ...]], rng: np.random.Generator
) -> np.ndarray:
    starts = []
    for d, size in plan.sizes.items():
        rows = _row_count(chunks[d])
        count = int(rows / size + rng.random())
        starts.append(np.minimum(size * np.arange(count), rows - size))
    grid = np.stack(np.meshgrid(*starts, indexing="ij"), -1).reshape(-1, len(starts))
    return rng.permutation(grid)


def _row_count(chunks: tuple[tuple[int, int], ...]) -> int:
    return sum(stop - start for start, stop in chunks)


Arrays = dict[str, Any]


@dataclass(frozen=True)
class WindowReader:
    """Reader of the arrays of a Dataset, window by window.

    Parameters
    ----------
    inputs : AlignedInputs
        Lazy or not.
    names : mapping of source key to str
        The name of the variable of each array.
    batches : WindowSizes
    first : mapping of source key to array
        The first batch in the order of the Dataset, with the static arrays.
    static : mapping of source key to array
        Arrays without a batched dimension: loaded, and passed to every step.
    kept_windows : mapping of source key to array
        All other arrays, if they fit into one window: on the device, in the order of ``orders``,
        followed by the first rows again, so that a batch may begin at any row.
    orders : mapping of dim to ShuffledOrder
    requirements : tuple of Requirement
        Requirements on the values of a window.
    """

    inputs: AlignedInputs
    names: Mapping[str, str]
    batches: WindowSizes
    first: Arrays = field(default_factory=dict)
    static: Arrays = field(default_factory=dict)
    kept_windows: Arrays | None = None
    orders: Mapping[str, ShuffledOrder] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()

    @property
    def batched(self) -> dict[str, tuple[str, ...]]:
        """Dims of each array that has a batched dim."""
        return {k: d for k, d in self.inputs.dims.items() if set(d) & set(self.batches.sizes)}

    def positions(self, window: Window, dim: str) -> np.ndarray:
        """Return the positions in the Dataset of the rows of a window, in their order."""
        if dim in self.orders:
            return self.orders[dim].order(window.turns[dim])
        rows = np.concatenate([np.arange(*chunk) for chunk in window.chunks[dim]])
        return rows[window.order[dim]]

    def load(self, window: Window) -> Arrays:
        """Load the arrays of a window, rows permuted, padded to the size of the longest window.

        Arrays in ``kept_windows`` are returned unchanged: a step takes its rows from them.
        """
        if self.kept_windows is not None:
            return self.kept_windows
        loaded = _read_window(
            self, window, {d: self.batches.longest(d) for d in self.batches.sizes}
        )
        if self.requirements:
            # Without the padding of a window that is shorter than others.
            rows = {d: self.positions(window, d) for d in self.batches.sizes}
            lengths = {d: slice(0, len(positions)) for d, positions in rows.items()}
            arrays = {
                k: a[tuple(lengths.get(d, slice(None)) for d in self.inputs.dims[k])]
                for k, a in {**self.static, **loaded}.items()
            }
            check_values(self.requirements, part_block(self.inputs, arrays, rows))
        return loaded


def make_reader(
    binding: Binding,
    inputs: AlignedInputs,
    sizes: Mapping[str, int],
    budget: int,
    seed: int,
    requirements: tuple[Requirement, ...] = (),
) -> WindowReader:
    """Plan the windows, and load the arrays that all of them need.

    Parameters
    ----------
    binding : Binding
    inputs : AlignedInputs
    sizes : mapping of dim to int
        Of a batch, from :func:`xr_aimz.inference.minibatch_data.batch_sizes`.
    budget : int
        Bytes. Data of no more are kept; else windows of a quarter are streamed, and about four
        times the budget is in memory with the one that is being read.
    seed : int
    requirements : tuple of Requirement
        Requirements on the values of lazy arrays.
    """
    names = binding.variables
    weights = []
    for array in inputs.arrays.values():
        static_size = prod(n for d, n in array.sizes.items() if d not in sizes)
        batched_dims = tuple(d for d in sizes if d in array.dims)
        if batched_dims:
            weights.append((batched_dims, static_size * jax_dtype(array.dtype).itemsize))
    plan = plan_windows(sizes, inputs, weights, budget)
    reader = WindowReader(inputs, names, plan)
    static_keys = [k for k in inputs.arrays if k not in reader.batched]
    static = _to_device(_load_blocks(names, {k: [inputs.arrays[k].data] for k in static_keys}))
    if not plan.resident:
        windows = {**inputs.sizes, **{d: plan.longest(d) for d in sizes}}
        first = {**static, **_first_batch(reader)}
        checks = resize(requirements, windows)
        return replace(reader, static=static, first=first, requirements=checks)
    loaded = _load_blocks(names, {k: [inputs.arrays[k].data] for k in reader.batched})
    arrays = {k: blocks[0] for k, blocks in loaded.items()}
    check_values(requirements, whole_block(inputs, {**static, **arrays}))
    order = shuffled_orders(plan, seed)
    kept_windows = {
        k: _shuffle_rows(arrays[k], dims, order, sizes) for k, dims in reader.batched.items()
    }
    first = {
        k: arrays[k][tuple(slice(0, sizes.get(d)) for d in dims)]
        for k, dims in reader.batched.items()
    }
    return WindowReader(inputs, names, plan, {**static, **first}, static, kept_windows, order)


def _to_device(loaded: Mapping[str, list[np.ndarray]]) -> Arrays:
    return {k: jnp.asarray(blocks[0]) for k, blocks in loaded.items()}


def _shuffle_rows(
    values: np.ndarray,
    dims: tuple[str, ...],
    order: Mapping[str, ShuffledOrder],
    sizes: Mapping[str, int],
) -> Any:
    for axis, d in enumerate(dims):
        if d in order:
            rows = np.resize(order[d].rows, values.shape[axis] + sizes[d] - 1)
            values = np.take(values, rows, axis=axis)
    return jnp.asarray(values)


def _first_batch(reader: WindowReader) -> Arrays:
    sizes = reader.batches.sizes
    first_rows = {d: ((0, n),) for d, n in sizes.items()}
    order = {d: np.arange(n) for d, n in sizes.items()}
    return _read_window(
        reader, Window(0, 0, first_rows, order, {}, np.zeros((1, len(sizes)), int)), sizes
    )


def prefetch(
    sizes: WindowReader, visits: Iterator[Window]
) -> Generator[tuple[Window, Arrays], None, None]:
    """Yield each window with its arrays, while a thread loads the next one."""

    def load_next() -> tuple[Window, Arrays] | None:
        window = next(visits, None)
        return None if window is None else (window, sizes.load(window))

    with ThreadPoolExecutor(1, "xr_aimz-stream") as pool:
        pending = pool.submit(load_next)
        while (result := pending.result()) is not None:
            pending = pool.submit(load_next)
            yield result


def _load_blocks(
    names: Mapping[str, str], lazy: Mapping[str, list[Any]]
) -> dict[str, list[np.ndarray]]:
    # All at once, so that dask computes tasks that arrays share only once.
    (loaded,) = compute(dict(lazy))
    return {
        k: [as_jax_array(names[k], np.asarray(block)) for block in blocks]
        for k, blocks in loaded.items()
    }


def _read_window(reader: WindowReader, window: Window, lengths: Mapping[str, int]) -> Arrays:
    chunk_ranges = {
        key: list(product(*(window.chunks.get(d, ((0, reader.inputs.sizes[d]),)) for d in dims)))
        for key, dims in reader.batched.items()
    }
    lazy = {
        key: [
            reader.inputs.arrays[key].data[tuple(slice(*c) for c in ranges)]
            for ranges in key_ranges
        ]
        for key, key_ranges in chunk_ranges.items()
    }
    inverse = {d: np.argsort(order) for d, order in window.order.items()}
    loaded = _load_blocks(reader.names, lazy)
    arrays = {}
    for key, dims in reader.batched.items():
        shape = tuple(lengths.get(d, reader.inputs.sizes[d]) for d in dims)
        out = np.zeros(shape, loaded[key][0].dtype)
        targets = product(*(_target_rows(d, window, inverse, reader.inputs.sizes) for d in dims))
        for target in targets:
            out[_outer_index(target)] = loaded[key].pop(0)
        arrays[key] = out
    return arrays


def _target_rows(
    dim: str, window: Window, inverse: Mapping[str, np.ndarray], sizes: Mapping[str, int]
) -> list[Any]:
    """Return the target rows of each chunk, in the order of the chunks."""
    if dim not in window.chunks:
        return [slice(0, sizes[dim])]
    lengths = [stop - start for start, stop in window.chunks[dim]]
    ends = list(accumulate(lengths))
    return [inverse[dim][e - n : e] for e, n in zip(ends, lengths, strict=True)]


def _outer_index(target: tuple[Any, ...]) -> Any:
    """Return an index in which several arrays select along separate axes, not as pairs."""
    if sum(isinstance(p, np.ndarray) for p in target) < 2:
        return target
    return np.ix_(*(np.arange(p.stop) if isinstance(p, slice) else p for p in target))
