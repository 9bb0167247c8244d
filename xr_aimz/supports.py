"""Refuse outcomes with values that their distribution cannot take.

NumPyro gives such a value no density, and a fit ends in "Cannot find valid initial parameters" or
in numbers that mean nothing. Which values a site can take is asked of its distribution: a small
program, cut out of the model's own, evaluates ``fn.support(value)`` on the arrays of a block. A
support that is made from draws or params says nothing of the data and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from xr_aimz import outside_support
from xr_aimz.axes import shape_in_model
from xr_aimz.binding import block_of
from xr_aimz.casting import device_dtype, to_device_dtype
from xr_aimz.device import run, trace
from xr_aimz.errors import DtypeError, SupportError
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Call, Program, reading
from xr_aimz.model import Site
from xr_aimz.requirements import BlockValues

__all__ = [
    "Support",
    "call_structs",
    "find_outcome_supports",
    "find_supports",
    "make_blank",
    "pad_to",
    "resize_structs",
    "structs_of",
]


@dataclass(frozen=True, eq=False)
class Support:
    """A requirement: all values of an outcome lie in the support of its site.

    Parameters
    ----------
    keys : frozenset of str
        Of the arrays that decide: the outcome, and inputs that the bounds are made from.
    what : str
        The outcome in words.
    program : Program
        It returns the site.
    params : mapping of name to pytree
    structs : mapping of key to jax.ShapeDtypeStruct
        Of the arrays that the program takes, for a block of ``sizes``.
    sizes : mapping of dim to int
        To which blocks are padded, so that one compiled program serves all.
    name : str
        Of the traced program.
    words : str
        What the support has, with {} for every bound.
    """

    keys: frozenset[str]
    what: str
    program: Program
    params: Mapping[str, Any]
    structs: Mapping[str, Any]
    sizes: Mapping[str, int]
    name: str
    words: str

    @property
    def site(self) -> str:
        return self.program.returns[0]

    def check(self, values: BlockValues) -> None:
        """Count the cells whose value is outside, and raise an error that names the first.

        Raises
        ------
        SupportError
        """
        outside = self._read(outside_support.mark_outside, values, self.name)
        if not outside.any():
            return
        first = np.unravel_index(int(outside.argmax()), outside.shape)
        dims = self.program.result_dims(self.site)[: outside.ndim]
        value = self._read(outside_support.read_value, values)[first]
        bounds = self._read(outside_support.read_bounds, values)[first].tolist()
        words = self.words.format(*(f"{b:g}" for b in bounds))
        words += "" if np.isfinite(value).all() else ", none of them infinite"
        place = values.place(dims, map(int, first))
        raise SupportError(
            f"{self.what} has values outside of the support of site {self.site!r}, "
            f"{self.program.sites[self.site].distribution}: {words}. They are "
            f"{int(outside.sum())} of {outside.size}, the first {value!s}{place}. Correct them, "
            "make them missing (NaN), or give the site another distribution"
        )

    def at(self, sizes: Mapping[str, int]) -> Support | None:
        """The same requirement for blocks that are padded to other sizes."""
        structs = resize_structs(self.program, self.structs, sizes)
        made = _traced(self.program, structs, self.params, sizes)
        if made is None:
            return None
        return replace(self, structs=structs, sizes=sizes, name=made.name)

    def _read(self, read: Any, values: BlockValues, name: str | None = None) -> np.ndarray:
        """What ``read`` makes of the site, on the cells of a block."""
        factory = partial(_factory, read=read)
        draw, shared = call_structs(self.program, self.structs, self.params, self.sizes)
        block = block_of(self.program.binding, self.sizes)
        if name is None:
            _, _, name = trace(factory(self.program, self.sizes), block, draw, shared)
        arrays = {
            key: pad_to(struct.shape, to_device_dtype(key, values.arrays[key]))
            if key in self.keys
            else make_blank(struct)
            for key, struct in self.structs.items()
        }
        draws = jax.tree.map(
            lambda x: make_blank(jax.ShapeDtypeStruct((1, *x.shape), x.dtype)), draw
        )
        words = jax.tree.map(make_blank, shared["words"])
        found = run(
            name,
            lambda: factory(self.program, self.sizes),
            block,
            draws,
            {"arrays": arrays, "words": words, "params": self.params},
        )[self.site][0]
        lengths = values.sizes
        dims = self.program.result_dims(self.site)[: found.ndim]
        return found[tuple(slice(0, lengths.get(d)) for d in dims)]


def find_outcome_supports(
    program: Program, inputs: Inputs, params: Mapping[str, Any]
) -> tuple[Support, ...]:
    """The requirements on the outcomes that a Dataset has; see :func:`find_supports`."""
    described = {}
    for site in program.sites.values():
        if site.kind == "observed" and _is_given(site, program, inputs.arrays):
            seen = [a for a in program.binding.outcomes if a.name in site.seen]
            names = ", ".join(repr(s.name) for a in seen for s in a.sources)
            described[site.name] = f"variable {names} (argument {seen[0].name!r})"
    return find_supports(program, inputs, params, described)


def find_supports(
    program: Program,
    inputs: Inputs,
    params: Mapping[str, Any],
    described: Mapping[str, str],
) -> tuple[Support, ...]:
    """The requirements on outcomes of a Dataset.

    Parameters
    ----------
    program : Program
        Whose arrays have the outcomes, or values that are given to their sites.
    inputs : Inputs
    params : mapping of name to pytree
    described : mapping of site to str
        The sites to look at, and what their values are in words.

    Returns
    -------
    tuple of Support
        Without the sites whose support is made from draws, and those that have none.

    Raises
    ------
    DtypeError
        Codes of categories that are floats, of which a distribution takes none.
    """
    structs = structs_of(program, inputs)
    found = []
    for site, what in described.items():
        own = replace(program, returns=(site,), worlds=None)
        made = _traced(own, structs, params, inputs.sizes)
        if made is None:
            continue
        if made.takes_ints:
            raise DtypeError(
                f"{what} is a float, and site {site!r}, {program.sites[site].distribution}, takes "
                "its values as ints: .astype(int). Ints have no missing values (NaN): leave their "
                "labels out, ds.dropna(...)"
            )
        if made.keys:
            sizes = inputs.sizes
            found.append(
                Support(made.keys, what, own, params, structs, sizes, made.name, made.words)
            )
    return tuple(found)


def resize_structs(
    program: Program, structs: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array, as a program of a block of other sizes takes it."""
    cut = program.binding.cut_dims
    resized = {}
    for key, struct in structs.items():
        axes = zip(program.dims[key], struct.shape, strict=True)
        shape = tuple(sizes[d] if d in cut else n for d, n in axes)
        resized[key] = jax.ShapeDtypeStruct(shape, struct.dtype)
    return resized


def pad_to(shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Repeat the last entries of an array, up to a shape."""
    spare = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
    return np.pad(array, spare, mode="edge") if array.shape != shape else array


def structs_of(program: Program, inputs: Inputs) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array, as a program of the whole Dataset takes it."""
    cut = program.binding.cut_dims
    return {
        key: jax.ShapeDtypeStruct(
            tuple(inputs.sizes[str(d)] if d in cut else a.sizes[d] for d in a.dims),
            device_dtype(a.dtype),
        )
        for key, a in inputs.arrays.items()
    }


@dataclass(frozen=True)
class _Traced:
    keys: frozenset[str]
    name: str
    words: str
    takes_ints: bool


def _traced(
    program: Program,
    structs: Mapping[str, Any],
    params: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> _Traced | None:
    """What the support of a site is made from; None if that is not arrays alone."""
    notes: dict[str, Any] = {}
    draw, shared = call_structs(program, structs, params, sizes)
    call = reading(program, sizes, partial(outside_support.mark_outside, notes=notes))
    try:
        closed, _, name = trace(call, block_of(program.binding, sizes), draw, shared)
    except Exception:
        # Whatever a model, or a constraint of the caller's own, may raise where it is evaluated
        # for its support alone: nothing can be said of it.
        return None
    _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path((draw, shared))]
    reached = [[p.key for p in path[1:]] for path, read in zip(paths, used, strict=True) if read]
    kinds = {path[0] for path in reached}
    untrained = notes["traced"] and not params and any(s.trained for s in program.sites.values())
    alone = kinds <= {"arrays", "params"} and not untrained
    keys = frozenset(p[1] for p in reached if p[0] == "arrays") if alone else frozenset()
    return _Traced(keys, name, notes["words"], notes["takes_ints"])


def call_structs(
    program: Program,
    arrays: Mapping[str, Any],
    params: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a kernel is called with; every site that the arrays do not give is passed in."""
    word = jax.ShapeDtypeStruct((2,), np.uint32)
    cells = tuple(sizes[d] for d in program.binding.per)
    latents = {
        site.name: jax.ShapeDtypeStruct(
            cells + shape_in_model(site, program.binding, sizes), site.dtype
        )
        for site in program.sites.values()
        if site.kind in ("latent", "observed") and not _is_given(site, program, arrays)
    }
    words = {d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in program.binding.cut_dims}
    shared = {"arrays": dict(arrays), "words": words, "params": dict(params)}
    return {"keys": dict.fromkeys(program.keyed, word), "latents": latents}, shared


def _is_given(site: Site, program: Program, arrays: Mapping[str, Any]) -> bool:
    """Whether a site has its value from the arrays that its outcomes are bound to."""
    outcomes = [a for a in program.binding.arguments if a.outcome and a.name in site.seen]
    return bool(outcomes) and all(s.key in arrays for a in outcomes for s in a.sources)


def make_blank(struct: Any) -> np.ndarray:
    """Zeros that take no room."""
    return np.broadcast_to(np.zeros((), struct.dtype), struct.shape)


def _factory(program: Program, sizes: Mapping[str, int], read: Any) -> Call:
    return reading(program, sizes, read)
