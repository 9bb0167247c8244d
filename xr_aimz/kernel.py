"""One posterior draw through one block: pure functions from arrays to arrays.

A :class:`Program` is all that is static: the model, its binding and its sites. What
changes from block to block (arrays, the words of the labels) and from draw to draw (the
words of chain and draw, the latents) is passed in. Sites that the posterior holds are
substituted; all others are drawn by :mod:`xr_aimz.keys`, so that a value depends on its
labels and on nothing else of the block. A site that is given in some cells only has its
other cells drawn. With dims in ``per`` this is the kernel of one cell, mapped over those of
the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from xr_aimz import keys
from xr_aimz.axes import (
    TABLE,
    broadcast_in_model,
    dims_in_dataset,
    shape_in_dataset,
    shape_in_model,
)
from xr_aimz.binding import Binding, arrange, block_of
from xr_aimz.blanks import blank
from xr_aimz.errors import AimzError, ModelError, RandomnessError
from xr_aimz.mapped import over_cells
from xr_aimz.model import Block, Site, locate
from xr_aimz.scans import Forwards, step_key
from xr_aimz.worlds import Forced, Worlds, across, dims_replaced, settings

__all__ = [
    "CONDITION",
    "KNOWN",
    "Dims",
    "Program",
    "distributions",
    "log_likelihood",
    "predictive",
    "reading",
]

# A call has `draw`: {"keys": {site: uint32 (2,)}, "latents": {site: array}}
# and `shared`: {"arrays": {source: array}, "words": {dim: uint32 (n, 2)},
# "params": {site: pytree}}.
# NumPyro's own key feeds only what has no address: numpyro.prng_key() in a network.
_LOOSE = "numpyro.prng_key"
Dims = tuple[str | None, ...]
Addresses = Mapping[str | None, jax.Array]
Call = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]
# Before a site's name in "arrays": its given value, and in which cells it is known. No source
# has such a key, for an argument's name has no blank. Without the first the draws of the
# posterior are the value, without the second it is known everywhere.
CONDITION, KNOWN = "condition ", "known "


@dataclass(frozen=True)
class Program:
    """Everything about a kernel that does not change from block to block.

    Parameters
    ----------
    model : callable
    binding : Binding
    sites : mapping of name to Site
    dims : mapping of source name to tuple of str
        The dims of each array that a block passes in.
    returns : tuple of str
        The sites whose values are wanted.
    worlds : Worlds, optional
        Interventions under which the model is run, side by side.
    """

    model: Callable
    binding: Binding
    sites: Mapping[str, Site]
    dims: Mapping[str, tuple[str, ...]]
    returns: tuple[str, ...]
    worlds: Worlds | None = None

    @property
    def leading(self) -> tuple[str, ...]:
        """Dims that come before those of the sites: those of the scenarios."""
        return () if self.worlds is None else tuple(self.worlds.dims)

    def result_dims(self, name: str) -> tuple[str, ...]:
        """The dims of a site's result after chain and draw, as a block has them."""
        own, cells = dims_in_dataset(self.sites[name], self.binding), len(self.binding.per)
        return (*own[:cells], *self.leading, *own[cells:])

    @property
    def keyed(self) -> tuple[str, ...]:
        """The sites that need a key for each draw."""
        return (*(n for n, s in self.sites.items() if s.kind in ("latent", "observed")), _LOOSE)


def predictive(program: Program, sizes: Mapping[str, int]) -> Call:
    """The values of ``program.returns`` for one draw of the posterior, on one block."""
    return _call(program, sizes, lambda site, message: (site.dims, message["value"]))


def log_likelihood(program: Program, sizes: Mapping[str, int]) -> Call:
    """The log density of each observation for one draw, event dims summed."""

    def density(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
        return site.dims[: site.batch_ndim], message["fn"].log_prob(message["value"])

    return _call(program, sizes, density)


def distributions(program: Program, sizes: Mapping[str, int]) -> Callable[..., dict[str, Any]]:
    """The distribution of each of ``program.returns``, or a deterministic's value."""
    block = block_of(program.binding, sizes)

    def call(draw: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        trace = _run(program, block, draw, shared)
        own = {name: trace[name] for name in program.returns}
        return {n: m["fn"] if m["type"] == "sample" else m["value"] for n, m in own.items()}

    return call


def reading(
    program: Program,
    sizes: Mapping[str, int],
    read: Callable[[Site, Mapping[str, Any]], tuple[Dims, Any]],
) -> Call:
    """What ``read`` makes of each of ``program.returns``, its dims and its value.

    It is passed the site and its message, in which ``given`` has the values that were given to
    the site and the mask of their cells, or is None.
    """
    return _call(program, sizes, read)


def _call(
    program: Program,
    sizes: Mapping[str, int],
    read: Callable[[Site, Mapping[str, Any]], tuple[Dims, Any]],
) -> Call:
    """Run the model for one draw, and read something of each returned site."""
    block = block_of(program.binding, sizes)
    per, dims = program.binding.per, program.dims
    own = {key: tuple(d for d in has if d not in per) for key, has in dims.items()}
    program = replace(program, dims=own)

    def values(
        program: Program, draw: Mapping[str, Any], shared: Mapping[str, Any], now: Any = None
    ) -> dict[str, jax.Array]:
        trace = _run(program, block, draw, shared, now)
        given = _given(program, block, draw, shared)
        told = _told(program, given, now)
        passed = arrange(program.binding, shared["arrays"], program.dims, block)
        found = {}
        for name in program.returns:
            site = program.sites[name]
            dims, value = read(site, {**trace[name], "given": given.get(name)})
            value = blank(
                program.binding, site, dims, jnp.asarray(value), passed, told.get(name, False)
            )
            found[name] = _out(program, site, dims, value, sizes)
        return found

    call: Call = partial(values, program)
    if program.worlds is not None:
        call = partial(_in_worlds, program, program.worlds, values, sizes)
    return over_cells(call, per, dims) if per else call


def _in_worlds(
    program: Program,
    worlds: Worlds,
    values: Callable[..., dict[str, jax.Array]],
    sizes: Mapping[str, int],
    draw: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """The values of every world, and of those the contrasts."""
    binding, arrays = program.binding, shared["arrays"]
    here = replace(program, dims=dims_replaced(worlds, binding, program.dims))

    def one(now: Any) -> dict[str, jax.Array]:
        seen = {**shared, "arrays": {**arrays, **now["arrays"]}}
        return values(here, draw, seen, now)

    now = settings(worlds, program.sites, binding, program.dims, arrays, sizes)
    return across(worlds, one, now)


def _run(
    program: Program,
    block: Block,
    draw: Mapping[str, Any],
    shared: Mapping[str, Any],
    now: Any = None,
) -> Mapping[str, Any]:
    passed = arrange(program.binding, shared["arrays"], program.dims, block)
    known = dict(shared["params"])
    given = _given(program, block, draw, shared)
    for name, value in draw["latents"].items():
        if name in given:
            continue
        shape = shape_in_model(program.sites[name], program.binding, block.sizes)
        known[name] = jnp.reshape(value, shape)
    loose = jax.random.wrap_key_data(draw["keys"][_LOOSE], impl="threefry2x32")
    model = handlers.substitute(handlers.seed(program.model, loose), data=known)
    drawer = _drawer(program, shared["words"], draw["keys"], given)
    drawn = handlers.substitute(model, substitute_fn=drawer)
    if any(program.sites[name].scanned for name in given):
        drawn = Forwards(drawn)
    if program.worlds is not None and now is not None:
        drawn = Forced(drawn, program.worlds, now)
    tracer = handlers.trace(drawn)
    try:
        trace = tracer.get_trace(**passed)
    except Exception as error:
        if not isinstance(error, AimzError):
            error.add_note(f"xr_aimz: {locate(tracer.trace, passed)}")
        raise
    _check_trace(program, trace, known)
    return trace


def _given(
    program: Program, block: Block, draw: Mapping[str, Any], shared: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Of each site that is given in some cells: its values, and which cells are given."""
    arrays, found = shared["arrays"], {}
    for name, site in program.sites.items():

        def laid(key: str, site: Site = site) -> Any:
            dims, array = program.dims[key], arrays[key]
            return broadcast_in_model(array, dims, site, program.binding, block.sizes)

        mask = laid(KNOWN + name) if KNOWN + name in arrays else True
        if CONDITION + name in arrays:
            found[name] = (laid(CONDITION + name), mask)
        elif mask is not True:
            shape = shape_in_model(site, program.binding, block.sizes)
            found[name] = (jnp.reshape(draw["latents"][name], shape), mask)
    return found


def _told(program: Program, given: Mapping[str, tuple[Any, Any]], now: Any) -> dict[str, Any]:
    """In which cells the value of a site is one that was given or set."""
    found = {name: mask for name, (_, mask) in given.items()}
    if program.worlds is not None and now is not None:
        for change in program.worlds.sites:
            _, here, _ = now["sites"][change.target]
            found[change.target] = here | found.get(change.target, False)
    return found


def _drawer(
    program: Program,
    words: Mapping[str, jax.Array],
    site_keys: Mapping[str, jax.Array],
    given: Mapping[str, tuple[Any, Any]],
) -> Callable[[Mapping[str, Any]], jax.Array | None]:
    """A substitution that draws whatever the posterior does not hold, by label."""
    table: dict[str | None, jax.Array] = {}
    if program.binding.layout == "table":
        cells = keys.combine([words[d] for d in program.binding.dims])
        table[TABLE] = jnp.reshape(cells, (-1, 2))
    addresses: Addresses = {**table, **dict(words.items())}

    def draw(message: Mapping[str, Any]) -> jax.Array | None:
        if message["type"] != "sample" or message["value"] is not None:
            return None
        site = _known(program, message["name"])
        dims = site.dims[: site.batch_ndim]
        site_key = site_keys[site.name]
        step = message["infer"].get("_scan_current_index")
        if step is not None:
            # Inside a scan the leading axis is the step; its dimension is never split.
            site_key = step_key(site_key, addresses.get(dims[0]), step)
            dims = dims[1:]
        fn = _whole(message["fn"], site, dims, addresses)
        try:
            drawn = keys.sample(fn, site_key, _address(fn, site, dims, addresses))
        except RandomnessError as error:
            raise RandomnessError(f"site {site.name!r}: {error}") from error
        return _filled(drawn, *given[site.name], step) if site.name in given else drawn

    return draw


def _filled(drawn: jax.Array, value: Any, known: Any, step: Any) -> jax.Array:
    """A draw with the given values in the cells where they are known."""
    if step is not None:
        value, known = _at(value, step), _at(known, step)
    filled = jnp.where(known, value.astype(drawn.dtype), drawn)
    # Inside a scan an axis that only broadcasts may be missing from the draw.
    return jnp.reshape(filled, drawn.shape)


def _at(array: Any, step: Any) -> Any:
    return array if array is True else jnp.asarray(array)[step if len(array) > 1 else 0]


def _whole(fn: Any, site: Site, dims: Dims, addresses: Addresses) -> Any:
    """An outcome has a draw for every cell, even where its parameters only broadcast."""
    if site.kind != "observed":
        return fn
    lengths = [len(addresses[d]) if d in addresses else 1 for d in dims]
    shape = jnp.broadcast_shapes(tuple(lengths), fn.batch_shape)
    return fn if shape == fn.batch_shape else fn.expand(shape)


def _address(fn: Any, site: Site, dims: Dims, addresses: Addresses) -> list[keys.Words]:
    batch = fn.batch_shape
    dims = (None,) * (len(batch) - len(dims)) + dims
    named = dims[len(dims) - len(batch) :]
    found: list[keys.Words] = []
    for axis, (dim, length) in enumerate(zip(named, batch, strict=True)):
        if dim is None and length > 1:
            raise _widened(site, batch)
        if dim not in addresses:
            found.append(keys.positions(len(batch) - axis, length))
        elif len(addresses[dim]) == length:
            found.append(addresses[dim])
        else:
            raise ModelError(
                f"site {site.name!r} has length {length} along {dim!r}, where the block has "
                f"{len(addresses[dim])}; take sizes from the arguments or from "
                f"xr_aimz.plate({dim!r}), not from the model"
            )
    return found


def _out(program: Program, site: Site, dims: Dims, value: Any, sizes: Mapping[str, int]) -> Any:
    """A site's value as it is in a Dataset: as long along each dim as the block."""
    value = jnp.asarray(value)
    lengths = {**sizes, TABLE: prod(sizes[d] for d in program.binding.dims)}
    observed = {*program.binding.dims, TABLE}
    shape = (1,) * (len(dims) - value.ndim) + value.shape
    if len(shape) > len(dims) or any(
        d is None and n > 1 for d, n in zip(dims, shape, strict=True)
    ):
        raise _widened(site, value.shape)
    whole = tuple(
        lengths[d] if d in observed and d is not None else n
        for d, n in zip(dims, shape, strict=True)
    )
    if any(n not in (1, m) for n, m in zip(shape, whole, strict=True)):
        raise ModelError(
            f"site {site.name!r} has shape {value.shape!r} on a block of {dict(sizes)!r}, where "
            f"its dims {dims!r} are of lengths {whole!r}"
        )
    value = jnp.broadcast_to(jnp.reshape(value, shape), whole)
    return jnp.reshape(value, shape_in_dataset(dims, program.binding, sizes, whole))


def _widened(site: Site, shape: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"site {site.name!r} has shape {shape!r} on this block, and at the fit had length 1 "
        "along some of those axes: an input has gained a dimension that the site lacks, as by "
        "do= on part of a region. Leave the site out of sites=, or give the value without it"
    )


def _known(program: Program, name: str) -> Site:
    if name not in program.sites:
        raise ModelError(
            f"site {name!r} is in the model without its outcome, and was not in the fit, which "
            f"had {sorted(program.sites)!r}; a model must have the same sites with and without"
        )
    return program.sites[name]


def _check_trace(program: Program, trace: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """The model on this block is the one that was fitted: same sites, latents of their shape."""
    gone = [name for name in program.returns if name not in trace]
    if gone:
        raise ModelError(f"sites {gone!r} of the fit are not in the model without its outcome")
    for name, message in trace.items():
        if message["type"] != "sample" or name not in known or program.sites[name].scanned:
            continue
        if program.sites[name].kind != "latent":
            continue
        fn = message["fn"]
        needed = fn.batch_shape + fn.event_shape
        if jnp.shape(known[name]) != needed:
            raise ModelError(
                f"latent site {name!r} has draws of shape {jnp.shape(known[name])!r} for this "
                f"block, and the model wants {needed!r}; take sizes from the arguments or from "
                "xr_aimz.plate, not from the model"
            )
