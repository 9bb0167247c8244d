"""Values in a canonical form: equal in two processes where they mean the same.

A form is made of nested tuples of plain Python values, whose ``repr`` is hashed. Addresses,
hash order, locks and the identifiers of open files are left out. Functions go by their code
and, outside of installed libraries, by what it refers to; other objects by what they would be
pickled as, part by part.
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

__all__ = ["Words", "digest"]

_PLAIN = frozenset((int, float, complex, bytes, bool, type(None), type(Ellipsis)))
_PIECE = 2**24
# What xarray puts around an array changes no value of it.
_AROUND = (
    indexing.ImplicitToExplicitIndexingAdapter,
    indexing.CopyOnWriteArray,
    indexing.MemoryCachedArray,
    indexing.NumpyIndexingAdapter,
    indexing.DaskIndexingAdapter,
)
# Folders of installed code, which changes with its version alone; and this package's own.
_INSTALLED = tuple(
    Path(str(folder)).resolve()
    for folder in (
        *(sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
        Path(__file__).parent,
    )
)
_DESCRIPTORS = (
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)
_OURS = __name__.partition(".")[0]
# NumPy chooses 128 bits where it is given no seed; a person gives fewer.
_CHOSEN = 64


def digest(form: Any) -> str:
    """128 bits of a canonical form, in hexadecimal digits."""
    return hashlib.sha256(repr(form).encode()).hexdigest()[:32]


class Words:
    """Makes canonical forms, and notes where data are read from and what has no name.

    Attributes
    ----------
    names : dict of str to str
        What stands for the names of dask's tasks.
    origins : dict of str to set of str
        Facts about the files and arrays that were met.
    unnamed : dict of str to None
        In words, what was met that has no canonical form; an ordered set.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.origins: dict[str, set[str]] = {}
        self.unnamed: dict[str, None] = {}
        # The layer of a graph that is being looked at, and whether a person has named it.
        self.layer, self.is_titled = "", False
        self._within: dict[int, Any] = {}
        self._functions: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        """The canonical form of a value."""
        kind: Any = type(value)
        if kind is str:
            return ("key", self.names[value]) if value in self.names else value
        if kind in _PLAIN:
            return value
        return _rule(kind)(self, value)

    def array(self, array: Array) -> Any:
        """The canonical form of a dask array."""
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
            # However long they may be: a file and a list have other dtypes for the same strings.
            return ("strings", value.shape, digest(value.ravel().tolist()))
        if dtype.kind == "O":
            return ("objects", value.shape, *map(self.of, value.ravel().tolist()))
        found = hashlib.sha256()
        for part in _pieces(value):
            found.update(part)
        return ("array", dtype.str, value.shape, found.hexdigest())

    def _scalar(self, value: np.generic) -> Any:
        return ("scalar", value.dtype.str, value.tobytes())

    def _dtype(self, value: np.dtype) -> Any:
        return ("dtype", str(value), value.str)

    def _index(self, value: pd.Index) -> Any:
        return self._numbers(value.to_numpy())

    def _variable(self, value: xr.Variable) -> Any:
        held = value._data
        lazy = value.chunks is not None or not value._in_memory
        return ("variable", value.dims, self.of(held) if lazy else self._numbers(value.values))

    def _labelled(self, value: xr.DataArray | xr.Dataset) -> Any:
        whole = value if isinstance(value, xr.Dataset) else value._to_temp_dataset()
        return ("dataset", self._mapping(dict(whole.variables)))

    def _task(self, value: Task) -> Any:
        held = self._functions.get(id(value.func))
        if held is None:
            # A layer has one function for all of its tasks.
            held = self._functions[id(value.func)] = value.func, self.of(value.func)
        kwargs = self._mapping(value.kwargs) if value.kwargs else ()
        return ("task", held[1], self._sequence(value.args), kwargs)

    def _inside(self, value: Any) -> Any:
        return self.of(value.array)

    def _file(self, value: CachingFileManager) -> Any:
        args = [self._path(a) if isinstance(a, str | os.PathLike) else a for a in value._args]
        return ("file", *map(self.of, (value._opener, args, value._mode, value._kwargs)))

    def _path(self, value: str | os.PathLike) -> Any:
        from xr_aimz.origins import file_facts  # which imports Zarr

        path, facts = file_facts(value)
        self.note(f"the file {path!r}", facts)
        return path, facts

    def _zarr(self, value: Any) -> Any:
        from xr_aimz.origins import zarr_facts

        where, facts = zarr_facts(value)
        self.note(f"the Zarr array {where!r}", facts)
        return "zarr", where, facts

    def _in_file(self, value: Any) -> Any:
        """An array of h5py or netCDF4, which dask reads from an open file."""
        if hasattr(value, "group"):
            group = value.group()
            return ("in a file", self._path(group.filepath()), group.path, value.name)
        return ("in a file", self._path(value.file.filename), value.name)

    def _seed(self, value: np.random.SeedSequence) -> Any:
        entropy = value.entropy
        if isinstance(entropy, int) and entropy.bit_length() > _CHOSEN:
            self.unnamed["random numbers without a seed"] = None
        return ("seed", self.of(entropy), value.spawn_key, value.pool_size)

    def _random_state(self, value: np.random.RandomState) -> Any:
        # NumPy's own hangs on every distribution of SciPy's, and moves with whoever draws from it.
        if value is np.random.mtrand._rand:
            return "the random state of NumPy"
        return ("random state", self.of(value.get_state()))

    def _function(self, value: types.FunctionType) -> Any:
        name = _place(value)
        code = _code(value.__code__)
        settings = self._nested(value, lambda: (value.__defaults__, value.__kwdefaults__))
        if name is not None and name[0] == _OURS:
            # Where it stands and how it is written may change from release to release.
            return ("function", *name, settings)
        if name is not None:
            return ("function", *name, code, settings)
        # Of a script, a notebook or another function: what it refers to can change with it.
        return ("function", code, settings, self._nested(value, lambda: _referred(value)))

    def _method(self, value: types.MethodType) -> Any:
        return ("method", self.of(value.__func__), self.of(value.__self__))

    def _builtin(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType):
            module = getattr(value, "__module__", None)
            return ("builtin", module, getattr(value, "__qualname__", value.__name__))
        return ("method", value.__name__, self.of(owner))

    def _class(self, value: type) -> Any:
        name = _place(value)
        if name is not None:
            return ("class", *name)
        own = {k: v for k, v in vars(value).items() if not k.startswith("__") or callable(v)}
        own.pop("_abc_impl", None)
        return ("class", value.__qualname__, self._nested(value, lambda: (value.__bases__, own)))

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
            return _pickled(value)
        except Exception:
            if self.is_titled:
                # Who named an array, da.from_array(x, name="tas"), has said what it is.
                return ("titled", f"as {self.layer}")
            kind = type(value)
            self.unnamed[f"an object of {kind.__module__}.{kind.__qualname__}"] = None
            # dask gives each such layer a name of its own, which no other layer has.
            return ("unnamed", os.getpid(), f"in {self.layer}" if self.layer else id(value))

    def _nested(self, value: Any, parts: Callable[[], Any]) -> Any:
        """The form of an object's parts; where it is one of its own, its depth."""
        if id(value) in self._within:
            return ("again", list(self._within).index(id(value)))
        self._within[id(value)] = value
        try:
            return self.of(parts())
        finally:
            del self._within[id(value)]


def _are_strings(value: np.ndarray) -> bool:
    return all(isinstance(part, str) for part in value.flat)


def _pieces(value: np.ndarray) -> Iterator[Any]:
    """The bytes of an array, so many at a time where they have to be copied."""
    flat = value.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield np.ascontiguousarray(flat[start : start + _PIECE]).view(np.uint8).data


def _place(value: Any) -> tuple[str, str] | None:
    """The module and name of a function or class that is installed."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found = sys.modules.get(module or "")
    if module is None or found is None or not _is_installed(module):
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return None
    return (_OURS if module.startswith(f"{_OURS}.") else module), name


@functools.lru_cache(maxsize=4096)
def _is_installed(module: str) -> bool:
    """Whether a module is of a library, and no script, notebook or module of a person's own."""
    root = module.partition(".")[0]
    files = (getattr(sys.modules.get(name), "__file__", None) for name in (module, root))
    file = next(filter(None, files), None)
    if file is None:
        return root in sys.stdlib_module_names
    return any(map(Path(file).resolve().is_relative_to, _INSTALLED))


@functools.lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> Any:
    """What a function's code does, less where it was written."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
    return (digest((code.co_code, _constant(code.co_consts), names)),)


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, frozenset):
        return ("set", *sorted(map(_constant, value), key=repr))
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    return value


def _referred(function: types.FunctionType) -> dict[str, Any]:
    """The values that a function's code refers to: of its closure, and globals by name."""
    scope, free = dict(function.__globals__), function.__code__.co_freevars
    for name, cell in zip(free, function.__closure__ or (), strict=True):
        try:
            scope[name] = cell.cell_contents
        except ValueError:
            scope[name] = "not set yet"
    chains = {*_chains(function.__code__), *((name,) for name in free)}
    return dict(_looked_up(chain, scope) for chain in chains if chain[0] in scope)


def _looked_up(chain: tuple[str, ...], scope: Mapping[str, Any]) -> tuple[str, Any]:
    """The value of ``a.b.c`` as far as it leads through modules that are not installed."""
    value, passed = scope[chain[0]], 1
    for name in chain[1:]:
        is_own = isinstance(value, types.ModuleType) and not _is_installed(value.__name__)
        if not is_own or not hasattr(value, name):
            break
        value, passed = getattr(value, name), passed + 1
    return ".".join(chain[:passed]), value


def _chains(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The names from outside that code reads, with the attributes that it takes of each."""
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
            yield from _chains(inner)


def _pickled(value: Any) -> Any:
    """What an object would be pickled as: a function and its arguments, and its state."""
    made = value.__reduce_ex__(4)
    if isinstance(made, str):
        # A function around another, as functools.cache makes it, goes by that one too.
        return "global", type(value).__module__, made, getattr(value, "__wrapped__", None)
    make, args, state, items, pairs = (*made, None, None, None)[:5]
    return make, args, state, None if items is None else [*items], dict(pairs or ())


def _is_lock(kind: type) -> bool:
    return all(hasattr(kind, name) for name in ("acquire", "release", "__enter__"))


def _is_in_file(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    return (root, kind.__name__) in (("h5py", "Dataset"), ("netCDF4", "Variable"))


def _is_zarr(kind: type) -> bool:
    return kind.__module__.startswith("zarr.") and kind.__name__ == "Array"


_RULES: tuple[tuple[Any, Callable[[Words, Any], Any]], ...] = (
    (Task, Words._task),
    (TaskRef, lambda words, value: words.of(value.key)),
    (Alias, lambda words, value: ("alias", words.of(value.target))),
    (DataNode, lambda words, value: words.of(value.value)),
    (Array, lambda words, value: words.array(value)),
    (np.ndarray, Words._numbers),
    (np.generic, Words._scalar),
    (np.dtype, Words._dtype),
    (np.random.SeedSequence, Words._seed),
    (np.random.RandomState, Words._random_state),
    (pd.Index, Words._index),
    (_AROUND, Words._inside),
    (indexing.PandasIndexingAdapter, lambda words, value: words._numbers(np.asarray(value))),
    (CachingFileManager, Words._file),
    (xr.Variable, Words._variable),
    ((xr.DataArray, xr.Dataset), Words._labelled),
    (functools.partial, Words._partial),
    (types.FunctionType, Words._function),
    (types.MethodType, Words._method),
    ((types.BuiltinFunctionType, types.MethodWrapperType, np.ufunc), Words._builtin),
    (types.ModuleType, Words._module),
    ((staticmethod, classmethod), lambda words, value: words.of(value.__func__)),
    (property, lambda words, value: words.of((value.fget, value.fset, value.fdel))),
    (_DESCRIPTORS, Words._descriptor),
    (type, Words._class),
    ((slice, range), Words._slice),
    ((set, frozenset), Words._set),
    ((dict, types.MappingProxyType), Words._mapping),
    ((tuple, list), Words._sequence),
)


@functools.lru_cache(maxsize=1024)
def _rule(kind: Any) -> Callable[[Words, Any], Any]:
    """How values of a type are put into words."""
    for kinds, rule in _RULES:
        if issubclass(kind, kinds):
            return rule
    if _is_zarr(kind):
        return Words._zarr
    if _is_in_file(kind):
        return Words._in_file
    return Words._lock if _is_lock(kind) else Words._object
