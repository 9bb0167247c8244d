"""Make small Datasets that resemble a model's inputs, and evaluate its densities on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import xarray as xr
from numpyro import handlers
from numpyro.distributions.distribution import validation_enabled
from numpyro.distributions.transforms import biject_to

from xr_aimz.binding import (
    AlignedInputs,
    block_of,
    shape_in_dataset,
    shape_in_model,
)
from xr_aimz.kernel.program import site_readout
from xr_aimz.kernel.spec import ArrayKey, BlockData, Dims, DrawState, KernelSpec, known_key
from xr_aimz.random import cell_parameters
from xr_aimz.tracing import (
    Obstacle,
    Site,
    find_obstacles,
    program_fingerprint,
    reaches,
    trace_lock,
)

# Half of a probe's length; the first that is affordable is used. A lag must fit into a probe, and
# a half must not be a period by which a model may count positions (7, 12, 24, 365).
_HALF_LENGTHS = (401, 61, 13)
_MOST_VALUES = 2**17
# Most cells of a probe along the dims that are not split.
_MOST_OTHER_CELLS = 4096
Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]
Places = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Probe:
    """Values of a small Dataset, of latents, and of noise for all other sites.

    Parameters
    ----------
    sizes : mapping of dim to int
    arrays, latents, noise : mapping of name to (dims, array)
        Inputs; one draw of the sites that have draws; as many normal numbers as the other sites
        have values.
    """

    sizes: Mapping[str, int]
    arrays: Named
    latents: Named
    noise: Named

    def part(self, pieces: Mapping[str, slice]) -> Probe:
        """Return the part of a probe within a window along each of some dims."""

        def take(named: Named) -> Named:
            return {n: (dims, a[self.index(dims, pieces)]) for n, (dims, a) in named.items()}

        sizes = {**self.sizes, **{d: s.stop - s.start for d, s in pieces.items()}}
        return Probe(sizes, take(self.arrays), take(self.latents), take(self.noise))

    def index(self, dims: Iterable[str], pieces: Mapping[str, slice]) -> tuple[slice, ...]:
        """Return the index of windows along some dims in an array with these ``dims``."""
        return tuple(pieces.get(d, slice(None)) for d in dims)

    def ends(self, lengths: Mapping[str, int]) -> Iterator[dict[str, slice]]:
        """Iterate over windows of these lengths at both ends of each dim, the first ends first."""
        ends = [(slice(0, n), slice(self.sizes[d] - n, self.sizes[d])) for d, n in lengths.items()]
        for corner in product(*ends):
            yield dict(zip(lengths, corner, strict=True))

    def halves(self, dims: Iterable[str]) -> Iterator[dict[str, slice]]:
        """Iterate over the combinations of halves along each of some dims."""
        return self.ends({d: self.sizes[d] // 2 for d in dims})

    @property
    def values(self) -> tuple[dict[str, np.ndarray], ...]:
        """Return arrays, latents and noise, each by name and without dims."""
        kinds = (self.arrays, self.latents, self.noise)
        return tuple({n: a for n, (_, a) in named.items()} for named in kinds)


def probe_shapes(
    program: KernelSpec, inputs: AlignedInputs, dims: tuple[str, ...]
) -> Iterator[dict[str, int]]:
    """Iterate over sizes of probes to halve along ``dims``; other dims are shortened if long."""
    for length in _HALF_LENGTHS:
        sizes = {**inputs.sizes, **dict.fromkeys(dims, 2 * length)}
        short, remaining = dict(sizes), _MOST_OTHER_CELLS
        for d in (d for d in program.binding.dims if d not in dims):
            short[d] = min(sizes[d], remaining)
            remaining = max(remaining // short[d], 1)
        if length == _HALF_LENGTHS[-1] or _largest_size(program, inputs, short) <= _MOST_VALUES:
            yield short
            if short != sizes and is_affordable(program, inputs, sizes):
                yield sizes
            return


def is_affordable(program: KernelSpec, inputs: AlignedInputs, sizes: Mapping[str, int]) -> bool:
    """Return whether a probe of these sizes is small enough to evaluate a model on it."""
    return _largest_size(program, inputs, sizes) <= 8 * _MOST_VALUES


def _largest_size(program: KernelSpec, inputs: AlignedInputs, sizes: Mapping[str, int]) -> int:
    """Return the number of values of the largest array."""
    all_dims = [
        program.binding.dims,
        *inputs.dims.values(),
        *(s.dims for s in program.sites.values()),
    ]
    return max(prod(sizes.get(str(d), 1) for d in dims) for dims in all_dims)


def zero_probe(
    program: KernelSpec,
    inputs: AlignedInputs,
    latents: Mapping[str, xr.DataArray],
    sizes: Mapping[str, int],
) -> Probe:
    """Make a probe of any sizes from zeros that take no memory, to trace a model."""

    def zeros(dims: Iterable[Any], array: Any) -> tuple[tuple[str, ...], np.ndarray]:
        names = tuple(map(str, dims))
        dtype = np.dtype(float) if array.dtype.kind == "f" else array.dtype
        shape = tuple(sizes[d] if d in program.binding.dims else array.sizes[d] for d in names)
        return names, np.broadcast_to(np.zeros((), dtype), shape)

    arrays = {key: zeros(a.dims, a) for key, a in _model_inputs(inputs).items()}
    draws = {
        name: zeros((d for d in a.dims if d not in ("chain", "draw")), a)
        for name, a in _usable_draws(latents, inputs).items()
    }
    noise = {
        s.name: (
            s.dataset_dims,
            np.broadcast_to(0.0, _shape(s, program, sizes)),
        )
        for s in _sites_without_draws(program, draws)
    }
    return Probe(sizes, arrays, draws, noise)


def _model_inputs(inputs: AlignedInputs) -> dict[str, xr.DataArray]:
    """Return the inputs without values of sites: in a probe every site has values of its own."""
    of_sites = ("condition", "known")
    return {
        key: a
        for key, a in inputs.arrays.items()
        if not (isinstance(key, ArrayKey) and key.kind in of_sites)
    }


def _usable_draws(
    latents: Mapping[str, xr.DataArray], inputs: AlignedInputs
) -> dict[str, xr.DataArray]:
    """Return the draws to make probes from: those in memory that exist for every cell."""
    return {
        name: array
        for name, array in latents.items()
        if array.chunks is None and known_key(name) not in inputs.arrays
    }


def _sites_without_draws(program: KernelSpec, draws: Mapping[str, Any]) -> list[Site]:
    kinds = ("param", "deterministic")
    return [s for n, s in program.sites.items() if s.kind not in kinds and n not in draws]


def _shape(site: Site, program: KernelSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = shape_in_model(site, program.binding, sizes)
    return shape_in_dataset(site.dims, program.binding, sizes, shape)


def make_probes(
    program: KernelSpec,
    inputs: AlignedInputs,
    latents: Mapping[str, xr.DataArray],
    seen: Mapping[str, xr.DataArray],
    sizes: Mapping[str, int],
) -> tuple[Probe, ...]:
    """Make three probes of the same sizes: perturbed values, original values, uniform on (0, 1).

    Parameters
    ----------
    program : KernelSpec
    inputs : AlignedInputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    seen : mapping of variable to DataArray
        Values for the inputs that are lazy.
    sizes : mapping of dim to int
        One of :func:`probe_shapes`.
    """
    rng = np.random.default_rng(0)
    entries = {d: _choose_entries(inputs.sizes[d], sizes[d], rng) for d in program.binding.dims}
    names = program.binding.variables
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for key, array in _model_inputs(inputs).items():
        source = array if array.chunks is None else seen.get(names.get(key, key))
        arrays[key] = _make_input(array, source, entries, rng)
    draws = {
        name: _take(_choose_draw(array, rng), entries)
        for name, array in _usable_draws(latents, inputs).items()
    }
    noise = {
        s.name: (s.dataset_dims, rng.normal(size=_shape(s, program, sizes)))
        for s in _sites_without_draws(program, draws)
    }
    moved = Probe(sizes, _map(_perturb, arrays, rng), _map(_perturb, draws, rng), noise)
    uniform = Probe(sizes, _map(_draw_uniform, arrays, rng), draws, noise)
    return moved, Probe(sizes, arrays, draws, noise), uniform


def _choose_entries(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the entries of a probe along a dim: in order, or shuffled if they have to repeat."""
    return np.arange(count) if count <= length else rng.permutation(count) % length


def _make_input(
    array: xr.DataArray, source: xr.DataArray | None, entries: Places, rng: np.random.Generator
) -> tuple[tuple[str, ...], np.ndarray]:
    dims = tuple(map(str, array.dims))
    if source is not None and source.chunks is None and set(source.dims) == set(dims):
        return _take(source.transpose(*dims), entries)
    shape = tuple(len(entries[d]) if d in entries else array.sizes[d] for d in dims)
    if array.dtype.kind == "f":
        return dims, rng.normal(size=shape)
    return dims, rng.integers(0, 2, shape).astype(array.dtype)


def _take(array: xr.DataArray, entries: Places) -> tuple[tuple[str, ...], np.ndarray]:
    dims = tuple(map(str, array.dims))
    # Values of the fit may have other sizes.
    indexers = {d: entries[d] % n for d, n in zip(dims, array.shape, strict=True) if d in entries}
    values = array.isel(indexers).values
    # 64 bits where the probe runs in those; else JAX casts to 32.
    return tuple(map(str, array.dims)), values.astype(
        float
    ) if values.dtype.kind == "f" else values


def _choose_draw(array: xr.DataArray, rng: np.random.Generator) -> xr.DataArray:
    indexers = {d: int(rng.integers(array.sizes[d])) for d in ("chain", "draw") if d in array.dims}
    return array.isel(indexers)


def _map(change: Callable[[np.ndarray, Any], np.ndarray], named: Named, rng: Any) -> Named:
    return {n: (dims, change(a, rng)) for n, (dims, a) in named.items()}


def _perturb(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Perturb floats by a tenth: of each value where all are positive, else of their spread."""
    if values.dtype.kind != "f" or not values.size:
        return values
    finite = np.isfinite(values)
    noise = 0.1 * rng.normal(size=values.shape)
    if (values[finite] > 0).all():
        return np.where(finite, values * np.exp(noise), np.exp(noise))
    scale = values[finite].std() or np.abs(values[finite]).max() or 1.0
    return np.where(finite, values, 0.0) + scale * noise


def _draw_uniform(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.05, 0.95, values.shape) if values.dtype.kind == "f" else values


# Relative to a value, and to the largest value of its array: in 64 bits, and in 32 for a model
# that does not run in 64. docs/decisions/block-guard.md.
_TOLERANCE = {True: (1e-6, 1e-9), False: (1e-3, 1e-5)}
# The programs are small and run a few times: all their time goes into compiling them.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_QUANTITY = "\0quantity"


class DensityEvaluator:
    """Evaluator of a model's log densities on probes, compiled once for each shape of probe."""

    def __init__(self, program: KernelSpec, params: Mapping[str, Any]) -> None:
        self.program, self._params = program, params
        self._traced: dict[tuple[int, ...], Any] = {}
        self._compiled: dict[tuple[int, ...], Any] = {}

    def fingerprint(self, probe: Probe) -> str:
        """Return the fingerprint of the program for a probe."""
        return program_fingerprint(self._trace(probe).jaxpr)

    def __call__(self, probe: Probe) -> dict[str, np.ndarray]:
        shape = tuple(probe.sizes.values())
        if shape not in self._compiled:
            self._compiled[shape] = self._trace(probe).lower().compile(_QUICK)
        result = self._compiled[shape](*probe.values, self._params)
        return {name: np.asarray(value) for name, value in result.items()}

    def obstacles(
        self, full: Probe, block: Probe, dims: tuple[str, ...]
    ) -> dict[str, Obstacle | None]:
        """Return for each site the obstacle to a proof that its cells along dims are independent.

        None for a site that is proven. From the traces of a whole probe and of a block of it;
        nothing is computed.
        """
        output_dims, joint = [], {}
        for name, struct in sorted(self._trace(full).out_info.items()):
            along = self.program.sites[name].dataset_dims
            cells = along[: len(struct.shape) - 1]
            spanned = [d for d in along[len(cells) :] if d in dims]
            if spanned:
                # An event that spans the dim is one density of cells that belong together.
                joint[name] = Obstacle(f"site {name!r} is one event along {spanned[0]!r}")
            output_dims.append((*(d if d in dims else None for d in cells), None))
        input_dims = self._given_sites(full, dims)
        traces = self._trace(full).jaxpr, self._trace(block).jaxpr
        result = find_obstacles(*traces, input_dims, output_dims)
        return {**dict(zip(sorted(self._trace(full).out_info), result, strict=True)), **joint}

    def sources(self, probe: Probe, sites: tuple[str, ...]) -> tuple[str, ...]:
        """Return the sites and all sampled sites that they depend on, directly or indirectly."""
        closed = self._trace(probe).jaxpr
        kinds = (probe.arrays, probe.latents, probe.noise)
        labels = [frozenset[str]() for kind in kinds[:2] for _ in kind]
        labels += [frozenset({name}) for name in sorted(probe.noise)]
        labels += [frozenset()] * len(jax.tree.leaves(self._params))
        names = sorted(self._trace(probe).out_info)
        parents = dict(zip(names, reaches(closed, labels), strict=True))
        result, front = dict.fromkeys(sites), set(sites)
        while front:
            front = set().union(*(parents[name] for name in front)) - set(result)
            result |= dict.fromkeys(sorted(front))
        return tuple(result)

    def _given_sites(self, probe: Probe, dims: tuple[str, ...]) -> list[tuple[str | None, ...]]:
        """Return for each argument of the traced program the split dim of each axis."""
        kinds = (probe.arrays, probe.latents, probe.noise)
        named = [kind[name][0] for kind in kinds for name in sorted(kind)]
        leaves = jax.tree.leaves(self._params)
        input_dims: list[tuple[str | None, ...]] = [
            tuple(d if d in dims else None for d in array_dims) for array_dims in named
        ]
        return input_dims + [(None,) * np.ndim(leaf) for leaf in leaves]

    def differs(
        self,
        probe: Probe,
        full: Mapping[str, np.ndarray],
        pieces: Iterable[Mapping[str, slice]],
    ) -> bool:
        """Return whether densities in any window differ from those of the whole probe."""
        return any(self._differs(probe, full, window) for window in pieces)

    def _differs(
        self, probe: Probe, full: Mapping[str, np.ndarray], window: Mapping[str, slice]
    ) -> bool:
        for name, part in self(probe.part(window)).items():
            site = self.program.sites[name]
            along = site.dataset_dims
            cells = along[: part.ndim - 1]
            # An event that spans the dim is one density of cells that belong together.
            if set(along[part.ndim - 1 :]) & set(window):
                return True
            if not _are_equal(full[name][probe.index(cells, window)], part):
                return True
        return False

    def _trace(self, probe: Probe) -> Any:
        shape = tuple(probe.sizes.values())
        if shape not in self._traced:
            # Checks of a distribution's parameters are not part of its densities.
            with (
                trace_lock(block_of(self.program.binding, probe.sizes)),
                validation_enabled(False),
            ):
                call = _density_kernel(self.program, probe.sizes)
                self._traced[shape] = jax.jit(call).trace(*probe.values, self._params)
        return self._traced[shape]


def is_double_precision() -> bool:
    """Return whether JAX's default floats have 64 bits."""
    return jnp.result_type(float).itemsize == 8


def _are_equal(full: np.ndarray, part: np.ndarray) -> bool:
    """Return whether densities are equal within rounding; where not finite, the parameters."""
    if full.shape != part.shape:
        return False
    is_finite = np.isfinite(full[..., :1]) | np.isfinite(part[..., :1])
    is_compared = np.where(is_finite, np.arange(full.shape[-1]) == 0, True)
    relative, absolute = _TOLERANCE[is_double_precision()]
    sizes = np.where(np.isfinite(full), np.abs(full), 0.0)
    largest = sizes.max(axis=tuple(range(full.ndim - 1)), initial=0.0)
    with np.errstate(invalid="ignore"):
        close = np.abs(full - part) <= relative * sizes + absolute * largest
    is_equal = close | (full == part) | (np.isnan(full) & np.isnan(part))
    return bool(np.all(is_equal | ~is_compared))


def _density_kernel(program: KernelSpec, sizes: Mapping[str, int]) -> Callable:
    """Make the kernel that returns densities of the model, with values from noise at its sites."""
    keys = dict.fromkeys(program.random_sites, np.zeros(2, np.uint32))
    words = {d: np.zeros((sizes[d], 2), np.uint32) for d in program.binding.dims}

    def call(arrays: Any, latents: Any, noise: Any, params: Any) -> dict[str, jax.Array]:
        filled = replace(program, model=_substitute_noise(program, noise, sizes))
        shared = BlockData(arrays, params, words)
        return site_readout(filled, sizes, _read_quantities)(DrawState(keys, latents), shared)

    return call


def _substitute_noise(
    program: KernelSpec, noise: Mapping[str, Any], sizes: Mapping[str, int]
) -> Callable:
    def fill(message: Mapping[str, Any]) -> Any:
        name = message["name"]
        if message["type"] != "sample" or message["value"] is not None or name not in noise:
            return None
        shape = shape_in_model(program.sites[name], program.binding, sizes)
        value = jnp.reshape(noise[name], shape)
        step = message["infer"].get("_scan_current_index")
        return _to_support(message["fn"], value if step is None else value[step])

    return handlers.substitute(program.model, substitute_fn=fill)


def _to_support(fn: Any, noise: jax.Array) -> jax.Array:
    """Transform noise to values in the support of a distribution, with the shape of the noise."""
    if fn.support.is_discrete:
        return (noise > 0).astype(int)
    try:
        transform = biject_to(fn.support)
        inner = transform.inverse_shape(noise.shape)
    except NotImplementedError:
        # NumPyro has no transform to this support: any values serve that repeat exactly.
        return noise
    batch = noise.shape[: noise.ndim - fn.event_dim]
    flat = jnp.reshape(noise, (*batch, -1))
    # A simplex of three has two free numbers.
    return transform(jnp.reshape(flat[..., : prod(inner[len(batch) :])], inner))


def _unwrap(fn: Any) -> tuple[Any, jax.Array]:
    """Return a distribution without wrappers, and the number of masks that keep each cell."""
    mask = jnp.zeros(())
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = mask + jnp.asarray(fn._mask, float)
        if isinstance(fn, dist.Independent):
            # An event of the wrapper is several cells of the inner distribution.
            mask = jnp.expand_dims(mask, tuple(range(-fn.reinterpreted_batch_ndims, 0)))
        fn = fn.base_dist
    return fn, mask


def _read_quantities(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    """Return quantities of a site to compare, on a last axis: its density, then parameters."""
    if message["type"] != "sample":
        return (*site.dims, _QUANTITY), jnp.asarray(message["value"], float)[..., None]
    fn, mask = _unwrap(message["fn"])
    if isinstance(fn, dist.Delta):
        return (*site.dims, _QUANTITY), jnp.asarray(fn.v, float)[..., None]
    density = jnp.asarray(fn.log_prob(message["value"]), float)
    # Masks apply to a log likelihood and not to draws: density and mask both have to be the same.
    density = density + mask
    batch = jnp.broadcast_shapes(density.shape, fn.batch_shape)
    parameters = [p.astype(density.dtype) for p in cell_parameters(fn, batch)]
    if any(np.ndim(bound) for bound in jax.tree.leaves(fn.support)):
        # A density does not depend on where its support begins; the parameters do.
        density = density + sum(parameters)
    quantities = jnp.stack(jnp.broadcast_arrays(density, *parameters), -1)
    return (*site.dims[: len(site.dims) - fn.event_dim], _QUANTITY), quantities
