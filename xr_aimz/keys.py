"""Randomness addressed by label.

The draw at a cell is a function of a key (the seed, chain, draw and site, folded) and of
the cell's address, and of nothing else, so sampling commutes with selecting, permuting
and splitting any batch axis. A cell's address is the word-wise sum of its axes' words,
64 bits in all; the sum is the same for a grid and for the table that it flattens to.

There are two ways to draw, chosen by the distribution's class alone. Samplers that take
their bits in one array of the batch's shape read them from a generator whose threefry
counter is the cell's address, at the cost of JAX's own. Every other sampler runs once for
each cell, under a key of that cell's. Wrappers and mixtures are taken apart, and their
components drawn by the same rules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax

from xr_aimz.cellwise import COUNTED, ForeignShapeError, draw_by_cell, draw_by_counter, fold
from xr_aimz.errors import RandomnessError
from xr_aimz.labels import label_words, name_words
from xr_aimz.threefry import threefry

__all__ = ["combine", "fold", "positions", "sample", "seed_key", "site_key", "site_keys"]

Shape = tuple[int, ...]
Words = np.ndarray | Array


def seed_key(seed: int) -> np.ndarray:
    """
    Turn a seed into a key.

    Parameters
    ----------
    seed
        Any integer of 64 bits, signed or not.

    Returns
    -------
    numpy.ndarray
        uint32 of shape ``(2,)``.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed has at most 64 bits, but it is {seed!r}")
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def site_key(draw_key: Words, name: str) -> Array:
    """
    Derive the key of a site from that of a draw.

    Parameters
    ----------
    draw_key
        uint32 of shape ``(2,)``.
    name
        The site's name; no other site's draws move when it is added or taken away.

    Returns
    -------
    jax.Array
        uint32 of shape ``(2,)``.
    """
    return fold(draw_key, name_words(name))


def site_keys(
    seed: Words, chains: np.ndarray, draws: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """
    Derive the keys of sites for many draws at once, on the host.

    Parameters
    ----------
    seed
        uint32 of shape ``(2,)``.
    chains, draws
        uint32 words of shape ``(n, 2)``: of each draw, its chain's and its own.
    names
        The sites.

    Returns
    -------
    dict of numpy.ndarray
        For each site uint32 of shape ``(n, 2)``, as ``site_key`` of the draw's key gives it.
    """
    # In the compiled kernel each of these folds would cost more to compile than all of them
    # cost here to compute.
    key = np.broadcast_to(np.asarray(seed, np.uint32), chains.shape)
    for words in (chains, draws):
        key = _folded(key, words)
    return {name: _folded(key, name_words(name)) for name in names}


def _folded(key: np.ndarray, words: np.ndarray) -> np.ndarray:
    words = np.broadcast_to(words, key.shape)
    halves = threefry((key[..., 0], key[..., 1]), (words[..., 0], words[..., 1]))
    return np.stack([np.asarray(half) for half in halves], -1)


def positions(axis: int, n: int) -> np.ndarray:
    """
    Make the words of an axis without labels.

    Parameters
    ----------
    axis
        The axis, counted from the right: 1 or -1 is the last.
    n
        Its length.

    Returns
    -------
    numpy.ndarray
        uint32 of shape ``(n, 2)``, unrelated to those of any labelled dimension.
    """
    return label_words(f"\0axis {abs(axis)}", None, size=n)


def combine(address: Sequence[Words]) -> Words:
    """
    Sum the words of the axes, cell by cell.

    Parameters
    ----------
    address
        For each axis, uint32 of shape ``(n, 2)``.

    Returns
    -------
    numpy.ndarray or jax.Array
        uint32 of shape ``(*batch, 2)``. Reshaped to ``(cells, 2)`` it addresses the table
        that the axes flatten to, with the same draws.
    """
    words = np.zeros(2, np.uint32)
    for axis in address:
        words = words[..., None, :] + axis
    return words


def sample(fn: dist.Distribution, key: Words, address: Sequence[Words]) -> Array:
    """
    Draw from a distribution, each cell by its address.

    Parameters
    ----------
    fn
        The distribution, with whatever wraps it.
    key
        uint32 of shape ``(2,)``: the site's key.
    address
        For each axis of ``fn.batch_shape``, uint32 words of shape ``(n, 2)``.

    Returns
    -------
    jax.Array
        Of shape ``fn.batch_shape + fn.event_shape``.

    Raises
    ------
    RandomnessError
        If the distribution cannot be drawn by address.
    """
    cells = _Cells(tuple(address))
    if cells.shape != tuple(fn.batch_shape):
        raise ValueError(
            f"an address of shape {cells.shape!r} was given for the batch shape "
            f"{tuple(fn.batch_shape)!r} of {type(fn).__name__}; give words for every axis"
        )
    return _draw(fn, jnp.asarray(key, jnp.uint32), cells)


class _Cells(NamedTuple):
    """The words of every axis; ``added`` of them stand for axes within a site's event."""

    axes: tuple[Words, ...]
    added: int = 0

    @property
    def shape(self) -> Shape:
        return tuple(len(axis) for axis in self.axes)

    def within(self, shape: Shape) -> _Cells:
        # Numbered from the left: an inner axis must not share words with an outer one.
        new = [label_words(f"\0event {self.added + i}", None, size=n) for i, n in enumerate(shape)]
        return _Cells((*self.axes, *new), self.added + len(shape))


Rule = Callable[[Any, Array, _Cells], Array]


def _draw(fn: dist.Distribution, key: Array, cells: _Cells) -> Array:
    """Draw ``fn``, whose batch shape broadcasts to that of ``cells``."""
    if type(fn).sample is dist.Distribution.sample:
        raise _unsampled(fn)
    if not cells.axes:
        try:
            return jnp.asarray(fn.sample(jax.random.wrap_key_data(key, impl="threefry2x32")))
        except NotImplementedError as error:
            raise _unsampled(fn) from error
    # By sampler, not by class: a subclass that brings its own sample() has its own rule.
    drawn = _RULES.get(type(fn).sample, _by_cell)(fn, key, cells)
    return jnp.broadcast_to(drawn, cells.shape + tuple(fn.event_shape))


def _unsampled(fn: Any) -> RandomnessError:
    while isinstance(getattr(fn, "base_dist", None), dist.Distribution):
        fn = fn.base_dist
    return RandomnessError(
        f"{type(fn).__name__} has no sampler, so it cannot be drawn by label; condition on its "
        "site, take it from a posterior, or use a proper distribution"
    )


def _named(key: Array, part: str) -> Array:
    return fold(key, name_words(f"\0{part}"))


def _by_cell(fn: dist.Distribution, key: Array, cells: _Cells) -> Array:
    keys = fold(key, jnp.reshape(combine(cells.axes), (-1, 2)))
    return draw_by_cell(fn, keys, cells.shape)


def _by_counter(fn: dist.Distribution, key: Array, cells: _Cells) -> Array:
    try:
        return draw_by_counter(fn, key, cells.axes)
    except ForeignShapeError:
        # JAX or NumPyro has changed this sampler: slower, but never wrong.
        return _by_cell(fn, key, cells)


def _base(fn: Any, key: Array, cells: _Cells) -> Array:
    return _draw(fn.base_dist, key, cells)


def _independent(fn: dist.Independent, key: Array, cells: _Cells) -> Array:
    event = tuple(fn.event_shape[: fn.reinterpreted_batch_ndims])
    return _draw(fn.base_dist, key, cells.within(event))


def _transformed(fn: dist.TransformedDistribution, key: Array, cells: _Cells) -> Array:
    value = _draw(fn.base_dist, key, cells)
    for transform in fn.transforms:
        value = transform(value)
    return value


def _constant(fn: dist.Delta | dist.Unit, key: Array, cells: _Cells) -> Array:
    return jnp.asarray(fn.sample(None))


def _mixture(fn: Any, key: Array, cells: _Cells) -> Array:
    axis = -1 - fn.event_dim
    part = _named(key, "component")
    if isinstance(fn, dist.MixtureSameFamily):
        drawn = _draw(fn.component_distribution, part, cells.within((fn.mixture_size,)))
    else:
        keys = fold(part, label_words("", None, size=fn.mixture_size))
        each = zip(fn.component_distributions, keys, strict=True)
        drawn = jnp.stack([_draw(d, k, cells) for d, k in each], axis)
    chosen = _draw(fn.mixing_distribution, _named(key, "mixing"), cells)
    chosen = jnp.reshape(chosen, cells.shape + (1,) * -axis)
    return jnp.squeeze(jnp.take_along_axis(drawn, chosen, axis), axis)


def _gated(fn: Any, key: Array, cells: _Cells) -> tuple[Array, Array]:
    gate = dist.BernoulliProbs(fn.gate, validate_args=False)
    zero = _draw(gate, _named(key, "gate"), cells)
    return zero.astype(bool), _draw(fn.base_dist, _named(key, "base"), cells)


def _zero_inflated(fn: dist.ZeroInflatedProbs, key: Array, cells: _Cells) -> Array:
    zero, value = _gated(fn, key, cells)
    return jnp.where(zero, 0, value)


def _hurdle(fn: dist.HurdleProbs, key: Array, cells: _Cells) -> Array:
    zero, value = _gated(fn, key, cells)
    if fn._is_discrete:
        again = _named(key, "again")

        def redraw(state: tuple[Array, Array]) -> tuple[Array, Array]:
            # A cell's n-th try is the same however many tries the others need.
            tries, value = state
            new = _draw(fn.base_dist, fold(again, jnp.stack([tries, tries])), cells)
            return tries + 1, jnp.where(value == 0, new, value)

        start = (jnp.uint32(0), value)
        value = lax.while_loop(lambda state: jnp.any(state[1] == 0), redraw, start)[1]
    return jnp.where(zero, jnp.zeros_like(value), value)


def _drawn_from(part: str) -> Rule:
    """The rule of a class whose draw is a function of one component's draw."""

    def rule(fn: Any, key: Array, cells: _Cells) -> Array:
        component = getattr(fn, part)
        value = _draw(component, key, cells)
        whole = copy.copy(fn)
        whole._batch_shape = cells.shape
        setattr(whole, part, dist.Delta(value, event_dim=component.event_dim, validate_args=False))
        return whole.sample(jax.random.wrap_key_data(key, impl="threefry2x32"))

    return rule


_RULES: dict[Callable, Rule] = {
    **dict.fromkeys(COUNTED, _by_counter),
    dist.ExpandedDistribution.sample: _base,
    dist.MaskedDistribution.sample: _base,
    dist.LeftCensoredDistribution.sample: _base,
    dist.RightCensoredDistribution.sample: _base,
    dist.Independent.sample: _independent,
    dist.TransformedDistribution.sample: _transformed,
    dist.Delta.sample: _constant,
    dist.Unit.sample: _constant,
    dist.MixtureSameFamily.sample: _mixture,
    dist.ZeroInflatedProbs.sample: _zero_inflated,
    dist.HurdleProbs.sample: _hurdle,
    dist.HalfNormal.sample: _drawn_from("_normal"),
    dist.HalfCauchy.sample: _drawn_from("_cauchy"),
    dist.AsymmetricLaplaceQuantile.sample: _drawn_from("_ald"),
    dist.GaussianCopula.sample: _drawn_from("base_dist"),
}
