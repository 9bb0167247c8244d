"""Draw every cell of one distribution from its address, in one of two ways.

By counter: a random generator passes the sampler its whole array of bits, made by threefry
from each cell's address, at the cost of JAX's own generator. It serves the samplers that
take their bits in one array of the batch's shape.

By cell: every cell is drawn under its own key. A distribution's parameters are
broadcast against its batch shape, each followed by the event axes that its constraint
declares. So a cell is the same distribution with the batch axes removed from every
parameter, and any sampler at all commutes with selection when it is vmapped over cells
and their keys. An attribute that is not declared as a parameter is not part of a cell: a
sampler that reads one raises an error, for its value in a cell would be a guess.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax
from jax.extend.random import define_prng_impl
from numpyro.distributions.util import lazy_property

from xr_aimz.errors import RandomnessError
from xr_aimz.random.keys import Shape, Words, fold_in, threefry

Build = Callable[[Iterator[Array]], Any]
_MAX_SPLIT = 16  # keys in one split; a sampler that splits more draws by cell
_SALT = (0x9E3779B9, 0x7F4A7C15)


class UnexpectedBitsError(Exception):
    """Raised when a sampler takes its bits in an array without the axes of the batch."""


def sample_by_counter(fn: dist.Distribution, key: Array, axes: Sequence[Words]) -> Array:
    """
    Draw every cell of a distribution from bits whose counter is the cell's address.

    Parameters
    ----------
    fn
        A distribution whose sampler is in ``COUNTER_BASED``.
    key
        uint32 of shape ``(2,)``.
    axes
        For each axis of the batch, uint32 words of shape ``(n, 2)``.

    Returns
    -------
    jax.Array
        Draws of the batch's shape followed by ``fn.event_shape``.

    Raises
    ------
    UnexpectedBitsError
        If the sampler takes its bits in another shape than it did in the tests.
    """
    batch = tuple(len(axis) for axis in axes)
    expanded = copy.copy(fn)
    expanded._batch_shape = batch  # cells that share parameters still get different bits
    data = jnp.concatenate([key, *(jnp.asarray(axis).T.reshape(-1) for axis in axes)])
    generator = _generator(batch, *_NOISE[type(fn).sample](fn))
    return expanded.sample(jax.random.wrap_key_data(data, impl=generator))


def sample_by_key(fn: dist.Distribution, keys: Array, batch: Shape) -> Array:
    """
    Draw each cell of a distribution from its own threefry key.

    Parameters
    ----------
    fn
        A distribution whose batch shape broadcasts to ``batch``.
    keys
        uint32 of shape ``(n, 2)``, a key for each cell in C order.
    batch
        Shape of the ``n`` cells.

    Returns
    -------
    jax.Array
        Draws of shape ``batch + fn.event_shape``.

    Raises
    ------
    RandomnessError
        If a cell of ``fn`` cannot be drawn alone.
    """
    parameters: list[Array] = []
    undeclared: set[str] = set()
    build = _make_cell_builder(fn, batch, (), parameters, undeclared)

    def sample_cell(key: Array, *values: Array) -> Array:
        cell = build(iter(values))
        draws = jnp.asarray(cell.sample(jax.random.wrap_key_data(key, impl="threefry2x32")))
        return jnp.reshape(draws, _check_cell_shape(fn, draws))

    try:
        draws = jax.vmap(sample_cell)(keys, *parameters)
    except AttributeError as error:
        if error.name not in undeclared:
            raise
        raise RandomnessError(
            f"{type(fn).__name__} samples from its attribute {error.name!r}, an array that is not "
            "among its arg_constraints, so a cell's part of it is unknown; declare it there with "
            "a constraint of the right event_dim"
        ) from error
    return jnp.reshape(draws, batch + draws.shape[1:])


def cell_parameters(fn: dist.Distribution, batch: Shape) -> list[Array]:
    """
    Reduce each parameter of a distribution to one number in each cell.

    Parameters
    ----------
    fn
        A distribution whose batch shape broadcasts to ``batch``.
    batch
        Shape of the cells.

    Returns
    -------
    list of jax.Array
        Of shape ``batch``: equal where the parameters are equal, and almost surely different
        where they differ.
    """
    parameters: list[Array] = []
    _make_cell_builder(fn, batch, (), parameters, set())
    cells = [jnp.reshape(p, (p.shape[0], -1)) for p in parameters]
    sums = [p @ jnp.sin(1.0 + jnp.arange(p.shape[1])) for p in cells]
    scalars = [leaf for leaf in jax.tree.leaves(fn) if jnp.ndim(leaf) == 0]
    return [
        *(jnp.reshape(p, batch) for p in sums),
        *(jnp.broadcast_to(leaf, batch) for leaf in scalars),
    ]


def _check_cell_shape(fn: dist.Distribution, value: Array) -> Shape:
    """Return ``fn``'s event shape; raise if one cell's draw has another size."""
    if value.size != np.prod(fn.event_shape, dtype=int):
        raise RandomnessError(
            f"one cell of {type(fn).__name__} drew shape {value.shape!r}, but its event shape is "
            f"{fn.event_shape!r}; let sample() return sample_shape + batch_shape + event_shape"
        )
    return tuple(fn.event_shape)


def _make_cell_builder(
    fn: Any, batch: Shape, inner: Shape, parameters: list[Array], undeclared: set[str]
) -> Build:
    """Append the parameters of ``fn`` by cell, and return a function that rebuilds a cell.

    Appended to ``parameters`` are arrays ``(cells, ...)``; the function takes an iterator over
    them for one cell. ``inner`` are batch axes that stay in the cell, to the right of
    ``batch``. Names of arrays without a constraint are added to ``undeclared``.
    """
    recurse = (parameters, undeclared)
    if isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution):
        return _make_cell_builder(fn.base_dist, batch, inner, *recurse)
    if isinstance(fn, dist.Independent):
        count = fn.reinterpreted_batch_ndims
        event_batch = tuple(fn.base_dist.batch_shape[len(fn.batch_shape) :])
        base = _make_cell_builder(fn.base_dist, batch, inner + event_batch, *recurse)
        return lambda values: dist.Independent(base(values), count, validate_args=False)
    builders: dict[str, Build] = {}
    dropped: list[str] = []
    for name, value in vars(fn).items():
        builder = _make_part_builder(fn, name, value, batch, inner, recurse)
        if builder is not None:
            builders[name] = builder
        elif isinstance(getattr(type(fn), name, None), lazy_property):
            dropped.append(name)
        elif _is_array(value):
            dropped.append(name)
            undeclared.add(name)
    return _combine_builders(fn, inner, builders, dropped)


def _combine_builders(
    fn: dist.Distribution, inner: Shape, builders: dict[str, Build], dropped: list[str]
) -> Build:
    """Return a function that copies ``fn`` with attributes set by the builders of its parts."""
    max_count = _max_count(fn)

    def build(values: Iterator[Array]) -> dist.Distribution:
        cell = copy.copy(fn)
        for name in dropped:
            del cell.__dict__[name]
        for name, builder in builders.items():
            setattr(cell, name, builder(values))
        cell._batch_shape = inner
        if max_count and not inner:
            # NumPyro uses a scalar count as the largest of all cells; a count with one axis is
            # kept apart from the largest.
            cell.total_count = jnp.reshape(cell.total_count, (1,))
            cell.total_count_max = max_count
            cell._batch_shape = (1,)
        return cell

    return build


def _max_count(fn: dist.Distribution) -> int | None:
    """Return the largest of a multinomial's counts, or None if they do not differ by cell."""
    if not hasattr(fn, "total_count_max") or np.ndim(fn.total_count) == 0:
        return None
    if fn.total_count_max is not None:
        return fn.total_count_max
    if isinstance(fn.total_count, jax.core.Tracer):
        raise RandomnessError(
            f"{type(fn).__name__} has a total_count known only at run time; give it "
            "total_count_max, the largest that it can be"
        )
    return int(np.max(fn.total_count))


def _make_part_builder(
    fn: Any, name: str, value: Any, batch: Shape, inner: Shape, recurse: tuple
) -> Build | None:
    """Return a builder of one attribute of a cell, or None if it is no declared parameter."""
    if isinstance(value, dist.Distribution):
        inner_batch = tuple(value.batch_shape[len(fn.batch_shape) :])
        return _make_cell_builder(value, batch, inner + inner_batch, *recurse)
    if isinstance(value, list | tuple) and any(isinstance(v, dist.Distribution) for v in value):
        builds = [_make_part_builder(fn, name, item, batch, inner, recurse) for item in value]
        return lambda values: type(value)(build(values) for build in builds if build)
    rank = _event_rank(type(fn), name)
    if rank is None or not _is_array(value):
        return None
    cell_ndim = min(np.ndim(value), rank + len(inner))
    if np.ndim(value) == cell_ndim:
        return lambda values: value
    shape = jnp.shape(value)[np.ndim(value) - cell_ndim :]
    expanded = jnp.broadcast_to(value, batch + shape)
    recurse[0].append(jnp.reshape(expanded, (-1, *shape)))
    return next


def _event_rank(cls: type, name: str) -> int | None:
    """Return a parameter's number of event axes, from the nearest class that constrains it."""
    for base in cls.__mro__:
        constraint = vars(base).get("arg_constraints", {}).get(name)
        if constraint is not None:
            try:
                return int(constraint.event_dim)
            except NotImplementedError:
                # A constraint that depends on other parameters does not know its event axes.
                return None
    return None


def _is_array(value: Any) -> bool:
    """Return whether a value is a NumPy or JAX array with axes."""
    return isinstance(value, np.ndarray | jax.Array) and np.ndim(value) > 0


@cache
def _generator(batch: Shape, lead: Shape, trail: Shape) -> Hashable:
    """Make a random generator of bits of shape ``lead + batch + trail``, for addressed keys."""
    size = 2 + 2 * sum(batch)

    def split(data: Array, shape: Shape) -> Array:
        if prod(shape) > _MAX_SPLIT:
            raise UnexpectedBitsError
        count = lax.iota(jnp.uint32, prod(shape)).reshape(shape)
        keys = fold_in(data[:2], jnp.stack([jnp.zeros_like(count), count], -1))
        words = jnp.broadcast_to(data[2:], (*shape, size - 2))
        return jnp.concatenate([keys, words], -1)

    def random_bits(data: Array, bit_width: int, shape: Shape) -> Array:
        if tuple(shape) != lead + batch + trail:
            raise UnexpectedBitsError
        counter = _counters(data[2:], batch, lead, trail)
        bits = _to_bit_width(threefry((data[0], data[1]), counter), bit_width)
        # Without the barrier, XLA would fuse this into a sampler that reads its bits twice, and
        # compute them twice.
        return lax.optimization_barrier(bits)

    def refuse(*_: Any) -> Array:
        raise UnexpectedBitsError

    return define_prng_impl(
        key_shape=(size,),
        seed=refuse,
        split=split,
        random_bits=random_bits,
        fold_in=refuse,
        name=f"address{batch}",
        tag="adr",
    )


def _counters(words: Array, batch: Shape, lead: Shape, trail: Shape) -> tuple[Array, Array]:
    """Sum the words of each cell's axes and of its position in the event: uint32 (high, low)."""
    rank = len(lead) + len(batch) + len(trail)
    halves = [jnp.zeros((1,) * rank, jnp.uint32)] * 2
    offset = 0
    for axis, n in enumerate(batch, len(lead)):
        shape = tuple(n if i == axis else 1 for i in range(rank))
        for half in range(2):
            axis_words = words[offset : offset + n]
            halves[half] = halves[half] + axis_words.reshape(shape)
            offset += n
    if lead or trail:
        event_index = lax.iota(jnp.uint32, prod(lead) * prod(trail))
        shape = (*lead, *(1 for _ in batch), *trail)
        halves = [
            h + _mix(event_index ^ jnp.uint32(c)).reshape(shape)
            for h, c in zip(halves, _SALT, strict=True)
        ]
    high, low = (jnp.broadcast_to(half, lead + batch + trail) for half in halves)
    return high, low


def _mix(x: Array) -> Array:
    """Apply the murmur3 finalizer, a bijection of uint32, elementwise."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _to_bit_width(block: tuple[Words, Words], bit_width: int) -> Array:
    """Convert a threefry block (high, low) to unsigned integers, as JAX does."""
    high, low = block
    if bit_width == 64:
        return (high.astype(jnp.uint64) << jnp.uint64(32)) | low.astype(jnp.uint64)
    return jnp.asarray(high ^ low).astype(
        {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bit_width]
    )


def _event_shapes(fn: Any) -> tuple[Shape, Shape]:
    """Return the shapes of bits before and after the batch: none, and the event shape."""
    return (), tuple(fn.event_shape)


# Shapes that a sampler's one array of bits has before and after the batch's axes. Only
# samplers that the tests have shown to commute are listed; all others are drawn by cell.
# fmt: off
_EVENT_SAMPLERS = (
    dist.BernoulliLogits, dist.BernoulliProbs, dist.Cauchy, dist.Dagum, dist.DiscreteUniform,
    dist.DoublyTruncatedPowerLaw, dist.Exponential, dist.GaussianRandomWalk,
    dist.GeometricLogits, dist.GeometricProbs, dist.Gompertz, dist.Gumbel, dist.Kumaraswamy,
    dist.Laplace, dist.LeftTruncatedDistribution, dist.Levy, dist.Logistic,
    dist.LowerTruncatedPowerLaw, dist.MatrixNormal, dist.MultivariateNormal, dist.Normal,
    dist.ProjectedNormal, dist.RightTruncatedDistribution, dist.SoftLaplace,
    dist.TwoSidedTruncatedDistribution, dist.Uniform, dist.Weibull,
)
# fmt: on
_NOISE: dict[Callable, Callable[[Any], tuple[Shape, Shape]]] = {
    **{cls.sample: _event_shapes for cls in _EVENT_SAMPLERS},
    dist.AsymmetricLaplace.sample: lambda fn: ((2,), ()),
    dist.CategoricalLogits.sample: lambda fn: ((), tuple(jnp.shape(fn.logits)[-1:])),
    dist.CategoricalProbs.sample: lambda fn: ((), (1,)),
}
COUNTER_BASED = frozenset(_NOISE)
