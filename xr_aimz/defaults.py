"""What a fit takes where nothing is said, by kind of method.

In one place, for who runs a method and for who writes down how a fit was made.
"""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["CHAINS", "DRAWN", "LEARNING_RATE", "STEPPED"]

DRAWN = MappingProxyType({"draws": 1000})
CHAINS = MappingProxyType({**DRAWN, "chains": 4, "warmup": 1000})
STEPPED = MappingProxyType({**DRAWN, "steps": 10_000})
LEARNING_RATE = 0.05
