"""What a model makes of probes: densities cell by cell, traced, evaluated and compared.

Every site is given a value, so nothing is drawn, and of each the log density is read, or the
value of a deterministic. Two traces, of a whole and a part, may prove that every cell is made
by itself; else whole and halves are evaluated and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions.distribution import validation_enabled
from numpyro.distributions.transforms import biject_to

from xr_aimz.axes import dims_in_dataset, shape_in_model
from xr_aimz.binding import block_of
from xr_aimz.cellwise import parameters_by_cell
from xr_aimz.dataflow import reaches
from xr_aimz.fingerprint import program_fingerprint
from xr_aimz.independence import Obstacle, find_obstacles
from xr_aimz.kernel import Dims, Program, reading
from xr_aimz.model import Site, tracing
from xr_aimz.probe import Probe

__all__ = ["Evaluator", "in_64_bits"]

# Of a value, and of the largest of its array: in 64 bits; and in 32, for a model that does not
# run in those. docs/decisions/block-guard.md.
_TOLERANCE = {True: (1e-6, 1e-9), False: (1e-3, 1e-5)}
# The programs are small and run a few times: all their time goes into compiling them.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_QUANTITY = "\0quantity"


class Evaluator:
    """Evaluates probes, with one compilation for each of their shapes."""

    def __init__(self, program: Program, params: Mapping[str, Any]) -> None:
        self.program, self._params = program, params
        self._traced: dict[tuple[int, ...], Any] = {}
        self._compiled: dict[tuple[int, ...], Any] = {}

    def fingerprint(self, probe: Probe) -> str:
        """The name of the program for a probe."""
        return program_fingerprint(self._trace(probe).jaxpr)

    def __call__(self, probe: Probe) -> dict[str, np.ndarray]:
        shape = tuple(probe.sizes.values())
        if shape not in self._compiled:
            self._compiled[shape] = self._trace(probe).lower().compile(_QUICK)
        found = self._compiled[shape](*probe.values, self._params)
        return {name: np.asarray(value) for name, value in found.items()}

    def obstacles(
        self, whole: Probe, block: Probe, dims: tuple[str, ...]
    ) -> dict[str, Obstacle | None]:
        """By site, what keeps its cells along the dims from being proven independent, if anything.

        Read off the traces of a whole and of a block of it; nothing is computed.
        """
        wanted, joint = [], {}
        for name, struct in sorted(self._trace(whole).out_info.items()):
            along = dims_in_dataset(self.program.sites[name], self.program.binding)
            cells = along[: len(struct.shape) - 1]
            spanned = [d for d in along[len(cells) :] if d in dims]
            if spanned:
                # An event that spans the dim is one density of cells that belong together.
                joint[name] = Obstacle(f"site {name!r} is one event along {spanned[0]!r}")
            wanted.append((*(d if d in dims else None for d in cells), None))
        given = self._given(whole, dims)
        traces = self._trace(whole).jaxpr, self._trace(block).jaxpr
        found = find_obstacles(*traces, given, wanted)
        return {**dict(zip(sorted(self._trace(whole).out_info), found, strict=True)), **joint}

    def sources(self, probe: Probe, sites: tuple[str, ...]) -> tuple[str, ...]:
        """Those sites, and the drawn ones that they depend on through any others."""
        closed = self._trace(probe).jaxpr
        kinds = (probe.arrays, probe.latents, probe.noise)
        labels = [frozenset[str]() for kind in kinds[:2] for _ in kind]
        labels += [frozenset({name}) for name in sorted(probe.noise)]
        labels += [frozenset()] * len(jax.tree.leaves(self._params))
        names = sorted(self._trace(probe).out_info)
        parents = dict(zip(names, reaches(closed, labels), strict=True))
        found, front = dict.fromkeys(sites), set(sites)
        while front:
            front = set().union(*(parents[name] for name in front)) - set(found)
            found |= dict.fromkeys(sorted(front))
        return tuple(found)

    def _given(self, probe: Probe, dims: tuple[str, ...]) -> list[tuple[str | None, ...]]:
        """Of each argument of the traced program, the split dim of each axis."""
        kinds = (probe.arrays, probe.latents, probe.noise)
        named = [kind[name][0] for kind in kinds for name in sorted(kind)]
        leaves = jax.tree.leaves(self._params)
        given: list[tuple[str | None, ...]] = [
            tuple(d if d in dims else None for d in own) for own in named
        ]
        return given + [(None,) * np.ndim(leaf) for leaf in leaves]

    def differs(
        self,
        probe: Probe,
        whole: Mapping[str, np.ndarray],
        pieces: Iterable[Mapping[str, slice]],
    ) -> bool:
        """Whether any of the pieces of a probe is not what the whole is there."""
        return any(self._differs(probe, whole, piece) for piece in pieces)

    def _differs(
        self, probe: Probe, whole: Mapping[str, np.ndarray], piece: Mapping[str, slice]
    ) -> bool:
        for name, part in self(probe.part(piece)).items():
            site = self.program.sites[name]
            along = dims_in_dataset(site, self.program.binding)
            cells = along[: part.ndim - 1]
            # An event that spans the dim is one density of cells that belong together.
            if set(along[part.ndim - 1 :]) & set(piece):
                return True
            if not _same(whole[name][probe.index(cells, piece)], part):
                return True
        return False

    def _trace(self, probe: Probe) -> Any:
        shape = tuple(probe.sizes.values())
        if shape not in self._traced:
            # Checks of a distribution's parameters are no part of what it is.
            with tracing(block_of(self.program.binding, probe.sizes)), validation_enabled(False):
                call = _call(self.program, probe.sizes)
                self._traced[shape] = jax.jit(call).trace(*probe.values, self._params)
        return self._traced[shape]


def in_64_bits() -> bool:
    """Whether JAX's floats have 64 bits as it is."""
    return jnp.result_type(float).itemsize == 8


def _same(whole: np.ndarray, part: np.ndarray) -> bool:
    """Equal densities; where they are not finite, equal parameters."""
    if whole.shape != part.shape:
        return False
    decided = np.isfinite(whole[..., :1]) | np.isfinite(part[..., :1])
    counts = np.where(decided, np.arange(whole.shape[-1]) == 0, True)
    near, far = _TOLERANCE[in_64_bits()]
    sizes = np.where(np.isfinite(whole), np.abs(whole), 0.0)
    largest = sizes.max(axis=tuple(range(whole.ndim - 1)), initial=0.0)
    with np.errstate(invalid="ignore"):
        close = np.abs(whole - part) <= near * sizes + far * largest
    alike = close | (whole == part) | (np.isnan(whole) & np.isnan(part))
    return bool(np.all(alike | ~counts))


def _call(program: Program, sizes: Mapping[str, int]) -> Callable:
    """The kernel that reads densities, of the model with values at all its sites."""
    keys = dict.fromkeys(program.keyed, np.zeros(2, np.uint32))
    words = {d: np.zeros((sizes[d], 2), np.uint32) for d in program.binding.dims}

    def call(arrays: Any, latents: Any, noise: Any, params: Any) -> dict[str, jax.Array]:
        filled = replace(program, model=_filled(program, noise, sizes))
        shared = {"arrays": arrays, "words": words, "params": params}
        return reading(filled, sizes, _read)({"keys": keys, "latents": latents}, shared)

    return call


def _filled(program: Program, noise: Mapping[str, Any], sizes: Mapping[str, int]) -> Callable:
    def fill(message: Mapping[str, Any]) -> Any:
        name = message["name"]
        if message["type"] != "sample" or message["value"] is not None or name not in noise:
            return None
        shape = shape_in_model(program.sites[name], program.binding, sizes)
        value = jnp.reshape(noise[name], shape)
        step = message["infer"].get("_scan_current_index")
        return _supported(message["fn"], value if step is None else value[step])

    return handlers.substitute(program.model, substitute_fn=fill)


def _supported(fn: Any, noise: jax.Array) -> jax.Array:
    """Values in the support of a distribution, one for each of the noise's."""
    if fn.support.is_discrete:
        return (noise > 0).astype(int)
    try:
        transform = biject_to(fn.support)
        inner = transform.inverse_shape(noise.shape)
    except NotImplementedError:
        # NumPyro knows no way into this support: any values serve that are the same twice.
        return noise
    batch = noise.shape[: noise.ndim - fn.event_dim]
    flat = jnp.reshape(noise, (*batch, -1))
    # A simplex of three has two free numbers.
    return transform(jnp.reshape(flat[..., : prod(inner[len(batch) :])], inner))


def _bare(fn: Any) -> tuple[Any, jax.Array]:
    """A distribution without its wrappers, and how often each of its cells is not masked."""
    mask = jnp.zeros(())
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = mask + jnp.asarray(fn._mask, float)
        if isinstance(fn, dist.Independent):
            # What was one event is cells of the inner distribution.
            mask = jnp.expand_dims(mask, tuple(range(-fn.reinterpreted_batch_ndims, 0)))
        fn = fn.base_dist
    return fn, mask


def _read(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    """What is compared of a site, on a last axis: its density, then its parameters."""
    if message["type"] != "sample":
        return (*site.dims, _QUANTITY), jnp.asarray(message["value"], float)[..., None]
    fn, mask = _bare(message["fn"])
    if isinstance(fn, dist.Delta):
        return (*site.dims, _QUANTITY), jnp.asarray(fn.v, float)[..., None]
    density = jnp.asarray(fn.log_prob(message["value"]), float)
    # What is drawn is not masked, and a log-likelihood is: both have to be the same.
    density = density + mask
    batch = jnp.broadcast_shapes(density.shape, fn.batch_shape)
    found = [p.astype(density.dtype) for p in parameters_by_cell(fn, batch)]
    if any(np.ndim(bound) for bound in jax.tree.leaves(fn.support)):
        # A density does not tell where its support begins; the parameters do.
        density = density + sum(found)
    quantities = jnp.stack(jnp.broadcast_arrays(density, *found), -1)
    return (*site.dims[: len(site.dims) - fn.event_dim], _QUANTITY), quantities
