"""Values and trees of arrays as JSON beside named arrays: nothing in it can run.

Plain values are JSON's own; what JSON has no word for is a mapping with one key that says
what it is: a tuple, a number that is not finite, an array under a name. Of classes there is
a closed list of named tuples. What is none of these is refused when it is packed, so that
there is nothing to guess when it is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.contrib.module import ParamShape
from numpyro.infer.hmc import HMCState
from numpyro.infer.hmc_util import HMCAdaptState

from xr_aimz.errors import DamagedStoreError, StoreError

__all__ = ["pack", "unpack"]

_CLASSES = {cls.__name__: cls for cls in (HMCAdaptState, HMCState, ParamShape)}
# JAX's own random number generators, by the name that wrap_key_data takes.
_GENERATORS = ("rbg", "threefry2x32", "unsafe_rbg")

Put = Callable[[np.ndarray], Any]
Get = Callable[[Any], np.ndarray]


def pack(value: Any, put: Put, what: str) -> Any:
    """A value as JSON, its arrays handed to ``put``.

    Parameters
    ----------
    value : None, bool, int, float, complex, str, array, random key, or list, tuple, dict of such
    put : callable
        Keeps an array, and says in JSON where it is.
    what : str
        What the value is, for the error.

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
        return {"complex": [pack(x, put, what) for x in (value.real, value.imag)]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [pack(x, put, what) for x in value]}
    if isinstance(value, Mapping):
        return _packed_mapping(value, put, what)
    if _CLASSES.get(type(value).__name__) is type(value):
        return {"class": [type(value).__name__, [pack(x, put, what) for x in value]]}
    if isinstance(value, np.generic):
        return {"scalar": put(np.asarray(value))}
    if isinstance(value, np.ndarray):
        return {"array": put(value)}
    if isinstance(value, jax.Array):
        return _packed_jax(value, put)
    raise StoreError(
        f"{what} holds {value!r}, of the class {type(value).__module__}.{type(value).__name__}, "
        "which a store cannot keep without code; there is a place for numbers, strings, arrays, "
        "random keys, None, and lists, tuples and dicts of them"
    )


def _packed_mapping(value: Mapping[Any, Any], put: Put, what: str) -> Any:
    if type(value) is not dict and type(value).__name__ not in ("FrozenDict", "OrderedDict"):
        raise StoreError(f"{what} holds a {type(value).__name__}; make it a dict")
    pairs = [[pack(k, put, what), pack(v, put, what)] for k, v in value.items()]
    kind = "frozen" if type(value).__name__ == "FrozenDict" else "dict"
    return {kind: pairs}


def _packed_jax(value: jax.Array, put: Put) -> Any:
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return {"jax": put(np.asarray(value))}
    generator = str(jax.random.key_impl(value))
    if generator not in _GENERATORS:
        raise StoreError(f"a random key of {generator!r}: a store keeps those of {_GENERATORS!r}")
    return {"key": [generator, put(np.asarray(jax.random.key_data(value)))]}


def unpack(found: Any, get: Get) -> Any:
    """The value of what :func:`pack` made.

    Raises
    ------
    DamagedStoreError
        It is not of that kind.
    """
    if found is None or isinstance(found, (bool, int, float, str)):
        return found
    if not isinstance(found, dict) or len(found) != 1:
        raise DamagedStoreError(f"{str(found)[:80]!r} is no packed value")
    ((kind, inner),) = found.items()
    if kind not in _UNPACKED:
        raise DamagedStoreError(f"{kind!r} is no kind of value; there are {sorted(_UNPACKED)!r}")
    try:
        return _UNPACKED[kind](inner, get)
    except (TypeError, ValueError, KeyError) as error:
        raise DamagedStoreError(f"{str(inner)[:80]!r} is no {kind}: {error}") from error


def _class(inner: Any, get: Get) -> Any:
    name, parts = inner
    return _CLASSES[name](*(unpack(x, get) for x in parts))


def _key(inner: Any, get: Get) -> Any:
    generator, name = inner
    if generator not in _GENERATORS:
        raise DamagedStoreError(f"{generator!r} is no random number generator of {_GENERATORS!r}")
    return jax.random.wrap_key_data(jnp.asarray(get(name)), impl=generator)


def _frozen(inner: Any, get: Get) -> Any:
    from flax.core import FrozenDict  # only where a model made one, so that it is there

    return FrozenDict(_mapping(inner, get))


def _mapping(inner: Any, get: Get) -> dict[Any, Any]:
    return {unpack(k, get): unpack(v, get) for k, v in inner}


def _float(inner: Any, get: Get) -> float:
    if inner not in ("nan", "inf", "-inf"):
        raise ValueError(inner)
    return float(inner)


_UNPACKED: dict[str, Callable[[Any, Get], Any]] = {
    "array": lambda inner, get: get(inner),
    "class": _class,
    "complex": lambda inner, get: complex(*(unpack(x, get) for x in inner)),
    "dict": _mapping,
    "float": _float,
    "frozen": _frozen,
    "jax": lambda inner, get: jnp.asarray(get(inner)),
    "key": _key,
    "list": lambda inner, get: [unpack(x, get) for x in inner],
    "scalar": lambda inner, get: get(inner)[()],
    "tuple": lambda inner, get: tuple(unpack(x, get) for x in inner),
}
