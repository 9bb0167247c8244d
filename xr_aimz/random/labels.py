"""Hash coordinate labels to 64 well-mixed bits each, the same in every process.

A label's bits (its float64, int64 or nanoseconds; a string's stable hash) are mixed with
the name of its dimension by splitmix64, which is a bijection: within a dimension two
numbers share a hash only when they are equal. Python's ``hash`` changes from one process
to the next and is never used. A hash is returned as its two words, uint32 (high, low), the
form that ``xr_aimz.random.keys`` takes. The words of several dimensions are summed there,
so the words of a ``MultiIndex`` label are the sum over its levels, and stacking dimensions
changes no draw.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.errors import LabelError

_SUPPORTED = (
    "labels can be floats, integers, booleans, strings, datetime64, timedelta64, cftime "
    "dates, or a MultiIndex of these"
)
_CHUNK_SIZE = 2**16
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


def hash_labels(dim: str, labels: Any, *, size: int | None = None) -> np.ndarray:
    """
    Hash the labels of one dimension to uint32 words of shape ``(n, 2)``.

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
        return _mix_with_dim(dim, np.arange(size, dtype=np.uint64))
    values = _as_one_dimensional(dim, labels)
    if isinstance(values, pd.MultiIndex):
        words = _hash_levels(dim, values)
    else:
        words = _mix_with_dim(dim, _label_bits(dim, values))
    if size is not None and len(words) != size:
        raise LabelError(f"dimension {dim!r} has size {size!r} but {len(words)!r} labels")
    return words


def hash_name(name: str) -> np.ndarray:
    """
    Hash a name to two uint32 words.

    Parameters
    ----------
    name
        Any string: a site, a dimension, a chain.

    Returns
    -------
    numpy.ndarray
        uint32 of shape ``(2,)``, the same in every process and version.
    """
    return _split_halves(np.asarray([_name_hash(name)]))[0]


def _as_one_dimensional(dim: str, labels: Any) -> pd.Index | np.ndarray:
    """Return labels as a one-dimensional Index or array, values and dtype unchanged."""
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


def _hash_levels(dim: str, index: pd.MultiIndex) -> np.ndarray:
    """Sum the words of a MultiIndex's levels, each hashed under its name in xarray."""
    words = np.zeros((len(index), 2), np.uint32)
    for number, name in enumerate(index.names):
        level = f"{dim}_level_{number}" if name is None else str(name)
        words += hash_labels(level, index.get_level_values(number))
    return words


def _label_bits(dim: str, values: pd.Index | np.ndarray) -> np.ndarray:
    """Return uint64 bits of labels ``(n,)``, shared by two labels only when they are equal."""
    missing_mask = pd.isna(values)
    if np.any(missing_mask):
        first = int(np.argmax(missing_mask))
        raise LabelError(
            f"dimension {dim!r} has a missing label, {values[first]!r}, at position {first}; "
            "drop it or fill it, e.g. with .dropna() on the coordinate"
        )
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = pd.Categorical(values)
        return _label_bits(dim, categories.categories)[categories.codes]
    if isinstance(dtype, pd.DatetimeTZDtype):
        return _label_bits(dim, pd.DatetimeIndex(values).tz_convert("UTC").tz_localize(None))
    if isinstance(dtype, pd.StringDtype):
        return pd.util.hash_array(np.asarray(values, dtype=object))
    array = np.asarray(values)
    return _object_bits(dim, array) if array.dtype == object else _array_bits(dim, array)


def _array_bits(dim: str, array: np.ndarray) -> np.ndarray:
    """Return the uint64 bits of an array of labels by its dtype's kind."""
    kind = array.dtype.kind
    if kind == "f" and array.dtype.itemsize <= 8:
        return _float_bits(array.astype(np.float64))
    if kind in "iub":
        return array.astype(np.int64 if kind == "i" else np.uint64).view(np.uint64)
    if kind in "mM":
        return _time_bits(dim, array)
    if kind in "US":
        return pd.util.hash_array(array.astype(object))
    raise LabelError(f"dimension {dim!r} has labels of dtype {str(array.dtype)!r}; {_SUPPORTED}")


def _float_bits(array: np.ndarray) -> np.ndarray:
    """Return the bits of floats, or of the equal integer if there is one: 2005.0 is 2005."""
    is_integer = (array == np.floor(array)) & (np.abs(array) < 2.0**63)
    integers = np.where(is_integer, array, 0.0).astype(np.int64)
    # Every zero is an integer, so -0.0 and 0.0 are one label.
    return np.where(is_integer, integers.view(np.uint64), array.view(np.uint64))


def _time_bits(dim: str, array: np.ndarray) -> np.ndarray:
    """Return nanoseconds modulo 2**64, equal for equal instants whatever their units."""
    unit, count = np.datetime_data(array.dtype)
    if unit in ("Y", "M") and array.dtype.kind == "M":
        array, unit, count = array.astype("datetime64[D]"), "D", 1
    ticks = array.astype(array.dtype.newbyteorder("=")).view(np.int64)
    if unit in _NANOSECONDS:
        factor = np.uint64(count * _NANOSECONDS[unit] % 2**64)
        return ticks.view(np.uint64) * factor
    if unit in _PER_NANOSECOND:
        nanoseconds, remainder = np.divmod(ticks * count, _PER_NANOSECOND[unit])
        remainder_bits = (remainder * (10**9 // _PER_NANOSECOND[unit])).view(np.uint64)
        return nanoseconds.view(np.uint64) ^ np.where(
            remainder, _mix(remainder_bits), np.uint64(0)
        )
    raise LabelError(
        f"dimension {dim!r} has labels of dtype {str(array.dtype)!r}, whose unit has no fixed "
        "length; convert them to days or finer, e.g. .astype('timedelta64[ns]')"
    )


def _object_bits(dim: str, array: np.ndarray) -> np.ndarray:
    """Return the bits of objects: strings, cftime dates, or what pandas can infer a dtype for."""
    kind = pd.api.types.infer_dtype(array, skipna=False)
    if kind in ("string", "bytes"):
        return pd.util.hash_array(array)
    if kind == "empty":
        return np.zeros(0, np.uint64)
    cftime = sys.modules.get("cftime")  # labels can be its dates only if it has been imported
    if cftime is not None and all(isinstance(label, cftime.datetime) for label in array):
        return np.asarray([_cftime_bits(label) for label in array], np.uint64)
    typed = array.astype("datetime64[D]") if kind == "date" else pd.Index(array).infer_objects()
    if getattr(typed.dtype, "kind", "O") not in "iufbmM":
        example = next((x for x in array if not isinstance(x, type(array[0]))), array[0])
        raise LabelError(
            f"dimension {dim!r} has labels of kind {kind!r}, such as {example!r} "
            f"({type(example).__name__}); {_SUPPORTED}"
        )
    return _label_bits(dim, typed)


def _cftime_bits(date: Any) -> int:
    """Return microseconds since 1970 in the date's own calendar, mixed with its name."""
    epoch = type(date)(1970, 1, 1, **_calendar_arguments(date))
    elapsed = date - epoch
    microseconds = (elapsed.days * 86400 + elapsed.seconds) * 10**6 + elapsed.microseconds
    return microseconds % 2**64 ^ int(_name_hash(date.calendar))


def _calendar_arguments(date: Any) -> dict[str, Any]:
    """Return calendar arguments for ``cftime.datetime``; its subclasses fix the calendar."""
    if type(date).__name__ != "datetime":
        return {}
    return {"calendar": date.calendar, "has_year_zero": date.has_year_zero}


def _mix_with_dim(dim: str, bits: np.ndarray) -> np.ndarray:
    """Mix uint64 bits ``(n,)`` with a dimension's name, to uint32 words ``(n, 2)``."""
    words = np.empty((len(bits), 2), np.uint32)
    # In chunks: mixing makes temporary arrays several times the size of its result.
    for start in range(0, len(bits), _CHUNK_SIZE):
        chunk = bits[start : start + _CHUNK_SIZE]
        # Mixing before the name keeps neighbouring labels apart, and mixing after it keeps
        # dimensions unrelated.
        words[start : start + _CHUNK_SIZE] = _split_halves(_mix(_mix(chunk) ^ _name_hash(dim)))
    return words


def _split_halves(hashes: np.ndarray) -> np.ndarray:
    """Split uint64 hashes into uint32 words (high, low) on a new last axis."""
    return np.stack([hashes >> np.uint64(32), hashes & np.uint64(2**32 - 1)], -1).astype(np.uint32)


def _name_hash(name: str) -> np.uint64:
    """Return the first 64 bits of a name's BLAKE2b digest."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "big"))


def _mix(bits: np.ndarray) -> np.ndarray:
    """Apply the splitmix64 finalizer, a bijection of uint64, elementwise."""
    x = bits + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
