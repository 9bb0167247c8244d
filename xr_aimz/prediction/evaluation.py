"""Build the lazy arrays of a prediction: trace, check, cut into blocks, lay out the graph.

Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    Requirement,
    as_jax_array,
    check_in_memory,
    is_in_memory,
    resize,
)
from xr_aimz.fits import Fit, cells_with_draws
from xr_aimz.kernel import (
    find_coupling,
    known_key,
    may_take_by_position,
    scan_lengths,
)
from xr_aimz.options import get_options
from xr_aimz.prediction.checks import (
    check_independent,
    check_same_in_all_blocks,
    collect_index_ranges,
    collect_requirements,
)
from xr_aimz.prediction.chunk_plan import ChunkPlan, plan_chunks, plan_chunks_all_draws
from xr_aimz.prediction.graph import BlockTask, lazy_arrays
from xr_aimz.prediction.missing_inputs import (
    SampledSites,
    check_integer_outcomes,
    may_have_missing,
)
from xr_aimz.prediction.recursion import (
    check_positions,
    check_recursions,
)
from xr_aimz.prediction.spec import Prediction, Tracer
from xr_aimz.prediction.statistics import (
    Statistic,
    compute_statistics,
    statistic_names,
    statistic_structs,
)
from xr_aimz.random import hash_labels, seed_key, site_keys


def build_lazy(prediction: Prediction, tracer: Tracer) -> xr.Dataset:
    """Build the sites of a Prediction as lazy arrays with dims, without coordinates."""
    fit, inputs = prediction.fit, prediction.inputs
    structs, name, requirements = _trace_checked(prediction, tracer)
    prediction = _check_missing_inputs(prediction, tracer, structs)
    bytes_per_draw = sum(o.size * o.dtype.itemsize for o in structs.values())
    make_plan = plan_chunks_all_draws if prediction.statistics else plan_chunks
    block_bytes = get_options()["block_bytes"]
    plan = make_plan(fit.binding, inputs, prediction.shape, bytes_per_draw, block_bytes)
    check_same_in_all_blocks(prediction, plan)
    max_sizes = tracer.padded_sizes(prediction, plan)
    if any(max_sizes[d] != inputs.sizes[d] for d in max_sizes):
        # Traced first: a model that fails on a block of this size raises its own error here.
        structs, name = tracer.trace(prediction, {**inputs.sizes, **max_sizes})
    verdict = check_independent(prediction, plan, find_coupling)
    if verdict.least > min(max_sizes.values(), default=verdict.least):
        max_sizes = {d: max(n, min(verdict.least, inputs.sizes[d])) for d, n in max_sizes.items()}
        structs, name = tracer.trace(prediction, {**inputs.sizes, **max_sizes})
    outputs = {
        site: (prediction.dims(site)[: len(struct.shape)], struct)
        for site, struct in structs.items()
    }
    task = BlockTask(
        name=name,
        identity=fit.token,
        factory=prediction.factory,
        program=prediction.program,
        params=fit.params,
        padded_sizes=max_sizes,
        sizes=inputs.sizes,
        requirements=resize(requirements, {**inputs.sizes, **max_sizes}),
    )
    return _build_dataset(prediction, task, plan, outputs)


def _trace_checked(
    prediction: Prediction, tracer: Tracer
) -> tuple[dict[str, Any], str, tuple[Requirement, ...]]:
    """Trace the kernel on the whole Dataset, and check the values that are in memory.

    Return its outputs, the name of the program, and the requirements on lazy values.
    """
    fit, inputs = prediction.fit, prediction.inputs
    _check_integers(inputs)
    requirements = collect_requirements(fit, inputs, prediction.program)
    lazy_requirements = check_in_memory(requirements, inputs)
    check_positions(fit, inputs, tuple(prediction.latents))
    structs, name = tracer.trace(prediction, inputs.sizes)
    if may_take_by_position(name):
        ranges = collect_index_ranges(fit, inputs, prediction.position_kernel, name)
        lazy_requirements += check_in_memory(ranges, inputs)
    if _may_have_recursion(prediction, name):
        masked = [n for n in prediction.latents if known_key(n) in inputs.arrays]
        sampled = (*prediction.sampled_sites, *masked)
        dependences = partial(tracer.dependences, prediction)
        check_recursions(fit, inputs, prediction.sites, sampled, dependences)
    return structs, name, lazy_requirements


def _check_integers(inputs: AlignedInputs) -> None:
    """Refuse integers in memory that JAX cannot hold; lazy integers are checked in their task."""
    for key, array in inputs.arrays.items():
        if is_in_memory(array) and array.dtype.kind in "iu":
            as_jax_array(key, array.values)


def _may_have_recursion(prediction: Prediction, name: str) -> bool:
    """Return whether a traced program has a recursion as long as a dimension of the Dataset."""
    lengths, sizes = scan_lengths(name), prediction.inputs.sizes
    dim_sizes = [sizes[d] for d in prediction.fit.binding.dims]
    return lengths is None or bool(lengths & {*dim_sizes, prod(dim_sizes)})


def _make_site_keys(prediction: Prediction) -> np.ndarray:
    """Make the keys of the sites that may be sampled: uint32 ``(chain, draw, site, 2)``."""
    chains, draws = (
        np.asarray(hash_labels(d, prediction.posterior.indexes.get(d), size=n))
        for d, n in zip(("chain", "draw"), prediction.shape, strict=True)
    )
    shape = (*prediction.shape, 2)
    keys = site_keys(
        seed_key(prediction.seed),
        np.broadcast_to(chains[:, None], shape),
        np.broadcast_to(draws, shape),
        prediction.program.random_sites,
    )
    return np.stack([keys[name] for name in prediction.program.random_sites], axis=2)


def _check_missing_inputs(
    prediction: Prediction, tracer: Tracer, structs: Mapping[str, Any]
) -> Prediction:
    """Refuse missing inputs of integer or bool outcomes: now if in memory, else in their task."""
    fit, inputs, intervention = prediction.fit, prediction.inputs, prediction.intervention
    if intervention is not None and may_have_missing(fit, inputs):
        # The dtype of what is sampled counts: a contrast of integers may be a float.
        structs, _ = tracer.trace(replace(prediction, intervention=None), inputs.sizes)
    site_names = [n for n, s in fit.sites.items() if s.kind in ("latent", "observed")]
    dtypes = {n: structs[n].dtype if n in structs else fit.sites[n].dtype for n in site_names}
    integer_dtypes = {
        n: np.dtype(dtype) for n, dtype in dtypes.items() if np.dtype(dtype).kind != "f"
    }
    if not integer_dtypes:
        return prediction
    scenarios = None if intervention is None else intervention.scenarios
    sampled_sites = SampledSites(fit, inputs, prediction.sampled_sites, scenarios)
    return replace(
        prediction, inputs=check_integer_outcomes(sampled_sites, prediction.sites, integer_dtypes)
    )


def _build_dataset(
    prediction: Prediction,
    task: BlockTask,
    plan: ChunkPlan,
    outputs: Mapping[str, tuple[tuple[str, ...], Any]],
) -> xr.Dataset:
    """Build a Dataset of lazy draws of the outputs, or of their statistics."""
    names = {n: prediction.fit.sites[n].variable for n in outputs}
    if prediction.statistics:
        task = replace(task, postprocess=_Reduction(prediction.statistics))
        names, outputs = (
            statistic_names(names, prediction.statistics),
            statistic_structs(outputs, prediction.statistics),
        )
    else:
        outputs = {n: (("chain", "draw", *dims), struct) for n, (dims, struct) in outputs.items()}
    lazy = lazy_arrays(
        task, plan, prediction.inputs, prediction.latents, _make_site_keys(prediction), outputs
    )
    result = xr.Dataset({names[n]: (outputs[n][0], array) for n, array in lazy.items()})
    result = mask_cells_without_draws(
        result, prediction.fit, prediction.inputs, prediction.leading
    )
    if not prediction.statistics:
        return result
    # Blocks have few cells, to hold all draws of each; statistics are small, so rechunk.
    return result.chunk({d: c for d, c in prediction.inputs.chunks.items() if d in result.dims})


@dataclass(frozen=True)
class _Reduction:
    """Reduction of a block's draws to statistics."""

    statistics: tuple[Statistic, ...]

    def __call__(self, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return compute_statistics(draws, self.statistics)

    def __dask_tokenize__(self) -> Any:
        # By what is computed, not by the module path of the class, which may change.
        return "statistics", *(tuple(vars(statistic).items()) for statistic in self.statistics)


def mask_cells_without_draws(
    result: xr.Dataset, fit: Fit, inputs: AlignedInputs, leading: tuple[str, ...]
) -> xr.Dataset:
    """Put results in the dim order of the outcome, with NaN in cells without draws; lazy.

    Parameters
    ----------
    result : Dataset
        With dims ``(chain, draw, *per, ...)``, without coordinates.
    leading : tuple of str
        Dims that stay first, where a result has them: chains and draws, scenarios.
    fit : Fit
    inputs : AlignedInputs
        Inputs of the Dataset to predict; its labels are among the fit's.

    Notes
    -----
    Where the fit has cells without draws, ints and bools become floats, as they do in
    ``DataArray.where``, for they have no NaN. It does not matter whether such cells are among
    those predicted, so a prediction of a selection has the dtype of a prediction of all cells.
    """
    per = fit.binding.per
    if not per:
        return result
    ordered = {name: a.transpose(*_order_dims(a, fit, leading)) for name, a in result.items()}
    has_draws = cells_with_draws(fit, inputs)
    if has_draws is None:
        return result.assign(ordered)
    return result.assign({name: _bool_as_float(a).where(has_draws) for name, a in ordered.items()})


def _order_dims(array: xr.DataArray, fit: Fit, leading: tuple[str, ...]) -> tuple[str, ...]:
    # A result that lacks some of the outcome's dims keeps its other dims at the end.
    outcome_dims = [d for a in fit.binding.outcomes for s in a.sources for d in s.dims]
    front = [d for d in leading if d in array.dims]
    first = [d for d in dict.fromkeys(outcome_dims) if d in array.dims]
    last = [str(d) for d in array.dims if d not in (*front, *first)]
    return (*front, *first, *last)


def _bool_as_float(array: xr.DataArray) -> xr.DataArray:
    # ``where`` would make an object array of bools, which no file can hold.
    return array.astype(np.float32) if array.dtype.kind == "b" else array
