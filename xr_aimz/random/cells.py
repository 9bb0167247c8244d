"""Address of the cells of a distribution: the words of every axis."""

from __future__ import annotations

from typing import NamedTuple

from xr_aimz.random.keys import Shape, Words
from xr_aimz.random.labels import hash_labels


class Cells(NamedTuple):
    """Address of cells: uint32 words ``(n, 2)`` of every axis; ``added`` event axes come last."""

    axes: tuple[Words, ...]
    added: int = 0

    @property
    def shape(self) -> Shape:
        """Batch shape: the length of every axis."""
        return tuple(len(axis) for axis in self.axes)

    def within(self, shape: Shape) -> Cells:
        """Append event axes of the given lengths, addressed by position."""
        # Numbered from the left: an inner axis must not share words with an outer one.
        inner = [
            hash_labels(f"\0event {self.added + i}", None, size=n) for i, n in enumerate(shape)
        ]
        return Cells((*self.axes, *inner), self.added + len(shape))
