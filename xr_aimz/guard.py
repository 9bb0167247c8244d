"""Whether a model couples cells along dimensions that are going to be split.

A block is computed without its neighbours, so a model that looks at them (a running sum,
``x - x.mean()``, a lag, a position counted from the block's start) gives another answer in
every block. It is found out on a small probe, evaluated whole and in halves. Every site is
given a value, so nothing is drawn; then its log density has to be the same cell by cell, and
so has the value of a deterministic. A site's value need not be likely for that: densities of
one family that agree at an arbitrary point in every cell are the same. Where they say nothing
there, the parameters are compared. All is done in 64 bits, where rounding is far below any
effect. Most models need not be evaluated for it: that their cells are independent is read off
the two traces (:mod:`xr_aimz.pointwise`), which is much less work than compiling them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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

from xr_aimz.axes import dims_in_dataset, shape_in_model
from xr_aimz.binding import block_of
from xr_aimz.cellwise import parameters_by_cell
from xr_aimz.device import digest
from xr_aimz.errors import ModelError
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Dims, Program, reading
from xr_aimz.model import Site, tracing
from xr_aimz.pointwise import proven
from xr_aimz.probe import Probe, affordable, outline, probe_shapes, probes

__all__ = ["check_split", "coupled"]

# Of a value, and of the largest of its array: in 64 bits; and in 32, for a model that does not
# run in those. docs/decisions/block-guard.md.
_TOLERANCE = {True: (1e-6, 1e-9), False: (1e-3, 1e-5)}
# The programs are small and run a few times: all their time goes into compiling them.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_QUANTITY = "\0quantity"
_verdicts: dict[Any, tuple[str, ...] | None] = {}


def check_split(
    name: str,
    program: Program,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    params: Mapping[str, Any],
    blocks: Mapping[str, int],
    seen: Mapping[str, xr.DataArray],
) -> None:
    """Refuse a model that couples cells along dims that are going to be split.

    Parameters
    ----------
    name : str
        Of the program, as :func:`xr_aimz.device.traced` gives it: it is judged once.
    program, inputs, latents, params, blocks, seen
        As in :func:`coupled`.

    Raises
    ------
    ModelError
        With the dimensions and the remedies.
    """
    key = (name, tuple(blocks.items()))
    if key not in _verdicts:
        _verdicts[key] = coupled(program, inputs, latents, params, blocks, seen)
    if found := _verdicts[key]:
        shown = found[0] if len(found) == 1 else found
        raise ModelError(
            f"the model couples cells along {shown!r}, which is cut into blocks: on half of a "
            f"small probe {list(program.returns)!r} came out otherwise than on the whole, as "
            "they would by a lag, a running sum, a mean or a count of positions. Keep the "
            f"dimension whole, core_dim={shown!r} at the fit, or compute what looks along it "
            "beforehand, as a variable of the Dataset"
        )


def coupled(
    program: Program,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    params: Mapping[str, Any],
    blocks: Mapping[str, int],
    seen: Mapping[str, xr.DataArray] | None = None,
) -> tuple[str, ...] | None:
    """The dims, of those that are going to be split, along which a model couples cells.

    Parameters
    ----------
    program : Program
        ``returns`` are the sites that are looked at.
    inputs : Inputs
        Whose arrays the program takes. Nothing lazy is computed.
    latents : mapping of site to DataArray ``(chain, draw, ...)``
        Known draws. Sites without, or with lazy ones, get values from their support.
    params : mapping of site to pytree
    blocks : mapping of dim to int
        The dims that are going to be split, and how long a block is along each.
    seen : mapping of variable to DataArray, optional
        What a lazy input's values may be like: those of the fit.

    Returns
    -------
    tuple of str or None
        Empty for a model whose cells are independent along each dim. None for one that cannot
        be judged, because it runs neither on a probe nor on two blocks: sizes are written into
        it.
    """
    if not blocks:
        return ()
    judge = partial(_judge, program, inputs, latents, params, tuple(blocks), seen or {})
    found = judge(probe_shapes(program, inputs, tuple(blocks)))
    if found is None or found.proven:
        # What a model does with lengths it may do with a block's alone: months make whole years
        # in a block and not in a probe, and the lesser of 30 and a length is 30 in any probe.
        # In a block of one, what each cell has of its own looks like what all share.
        two = {d: 2 * max(n, 2) for d, n in blocks.items()}
        found = judge([{**inputs.sizes, **two}]) or found
    return None if found is None else found.dims


@dataclass(frozen=True)
class _Verdict:
    """The dims along which cells are coupled, and whether two traces were enough to say so."""

    dims: tuple[str, ...]
    proven: bool = False


def _judge(
    program: Program,
    inputs: Inputs,
    latents: Mapping[str, xr.DataArray],
    params: Mapping[str, Any],
    dims: tuple[str, ...],
    seen: Mapping[str, xr.DataArray],
    shapes: Iterable[Mapping[str, int]],
) -> _Verdict | None:
    """What is found on the first of these shapes on which the model runs."""
    for sizes, wide in product(shapes, (True, False)):
        with jax.enable_x64(wide or _in_64_bits()), warnings.catch_warnings():
            # What a model warns of, it warns of where it is used.
            warnings.simplefilter("ignore")
            try:
                shape = outline(program, inputs, latents, sizes)
                evaluate = _Evaluator(_with_all_drawn(program, shape), params)
                if evaluate.proves(shape, dims):
                    return _Verdict((), proven=True)
                if not affordable(program, inputs, sizes):
                    continue
                tried = probes(program, inputs, latents, seen, sizes)
                whole = _with_sources(program, params, tried[0])
                return _Verdict(_judged(_Evaluator(whole, params), tried, dims))
            except Exception:
                # Whatever a model may raise on sizes and dtypes that it was not made for.
                continue
    return None


def _with_all_drawn(program: Program, probe: Probe) -> Program:
    """The program, with every drawn site among its ``returns``."""
    hidden = (name for name in probe.noise if name not in program.returns)
    return replace(program, returns=(*program.returns, *hidden))


def _with_sources(program: Program, params: Mapping[str, Any], probe: Probe) -> Program:
    """The program, with those drawn sites among its ``returns`` that its returns depend on."""
    hidden = [name for name in probe.noise if name not in program.returns]
    if not hidden:
        return program
    evaluate = _Evaluator(program, params)
    before, matters = evaluate(probe), []
    for name in hidden:
        dims, values = probe.noise[name]
        after = evaluate(replace(probe, noise={**probe.noise, name: (dims, -values)}))
        if any(not np.array_equal(before[n], after[n], equal_nan=True) for n in before):
            matters.append(name)
    return replace(program, returns=(*program.returns, *matters))


def _judged(evaluate: _Evaluator, tried: tuple[Probe, ...], dims: tuple[str, ...]) -> Any:
    key = (evaluate.digest(tried[0]), dims)
    if key not in _verdicts:
        wholes = [(probe, evaluate(probe)) for probe in tried]
        best = max(_finite(whole) for _, whole in wholes)
        told = [(probe, whole) for probe, whole in wholes if _finite(whole) == best]

        def differ(along: tuple[str, ...]) -> bool:
            return any(evaluate.differs(probe, whole, along) for probe, whole in told)

        found = dims if differ(dims) else ()
        # Each dim by itself costs another compilation, and only a refusal needs to know.
        _verdicts[key] = tuple(d for d in found if _alone(differ, d)) or found
    return _verdicts[key]


def _alone(differ: Callable[[tuple[str, ...]], bool], dim: str) -> bool:
    """Whether one dim by itself shows."""
    try:
        return differ((dim,))
    except Exception:
        # A model of two equal lengths raises whatever it may on half of one; both are named then.
        return False


def _finite(outputs: Mapping[str, np.ndarray]) -> float:
    """The share of densities that say something."""
    return float(np.mean([np.isfinite(v[..., 0]).mean() for v in outputs.values()]))


class _Evaluator:
    """Evaluates probes, with one compilation for each of their shapes."""

    def __init__(self, program: Program, params: Mapping[str, Any]) -> None:
        self.program, self._params = program, params
        self._traced: dict[tuple[int, ...], Any] = {}
        self._compiled: dict[tuple[int, ...], Any] = {}

    def digest(self, probe: Probe) -> str:
        """What the program for a probe is known by."""
        return digest(self._trace(probe).jaxpr)

    def __call__(self, probe: Probe) -> dict[str, np.ndarray]:
        shape = tuple(probe.sizes.values())
        if shape not in self._compiled:
            self._compiled[shape] = self._trace(probe).lower().compile(_QUICK)
        found = self._compiled[shape](*probe.values, self._params)
        return {name: np.asarray(value) for name, value in found.items()}

    def proves(self, probe: Probe, dims: tuple[str, ...]) -> bool:
        """Whether the traces of a whole and a half show that no cell sees another."""
        half = probe.part(dict.fromkeys(dims, 0))
        whole, part = (self._trace(one).jaxpr for one in (probe, half))
        named = [
            kind[name]
            for kind in (probe.arrays, probe.latents, probe.noise)
            for name in sorted(kind)
        ]
        given = [tuple(d if d in dims else None for d in own) for own, _ in named]
        given += [(None,) * np.ndim(leaf) for leaf in jax.tree.leaves(self._params)]
        wanted = []
        for name, struct in sorted(self._trace(probe).out_info.items()):
            along = dims_in_dataset(self.program.sites[name], self.program.binding)
            cells = along[: len(struct.shape) - 1]
            # An event that spans the dim is one density of cells that belong together.
            if set(along[len(cells) :]) & set(dims):
                return False
            wanted.append((*(d if d in dims else None for d in cells), None))
        return proven(whole, part, given, wanted)

    def differs(
        self, probe: Probe, whole: Mapping[str, np.ndarray], dims: tuple[str, ...]
    ) -> bool:
        """Whether any half along ``dims`` is not what the whole is there."""
        for corner in product((0, 1), repeat=len(dims)):
            halves = dict(zip(dims, corner, strict=True))
            for name, part in self(probe.part(halves)).items():
                site = self.program.sites[name]
                along = dims_in_dataset(site, self.program.binding)
                inside = along[part.ndim - 1 :]
                # An event that spans the dim is one density of cells that belong together.
                if set(inside) & set(dims):
                    return True
                here = probe.index(along[: part.ndim - 1], halves)
                if not _same(whole[name][here], part):
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


def _in_64_bits() -> bool:
    return jnp.result_type(float).itemsize == 8


def _same(whole: np.ndarray, part: np.ndarray) -> bool:
    """Equal densities; where they are not finite, equal parameters."""
    if whole.shape != part.shape:
        return False
    decided = np.isfinite(whole[..., :1]) | np.isfinite(part[..., :1])
    counts = np.where(decided, np.arange(whole.shape[-1]) == 0, True)
    near, far = _TOLERANCE[_in_64_bits()]
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
