"""One posterior draw through one block: pure functions from arrays to arrays.

A :class:`Program` is all that is static: the model, its binding and its sites. What
changes from block to block (arrays, the words of the labels) and from draw to draw (the
words of chain and draw, the latents) is passed in. Sites that the posterior holds are
substituted; all others are drawn by :mod:`xr_aimz.keys`, so that a value depends on its
labels and on nothing else of the block. With dims in ``per`` that is the kernel of one cell,
mapped over those of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from xr_aimz import keys
from xr_aimz.axes import TABLE, shape_in_dataset, shape_in_model
from xr_aimz.binding import Binding, arrange, block_of
from xr_aimz.errors import ModelError
from xr_aimz.mapped import over_cells
from xr_aimz.model import Block, Site

__all__ = ["Program", "log_likelihood", "predictive"]

# A call has `draw`: {"keys": {site: uint32 (2,)}, "latents": {site: array}}
# and `shared`: {"arrays": {source: array}, "words": {dim: uint32 (n, 2)},
# "params": {site: pytree}}.
# NumPyro's own key feeds only what has no address: numpyro.prng_key() in a network.
_LOOSE = "numpyro.prng_key"
Dims = tuple[str | None, ...]
Addresses = Mapping[str | None, jax.Array]
Call = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]


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
    """

    model: Callable
    binding: Binding
    sites: Mapping[str, Site]
    dims: Mapping[str, tuple[str, ...]]
    returns: tuple[str, ...]

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

    def call(draw: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, jax.Array]:
        trace = _run(program, block, draw, shared)
        found = {}
        for name in program.returns:
            site = program.sites[name]
            found[name] = _out(program, site, *read(site, trace[name]), sizes)
        return found

    return over_cells(call, per, dims) if per else call


def _run(
    program: Program, block: Block, draw: Mapping[str, Any], shared: Mapping[str, Any]
) -> Mapping[str, Any]:
    passed = arrange(program.binding, shared["arrays"], program.dims, block)
    known = dict(shared["params"])
    for name, value in draw["latents"].items():
        shape = shape_in_model(program.sites[name], program.binding, block.sizes)
        known[name] = jnp.reshape(value, shape)
    loose = jax.random.wrap_key_data(draw["keys"][_LOOSE], impl="threefry2x32")
    model = handlers.substitute(handlers.seed(program.model, loose), data=known)
    drawer = _drawer(program, shared["words"], draw["keys"])
    drawn = handlers.substitute(model, substitute_fn=drawer)
    trace = handlers.trace(drawn).get_trace(**passed)
    _check_trace(program, trace, known)
    return trace


def _drawer(
    program: Program, words: Mapping[str, jax.Array], site_keys: Mapping[str, jax.Array]
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
            dims = dims[1:]
            site_key = keys.fold(site_key, jnp.stack([jnp.uint32(0), step.astype(jnp.uint32)]))
        fn = _whole(message["fn"], site, dims, addresses)
        return keys.sample(fn, site_key, _address(fn, site, dims, addresses))

    return draw


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
        fn = message["fn"]
        needed = fn.batch_shape + fn.event_shape
        if jnp.shape(known[name]) != needed:
            raise ModelError(
                f"latent site {name!r} has draws of shape {jnp.shape(known[name])!r} for this "
                f"block, and the model wants {needed!r}; take sizes from the arguments or from "
                "xr_aimz.plate, not from the model"
            )
