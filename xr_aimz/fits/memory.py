"""Check that the arrays of a fit fit in memory, before any of them is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from xr_aimz.binding import Binding
from xr_aimz.errors import MemoryLimitError
from xr_aimz.options import available_memory

# Copies of the data in memory: the chunks as read, the array made of them, and JAX's copy.
COPIES = 3


def check_memory(
    binding: Binding, arrays: Mapping[str, xr.DataArray], free: int | None = None
) -> None:
    """Refuse to load arrays of which three copies do not fit in memory.

    Parameters
    ----------
    binding : Binding
    arrays : mapping of source key to DataArray
        Arrays already in memory are not counted.
    free : int, optional
        Free memory in bytes; by default :func:`available_memory`.

    Raises
    ------
    MemoryLimitError
        The message has the sizes, and the minibatch fit to use instead.
    """
    names = binding.variables
    # One variable may serve two arguments, and is read once.
    lazy = {names[key]: a.nbytes for key, a in arrays.items() if not a.variable._in_memory}
    free = available_memory() if free is None else free
    needed = COPIES * sum(lazy.values())
    if not lazy or needed <= free:
        return
    sizes = ", ".join(f"{name!r} {_format_bytes(n)}" for name, n in lazy.items())
    raise MemoryLimitError(
        f"a fit of all the data at once holds {COPIES} copies of what it loads ({sizes}), "
        f"{_format_bytes(needed)}, and {_format_bytes(free)} of memory are free. "
        f"{_suggest_batches(binding, arrays)}"
    )


def _suggest_batches(binding: Binding, arrays: Mapping[str, xr.DataArray]) -> str:
    for dim in (d for d in binding.dims if d not in binding.core_dims):
        chunks = [max(a.chunksizes[dim]) for a in arrays.values() if dim in a.chunksizes]
        sizes = [a.sizes[dim] for a in arrays.values() if dim in a.dims]
        if sizes and max(sizes) > 1:
            size = min(chunks, default=max(sizes) // 10 or 1)
            size = size if size < max(sizes) else max(sizes) // 10 or 1
            return f'Fit it in batches: method="svi", batch={{{dim!r}: {size}}}'
    return "Select a part of it, or coarsen it"


def _format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
