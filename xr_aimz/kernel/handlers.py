"""Substitute and check the sites of one block: draws by label, fixed values, missing inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from xr_aimz.binding import (
    TABLE,
    Binding,
    BoundArgument,
    broadcast_in_model,
    is_float,
    shape_in_dataset,
    shape_in_model,
)
from xr_aimz.errors import ModelError, RandomnessError
from xr_aimz.kernel.spec import (
    Addresses,
    BlockData,
    Dims,
    DrawState,
    KernelSpec,
    condition_key,
    known_key,
)
from xr_aimz.random import Words, combine_axes, position_hashes, sample, step_key
from xr_aimz.tracing import Block, Site


def mask_missing_inputs(
    binding: Binding,
    site: Site,
    dims: tuple[str | None, ...],
    value: jax.Array,
    passed: Mapping[str, Any],
    fixed_cells: Any = False,
) -> jax.Array:
    """Set an outcome's value to NaN in the cells computed from a missing input; traceable.

    ``dims`` name the axes of ``value``; ``passed`` are the model's arguments. ``fixed_cells`` is a
    boolean mask on the axes of the site, of cells whose value is fixed: they are computed from
    no input. An argument with an observation dimension that the site lacks is ignored: the
    model reduces many of its cells to one, and may handle missing values there.
    """
    if site.kind != "observed" or not is_float(value) or fixed_cells is True:
        return value
    value, is_fixed = (
        jnp.reshape(a, (1,) * (len(dims) - a.ndim) + a.shape)
        for a in (value, jnp.asarray(fixed_cells))
    )
    for argument in binding.arguments:
        array = passed.get(argument.name)
        if (
            argument.name in site.density_inputs | site.observed_inputs
            and array is not None
            and is_float(array)
        ):
            mask = _missing_mask(binding, argument, array, dims)
            value = value if mask is None else jnp.where(mask & ~is_fixed, jnp.nan, value)
    return value


def _missing_mask(
    binding: Binding, argument: BoundArgument, array: jax.Array, dims: tuple[str | None, ...]
) -> jax.Array | None:
    """Return the mask of an argument's missing cells with axes ``dims``; None if they lack one."""
    axes: tuple[str, ...] = (TABLE,) if binding.layout == "table" else binding.dims
    extra_dims = [d for d in argument.sources[0].dims if d not in binding.block_dims]
    if array.ndim != len(axes) + (1 if argument.stacked else len(extra_dims)):
        # It has no observation dimension, or those of the fit are not in this Dataset.
        axes = ()
    has_extra_axes = not argument.stacked and len(axes) + len(extra_dims) == array.ndim
    names = (*axes, *(extra_dims if has_extra_axes else [None] * (array.ndim - len(axes))))
    mask = jnp.isnan(array)
    if any(n > 1 and d not in dims for d, n in zip(axes, mask.shape, strict=False)):
        return None
    mask = mask.any(tuple(i for i, d in enumerate(names) if d is None or d not in dims))
    mask_dims = [d for d in names if d is not None and d in dims]
    order = sorted(range(len(mask_dims)), key=lambda i: dims.index(mask_dims[i]))
    mask = jnp.transpose(mask, order)
    lengths = dict(zip((mask_dims[i] for i in order), mask.shape, strict=True))
    return jnp.reshape(mask, tuple(1 if d is None else lengths.get(d, 1) for d in dims))


def fixed_values(
    program: KernelSpec, block: Block, draw: DrawState, shared: BlockData
) -> dict[str, tuple[Any, Any]]:
    """Return the values and the mask of fixed cells of each site that is fixed in some cells."""
    arrays, fixed = shared.arrays, {}
    for name, site in program.sites.items():

        def to_model_axes(key: str, site: Site = site) -> Any:
            dims, array = program.dims[key], arrays[key]
            return broadcast_in_model(array, dims, site, program.binding, block.sizes)

        mask = to_model_axes(known_key(name)) if known_key(name) in arrays else True
        if condition_key(name) in arrays:
            fixed[name] = (to_model_axes(condition_key(name)), mask)
        elif mask is not True:
            shape = shape_in_model(site, program.binding, block.sizes)
            fixed[name] = (jnp.reshape(draw.latents[name], shape), mask)
    return fixed


def fixed_mask(
    program: KernelSpec, fixed: Mapping[str, tuple[Any, Any]], now: Any
) -> dict[str, Any]:
    """Return the mask of the cells of each site whose value is conditioned on or intervened on."""
    masks = {name: mask for name, (_, mask) in fixed.items()}
    if program.scenarios is not None and now is not None:
        for change in program.scenarios.sites:
            _, set_mask, _ = now["sites"][change.target]
            masks[change.target] = set_mask | masks.get(change.target, False)
    return masks


def draw_by_label(
    program: KernelSpec,
    words: Mapping[str, jax.Array],
    site_keys: Mapping[str, jax.Array],
    fixed: Mapping[str, tuple[Any, Any]],
) -> Callable[[Mapping[str, Any]], jax.Array | None]:
    """Return a substitute function that draws, by label, every sample site without a value."""
    table_words: dict[str | None, jax.Array] = {}
    if program.binding.layout == "table":
        cell_words = combine_axes([words[d] for d in program.binding.dims])
        table_words[TABLE] = jnp.reshape(cell_words, (-1, 2))
    addresses: Addresses = {**table_words, **dict(words.items())}

    def sample_site(message: Mapping[str, Any]) -> jax.Array | None:
        if message["type"] != "sample" or message["value"] is not None:
            return None
        site = _get_site(program, message["name"])
        dims = site.dims[: site.batch_ndim]
        site_key = site_keys[site.name]
        step = message["infer"].get("_scan_current_index")
        if step is not None:
            # Inside a scan the leading axis is the step; its dimension is never split.
            site_key = step_key(site_key, addresses.get(dims[0]), step)
            dims = dims[1:]
        fn = _expand_outcome(message["fn"], site, dims, addresses)
        try:
            value = sample(fn, site_key, _site_address(fn, site, dims, addresses))
        except RandomnessError as error:
            raise RandomnessError(f"site {site.name!r}: {error}") from error
        return _fill_fixed(value, *fixed[site.name], step) if site.name in fixed else value

    return sample_site


def _fill_fixed(sampled: jax.Array, value: Any, known_mask: Any, step: Any) -> jax.Array:
    """Replace a draw by the fixed values in the cells where they are known."""
    if step is not None:
        value, known_mask = _select_step(value, step), _select_step(known_mask, step)
    filled = jnp.where(known_mask, value.astype(sampled.dtype), sampled)
    # Inside a scan an axis that only broadcasts may be missing from the draw.
    return jnp.reshape(filled, sampled.shape)


def _select_step(array: Any, step: Any) -> Any:
    """Return one step's part of an array with a leading step axis; True is returned as it is."""
    return array if array is True else jnp.asarray(array)[step if len(array) > 1 else 0]


def _expand_outcome(fn: Any, site: Site, dims: Dims, addresses: Addresses) -> Any:
    """Expand an outcome's distribution to all cells of the block, so that each is drawn."""
    if site.kind != "observed":
        return fn
    lengths = [len(addresses[d]) if d in addresses else 1 for d in dims]
    shape = jnp.broadcast_shapes(tuple(lengths), fn.batch_shape)
    return fn if shape == fn.batch_shape else fn.expand(shape)


def _site_address(fn: Any, site: Site, dims: Dims, addresses: Addresses) -> list[Words]:
    """Return the uint32 words ``(n, 2)`` of each batch axis of a site's distribution."""
    batch = fn.batch_shape
    dims = (None,) * (len(batch) - len(dims)) + dims
    batch_dims = dims[len(dims) - len(batch) :]
    words: list[Words] = []
    for axis, (dim, length) in enumerate(zip(batch_dims, batch, strict=True)):
        if dim is None and length > 1:
            raise _widened_error(site, batch)
        if dim not in addresses:
            words.append(position_hashes(len(batch) - axis, length))
        elif len(addresses[dim]) == length:
            words.append(addresses[dim])
        else:
            raise ModelError(
                f"site {site.name!r} has length {length} along {dim!r}, where the block has "
                f"{len(addresses[dim])}; take sizes from the arguments or from "
                f"xr_aimz.plate({dim!r}), not from the model"
            )
    return words


def site_result(
    program: KernelSpec, site: Site, dims: Dims, value: Any, sizes: Mapping[str, int]
) -> Any:
    """Broadcast a site's value to the block's sizes and reshape it to its dims in a Dataset."""
    value = jnp.asarray(value)
    lengths = {**sizes, TABLE: prod(sizes[d] for d in program.binding.dims)}
    observed = {*program.binding.dims, TABLE}
    shape = (1,) * (len(dims) - value.ndim) + value.shape
    if len(shape) > len(dims) or any(
        d is None and n > 1 for d, n in zip(dims, shape, strict=True)
    ):
        raise _widened_error(site, value.shape)
    full_shape = tuple(
        lengths[d] if d in observed and d is not None else n
        for d, n in zip(dims, shape, strict=True)
    )
    if any(n not in (1, m) for n, m in zip(shape, full_shape, strict=True)):
        raise ModelError(
            f"site {site.name!r} has shape {value.shape!r} on a block of {dict(sizes)!r}, where "
            f"its dims {dims!r} are of lengths {full_shape!r}"
        )
    value = jnp.broadcast_to(jnp.reshape(value, shape), full_shape)
    return jnp.reshape(value, shape_in_dataset(dims, program.binding, sizes, full_shape))


def _widened_error(site: Site, shape: tuple[int, ...]) -> ModelError:
    """Make the error for a site that is longer along an axis than it was at the fit."""
    return ModelError(
        f"site {site.name!r} has shape {shape!r} on this block, and at the fit had length 1 "
        "along some of those axes: an input has gained a dimension that the site lacks, as by "
        "do= on part of a region. Leave the site out of sites=, or give the value without it"
    )


def _get_site(program: KernelSpec, name: str) -> Site:
    """Return the site of the fit with this name; raise if the fit had none."""
    if name not in program.sites:
        raise ModelError(
            f"site {name!r} is in the model without its outcome, and was not in the fit, which "
            f"had {sorted(program.sites)!r}; a model must have the same sites with and without"
        )
    return program.sites[name]


def check_trace(
    program: KernelSpec, trace: Mapping[str, Any], known_latents: Mapping[str, Any]
) -> None:
    """Check that the model has the fit's sites on this block, and latents of the draws' shapes."""
    missing_sites = [name for name in program.returns if name not in trace]
    if missing_sites:
        raise ModelError(
            f"sites {missing_sites!r} of the fit are not in the model without its outcome"
        )
    for name, message in trace.items():
        if message["type"] != "sample" or name not in known_latents or program.sites[name].scanned:
            continue
        if program.sites[name].kind != "latent":
            continue
        fn = message["fn"]
        expected_shape = fn.batch_shape + fn.event_shape
        if jnp.shape(known_latents[name]) != expected_shape:
            raise ModelError(
                f"latent site {name!r} has draws of shape "
                f"{jnp.shape(known_latents[name])!r} for this "
                f"block, where the model has {expected_shape!r}; take sizes from the arguments or "
                "from xr_aimz.plate, not from the model"
            )
