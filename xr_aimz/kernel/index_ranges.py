"""Find inputs by which a model indexes an axis, with their limits, and integers made floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xr_aimz.binding import AlignedInputs, BlockValues, Requirement, as_jax_array, block_of
from xr_aimz.errors import IndexRangeError
from xr_aimz.kernel.compile import run_draws, trace_program
from xr_aimz.kernel.program import site_readout
from xr_aimz.kernel.spec import BlockData, Dims, DrawState, Kernel, KernelSpec, leaf_paths
from xr_aimz.kernel.supports import (
    block_structs,
    kernel_structs,
    pad_to,
    resize_structs,
    zeros_without_memory,
)
from xr_aimz.tracing import (
    Labels,
    LRUCache,
    Position,
    Site,
    find_positions,
    has_positions,
    positions_of,
    reaches,
)

Factory = Callable[[KernelSpec, Mapping[str, int]], Kernel]

_SHOWN = 10
# By the fingerprint of a program and the paths of its arguments: a server repeats the same ones.
_position_cache = LRUCache[tuple[tuple[Position, ...], str]](256)


@dataclass(frozen=True, eq=False)
class IndexRange:
    """Requirement that all values of an input are positions on an axis.

    Parameters
    ----------
    key : str
        Key of the array.
    what : str
        Description of the array.
    highest : int
        Last position; the first is 0.
    axis : str
        Description of the axis.
    """

    key: str
    what: str
    highest: int
    axis: str

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.key})

    def at(self, sizes: Mapping[str, int]) -> IndexRange:
        """Return the requirement itself, which holds for blocks of any sizes."""
        return self

    def check(self, values: BlockValues) -> None:
        """Check that the least and the greatest value of a block are positions on the axis.

        Raises
        ------
        IndexRangeError
        """
        array = values.arrays[self.key]
        if not array.size or (array.min() >= 0 and array.max() <= self.highest):
            return
        outside = (array < 0) | (array > self.highest)
        first = np.unravel_index(int(outside.argmax()), array.shape)
        label = values.place(values.dims[self.key], map(int, first))
        count = f"{int(outside.sum())} of {array.size}"
        raise _range_error(self.what, int(array[first]), label, count, self.axis, self.highest)


@dataclass(frozen=True, eq=False)
class PositionKernel:
    """Kernel that returns the positions that another kernel computes from its arrays.

    Parameters
    ----------
    factory : callable
        Function of the program and the sizes of a block that returns the other kernel.
    program : KernelSpec
    latents : frozenset of str
        Sites whose values are passed to the kernel.
    arrays : mapping of key to jax.ShapeDtypeStruct
    params : mapping of name to pytree
    """

    factory: Factory
    program: KernelSpec
    latents: frozenset[str]
    arrays: Mapping[str, Any]
    params: Mapping[str, Any]

    def structs(self, sizes: Mapping[str, int]) -> tuple[DrawState, BlockData]:
        """Return shapes and dtypes of the kernel's arguments, for a block of these sizes."""
        arrays = resize_structs(self.program, self.arrays, sizes)
        draw, shared = kernel_structs(self.program, arrays, self.params, sizes)
        latents = {n: struct for n, struct in draw.latents.items() if n in self.latents}
        return draw._replace(latents=latents), shared

    def call(self, sizes: Mapping[str, int]) -> Kernel:
        """Make the kernel for blocks of these sizes."""
        structs = self.structs(sizes)

        def call(draw: Any, shared: Any) -> dict[str, Any]:
            closed = jax.make_jaxpr(self.factory(self.program, sizes))(*structs)
            computed = positions_of(closed, _array_keys(leaf_paths(*structs)))(shared.arrays)
            return {str(number): values for number, values in enumerate(computed)}

        return call

    def trace(self, sizes: Mapping[str, int]) -> str:
        """Return the fingerprint of the kernel's program for blocks of these sizes."""
        block = block_of(self.program.binding, sizes)
        _, _, name = trace_program(self.call(sizes), block, *self.structs(sizes))
        return name


@dataclass(frozen=True, eq=False)
class ComputedIndexRange:
    """Requirement that the indices that a model computes from inputs are positions on their axes.

    Parameters
    ----------
    keys : frozenset of str
        Keys of the arrays that positions are computed from.
    described : mapping of key to str
        Descriptions of these arrays.
    kernel : PositionKernel
    sizes : mapping of dim to int
        Sizes to which blocks are padded, so that all use one compiled program.
    name : str
        Fingerprint of the traced program.
    positions : tuple of (int, Position, str)
        For each position its number in the program, the position, and a description of its axis.
    """

    keys: frozenset[str]
    described: Mapping[str, str]
    kernel: PositionKernel
    sizes: Mapping[str, int]
    name: str
    positions: tuple[tuple[int, Position, str], ...]

    def at(self, sizes: Mapping[str, int]) -> ComputedIndexRange:
        """Return the same requirement for blocks that are padded to other sizes."""
        return replace(self, sizes=sizes, name=self.kernel.trace(sizes))

    def check(self, values: BlockValues) -> None:
        """Compute the positions of a block, and check that each lies on its axis.

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
                label = self._place(position, array.shape, first, values)
                count = f"{int(outside.sum())} of {array.size}"
                raise _range_error(what, int(array[first]), label, count, axis, position.highest)

    def _place(
        self, position: Position, shape: tuple[int, ...], first: Any, values: BlockValues
    ) -> str:
        """Describe the label of a position that is computed from one array entry by entry."""
        if len(position.sources) != 1:
            return ""
        (key,) = position.sources
        array_shape = values.arrays[key].shape
        padded = self.kernel.structs(self.sizes)[1].arrays[key].shape
        if [n for n in shape if n != 1] != [n for n in padded if n != 1]:
            return ""
        index = np.unravel_index(np.ravel_multi_index(first, shape), padded)
        if any(i >= n for i, n in zip(index, array_shape, strict=True)):
            return ""
        return values.place(values.dims[key], map(int, index))

    def _compute(self, values: BlockValues) -> dict[str, np.ndarray]:
        draw, shared = self.kernel.structs(self.sizes)
        arrays = {
            key: pad_to(struct.shape, as_jax_array(key, _replace_missing(values.arrays[key])))
            if key in self.keys
            else zeros_without_memory(struct)
            for key, struct in shared.arrays.items()
        }
        draws = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), draw)
        computed = run_draws(
            self.name,
            lambda: self.kernel.call(self.sizes),
            block_of(self.kernel.program.binding, self.sizes),
            jax.tree.map(zeros_without_memory, draws),
            shared._replace(arrays=arrays, words=jax.tree.map(zeros_without_memory, shared.words)),
        )
        return {number: array[0] for number, array in computed.items()}


def find_index_ranges(
    kernel: PositionKernel,
    inputs: AlignedInputs,
    described: Mapping[str, str],
    labels: Mapping[str, pd.Index],
    name: str | None = None,
) -> tuple[Requirement, ...]:
    """Return the requirements on inputs by which a model indexes an axis.

    Parameters
    ----------
    kernel : PositionKernel
    inputs : AlignedInputs
    described : mapping of key to str
        Descriptions of the arrays.
    labels : mapping of dim to Index
        Labels of the dims of latents and inputs that have any.
    name : str, optional
        Fingerprint of the other kernel's program on all of the inputs, if it has been traced.

    Returns
    -------
    tuple of Requirement
    """
    words = {key: described.get(key, repr(key)) for key in kernel.arrays}
    paths = leaf_paths(*kernel.structs(inputs.sizes))
    positions, program_name = _find_cached(kernel, inputs.sizes, paths, name)
    requirements: list[Requirement] = []
    computed = []
    for number, position in enumerate(positions):
        axis = _describe_axis(position, paths, kernel.program, inputs, labels)
        if position.is_input:
            (key,) = position.sources
            requirements.append(IndexRange(key, words[key], position.highest, axis))
        else:
            computed.append((number, position, axis))
    if computed:
        keys = frozenset[str]().union(*(p.sources for _, p, _ in computed))
        requirements.append(
            ComputedIndexRange(keys, words, kernel, inputs.sizes, program_name, tuple(computed))
        )
    return tuple(requirements)


def _find_cached(
    kernel: PositionKernel,
    sizes: Mapping[str, int],
    paths: Sequence[tuple[str, ...]],
    name: str | None,
) -> tuple[tuple[Position, ...], str]:
    """Return the positions, and the fingerprint of the program that computes them, or ``""``."""
    cached = None if name is None else _position_cache.get((name, tuple(paths)))
    if cached is not None:
        return cached
    block = block_of(kernel.program.binding, sizes)
    closed, _, name = trace_program(
        kernel.factory(kernel.program, sizes), block, *kernel.structs(sizes)
    )
    positions = find_positions(closed, _array_keys(paths)) if has_positions(closed) else ()
    computed_name = "" if all(p.is_input for p in positions) else kernel.trace(sizes)
    return _position_cache.put((name, tuple(paths)), (positions, computed_name))


def _array_keys(paths: Sequence[tuple[str, ...]]) -> list[str | None]:
    return [path[1] if path[0] == "arrays" else None for path in paths]


def _replace_missing(values: np.ndarray) -> np.ndarray:
    """Replace NaN, which is no position, by another value; missing values are checked apart."""
    if values.dtype.kind != "f":
        return values
    is_known = np.isfinite(values)
    return (
        values
        if is_known.all()
        else np.where(is_known, values, values[is_known][0] if is_known.any() else 0)
    )


def _describe_axis(
    position: Position,
    paths: Sequence[tuple[str, ...]],
    program: KernelSpec,
    inputs: AlignedInputs,
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


def _range_error(
    what: str, value: int, label: str, count: str, axis: str, highest: int
) -> IndexRangeError:
    missing = " -1 is how pandas codes a missing category." if value == -1 else ""
    return IndexRangeError(
        f"{what} has the value {value!r}{label}, and the model takes entries of {axis} by it, "
        f"which has positions 0 to {highest}: {count} values are beyond.{missing} JAX would take "
        "another entry for it. Leave those labels out, ds.where(..., drop=True); fit with all "
        "groups that are to be predicted; or give groups a dimension of their own, along which "
        "predict(new_labels='sample') draws new ones"
    )


# Primitives whose results are values of their operands, with the operands that have the values.
_ALL = slice(None)
_KEEP_VALUES = {
    "broadcast_in_dim": slice(0, 1),
    "concatenate": _ALL,
    "copy": _ALL,
    "copy_p": _ALL,
    "dynamic_slice": slice(0, 1),
    "expand_dims": _ALL,
    "gather": slice(0, 1),
    "optimization_barrier": _ALL,
    "reshape": slice(0, 1),
    "rev": _ALL,
    "select_n": slice(1, None),
    "slice": _ALL,
    "squeeze": _ALL,
    "stop_gradient": _ALL,
    "transpose": _ALL,
}


def find_integers_cast(
    program: KernelSpec, inputs: AlignedInputs, params: Mapping[str, Any]
) -> frozenset[str]:
    """Return the keys of the integer arrays that a model converts to floats unchanged.

    Parameters
    ----------
    program : KernelSpec
    inputs : AlignedInputs
    params : mapping of name to pytree
    """
    structs = block_structs(program, inputs)
    draw, shared = kernel_structs(program, structs, params, inputs.sizes)
    kinds = ("latent", "observed", "deterministic")
    returns = tuple(n for n, s in program.sites.items() if s.kind in kinds)
    call = site_readout(
        replace(program, returns=returns, scenarios=None), inputs.sizes, _read_density
    )
    try:
        closed, _, _ = trace_program(call, block_of(program.binding, inputs.sizes), draw, shared)
    except Exception:
        # A model may raise any class where it is evaluated for its densities: then no conversion
        # is reported.
        return frozenset()
    keys = _array_keys(leaf_paths(draw, shared))
    labels = [frozenset[str]() if key is None else frozenset({key}) for key in keys]
    converted: set[str] = set()
    reaches(closed, labels, partial(_pass_values, converted))
    return frozenset(converted)


def _read_density(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    if message["type"] != "sample":
        return site.dims, message["value"]
    return site.dims[: site.batch_ndim], message["fn"].log_prob(message["value"])


def _pass_values(converted: set[str], equation: Any, labels: Sequence[Labels]) -> list[Labels]:
    """Return labels of the arrays whose values an operation passes on; note those it converts."""
    name = equation.primitive.name
    if name == "convert_element_type":
        integer = jnp.issubdtype(equation.invars[0].aval.dtype, jnp.integer)
        if integer and jnp.issubdtype(equation.params["new_dtype"], jnp.floating):
            converted |= labels[0]
        return [labels[0]]
    operands = labels[_KEEP_VALUES[name]] if name in _KEEP_VALUES else []
    return [frozenset[str]().union(*operands)] * len(equation.outvars)
