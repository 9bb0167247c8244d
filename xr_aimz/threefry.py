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
from jax import Array

__all__ = ["threefry"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


Words = np.ndarray | Array


def threefry(key: tuple[Words, Words], counter: tuple[Words, Words]) -> tuple[Words, Words]:
    """Encrypt counters: 20 rounds, as JAX; by NumPy where all words are NumPy's.

    Parameters
    ----------
    key, counter : pair of uint32 arrays
        The two words of each, broadcast against each other.

    Returns
    -------
    pair of uint32 arrays
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    high, low = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for turn in _ROTATIONS[group % 2]:
            high = high + low
            low = (low << turn) | (low >> (32 - turn))
            low = low ^ high
        high = high + schedule[(group + 1) % 3]
        low = low + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return high, low
