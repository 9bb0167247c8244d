"""How long a fit waits for a tracking server: a little, and once.

MLflow tries a request again for four minutes, and waits two for each answer. A fit is worth
more than its record, so here both are cut short, unless the user's environment says otherwise;
and when calls that failed have taken some seconds, the calls that are left are not made.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

__all__ = ["Attempts", "patience"]

T = TypeVar("T")

# Two tries again, at once and after some two seconds: what a server needs to answer again.
_BRIEF = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_LOST = 5.0
_SHOWN = 300


class _Brief:
    """Variables of the environment that are set while somebody needs them; reentrant."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values, self._lock = values, threading.Lock()
        self._users, self._set = 0, dict[str, str]()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._set = {k: v for k, v in self._values.items() if k not in os.environ}
                os.environ.update(self._set)
            self._users += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                for name, value in self._set.items():
                    if os.environ.get(name) == value:
                        del os.environ[name]


_brief = _Brief(_BRIEF)


def patience() -> AbstractContextManager[None]:
    """MLflow's requests are brief within; the environment is as it was after the last one.

    MLflow reads how long to wait from the environment at each request, and nowhere else. What
    is set there already stays.
    """
    return _brief


class Attempts:
    """Calls that may fail: what fails is kept in words, and too much of it ends them.

    Parameters
    ----------
    lost : float
        Seconds that calls may take and fail in all. The one under way is not cut short.
    """

    def __init__(self, lost: float = _LOST) -> None:
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self._left = lost

    def __call__(self, what: str, call: Callable[[], T]) -> T | None:
        """The call's result, or none where it failed or was left out."""
        if self._left <= 0:
            self.left_out.append(what)
            return None
        return self.always(what, call)

    def always(self, what: str, call: Callable[[], T]) -> T | None:
        """The same, however much failed before."""
        began = time.monotonic()
        try:
            return call()
        except Exception as error:
            self._left -= time.monotonic() - began
            self.failed.append(f"{what}: {_reason(error)}")
            return None

    def said(self) -> str:
        """What failed and what was left out, as one sentence; empty where all went well."""
        told = "; ".join(self.failed)
        rest = ", ".join(dict.fromkeys(self.left_out))
        return f"{told}; not tried after that: {rest}" if rest else told


def _reason(error: BaseException) -> str:
    """An error and what is at the bottom of it, which MLflow's own words may hide."""
    root = error
    while (below := root.__cause__ or root.__context__) is not None:
        root = below
    said = _line(error)
    return said if root is error or str(root) in said else f"{said} (for {_line(root)})"


def _line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
