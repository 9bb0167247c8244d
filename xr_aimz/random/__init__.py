"""Random draws addressed by coordinate label.

Coordinate labels come in as 64-bit hashes, uint32 ``(label, 2)``, with a key of seed, chain,
draw and site; draws of a distribution over ``(*batch dims, *event dims)`` come out.
"""

from xr_aimz.random.cellwise import cell_parameters
from xr_aimz.random.distributions import sample
from xr_aimz.random.keys import (
    Words,
    combine_axes,
    fold_in,
    position_hashes,
    seed_key,
    site_keys,
    step_key,
)
from xr_aimz.random.labels import hash_labels

__all__ = [
    "Words", "cell_parameters", "combine_axes", "fold_in", "hash_labels", "position_hashes",
    "sample", "seed_key", "site_keys", "step_key",
]  # fmt: skip
