"""Compile a kernel once for each shape of block, and run it over draws on every device.

Draws are independent given their labels, so a block's draws are divided among the devices,
and each device maps the kernel over its part. Compiled programs are cached once per process
by the program's fingerprint, the block, the number of devices, and the shapes and dtypes of
the arguments; a task calls exactly one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh, PartitionSpec

from xr_aimz.kernel.spec import Kernel
from xr_aimz.tracing import (
    Block,
    LRUCache,
    has_positions,
    largest_product,
    program_fingerprint,
    recursion_lengths,
    trace_lock,
)

# A program takes 55 to 220 of the 65 530 mappings of memory that Linux lets a process have
# (normal and Poisson outcomes, jax 0.10; half of that with 0.12).
_compiled = LRUCache[Any](128)
# The latest traces, for tasks of this process that compile one: each trace runs the model in
# Python.
_traces = LRUCache[Any](16)
# Lengths of the scans and running sums of traced programs, by name.
_scan_lengths = LRUCache[frozenset[int]](1024)
# True for traced programs that take entries by position, by name.
_uses_positions = LRUCache[bool](1024)
# Elements of one batch of the map over draws: measured on two cores, see docs/decisions. Fewer
# leave XLA's threads idle, more do not fit the cache.
_BATCH_ELEMENTS = 2**18
_MIN_BATCH = 16
# By default XLA uses half of a wide vector unit: 1.7 times the time of a draw, measured. On a
# machine without one the compiler uses the widest unit that it has.
_OPTIONS = defaultdict[str, dict[str, Any]](dict, cpu={"xla_cpu_prefer_vector_width": 512})


def trace_outputs(
    call: Kernel, block: Block, draw: Any, shared: Any
) -> tuple[dict[str, Any], str]:
    """Return the shape and dtype of each output for one draw, and the traced program's name.

    Nothing is computed. The name is a fingerprint of the traced program, constants included,
    so a model that was reloaded with changes, or that reads a global which has changed, gets
    another name.
    """
    _, outputs, name = trace_program(call, block, draw, shared)
    return outputs, name


def trace_program(
    call: Kernel, block: Block, draw: Any, shared: Any
) -> tuple[ClosedJaxpr, dict[str, Any], str]:
    """Trace a kernel: return its program, and the outputs and name of :func:`trace_outputs`."""
    with trace_lock(block):
        closed, outputs = jax.make_jaxpr(call, return_shape=True)(draw, shared)
        name = program_fingerprint(closed)
        _scan_lengths.put(name, recursion_lengths(closed))
        _uses_positions.put(name, has_positions(closed))
        _traces.put((name, _avals((draw, shared))), (closed, outputs))
    return closed, outputs, name


def scan_lengths(name: str) -> frozenset[int] | None:
    """Return lengths of scans and running sums of the program of this name; None if unknown."""
    return _scan_lengths.get(name)


def may_take_by_position(name: str) -> bool:
    """Return whether the program of this name may take entries by position; True if unknown."""
    return _uses_positions.get(name) is not False


def run_draws(
    name: str, make_call: Callable[[], Kernel], block: Block, draws: Any, shared: Any
) -> dict[str, np.ndarray]:
    """Map a kernel over the leading axis of ``draws``, on all local devices.

    Parameters
    ----------
    name : str
        Name of the kernel's program, as :func:`trace_outputs` returned it.
    make_call : callable
        Makes the kernel; called only if the program has to be traced to compile it.
    block : Block
        The block; its sizes and batch axes are part of the program's key.
    draws, shared : pytree of numpy arrays
        Inputs with a leading draw axis, and inputs that all draws share.

    Returns
    -------
    dict of numpy.ndarray
        The outputs by site, with a leading draw axis.
    """
    devices = jax.local_devices()
    count = len(jax.tree.leaves(draws)[0])
    padding = -count % len(devices)
    draws = jax.tree.map(lambda x: _pad_draws(x, padding), draws)
    key = (name, _block_key(block), len(devices), _avals(draws), _avals(shared))
    program = _compiled.get(key)
    if program is None:
        program = _compile(key, make_call, block, draws, shared, devices)
    outputs = program(draws, shared)
    return {site: np.asarray(value)[:count] for site, value in outputs.items()}


def _compile(
    key: Any, make_call: Callable[[], Kernel], block: Block, draws: Any, shared: Any, devices: list
) -> Any:
    """Compile the kernel mapped over draws, and cache the program under ``key``."""
    with trace_lock(block):
        # Another thread may have compiled it while this one waited for the lock.
        program = _compiled.get(key)
        if program is None:
            mapped = _map_over_draws(key[0], make_call, draws, shared, devices)
            jitted = jax.jit(mapped, compiler_options=_OPTIONS[devices[0].platform])
            program = jitted.lower(_structs(draws), _structs(shared)).compile()
            _compiled.put(key, program)
        return program


def _map_over_draws(
    name: str, make_call: Callable[[], Kernel], draws: Any, shared: Any, devices: list
) -> Callable:
    """Return the kernel mapped over the draws in batches, divided among the devices."""
    draw_structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), draws)
    cached = _traces.get((name, _avals((draw_structs, shared))))
    closed, outputs = cached or jax.make_jaxpr(make_call(), return_shape=True)(
        draw_structs, _structs(shared)
    )
    structure = jax.tree.structure(outputs)
    elements = max([prod(o.shape) for o in jax.tree.leaves(outputs)] + [1])
    count = len(jax.tree.leaves(draws)[0]) // len(devices)
    batch_size = _choose_batch_size(count, elements, largest_product(closed))

    def traced_call(draw: Any, shared: Any) -> Any:
        leaves = jaxpr_as_fun(closed)(*jax.tree.leaves((draw, shared)))
        return jax.tree.unflatten(structure, leaves)

    def mapped(draws: Any, shared: Any) -> Any:
        return jax.lax.map(lambda draw: traced_call(draw, shared), draws, batch_size=batch_size)

    if len(devices) == 1:
        return mapped
    mesh = Mesh(np.array(devices), ("draw",))
    sharded, replicated = PartitionSpec("draw"), PartitionSpec()
    return jax.shard_map(
        mapped, mesh=mesh, in_specs=(sharded, replicated), out_specs=sharded, check_vma=False
    )


def _choose_batch_size(count: int, elements: int, product: int) -> int:
    """Return the draws in one batch of the map: a divisor if possible, to compile no remainder."""
    # lax.map without a batch size runs on one core from jax 0.12 on. That is as well for products
    # larger than the outputs, as in a network: tasks beside each other took 4.3 s for 7.7 s in
    # batches of 250, which held 0.25 GB more (docs/performance.md).
    least = 1 if product > elements else _MIN_BATCH
    limit = min(max(least, _BATCH_ELEMENTS // max(elements, product)), count)
    divisor = max(n for n in range(1, limit + 1) if count % n == 0)
    return divisor if 2 * divisor >= limit else limit


def _pad_draws(x: np.ndarray, padding: int) -> np.ndarray:
    """Append ``padding`` copies of the last draw."""
    return np.concatenate([x, np.repeat(x[-1:], padding, axis=0)]) if padding else x


def _structs(tree: Any) -> Any:
    """Replace arrays by their shapes and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def _avals(tree: Any) -> Any:
    """Return a hashable key: a pytree's structure, and its leaves' shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype)) for x in leaves)


def _block_key(block: Block) -> Any:
    """Return a hashable key of a block's sizes, batch axes and layout."""
    return tuple(sorted(block.sizes.items())), tuple(sorted(block.places.items())), block.table
