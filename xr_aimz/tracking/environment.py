"""Where a fit was made: the interpreter, the machine and every installed package."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions

import jax

__all__ = ["machine", "requirements"]


def requirements() -> str:
    """The installed packages with their versions, one a line, as pip takes them."""
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    lines = [f"{name}=={version}" for name, version in sorted(found.items(), key=_caseless)]
    return "\n".join(
        [f"# Python {platform.python_version()} on {platform.platform()}", *lines, ""]
    )


def machine() -> dict[str, str | int]:
    """The interpreter, the platform, and the devices that JAX sees."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 0,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
    }


def _caseless(item: tuple[str, str]) -> str:
    return item[0].lower()
