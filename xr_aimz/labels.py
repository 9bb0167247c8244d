"""A coordinate label as 64 well-mixed bits.

A label's bits (its float64, int64 or nanoseconds; a string's stable hash) are mixed with
the name of its dimension by splitmix64, which is a bijection: within a dimension two
numbers share their words only when they are equal. Python's ``hash`` changes from one
process to the next and is never used. Words are pairs of uint32 (high, low), the form in
which ``xr_aimz.keys`` consumes them; those of several dimensions are summed there, so a
``MultiIndex`` is the sum of its levels, and stacking dimensions moves no draw.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.errors import LabelError

__all__ = ["label_words", "name_words"]

_WORKS = (
    "labels can be floats, integers, booleans, strings, datetime64, timedelta64, cftime "
    "dates, or a MultiIndex of these"
)
_PIECE = 2**16
_SECOND = 10**9
_NANOSECONDS = {
    "W": 7 * 86400 * _SECOND,
    "D": 86400 * _SECOND,
    "h": 3600 * _SECOND,
    "m": 60 * _SECOND,
    "s": _SECOND,
    "ms": 10**6,
    "us": 10**3,
    "ns": 1,
}
_PER_NANOSECOND = {"ps": 10**3, "fs": 10**6, "as": 10**9}
_PANDAS = (pd.Series, pd.api.extensions.ExtensionArray)


def label_words(dim: str, labels: Any, *, size: int | None = None) -> np.ndarray:
    """
    Hash the labels of one dimension.

    Parameters
    ----------
    dim
        Name of the dimension; equal labels of different dimensions hash differently.
    labels
        A pandas Index, any one-dimensional array-like, or None for a dimension without a
        coordinate, whose labels are its positions 0 to ``size - 1``.
    size
        Length of the dimension; required where ``labels`` is None.

    Returns
    -------
    numpy.ndarray
        uint32 of shape ``(n, 2)``: the high and the low half of each label's hash.

    Raises
    ------
    LabelError
        For a missing label or a kind of label that has no stable bits.
    """
    if labels is None:
        if size is None:
            raise LabelError(f"dimension {dim!r} has neither labels nor a size; give one of them")
        return _words(dim, np.arange(size, dtype=np.uint64))
    values = _one_dimensional(dim, labels)
    if isinstance(values, pd.MultiIndex):
        words = _level_words(dim, values)
    else:
        words = _words(dim, _bits(dim, values))
    if size is not None and len(words) != size:
        raise LabelError(f"dimension {dim!r} has size {size!r} but {len(words)!r} labels")
    return words


def name_words(name: str) -> np.ndarray:
    """
    Hash a name.

    Parameters
    ----------
    name
        Any string: a site, a dimension, a chain.

    Returns
    -------
    numpy.ndarray
        uint32 of shape ``(2,)``, the same in every process and version.
    """
    return _halves(np.asarray([_name_hash(name)]))[0]


def _one_dimensional(dim: str, labels: Any) -> pd.Index | np.ndarray:
    """Hold ``labels`` without a change of value or dtype."""
    if isinstance(labels, pd.Index):
        return labels
    if hasattr(labels, "dtype") and not isinstance(labels, _PANDAS):
        labels = np.asarray(labels)
        if labels.ndim == 1:
            return labels
    elif not np.isscalar(labels):
        try:
            return pd.Index(labels)
        except ValueError:
            labels = np.asarray(labels, dtype=object)
    raise LabelError(
        f"the labels of dimension {dim!r} have {np.ndim(labels)!r} dimensions; give one label "
        "for each position, in one dimension"
    )


def _level_words(dim: str, index: pd.MultiIndex) -> np.ndarray:
    """Sum the words of the levels, each under its own name as xarray spells it."""
    words = np.zeros((len(index), 2), np.uint32)
    for number, name in enumerate(index.names):
        level = f"{dim}_level_{number}" if name is None else str(name)
        words += label_words(level, index.get_level_values(number))
    return words


def _bits(dim: str, values: pd.Index | np.ndarray) -> np.ndarray:
    """64 bits that two labels of one dimension share only when they are equal."""
    missing = pd.isna(values)
    if np.any(missing):
        first = int(np.argmax(missing))
        raise LabelError(
            f"dimension {dim!r} has a missing label, {values[first]!r}, at position {first}; "
            "drop it or fill it, e.g. with .dropna() on the coordinate"
        )
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = pd.Categorical(values)
        return _bits(dim, categories.categories)[categories.codes]
    if isinstance(dtype, pd.DatetimeTZDtype):
        return _bits(dim, pd.DatetimeIndex(values).tz_convert("UTC").tz_localize(None))
    if isinstance(dtype, pd.StringDtype):
        return pd.util.hash_array(np.asarray(values, dtype=object))
    array = np.asarray(values)
    return _object_bits(dim, array) if array.dtype == object else _array_bits(dim, array)


def _array_bits(dim: str, array: np.ndarray) -> np.ndarray:
    kind = array.dtype.kind
    if kind == "f" and array.dtype.itemsize <= 8:
        return _float_bits(array.astype(np.float64))
    if kind in "iub":
        return array.astype(np.int64 if kind == "i" else np.uint64).view(np.uint64)
    if kind in "mM":
        return _time_bits(dim, array)
    if kind in "US":
        return pd.util.hash_array(array.astype(object))
    raise LabelError(f"dimension {dim!r} has labels of dtype {str(array.dtype)!r}; {_WORKS}")


def _float_bits(array: np.ndarray) -> np.ndarray:
    """The bits of a float, or of the integer that it is equal to: 2005.0 is the label 2005."""
    whole = (array == np.floor(array)) & (np.abs(array) < 2.0**63)
    integers = np.where(whole, array, 0.0).astype(np.int64)
    # Every zero is whole, so -0.0 and 0.0 are one label.
    return np.where(whole, integers.view(np.uint64), array.view(np.uint64))


def _time_bits(dim: str, array: np.ndarray) -> np.ndarray:
    """Nanoseconds modulo 2**64, the same for one instant whatever its unit."""
    unit, count = np.datetime_data(array.dtype)
    if unit in ("Y", "M") and array.dtype.kind == "M":
        array, unit, count = array.astype("datetime64[D]"), "D", 1
    ticks = array.astype(array.dtype.newbyteorder("=")).view(np.int64)
    if unit in _NANOSECONDS:
        factor = np.uint64(count * _NANOSECONDS[unit] % 2**64)
        return ticks.view(np.uint64) * factor
    if unit in _PER_NANOSECOND:
        whole, part = np.divmod(ticks * count, _PER_NANOSECOND[unit])
        finer = (part * (10**9 // _PER_NANOSECOND[unit])).view(np.uint64)
        return whole.view(np.uint64) ^ np.where(part, _mixed(finer), np.uint64(0))
    raise LabelError(
        f"dimension {dim!r} has labels of dtype {str(array.dtype)!r}, whose unit has no fixed "
        "length; convert them to days or finer, e.g. .astype('timedelta64[ns]')"
    )


def _object_bits(dim: str, array: np.ndarray) -> np.ndarray:
    """Python objects: strings, cftime dates, or what pandas knows a tighter dtype for."""
    kind = pd.api.types.infer_dtype(array, skipna=False)
    if kind in ("string", "bytes"):
        return pd.util.hash_array(array)
    if kind == "empty":
        return np.zeros(0, np.uint64)
    cftime = sys.modules.get("cftime")  # its dates exist only where it is imported
    if cftime is not None and all(isinstance(label, cftime.datetime) for label in array):
        return np.asarray([_cftime_bits(label) for label in array], np.uint64)
    tight = array.astype("datetime64[D]") if kind == "date" else pd.Index(array).infer_objects()
    if getattr(tight.dtype, "kind", "O") not in "iufbmM":
        odd = next((x for x in array if not isinstance(x, type(array[0]))), array[0])
        raise LabelError(
            f"dimension {dim!r} has labels of kind {kind!r}, such as {odd!r} "
            f"({type(odd).__name__}); {_WORKS}"
        )
    return _bits(dim, tight)


def _cftime_bits(date: Any) -> int:
    """Microseconds since 1970 in the date's own calendar, mixed with that calendar."""
    epoch = type(date)(1970, 1, 1, **_calendar(date))
    past = date - epoch
    microseconds = (past.days * 86400 + past.seconds) * 10**6 + past.microseconds
    return microseconds % 2**64 ^ int(_name_hash(date.calendar))


def _calendar(date: Any) -> dict[str, Any]:
    """What the constructor needs: the subclasses of ``cftime.datetime`` fix their calendar."""
    if type(date).__name__ != "datetime":
        return {}
    return {"calendar": date.calendar, "has_year_zero": date.has_year_zero}


def _words(dim: str, bits: np.ndarray) -> np.ndarray:
    words = np.empty((len(bits), 2), np.uint32)
    # In pieces: the mixing's own arrays would weigh several times what it returns.
    for start in range(0, len(bits), _PIECE):
        piece = bits[start : start + _PIECE]
        # Mixing before and after the name keeps neighbours apart and dimensions unrelated.
        words[start : start + _PIECE] = _halves(_mixed(_mixed(piece) ^ _name_hash(dim)))
    return words


def _halves(hashes: np.ndarray) -> np.ndarray:
    return np.stack([hashes >> np.uint64(32), hashes & np.uint64(2**32 - 1)], -1).astype(np.uint32)


def _name_hash(name: str) -> np.uint64:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "big"))


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer, a bijection of 64 bits."""
    x = bits + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
