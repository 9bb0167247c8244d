"""Find the support of each outcome's distribution, and refuse values outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr
from numpyro import distributions as dist
from numpyro.distributions import constraints

from xr_aimz.binding import (
    AlignedInputs,
    BlockValues,
    as_jax_array,
    block_of,
    is_float,
    jax_dtype,
    shape_in_model,
)
from xr_aimz.errors import DtypeError, SupportError
from xr_aimz.kernel.compile import run_draws, trace_program
from xr_aimz.kernel.program import site_readout
from xr_aimz.kernel.spec import BlockData, Dims, DrawState, Kernel, KernelSpec, leaf_paths
from xr_aimz.tracing import Site

_CENSORED = (dist.LeftCensoredDistribution, dist.RightCensoredDistribution)
# Name of the last axis of the bounds, which is no dim of a Dataset.
_BOUNDS = "\0bounds"
# Description of a support, by NumPyro's class of constraint; {} stands for a bound.
_DESCRIPTIONS = {
    "_Boolean": "0 and 1",
    "_Circular": "angles from -pi to pi",
    "_GreaterThan": "numbers above {}",
    "_GreaterThanEq": "numbers from {} up",
    "_IntegerGreaterThan": "whole numbers from {} up",
    "_IntegerInterval": "whole numbers from {} to {}",
    "_IntegerNonnegative": "whole numbers from 0 up",
    "_IntegerPositive": "whole numbers from 1 up",
    "_Interval": "numbers from {} to {}",
    "_LessThan": "numbers below {}",
    "_LessThanEq": "numbers up to {}",
    "_Multinomial": "counts that sum to {}",
    "_Nonnegative": "numbers from 0 up",
    "_OpenInterval": "numbers between {} and {}",
    "_OrderedVector": "numbers in rising order",
    "_Positive": "numbers above 0",
    "_Real": "finite numbers",
    "_Simplex": "numbers from 0 up that sum to 1",
    "_UnitInterval": "numbers from 0 to 1",
}


def mark_outside(
    site: Site, message: Mapping[str, Any], notes: dict[str, Any] | None = None
) -> tuple[Dims, Any]:
    """Mask of the cells whose value lies outside the support, missing values excepted."""
    fn, support = message["fn"], _get_support(message["fn"])
    if _is_unchecked(fn):
        raise ValueError("the model asks for a density outside of the support, too")
    value, known_mask = _get_value(message)
    outside = ~jnp.asarray(support(value))
    if is_float(value):
        # NumPyro counts infinity among the numbers above 0, but it has no density.
        outside = outside | _any_in_event(fn, jnp.isinf(value))
    outside = outside & ~_missing_mask(fn, support, value)
    if known_mask is not True:
        outside = outside & ~_any_in_event(fn, ~jnp.asarray(known_mask))
    if outside.ndim > value.ndim - fn.event_dim and outside.ndim > len(fn.batch_shape):
        raise ValueError("the support says nothing of whole cells")
    if notes is not None:
        notes["words"] = _describe_support(support)
        notes["traced"] = any(isinstance(b, jax.core.Tracer) for b in jax.tree.leaves(support))
        # A conditioned value is cast to the dtype of its site's draws.
        observed = message["fixed"] is None and is_float(value)
        notes["takes_ints"] = observed and support.is_discrete and _refuses_dtype(fn, value)
    return site.dims[: site.batch_ndim], outside


def _get_value(message: Mapping[str, Any]) -> tuple[jax.Array, Any]:
    """Return the values of an outcome, and the mask of the cells that have a value."""
    value, known_mask = message["fixed"] or (message["value"], True)
    return jnp.asarray(value), known_mask


def _missing_mask(fn: Any, support: Any, value: jax.Array) -> jax.Array:
    """Mask of the cells whose value, or a bound of whose support, is missing."""
    mask = jnp.isnan(value) if is_float(value) else jnp.zeros(value.shape, bool)
    mask, base = _any_in_event(fn, mask), _base_constraint(support)
    for bound in map(jnp.asarray, jax.tree.leaves(support)):
        if is_float(bound):
            # Bounds have the axes that dist.Independent turned from batch to event.
            inner = min(fn.event_dim - base.event_dim, bound.ndim)
            mask = mask | jnp.isnan(bound).any(tuple(range(bound.ndim - inner, bound.ndim)))
    return mask


def _any_in_event(fn: Any, entries: jax.Array) -> jax.Array:
    """Mask of the cells of which any entry of the event is True."""
    return entries.any(tuple(range(max(entries.ndim - fn.event_dim, 0), entries.ndim)))


def _refuses_dtype(fn: Any, value: jax.Array) -> bool:
    try:
        fn.log_prob(value)
    except TypeError:
        return True
    return False


def read_value(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    """Return the dims and the value of a site, conditioned or observed."""
    value, _ = _get_value(message)
    return site.dims, value


def read_bounds(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
    """Return dims, and the bounds of the support by cell, on a last axis with a 0 at its end."""
    fn, value = message["fn"], _get_value(message)[0]
    support = _get_support(fn)
    shape = jnp.broadcast_shapes(fn.batch_shape, value.shape[: value.ndim - fn.event_dim])
    inner = fn.event_dim - _base_constraint(support).event_dim
    bounds = []
    for bound in map(jnp.asarray, jax.tree.leaves(support)):
        # For an event, the bounds of its first entry.
        bounds.append(jnp.broadcast_to(bound[(..., *(0,) * min(inner, bound.ndim))], shape))
    stacked = jnp.stack([*bounds, jnp.zeros(shape)], -1)
    return (*site.dims[: site.batch_ndim], _BOUNDS), stacked


def _base_constraint(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _get_support(fn: Any) -> Any:
    """Return the support of a distribution, with its ends included if values may be censored."""
    support = fn.support
    if not isinstance(_unwrap(fn), _CENSORED):
        return support
    base = _base_constraint(support)
    # A survival time may be censored at 0, where there is no density.
    closed = type(base) in (type(constraints.positive), constraints.greater_than)
    return constraints.greater_than_eq(base.lower_bound) if closed else support


def _unwrap(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _is_unchecked(fn: Any) -> bool:
    """Return whether a model sets ``validate_args=False``, to use the density outside as well."""
    fn = _unwrap(fn)
    # Only on the instance: the class has NumPyro's default, which is False for censored ones.
    return vars(fn).get("_validate_args") is False and not isinstance(fn, _CENSORED)


def _describe_support(support: Any) -> str:
    kind = type(_base_constraint(support)).__name__
    return _DESCRIPTIONS.get(kind, f"{kind.lstrip('_')} of NumPyro's constraints")


@dataclass(frozen=True, eq=False)
class Support:
    """Requirement that all values of an outcome lie in the support of its site.

    Parameters
    ----------
    keys : frozenset of str
        Keys of the outcome, and of the inputs that the bounds are computed from.
    what : str
        Description of the outcome.
    program : KernelSpec
        Program that returns the site.
    params : mapping of name to pytree
    structs : mapping of key to jax.ShapeDtypeStruct
        Shapes and dtypes of the arrays that the program takes, for a block of ``sizes``.
    sizes : mapping of dim to int
        Sizes to which blocks are padded, so that all use one compiled program.
    name : str
        Fingerprint of the traced program.
    words : str
        Description of the support, with {} for every bound.
    """

    keys: frozenset[str]
    what: str
    program: KernelSpec
    params: Mapping[str, Any]
    structs: Mapping[str, Any]
    sizes: Mapping[str, int]
    name: str
    words: str

    @property
    def site(self) -> str:
        return self.program.returns[0]

    def check(self, values: BlockValues) -> None:
        """Check that no value of a block is outside the support; the error names the first.

        Raises
        ------
        SupportError
        """
        outside = self._read(mark_outside, values, self.name)
        if not outside.any():
            return
        first = np.unravel_index(int(outside.argmax()), outside.shape)
        dims = self.program.result_dims(self.site)[: outside.ndim]
        value = self._read(read_value, values)[first]
        bounds = self._read(read_bounds, values)[first].tolist()
        words = self.words.format(*(f"{b:g}" for b in bounds))
        words += "" if np.isfinite(value).all() else ", none of them infinite"
        label = values.place(dims, map(int, first))
        raise SupportError(
            f"{self.what} has values outside of the support of site {self.site!r}, "
            f"{self.program.sites[self.site].distribution}: {words}. They are "
            f"{int(outside.sum())} of {outside.size}, the first {value!s}{label}. Correct them, "
            "make them missing (NaN), or give the site another distribution"
        )

    def at(self, sizes: Mapping[str, int]) -> Support | None:
        """Return the same requirement for blocks that are padded to other sizes."""
        structs = resize_structs(self.program, self.structs, sizes)
        traced = _trace_support(self.program, structs, self.params, sizes)
        if traced is None:
            return None
        return replace(self, structs=structs, sizes=sizes, name=traced.name)

    def _read(self, read: Any, values: BlockValues, name: str | None = None) -> np.ndarray:
        """Return the result of ``read`` for the site, on the cells of a block."""
        factory = partial(_make_kernel, read=read)
        draw, shared = kernel_structs(self.program, self.structs, self.params, self.sizes)
        block = block_of(self.program.binding, self.sizes)
        if name is None:
            _, _, name = trace_program(factory(self.program, self.sizes), block, draw, shared)
        arrays = {
            key: pad_to(struct.shape, as_jax_array(key, values.arrays[key]))
            if key in self.keys
            else zeros_without_memory(struct)
            for key, struct in self.structs.items()
        }
        draws = jax.tree.map(
            lambda x: zeros_without_memory(jax.ShapeDtypeStruct((1, *x.shape), x.dtype)), draw
        )
        words = jax.tree.map(zeros_without_memory, shared.words)
        result = run_draws(
            name,
            lambda: factory(self.program, self.sizes),
            block,
            draws,
            BlockData(arrays, self.params, words),
        )[self.site][0]
        lengths = values.sizes
        dims = self.program.result_dims(self.site)[: result.ndim]
        return result[tuple(slice(0, lengths.get(d)) for d in dims)]


def find_outcome_supports(
    program: KernelSpec, inputs: AlignedInputs, params: Mapping[str, Any]
) -> tuple[Support, ...]:
    """Return the requirements on the outcomes that a Dataset has; see :func:`find_supports`."""
    described = {}
    for site in program.sites.values():
        if site.kind == "observed" and _has_array_values(site, program, inputs.arrays):
            arguments = [a for a in program.binding.outcomes if a.name in site.observed_inputs]
            names = ", ".join(repr(s.name) for a in arguments for s in a.sources)
            described[site.name] = f"variable {names} (argument {arguments[0].name!r})"
    return find_supports(program, inputs, params, described)


def find_supports(
    program: KernelSpec,
    inputs: AlignedInputs,
    params: Mapping[str, Any],
    described: Mapping[str, str],
) -> tuple[Support, ...]:
    """Return the requirements that values of sites lie in the support of their distribution.

    Parameters
    ----------
    program : KernelSpec
        Arrays that include the outcomes, or conditioned values of their sites.
    inputs : AlignedInputs
    params : mapping of name to pytree
    described : mapping of site to str
        Sites to check, each with a description of its values.

    Returns
    -------
    tuple of Support
        Without the sites whose support depends on draws, and those without a support.

    Raises
    ------
    DtypeError
        Floats as codes of categories, where the distribution takes ints only.
    """
    structs = block_structs(program, inputs)
    supports = []
    for site, what in described.items():
        single = replace(program, returns=(site,), scenarios=None)
        traced = _trace_support(single, structs, params, inputs.sizes)
        if traced is None:
            continue
        if traced.takes_ints:
            raise DtypeError(
                f"{what} is a float, and site {site!r}, {program.sites[site].distribution}, takes "
                "its values as ints: .astype(int). Ints have no missing values (NaN): leave their "
                "labels out, ds.dropna(...)"
            )
        if traced.keys:
            sizes = inputs.sizes
            supports.append(
                Support(
                    traced.keys, what, single, params, structs, sizes, traced.name, traced.words
                )
            )
    return tuple(supports)


def resize_structs(
    program: KernelSpec, structs: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of each array, for a program on a block of other sizes."""
    block_dims = program.binding.block_dims
    resized = {}
    for key, struct in structs.items():
        axes = zip(program.dims[key], struct.shape, strict=True)
        shape = tuple(sizes[d] if d in block_dims else n for d, n in axes)
        resized[key] = jax.ShapeDtypeStruct(shape, struct.dtype)
    return resized


def pad_to(shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Pad an array to a shape by repeating its last entries."""
    padding = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
    return np.pad(array, padding, mode="edge") if array.shape != shape else array


def block_structs(program: KernelSpec, inputs: AlignedInputs) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of each array, for a program on the whole Dataset."""
    block_dims = program.binding.block_dims
    return {
        key: jax.ShapeDtypeStruct(
            tuple(inputs.sizes[str(d)] if d in block_dims else a.sizes[d] for d in a.dims),
            jax_dtype(a.dtype),
        )
        for key, a in inputs.arrays.items()
    }


@dataclass(frozen=True)
class _TracedSupport:
    keys: frozenset[str]
    name: str
    words: str
    takes_ints: bool


def _trace_support(
    program: KernelSpec,
    structs: Mapping[str, Any],
    params: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> _TracedSupport | None:
    """Trace the support of a site, for the arrays it depends on; None where that fails."""
    notes: dict[str, Any] = {}
    draw, shared = kernel_structs(program, structs, params, sizes)
    call = site_readout(program, sizes, partial(mark_outside, notes=notes))
    try:
        closed, _, name = trace_program(call, block_of(program.binding, sizes), draw, shared)
    except Exception:
        # A model, or a constraint of the caller's, may raise any class where it is evaluated for
        # its support alone: then its values cannot be checked.
        return None
    _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    paths = leaf_paths(draw, shared)
    sources = [path for path, is_used in zip(paths, used, strict=True) if is_used]
    kinds = {path[0] for path in sources}
    untrained = (
        notes["traced"] and not params and any(s.has_initial_value for s in program.sites.values())
    )
    is_data_only = kinds <= {"arrays", "params"} and not untrained
    keys = frozenset(p[1] for p in sources if p[0] == "arrays") if is_data_only else frozenset()
    return _TracedSupport(keys, name, notes["words"], notes["takes_ints"])


def kernel_structs(
    program: KernelSpec,
    arrays: Mapping[str, Any],
    params: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> tuple[DrawState, BlockData]:
    """Return the structs of a kernel's arguments; sites without array values are latents."""
    key = jax.ShapeDtypeStruct((2,), np.uint32)
    cells = tuple(sizes[d] for d in program.binding.per)
    latents = {
        site.name: jax.ShapeDtypeStruct(
            cells + shape_in_model(site, program.binding, sizes), site.dtype
        )
        for site in program.sites.values()
        if site.kind in ("latent", "observed") and not _has_array_values(site, program, arrays)
    }
    words = {d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in program.binding.block_dims}
    keys = dict.fromkeys(program.random_sites, key)
    return DrawState(keys, latents), BlockData(dict(arrays), dict(params), words)


def _has_array_values(site: Site, program: KernelSpec, arrays: Mapping[str, Any]) -> bool:
    """Return whether a site has its values from the arrays that its outcomes are bound to."""
    outcomes = [
        a for a in program.binding.arguments if a.outcome and a.name in site.observed_inputs
    ]
    return bool(outcomes) and all(s.key in arrays for a in outcomes for s in a.sources)


def zeros_without_memory(struct: Any) -> np.ndarray:
    """Return zeros of a struct's shape and dtype that take no memory."""
    return np.broadcast_to(np.zeros((), struct.dtype), struct.shape)


def _make_kernel(program: KernelSpec, sizes: Mapping[str, int], read: Any) -> Kernel:
    return site_readout(program, sizes, read)
