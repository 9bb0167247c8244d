"""Compile a kernel once for a block's shape, and run it over draws on every device.

Draws are independent given their labels, so they are what is shared out: each device
takes its part of the draws of a block and maps the kernel over them. Compiled programs
are kept by what they were made from, once per process; a task only ever calls one.
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

from xr_aimz.fingerprint import RecentlyUsed, program_fingerprint
from xr_aimz.index_bounds import has_positions
from xr_aimz.kernel import Call
from xr_aimz.model import Block, tracing
from xr_aimz.scans import recursion_lengths

__all__ = ["may_index", "recursions_of", "run", "trace", "traced"]

# A program takes 55 to 220 of the 65 530 mappings of memory that Linux lets a process have
# (normal and Poisson outcomes, jax 0.10; half of that with 0.12).
_compiled = RecentlyUsed[Any](128)
# The last traces, for a task of this process that compiles one: a model runs in Python each
# time it is traced.
_traces = RecentlyUsed[Any](16)
# The lengths of the scans of programs that were traced.
_recursions = RecentlyUsed[frozenset[int]](1024)
# Whether they take entries by position.
_indexing = RecentlyUsed[bool](1024)
# How many elements one step of the map over draws should have: measured on two cores, see
# docs/decisions. Fewer leave XLA's threads idle, more do not fit the cache.
_STEP_ELEMENTS = 2**18
_STEP_DRAWS = 16
# XLA uses half of a wide vector unit unless told: 1.7 times the time of a draw, measured.
# Where there is none the compiler uses what there is.
_COMPILER = defaultdict[str, dict[str, Any]](dict, cpu={"xla_cpu_prefer_vector_width": 512})


def traced(call: Call, block: Block, draw: Any, shared: Any) -> tuple[dict[str, Any], str]:
    """Shape and dtype of each output for one draw, and a name for the traced program.

    Nothing is computed. The name is a fingerprint of what the trace found, constants included,
    so a model that was reloaded, or that reads a global which has changed, is another
    program.
    """
    _, outputs, name = trace(call, block, draw, shared)
    return outputs, name


def trace(
    call: Call, block: Block, draw: Any, shared: Any
) -> tuple[ClosedJaxpr, dict[str, Any], str]:
    """The traced program, with what :func:`traced` says of it."""
    with tracing(block):
        closed, outputs = jax.make_jaxpr(call, return_shape=True)(draw, shared)
        name = program_fingerprint(closed)
        _recursions.put(name, recursion_lengths(closed))
        _indexing.put(name, has_positions(closed))
        _traces.put((name, _avals((draw, shared))), (closed, outputs))
    return closed, outputs, name


def recursions_of(name: str) -> frozenset[int] | None:
    """The lengths of the scans and running sums of a program that :func:`traced` named."""
    return _recursions.get(name)


def may_index(name: str) -> bool:
    """Whether a program that :func:`traced` named may take entries by position."""
    return _indexing.get(name) is not False


def run(
    name: str, make_call: Callable[[], Call], block: Block, draws: Any, shared: Any
) -> dict[str, np.ndarray]:
    """Map a kernel over the leading axis of ``draws``, on all local devices.

    Parameters
    ----------
    name : str
        What :func:`traced` called the program behind ``make_call``.
    make_call : callable
        Makes the kernel; called only when there is something to compile.
    block : Block
    draws, shared : pytree of numpy arrays
        What changes from draw to draw, and what does not.

    Returns
    -------
    dict of numpy.ndarray
        With the draws as their leading axis.
    """
    devices = jax.local_devices()
    count = len(jax.tree.leaves(draws)[0])
    spare = -count % len(devices)
    draws = jax.tree.map(lambda x: _padded(x, spare), draws)
    key = (name, _signature(block), len(devices), _avals(draws), _avals(shared))
    program = _compiled.get(key)
    if program is None:
        program = _compile(key, make_call, block, draws, shared, devices)
    outputs = program(draws, shared)
    return {site: np.asarray(value)[:count] for site, value in outputs.items()}


def _compile(
    key: Any, make_call: Callable[[], Call], block: Block, draws: Any, shared: Any, devices: list
) -> Any:
    with tracing(block):
        # Another thread may have compiled it while this one waited for the lock.
        program = _compiled.get(key)
        if program is None:
            mapped = _over_draws(key[0], make_call, draws, shared, devices)
            jitted = jax.jit(mapped, compiler_options=_COMPILER[devices[0].platform])
            program = jitted.lower(_structs(draws), _structs(shared)).compile()
            _compiled.put(key, program)
        return program


def _over_draws(
    name: str, make_call: Callable[[], Call], draws: Any, shared: Any, devices: list
) -> Callable:
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), draws)
    kept = _traces.get((name, _avals((one, shared))))
    closed, outputs = kept or jax.make_jaxpr(make_call(), return_shape=True)(one, _structs(shared))
    structure = jax.tree.structure(outputs)
    elements = max([prod(o.shape) for o in jax.tree.leaves(outputs)] + [1])
    count = len(jax.tree.leaves(draws)[0]) // len(devices)
    step = _step(count, elements)

    def traced_call(draw: Any, shared: Any) -> Any:
        found = jaxpr_as_fun(closed)(*jax.tree.leaves((draw, shared)))
        return jax.tree.unflatten(structure, found)

    def mapped(draws: Any, shared: Any) -> Any:
        return jax.lax.map(lambda draw: traced_call(draw, shared), draws, batch_size=step)

    if len(devices) == 1:
        return mapped
    mesh = Mesh(np.array(devices), ("draw",))
    spread, whole = PartitionSpec("draw"), PartitionSpec()
    return jax.shard_map(
        mapped, mesh=mesh, in_specs=(spread, whole), out_specs=spread, check_vma=False
    )


def _step(count: int, elements: int) -> int:
    """Draws in one step of the map: if it can be, a divisor, so that no rest is compiled."""
    # lax.map without a batch size runs on one core from jax 0.12 on.
    most = min(max(_STEP_DRAWS, _STEP_ELEMENTS // elements), count)
    divisor = max(n for n in range(1, most + 1) if count % n == 0)
    return divisor if 2 * divisor >= most else most


def _padded(x: np.ndarray, spare: int) -> np.ndarray:
    return np.concatenate([x, np.repeat(x[-1:], spare, axis=0)]) if spare else x


def _structs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree)


def _avals(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype)) for x in leaves)


def _signature(block: Block) -> Any:
    return tuple(sorted(block.sizes.items())), tuple(sorted(block.places.items())), block.table
