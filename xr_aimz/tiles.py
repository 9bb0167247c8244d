"""One compiled program for a tile of cells, whatever the region.

A tile has a fixed number of cells; the last one is filled up with a cell of its own. The
program is therefore the same for a continent and for a single cell, and what it gives for
a cell depends on that cell alone: the key of a cell is folded from its labels, no lane of
the map reads another, and each lane is computed by the same instructions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xr_aimz import keys
from xr_aimz.binding import Binding, arrange
from xr_aimz.fingerprint import RecentlyUsed, program_fingerprint
from xr_aimz.infer.cells import OK, CellMethod, Lane, cell_status, deterministics
from xr_aimz.infer.problem import Problem
from xr_aimz.model import tracing

__all__ = ["Cells", "Tiles", "tiles"]

# A program takes 350 (Laplace) to 625 (NUTS) of the 65 530 mappings of memory that Linux lets a
# process have.
_compiled = RecentlyUsed[Any](16)
# Lanes whose results are thrown away. A loop over lanes is vectorized, and its last turns may
# be done one by one, with other roundings; chains are chaotic, and double such a difference
# at every step (docs/decisions/cells.md).
_SPARE = 16
# XLA uses half of a wide vector unit unless told: up to a tenth less time for a tile, measured.
_COMPILER = defaultdict[str, dict[str, Any]](dict, cpu={"xla_cpu_prefer_vector_width": 512})
# Tiles run one after another: two programs with loops in them, run at once from two threads,
# waited for each other's threads for good (docs/decisions/cells.md).


class Cells(NamedTuple):
    """What a tile gives, the cells' axis first.

    ``samples`` and ``stats`` are arrays ``(cell, chain, draw, ...)`` by name, NaN where the
    ``status`` is not ok; ``losses`` are ``(cell, step)``, or None.
    """

    samples: dict[str, Any]
    stats: dict[str, Any]
    losses: Any
    status: Any


@dataclass(frozen=True)
class Tiles:
    """A compiled inference for tiles of cells.

    Parameters
    ----------
    program : callable
        From the seed's key, a tile's words and arrays, and the arrays that all cells share.
    digest : str
        Of what was traced: the model, the method and its options, the shapes.
    cells : int
        In a tile.
    outputs : Cells
        Shapes and dtypes of what a tile gives.
    """

    program: Callable
    digest: str
    cells: int
    outputs: Cells

    def run(
        self,
        seed: np.ndarray,
        words: np.ndarray,
        own: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
    ) -> Iterator[Cells]:
        """Fit any number of cells: what each tile gives, in order, on the host.

        Parameters
        ----------
        seed : array of uint32 (2,)
        words : array of uint32 (cell, 2)
            Of each cell, from its labels.
        own, shared : mapping of source key to array
            Those that differ from cell to cell, the cells' axis first, and the others.
        """
        for start in range(0, len(words), self.cells):
            piece = slice(start, start + self.cells)
            count = len(words[piece])
            tile = {key: self._filled(array[piece]) for key, array in own.items()}
            found = self.program(seed, self._filled(words[piece]), tile, dict(shared))
            yield jax.tree.map(lambda x, n=count: np.asarray(x)[:n], found)

    def _filled(self, part: np.ndarray) -> np.ndarray:
        # The first cell again: it has data, so that no lane runs longer than a cell of the
        # data's own would.
        spare = self.cells - len(part)
        return np.concatenate([part, np.repeat(part[:1], spare, axis=0)]) if spare else part


def tiles(
    method: CellMethod,
    problem: Problem,
    binding: Binding,
    dims: Mapping[str, tuple[str, ...]],
    structs: Mapping[str, jax.ShapeDtypeStruct],
    wanted: tuple[str, ...],
) -> Tiles:
    """Trace and compile an inference of one cell, mapped over a tile.

    Parameters
    ----------
    method : CellMethod
    problem : Problem
        The model and block of one cell.
    binding : Binding
    dims : mapping of source key to tuple of str
        Of each array, those of ``per`` among them.
    structs : mapping of source key to ShapeDtypeStruct
        Of each array, for one cell.
    wanted : tuple of str
        Deterministic sites to compute at the draws.
    """
    own = {k for k, found in dims.items() if set(found) & set(binding.per)}
    one = _one(method, problem, binding, dims, wanted)

    chains = method.shape[0]
    count = max(method.lanes // chains, 1)

    def tile(seed: Any, words: Any, mine: Any, shared: Any) -> Cells:
        lanes = jax.tree.map(lambda x: _lanes(jnp.repeat(x, chains, axis=0)), mine)
        found = jax.vmap(one, in_axes=(0, 0, None))(_keys(seed, words, chains), lanes, shared)
        return _cells(found, count, chains)

    word = jax.ShapeDtypeStruct((2,), np.uint32)
    mine = {k: _stacked(structs[k], count) for k in structs if k in own}
    shared = {k: structs[k] for k in structs if k not in own}
    with tracing(problem.block):
        traced = jax.jit(tile).trace(word, _stacked(word, count), mine, shared)
        digest = program_fingerprint(traced.jaxpr)
        program = _compiled.get(digest)
        if program is None:
            options = _COMPILER[jax.default_backend()]
            program = traced.lower().compile(compiler_options=options)
            _compiled.put(digest, program)
    outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    return Tiles(program, digest, count, outputs)


def _lanes(x: jax.Array) -> jax.Array:
    """With spare lanes at the end, of the first lane's own."""
    return jnp.concatenate([x, jnp.repeat(x[:1], _SPARE, axis=0)])


def _keys(seed: jax.Array, words: jax.Array, chains: int) -> jax.Array:
    """The key of each lane, from the labels of its cell and the number of its chain."""
    chain = jnp.stack([jnp.zeros(chains, jnp.uint32), jnp.arange(chains, dtype=jnp.uint32)], -1)
    each = jax.vmap(keys.fold, in_axes=(0, None))(keys.fold(seed, words), chain)
    return _lanes(each.reshape(-1, 2))


def _cells(found: Lane, count: int, chains: int) -> Cells:
    """The lanes of each cell together, less the spare ones."""

    def gathered(x: jax.Array) -> jax.Array:
        return x[: count * chains].reshape(count, chains, *x.shape[1:])

    lanes = jax.tree.map(gathered, found)
    status = cell_status(lanes.status)

    def drawn(x: jax.Array) -> jax.Array:
        return jnp.where((status == OK).reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

    samples = jax.tree.map(drawn, lanes.samples)
    losses = None if lanes.losses is None else lanes.losses[:, 0]
    return Cells(samples, lanes.stats, losses, status)


def _one(
    method: CellMethod,
    problem: Problem,
    binding: Binding,
    dims: Mapping[str, tuple[str, ...]],
    wanted: tuple[str, ...],
) -> Callable[[Any, Any, Any], Lane]:
    seen = {k: tuple(d for d in found if d not in binding.per) for k, found in dims.items()}

    def one(words: Any, mine: Any, shared: Any) -> Lane:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        arguments = arrange(binding, {**shared, **mine}, seen, problem.block)
        lane = method.infer(problem, key, arguments)
        if not wanted:
            return lane
        further = deterministics(problem, arguments, lane.samples, wanted)
        return lane._replace(samples={**lane.samples, **further})

    return one


def _stacked(struct: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *struct.shape), struct.dtype)
