"""The threefry2x32 block cipher, written out for the CPU.

The same bits as ``jax.extend.random.threefry_2x32``, which JAX lowers on the CPU to a
loop over groups of rounds. Written out in full it fuses to one pass over the counters,
and a prediction spends most of its time here (docs/decisions/predict-speed.md).

References
----------
Salmon, Moraes, Dror and Shaw (2011), Parallel random numbers: as easy as 1, 2, 3.
"""

from __future__ import annotations

import numpy as np
from jax import Array, lax

__all__ = ["threefry"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


Words = np.ndarray | Array


def threefry(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Encrypt counters: 20 rounds, as JAX; by NumPy where all words are NumPy's.

    Parameters
    ----------
    key, counter : pair of uint32 arrays
        The two words of each: all of one shape, or scalars.

    Returns
    -------
    pair of uint32 arrays
    """
    # By lax: an operator on a JAX array takes ten times as long to trace, and here are many.
    on_host = all(isinstance(word, np.ndarray | np.generic) for word in (*key, *counter))
    op, shift, back = (
        (np, np.left_shift, np.right_shift)
        if on_host
        else (lax, lax.shift_left, lax.shift_right_logical)
    )
    parity = op.bitwise_xor(op.bitwise_xor(key[0], key[1]), np.uint32(_PARITY))
    schedule = (key[0], key[1], parity)
    high, low = op.add(counter[0], schedule[0]), op.add(counter[1], schedule[1])
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            high = op.add(high, low)
            low = op.bitwise_or(shift(low, np.uint32(turn)), back(low, np.uint32(32 - turn)))
            low = op.bitwise_xor(low, high)
        high = op.add(high, schedule[(group + 1) % 3])
        low = op.add(low, op.add(schedule[(group + 2) % 3], np.uint32(group + 1)))
    return high, low
