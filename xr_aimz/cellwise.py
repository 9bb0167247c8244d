"""A draw of every cell of one distribution, by either of two ways.

By counter: a generator hands the sampler its whole array of bits, made by threefry from
each cell's address, at the cost of JAX's own. It serves the samplers that take their
bits in one array of the batch's shape.

By cell: every cell is drawn under a key of its own. A distribution's parameters are
broadcast against its batch shape, each followed by the event axes that its constraint
declares. So a cell is the same distribution with the batch axes taken off every
parameter, and any sampler at all commutes with selection when it is vmapped over cells
and their keys. What is not declared as a parameter is no part of a cell: a sampler that
asks for it is refused, not guessed at.
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
from jax.extend.random import define_prng_impl, threefry2x32_p
from numpyro.distributions.util import lazy_property

from xr_aimz.errors import RandomnessError
from xr_aimz.threefry import threefry

__all__ = [
    "COUNTED",
    "ForeignShapeError",
    "draw_by_cell",
    "draw_by_counter",
    "fold",
    "parameters_by_cell",
]

Shape = tuple[int, ...]
Words = np.ndarray | Array
Build = Callable[[Iterator[Array]], Any]
_FEW = 16  # keys in one split: more means one for each cell, which is the other way
_SALT = (0x9E3779B9, 0x7F4A7C15)


class ForeignShapeError(Exception):
    """A sampler asked for bits in an array that has no place for the batch."""


def fold(key: Words, words: Words) -> Array:
    """
    Derive a key.

    Parameters
    ----------
    key
        uint32 of shape ``(2,)``.
    words
        uint32 of shape ``(..., 2)``: what the new key is for, such as a chain's label.

    Returns
    -------
    jax.Array
        uint32 of the shape of ``words``, a key for each pair.
    """
    key, words = jnp.asarray(key, jnp.uint32), jnp.asarray(words, jnp.uint32)
    # JAX's own, a loop that compiles fast; there are few keys, and many counters.
    halves = threefry2x32_p.bind(key[0], key[1], words[..., 0], words[..., 1])
    return jnp.stack(halves, -1)


def draw_by_counter(fn: dist.Distribution, key: Array, axes: Sequence[Words]) -> Array:
    """
    Draw every cell from bits whose counter is the cell's address.

    Parameters
    ----------
    fn
        A distribution whose sampler is in ``COUNTED``.
    key
        uint32 of shape ``(2,)``.
    axes
        For each axis of the batch, uint32 words of shape ``(n, 2)``.

    Returns
    -------
    jax.Array
        Of the batch's shape followed by ``fn.event_shape``.

    Raises
    ------
    ForeignShapeError
        If the sampler no longer takes its bits as it used to.
    """
    batch = tuple(len(axis) for axis in axes)
    whole = copy.copy(fn)
    whole._batch_shape = batch  # parameters that only broadcast still get bits of their own
    data = jnp.concatenate([key, *(jnp.asarray(axis).T.reshape(-1) for axis in axes)])
    spec = _generator(batch, *_NOISE[type(fn).sample](fn))
    return whole.sample(jax.random.wrap_key_data(data, impl=spec))


def draw_by_cell(fn: dist.Distribution, keys: Array, batch: Shape) -> Array:
    """
    Draw each cell of a distribution from its own threefry key.

    Parameters
    ----------
    fn
        A distribution whose batch shape broadcasts to ``batch``.
    keys
        uint32 of shape ``(n, 2)``, a key for each cell in C order.
    batch
        The shape that the ``n`` cells make up.

    Returns
    -------
    jax.Array
        Of shape ``batch + fn.event_shape``.

    Raises
    ------
    RandomnessError
        If a cell of ``fn`` cannot be drawn alone.
    """
    parameters: list[Array] = []
    undeclared: set[str] = set()
    build = _cell(fn, batch, (), parameters, undeclared)

    def draw(key: Array, *values: Array) -> Array:
        cell = build(iter(values))
        drawn = jnp.asarray(cell.sample(jax.random.wrap_key_data(key, impl="threefry2x32")))
        return jnp.reshape(drawn, _event_of(fn, drawn))

    try:
        drawn = jax.vmap(draw)(keys, *parameters)
    except AttributeError as error:
        if error.name not in undeclared:
            raise
        raise RandomnessError(
            f"{type(fn).__name__} samples from its attribute {error.name!r}, an array that is not "
            "among its arg_constraints, so a cell's part of it is unknown; declare it there with "
            "a constraint of the right event_dim"
        ) from error
    return jnp.reshape(drawn, batch + drawn.shape[1:])


def parameters_by_cell(fn: dist.Distribution, batch: Shape) -> list[Array]:
    """
    Boil each parameter of a distribution down to one number a cell.

    Parameters
    ----------
    fn
        A distribution whose batch shape broadcasts to ``batch``.
    batch
        The shape of the cells.

    Returns
    -------
    list of jax.Array
        Of shape ``batch``: equal where the parameters are, and else, as good as always, not.
    """
    found: list[Array] = []
    _cell(fn, batch, (), found, set())
    cells = [jnp.reshape(p, (p.shape[0], -1)) for p in found]
    sums = [p @ jnp.sin(1.0 + jnp.arange(p.shape[1])) for p in cells]
    shared = [leaf for leaf in jax.tree.leaves(fn) if jnp.ndim(leaf) == 0]
    return [
        *(jnp.reshape(p, batch) for p in sums),
        *(jnp.broadcast_to(leaf, batch) for leaf in shared),
    ]


def _event_of(fn: dist.Distribution, drawn: Array) -> Shape:
    if drawn.size != np.prod(fn.event_shape, dtype=int):
        raise RandomnessError(
            f"one cell of {type(fn).__name__} drew shape {drawn.shape!r}, but its event shape is "
            f"{fn.event_shape!r}; let sample() return sample_shape + batch_shape + event_shape"
        )
    return tuple(fn.event_shape)


def _cell(
    fn: Any, batch: Shape, inner: Shape, parameters: list[Array], undeclared: set[str]
) -> Build:
    """Collect the parameters of ``fn`` by cell; return what rebuilds a cell from them.

    ``inner`` are batch axes that stay in the cell, to the right of ``batch``.
    """
    recurse = (parameters, undeclared)
    if isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution):
        return _cell(fn.base_dist, batch, inner, *recurse)
    if isinstance(fn, dist.Independent):
        count = fn.reinterpreted_batch_ndims
        kept = tuple(fn.base_dist.batch_shape[len(fn.batch_shape) :])
        base = _cell(fn.base_dist, batch, inner + kept, *recurse)
        return lambda values: dist.Independent(base(values), count, validate_args=False)
    parts: dict[str, Build] = {}
    dropped: list[str] = []
    for name, value in vars(fn).items():
        part = _part(fn, name, value, batch, inner, recurse)
        if part is not None:
            parts[name] = part
        elif isinstance(getattr(type(fn), name, None), lazy_property):
            dropped.append(name)
        elif _is_array(value):
            dropped.append(name)
            undeclared.add(name)
    return _builder(fn, inner, parts, dropped)


def _builder(
    fn: dist.Distribution, inner: Shape, parts: dict[str, Build], dropped: list[str]
) -> Build:
    counts = _counts(fn)

    def build(values: Iterator[Array]) -> dist.Distribution:
        cell = copy.copy(fn)
        for name in dropped:
            del cell.__dict__[name]
        for name, part in parts.items():
            setattr(cell, name, part(values))
        cell._batch_shape = inner
        if counts and not inner:
            # NumPyro takes a count without axes for the largest of all; one axis tells it apart.
            cell.total_count = jnp.reshape(cell.total_count, (1,))
            cell.total_count_max = counts
            cell._batch_shape = (1,)
        return cell

    return build


def _counts(fn: dist.Distribution) -> int | None:
    """The largest of a multinomial's counts, where they differ by cell."""
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


def _part(
    fn: Any, name: str, value: Any, batch: Shape, inner: Shape, recurse: tuple
) -> Build | None:
    if isinstance(value, dist.Distribution):
        own = tuple(value.batch_shape[len(fn.batch_shape) :])
        return _cell(value, batch, inner + own, *recurse)
    if isinstance(value, list | tuple) and any(isinstance(v, dist.Distribution) for v in value):
        builds = [_part(fn, name, item, batch, inner, recurse) for item in value]
        return lambda values: type(value)(build(values) for build in builds if build)
    rank = _event_rank(type(fn), name)
    if rank is None or not _is_array(value):
        return None
    kept = min(np.ndim(value), rank + len(inner))
    if np.ndim(value) == kept:
        return lambda values: value
    shape = jnp.shape(value)[np.ndim(value) - kept :]
    whole = jnp.broadcast_to(value, batch + shape)
    recurse[0].append(jnp.reshape(whole, (-1, *shape)))
    return next


def _event_rank(cls: type, name: str) -> int | None:
    """The event axes of a parameter, by the nearest class that constrains it."""
    for base in cls.__mro__:
        constraint = vars(base).get("arg_constraints", {}).get(name)
        if constraint is not None:
            try:
                return int(constraint.event_dim)
            except NotImplementedError:
                return None
    return None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and np.ndim(value) > 0


@cache
def _generator(batch: Shape, lead: Shape, trail: Shape) -> Hashable:
    """Make the generator of bits of shape ``lead + batch + trail``, for keys with addresses."""
    size = 2 + 2 * sum(batch)

    def split(data: Array, shape: Shape) -> Array:
        if prod(shape) > _FEW:
            raise ForeignShapeError
        count = lax.iota(jnp.uint32, prod(shape)).reshape(shape)
        keys = fold(data[:2], jnp.stack([jnp.zeros_like(count), count], -1))
        words = jnp.broadcast_to(data[2:], (*shape, size - 2))
        return jnp.concatenate([keys, words], -1)

    def random_bits(data: Array, bit_width: int, shape: Shape) -> Array:
        if tuple(shape) != lead + batch + trail:
            raise ForeignShapeError
        counter = _counters(data[2:], batch, lead, trail)
        bits = _bits(threefry((data[0], data[1]), counter), bit_width)
        # Fused with a sampler that reads its bits twice, XLA would make them twice.
        return lax.optimization_barrier(bits)

    def refuse(*_: Any) -> Array:
        raise ForeignShapeError

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
    """Both halves of every counter: the sum of its axes' words and its place in the event."""
    rank = len(lead) + len(batch) + len(trail)
    halves = [jnp.zeros((1,) * rank, jnp.uint32)] * 2
    start = 0
    for axis, n in enumerate(batch, len(lead)):
        shape = tuple(n if i == axis else 1 for i in range(rank))
        for half in range(2):
            part = words[start : start + n]
            halves[half] = halves[half] + part.reshape(shape)
            start += n
    if lead or trail:
        place = lax.iota(jnp.uint32, prod(lead) * prod(trail))
        shape = (*lead, *(1 for _ in batch), *trail)
        halves = [
            h + _mixed(place ^ jnp.uint32(c)).reshape(shape)
            for h, c in zip(halves, _SALT, strict=True)
        ]
    high, low = (jnp.broadcast_to(half, lead + batch + trail) for half in halves)
    return high, low


def _mixed(x: Array) -> Array:
    """The finalizer of murmur3, a bijection of 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(block: tuple[Words, Words], bit_width: int) -> Array:
    """The bits that JAX itself takes from a block of threefry."""
    high, low = block
    if bit_width == 64:
        return (high.astype(jnp.uint64) << jnp.uint64(32)) | low.astype(jnp.uint64)
    return jnp.asarray(high ^ low).astype(
        {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bit_width]
    )


def _event(fn: Any) -> tuple[Shape, Shape]:
    return (), tuple(fn.event_shape)


# What the one array of bits of a sampler has before and after the batch's axes. Only
# samplers that the tests have shown to commute are here; all others are drawn by cell.
# fmt: off
_EVENT = (
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
    **{cls.sample: _event for cls in _EVENT},
    dist.AsymmetricLaplace.sample: lambda fn: ((2,), ()),
    dist.CategoricalLogits.sample: lambda fn: ((), tuple(jnp.shape(fn.logits)[-1:])),
    dist.CategoricalProbs.sample: lambda fn: ((), (1,)),
}
COUNTED = frozenset(_NOISE)
