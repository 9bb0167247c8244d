"""Name data by digests that are equal in every process, whatever names dask gives its tasks."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dask.array import Array
from dask.blockwise import Blockwise
from dask.core import toposort

from xr_aimz.storage.canonical import CanonicalForms, form_digest

# Prefixes of layers that this package names by what they compute, and of those in a saved fit.
_COMPUTED, _SAVED = "aimz-", "aimz-kept-"
_TOKEN = re.compile(r"-?([0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$")
_INT = frozenset({int})
_PREFIX = re.compile(r"^(original-)?(xarray-|open_dataset-)?")


@dataclass(frozen=True)
class Identity:
    """Digest of data, with the origins of the data.

    Parameters
    ----------
    digest : str
        Equal in every process for the same data; where something is ``unnamed``, in this process
        only.
    origins : mapping of str to str
        Source data in words, each with a digest, or the size and time of a file.
    unnamed : tuple of str
        Parts without a lasting name, in words: a generator, an open file, a seed that NumPy chose.
    """

    digest: str
    origins: Mapping[str, str]
    unnamed: tuple[str, ...]


def identify(*values: Any) -> Identity:
    """Identify values by a digest that is equal in this process and in any other.

    Parameters
    ----------
    *values
        Plain values; objects of NumPy, pandas, xarray and dask; functions; containers of them.

    Examples
    --------
    >>> import xarray as xr
    >>> x = xr.Variable("x", [1.0, 2.0, 3.0])
    >>> identify(x) == identify(x.copy())
    True
    >>> lazy = [x.chunk(x=2, name=name).data for name in ("one", "another")]
    >>> identify(lazy[0]).digest == identify(lazy[1]).digest
    True
    """
    graphs = _Graphs()
    form = graphs.of(values)
    origins = {name: _join_facts(facts) for name, facts in sorted(graphs.origins.items())}
    return Identity(form_digest(form), origins, tuple(graphs.unnamed))


def name_by_content(name: str, *values: Any) -> str:
    """Return a name for a dask array that is computed from these values: ``aimz-name-digest``."""
    return f"{_COMPUTED}{name}-{identify(*values).digest}"


def lazy_name(array: Array) -> str:
    """Return the digest of a dask array; for an array of a saved fit, the digest in its name."""
    if array.name.startswith(_SAVED):
        return array.name.removeprefix(_SAVED)
    return identify(array).digest


def saved_name(name: str) -> str:
    """Return the name of a dask array whose :func:`lazy_name` is ``name``."""
    return _SAVED + name


def _join_facts(facts: set[str]) -> str:
    return next(iter(facts)) if len(facts) == 1 else form_digest(sorted(facts))


@dataclass(frozen=True)
class _Layer:
    """Replacements for the names of a layer's tasks, with its origins and unnamed parts."""

    names: Mapping[str, str]
    origins: Mapping[str, set[str]]
    unnamed: Mapping[str, None]


# By the address of a layer, while it lives. Arrays share their layers; and the values that a
# function refers to may change between two calls, while its layer is the same.
_layers: dict[int, tuple[weakref.ref, _Layer]] = {}


def _drop_layer(address: int, _: Any) -> None:
    _layers.pop(address, None)


class _Graphs(CanonicalForms):
    """Converter of values to canonical forms, dask arrays included."""

    def array(self, array: Array) -> Any:
        if array.name.startswith(_SAVED):
            return "dask", lazy_name(array)
        graph, outer = array.dask, (self.names, self.layer, self.is_titled)
        self.names = {}
        for name in toposort(graph.layers, dependencies=graph.dependencies):
            self._add(name, graph.layers[name], not graph.dependencies[name])
        form = ("dask", str(array.dtype), array.chunks, self.of(array.name))
        self.names, self.layer, self.is_titled = outer
        return form

    def _add(self, name: str, layer: Any, is_leaf: bool) -> None:
        cached = _layers.get(id(layer))
        if cached is None or cached[0]() is not layer:
            forget = partial(_drop_layer, id(layer))
            result = self._describe_layer(name, layer, is_leaf)
            cached = _layers[id(layer)] = weakref.ref(layer, forget), result
        self.names |= cached[1].names
        self.unnamed |= cached[1].unnamed
        for origin, facts in cached[1].origins.items():
            self.origins.setdefault(origin, set()).update(facts)

    def _describe_layer(self, name: str, layer: Any, is_leaf: bool) -> _Layer:
        outer, self.origins, self.unnamed = (self.origins, self.unnamed), {}, {}
        self.layer, self.is_titled = name, _TOKEN.search(name) is None
        if name.startswith(_COMPUTED):
            names = {name: name}
            self._note_own(name, layer)
        elif isinstance(layer, Blockwise):
            names = {name: form_digest(self._blockwise(layer))}
        else:
            names = self._tasks(name, layer)
            if is_leaf and not self.origins:
                what = _PREFIX.sub("", _TOKEN.sub("", name))
                self.note(f"data {what!r}", form_digest(sorted(names.values())))
        result = _Layer(names, self.origins, self.unnamed)
        self.origins, self.unnamed = outer
        return result

    def _note_own(self, name: str, layer: Mapping[Any, Any]) -> None:
        """Note the origins of a prediction of this package."""
        # In a layer of tasks, the one node that holds what all tasks share.
        shared = getattr(layer.get(name.replace("-block-", "-task-", 1)), "value", None)
        for origin, fact in getattr(shared, "origins", {}).items():
            self.note(origin, fact)

    def _blockwise(self, layer: Blockwise) -> Any:
        """Return the form of a blockwise layer: its one task, with blockwise inputs numbered."""
        named = [key for key, _ in layer.indices if isinstance(key, str)]
        outer, parts = self.names, [key for key in named if key in layer.io_deps]
        self.names = outer | {key: f"part {i}" for i, key in enumerate(parts)}
        blocks = layer.output_blocks
        form = (
            self.of(layer.task),
            layer.output_indices,
            [(self.of(key), index) for key, index in layer.indices],
            self.of(dict(layer.numblocks)),
            layer.concatenate,
            self.of(dict(layer.new_axes)),
            None if blocks is None else sorted(blocks),
            [self.of(layer.io_deps[key]) for key in parts],
        )
        self.names = outer
        return form

    def _tasks(self, name: str, layer: Mapping[Any, Any]) -> dict[str, str]:
        """Return replacements for a layer's names, from its tasks with these names numbered."""
        outer, tasks = self.names, dict.fromkeys(_get_name(key) for key in layer)
        numbers = {n: i for i, n in enumerate(sorted(tasks, key=lambda n: _TOKEN.sub("", n)))}
        self.names = outer | {n: f"own {i}" for n, i in numbers.items()}
        result = hashlib.sha256()
        for position, key in sorted((_sort_key(key, numbers), key) for key in layer):
            result.update(repr((position, self.of(layer[key]))).encode())
        self.names = outer
        form = result.hexdigest()[:32]
        return {n: form if n == name else f"{form} {i}" for n, i in numbers.items()}


def _get_name(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _sort_key(key: Any, numbers: Mapping[str, int]) -> tuple[int, str, tuple[Any, ...]]:
    """Return the number of a task's name and its index, in a form that can be sorted."""
    if not isinstance(key, tuple):
        return numbers[_get_name(key)], "", ()
    index = key[1:]
    if _INT.issuperset(map(type, index)):
        return numbers[_get_name(key)], "", index
    return numbers[_get_name(key)], "text", tuple(map(repr, index))
