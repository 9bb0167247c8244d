"""Fewer bits in a float: what noise there is in a draw need not be stored to the last bit.

Rounding is done on the values, so a store holds plain floats and whoever reads it needs
nothing of ours; the zeros that it leaves are what a codec makes small.

References
----------
Klöwer, Razinger, Dominguez, Düben and Palmer (2021), Compressing atmospheric data into
its real information content, Nature Computational Science 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["MANTISSA", "keep_bits"]

_PIECE = 2**15
MANTISSA: dict[Any, tuple[Any, int]] = {
    np.dtype(np.float32): (np.uint32, 23),
    np.dtype(np.float64): (np.uint64, 52),
}


def keep_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Round floats to ``bits`` bits of mantissa, ties to even; other dtypes stay as they are.

    The relative error is at most ``2 ** -(bits + 1)``.
    """
    if values.dtype not in MANTISSA:
        return values
    word, width = MANTISSA[values.dtype]
    if bits >= width:
        return values
    rounded = np.array(values, order="C")
    flat = rounded.reshape(-1)
    # Piece by piece: what is in between stays in the cache.
    for start in range(0, flat.size, _PIECE):
        _round(flat[start : start + _PIECE], word, width - bits)
    return rounded


def _round(values: np.ndarray, word: Any, drop: int) -> None:
    whole, missing = values.view(word), np.isnan(values)
    kept = values[missing]
    odd = (whole >> word(drop)) & word(1)
    odd += word((1 << (drop - 1)) - 1)
    whole += odd
    whole &= word(~((1 << drop) - 1) & int(np.iinfo(word).max))
    # Adding to the bits of a NaN can carry into the sign: it stays what it was.
    values[missing] = kept
