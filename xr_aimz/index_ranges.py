"""Refuse values that are no positions on the axis that a model takes entries of by them.

JAX takes the last entry for a position beyond an axis, and counts a negative one from the end:
``a[group]`` with a group that the fit never had, or with -1, as pandas codes a missing category,
predicts another group's mean. Inputs that are positions as they are, are compared with the axis;
positions that a model computes from inputs are computed first, by a program of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from xr_aimz.binding import block_of
from xr_aimz.casting import to_device_dtype
from xr_aimz.device import run, trace
from xr_aimz.errors import IndexRangeError
from xr_aimz.fingerprint import RecentlyUsed
from xr_aimz.index_bounds import Position, find_positions, has_positions, positions_of
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Call, Program
from xr_aimz.requirements import BlockValues, Requirement
from xr_aimz.supports import call_structs, make_blank, pad_to, resize_structs

__all__ = ["ComputedIndexRange", "Factory", "IndexRange", "PositionKernel", "find_index_ranges"]

Factory = Callable[[Program, Mapping[str, int]], Call]

_SHOWN = 10
# By the name of a program and of its arguments: a model in a server meets the same ones again.
_positions = RecentlyUsed[tuple[tuple[Position, ...], str]](256)


@dataclass(frozen=True, eq=False)
class IndexRange:
    """A requirement: all values of an input are positions on an axis.

    Parameters
    ----------
    key : str
        Of the array.
    what : str
        The array in words.
    highest : int
        The last position; the first is 0.
    axis : str
        The axis in words.
    """

    key: str
    what: str
    highest: int
    axis: str

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.key})

    def at(self, sizes: Mapping[str, int]) -> IndexRange:
        """Itself: it holds for blocks of any sizes."""
        return self

    def check(self, values: BlockValues) -> None:
        """Compare the least and the greatest value with the axis.

        Raises
        ------
        IndexRangeError
        """
        array = values.arrays[self.key]
        if not array.size or (array.min() >= 0 and array.max() <= self.highest):
            return
        outside = (array < 0) | (array > self.highest)
        first = np.unravel_index(int(outside.argmax()), array.shape)
        place = values.place(values.dims[self.key], map(int, first))
        count = f"{int(outside.sum())} of {array.size}"
        raise _beyond(self.what, int(array[first]), place, count, self.axis, self.highest)


@dataclass(frozen=True, eq=False)
class PositionKernel:
    """A kernel that returns the positions that another computes from its arrays.

    Parameters
    ----------
    factory : callable
        Makes the other kernel from the program and the sizes of a block.
    program : Program
    latents : frozenset of str
        The sites whose values it is passed.
    arrays : mapping of key to jax.ShapeDtypeStruct
    params : mapping of name to pytree
    """

    factory: Factory
    program: Program
    latents: frozenset[str]
    arrays: Mapping[str, Any]
    params: Mapping[str, Any]

    def structs(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes and dtypes of what it is called with, on a block of those sizes."""
        arrays = resize_structs(self.program, self.arrays, sizes)
        draw, shared = call_structs(self.program, arrays, self.params, sizes)
        latents = {n: struct for n, struct in draw["latents"].items() if n in self.latents}
        return {**draw, "latents": latents}, shared

    def call(self, sizes: Mapping[str, int]) -> Call:
        """Make the kernel for blocks of those sizes."""
        structs = self.structs(sizes)

        def call(draw: Any, shared: Any) -> dict[str, Any]:
            closed = jax.make_jaxpr(self.factory(self.program, sizes))(*structs)
            computed = positions_of(closed, _names(_paths(structs)))(shared["arrays"])
            return {str(number): values for number, values in enumerate(computed)}

        return call

    def trace(self, sizes: Mapping[str, int]) -> str:
        """The name of its program for blocks of those sizes."""
        block = block_of(self.program.binding, sizes)
        _, _, name = trace(self.call(sizes), block, *self.structs(sizes))
        return name


@dataclass(frozen=True, eq=False)
class ComputedIndexRange:
    """A requirement: what a model computes from inputs to index an axis, is a position on it.

    Parameters
    ----------
    keys : frozenset of str
        Of the arrays that positions are computed from.
    described : mapping of key to str
        These arrays in words.
    kernel : PositionKernel
    sizes : mapping of dim to int
        To which blocks are padded, so that one compiled program serves all.
    name : str
        Of the traced program.
    positions : tuple of (int, Position, str)
        Of each position its number among those that the program computes, and its axis in words.
    """

    keys: frozenset[str]
    described: Mapping[str, str]
    kernel: PositionKernel
    sizes: Mapping[str, int]
    name: str
    positions: tuple[tuple[int, Position, str], ...]

    def at(self, sizes: Mapping[str, int]) -> ComputedIndexRange:
        """The same requirement for blocks that are padded to other sizes."""
        return replace(self, sizes=sizes, name=self.kernel.trace(sizes))

    def check(self, values: BlockValues) -> None:
        """Compute the positions, and compare each with its axis.

        Raises
        ------
        IndexRangeError
        """
        computed = self._compute(values)
        for number, position, axis in self.positions:
            array = computed[str(number)]
            outside = (array < 0) | (array > position.highest)
            if outside.any():
                names = [self.described[key] for key in sorted(position.sources)]
                what = f"a position that the model computes from {', '.join(names)}"
                first = np.unravel_index(int(outside.argmax()), array.shape)
                place = self._place(position, array.shape, first, values)
                count = f"{int(outside.sum())} of {array.size}"
                raise _beyond(what, int(array[first]), place, count, axis, position.highest)

    def _place(
        self, position: Position, shape: tuple[int, ...], first: Any, values: BlockValues
    ) -> str:
        """The label of a position, where it is computed from one array entry by entry."""
        if len(position.sources) != 1:
            return ""
        (key,) = position.sources
        own = values.arrays[key].shape
        padded = self.kernel.structs(self.sizes)[1]["arrays"][key].shape
        if [n for n in shape if n != 1] != [n for n in padded if n != 1]:
            return ""
        index = np.unravel_index(np.ravel_multi_index(first, shape), padded)
        if any(i >= n for i, n in zip(index, own, strict=True)):
            return ""
        return values.place(values.dims[key], map(int, index))

    def _compute(self, values: BlockValues) -> dict[str, np.ndarray]:
        draw, shared = self.kernel.structs(self.sizes)
        arrays = {
            key: pad_to(struct.shape, to_device_dtype(key, _fill(values.arrays[key])))
            if key in self.keys
            else make_blank(struct)
            for key, struct in shared["arrays"].items()
        }
        draws = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), draw)
        computed = run(
            self.name,
            lambda: self.kernel.call(self.sizes),
            block_of(self.kernel.program.binding, self.sizes),
            jax.tree.map(make_blank, draws),
            {**shared, "arrays": arrays, "words": jax.tree.map(make_blank, shared["words"])},
        )
        return {number: array[0] for number, array in computed.items()}


def find_index_ranges(
    kernel: PositionKernel,
    inputs: Inputs,
    described: Mapping[str, str],
    labels: Mapping[str, pd.Index],
    name: str | None = None,
) -> tuple[Requirement, ...]:
    """The requirements on inputs from which a model takes entries of an axis.

    Parameters
    ----------
    kernel : PositionKernel
    inputs : Inputs
    described : mapping of key to str
        The arrays in words.
    labels : mapping of dim to Index
        Of the dims of latents and inputs, where they have any.
    name : str, optional
        Of the other kernel's program on all of the inputs, where it has been traced.

    Returns
    -------
    tuple of Requirement
    """
    words = {key: described.get(key, repr(key)) for key in kernel.arrays}
    paths = _paths(kernel.structs(inputs.sizes))
    positions, own = _find_once(kernel, inputs.sizes, paths, name)
    found: list[Requirement] = []
    computed = []
    for number, position in enumerate(positions):
        axis = _axis_in_words(position, paths, kernel.program, inputs, labels)
        if position.is_input:
            (key,) = position.sources
            found.append(IndexRange(key, words[key], position.highest, axis))
        else:
            computed.append((number, position, axis))
    if computed:
        keys = frozenset[str]().union(*(p.sources for _, p, _ in computed))
        found.append(ComputedIndexRange(keys, words, kernel, inputs.sizes, own, tuple(computed)))
    return tuple(found)


def _find_once(
    kernel: PositionKernel,
    sizes: Mapping[str, int],
    paths: Sequence[tuple[str, ...]],
    name: str | None,
) -> tuple[tuple[Position, ...], str]:
    """The positions, and the name of the program that computes them; empty where none does."""
    known = None if name is None else _positions.get((name, tuple(paths)))
    if known is not None:
        return known
    block = block_of(kernel.program.binding, sizes)
    closed, _, name = trace(kernel.factory(kernel.program, sizes), block, *kernel.structs(sizes))
    positions = find_positions(closed, _names(paths)) if has_positions(closed) else ()
    own = "" if all(p.is_input for p in positions) else kernel.trace(sizes)
    return _positions.put((name, tuple(paths)), (positions, own))


def _paths(tree: Any) -> list[tuple[str, ...]]:
    """The path of each argument: ``("arrays", key)``, ``("latents", site)`` and others."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [tuple(str(getattr(p, "key", p)) for p in path[1:]) for path, _ in leaves]


def _names(paths: Sequence[tuple[str, ...]]) -> list[str | None]:
    return [path[1] if path[0] == "arrays" else None for path in paths]


def _fill(values: np.ndarray) -> np.ndarray:
    """Values without NaN, of which no position can be made: a missing value has its own rules."""
    if values.dtype.kind != "f":
        return values
    known = np.isfinite(values)
    return (
        values if known.all() else np.where(known, values, values[known][0] if known.any() else 0)
    )


def _axis_in_words(
    position: Position,
    paths: Sequence[tuple[str, ...]],
    program: Program,
    inputs: Inputs,
    labels: Mapping[str, pd.Index],
) -> str:
    if position.indexed is None:
        return "an axis"
    number, axis = position.indexed
    kind, name = paths[number][0], paths[number][-1]
    dims: Sequence[str | None] = ()
    if kind == "arrays":
        dims = inputs.dims[name]
    elif kind == "latents":
        dims = (*program.binding.per, *program.sites[name].dims)
    owner = f"site {name!r}" if kind == "latents" else repr(name)
    dim = dims[axis] if axis < len(dims) else None
    if dim is None:
        return f"axis {axis} of {owner}"
    index = labels.get(dim)
    if index is None:
        return f"dim {dim!r} of {owner}"
    shown = index[:_SHOWN].tolist()
    more = "" if len(index) <= _SHOWN else f" and {len(index) - _SHOWN} more"
    return f"dim {dim!r} of {owner}, whose labels are {shown!r}{more},"


def _beyond(
    what: str, value: int, place: str, count: str, axis: str, highest: int
) -> IndexRangeError:
    missing = " -1 is how pandas codes a missing category." if value == -1 else ""
    return IndexRangeError(
        f"{what} has the value {value!r}{place}, and the model takes entries of {axis} by it, "
        f"which has positions 0 to {highest}: {count} values are beyond.{missing} JAX would take "
        "another entry for it. Leave those labels out, ds.where(..., drop=True); fit with all "
        "groups that are to be predicted; or give groups a dimension of their own, along which "
        "predict(new_labels='sample') draws new ones"
    )
