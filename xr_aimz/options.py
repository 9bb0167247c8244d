"""Set options of the package, check counts and seeds, and measure the available memory."""

from __future__ import annotations

import operator
import os
import sys
from importlib import import_module
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
_DEFAULTS: dict[str, Any] = {"block_bytes": 128 * MIB, "progress": None, "compile_cache": None}
_options: dict[str, Any] = dict(_DEFAULTS)
# JAX's own settings, while those of the option compile_cache are in force.
_of_jax: dict[str, Any] = {}


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
    if name == "compile_cache" and value is not None:
        return _make_folder(value)
    return value


def _make_folder(path: Any) -> str:
    try:
        if not os.fspath(path) or "://" in str(path):
            raise OSError("it must be a folder of this machine")
        folder = Path(path).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError("it is not writable")
    except (TypeError, OSError) as error:
        raise OptionError(
            f"compile_cache={path!r} is no folder that can be used ({error}); give a path, such "
            'as "~/.cache/xr_aimz", or None'
        ) from error
    return str(folder)


# Settings by which JAX keeps compiled programs in a folder, with its defaults and ours. By default
# it keeps what compiled for a second. A fit compiles a hundred small programs: a NUTS fit of 5.8 s
# took 4.8 s again with those of 50 ms kept, 3.4 s of 20 ms, 2.5 s with all.
_JAX_DEFAULTS: dict[str, Any] = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
_KEEP_ALL = {**_JAX_DEFAULTS, "jax_persistent_cache_min_compile_time_secs": 0.0}


def _jax_settings() -> dict[str, Any]:
    """Return JAX's settings of its cache; None for what is left to its defaults."""
    jax = sys.modules.get("jax")
    if jax is None:  # it reads the environment when it is imported
        return {name: os.environ.get(name.upper()) for name in _JAX_DEFAULTS}
    return {name: getattr(jax.config, name) for name in _JAX_DEFAULTS}


def _set_jax_settings(settings: dict[str, Any]) -> None:
    """Set where JAX keeps compiled programs, in this process and those that it starts."""
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name.upper(), None)
        else:
            os.environ[name.upper()] = str(value)
    jax = sys.modules.get("jax")
    if jax is not None:
        for name, default in _JAX_DEFAULTS.items():
            value = settings[name]
            kind = type(default) if default is not None else str
            jax.config.update(name, default if value is None else kind(value))
        # JAX looks for a folder once in a process, at the first program.
        import_module("jax.experimental.compilation_cache.compilation_cache").reset_cache()


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
    compile_cache : path-like, optional
        Folder in which JAX keeps compiled programs, predictions and fits alike, for later
        processes. It is made if it is not there. ``None`` leaves it to JAX's own settings, such
        as ``jax_compilation_cache_dir``. A program of another version of JAX or another kind of
        processor is compiled anew; nothing is ever removed.

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
        self._update(checked)

    @staticmethod
    def _update(values: dict[str, Any]) -> None:
        before = _options["compile_cache"]
        _options.update(values)
        folder = _options["compile_cache"]
        if folder == before:
            return
        if before is None:
            _of_jax.update(_jax_settings())
        is_ours = folder is not None
        _set_jax_settings(
            {**_KEEP_ALL, "jax_compilation_cache_dir": folder} if is_ours else _of_jax
        )

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._update(self._previous)


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
