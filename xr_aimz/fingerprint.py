"""A name for a traced program: of what it computes from what, constants at any depth included.

Compiled programs, verdicts on models, the tasks of a graph and the files of a run that was cut
short are all found again by this name. Two programs that can differ in a value have two names;
the same work has the same name in every process.
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

from xr_aimz.dataflow import open_program, scan_counts
from xr_aimz.identity import identify

__all__ = [
    "RecentlyUsed",
    "operation_fingerprint",
    "program_fingerprint",
    "traced_fingerprint",
]

Value = TypeVar("Value")
# What a program is called; and what only its derivative is made from, which a trace of the
# derivative has in full.
_NO_PART = {"name", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "policy"}
_OURS = __name__.partition(".")[0]
_LIBRARIES = {"jax", "jaxlib", "numpy", "numpyro"}
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")


def program_fingerprint(closed: ClosedJaxpr) -> str:
    """
    Digest of a traced program, independent of the order in which its steps are written down.

    Parameters
    ----------
    closed : ClosedJaxpr

    Returns
    -------
    str
        64 hexadecimal digits (SHA-256).
    """
    return _program(closed, {}).hex()


def operation_fingerprint(equation: Any) -> str:
    """Digest of what one operation of a program does to its arguments, whatever those are."""
    return _operation(equation, {}).hex()


def traced_fingerprint(call: Callable, *args: Any) -> str:
    """Digest of what a function computes from arrays like these."""
    return program_fingerprint(jax.make_jaxpr(call)(*args))


def _program(program: Any, memo: dict[int, bytes]) -> bytes:
    """Each value is named by its operation and the names of what goes into it."""
    if id(program) not in memo:
        results, effects = _results(program, memo)
        memo[id(program)] = _hash(*results, b"effects", *effects)
    return memo[id(program)]


def _results(program: Any, memo: dict[int, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Digests of the results of a program, one by one, and of its effects."""
    jaxpr, consts = open_program(program)
    names: dict[Any, bytes] = {}
    for number, var in enumerate(jaxpr.invars):
        names[var] = _hash(b"argument", number, str(var.aval))
    for var, value in zip(jaxpr.constvars, consts, strict=False):
        names[var] = _hash(b"constant", _array(value))
    # An open program has its constants among its arguments.
    for number, var in enumerate(jaxpr.constvars[len(consts) :]):
        names[var] = _hash(b"open", number, str(var.aval))

    def read(atom: Any) -> bytes:
        return _literal(atom) if isinstance(atom, Literal) else names[atom]

    effects = []
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "scan":
            results = _scan_results(equation, operands, memo)
        else:
            operation = _hash(_operation(equation, memo), *operands)
            results = [_hash(operation, number) for number in range(len(equation.outvars))]
        if equation.effects:
            effects.append(_hash(*results))
        names |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars], effects


def _scan_results(equation: Any, operands: list[bytes], memo: dict[int, bytes]) -> list[bytes]:
    """Of each stacked result the digest of what it stacks, whatever its place.

    NumPyro collects the sites of a step in a set: their order is that of Python's hashes.
    """
    inner, effects = _results(equation.params["jaxpr"], memo)
    constants, count = scan_counts(equation)
    params = {"num_consts": constants, "num_carry": count, **equation.params}
    settings = [
        (name, _setting(params[name], memo))
        for name in ("num_consts", "num_carry", "length", "reverse")
    ]
    step = _hash(b"scan", *(x for pair in settings for x in pair), *operands, *inner[:count])
    step = _hash(step, b"effects", *effects)
    carried = [_hash(step, number) for number in range(count)]
    return [*carried, *(_hash(step, b"stacked", one) for one in inner[count:])]


def _operation(equation: Any, memo: dict[int, bytes]) -> bytes:
    params = equation.params
    kept = sorted(key for key in params if key not in _NO_PART)
    return _hash(
        equation.primitive.name, *(x for k in kept for x in (k, _setting(params[k], memo)))
    )


def _literal(atom: Literal) -> bytes:
    return _hash(b"constant", _array(atom.val), str(atom.aval))


def _array(value: Any) -> bytes:
    """Digest of an array's dtype, shape and bits; of a random key's, its words."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _hash(str(value.dtype), _array(jax.random.key_data(value)))
    array = np.ascontiguousarray(value)
    return _hash(str(array.dtype), str(array.shape), array.tobytes())


def _setting(value: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of a parameter of an operation, or of an object that a callback holds."""
    each = partial(_setting, memo=memo)
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _program(value, memo)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum):
        return _hash(type(value).__name__, repr(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if isinstance(value, tuple | list):
        return _hash(type(value).__name__, *map(each, value))
    if isinstance(value, set | frozenset):
        return _hash(b"set", *sorted(map(each, value)))
    if isinstance(value, Mapping):
        return _hash(b"mapping", *(_hash(each(k), each(v)) for k, v in value.items()))
    if isinstance(value, FunctionType | MethodType | partial | CodeType):
        return _function(value, memo)
    return _object(value, memo)


def _function(value: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of a function on the host: its instructions, and the values that it holds."""
    if id(value) in memo:
        return memo[id(value)]
    # A function may hold itself.
    memo[id(value)] = b"recursion"
    each = partial(_setting, memo=memo)
    if isinstance(value, partial):
        found = _hash(b"partial", each(value.func), each(value.args), each(value.keywords))
    elif isinstance(value, MethodType):
        found = _hash(b"method", each(value.__func__), each(value.__self__))
    elif isinstance(value, FunctionType) and value.__module__.partition(".")[0] == _OURS:
        # How it is written may change from release to release, and with that no number.
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        held = (value.__qualname__, value.__defaults__, value.__kwdefaults__, cells)
        found = _hash(b"function of ours", *map(each, held))
    elif isinstance(value, CodeType):
        found = _hash(value.co_code, str(value.co_names), each(value.co_consts))
    else:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, _globals(value))
        found = _hash(b"function", *map(each, parts))
    memo[id(value)] = found
    return found


def _globals(function: FunctionType) -> dict[str, Any]:
    """The values of its module that a function reads; a library's own are its version's."""
    if function.__module__.partition(".")[0] in _LIBRARIES:
        return {}
    there = function.__globals__
    read = {name: there[name] for name in function.__code__.co_names if name in there}
    return {name: value for name, value in read.items() if not isinstance(value, ModuleType)}


def _object(value: Any, memo: dict[int, bytes]) -> bytes:
    """Digest of an object: one of JAX's by what it prints, any other by what it holds."""
    shown = repr(value) if _is_of_a_library(value) else ""
    if shown and not _ADDRESS.search(shown):
        return _hash(type(value).__qualname__, shown)
    if isinstance(value, type) and _is_of_a_library(value):
        return _hash(value.__module__, value.__qualname__)
    if hasattr(value, "__wrapped__"):
        return _setting(value.__wrapped__, memo)
    if id(value) not in memo:
        found = identify(value)
        # Where nothing tells what it does, it is like no other, in this process or in another.
        memo[id(value)] = uuid.uuid4().bytes if found.unnamed else _hash(found.digest)
    return memo[id(value)]


def _is_of_a_library(value: Any) -> bool:
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__.partition(".")[0] in _LIBRARIES


def _hash(*parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        # With their lengths, so that no two lists of parts run together.
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class RecentlyUsed(Generic[Value]):
    """The values that were used last, by key; the one used longest ago is let go of first."""

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
