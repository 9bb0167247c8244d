"""Convert values to a canonical form, which is equal in every process for the same data.

A form is made of nested tuples of plain Python values, whose ``repr`` is hashed. Addresses,
hash order, locks and the identifiers of open files are left out. A function is identified by its
code and, outside of installed libraries, by the values that the code refers to; any other object
by what it would be pickled as, part by part.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import os
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from dask._task_spec import Alias, DataNode, Task, TaskRef
from dask.array import Array
from xarray.backends import CachingFileManager
from xarray.core import indexing

_PLAIN_TYPES = frozenset((int, float, complex, bytes, bool, type(None), type(Ellipsis)))
_HASHING_SIZE = 2**24
# Wrappers that xarray puts around an array; they change no value of it.
_WRAPPERS = (
    indexing.ImplicitToExplicitIndexingAdapter,
    indexing.CopyOnWriteArray,
    indexing.MemoryCachedArray,
    indexing.NumpyIndexingAdapter,
    indexing.DaskIndexingAdapter,
)
# Folders of installed code, which changes with its version alone, and of this package.
_LIBRARIES = tuple(
    Path(str(folder)).resolve()
    for folder in (
        *(sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
        Path(__file__).parents[1],
    )
)
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_PACKAGE = __name__.partition(".")[0]
# NumPy chooses 128 bits where it is given no seed; a seed that a user chose has fewer.
_SEED_BITS = 64


def form_digest(form: Any) -> str:
    """Return 128 bits of the SHA-256 digest of a canonical form, as 32 hexadecimal digits."""
    return hashlib.sha256(repr(form).encode()).hexdigest()[:32]


class CanonicalForms:
    """Converter of values to canonical forms, which collects their origins and unnamed parts.

    Attributes
    ----------
    names : dict of str to str
        Replacements for the names of dask's tasks.
    origins : dict of str to set of str
        Facts about the files and arrays among the values, by their description.
    unnamed : dict of str to None
        Descriptions of the values that have no canonical form; an ordered set.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.origins: dict[str, set[str]] = {}
        self.unnamed: dict[str, None] = {}
        # The layer of a graph that is being converted, and whether the user has named it.
        self.layer, self.is_titled = "", False
        self._within: dict[int, Any] = {}
        self._functions: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        """Return the canonical form of a value."""
        kind: Any = type(value)
        if kind is str:
            return ("key", self.names[value]) if value in self.names else value
        if kind in _PLAIN_TYPES:
            return value
        return _find_rule(kind)(self, value)

    def array(self, array: Array) -> Any:
        """Return the canonical form of a dask array."""
        raise NotImplementedError

    def note(self, origin: str, fact: str) -> None:
        self.origins.setdefault(origin, set()).add(fact)

    def _sequence(self, value: Iterable[Any]) -> Any:
        kind = type(value)
        name = kind.__name__ if kind in (tuple, list) else self.of(kind)
        return (name, *map(self.of, value))

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        return ("dict", *sorted(((self.of(k), self.of(v)) for k, v in value.items()), key=repr))

    def _set(self, value: Set[Any]) -> Any:
        return ("set", *sorted(map(self.of, value), key=repr))

    def _slice(self, value: Any) -> Any:
        return (type(value).__name__, *map(self.of, (value.start, value.stop, value.step)))

    def _numbers(self, value: np.ndarray) -> Any:
        dtype = value.dtype
        if dtype.kind in "UT" or (dtype.kind == "O" and _are_strings(value)):
            # Whatever their dtype: a file and a list have other dtypes for the same strings.
            return ("strings", value.shape, form_digest(value.ravel().tolist()))
        if dtype.kind == "O":
            return ("objects", value.shape, *map(self.of, value.ravel().tolist()))
        digest = hashlib.sha256()
        for part in _iter_bytes(value):
            digest.update(part)
        return ("array", dtype.str, value.shape, digest.hexdigest())

    def _scalar(self, value: np.generic) -> Any:
        return ("scalar", value.dtype.str, value.tobytes())

    def _dtype(self, value: np.dtype) -> Any:
        return ("dtype", str(value), value.str)

    def _index(self, value: pd.Index) -> Any:
        return self._numbers(value.to_numpy())

    def _variable(self, value: xr.Variable) -> Any:
        stored = value._data
        lazy = value.chunks is not None or not value._in_memory
        return ("variable", value.dims, self.of(stored) if lazy else self._numbers(value.values))

    def _labelled(self, value: xr.DataArray | xr.Dataset) -> Any:
        dataset = value if isinstance(value, xr.Dataset) else value._to_temp_dataset()
        return ("dataset", self._mapping(dict(dataset.variables)))

    def _task(self, value: Task) -> Any:
        stored = self._functions.get(id(value.func))
        if stored is None:
            # A layer has one function for all of its tasks.
            stored = self._functions[id(value.func)] = value.func, self.of(value.func)
        kwargs = self._mapping(value.kwargs) if value.kwargs else ()
        return ("task", stored[1], self._sequence(value.args), kwargs)

    def _inside(self, value: Any) -> Any:
        return self.of(value.array)

    def _file(self, value: CachingFileManager) -> Any:
        args = [self._path(a) if isinstance(a, str | os.PathLike) else a for a in value._args]
        return ("file", *map(self.of, (value._opener, args, value._mode, value._kwargs)))

    def _path(self, value: str | os.PathLike) -> Any:
        from xr_aimz.storage.listing import file_facts  # which imports Zarr

        path, facts = file_facts(value)
        self.note(f"the file {path!r}", facts)
        return path, facts

    def _zarr(self, value: Any) -> Any:
        from xr_aimz.storage.listing import zarr_facts

        address, facts = zarr_facts(value)
        self.note(f"the Zarr array {address!r}", facts)
        return "zarr", address, facts

    def _in_file(self, value: Any) -> Any:
        """Return the form of an array of h5py or netCDF4, which dask reads from an open file."""
        if hasattr(value, "group"):
            group = value.group()
            return ("in a file", self._path(group.filepath()), group.path, value.name)
        return ("in a file", self._path(value.file.filename), value.name)

    def _seed(self, value: np.random.SeedSequence) -> Any:
        entropy = value.entropy
        if isinstance(entropy, int) and entropy.bit_length() > _SEED_BITS:
            self.unnamed["random numbers without a seed"] = None
        return ("seed", self.of(entropy), value.spawn_key, value.pool_size)

    def _random_state(self, value: np.random.RandomState) -> Any:
        # NumPy's global state is an attribute of every distribution of SciPy, and each draw by
        # any code advances it.
        if value is np.random.mtrand._rand:
            return "the random state of NumPy"
        return ("random state", self.of(value.get_state()))

    def _function(self, value: types.FunctionType) -> Any:
        name = _import_path(value)
        code = _code_form(value.__code__)
        settings = self._nested(value, lambda: (value.__defaults__, value.__kwdefaults__))
        if name is not None and name[0] == _PACKAGE:
            # Its module and its code may change from release to release; where it computes
            # something else it needs another name, which no other function in a graph has.
            return ("function", *name, settings)
        if name is not None:
            return ("function", *name, code, settings)
        # Of a script, a notebook or another function: the values it refers to can change too.
        return ("function", code, settings, self._nested(value, lambda: _find_references(value)))

    def _method(self, value: types.MethodType) -> Any:
        return ("method", self.of(value.__func__), self.of(value.__self__))

    def _builtin(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType):
            module = getattr(value, "__module__", None)
            return ("builtin", module, getattr(value, "__qualname__", value.__name__))
        return ("method", value.__name__, self.of(owner))

    def _class(self, value: type) -> Any:
        name = _import_path(value)
        if name is not None:
            return ("class", *name)
        attrs = {k: v for k, v in vars(value).items() if not k.startswith("__") or callable(v)}
        attrs.pop("_abc_impl", None)
        return ("class", value.__qualname__, self._nested(value, lambda: (value.__bases__, attrs)))

    def _descriptor(self, value: Any) -> Any:
        return ("descriptor", value.__objclass__.__qualname__, value.__name__)

    def _module(self, value: types.ModuleType) -> Any:
        return ("module", value.__name__)

    def _partial(self, value: functools.partial) -> Any:
        return ("partial", *map(self.of, (value.func, value.args, value.keywords)))

    def _lock(self, value: Any) -> Any:
        return "lock"

    def _object(self, value: Any) -> Any:
        return self._nested(value, lambda: self._parts(value))

    def _parts(self, value: Any) -> Any:
        if hasattr(type(value), "__dask_tokenize__"):
            return value.__dask_tokenize__()
        try:
            return _reduce(value)
        except Exception:
            if self.is_titled:
                # A name that the user chose, da.from_array(x, name="tas"), identifies the array.
                return ("titled", f"as {self.layer}")
            kind = type(value)
            self.unnamed[f"an object of {kind.__module__}.{kind.__qualname__}"] = None
            # dask gives each such layer a unique name.
            return ("unnamed", os.getpid(), f"in {self.layer}" if self.layer else id(value))

    def _nested(self, value: Any, parts: Callable[[], Any]) -> Any:
        """Return the form of an object's parts, or its depth where it contains itself."""
        if id(value) in self._within:
            return ("again", list(self._within).index(id(value)))
        self._within[id(value)] = value
        try:
            return self.of(parts())
        finally:
            del self._within[id(value)]


def _are_strings(value: np.ndarray) -> bool:
    return all(isinstance(part, str) for part in value.flat)


def _iter_bytes(value: np.ndarray) -> Iterator[Any]:
    """Iterate over the bytes of an array, in batches, which bounds the memory of copies."""
    flat = value.reshape(-1)
    for start in range(0, flat.size, _HASHING_SIZE):
        yield np.ascontiguousarray(flat[start : start + _HASHING_SIZE]).view(np.uint8).data


def _import_path(value: Any) -> tuple[str, str] | None:
    """Return the module and qualified name of an installed function or class, else None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    current = sys.modules.get(module or "")
    if module is None or current is None or not _is_installed(module):
        return None
    for part in name.split("."):
        current = getattr(current, part, None)
    if current is not value:
        return None
    return (_PACKAGE if module.startswith(f"{_PACKAGE}.") else module), name


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str) -> bool:
    """Return whether a module is of an installed library, and not the user's own code."""
    root = module.partition(".")[0]
    files = (getattr(sys.modules.get(name), "__file__", None) for name in (module, root))
    file = next(filter(None, files), None)
    if file is None:
        return root in sys.stdlib_module_names
    return any(map(Path(file).resolve().is_relative_to, _LIBRARIES))


@functools.lru_cache(maxsize=4096)
def _code_form(code: types.CodeType) -> Any:
    """Return the form of a function's code, without its file and line numbers."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
    return (form_digest((code.co_code, _constant_form(code.co_consts), names)),)


def _constant_form(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code_form(value)
    if isinstance(value, frozenset):
        return ("set", *sorted(map(_constant_form, value), key=repr))
    if isinstance(value, tuple):
        return tuple(map(_constant_form, value))
    return value


def _find_references(function: types.FunctionType) -> dict[str, Any]:
    """Return the closure variables and globals that a function's code refers to, by name."""
    scope, free = dict(function.__globals__), function.__code__.co_freevars
    for name, cell in zip(free, function.__closure__ or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:
            scope[name] = "not set yet"
    chains = {*_iter_chains(function.__code__), *((name,) for name in free)}
    return dict(_look_up(chain, scope) for chain in chains if chain[0] in scope)


def _look_up(chain: tuple[str, ...], scope: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and value of ``a.b.c``, followed only through modules not installed."""
    value, count = scope[chain[0]], 1
    for name in chain[1:]:
        is_user_module = isinstance(value, types.ModuleType) and not _is_installed(value.__name__)
        if not is_user_module or not hasattr(value, name):
            break
        value, count = getattr(value, name), count + 1
    return ".".join(chain[:count]), value


def _iter_chains(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """Iterate over the global and free names that code reads, each with its attribute accesses."""
    chain: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if chain and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, instruction.argval)
            continue
        if chain:
            yield chain
        is_name = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
        chain = (instruction.argval,) if is_name else ()
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _iter_chains(inner)


def _reduce(value: Any) -> Any:
    """Return what an object would be pickled as: a function, its arguments, and the state."""
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        # A function that wraps another, as functools.cache returns, is identified by both.
        return "global", type(value).__module__, reduced, getattr(value, "__wrapped__", None)
    function, args, state, items, pairs = (*reduced, None, None, None)[:5]
    return function, args, state, None if items is None else [*items], dict(pairs or ())


def _is_lock(kind: type) -> bool:
    return all(hasattr(kind, name) for name in ("acquire", "release", "__enter__"))


def _is_in_file(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    return (root, kind.__name__) in (("h5py", "Dataset"), ("netCDF4", "Variable"))


def _is_zarr(kind: type) -> bool:
    return kind.__module__.startswith("zarr.") and kind.__name__ == "Array"


_RULES: tuple[tuple[Any, Callable[[CanonicalForms, Any], Any]], ...] = (
    (Task, CanonicalForms._task),
    (TaskRef, lambda forms, value: forms.of(value.key)),
    (Alias, lambda forms, value: ("alias", forms.of(value.target))),
    (DataNode, lambda forms, value: forms.of(value.value)),
    (Array, lambda forms, value: forms.array(value)),
    (np.ndarray, CanonicalForms._numbers),
    (np.generic, CanonicalForms._scalar),
    (np.dtype, CanonicalForms._dtype),
    (np.random.SeedSequence, CanonicalForms._seed),
    (np.random.RandomState, CanonicalForms._random_state),
    (pd.Index, CanonicalForms._index),
    (_WRAPPERS, CanonicalForms._inside),
    (indexing.PandasIndexingAdapter, lambda forms, value: forms._numbers(np.asarray(value))),
    (CachingFileManager, CanonicalForms._file),
    (xr.Variable, CanonicalForms._variable),
    ((xr.DataArray, xr.Dataset), CanonicalForms._labelled),
    (functools.partial, CanonicalForms._partial),
    (types.FunctionType, CanonicalForms._function),
    (types.MethodType, CanonicalForms._method),
    ((types.BuiltinFunctionType, types.MethodWrapperType, np.ufunc), CanonicalForms._builtin),
    (types.ModuleType, CanonicalForms._module),
    ((staticmethod, classmethod), lambda forms, value: forms.of(value.__func__)),
    (property, lambda forms, value: forms.of((value.fget, value.fset, value.fdel))),
    (_DESCRIPTORS, CanonicalForms._descriptor),
    (type, CanonicalForms._class),
    ((slice, range), CanonicalForms._slice),
    ((set, frozenset), CanonicalForms._set),
    ((dict, types.MappingProxyType), CanonicalForms._mapping),
    ((tuple, list), CanonicalForms._sequence),
)


@functools.lru_cache(maxsize=1024)
def _find_rule(kind: Any) -> Callable[[CanonicalForms, Any], Any]:
    """Return the function that converts values of a type to a canonical form."""
    for kinds, rule in _RULES:
        if issubclass(kind, kinds):
            return rule
    if _is_zarr(kind):
        return CanonicalForms._zarr
    if _is_in_file(kind):
        return CanonicalForms._in_file
    return CanonicalForms._lock if _is_lock(kind) else CanonicalForms._object
