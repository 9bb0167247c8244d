"""The losses of very many steps, in bounded space.

A loss for each step as long as there are few; then means over runs of 2, 4, 8 ... steps.
Which, follows from the number of steps alone, so that a fit that was cut short and taken
up again has the same history as one that was not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["History"]

MOST = 20_000


@dataclass(frozen=True)
class History:
    """Losses of steps, averaged over runs of ``every`` steps.

    ``rest`` are the losses of the last steps, too few for a run.
    """

    every: int = 1
    means: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, losses: np.ndarray) -> History:
        """The history after these further steps."""
        every, means = self.every, self.means
        rest = np.concatenate([self.rest, losses.astype(np.float32)])
        whole = len(rest) // every * every
        means = np.concatenate([means, _means(rest[:whole], every)])
        rest = rest[whole:]
        while len(means) > MOST:
            pairs = len(means) // 2 * 2
            # A run without its pair goes back to be one of the steps of a longer run.
            rest = np.concatenate([np.repeat(means[pairs:], every), rest])
            means, every = _means(means[:pairs], 2), 2 * every
        return History(every, means, rest)

    def settled(self, steps: int) -> bool:
        """Whether the last ``steps`` steps lowered the loss by no more than chance would."""
        count = steps // self.every
        if count < 2 or len(self.means) < 2 * count:
            return False
        before, after = self.means[-2 * count : -count], self.means[-count:]
        error = np.sqrt((before.var() + after.var()) / count)
        return bool(before.mean() - after.mean() < error)


def _means(values: np.ndarray, every: int) -> np.ndarray:
    return values.reshape(-1, every).mean(axis=1, dtype=np.float64).astype(np.float32)
