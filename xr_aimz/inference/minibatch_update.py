"""Compile one step of a minibatch fit: a state and a batch in, the updated state and a loss out.

:func:`make_update` scales the likelihood of a batch to all data and finds the leaves of the state
that have entries for labels; :class:`MinibatchUpdate` runs the steps of a window.
:func:`sample_local_guide` draws latents with entries for labels, block by block.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide, AutoGuideList

from xr_aimz.binding import arrange, block_of
from xr_aimz.inference.iterates import AverageOptimizer
from xr_aimz.inference.local_params import (
    LabelAxes,
    find_label_axes,
    find_site_axes,
    likelihood_scales,
    local_sites,
    scale_likelihood,
)
from xr_aimz.inference.minibatch_data import Window, WindowReader
from xr_aimz.inference.problem import InferenceProblem
from xr_aimz.inference.reflection import reflect_loss
from xr_aimz.inference.variational import check_guide
from xr_aimz.random import hash_labels
from xr_aimz.tracing import Block, trace_lock, traced_fingerprint

_LABELS_A_CHUNK = 2**20
Leaves = list[Any]


@dataclass(frozen=True, eq=False)
class MinibatchUpdate:
    """Compiled update of a guide that is trained on a stream of batches.

    Parameters
    ----------
    problem : InferenceProblem
    data : WindowReader
    block : Block
        The block of a batch.
    svi : SVI
        With the scaled model and guide.
    guide : callable
        The guide itself.
    start : list of array
        The leaves of the state before the first step, those with entries as rows.
    structure : treedef
        The structure of the state.
    entries : list of LabelAxes or None
        For each leaf, its axes along batched dims; None where it has none.
    """

    problem: InferenceProblem
    data: WindowReader
    block: Block
    svi: SVI
    guide: Callable
    start: Leaves
    structure: Any
    entries: list[LabelAxes | None]
    _programs: dict[str, Any] = field(default_factory=dict)

    def arguments(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Arrange the arrays of a batch as the arguments of the model."""
        inputs, binding = self.problem.inputs, self.problem.binding
        assert inputs is not None
        assert binding is not None
        return arrange(binding, arrays, inputs.dims, self.block)

    def params(self, leaves: Leaves) -> dict[str, Any]:
        """Return the params of the guide and the model, with all entries along label axes."""
        complete = [a if e is None else e.folded(a) for a, e in self._paired(leaves)]
        return self.svi.get_params(jax.tree.unflatten(self.structure, complete))

    def result(self, leaves: Leaves) -> Leaves:
        """Return the leaves with the final params, averaged if the optimizer does so."""
        optim = self.svi.optim
        if not isinstance(optim, AverageOptimizer):
            return leaves
        state = jax.tree.unflatten(self.structure, leaves)
        params = optim.result(state.optim_state)
        return jax.tree.leaves(state._replace(optim_state=optim.init(params)))

    def part(self, leaves: Leaves, starts: Mapping[str, Any]) -> Any:
        """Return the state for the batch that begins at ``starts`` in the order of the Dataset."""
        sizes = self.data.batches.sizes
        batch_leaves = [
            a if e is None else e.folded(e.cut(a, starts, sizes)) for a, e in self._paired(leaves)
        ]
        return jax.tree.unflatten(self.structure, batch_leaves)

    def mutable(self, leaves: Leaves) -> dict[str, Any]:
        return dict(jax.tree.unflatten(self.structure, leaves).mutable_state or {})

    def advance(
        self, leaves: Leaves, window: Window, arrays: Mapping[str, Any], span: tuple[int, int]
    ) -> tuple[Leaves, np.ndarray]:
        """Take the steps ``span[0]`` to ``span[1] - 1``; return the leaves and losses ``(step,)``.

        ``leaves`` are donated, so they cannot be used afterwards.
        """
        batches = self.data.batches
        starts = np.zeros((batches.most, len(batches.sizes)), np.int32)
        starts[: len(window.starts)] = window.starts
        positions = self._positions(window)
        turns = {d: np.int32(n) for d, n in window.turns.items()}
        operands = (
            leaves,
            {**self.data.static, **arrays},
            turns,
            positions,
            starts,
            *map(np.int32, span),
        )
        if "advance" not in self._programs:
            with trace_lock(self.block):
                lowered = jax.jit(self._steps, donate_argnums=0).lower(*operands)
            self._programs["advance"] = lowered.compile()
        leaves, losses = self._programs["advance"](*operands)
        return leaves, np.asarray(losses)[slice(*span)]

    def _positions(self, window: Window) -> dict[str, np.ndarray]:
        batches = self.data.batches
        needed_dims = {d for e in self.entries if e is not None for d in e.batched}
        result = {}
        for d in needed_dims:
            # Positions past the end of the Dataset: padding of a shorter window has no entries.
            offsets = batches.lengths[d] + np.arange(batches.longest(d), dtype=np.int32)
            row_positions = self.data.positions(window, d)
            offsets[: len(row_positions)] = row_positions
            result[d] = offsets
        return result

    def _steps(
        self,
        leaves: Leaves,
        arrays: Mapping[str, Any],
        turns: Mapping[str, Any],
        positions: Mapping[str, Any],
        starts: Any,
        first: Any,
        stop: Any,
    ) -> tuple[Leaves, Any]:
        gathered = [a if e is None else e.gather(a, positions) for a, e in self._paired(leaves)]
        losses = jnp.zeros(len(starts), jnp.result_type(float))

        def step(number: Any, carry: tuple[Leaves, Any]) -> tuple[Leaves, Any]:
            current, losses = carry
            offset = dict(zip(self.data.batches.sizes, starts[number], strict=True))
            batch = self._batch(arrays, turns, offset)
            # Read the batch before the step writes into the window: else XLA copies the window.
            state = jax.lax.optimization_barrier(self.part(current, offset))
            new, loss = self.svi.update(state, **self.arguments(batch))
            sizes = self.block.sizes
            current = [
                b if e is None else e.paste(a, e.rows(b, sizes), offset)
                for (a, e), b in zip(self._paired(current), jax.tree.leaves(new), strict=True)
            ]
            return current, losses.at[number].set(loss)

        # lax.scan compiles to the same loop, but windows differ in their number of batches.
        gathered, losses = jax.lax.fori_loop(first, stop, step, (gathered, losses))
        scattered = [
            b if e is None else e.scatter(a, b, positions)
            for (a, e), b in zip(self._paired(leaves), gathered, strict=True)
        ]
        return scattered, losses

    def _batch(
        self,
        arrays: Mapping[str, Any],
        turns: Mapping[str, Any],
        starts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Slice the arrays of a batch from permuted rows."""
        result, batches = dict(arrays), self.data.batches
        offsets = {
            d: (start + turns.get(d, 0)) % batches.lengths[d] for d, start in starts.items()
        }
        for key, dims in self.data.batched.items():
            for axis, d in ((i, d) for i, d in enumerate(dims) if d in offsets):
                result[key] = jax.lax.dynamic_slice_in_dim(
                    result[key], offsets[d], batches.sizes[d], axis
                )
        return result

    def _paired(self, leaves: Leaves) -> Any:
        return zip(leaves, self.entries, strict=True)

    def digest(self) -> tuple[str, str]:
        """Return fingerprints of the data with the loss, and of the optimization."""
        zero = dict.fromkeys(self.data.batches.sizes, 0)
        state = self.part(self.start, zero)
        first = {k: np.asarray(a) for k, a in self.data.first.items()}
        with trace_lock(self.block):
            loss = traced_fingerprint(
                lambda s, a: self.svi.evaluate(s, **self.arguments(a)), state, first
            )
            update = traced_fingerprint(
                lambda s, a: self.svi.update(s, **self.arguments(a)), state, first
            )
        return _hash_names(loss, self._seen()), update

    def _seen(self) -> str:
        """Return a digest of the labels, the window plan and the first batch, not of all data."""
        inputs, batches = self.problem.inputs, self.data.batches
        assert inputs is not None
        # With the name that the class had when fits were first saved.
        plan = f"Batches{repr(batches).removeprefix(type(batches).__name__)}"
        result = hashlib.sha256(plan.encode())
        for d, size in batches.lengths.items():
            result.update(f"{d} {size}".encode())
            labels = inputs.labels.get(d)
            if labels is None:
                continue
            # In chunks: the hashes of very many labels take as much memory as data.
            for start in range(0, size, _LABELS_A_CHUNK):
                chunk = labels[start : start + _LABELS_A_CHUNK]
                result.update(hash_labels(d, chunk, size=len(chunk)).tobytes())
        for key in sorted(self.data.first):
            result.update(np.ascontiguousarray(self.data.first[key]).tobytes())
        return result.hexdigest()


def _hash_names(*names: str) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


def make_update(
    problem: InferenceProblem, svi: SVI, data: WindowReader, key: Any
) -> MinibatchUpdate:
    """Trace an SVI on the first batch, and find the leaves with entries for labels."""
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    sizes = {**inputs.sizes, **data.batches.sizes}
    block, first = block_of(binding, sizes), data.first
    scaled_svi, guide = _scale_svi(problem, svi, data)
    arguments = arrange(binding, first, inputs.dims, block)
    with trace_lock(block):
        state = scaled_svi.init(key, **arguments)
        check_guide(replace(problem, arguments=arguments), guide, scaled_svi.get_params(state))
    leaves, structure = jax.tree.flatten(state)
    longer = {d: _longer_structs(problem, svi, data, sizes, d) for d in data.batches.sizes}
    entries = find_label_axes(leaves, longer, binding, sizes)
    start = [
        jnp.array(a) if e is None else e.repeated(e.rows(a, sizes), inputs.sizes)
        for a, e in zip(leaves, entries, strict=True)
    ]
    return MinibatchUpdate(problem, data, block, scaled_svi, guide, start, structure, entries)


def _scale_svi(problem: InferenceProblem, svi: SVI, data: WindowReader) -> tuple[SVI, Callable]:
    """Return the SVI whose likelihood of a batch is scaled to all data, and its guide."""
    assert problem.binding is not None
    scales = likelihood_scales(problem.sites, problem.binding, data.batches)
    guide = _reset_guide(svi.guide)
    model = scale_likelihood(problem.model, scales)
    loss = reflect_loss(svi.loss, guide)
    scaled_svi = SVI(model, scale_likelihood(guide, scales), svi.optim, loss, **svi.static_kwargs)
    return scaled_svi, guide


def _reset_guide(guide: Any) -> Any:
    """Copy a guide without traces: NumPyro's autoguides keep the shapes of their first data."""
    if not isinstance(guide, AutoGuide):
        return guide
    copied = copy.copy(guide)
    copied.prototype_trace = None
    copied._prototype_frames, copied._prototype_frame_full_sizes = {}, {}
    if isinstance(copied, AutoGuideList):
        copied._guides = [_reset_guide(part) for part in copied._guides]
    return copied


def _longer_structs(
    problem: InferenceProblem, svi: SVI, data: WindowReader, sizes: Mapping[str, int], dim: str
) -> Leaves:
    """Return the shapes of a state for a batch that is longer by 1 along a dim."""
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    longer = {**sizes, dim: sizes[dim] + 1}
    block = block_of(binding, longer)
    scaled_svi, _ = _scale_svi(problem, svi, data)

    def start(arrays: Mapping[str, Any]) -> Any:
        return scaled_svi.init(jax.random.key(0), **arrange(binding, arrays, inputs.dims, block))

    structs = {
        k: jax.ShapeDtypeStruct(tuple(longer[d] for d in inputs.dims[k]), a.dtype)
        for k, a in data.first.items()
    }
    with trace_lock(block):
        return jax.tree.leaves(jax.eval_shape(start, structs))


def sample_local_guide(
    ready: MinibatchUpdate, leaves: list[Any], key: Any, draws: int
) -> dict[str, np.ndarray]:
    """Draw every latent site, ``(1, draw, *site axes)``, over the whole Dataset."""
    problem, batches = ready.problem, ready.data.batches
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    sites = problem.sites
    local = local_sites(problem, batches.sizes)
    entries = {n: find_site_axes(sites[n], binding, batches.sizes) for n in local}
    out: dict[str, np.ndarray] = {}
    shared_values: dict[str, Any] = {}
    with trace_lock(ready.block):
        draw = jax.jit(jax.vmap(_make_block_draw(ready), in_axes=(0, None, 0)))
        for number, starts in enumerate(_block_starts(batches.sizes, batches.lengths)):
            keys = jax.random.split(jax.random.fold_in(key, number), draws)
            values = draw(keys, ready.part(leaves, starts), shared_values)
            shared_values = shared_values or {n: v for n, v in values.items() if n not in local}
            for n, e in entries.items():
                rows = np.asarray(e.rows(values[n], ready.block.sizes))
                lengths = [batches.lengths[d] for d in e.batched]
                if n not in out:
                    out[n] = np.empty((*lengths, *rows.shape[len(lengths) :]), rows.dtype)
                out[n][
                    tuple(slice(starts[d], starts[d] + batches.sizes[d]) for d in e.batched)
                ] = rows
    local_values = {n: np.asarray(entries[n].folded(rows)) for n, rows in out.items()}
    return {n: np.asarray(v)[None] for n, v in {**shared_values, **local_values}.items()}


def _make_block_draw(update: MinibatchUpdate) -> Any:
    """Make a function that draws the latents of one block, with fixed values of some sites."""
    latent = update.problem.named("latent")
    arguments = update.arguments(update.data.first)

    def draw_block(key: Any, state: Any, fixed: Mapping[str, Any]) -> dict[str, Any]:
        substituted = {**update.svi.get_params(state), **fixed}
        guide = handlers.substitute(handlers.seed(update.guide, key), data=substituted)
        trace = handlers.trace(guide).get_trace(**arguments)
        return {name: trace[name]["value"] for name in latent}

    return draw_block


def _block_starts(
    sizes: Mapping[str, int], lengths: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Yield starts of blocks of a batch's size that cover all labels; the last may overlap."""
    starts = (
        [min(k, lengths[d] - size) for k in range(0, lengths[d], size)]
        for d, size in sizes.items()
    )
    for block_start in product(*starts):
        yield dict(zip(sizes, block_start, strict=True))
