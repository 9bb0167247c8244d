"""A probe: a small Dataset of a model's own kind, as plain arrays, and its halves.

Its values are like the real ones, where those are in memory: entries of theirs, moved a
little, so that what happens to be constant or zero does not hide what a model does with it.
Nothing lazy is computed: such inputs get the values that the fit saw, or any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.axes import dims_in_dataset, shape_in_dataset, shape_in_model
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import CONDITION, KNOWN, Program
from xr_aimz.model import Site

__all__ = ["Probe", "affordable", "outline", "probe_shapes", "probes"]

# Half of a probe's length, the first that is not too much: a lag must fit into a probe, and its
# halves be no period by which a model may count positions (7, 12, 24, 365).
_HALVES = (401, 61, 13)
_MOST = 2**17
# Cells along the dims that stay whole: as many as there are, up to this.
_MOST_WHOLE = 4096
Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]
Places = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Probe:
    """Values for a small Dataset.

    Parameters
    ----------
    sizes : mapping of dim to int
    arrays, latents, noise : mapping of name to (dims, array)
        Of the inputs; of one draw of the sites that are known; of as many normal numbers as
        the other sites have values.
    """

    sizes: Mapping[str, int]
    arrays: Named
    latents: Named
    noise: Named

    def part(self, pieces: Mapping[str, slice]) -> Probe:
        """A piece along each of some dims."""

        def cut(named: Named) -> Named:
            return {n: (dims, a[self.index(dims, pieces)]) for n, (dims, a) in named.items()}

        sizes = {**self.sizes, **{d: s.stop - s.start for d, s in pieces.items()}}
        return Probe(sizes, cut(self.arrays), cut(self.latents), cut(self.noise))

    def index(self, dims: Iterable[str], pieces: Mapping[str, slice]) -> tuple[slice, ...]:
        """Where a piece along some dims lies in an array of the probe's."""
        return tuple(pieces.get(d, slice(None)) for d in dims)

    def ends(self, lengths: Mapping[str, int]) -> Iterator[dict[str, slice]]:
        """Pieces of those lengths at both ends of each dim, all first ones first."""
        both = [(slice(0, n), slice(self.sizes[d] - n, self.sizes[d])) for d, n in lengths.items()]
        for corner in product(*both):
            yield dict(zip(lengths, corner, strict=True))

    def halves(self, dims: Iterable[str]) -> Iterator[dict[str, slice]]:
        """Both halves along each of some dims."""
        return self.ends({d: self.sizes[d] // 2 for d in dims})

    @property
    def values(self) -> tuple[dict[str, np.ndarray], ...]:
        """The arrays, latents and noise without their dims."""
        kinds = (self.arrays, self.latents, self.noise)
        return tuple({n: a for n, (_, a) in named.items()} for named in kinds)


def probe_shapes(
    program: Program, inputs: Inputs, dims: tuple[str, ...]
) -> Iterator[dict[str, int]]:
    """Sizes to try, with ``dims`` to be halved; the others whole, unless they are very long."""
    for length in _HALVES:
        sizes = {**inputs.sizes, **dict.fromkeys(dims, 2 * length)}
        short, left = dict(sizes), _MOST_WHOLE
        for d in (d for d in program.binding.dims if d not in dims):
            short[d] = min(sizes[d], left)
            left = max(left // short[d], 1)
        if length == _HALVES[-1] or _weight(program, inputs, short) <= _MOST:
            yield short
            if short != sizes and affordable(program, inputs, sizes):
                yield sizes
            return


def affordable(program: Program, inputs: Inputs, sizes: Mapping[str, int]) -> bool:
    """Whether a model may be evaluated on so much, only to be looked at."""
    return _weight(program, inputs, sizes) <= 8 * _MOST


def _weight(program: Program, inputs: Inputs, sizes: Mapping[str, int]) -> int:
    """The values of the largest array."""
    every = [
        program.binding.dims,
        *inputs.dims.values(),
        *(s.dims for s in program.sites.values()),
    ]
    return max(prod(sizes.get(str(d), 1) for d in dims) for dims in every)


def outline(
    program: Program,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    sizes: Mapping[str, int],
) -> Probe:
    """A probe of any sizes whose values are zeros that take no room: for who looks at shapes."""

    def blank(dims: Iterable[Any], array: Any) -> tuple[tuple[str, ...], np.ndarray]:
        own = tuple(map(str, dims))
        dtype = np.dtype(float) if array.dtype.kind == "f" else array.dtype
        shape = tuple(sizes[d] if d in program.binding.dims else array.sizes[d] for d in own)
        return own, np.broadcast_to(np.zeros((), dtype), shape)

    arrays = {key: blank(a.dims, a) for key, a in _read_by_model(inputs).items()}
    known = {
        name: blank((d for d in a.dims if d not in ("chain", "draw")), a)
        for name, a in _in_memory(latents, inputs).items()
    }
    noise = {
        s.name: (
            dims_in_dataset(s, program.binding),
            np.broadcast_to(0.0, _shape(s, program, sizes)),
        )
        for s in _without_values(program, known)
    }
    return Probe(sizes, arrays, known, noise)


def _read_by_model(inputs: Inputs) -> dict[str, xr.DataArray]:
    """The arrays less those that give sites their values: in a probe all sites have some."""
    given = (CONDITION, KNOWN)
    return {key: a for key, a in inputs.arrays.items() if not key.startswith(given)}


def _in_memory(latents: Mapping[str, xr.DataArray], inputs: Inputs) -> dict[str, xr.DataArray]:
    """The draws that a probe can be made of: not those that only some of the cells have."""
    return {
        name: array
        for name, array in latents.items()
        if array.chunks is None and KNOWN + name not in inputs.arrays
    }


def _without_values(program: Program, known: Mapping[str, Any]) -> list[Site]:
    kinds = ("param", "deterministic")
    return [s for n, s in program.sites.items() if s.kind not in kinds and n not in known]


def _shape(site: Site, program: Program, sizes: Mapping[str, int]) -> tuple[int, ...]:
    shape = shape_in_model(site, program.binding, sizes)
    return shape_in_dataset(site.dims, program.binding, sizes, shape)


def probes(
    program: Program,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    seen: Mapping[str, xr.DataArray],
    sizes: Mapping[str, int],
) -> tuple[Probe, ...]:
    """Probes of those sizes: real values moved a little, real ones, any within (0, 1).

    Parameters
    ----------
    program : Program
    inputs : Inputs
    latents : mapping of site to DataArray ``(chain, draw, ...)``
    seen : mapping of variable to DataArray
        Values for the inputs that are lazy.
    sizes : mapping of dim to int
        One of :func:`probe_shapes`.
    """
    rng = np.random.default_rng(0)
    places = {d: _places(inputs.sizes[d], sizes[d], rng) for d in program.binding.dims}
    names = {s.key: s.name for a in program.binding.arguments for s in a.sources}
    arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for key, array in _read_by_model(inputs).items():
        real = array if array.chunks is None else seen.get(names.get(key, key))
        arrays[key] = _input(array, real, places, rng)
    known = {
        name: _picked(_one_draw(array, rng), places)
        for name, array in _in_memory(latents, inputs).items()
    }
    noise = {
        s.name: (dims_in_dataset(s, program.binding), rng.normal(size=_shape(s, program, sizes)))
        for s in _without_values(program, known)
    }
    moved = Probe(sizes, _each(_moved, arrays, rng), _each(_moved, known, rng), noise)
    free = Probe(sizes, _each(_free, arrays, rng), known, noise)
    return moved, Probe(sizes, arrays, known, noise), free


def _places(there: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Where to take a probe's entries from: in order, or, where they repeat, in none."""
    return np.arange(wanted) if wanted <= there else rng.permutation(wanted) % there


def _input(
    array: xr.DataArray, real: xr.DataArray | None, places: Places, rng: np.random.Generator
) -> tuple[tuple[str, ...], np.ndarray]:
    dims = tuple(map(str, array.dims))
    if real is not None and real.chunks is None and set(real.dims) == set(dims):
        return _picked(real.transpose(*dims), places)
    shape = tuple(len(places[d]) if d in places else array.sizes[d] for d in dims)
    if array.dtype.kind == "f":
        return dims, rng.normal(size=shape)
    return dims, rng.integers(0, 2, shape).astype(array.dtype)


def _picked(array: xr.DataArray, places: Places) -> tuple[tuple[str, ...], np.ndarray]:
    dims = tuple(map(str, array.dims))
    # The sizes of what the fit saw may be others.
    here = {d: places[d] % n for d, n in zip(dims, array.shape, strict=True) if d in places}
    values = array.isel(here).values
    # In 64 bits where the probe runs in those; JAX makes of it what it can.
    return tuple(map(str, array.dims)), values.astype(
        float
    ) if values.dtype.kind == "f" else values


def _one_draw(array: xr.DataArray, rng: np.random.Generator) -> xr.DataArray:
    at = {d: int(rng.integers(array.sizes[d])) for d in ("chain", "draw") if d in array.dims}
    return array.isel(at)


def _each(change: Callable[[np.ndarray, Any], np.ndarray], named: Named, rng: Any) -> Named:
    return {n: (dims, change(a, rng)) for n, (dims, a) in named.items()}


def _moved(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Floats by a tenth: of themselves where all are positive, else of their spread."""
    if values.dtype.kind != "f" or not values.size:
        return values
    finite = np.isfinite(values)
    noise = 0.1 * rng.normal(size=values.shape)
    if (values[finite] > 0).all():
        return np.where(finite, values * np.exp(noise), np.exp(noise))
    scale = values[finite].std() or np.abs(values[finite]).max() or 1.0
    return np.where(finite, values, 0.0) + scale * noise


def _free(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.05, 0.95, values.shape) if values.dtype.kind == "f" else values
