"""Make kernels: pure functions that run a model for one posterior draw on one block.

A :class:`KernelSpec` is the static part: the model, its binding and its sites. The arguments
are what changes from block to block (arrays, the words of the labels) and from draw to draw
(the keys of the sites, the latents). Sites in the posterior are substituted; all others are
drawn by :mod:`xr_aimz.random`, so that a value depends on its labels and on nothing else of
the block. Where a site is conditioned on in some cells only, its other cells are drawn. With
dims in ``per`` this is the kernel of one cell, mapped over the cells of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers

from xr_aimz.binding import arrange, block_of, shape_in_model
from xr_aimz.errors import AimzError
from xr_aimz.kernel.handlers import (
    check_trace,
    draw_by_label,
    fixed_mask,
    fixed_values,
    mask_missing_inputs,
    site_result,
)
from xr_aimz.kernel.scenarios import (
    ScenarioSet,
    SetSites,
    dims_replaced,
    map_scenarios,
    stack_values,
)
from xr_aimz.kernel.spec import UNADDRESSED, BlockData, Dims, DrawState, Kernel, KernelSpec
from xr_aimz.random import fold_in
from xr_aimz.tracing import Block, ForwardScans, Site, note_location


def predictive(program: KernelSpec, sizes: Mapping[str, int]) -> Kernel:
    """Make the kernel that returns the value of each site of ``program.returns``."""
    return _make_kernel(program, sizes, lambda site, message: (site.dims, message["value"]))


def log_likelihood(program: KernelSpec, sizes: Mapping[str, int]) -> Kernel:
    """Make the kernel that returns each observation's log density, event dims summed."""

    def density(site: Site, message: Mapping[str, Any]) -> tuple[Dims, Any]:
        return site.dims[: site.batch_ndim], message["fn"].log_prob(message["value"])

    return _make_kernel(program, sizes, density)


def distributions(program: KernelSpec, sizes: Mapping[str, int]) -> Callable[..., dict[str, Any]]:
    """Make a function like a kernel: each returned site's distribution or value."""
    block = block_of(program.binding, sizes)

    def kernel(draw: DrawState, shared: BlockData) -> dict[str, Any]:
        trace = _trace_model(program, block, draw, shared)
        messages = {name: trace[name] for name in program.returns}
        return {n: m["fn"] if m["type"] == "sample" else m["value"] for n, m in messages.items()}

    return kernel


def site_readout(
    program: KernelSpec,
    sizes: Mapping[str, int],
    read: Callable[[Site, Mapping[str, Any]], tuple[Dims, Any]],
) -> Kernel:
    """Make the kernel that applies ``read`` to each site of ``program.returns``.

    ``read`` takes the site and its message, and returns dims and a value. In the message,
    ``fixed`` is a pair of the site's fixed values and the mask of their cells, or None.
    """
    return _make_kernel(program, sizes, read)


def _make_kernel(
    program: KernelSpec,
    sizes: Mapping[str, int],
    read: Callable[[Site, Mapping[str, Any]], tuple[Dims, Any]],
) -> Kernel:
    """Make a kernel that runs the model for one draw and applies ``read`` to returned sites."""
    block = block_of(program.binding, sizes)
    per, dims = program.binding.per, program.dims
    cell_dims = {key: tuple(d for d in names if d not in per) for key, names in dims.items()}
    program = replace(program, dims=cell_dims)

    def evaluate(
        program: KernelSpec,
        draw: DrawState,
        shared: BlockData,
        scenario: Any = None,
    ) -> dict[str, jax.Array]:
        trace = _trace_model(program, block, draw, shared, scenario)
        fixed = fixed_values(program, block, draw, shared)
        masks = fixed_mask(program, fixed, scenario)
        args = arrange(program.binding, shared.arrays, program.dims, block)
        results = {}
        for name in program.returns:
            site = program.sites[name]
            dims, value = read(site, {**trace[name], "fixed": fixed.get(name)})
            value = mask_missing_inputs(
                program.binding, site, dims, jnp.asarray(value), args, masks.get(name, False)
            )
            results[name] = site_result(program, site, dims, value, sizes)
        return results

    kernel: Kernel = partial(evaluate, program)
    if program.scenarios is not None:
        kernel = partial(_run_scenarios, program, program.scenarios, evaluate, sizes)
    return map_cells(kernel, per, dims) if per else kernel


def _run_scenarios(
    program: KernelSpec,
    scenarios: ScenarioSet,
    evaluate: Callable[..., dict[str, jax.Array]],
    sizes: Mapping[str, int],
    draw: DrawState,
    shared: BlockData,
) -> dict[str, jax.Array]:
    """Run the kernel under every scenario, and contrast each with the baseline."""
    binding, arrays = program.binding, shared.arrays
    replaced = replace(program, dims=dims_replaced(scenarios, binding, program.dims))

    def evaluate_scenario(scenario_values: Any) -> dict[str, jax.Array]:
        replaced_data = shared._replace(arrays={**arrays, **scenario_values["arrays"]})
        return evaluate(replaced, draw, replaced_data, scenario_values)

    scenario_values = stack_values(scenarios, program.sites, binding, program.dims, arrays, sizes)
    return map_scenarios(scenarios, evaluate_scenario, scenario_values)


def _trace_model(
    program: KernelSpec,
    block: Block,
    draw: DrawState,
    shared: BlockData,
    scenario: Any = None,
) -> Mapping[str, Any]:
    """Return the trace of the model on one block: latents substituted, other sites drawn."""
    arguments = arrange(program.binding, shared.arrays, program.dims, block)
    substitutes = dict(shared.params)
    fixed = fixed_values(program, block, draw, shared)
    for name, value in draw.latents.items():
        if name in fixed:
            continue
        shape = shape_in_model(program.sites[name], program.binding, block.sizes)
        substitutes[name] = jnp.reshape(value, shape)
    unaddressed_key = jax.random.wrap_key_data(draw.keys[UNADDRESSED], impl="threefry2x32")
    model = handlers.substitute(handlers.seed(program.model, unaddressed_key), data=substitutes)
    sample_site = draw_by_label(program, shared.words, draw.keys, fixed)
    wrapped_model = handlers.substitute(model, substitute_fn=sample_site)
    if any(program.sites[name].scanned for name in fixed):
        wrapped_model = ForwardScans(wrapped_model)
    if program.scenarios is not None and scenario is not None:
        wrapped_model = SetSites(wrapped_model, program.scenarios, scenario)
    tracer = handlers.trace(wrapped_model)
    try:
        trace = tracer.get_trace(**arguments)
    except Exception as error:
        # An exception of the model, of any class: raised unchanged, with a note of where it was.
        if not isinstance(error, AimzError):
            error.add_note(f"xr_aimz: {note_location(tracer.trace, arguments)}")
        raise
    check_trace(program, trace, substitutes)
    return trace


def map_cells(call: Kernel, per: tuple[str, ...], dims: Mapping[str, tuple[str, ...]]) -> Kernel:
    """Map the kernel of one cell over a block whose arrays have ``per`` as leading dims.

    Parameters
    ----------
    call : callable
        The kernel of one cell; its arguments are described in :mod:`xr_aimz.kernel.spec`.
    per : tuple of str
        The leading axes of all latents, and of all outputs of the result.
    dims : mapping of source key to tuple of str
        The dims of each array; those of ``per`` lead, in order.

    Returns
    -------
    callable
        The kernel of the block.
    """

    def call_cell(draw: DrawState, shared: BlockData) -> dict[str, jax.Array]:
        words = shared.words
        # A sum, so that the order in which the dims were named changes no draw.
        cell_words = sum((words[d] for d in per[1:]), start=words[per[0]])
        cell_keys = {name: fold_in(key, cell_words) for name, key in draw.keys.items()}
        other_words = {d: w for d, w in words.items() if d not in per}
        return call(draw._replace(keys=cell_keys), shared._replace(words=other_words))

    kernel: Kernel = call_cell
    for dim in reversed(per):
        kernel = _map_dim(kernel, dim, dims)
    return kernel


def _map_dim(call: Kernel, dim: str, dims: Mapping[str, tuple[str, ...]]) -> Kernel:
    """Map a kernel over ``dim``, axis 0 of the latents and of arrays and words that have it."""

    def call_mapped(draw: DrawState, shared: BlockData) -> dict[str, jax.Array]:
        shared_axes = BlockData(
            arrays={key: 0 if dim in dims[key] else None for key in shared.arrays},
            params=None,  # type: ignore[arg-type] # axes, not arrays
            words={d: 0 if d == dim else None for d in shared.words},
        )
        draw_axes = DrawState(None, 0)  # type: ignore[arg-type] # axes, not arrays
        return jax.vmap(call, in_axes=(draw_axes, shared_axes))(draw, shared)

    return call_mapped
