"""Steps of stochastic variational inference over the batches of one window, compiled once.

The optimizer's whole state is passed in and given back. What it holds for the labels of a
window is gathered in the order of the window's rows, so that a step takes slices of it as
it takes slices of the data; at the end of the window it goes back to its place.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide, AutoGuideList

from xr_aimz.batches import Visit
from xr_aimz.binding import arrange, block_of
from xr_aimz.fingerprint import traced_fingerprint
from xr_aimz.infer.coverage import check_guide
from xr_aimz.infer.entries import Entries, entries_of
from xr_aimz.infer.iterates import AverageOptimizer
from xr_aimz.infer.problem import Problem
from xr_aimz.infer.reflection import reflected
from xr_aimz.infer.scaled import scaled, scales
from xr_aimz.labels import label_words
from xr_aimz.model import Block, tracing
from xr_aimz.stream import Stream

__all__ = ["Training", "training"]

_PIECE = 2**20
Leaves = list[Any]


@dataclass(frozen=True, eq=False)
class Training:
    """How a guide is trained on a stream of batches.

    Parameters
    ----------
    problem : Problem
    data : Stream
    block : Block
        Of a batch.
    svi : SVI
        With the scaled model and guide.
    guide : callable
        The guide itself.
    start : list of array
        The leaves of the state before the first step, those with entries as rows.
    structure : treedef
    entries : list of Entries or None
        Of each leaf.
    """

    problem: Problem
    data: Stream
    block: Block
    svi: SVI
    guide: Callable
    start: Leaves
    structure: Any
    entries: list[Entries | None]
    _programs: dict[str, Any] = field(default_factory=dict)

    def arguments(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """The model's arguments for the arrays of a batch."""
        inputs, binding = self.problem.inputs, self.problem.binding
        assert inputs is not None
        assert binding is not None
        return arrange(binding, arrays, inputs.dims, self.block)

    def params(self, leaves: Leaves) -> dict[str, Any]:
        """The guide's parameters, and the model's, those with entries whole."""
        whole = [a if e is None else e.folded(a) for a, e in self._paired(leaves)]
        return self.svi.get_params(jax.tree.unflatten(self.structure, whole))

    def result(self, leaves: Leaves) -> Leaves:
        """The leaves of a state with the params that count: averaged, where they are."""
        optim = self.svi.optim
        if not isinstance(optim, AverageOptimizer):
            return leaves
        state = jax.tree.unflatten(self.structure, leaves)
        params = optim.result(state.optim_state)
        return jax.tree.leaves(state._replace(optim_state=optim.init(params)))

    def part(self, leaves: Leaves, starts: Mapping[str, Any]) -> Any:
        """The state for the batch that begins at ``starts`` in the Dataset's own order."""
        sizes = self.data.batches.sizes
        cut = [
            a if e is None else e.folded(e.cut(a, starts, sizes)) for a, e in self._paired(leaves)
        ]
        return jax.tree.unflatten(self.structure, cut)

    def mutable(self, leaves: Leaves) -> dict[str, Any]:
        return dict(jax.tree.unflatten(self.structure, leaves).mutable_state or {})

    def advance(
        self, leaves: Leaves, visit: Visit, arrays: Mapping[str, Any], span: tuple[int, int]
    ) -> tuple[Leaves, np.ndarray]:
        """Take the steps from the first to before the second of ``span``; give their losses.

        ``leaves`` are consumed.
        """
        made = self.data.batches
        starts = np.zeros((made.most, len(made.sizes)), np.int32)
        starts[: len(visit.starts)] = visit.starts
        positions = self._positions(visit)
        turns = {d: np.int32(n) for d, n in visit.turns.items()}
        passed = (
            leaves,
            {**self.data.static, **arrays},
            turns,
            positions,
            starts,
            *map(np.int32, span),
        )
        if "advance" not in self._programs:
            with tracing(self.block):
                lowered = jax.jit(self._steps, donate_argnums=0).lower(*passed)
            self._programs["advance"] = lowered.compile()
        leaves, losses = self._programs["advance"](*passed)
        return leaves, np.asarray(losses)[slice(*span)]

    def _positions(self, visit: Visit) -> dict[str, np.ndarray]:
        made = self.data.batches
        needed = {d for e in self.entries if e is not None for d in e.batched}
        found = {}
        for d in needed:
            # Past the end of the Dataset: the padding of a shorter window has no entries.
            places = made.lengths[d] + np.arange(made.longest(d), dtype=np.int32)
            own = self.data.positions(visit, d)
            places[: len(own)] = own
            found[d] = places
        return found

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
        here = [a if e is None else e.gather(a, positions) for a, e in self._paired(leaves)]
        losses = jnp.zeros(len(starts), jnp.result_type(float))

        def step(number: Any, carry: tuple[Leaves, Any]) -> tuple[Leaves, Any]:
            now, losses = carry
            at = dict(zip(self.data.batches.sizes, starts[number], strict=True))
            batch = self._batch(arrays, turns, at)
            # Read out of the window before the step writes into it: else XLA copies it whole.
            state = jax.lax.optimization_barrier(self.part(now, at))
            new, loss = self.svi.update(state, **self.arguments(batch))
            sizes = self.block.sizes
            now = [
                b if e is None else e.paste(a, e.rows(b, sizes), at)
                for (a, e), b in zip(self._paired(now), jax.tree.leaves(new), strict=True)
            ]
            return now, losses.at[number].set(loss)

        # What lax.scan compiles to as well; but a window may have fewer batches than another.
        here, losses = jax.lax.fori_loop(first, stop, step, (here, losses))
        back = [
            b if e is None else e.scatter(a, b, positions)
            for (a, e), b in zip(self._paired(leaves), here, strict=True)
        ]
        return back, losses

    def _batch(
        self,
        arrays: Mapping[str, Any],
        turns: Mapping[str, Any],
        starts: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The arrays of a batch: a slice of permuted rows."""
        found, made = dict(arrays), self.data.batches
        places = {d: (start + turns.get(d, 0)) % made.lengths[d] for d, start in starts.items()}
        for key, dims in self.data.batched.items():
            for axis, d in ((i, d) for i, d in enumerate(dims) if d in places):
                found[key] = jax.lax.dynamic_slice_in_dim(
                    found[key], places[d], made.sizes[d], axis
                )
        return found

    def _paired(self, leaves: Leaves) -> Any:
        return zip(leaves, self.entries, strict=True)

    def digest(self) -> tuple[str, str]:
        """Names for the data and the loss, and for the way it is optimized."""
        zero = dict.fromkeys(self.data.batches.sizes, 0)
        state = self.part(self.start, zero)
        first = {k: np.asarray(a) for k, a in self.data.first.items()}
        with tracing(self.block):
            loss = traced_fingerprint(
                lambda s, a: self.svi.evaluate(s, **self.arguments(a)), state, first
            )
            update = traced_fingerprint(
                lambda s, a: self.svi.update(s, **self.arguments(a)), state, first
            )
        return _mixed(loss, self._seen()), update

    def _seen(self) -> str:
        """The labels, the plan of the windows and the first batch: not all of the data."""
        inputs, made = self.problem.inputs, self.data.batches
        assert inputs is not None
        found = hashlib.sha256(repr(made).encode())
        for d, size in made.lengths.items():
            found.update(f"{d} {size}".encode())
            labels = inputs.labels.get(d)
            if labels is None:
                continue
            # Piece by piece: the words of very many labels weigh as much as data.
            for start in range(0, size, _PIECE):
                piece = labels[start : start + _PIECE]
                found.update(label_words(d, piece, size=len(piece)).tobytes())
        for key in sorted(self.data.first):
            found.update(np.ascontiguousarray(self.data.first[key]).tobytes())
        return found.hexdigest()


def _mixed(*names: str) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()


def training(problem: Problem, svi: SVI, data: Stream, key: Any) -> Training:
    """Start an inference on a stream: trace it, and find what it holds for each label."""
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    sizes = {**inputs.sizes, **data.batches.sizes}
    block, first = block_of(binding, sizes), data.first
    own, guide = _scaled(problem, svi, data)
    arguments = arrange(binding, first, inputs.dims, block)
    with tracing(block):
        state = own.init(key, **arguments)
        check_guide(replace(problem, arguments=arguments), guide, own.get_params(state))
    leaves, structure = jax.tree.flatten(state)
    grown = {d: _grown(problem, svi, data, sizes, d) for d in data.batches.sizes}
    entries = entries_of(leaves, grown, binding, sizes)
    start = [
        jnp.array(a) if e is None else e.repeated(e.rows(a, sizes), inputs.sizes)
        for a, e in zip(leaves, entries, strict=True)
    ]
    return Training(problem, data, block, own, guide, start, structure, entries)


def _scaled(problem: Problem, svi: SVI, data: Stream) -> tuple[SVI, Callable]:
    """The inference that counts a batch for all of the data, and its guide."""
    assert problem.binding is not None
    by = scales(problem.sites, problem.binding, data.batches)
    guide = _fresh(svi.guide)
    model = scaled(problem.model, by)
    loss = reflected(svi.loss, guide)
    own = SVI(model, scaled(guide, by), svi.optim, loss, **svi.static_kwargs)
    return own, guide


def _fresh(guide: Any) -> Any:
    """A guide that has not seen any data: NumPyro's remember the shapes that they saw first."""
    if not isinstance(guide, AutoGuide):
        return guide
    made = copy.copy(guide)
    made.prototype_trace = None
    made._prototype_frames, made._prototype_frame_full_sizes = {}, {}
    if isinstance(made, AutoGuideList):
        made._guides = [_fresh(part) for part in made._guides]
    return made


def _grown(problem: Problem, svi: SVI, data: Stream, sizes: Mapping[str, int], dim: str) -> Leaves:
    """The shapes of a state for a batch that is one longer along a dimension."""
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    longer = {**sizes, dim: sizes[dim] + 1}
    block = block_of(binding, longer)
    own, _ = _scaled(problem, svi, data)

    def start(arrays: Mapping[str, Any]) -> Any:
        return own.init(jax.random.key(0), **arrange(binding, arrays, inputs.dims, block))

    structs = {
        k: jax.ShapeDtypeStruct(tuple(longer[d] for d in inputs.dims[k]), a.dtype)
        for k, a in data.first.items()
    }
    with tracing(block):
        return jax.tree.leaves(jax.eval_shape(start, structs))
