"""Settings of the package, global or for the length of a ``with`` block.

There are few: what a block may weigh and whether progress is shown. They never change
a number, only how it is computed.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from xr_aimz.errors import OptionError
from xr_aimz.spelling import list_names
from xr_aimz.whole_numbers import parse_count

__all__ = ["get_options", "set_options", "shows_progress"]

MIB = 2**20
_DEFAULTS: dict[str, Any] = {"block_bytes": 128 * MIB, "progress": None}
_options: dict[str, Any] = dict(_DEFAULTS)


def get_options() -> dict[str, Any]:
    """The options in force, as a new dict.

    Examples
    --------
    >>> import xr_aimz
    >>> xr_aimz.get_options()["block_bytes"]
    134217728
    """
    return dict(_options)


def shows_progress(progress: bool | None) -> bool:
    """Whether to show progress: as asked, as the options say, or where a person looks."""
    asked = progress if progress is not None else _options["progress"]
    if asked is not None:
        return bool(asked)
    return "ipykernel" in sys.modules or sys.stderr.isatty()


def _check(name: str, value: Any) -> Any:
    if name == "block_bytes":
        return parse_count(name, value, why=", a number of bytes")
    if name == "progress" and value not in (None, True, False):
        raise OptionError(f"progress must be True, False or None; found {value!r}")
    return value


class set_options:
    """Set options, for good or for the length of a ``with`` block.

    Parameters
    ----------
    block_bytes : int, default 134217728
        The most bytes that one task's output may hold. Predictions are split along
        draws, and numpy-backed Datasets along their observation dims, to stay under it.
    progress : bool, optional
        Whether fits and writes show a progress bar. ``None`` shows one where a person
        is likely to look: a terminal or a notebook.

    Raises
    ------
    OptionError
        A name that is no option, or a value that it cannot take.

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
        checked = {name: _check(name, value) for name, value in options.items()}
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
