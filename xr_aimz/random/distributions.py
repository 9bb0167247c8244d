"""Draw from NumPyro distributions by key and by the address of each cell.

The draw at a cell is a function of a key (the seed, chain, draw and site, folded) and of
the cell's address, and of nothing else, so sampling commutes with selecting, permuting
and splitting any batch axis. A cell's address is the word-wise sum of its axes' hashes,
64 bits in all; the sum is the same for a grid and for the same cells as a table.

There are three ways to draw, chosen by the distribution's class alone. Samplers that take
their bits in one array of the batch's shape read them from a generator whose threefry
counter is the cell's address, at the cost of JAX's own. What JAX draws by rejection, gammas
and counts, is drawn by inversion, from the same bits. Every other sampler runs once for
each cell, under that cell's key. Wrappers and mixtures are taken apart, and their
components are drawn by the same rules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax

from xr_aimz.errors import RandomnessError
from xr_aimz.random.cells import Cells
from xr_aimz.random.cellwise import (
    COUNTER_BASED,
    UnexpectedBitsError,
    sample_by_counter,
    sample_by_key,
)
from xr_aimz.random.inversion import INVERSION_RULES, POSITIVE_RULES
from xr_aimz.random.keys import Words, combine_axes, fold_in, part_key
from xr_aimz.random.labels import hash_labels


def sample(fn: dist.Distribution, key: Words, address: Sequence[Words]) -> Array:
    """
    Draw every cell of a distribution from the site's key and the cell's address.

    Parameters
    ----------
    fn
        The distribution; it may be expanded, masked, transformed or otherwise wrapped.
    key
        uint32 of shape ``(2,)``: the site's key.
    address
        For each axis of ``fn.batch_shape``, uint32 words of shape ``(n, 2)``.

    Returns
    -------
    jax.Array
        Draws of shape ``fn.batch_shape + fn.event_shape``.

    Raises
    ------
    RandomnessError
        If the distribution cannot be drawn by address.
    """
    cells = Cells(tuple(address))
    if cells.shape != tuple(fn.batch_shape):
        raise ValueError(
            f"an address of shape {cells.shape!r} was given for the batch shape "
            f"{tuple(fn.batch_shape)!r} of {type(fn).__name__}; give words for every axis"
        )
    return _sample(fn, jnp.asarray(key, jnp.uint32), cells)


# A base that is zero in all but one of 1000 draws still succeeds in all but 5e-5 of its cells.
_MOST_REDRAWS = 10_000

Rule = Callable[[Any, Array, Cells], Array]


def _sample(fn: dist.Distribution, key: Array, cells: Cells) -> Array:
    """Draw from ``fn``, whose batch shape broadcasts to that of ``cells``."""
    if type(fn).sample is dist.Distribution.sample:
        raise _no_sampler_error(fn)
    if not cells.axes and not _is_inverted(fn):
        try:
            return jnp.asarray(fn.sample(jax.random.wrap_key_data(key, impl="threefry2x32")))
        except NotImplementedError as error:
            # A wrapper of a distribution without a sampler, ImproperUniform among others.
            raise _no_sampler_error(fn) from error
    # Rules are looked up by sampler, not by class: a subclass may define its own sample().
    draws = _RULES.get(type(fn).sample, _sample_by_cell)(fn, key, cells)
    return jnp.broadcast_to(draws, cells.shape + tuple(fn.event_shape))


def _is_inverted(fn: Any) -> bool:
    """Return whether a distribution, or the one that it wraps, is drawn by inversion."""
    while type(fn).sample not in INVERSION_RULES:
        fn = getattr(fn, "base_dist", None)
        if not isinstance(fn, dist.Distribution):
            return False
    return True


def _no_sampler_error(fn: Any) -> RandomnessError:
    """Make the error for a distribution without a sampler, named without its wrappers."""
    while isinstance(getattr(fn, "base_dist", None), dist.Distribution):
        fn = fn.base_dist
    return RandomnessError(
        f"{type(fn).__name__} has no sampler, so it cannot be drawn by label; condition on its "
        "site, take it from a posterior, or use a proper distribution"
    )


def _sample_by_cell(fn: dist.Distribution, key: Array, cells: Cells) -> Array:
    """Draw each cell from its own key: any sampler, at a higher cost."""
    keys = fold_in(key, jnp.reshape(combine_axes(cells.axes), (-1, 2)))
    return sample_by_key(fn, keys, cells.shape)


def _sample_by_counter(fn: dist.Distribution, key: Array, cells: Cells) -> Array:
    """Draw all cells from one array of bits, whose counters are the cells' addresses."""
    try:
        return sample_by_counter(fn, key, cells.axes)
    except UnexpectedBitsError:
        # JAX or NumPyro has changed this sampler: drawing by cell is slower, but never wrong.
        return _sample_by_cell(fn, key, cells)


def _sample_base(fn: Any, key: Array, cells: Cells) -> Array:
    """Draw from the base of a wrapper that leaves draws unchanged."""
    return _sample(fn.base_dist, key, cells)


def _sample_independent(fn: dist.Independent, key: Array, cells: Cells) -> Array:
    """Draw from the base, whose last batch axes are event axes addressed by position."""
    event = tuple(fn.event_shape[: fn.reinterpreted_batch_ndims])
    return _sample(fn.base_dist, key, cells.within(event))


def _sample_transformed(fn: dist.TransformedDistribution, key: Array, cells: Cells) -> Array:
    """Draw from the base and apply the transforms."""
    value = _sample(fn.base_dist, key, cells)
    for transform in fn.transforms:
        value = transform(value)
    return value


def _sample_constant(fn: dist.Delta | dist.Unit, key: Array, cells: Cells) -> Array:
    """Return the value of a distribution whose sampler needs no key."""
    return jnp.asarray(fn.sample(None))


def _sample_mixture(fn: Any, key: Array, cells: Cells) -> Array:
    """Draw every component and the mixing index; select the component of each cell."""
    axis = -1 - fn.event_dim
    component_key = part_key(key, "component")
    if isinstance(fn, dist.MixtureSameFamily):
        draws = _sample(fn.component_distribution, component_key, cells.within((fn.mixture_size,)))
    else:
        keys = fold_in(component_key, hash_labels("", None, size=fn.mixture_size))
        components = zip(fn.component_distributions, keys, strict=True)
        draws = jnp.stack([_sample(d, k, cells) for d, k in components], axis)
    component = _sample(fn.mixing_distribution, part_key(key, "mixing"), cells)
    component = jnp.reshape(component, cells.shape + (1,) * -axis)
    return jnp.squeeze(jnp.take_along_axis(draws, component, axis), axis)


def _sample_gate(fn: Any, key: Array, cells: Cells) -> Array:
    """Draw a mask of zeros."""
    gate = dist.BernoulliProbs(fn.gate, validate_args=False)
    return _sample(gate, part_key(key, "gate"), cells).astype(bool)


def _sample_zero_inflated(fn: dist.ZeroInflatedProbs, key: Array, cells: Cells) -> Array:
    """Draw from the base, with zero in the cells that the gate selects."""
    value = _sample(fn.base_dist, part_key(key, "base"), cells)
    return jnp.where(_sample_gate(fn, key, cells), 0, value)


def _sample_hurdle(fn: dist.HurdleProbs, key: Array, cells: Cells) -> Array:
    """Draw zero or a nonzero value."""
    base, base_key = _unwrap(fn.base_dist), part_key(key, "base")
    if type(base).sample in POSITIVE_RULES:
        value = POSITIVE_RULES[type(base).sample](base, base_key, cells)
    elif fn._is_discrete:
        value = _sample_nonzero(base, base_key, cells)
    else:
        value = _sample(base, base_key, cells)
    return jnp.where(_sample_gate(fn, key, cells), jnp.zeros_like(value), value)


def _unwrap(fn: Any) -> Any:
    """Return a distribution without the wrappers that leave draws unchanged."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _sample_nonzero(base: Any, key: Array, cells: Cells) -> Array:
    """Draw again wherever a count is zero; -1 where it still is after many attempts."""

    def redraw(state: tuple[Array, Array]) -> tuple[Array, Array]:
        # A cell's n-th try is the same however many tries other cells need.
        tries, value = state
        retry = _sample(base, fold_in(key, jnp.stack([tries, tries])), cells)
        return tries + 1, jnp.where(value == 0, retry, value)

    def is_unfinished(state: tuple[Array, Array]) -> Array:
        return (state[0] < _MOST_REDRAWS) & jnp.any(state[1] == 0)

    start = (jnp.uint32(0), _sample(base, key, cells))
    value = lax.while_loop(is_unfinished, redraw, start)[1]
    return jnp.where(value == 0, -1, value)


def _make_component_rule(name: str) -> Rule:
    """Return the rule of a class whose draw is a function of the draw of one attribute."""

    def rule(fn: Any, key: Array, cells: Cells) -> Array:
        component = getattr(fn, name)
        value = _sample(component, key, cells)
        clone = copy.copy(fn)
        clone._batch_shape = cells.shape
        setattr(clone, name, dist.Delta(value, event_dim=component.event_dim, validate_args=False))
        return clone.sample(jax.random.wrap_key_data(key, impl="threefry2x32"))

    return rule


_RULES: dict[Callable, Rule] = {
    **dict.fromkeys(COUNTER_BASED, _sample_by_counter),
    **INVERSION_RULES,
    dist.ExpandedDistribution.sample: _sample_base,
    dist.MaskedDistribution.sample: _sample_base,
    dist.LeftCensoredDistribution.sample: _sample_base,
    dist.RightCensoredDistribution.sample: _sample_base,
    dist.Independent.sample: _sample_independent,
    dist.TransformedDistribution.sample: _sample_transformed,
    dist.Delta.sample: _sample_constant,
    dist.Unit.sample: _sample_constant,
    dist.MixtureSameFamily.sample: _sample_mixture,
    dist.ZeroInflatedProbs.sample: _sample_zero_inflated,
    dist.HurdleProbs.sample: _sample_hurdle,
    dist.HalfNormal.sample: _make_component_rule("_normal"),
    dist.HalfCauchy.sample: _make_component_rule("_cauchy"),
    dist.AsymmetricLaplaceQuantile.sample: _make_component_rule("_ald"),
    dist.GaussianCopula.sample: _make_component_rule("base_dist"),
}
