"""What is made from a missing value is missing: NaN in the cells of a prediction.

A model may make a number of NaN, by a ``where`` or a comparison. Its outcome is drawn for
a cell of which an input was not there all the same; here that cell is blanked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xr_aimz.axes import TABLE
from xr_aimz.binding import Argument, Binding
from xr_aimz.model import Site

__all__ = ["blank", "is_float"]


def is_float(value: Any) -> bool:
    """Whether a value is an array that can hold NaN."""
    return hasattr(value, "dtype") and bool(jnp.issubdtype(value.dtype, jnp.floating))


def blank(
    binding: Binding,
    site: Site,
    dims: tuple[str | None, ...],
    value: jax.Array,
    passed: Mapping[str, Any],
    told: Any = False,
) -> jax.Array:
    """A site's result with NaN in the cells that are made from a missing value; traceable.

    Where the result was ``told``, a mask on the axes of the site, it is made from nothing.

    ``passed`` are the model's arguments, ``dims`` name the axes of ``value``. An argument
    with an observation dimension that the site lacks is left to the model: it knows what
    it makes of many cells.
    """
    if site.kind != "observed" or not is_float(value) or told is True:
        return value
    value, own = (
        jnp.reshape(a, (1,) * (len(dims) - a.ndim) + a.shape) for a in (value, jnp.asarray(told))
    )
    for argument in binding.arguments:
        array = passed.get(argument.name)
        if argument.name in site.reads | site.seen and array is not None and is_float(array):
            gap = _named_gap(binding, argument, array, dims)
            value = value if gap is None else jnp.where(gap & ~own, jnp.nan, value)
    return value


def _named_gap(
    binding: Binding, argument: Argument, array: jax.Array, dims: tuple[str | None, ...]
) -> jax.Array | None:
    """Where an argument is missing, its axes in the order of ``dims``; None if they lack one."""
    axes: tuple[str, ...] = (TABLE,) if binding.layout == "table" else binding.dims
    extra = [d for d in argument.sources[0].dims if d not in binding.cut_dims]
    if array.ndim != len(axes) + (1 if argument.stacked else len(extra)):
        # It has no observation dimension, or this Dataset's has lost those of the fit's.
        axes = ()
    own = not argument.stacked and len(axes) + len(extra) == array.ndim
    names = (*axes, *(extra if own else [None] * (array.ndim - len(axes))))
    gap = jnp.isnan(array)
    if any(n > 1 and d not in dims for d, n in zip(axes, gap.shape, strict=False)):
        return None
    gap = gap.any(tuple(i for i, d in enumerate(names) if d is None or d not in dims))
    kept = [d for d in names if d is not None and d in dims]
    order = sorted(range(len(kept)), key=lambda i: dims.index(kept[i]))
    gap = jnp.transpose(gap, order)
    lengths = dict(zip((kept[i] for i in order), gap.shape, strict=True))
    return jnp.reshape(gap, tuple(1 if d is None else lengths.get(d, 1) for d in dims))
