"""Whole numbers that a caller gives: counts and seeds, of Python's, NumPy's or JAX's types."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from xr_aimz.errors import OptionError

__all__ = ["parse_count", "parse_seed"]


def parse_count(
    name: str, value: Any, least: int = 1, most: int | None = None, why: str = ""
) -> int:
    """
    Check an option that is a number of something.

    Parameters
    ----------
    name : str
        What the option is called.
    value : int
        Or whatever has an ``__index__``, such as NumPy's integers. A bool is none.
    least, most : int
        Between which it lies.
    why : str
        What sets the bounds, for the error.

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
    Check a seed.

    Parameters
    ----------
    value : int
        Of 64 bits, signed.

    Returns
    -------
    int

    Raises
    ------
    OptionError
        Anything else, a random key of JAX's among it.
    """
    number = _index_of(value)
    if number is None or not -(2**63) <= number < 2**63:
        raise OptionError(
            f"seed={_one_line(value)} is a {type(value).__name__}: it must be an int of at most "
            "64 bits, such as seed=0, for the same call gives the same draws; a key of jax.random "
            "is none"
        )
    return number


def _one_line(value: Any) -> str:
    # A random key of JAX's has two lines.
    return " ".join(repr(value).split())


def _index_of(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
