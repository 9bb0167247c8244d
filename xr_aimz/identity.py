"""A name for data that is the same in every process, whatever dask calls them.

In memory data go by their content, lazily opened ones by what they are read from
(:mod:`xr_aimz.origins`), and a dask array by what its graph computes from what: the names of
tasks, which may differ from process to process, are left out. Nothing is computed.
"""

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

from xr_aimz.words import Words, digest

__all__ = ["Identity", "identify", "kept_name", "lazy_name", "named_by"]

# Layers that this package has named by what they compute, and those that a store has named.
_OWN, _KEPT = "aimz-", "aimz-kept-"
_TOKEN = re.compile(r"-?([0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$")
_INT = frozenset({int})
_PREFIX = re.compile(r"^(original-)?(xarray-|open_dataset-)?")


@dataclass(frozen=True)
class Identity:
    """What data are known by.

    Parameters
    ----------
    digest : str
        The same in every process for the same data; where something is ``unnamed``, in this
        process alone.
    origins : mapping of str to str
        What they are made from, with a digest, or the size and time of a file.
    unnamed : tuple of str
        In words, what has no name that stays: a generator, an open file, a seed that NumPy chose.
    """

    digest: str
    origins: Mapping[str, str]
    unnamed: tuple[str, ...]


def identify(*values: Any) -> Identity:
    """What values are known by, in this process and in any other.

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
    origins = {name: _joined(facts) for name, facts in sorted(graphs.origins.items())}
    return Identity(digest(form), origins, tuple(graphs.unnamed))


def named_by(name: str, *values: Any) -> str:
    """A name for a dask array that is computed from these values: ``aimz-name-digest``."""
    return f"{_OWN}{name}-{identify(*values).digest}"


def lazy_name(array: Array) -> str:
    """What the values of a dask array are known by; of one that a store kept, what it says."""
    if array.name.startswith(_KEPT):
        return array.name.removeprefix(_KEPT)
    return identify(array).digest


def kept_name(name: str) -> str:
    """The name of a dask array whose :func:`lazy_name` is ``name``."""
    return _KEPT + name


def _joined(facts: set[str]) -> str:
    return next(iter(facts)) if len(facts) == 1 else digest(sorted(facts))


@dataclass(frozen=True)
class _Layer:
    """What stands for the names of a layer's tasks, and what was met in it."""

    names: Mapping[str, str]
    origins: Mapping[str, set[str]]
    unnamed: Mapping[str, None]


# By the address of a layer, while it lives. Arrays share their layers; and what a function
# refers to may change from one look at it to the next, where its layer is the same.
_layers: dict[int, tuple[weakref.ref, _Layer]] = {}


def _forget(at: int, _: Any) -> None:
    _layers.pop(at, None)


class _Graphs(Words):
    """Canonical forms of dask arrays too."""

    def array(self, array: Array) -> Any:
        if array.name.startswith(_KEPT):
            return "dask", lazy_name(array)
        graph, outer = array.dask, (self.names, self.layer, self.is_titled)
        self.names = {}
        for name in toposort(graph.layers, dependencies=graph.dependencies):
            self._add(name, graph.layers[name], not graph.dependencies[name])
        form = ("dask", str(array.dtype), array.chunks, self.of(array.name))
        self.names, self.layer, self.is_titled = outer
        return form

    def _add(self, name: str, layer: Any, is_leaf: bool) -> None:
        held = _layers.get(id(layer))
        if held is None or held[0]() is not layer:
            forget = partial(_forget, id(layer))
            found = self._found(name, layer, is_leaf)
            held = _layers[id(layer)] = weakref.ref(layer, forget), found
        self.names |= held[1].names
        self.unnamed |= held[1].unnamed
        for origin, facts in held[1].origins.items():
            self.origins.setdefault(origin, set()).update(facts)

    def _found(self, name: str, layer: Any, is_leaf: bool) -> _Layer:
        outer, self.origins, self.unnamed = (self.origins, self.unnamed), {}, {}
        self.layer, self.is_titled = name, _TOKEN.search(name) is None
        if name.startswith(_OWN):
            names = {name: name}
            self._note_own(name, layer)
        elif isinstance(layer, Blockwise):
            names = {name: digest(self._blockwise(layer))}
        else:
            names = self._tasks(name, layer)
            if is_leaf and not self.origins:
                what = _PREFIX.sub("", _TOKEN.sub("", name))
                self.note(f"data {what!r}", digest(sorted(names.values())))
        found = _Layer(names, self.origins, self.unnamed)
        self.origins, self.unnamed = outer
        return found

    def _note_own(self, name: str, layer: Mapping[Any, Any]) -> None:
        """What a prediction of this package is made from."""
        # Of a task layer the one node that says what all tasks share.
        shared = getattr(layer.get(name.replace("-block-", "-task-", 1)), "value", None)
        for origin, fact in getattr(shared, "origins", {}).items():
            self.note(origin, fact)

    def _blockwise(self, layer: Blockwise) -> Any:
        """One task for all blocks; names of what each block gets a part of of its own."""
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
        """Every task, its layer's own names replaced by numbers."""
        outer, own = self.names, dict.fromkeys(_name_of(key) for key in layer)
        places = {n: i for i, n in enumerate(sorted(own, key=lambda n: _TOKEN.sub("", n)))}
        self.names = outer | {n: f"own {i}" for n, i in places.items()}
        found = hashlib.sha256()
        for place, key in sorted((_place(key, places), key) for key in layer):
            found.update(repr((place, self.of(layer[key]))).encode())
        self.names = outer
        form = found.hexdigest()[:32]
        return {n: form if n == name else f"{form} {i}" for n, i in places.items()}


def _name_of(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _place(key: Any, places: Mapping[str, int]) -> tuple[int, str, tuple[Any, ...]]:
    """The place of a task among all of its layer, in a form that can be sorted."""
    if not isinstance(key, tuple):
        return places[_name_of(key)], "", ()
    rest = key[1:]
    if _INT.issuperset(map(type, rest)):
        return places[_name_of(key)], "", rest
    return places[_name_of(key)], "text", tuple(map(repr, rest))
