"""Compute fingerprints of traced programs, constants at any depth included.

Compiled programs, verdicts on models, the tasks of a graph and the files of an interrupted run
are looked up by this fingerprint. Two programs that can differ in a value have different
fingerprints; the same work has the same fingerprint in every process.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from enum import Enum
from functools import partial
from threading import Lock
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from xr_aimz.storage import identify
from xr_aimz.tracing.dataflow import scan_counts, split_constants

Value = TypeVar("Value")
# Parameters that are ignored: a program's name, and what only its derivative is made from, which
# a trace of the derivative contains in full.
_IGNORED_PARAMS = {"name", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "policy"}
_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = {"jax", "jaxlib", "numpy", "numpyro"}
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")


def program_fingerprint(closed: ClosedJaxpr) -> str:
    """
    Digest of a traced program, independent of the order in which its operations are listed.

    Parameters
    ----------
    closed : ClosedJaxpr

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256).
    """
    return _hash_program(closed, {}).hex()


def operation_fingerprint(equation: Any) -> str:
    """Digest of one operation of a program and its parameters, independent of its arguments."""
    return _hash_operation(equation, {}).hex()


def traced_fingerprint(call: Callable, *args: Any) -> str:
    """Trace a function on arrays, and return the fingerprint of the program, 64 hex digits."""
    return program_fingerprint(jax.make_jaxpr(call)(*args))


def _hash_program(program: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of a program: each value is hashed from its operation and its operands."""
    if id(program) not in memo:
        results, effects = _hash_results(program, memo)
        memo[id(program)] = _hash(*results, b"effects", *effects)
    return memo[id(program)]


def _hash_results(program: Any, memo: dict[int, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Digests of the results of a program, one for each, and of its effects."""
    jaxpr, consts = split_constants(program)
    digests: dict[Any, bytes] = {}
    for number, var in enumerate(jaxpr.invars):
        digests[var] = _hash(b"argument", number, str(var.aval))
    for var, value in zip(jaxpr.constvars, consts, strict=False):
        digests[var] = _hash(b"constant", _hash_array(value))
    # A program that is not closed has its constants among its arguments.
    for number, var in enumerate(jaxpr.constvars[len(consts) :]):
        digests[var] = _hash(b"open", number, str(var.aval))

    def read(atom: Any) -> bytes:
        return _hash_literal(atom) if isinstance(atom, Literal) else digests[atom]

    effects = []
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "scan":
            results = _hash_scan(equation, operands, memo)
        else:
            operation = _hash(_hash_operation(equation, memo), *operands)
            results = [_hash(operation, number) for number in range(len(equation.outvars))]
        if equation.effects:
            effects.append(_hash(*results))
        digests |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars], effects


def _hash_scan(equation: Any, operands: list[bytes], memo: dict[int, bytes]) -> list[bytes]:
    """Digests of the results of a scan: of a stacked result by its value, not its position.

    NumPyro collects the sites of a step in a set: their order is that of Python's hashes.
    """
    inner, effects = _hash_results(equation.params["jaxpr"], memo)
    constants, count = scan_counts(equation)
    params = {"num_consts": constants, "num_carry": count, **equation.params}
    settings = [
        (name, _hash_param(params[name], memo))
        for name in ("num_consts", "num_carry", "length", "reverse")
    ]
    step = _hash(b"scan", *(x for pair in settings for x in pair), *operands, *inner[:count])
    step = _hash(step, b"effects", *effects)
    carried = [_hash(step, number) for number in range(count)]
    return [*carried, *(_hash(step, b"stacked", result) for result in inner[count:])]


def _hash_operation(equation: Any, memo: dict[int, bytes]) -> bytes:
    params = equation.params
    names = sorted(key for key in params if key not in _IGNORED_PARAMS)
    return _hash(
        equation.primitive.name, *(x for k in names for x in (k, _hash_param(params[k], memo)))
    )


def _hash_literal(atom: Literal) -> bytes:
    return _hash(b"constant", _hash_array(atom.val), str(atom.aval))


def _hash_array(value: Any) -> bytes:
    """Digest of an array's dtype, shape and bits; of a random key, that of its key data."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _hash(str(value.dtype), _hash_array(jax.random.key_data(value)))
    array = np.ascontiguousarray(value)
    return _hash(str(array.dtype), str(array.shape), array.tobytes())


def _hash_param(value: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of a parameter of an operation, or of an object that a callback refers to."""
    hasher = partial(_hash_param, memo=memo)
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _hash_program(value, memo)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum):
        return _hash(type(value).__name__, repr(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _hash_array(value)
    if isinstance(value, tuple | list):
        return _hash(type(value).__name__, *map(hasher, value))
    if isinstance(value, set | frozenset):
        return _hash(b"set", *sorted(map(hasher, value)))
    if isinstance(value, Mapping):
        return _hash(b"mapping", *(_hash(hasher(k), hasher(v)) for k, v in value.items()))
    if isinstance(value, FunctionType | MethodType | partial | CodeType):
        return _hash_function(value, memo)
    return _hash_object(value, memo)


def _hash_function(value: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of a host function: its instructions, and the values that it refers to."""
    if id(value) in memo:
        return memo[id(value)]
    # A function may refer to itself.
    memo[id(value)] = b"recursion"
    hasher = partial(_hash_param, memo=memo)
    if isinstance(value, partial):
        digest = _hash(b"partial", hasher(value.func), hasher(value.args), hasher(value.keywords))
    elif isinstance(value, MethodType):
        digest = _hash(b"method", hasher(value.__func__), hasher(value.__self__))
    elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] == _PACKAGE:
        # The instructions of our own functions may change between releases without a change of
        # any number, so they are not hashed; a change of a number needs another name.
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        content = (value.__qualname__, value.__defaults__, value.__kwdefaults__, cells)
        digest = _hash(b"function of ours", *map(hasher, content))
    elif isinstance(value, CodeType):
        digest = _hash(value.co_code, str(value.co_names), hasher(value.co_consts))
    else:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, _scope_of(value))
        digest = _hash(b"function", *map(hasher, parts))
    memo[id(value)] = digest
    return digest


def _scope_of(function: FunctionType) -> dict[str, Any]:
    """Return the globals that a function reads; a library has none, its version fixes them."""
    if function.__module__.partition(".")[0] in _LIBRARIES:
        return {}
    scope = function.__globals__
    values = {name: scope[name] for name in function.__code__.co_names if name in scope}
    return {name: value for name, value in values.items() if not isinstance(value, ModuleType)}


def _hash_object(value: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of an object: for one of JAX or NumPy its repr, for any other its content."""
    text = repr(value) if _is_from_library(value) else ""
    if text and not _ADDRESS.search(text):
        return _hash(type(value).__qualname__, text)
    if isinstance(value, type) and _is_from_library(value):
        return _hash(value.__module__, value.__qualname__)
    if hasattr(value, "__wrapped__"):
        return _hash_param(value.__wrapped__, memo)
    if id(value) not in memo:
        identity = identify(value)
        # An object without an identity gets a digest that is unique, in this process and others.
        memo[id(value)] = uuid.uuid4().bytes if identity.unnamed else _hash(identity.digest)
    return memo[id(value)]


def _is_from_library(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _hash(*parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        # With their lengths, so that different lists of parts have different bytes.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class LRUCache(Generic[Value]):
    """Cache of at most ``most`` values by key; drops the least recently used one. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> Value:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def __iter__(self) -> Iterator[Hashable]:
        with self._lock:
            return iter(list(self._values))

    def __len__(self) -> int:
        return len(self._values)
