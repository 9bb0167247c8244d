"""Check values of inputs, and that blocks are independent, before a graph is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    Precision,
    Requirement,
    cell_binding,
    check_not_cut,
    describe_variables,
    is_in_memory,
    is_wide,
    loses_bits,
    require_same_values,
)
from xr_aimz.errors import ModelError
from xr_aimz.fits import Fit
from xr_aimz.kernel import (
    CouplingProblem,
    KernelSpec,
    PositionKernel,
    ScenarioSet,
    Verdict,
    condition_key,
    find_coupling_at_any_length,
    find_index_ranges,
    find_integers_cast,
    find_outcome_supports,
    find_supports,
    function_obstacle,
    known_key,
    raise_if_coupled,
    raise_not_cellwise,
    site_layout,
)
from xr_aimz.prediction.chunk_plan import ChunkPlan
from xr_aimz.prediction.spec import Prediction
from xr_aimz.tracing import Node

# Every integer up to this one is exact as a float of 32 bits.
_MAX_EXACT_INT = 2**24


def collect_requirements(
    fit: Fit, inputs: AlignedInputs, program: KernelSpec
) -> tuple[Requirement, ...]:
    """Collect the requirements on inputs, outcomes, and values of ``do`` and ``condition``."""
    conditions = _describe_conditions(fit)
    descriptions = {
        **_describe_inputs(fit),
        **conditions,
        **_describe_do_values(fit, program.scenarios),
    }
    requirements: list[Requirement] = []
    wide_keys = [k for k, a in inputs.arrays.items() if k in descriptions and _may_be_wide(a)]
    cast_keys = find_integers_cast(program, inputs, fit.params) if wide_keys else frozenset()
    for key, array in inputs.arrays.items():
        if key in descriptions and (
            loses_bits(array.dtype) or (key in wide_keys and key in cast_keys)
        ):
            text, name = descriptions[key]
            requirements.append(Precision(key, text, fit.data_sd.get(name), fit.binding.per))
    condition_texts = {
        site: conditions[condition_key(site)][0]
        for site in fit.sites
        if condition_key(site) in inputs.arrays
    }
    requirements += require_same_values(fit.binding)
    requirements += find_supports(program, inputs, fit.params, condition_texts)
    return (*requirements, *find_outcome_supports(program, inputs, fit.params))


def collect_index_ranges(
    fit: Fit, inputs: AlignedInputs, kernel: PositionKernel, name: str
) -> tuple[Requirement, ...]:
    """Collect the requirements on inputs and ``do`` values by which a model indexes arrays."""
    descriptions = {
        **_describe_inputs(fit),
        **_describe_conditions(fit),
        **_describe_do_values(fit, kernel.program.scenarios),
    }
    texts = {key: text for key, (text, _) in descriptions.items()}
    labels = {**fit.binding.labels, **inputs.labels}
    return find_index_ranges(kernel, inputs, texts, labels, name)


def _may_be_wide(array: xr.DataArray) -> bool:
    """Return whether integers have, or are lazy and may have, more digits than float32."""
    if not is_wide(array.dtype) or not is_in_memory(array) or not array.size:
        return is_wide(array.dtype) and not is_in_memory(array)
    return int(array.max()) > _MAX_EXACT_INT or int(array.min()) < -_MAX_EXACT_INT


# By key of an array: its description in messages, and the variable whose values it has.
_Descriptions = dict[str, tuple[str, str]]


def _describe_inputs(fit: Fit) -> _Descriptions:
    names = fit.binding.variables
    return {k: (text, names[k]) for k, text in describe_variables(fit.binding).items()}


def _describe_conditions(fit: Fit) -> _Descriptions:
    names = {n: s.variable for n, s in fit.sites.items()}
    return {condition_key(site): (f"condition={name!r}", name) for site, name in names.items()}


def _describe_do_values(fit: Fit, scenarios: ScenarioSet | None) -> _Descriptions:
    if scenarios is None:
        return {}
    arguments = fit.binding.variables
    sites = {n: s.variable for n, s in fit.sites.items()}
    changes = [(arguments[c.target], c) for c in scenarios.arguments]
    changes += [(sites[c.target], c) for c in scenarios.sites]
    return {v.key: (f"do={{{n!r}: ...}}", n) for n, c in changes for v in c.values}


def check_split_along(prediction: Prediction, cut: ChunkPlan, dims: Iterable[str]) -> None:
    """Refuse a prediction that cannot be cut along ``dims``, even if the plan does not.

    Parameters
    ----------
    prediction : Prediction
    cut : ChunkPlan
    dims : iterable of str

    Raises
    ------
    ModelError
    """
    halved = replace(cut, chunks={**cut.chunks, **dict.fromkeys(dims, (1, 1))})
    check_same_in_all_blocks(prediction, halved)
    check_independent(prediction, halved, _find_coupling_at_any_length)


def _find_coupling_at_any_length(
    problem: CouplingProblem, blocks: Mapping[str, int], assumed: Any
) -> Verdict:
    return find_coupling_at_any_length(problem, tuple(blocks), assumed)


def check_same_in_all_blocks(prediction: Prediction, cut: ChunkPlan) -> None:
    """Refuse to cut dims if a site without these dims would get another value in each block."""
    binding, fit_sites = prediction.fit.binding, prediction.fit.sites
    cut_dims = {d for d, chunks in cut.chunks.items() if len(chunks) > 1}
    check_not_cut(binding, cut_dims, "into blocks")
    # By kind and name: an argument and a site may share their name.
    arrays = {Node("array", key): a for key, a in prediction.inputs.arrays.items()}
    arrays |= {Node("site", name): a for name, a in prediction.latents.items()}
    cut_dims_of = {node: cut_dims & set(map(str, a.dims)) for node, a in arrays.items()}
    for name in prediction.sampled_sites:
        cut_dims_of[Node("site", name)] = cut_dims & set(fit_sites[name].dataset_dims)
    for name in prediction.latents:
        if lengths := sorted(fit_sites[name].lengths & cut_dims):
            raise ModelError(
                f"latent site {name!r} has an axis of its own whose length the model makes from "
                f"that of {lengths[0]!r}, which is cut into blocks: none of them has the whole "
                f"length. Fit with core_dim={lengths[0]!r}, or give the site a value for each "
                f"label: with xr_aimz.plate({lengths[0]!r})"
            )
    # A whole block depends on what a scan samples, whether the site is returned or not.
    masked = [n for n in prediction.latents if known_key(n) in prediction.inputs.arrays]
    for name in dict.fromkeys((*prediction.sites, *prediction.sampled_sites, *masked)):
        site = fit_sites[name]
        dims = site.dataset_dims
        step_dim = next(iter(dims[len(binding.per) :]), None) if site.scanned else None
        if step_dim in cut_dims:
            raise ModelError(
                f"site {name!r} is inside a scan along {step_dim!r}, which is cut into blocks; "
                f"fit with core_dim={step_dim!r}"
            )
        absent_dims_of = {k: d - set(dims) for k, d in cut_dims_of.items() if d - set(dims)}
        if site.kind == "deterministic" and absent_dims_of:
            sources = prediction.inputs_of(name) & set(absent_dims_of)
            if sources:
                absent = sorted(set().union(*(absent_dims_of[k] for k in sources)))
                names = sorted(node.name for node in sources)
                raise ModelError(
                    f"deterministic {name!r} has no dimension {absent!r} but is made from "
                    f"{names!r}, which have: each block would give another. Leave it "
                    f"out, sites=..., or keep the dimension whole: core_dim={absent!r} at the fit"
                )


def check_independent(
    prediction: Prediction, cut: ChunkPlan, judged: Callable[..., Verdict]
) -> Verdict:
    """Check that the model, for one cell of ``per``, makes each block from that block alone."""
    blocks = {d: cut.largest(d) for d in prediction.fit.binding.dims if len(cut.chunks[d]) > 1}
    if not blocks:
        return Verdict()
    problem = _make_coupling_problem(prediction)
    verdict = judged(problem, blocks, prediction.assumed)
    needed = {d: n for d, n in blocks.items() if d not in prediction.assumed}
    raise_if_coupled(verdict, problem.program.returns, needed)
    _check_functions(prediction, problem.program, needed)
    return verdict


def _check_functions(
    prediction: Prediction, program: KernelSpec, blocks: Mapping[str, int]
) -> None:
    """Check that callables of ``do`` and the contrast act cell by cell on a site's values."""
    if prediction.intervention is None or not blocks:
        return
    scenarios, sites, sizes = (
        prediction.intervention.scenarios,
        prediction.fit.sites,
        prediction.inputs.sizes,
    )
    layout = partial(site_layout, program, full=sizes, block={**sizes, **blocks}, dims=blocks)
    for change in scenarios.sites:
        for function in change.functions:
            obstacle = function_obstacle(function, [layout(sites[change.target])])
            if obstacle is not None:
                raise_not_cellwise(f"do={{{change.target!r}: ...}}", obstacle, blocks)
    if scenarios.contrast is not None:
        for name in program.returns:
            obstacle = function_obstacle(scenarios.contrast, [layout(sites[name])] * 2)
            if obstacle is not None:
                raise_not_cellwise(f"contrast={scenarios.contrast!r}", obstacle, blocks)


def _make_coupling_problem(prediction: Prediction) -> CouplingProblem:
    """Build the coupling problem of one cell of ``per``; arguments have the dims ``do`` gives."""
    fit, per = prediction.fit, prediction.fit.binding.per
    first_cell = dict.fromkeys(per, 0)
    fit_data = {str(n): a for ds in (fit.constant_data, fit.observed_data) for n, a in ds.items()}
    latents, fit_data = (
        {n: a.isel(first_cell, drop=True, missing_dims="ignore") for n, a in arrays.items()}
        for arrays in (prediction.latents, fit_data)
    )
    inputs = prediction.inputs
    if prediction.intervention is not None:
        inputs = prediction.intervention.with_dims_of_values(inputs, fit.binding)
    inputs = inputs.of_cell(per)
    cell, sites = cell_binding(fit.binding.without_data(), fit.sites)
    program = replace(
        prediction.program, binding=cell, sites=sites, dims=inputs.dims, scenarios=None
    )
    return CouplingProblem(program, inputs, latents, fit.params, fit_data)
