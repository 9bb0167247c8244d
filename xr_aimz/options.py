"""Set options of the package, check counts and seeds, and measure the available memory."""

from __future__ import annotations

import operator
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from xr_aimz.errors import OptionError, list_names


def parse_count(
    name: str, value: Any, least: int = 1, most: int | None = None, why: str = ""
) -> int:
    """
    Check an option that is a count, and return it as an int.

    Parameters
    ----------
    name : str
        Name of the option, for the error.
    value : int
        Or an object with an ``__index__``, such as NumPy's integers. A bool is refused.
    least, most : int
        Bounds of the value, inclusive.
    why : str
        Reason for the bounds, for the error.

    Returns
    -------
    int

    Raises
    ------
    OptionError
    """
    number = _index_of(value)
    if number is None or number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(
            f"{name}={_one_line(value)}: it must be an int {bounds}{why}; found a "
            f"{type(value).__name__}"
        )
    return number


def parse_seed(value: Any) -> int:
    """
    Check a seed, and return it as an int.

    Parameters
    ----------
    value : int
        A signed integer of 64 bits.

    Returns
    -------
    int

    Raises
    ------
    OptionError
        Any other value, including a random key of JAX.
    """
    number = _index_of(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise OptionError(
            f"seed={_one_line(value)} is a {type(value).__name__}: it must be an int of at most "
            "64 bits, such as seed=0, so that the same call gives the same draws; a key of "
            "jax.random is not accepted"
        )
    return number


def _one_line(value: Any) -> str:
    # The repr of a random key of JAX has two lines.
    return " ".join(repr(value).split())


def _index_of(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


MIB = 2**20
_DEFAULTS: dict[str, Any] = {"block_bytes": 128 * MIB, "progress": None}
_options: dict[str, Any] = dict(_DEFAULTS)


def get_options() -> dict[str, Any]:
    """Return the options in force, as a new dict.

    Examples
    --------
    >>> import xr_aimz
    >>> xr_aimz.get_options()["block_bytes"]
    134217728
    """
    return dict(_options)


def shows_progress(progress: bool | None) -> bool:
    """Return whether to show progress: the argument, the option, or True in an interactive run."""
    setting = progress if progress is not None else _options["progress"]
    if setting is not None:
        return bool(setting)
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _check_option(name: str, value: Any) -> Any:
    if name == "block_bytes":
        return parse_count(name, value, why=", a number of bytes")
    if name == "progress" and value not in (None, True, False):
        raise OptionError(f"progress must be True, False or None; found {value!r}")
    return value


class set_options:
    """Set options, permanently or for the length of a ``with`` block.

    Parameters
    ----------
    block_bytes : int, default 134217728
        Maximum size of one task's output in bytes. Predictions are split along
        draws, and numpy-backed Datasets along their observation dims, to stay under it.
    progress : bool, optional
        Whether fits and writes show a progress bar. ``None`` shows one in a terminal
        or a notebook.

    Raises
    ------
    OptionError
        A name is not an option, or a value is not accepted by its option.

    Examples
    --------
    >>> import xr_aimz
    >>> with xr_aimz.set_options(block_bytes=2**20):
    ...     xr_aimz.get_options()["block_bytes"]
    1048576
    """

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in _DEFAULTS:
                raise OptionError(
                    f"no option {name!r}; there are {list_names(sorted(_DEFAULTS), name)}"
                )
        checked = {name: _check_option(name, value) for name, value in options.items()}
        self._previous = {name: _options[name] for name in checked}
        _options.update(checked)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _options.update(self._previous)


_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int:
    """Return the bytes free for a new array: of the machine or, if less, of the container."""
    return min([_machine_memory(), *_container_memory()])


def _machine_memory() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    # Without Linux's MemAvailable: the total memory, so that nothing is refused wrongly.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory() -> list[int]:
    """Return the bytes left under the cgroup limit (version 2 or 1); empty without a limit."""
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
        # The kernel reclaims cached pages of files on demand, so they count as free.
        return [most - used + int(counts.get("inactive_file", 0))]
    return []
