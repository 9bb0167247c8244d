"""Whether what a fit would load fits in memory, asked before anything is loaded.

A fit of all data at once holds them several times over. Where that is more than the
machine, or the container, has left, the system would end the process without a word.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import xarray as xr

from xr_aimz.binding import Binding
from xr_aimz.errors import MemoryLimitError

__all__ = ["available", "check_fits"]

# The chunks as they were read, the array made of them, and JAX's copy.
COPIES = 3
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def check_fits(
    binding: Binding, arrays: Mapping[str, xr.DataArray], free: int | None = None
) -> None:
    """Refuse to load arrays of which three copies do not fit in memory.

    Parameters
    ----------
    binding : Binding
    arrays : mapping of source key to DataArray
        Those in memory already are not counted.
    free : int, optional
        Bytes; by default :func:`available`.

    Raises
    ------
    MemoryLimitError
        With the sizes, and the minibatch fit to use instead.
    """
    names = {s.key: s.name for a in binding.arguments for s in a.sources}
    # One variable may serve two arguments, and is read once.
    lazy = {names[key]: a.nbytes for key, a in arrays.items() if not a.variable._in_memory}
    free = available() if free is None else free
    needed = COPIES * sum(lazy.values())
    if not lazy or needed <= free:
        return
    sizes = ", ".join(f"{name!r} {_shown(n)}" for name, n in lazy.items())
    raise MemoryLimitError(
        f"a fit of all the data at once holds {COPIES} copies of what it loads ({sizes}), "
        f"{_shown(needed)}, and {_shown(free)} of memory are free. {_remedy(binding, arrays)}"
    )


def _remedy(binding: Binding, arrays: Mapping[str, xr.DataArray]) -> str:
    for dim in (d for d in binding.dims if d not in binding.core_dims):
        chunks = [max(a.chunksizes[dim]) for a in arrays.values() if dim in a.chunksizes]
        sizes = [a.sizes[dim] for a in arrays.values() if dim in a.dims]
        if sizes and max(sizes) > 1:
            size = min(chunks, default=max(sizes) // 10 or 1)
            size = size if size < max(sizes) else max(sizes) // 10 or 1
            return f'Fit it in batches: method="svi", batch={{{dim!r}: {size}}}'
    return "Select a part of it, or coarsen it"


def available() -> int:
    """Bytes of memory that a new array can have: the machine's, or the container's if less."""
    return min([_machine(), *_container()])


def _machine() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    # Without Linux's own figure: all that there is, so that nothing is refused wrongly.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> list[int]:
    """What the memory controller leaves, versions 2 and 1; nothing where there is no limit."""
    files = (
        (_CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat"),
        tuple(
            _CGROUP / "memory" / name
            for name in ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        ),
    )
    for limit, usage, stat in files:
        try:
            most, used = int(limit.read_text()), int(usage.read_text())
            counts = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such controller; or "max", which is no limit
        # Cached pages of files are given back when asked for.
        return [most - used + int(counts.get("inactive_file", 0))]
    return []


def _shown(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
