"""Which numbers of an optimizer's state belong to which labels of batched dimensions.

A latent with one entry a label has guide parameters, and an optimizer has moments, with
one entry a label. A step trains those of its batch only. They are found by tracing the
start of the inference for batches of other sizes: an axis that grows with a dimension has
an entry for each of its labels, whatever guide and optimizer call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from xr_aimz.axes import TABLE
from xr_aimz.binding import Binding
from xr_aimz.errors import ModelError
from xr_aimz.model import Site

__all__ = ["Entries", "entries_of", "entries_of_site"]


@dataclass(frozen=True)
class Entries:
    """Where an array has its batched dimensions.

    Parameters
    ----------
    axes : tuple of tuple of str
        The dims of each axis: none for most, several for the one axis of a table.
    batched : tuple of str
        The batched ones among them.
    """

    axes: tuple[tuple[str, ...], ...]
    batched: tuple[str, ...]

    @property
    def _moved(self) -> tuple[list[int], list[int]]:
        flat = [d for dims in self.axes for d in (dims or (None,))]
        return [flat.index(d) for d in self.batched], list(range(len(self.batched)))

    def rows(self, array: Any, sizes: Mapping[str, int]) -> Any:
        """The array with its batched dimensions as the leading axes."""
        shape: list[int] = []
        for n, dims in zip(array.shape, self.axes, strict=True):
            shape += [sizes[d] for d in dims] or [n]
        source, target = self._moved
        return jnp.moveaxis(jnp.reshape(array, shape), source, target)

    def folded(self, rows: Any) -> Any:
        """The way back."""
        source, target = self._moved
        unfolded = jnp.moveaxis(rows, target, source)
        shape, lengths = [], list(unfolded.shape)
        for dims in self.axes:
            count = len(dims) or 1
            shape.append(prod(lengths[:count]))
            lengths = lengths[count:]
        return jnp.reshape(unfolded, shape)

    def repeated(self, rows: Any, sizes: Mapping[str, int]) -> Any:
        """Rows of a batch, repeated over the whole of each batched dimension."""
        for axis, d in enumerate(self.batched):
            rows = jnp.take(rows, jnp.arange(sizes[d]) % rows.shape[axis], axis=axis)
        return rows

    def gather(self, rows: Any, positions: Mapping[str, Any]) -> Any:
        """The rows at those positions of each batched dimension."""
        for axis, d in enumerate(self.batched):
            rows = jnp.take(rows, positions[d], axis=axis, mode="clip")
        return rows

    def scatter(self, rows: Any, part: Any, positions: Mapping[str, Any]) -> Any:
        """All rows, those at the positions replaced; a position past the end is left out."""
        places = jnp.ix_(*(positions[d] for d in self.batched))
        return rows.at[places].set(part, mode="drop", unique_indices=True)

    def cut(self, rows: Any, starts: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        """The rows of a batch, which begin at ``starts``."""
        for axis, d in enumerate(self.batched):
            rows = jax.lax.dynamic_slice_in_dim(rows, starts[d], sizes[d], axis)
        return rows

    def paste(self, rows: Any, part: Any, starts: Mapping[str, Any]) -> Any:
        """All rows, those of a batch replaced."""
        where = [starts[d] for d in self.batched]
        zeros = [jnp.zeros_like(where[0])] * (rows.ndim - len(where))
        return jax.lax.dynamic_update_slice(rows, part, (*where, *zeros))


def entries_of(
    leaves: Sequence[Any],
    grown: Mapping[str, Sequence[Any]],
    binding: Binding,
    sizes: Mapping[str, int],
) -> list[Entries | None]:
    """The entries of each leaf of a state; None for one without.

    Parameters
    ----------
    leaves : sequence of struct
        For a batch of ``sizes``.
    grown : mapping of dim to sequence of struct
        For a batch that is longer along that dimension.
    """
    found: list[Entries | None] = []
    for number, leaf in enumerate(leaves):
        axes: list[tuple[str, ...]] = [()] * len(leaf.shape)
        for d, others in grown.items():
            other = others[number].shape
            if len(other) != len(leaf.shape):
                raise _unknown(d)
            for axis, (n, m) in enumerate(zip(leaf.shape, other, strict=True)):
                if n != m:
                    axes[axis] = binding.dims if binding.layout == "table" else (*axes[axis], d)
        for n, dims in zip(leaf.shape, axes, strict=True):
            if dims and prod(sizes[d] for d in dims) != n:
                raise _unknown(dims)
        batched = tuple(d for d in grown if any(d in dims for dims in axes))
        found.append(Entries(tuple(axes), batched) if batched else None)
    return found


def _unknown(dims: Any) -> ModelError:
    return ModelError(
        f"the guide has a parameter whose size depends on the batch along {dims!r}, and not one "
        "entry a label: the entries of a batch cannot be trained alone. Use method='svi' "
        "(AutoNormal) or AutoDelta"
    )


def entries_of_site(site: Site, binding: Binding, sizes: Mapping[str, int]) -> Entries:
    """Where draws of a site, ``(draw, *site axes)``, have the batched dims, the keys of sizes."""
    axes: list[tuple[str, ...]] = [()]
    for d in site.dims:
        axes.append(binding.dims if d == TABLE else (d,) if d in binding.dims and d else ())
    return Entries(tuple(axes), tuple(d for d in sizes if any(d in dims for dims in axes)))
