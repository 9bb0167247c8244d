"""Derive keys of random numbers from seed, chain, draw, site and step, by threefry2x32.

A key is two uint32 words, and so is the hash of a label or a name; folding a hash into a key
encrypts the hash under that key.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.random import threefry2x32_p

from xr_aimz.random.labels import hash_labels, hash_name

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Encrypt counters in 20 rounds as JAX does, with NumPy if all words are NumPy arrays.

    Parameters
    ----------
    key, counter : pair of uint32 arrays
        The two words of each: all of one shape, or scalars.

    Returns
    -------
    pair of uint32 arrays
        Of the same shape.
    """
    # By functions of lax: an operator on a JAX array takes ten times as long to trace, and there
    # are many in these loops.
    is_numpy = all(isinstance(word, np.ndarray | np.generic) for word in (*key, *counter))
    op, left, right = (
        (np, np.left_shift, np.right_shift)
        if is_numpy
        else (lax, lax.shift_left, lax.shift_right_logical)
    )
    parity = op.bitwise_xor(op.bitwise_xor(key[0], key[1]), np.uint32(_PARITY))
    schedule = (key[0], key[1], parity)
    high, low = op.add(counter[0], schedule[0]), op.add(counter[1], schedule[1])
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            high = op.add(high, low)
            low = op.bitwise_or(left(low, np.uint32(bits)), right(low, np.uint32(32 - bits)))
            low = op.bitwise_xor(low, high)
        high = op.add(high, schedule[(group + 1) % 3])
        low = op.add(low, op.add(schedule[(group + 2) % 3], np.uint32(group + 1)))
    return high, low


Shape = tuple[int, ...]
Words = np.ndarray | Array


def seed_key(seed: int) -> np.ndarray:
    """
    Turn a seed into a key of two uint32 words.

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
    Derive the key of a site from the key of a draw and the site's name.

    Parameters
    ----------
    draw_key
        uint32 of shape ``(2,)``.
    name
        The site's name; adding or removing a site changes no other site's draws.

    Returns
    -------
    jax.Array
        uint32 of shape ``(2,)``.
    """
    return fold_in(draw_key, hash_name(name))


def site_keys(
    seed: Words, chains: np.ndarray, draws: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """
    Derive the keys of sites for many draws at once, with NumPy on the host.

    Parameters
    ----------
    seed
        uint32 of shape ``(2,)``.
    chains, draws
        uint32 of shape ``(n, 2)``: for each draw, the words of its chain label and of its
        draw label.
    names
        Names of the sites.

    Returns
    -------
    dict of numpy.ndarray
        For each site uint32 of shape ``(n, 2)``, equal to ``site_key`` of each draw's key.
    """
    # Inside the compiled kernel, one of these folds would cost more to compile than all of them
    # cost to compute on the host.
    key = np.broadcast_to(np.asarray(seed, np.uint32), chains.shape)
    for words in (chains, draws):
        key = _fold_in_on_host(key, words)
    return {name: _fold_in_on_host(key, hash_name(name)) for name in names}


def _fold_in_on_host(key: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Fold words ``(..., 2)`` into uint32 keys ``(n, 2)``, with NumPy."""
    words = np.broadcast_to(words, key.shape)
    new_words = threefry((key[..., 0], key[..., 1]), (words[..., 0], words[..., 1]))
    return np.stack([np.asarray(word) for word in new_words], -1)


def position_hashes(axis: int, n: int) -> np.ndarray:
    """
    Hash the positions along an axis without labels to uint32 words ``(n, 2)``.

    Parameters
    ----------
    axis
        The axis, counted from the right: 1 or -1 is the last.
    n
        Length of the axis.

    Returns
    -------
    numpy.ndarray
        uint32 of shape ``(n, 2)``, unrelated to those of any labelled dimension.
    """
    return hash_labels(f"\0axis {abs(axis)}", None, size=n)


def combine_axes(address: Sequence[Words]) -> Words:
    """
    Sum the words of all axes for each cell.

    Parameters
    ----------
    address
        For each axis, uint32 of shape ``(n, 2)``.

    Returns
    -------
    numpy.ndarray or jax.Array
        uint32 of shape ``(*batch, 2)``. Reshaped to ``(cells, 2)`` it addresses the same
        cells flattened to a table, and gives the same draws.
    """
    words = np.zeros(2, np.uint32)
    for axis in address:
        words = words[..., None, :] + axis
    return words


def fold_in(key: Words, words: Words) -> Array:
    """
    Derive new keys from a key and words.

    Parameters
    ----------
    key
        uint32 of shape ``(2,)``.
    words
        uint32 of shape ``(..., 2)``: hash of the new key's purpose, such as a chain's label.

    Returns
    -------
    jax.Array
        uint32 of the shape of ``words``, a key for each pair of words.
    """
    key, words = jnp.asarray(key, jnp.uint32), jnp.asarray(words, jnp.uint32)
    # JAX's own threefry is a loop, which compiles fast: keys are few, unlike counters, for
    # which ``threefry`` is written out.
    new_words = threefry2x32_p.bind(key[0], key[1], words[..., 0], words[..., 1])
    return jnp.stack(new_words, -1)


def part_key(key: Words, name: str) -> Array:
    """
    Derive the key of a named part of a distribution.

    Parameters
    ----------
    key
        uint32 of shape ``(2,)``.
    name
        Name of the part, such as ``component``.

    Returns
    -------
    jax.Array
        uint32 of shape ``(2,)``, unrelated to that of any site.
    """
    return fold_in(key, hash_name(f"\0{name}"))


def step_key(site_key: Words, words: Array | None, step: Array) -> Array:
    """
    Derive the key of one step of a scanned site.

    Parameters
    ----------
    site_key
        uint32 of shape ``(2,)``.
    words
        uint32 of shape ``(n, 2)``: the hash of each label along the scan. None for a scan
        along no dimension of the Dataset, whose steps are addressed by their number.
    step
        The number of the step.

    Returns
    -------
    jax.Array
        uint32 of shape ``(2,)``.
    """
    if words is None:
        return fold_in(site_key, jnp.stack([jnp.uint32(0), step.astype(jnp.uint32)]))
    return fold_in(site_key, words[step])
