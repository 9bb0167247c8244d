"""The text of a model, and a hash by which two fits can be seen to be of the same text."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["source_of"]


def source_of(model: Callable) -> tuple[str, str] | None:
    """The source of a model and its sha256; none where Python does not know it.

    A partial has the source of its function, an object that of its class.

    Examples
    --------
    >>> text, digest = source_of(source_of)
    >>> text.startswith("def source_of"), len(digest)
    (True, 64)
    """
    named: Any = inspect.unwrap(model)
    while hasattr(named, "func"):
        named = inspect.unwrap(named.func)
    if not (inspect.isroutine(named) or inspect.isclass(named)):
        named = type(named)
    try:
        text = inspect.getsource(named)
    except (OSError, TypeError):
        # Typed into an interpreter, or compiled.
        return None
    return text, hashlib.sha256(text.encode()).hexdigest()
