"""Encode pytrees and arrays as JSON and the plain dtypes of a store; decoding runs no code."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.contrib.module import ParamShape
from numpyro.infer.hmc import HMCState
from numpyro.infer.hmc_util import HMCAdaptState

from xr_aimz.errors import DamagedStoreError, StoreError

_CLASSES = {cls.__name__: cls for cls in (HMCAdaptState, HMCState, ParamShape)}
# JAX's own random number generators, by the name that wrap_key_data takes.
_GENERATORS = ("rbg", "threefry2x32", "unsafe_rbg")

Put = Callable[[np.ndarray], Any]
Get = Callable[[Any], np.ndarray]


def encode_tree(value: Any, put: Put, what: str) -> Any:
    """Encode a value as JSON, and store its arrays by ``put``.

    Parameters
    ----------
    value : None, bool, int, float, complex, str, array, random key, or list, tuple, dict of such
    put : callable
        Called with each array: stores it, and returns its reference as JSON.
    what : str
        A name of the value, for the error.

    Raises
    ------
    StoreError
        A value of another class.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is complex:
        return {"complex": [encode_tree(x, put, what) for x in (value.real, value.imag)]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode_tree(x, put, what) for x in value]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, put, what)
    if _CLASSES.get(type(value).__name__) is type(value):
        return {"class": [type(value).__name__, [encode_tree(x, put, what) for x in value]]}
    if isinstance(value, np.generic):
        return {"scalar": put(np.asarray(value))}
    if isinstance(value, np.ndarray):
        return {"array": put(value)}
    if isinstance(value, jax.Array):
        return _encode_jax(value, put)
    raise StoreError(
        f"{what} holds {value!r}, of the class {type(value).__module__}.{type(value).__name__}, "
        "which a store cannot keep without code; it can keep numbers, strings, arrays, random "
        "keys, None, and lists, tuples and dicts of them"
    )


def _encode_mapping(value: Mapping[Any, Any], put: Put, what: str) -> Any:
    if type(value) is not dict and type(value).__name__ not in ("FrozenDict", "OrderedDict"):
        raise StoreError(f"{what} holds a {type(value).__name__}; make it a dict")
    pairs = [[encode_tree(k, put, what), encode_tree(v, put, what)] for k, v in value.items()]
    kind = "frozen" if type(value).__name__ == "FrozenDict" else "dict"
    return {kind: pairs}


def _encode_jax(value: jax.Array, put: Put) -> Any:
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {"jax": put(np.asarray(value))}
    generator = str(jax.random.key_impl(value))
    if generator not in _GENERATORS:
        raise StoreError(f"a random key of {generator!r}: a store keeps those of {_GENERATORS!r}")
    return {"key": [generator, put(np.asarray(jax.random.key_data(value)))]}


def decode_tree(encoded: Any, get: Get) -> Any:
    """Decode a value that :func:`encode_tree` encoded; ``get`` returns the array of a reference.

    Raises
    ------
    DamagedStoreError
        It is no encoded value.
    """
    if encoded is None or isinstance(encoded, (bool, int, float, str)):
        return encoded
    if not isinstance(encoded, dict) or len(encoded) != 1:
        raise DamagedStoreError(f"{str(encoded)[:80]!r} is no encoded value")
    ((kind, inner),) = encoded.items()
    if kind not in _DECODERS:
        raise DamagedStoreError(f"{kind!r} is no kind of value; kinds are {sorted(_DECODERS)!r}")
    try:
        return _DECODERS[kind](inner, get)
    except (TypeError, ValueError, KeyError) as error:
        raise DamagedStoreError(f"{str(inner)[:80]!r} is no {kind}: {error}") from error


def _decode_class(inner: Any, get: Get) -> Any:
    name, parts = inner
    return _CLASSES[name](*(decode_tree(x, get) for x in parts))


def _decode_key(inner: Any, get: Get) -> Any:
    generator, name = inner
    if generator not in _GENERATORS:
        raise DamagedStoreError(f"{generator!r} is no random number generator of {_GENERATORS!r}")
    return jax.random.wrap_key_data(jnp.asarray(get(name)), impl=generator)


def _decode_frozen(inner: Any, get: Get) -> Any:
    from flax.core import FrozenDict  # only for a model that made one, so flax is installed

    return FrozenDict(_decode_mapping(inner, get))


def _decode_mapping(inner: Any, get: Get) -> dict[Any, Any]:
    return {decode_tree(k, get): decode_tree(v, get) for k, v in inner}


def _decode_float(inner: Any, get: Get) -> float:
    if inner not in ("nan", "inf", "-inf"):
        raise ValueError(inner)
    return float(inner)


_DECODERS: dict[str, Callable[[Any, Get], Any]] = {
    "array": lambda inner, get: get(inner),
    "class": _decode_class,
    "complex": lambda inner, get: complex(*(decode_tree(x, get) for x in inner)),
    "dict": _decode_mapping,
    "float": _decode_float,
    "frozen": _decode_frozen,
    "jax": lambda inner, get: jnp.asarray(get(inner)),
    "key": _decode_key,
    "list": lambda inner, get: [decode_tree(x, get) for x in inner],
    "scalar": lambda inner, get: get(inner)[()],
    "tuple": lambda inner, get: tuple(decode_tree(x, get) for x in inner),
}

_NUMBERS = re.compile(r"\|b1|[<>|][iu][1248]|[<>][f][248]|[<>]c(8|16)")
_STRINGS = re.compile(r"[<>]U\d{1,9}")
_TIMES = re.compile(r"[<>][mM]8\[(?P<unit>ns|us|ms|s|m|h|D)\]")
_UNITS = {
    "ns": "nanoseconds",
    "us": "microseconds",
    "ms": "milliseconds",
    "s": "seconds",
    "m": "minutes",
    "h": "hours",
    "D": "days",
}
_EPOCH = "since 1970-01-01"
_CALENDARS = (
    "360_day",
    "365_day",
    "366_day",
    "all_leap",
    "gregorian",
    "julian",
    "noleap",
    "proleptic_gregorian",
    "standard",
)


def encode_array(values: Any, what: str) -> tuple[np.ndarray, dict[str, str], dict[str, str]]:
    """Encode an array as a plain dtype; also return a record of its dtype, and CF attrs.

    Parameters
    ----------
    values : array
    what : str
        A name of the array, for the error.

    Raises
    ------
    StoreError
        A store cannot hold the dtype, such as objects other than strings.
    """
    values = np.asarray(values)
    dtype = values.dtype.str
    if _NUMBERS.fullmatch(dtype):
        return values.astype(values.dtype.newbyteorder("=")), {"dtype": dtype}, {}
    if match := _TIMES.fullmatch(dtype):
        counts = values.astype(values.dtype.newbyteorder("=")).view(np.int64)
        return counts, {"dtype": dtype}, _time_attrs(values.dtype.kind, match["unit"])
    if _STRINGS.fullmatch(dtype):
        return values.astype(np.dtypes.StringDType()), {"dtype": dtype}, {}
    if isinstance(values.dtype, np.dtypes.StringDType):
        return values, {"dtype": "string"}, {}
    if values.dtype == jnp.bfloat16:
        return values.view(np.uint16), {"dtype": "bfloat16"}, {}
    if values.dtype.kind == "O":
        return _encode_objects(values, what)
    raise StoreError(f"{what} has dtype {values.dtype}, which a store cannot hold; convert it")


def _time_attrs(kind: str, unit: str) -> dict[str, str]:
    if kind == "M":
        return {"units": f"{_UNITS[unit]} {_EPOCH}", "calendar": "proleptic_gregorian"}
    return {"units": _UNITS[unit]}


def _encode_objects(
    values: np.ndarray, what: str
) -> tuple[np.ndarray, dict[str, str], dict[str, str]]:
    entries = values.ravel().tolist()
    if all(isinstance(x, str) for x in entries):
        return values.astype(np.dtypes.StringDType()), {"dtype": "object"}, {}
    calendars = {getattr(x, "calendar", None) for x in entries}
    (calendar,) = calendars if len(calendars) == 1 else (None,)
    if calendar not in _CALENDARS:
        example = next(x for x in entries if not isinstance(x, str))
        raise StoreError(
            f"{what} holds objects, {example!r} among them; a store keeps strings, and dates of "
            "cftime in one calendar. Convert it"
        )
    import cftime  # the package of these dates

    units = f"microseconds {_EPOCH}"
    counts = np.asarray(cftime.date2num(values, units, calendar=calendar))
    how = {"dtype": "cftime", "calendar": str(calendar)}
    if counts.dtype.kind != "i" or not np.array_equal(decode_array(counts, how), values):
        raise StoreError(f"{what} has dates that do not count in whole microseconds; round them")
    return counts.astype(np.int64), how, {"units": units, "calendar": str(calendar)}


def decode_array(values: np.ndarray, how: Mapping[str, str]) -> np.ndarray:
    """Decode an array that :func:`encode_array` encoded.

    Raises
    ------
    DamagedStoreError
        ``how`` is no record of :func:`encode_array` for an array of this dtype.
    """
    dtype = how.get("dtype")
    if dtype == "string":
        return values
    if dtype == "object":
        return values.astype(object)
    if dtype == "bfloat16" and values.dtype == np.uint16:
        return values.view(jnp.bfloat16)
    if dtype == "cftime" and how.get("calendar") in _CALENDARS and values.dtype == np.int64:
        import cftime

        units = f"microseconds {_EPOCH}"
        dates = cftime.num2date(values, units, calendar=how["calendar"])
        return np.asarray(dates, object)
    if isinstance(dtype, str) and _TIMES.fullmatch(dtype) and values.dtype == np.int64:
        return values.view(np.dtype(dtype).newbyteorder("=")).astype(dtype)
    if isinstance(dtype, str) and _is_plain(dtype, values.dtype):
        return values.astype(dtype)
    raise DamagedStoreError(f"an array of {values.dtype} cannot have been one of {dict(how)!r}")


def _is_plain(dtype: str, stored: np.dtype) -> bool:
    """Check whether the dtype is the stored dtype, or strings of one length stored as strings."""
    if _STRINGS.fullmatch(dtype):
        return isinstance(stored, np.dtypes.StringDType)
    return bool(_NUMBERS.fullmatch(dtype)) and np.dtype(dtype).newbyteorder("=") == stored
