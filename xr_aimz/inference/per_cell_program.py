"""Compile the inference of one cell, mapped over the cells of a tile.

A :class:`CellMethod` (MCMC, SVI or Laplace) infers one chain of one cell as a pure function.
:func:`make_tile_program` maps it over cells and chains and compiles it once; a
:class:`TileProgram` runs it on any number of cells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.binding import Binding, arrange
from xr_aimz.errors import ModelError
from xr_aimz.inference.laplace import approximate, check_laplace_model
from xr_aimz.inference.mcmc import count_noun, max_tree_depth, without_deterministics
from xr_aimz.inference.problem import InferenceProblem
from xr_aimz.inference.variational import svi_for
from xr_aimz.random import fold_in
from xr_aimz.tracing import LRUCache, program_fingerprint, trace_lock

# Names of the status values 0, 1, 2, ...
FLAGS = ("ok", "no_data", "not_finite", "diverged", "no_mode")
OK, NO_DATA, NOT_FINITE, DIVERGED, NO_MODE = range(len(FLAGS))
# Chains that are mapped over at once. A mapped loop runs until its slowest cell is done, so few
# cells waste less; but each step has a fixed cost. Measured: docs/decisions/cells.md.
_MCMC_CHAINS, _SVI_CHAINS, _LAPLACE_CHAINS = 48, 112, 240
_MAX_LOSSES = 500


class ChainResult(NamedTuple):
    """Result of the inference of one chain in one cell.

    ``samples`` and ``stats`` are arrays ``(draw, ...)`` by name, ``losses`` the mean loss of
    each run of steps, or None; ``status`` is an index into :data:`FLAGS`.
    """

    samples: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    losses: jax.Array | None
    status: jax.Array


@dataclass(frozen=True)
class CellMethod:
    """Inference method for a single cell.

    Parameters
    ----------
    infer : callable
        From a problem, a chain's key and a cell's arguments to a :class:`ChainResult`; traceable.
    check : callable
        Raises an error for a problem that this method does not support.
    shape : tuple of int
        The number of chains, and of draws a chain.
    lanes : int
        The number of chains, over all cells of a tile, that are mapped over at once.
    name : str
    loss_steps : tuple of int
        The step after which each loss was taken.
    full_rate : float
        The share of the steps at the optimizer's full rate.
    max_tree_depth : int, optional
        Greatest depth of the trees of NUTS.
    """

    infer: Callable[[InferenceProblem, jax.Array, Mapping[str, Any]], ChainResult]
    check: Callable[[InferenceProblem], None]
    shape: tuple[int, int]
    lanes: int
    name: str
    loss_steps: tuple[int, ...] = ()
    full_rate: float = 1.0
    max_tree_depth: int | None = None


def mcmc_per_cell(
    make_kernel: Callable[[Callable], MCMCKernel], *, draws: int, chains: int, warmup: int
) -> CellMethod:
    """Make a method that runs MCMC in every cell, with a kernel made anew for each trace."""

    def infer(
        problem: InferenceProblem, key: jax.Array, arguments: Mapping[str, Any]
    ) -> ChainResult:
        sampler = MCMC(
            without_deterministics(make_kernel(problem.model)),
            num_warmup=warmup,
            num_samples=draws,
            progress_bar=False,
        )
        sampler.run(key, extra_fields=("diverging", "potential_energy", "num_steps"), **arguments)
        values, extra = sampler.get_samples(), sampler.get_extra_fields()
        samples = {name: values[name] for name in problem.named("latent")}
        finite = _all_finite([*samples.values(), extra["potential_energy"]])
        chain_status = jnp.where(jnp.all(extra["diverging"]), DIVERGED, OK)
        stats = {
            "diverging": extra["diverging"],
            "lp": -extra["potential_energy"],
            "n_steps": extra["num_steps"],
        }
        return ChainResult(samples, stats, None, jnp.where(finite, chain_status, NOT_FINITE))

    kernel = make_kernel(lambda: None)
    settings = f"{count_noun(chains, 'chain')}, {count_noun(warmup, 'warmup step')}"
    name = f"{type(kernel).__name__} per cell, {settings}"
    depth = max_tree_depth(kernel)
    return CellMethod(
        infer, _check_sites, (chains, draws), _MCMC_CHAINS, name, max_tree_depth=depth
    )


def svi_per_cell(
    guide: Any, optimizer: Any, init: Any, *, draws: int, steps: int, full_rate: float
) -> CellMethod:
    """Make a method that trains a guide in every cell: an autoguide class, new for each trace."""
    stride = -(-steps // _MAX_LOSSES)
    first = steps % stride

    def infer(
        problem: InferenceProblem, key: jax.Array, arguments: Mapping[str, Any]
    ) -> ChainResult:
        inference = svi_for(problem.model, guide, optimizer, init, steps)
        start, sample = jax.random.split(key)
        state = inference.init(start, **arguments)

        def walk(state: Any, length: int) -> tuple[Any, jax.Array]:
            def step(state: Any, _: None) -> tuple[Any, jax.Array]:
                return inference.update(state, **arguments)

            state, losses = jax.lax.scan(step, state, None, length=length)
            return state, losses.mean()

        if first:
            state, _ = walk(state, first)
        state, losses = jax.lax.scan(
            lambda s, _: walk(s, stride), state, None, length=steps // stride
        )
        params = inference.get_params(state)
        values = inference.guide.sample_posterior(sample, params, sample_shape=(draws,))
        samples = {name: values[name] for name in problem.named("latent")}
        finite = _all_finite([*samples.values(), losses[-1]])
        return ChainResult(samples, {}, losses, jnp.where(finite, OK, NOT_FINITE))

    loss_steps = tuple(range(first + stride, steps + 1, stride))
    name = f"SVI per cell, {guide.__name__ if guide else 'AutoNormal'}, {steps} steps"
    return CellMethod(infer, _check_sites, (1, draws), _SVI_CHAINS, name, loss_steps, full_rate)


def laplace_per_cell(init: Any, *, draws: int) -> CellMethod:
    """Make a method that finds the mode and its curvature in every cell."""

    def infer(
        problem: InferenceProblem, key: jax.Array, arguments: Mapping[str, Any]
    ) -> ChainResult:
        result = approximate(problem, key, arguments, draws=draws, init=init)
        finite = jnp.where(_all_finite(result.samples.values()), OK, NOT_FINITE)
        return ChainResult(result.samples, {}, None, jnp.where(result.is_mode, finite, NO_MODE))

    def check(problem: InferenceProblem) -> None:
        _check_sites(problem)
        check_laplace_model(problem)

    return CellMethod(infer, check, (1, draws), _LAPLACE_CHAINS, "Laplace per cell")


def deterministics(
    problem: InferenceProblem,
    arguments: Mapping[str, Any],
    samples: Mapping[str, jax.Array],
    names: Any,
) -> dict[str, jax.Array]:
    """Compute deterministic sites ``(draw, ...)`` from draws of the latents; traceable."""

    def evaluate_sites(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        # Every site has a value, so the key is not used.
        model = handlers.substitute(handlers.seed(problem.model, jax.random.key(0)), values)
        trace = handlers.trace(model).get_trace(**arguments)
        return {name: trace[name]["value"] for name in names}

    with numpyro.validation_enabled(False):
        return jax.vmap(evaluate_sites)(dict(samples))


def _check_sites(problem: InferenceProblem) -> None:
    trained = [name for name in problem.named("param") if problem.sites[name].has_initial_value]
    if trained:
        raise ModelError(
            f"sites {trained!r} are params, and a fit with per= cannot store one for each "
            "cell; give them priors (numpyro.sample, random_nnx_module)"
        )
    if not problem.named("latent"):
        raise ModelError("the model has no latent sites: there is nothing to fit")


def _all_finite(values: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(value)) for value in values]))


def cell_status(chains: jax.Array) -> jax.Array:
    """Return the status of cells, int8 ``(cell,)``, from that of their chains ``(cell, chain)``.

    One chain with values that are not finite, or without a mode, fails its cell. A chain that
    diverged shows in R-hat, so a cell has diverged only if all of its chains have.
    """
    spoiled = ((chains != OK) & (chains != DIVERGED)).any(axis=1)
    worst = jnp.where(spoiled[:, None] & (chains == DIVERGED), OK, chains).max(axis=1)
    diverged = jnp.where((chains == DIVERGED).all(axis=1), DIVERGED, OK)
    return jnp.where(spoiled, worst, diverged).astype(jnp.int8)


# A program takes 350 (Laplace) to 625 (NUTS) of the 65 530 mappings of memory that Linux lets a
# process have.
_compiled = LRUCache[Any](16)
# Chains whose results are discarded. The loop over chains is vectorized, and its last iterations
# may run one by one, with different rounding; chains are chaotic, and double such a difference
# at every step (docs/decisions/cells.md).
_SPARE_CHAINS = 16
# By default XLA uses half of a wide vector unit; with this, a tile takes up to a tenth less time,
# as measured.
_COMPILER_OPTIONS = defaultdict[str, dict[str, Any]](
    dict, cpu={"xla_cpu_prefer_vector_width": 512}
)

# Tiles run one after another: two programs with loops in them, run at once from two threads,
# deadlocked, each waiting for threads of the other (docs/decisions/cells.md).


class TileResult(NamedTuple):
    """Result of a tile, the axis of the cells first.

    ``samples`` and ``stats`` are arrays ``(cell, chain, draw, ...)`` by name, NaN where the
    ``status`` is not ok; ``losses`` are ``(cell, step)``, or None.
    """

    samples: dict[str, Any]
    stats: dict[str, Any]
    losses: Any
    status: Any


@dataclass(frozen=True)
class TileProgram:
    """A compiled inference for tiles of cells.

    Parameters
    ----------
    program : callable
        From the seed's key, a tile's words and arrays, and the arrays that all cells share,
        to a :class:`TileResult`.
    digest : str
        Fingerprint of the trace: the model, the method and its options, the shapes.
    cells : int
        The number of cells in a tile.
    outputs : TileResult
        Shapes and dtypes of the result of a tile.
    """

    program: Callable
    digest: str
    cells: int
    outputs: TileResult

    def run(
        self,
        seed: np.ndarray,
        words: np.ndarray,
        cell_data: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
    ) -> Iterator[TileResult]:
        """Fit any number of cells: yield the result of each tile, in order, as numpy arrays.

        Parameters
        ----------
        seed : array of uint32 (2,)
        words : array of uint32 (cell, 2)
            Hash of the labels of each cell.
        cell_data, shared : mapping of source key to array
            Arrays that differ from cell to cell, ``(cell, ...)``, and all others.
        """
        for start in range(0, len(words), self.cells):
            rows = slice(start, start + self.cells)
            count = len(words[rows])
            tile = {key: self._filled(array[rows]) for key, array in cell_data.items()}
            result = self.program(seed, self._filled(words[rows]), tile, dict(shared))
            yield jax.tree.map(lambda x, n=count: np.asarray(x)[:n], result)

    def _filled(self, part: np.ndarray) -> np.ndarray:
        # Fill up with the first cell: it has data, so that no filler takes longer than a cell
        # of the data does.
        spare = self.cells - len(part)
        return np.concatenate([part, np.repeat(part[:1], spare, axis=0)]) if spare else part


def make_tile_program(
    method: CellMethod,
    problem: InferenceProblem,
    binding: Binding,
    dims: Mapping[str, tuple[str, ...]],
    structs: Mapping[str, jax.ShapeDtypeStruct],
    names: tuple[str, ...],
) -> TileProgram:
    """Trace and compile the inference of one cell, mapped over a tile.

    Parameters
    ----------
    method : CellMethod
    problem : InferenceProblem
        The model and block of one cell.
    binding : Binding
    dims : mapping of source key to tuple of str
        The dims of each array, with those of ``per``.
    structs : mapping of source key to ShapeDtypeStruct
        Shape and dtype of each array, for one cell.
    names : tuple of str
        Deterministic sites to compute at the draws.
    """
    cell_keys = {k for k, values in dims.items() if set(values) & set(binding.per)}
    infer_cell = _make_cell_function(method, problem, binding, dims, names)

    chains = method.shape[0]
    count = max(method.lanes // chains, 1)

    def tile(seed: Any, words: Any, cell_arrays: Any, shared: Any) -> TileResult:
        chain_arrays = jax.tree.map(
            lambda x: _append_spare_chains(jnp.repeat(x, chains, axis=0)), cell_arrays
        )
        values = jax.vmap(infer_cell, in_axes=(0, 0, None))(
            _chain_keys(seed, words, chains), chain_arrays, shared
        )
        return _group_by_cell(values, count, chains)

    word = jax.ShapeDtypeStruct((2,), np.uint32)
    cell_arrays = {k: _stack_struct(structs[k], count) for k in structs if k in cell_keys}
    shared = {k: structs[k] for k in structs if k not in cell_keys}
    with trace_lock(problem.block):
        traced = jax.jit(tile).trace(word, _stack_struct(word, count), cell_arrays, shared)
        digest = program_fingerprint(traced.jaxpr)
        program = _compiled.get(digest)
        if program is None:
            options = _COMPILER_OPTIONS[jax.default_backend()]
            program = traced.lower().compile(compiler_options=options)
            _compiled.put(digest, program)
    outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    return TileProgram(program, digest, count, outputs)


def _append_spare_chains(x: jax.Array) -> jax.Array:
    """Append spare chains, copies of the first."""
    return jnp.concatenate([x, jnp.repeat(x[:1], _SPARE_CHAINS, axis=0)])


def _chain_keys(seed: jax.Array, words: jax.Array, chains: int) -> jax.Array:
    """Return keys, uint32 ``(chain, 2)``, from the hash of each cell and the chain's number."""
    chain = jnp.stack([jnp.zeros(chains, jnp.uint32), jnp.arange(chains, dtype=jnp.uint32)], -1)
    keys = jax.vmap(fold_in, in_axes=(0, None))(fold_in(seed, words), chain)
    return _append_spare_chains(keys.reshape(-1, 2))


def _group_by_cell(result: ChainResult, count: int, chains: int) -> TileResult:
    """Group chains by cell, without the spare ones; set samples of failed cells to NaN."""

    def group_chains(x: jax.Array) -> jax.Array:
        return x[: count * chains].reshape(count, chains, *x.shape[1:])

    grouped = jax.tree.map(group_chains, result)
    status = cell_status(grouped.status)

    def mask_failed(x: jax.Array) -> jax.Array:
        return jnp.where((status == OK).reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

    samples = jax.tree.map(mask_failed, grouped.samples)
    losses = None if grouped.losses is None else grouped.losses[:, 0]
    return TileResult(samples, grouped.stats, losses, status)


def _make_cell_function(
    method: CellMethod,
    problem: InferenceProblem,
    binding: Binding,
    dims: Mapping[str, tuple[str, ...]],
    names: tuple[str, ...],
) -> Callable[[Any, Any, Any], ChainResult]:
    cell_dims = {
        k: tuple(d for d in array_dims if d not in binding.per) for k, array_dims in dims.items()
    }

    def infer_cell(words: Any, cell_arrays: Any, shared: Any) -> ChainResult:
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        arguments = arrange(binding, {**shared, **cell_arrays}, cell_dims, problem.block)
        result = method.infer(problem, key, arguments)
        if not names:
            return result
        computed = deterministics(problem, arguments, result.samples, names)
        return result._replace(samples={**result.samples, **computed})

    return infer_cell


def _stack_struct(struct: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *struct.shape), struct.dtype)
