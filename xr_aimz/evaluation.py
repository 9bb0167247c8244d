"""A kernel evaluated on a Dataset, for the draws of a posterior: a lazy array for each site.

An :class:`Evaluation` says which kernel, on what, for which draws. :func:`evaluate` traces
it on the shapes of one block, cuts it into tasks, sees to it that no block needs another,
and lays out the graph. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz import keys
from xr_aimz.axes import dims_in_dataset, probe_sizes, shape_in_model
from xr_aimz.binding import block_of
from xr_aimz.blocks import Factory, Task, lazy_sites
from xr_aimz.casting import device_dtype, to_device_dtype
from xr_aimz.cell_results import in_cells
from xr_aimz.concrete import check_not_cut
from xr_aimz.dataflow import dependencies
from xr_aimz.device import may_index, recursions_of, traced
from xr_aimz.drawn_from import Drawing
from xr_aimz.errors import ModelError
from xr_aimz.failures import explain_failure
from xr_aimz.guard import (
    Case,
    Verdict,
    function_obstacle,
    judge,
    judge_at_any_length,
    raise_if_coupled,
    raise_not_cellwise,
    site_layout,
)
from xr_aimz.holes import may_have_holes, without_holes
from xr_aimz.index_ranges import PositionKernel
from xr_aimz.input_checks import collect_index_ranges, collect_requirements
from xr_aimz.inputs import Inputs
from xr_aimz.interventions import Intervention
from xr_aimz.kernel import CONDITION, KNOWN, Program
from xr_aimz.labelling import result_name
from xr_aimz.labels import label_words
from xr_aimz.model import Site, tracing
from xr_aimz.options import get_options
from xr_aimz.order import check_places, check_recursions
from xr_aimz.plan import Plan, plan, plan_cells
from xr_aimz.posterior import Fit
from xr_aimz.recursion import Dependence, find_dependences
from xr_aimz.reduction import Statistic, reduce, suffixed
from xr_aimz.reduction import outputs as reduced
from xr_aimz.requirements import check_in_memory, is_in_memory, resize
from xr_aimz.supports import structs_of
from xr_aimz.unseen import latent_draws
from xr_aimz.upstream import Origin, origins

__all__ = ["Evaluation", "check_split_along", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Which kernel is to be evaluated, on what, for which draws."""

    fit: Fit
    inputs: Inputs
    posterior: xr.Dataset
    factory: Factory
    sites: tuple[str, ...]
    seed: int
    statistics: tuple[Statistic, ...] = ()
    under: Intervention | None = None
    assumed: tuple[str, ...] = ()

    @cached_property
    def program(self) -> Program:
        binding = self.fit.binding.without_data()
        worlds = None if self.under is None else self.under.worlds
        fit = self.fit
        return Program(fit.model, binding, fit.sites, self.inputs.dims, self.sites, worlds)

    @cached_property
    def latents(self) -> dict[str, xr.DataArray]:
        """Draws of each latent site, a local one on the labels of this Dataset."""
        return {
            name: latent_draws(self.posterior, site, self.fit.binding, self.inputs)
            for name, site in self.fit.sites.items()
            if site.kind == "latent" and name not in self.drawn
        }

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """The sites that are drawn in every cell, unless they are given."""
        redrawn = frozenset() if self.under is None else self.under.worlds.redrawn

        def known(name: str, site: Site) -> bool:
            return name not in redrawn and result_name(self.fit.binding, site) in self.posterior

        return tuple(
            name
            for name, site in self.fit.sites.items()
            if site.kind == "observed" or (site.kind == "latent" and not known(name, site))
        )

    @property
    def origins(self) -> dict[str, Origin]:
        """What the distribution of each site is made from, as one cell of ``per`` sees it."""
        cell = self._cell
        sizes = cell.inputs.sizes
        with explain_failure(self.fit, self.inputs, sizes):
            return origins(cell.program, sizes, *cell.structs(sizes, drawn=True))

    def dependences(self, dim: str) -> Mapping[str, Dependence]:
        """What the sites that are returned or drawn depend on along a dimension."""
        conditions = {key for n in self.drawn for key in (CONDITION + n, KNOWN + n)}
        arrays = {key: a for key, a in self.inputs.arrays.items() if key not in conditions}
        sites = tuple(dict.fromkeys((*self.sites, *self.drawn)))
        bare = replace(self, inputs=replace(self.inputs, arrays=arrays), sites=sites, under=None)
        cell = bare._cell
        probe = probe_sizes(cell.fit.binding, cell.inputs.sizes)
        try:
            return find_dependences(cell.program, probe, dim, *cell.structs(probe, drawn=True))
        except Exception:
            # Sizes are written into the model. On its own, two dims may be as long as each other.
            sizes = cell.inputs.sizes
            return find_dependences(cell.program, sizes, dim, *cell.structs(sizes, drawn=True))

    @property
    def _cell(self) -> Evaluation:
        """The same of one cell of a fit with ``per``, whose model knows of no cells."""
        per = self.fit.binding.per
        if not per:
            return self
        first = dict.fromkeys(per, 0)
        fit = replace(self.fit, binding=self.fit.binding.of_cell())
        posterior = self.posterior.isel(first, drop=True, missing_dims="ignore")
        return replace(self, fit=fit, inputs=self.inputs.of_cell(per), posterior=posterior)

    @property
    def position_kernel(self) -> PositionKernel:
        """The kernel of the positions by which the model takes entries."""
        arrays = structs_of(self.program, self.inputs)
        latents = frozenset(self.latents)
        return PositionKernel(self.factory, self.program, latents, arrays, self.fit.params)

    @property
    def shape(self) -> tuple[int, int]:
        return self.posterior.sizes.get("chain", 1), self.posterior.sizes.get("draw", 1)

    def dims(self, site: str) -> tuple[str, ...]:
        """Those of a site's result after chain and draw."""
        return self.program.result_dims(site)

    @property
    def leading(self) -> tuple[str, ...]:
        """Dims that results have before those of their sites."""
        own = [s.dim for s in self.statistics if s.dim is not None]
        return (*own, "chain", "draw", *self.program.leading)

    def structs(
        self, sizes: Mapping[str, int], *, drawn: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a kernel is called with, for one draw of a block of those sizes.

        With ``drawn``, the sites that it would draw are passed in as latents are.
        """
        binding = self.fit.binding

        def struct(array: xr.DataArray) -> jax.ShapeDtypeStruct:
            dims = [str(d) for d in array.dims if d not in ("chain", "draw")]
            lengths = tuple(sizes[d] if d in binding.cut_dims else array.sizes[d] for d in dims)
            return jax.ShapeDtypeStruct(lengths, device_dtype(array.dtype))

        word = jax.ShapeDtypeStruct((2,), np.uint32)
        latents = {name: struct(a) for name, a in self.latents.items()}
        for name in self.drawn if drawn else ():
            site = self.fit.sites[name]
            cells = tuple(sizes[d] for d in binding.per)
            shape = cells + shape_in_model(site, binding, sizes)
            latents[name] = jax.ShapeDtypeStruct(shape, site.dtype)
        shared = {
            "arrays": {key: struct(a) for key, a in self.inputs.arrays.items()},
            "words": {d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in binding.cut_dims},
            "params": self.fit.params,
        }
        return {"keys": dict.fromkeys(self.program.keyed, word), "latents": latents}, shared

    def traced(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        """Outputs for one draw of a block of those sizes, and the name of the program."""
        block = block_of(self.fit.binding, sizes)
        with explain_failure(self.fit, self.inputs, sizes):
            return traced(self.factory(self.program, sizes), block, *self.structs(sizes))

    def padded(self, cut: Plan) -> dict[str, int]:
        """The size to which blocks are padded, so that one program serves all of them."""
        return {d: cut.largest(d) for d in self.fit.binding.cut_dims}

    def reached(self, site: str) -> set[str]:
        """The arrays and sites that a site is made from."""
        sizes = self.inputs.sizes
        draw, shared = self.structs(sizes, drawn=True)
        call = self.factory(self.program, sizes)

        def value(**named: Any) -> Any:
            latents = {n: named[n] for n in draw["latents"]}
            arrays = {k: named[f"array {k}"] for k in shared["arrays"]}
            return call({"keys": blank, "latents": latents}, {**rest, "arrays": arrays})[site]

        named = {**draw["latents"], **{f"array {k}": a for k, a in shared["arrays"].items()}}
        blank = dict.fromkeys(draw["keys"], np.zeros(2, np.uint32))
        words = {d: np.zeros(w.shape, np.uint32) for d, w in shared["words"].items()}
        rest = {"words": words, "params": shared["params"]}
        with tracing(block_of(self.fit.binding, sizes)):
            found = dependencies(value, named)
        return {str(n).removeprefix("array ") for n in found}


def check_split_along(wanted: Evaluation, cut: Plan, dims: Iterable[str]) -> None:
    """Refuse what could not be cut along these dims, whether or not it is going to be.

    Parameters
    ----------
    wanted : Evaluation
    cut : Plan
    dims : iterable of str

    Raises
    ------
    ModelError
    """
    halved = replace(cut, chunks={**cut.chunks, **dict.fromkeys(dims, (1, 1))})
    _check_cut(wanted, halved)
    _check_independent(wanted, halved, _judged_at_any_length)


def _judged_at_any_length(case: Case, blocks: Mapping[str, int], assumed: Any) -> Verdict:
    return judge_at_any_length(case, tuple(blocks), assumed)


def evaluate(wanted: Evaluation) -> xr.Dataset:
    """The sites as lazy arrays with dims, without coordinates."""
    fit, inputs, binding = wanted.fit, wanted.inputs, wanted.fit.binding
    _check_integers(inputs)
    lazily = check_in_memory(collect_requirements(fit, inputs, wanted.program), inputs)
    check_places(fit, inputs, tuple(wanted.latents))
    structs, name = wanted.traced(inputs.sizes)
    if may_index(name):
        ranges = collect_index_ranges(fit, inputs, wanted.position_kernel, name)
        lazily += check_in_memory(ranges, inputs)
    partly = [n for n in wanted.latents if KNOWN + n in inputs.arrays]
    if _may_recur(wanted, name):
        check_recursions(fit, inputs, wanted.sites, (*wanted.drawn, *partly), wanted.dependences)
    wanted = _without_holes(wanted, structs)
    weight = sum(o.size * o.dtype.itemsize for o in structs.values())
    planned = plan_cells if wanted.statistics else plan
    cut = planned(binding, inputs, wanted.shape, weight, get_options()["block_bytes"])
    _check_cut(wanted, cut)
    padded = wanted.padded(cut)
    if any(padded[d] != inputs.sizes[d] for d in padded):
        # First, for here a model says by itself what it finds wrong with a block.
        structs, name = wanted.traced({**inputs.sizes, **padded})
    verdict = _check_independent(wanted, cut, judge)
    if verdict.least > min(padded.values(), default=verdict.least):
        padded = {d: max(n, min(verdict.least, inputs.sizes[d])) for d, n in padded.items()}
        structs, name = wanted.traced({**inputs.sizes, **padded})
    outputs = {
        site: (wanted.dims(site)[: len(struct.shape)], struct) for site, struct in structs.items()
    }
    task = Task(
        name=name,
        identity=fit.token,
        factory=wanted.factory,
        program=wanted.program,
        params=fit.params,
        padded=padded,
        sizes=inputs.sizes,
        requirements=resize(lazily, {**inputs.sizes, **padded}),
    )
    return _named(wanted, task, cut, outputs)


def _check_integers(inputs: Inputs) -> None:
    """Refuse integers that JAX cannot hold: a task would too, values in memory are checked now."""
    for key, array in inputs.arrays.items():
        if is_in_memory(array) and array.dtype.kind in "iu":
            to_device_dtype(key, array.values)


def _may_recur(wanted: Evaluation, name: str) -> bool:
    """Whether a traced program has a recursion as long as a dimension of the Dataset."""
    lengths, sizes = recursions_of(name), wanted.inputs.sizes
    along = [sizes[d] for d in wanted.fit.binding.dims]
    return lengths is None or bool(lengths & {*along, prod(along)})


def _site_keys(wanted: Evaluation) -> np.ndarray:
    """The key of each site that may be drawn, for each draw: (chain, draw, site, 2)."""
    chains, draws = (
        np.asarray(label_words(d, wanted.posterior.indexes.get(d), size=n))
        for d, n in zip(("chain", "draw"), wanted.shape, strict=True)
    )
    shape = (*wanted.shape, 2)
    found = keys.site_keys(
        keys.seed_key(wanted.seed),
        np.broadcast_to(chains[:, None], shape),
        np.broadcast_to(draws, shape),
        wanted.program.keyed,
    )
    return np.stack([found[name] for name in wanted.program.keyed], axis=2)


def _without_holes(wanted: Evaluation, structs: Mapping[str, Any]) -> Evaluation:
    """Refuses missing inputs of outcomes that cannot be missing: now, or in their task."""
    fit, inputs, under = wanted.fit, wanted.inputs, wanted.under
    if under is not None and may_have_holes(fit, inputs):
        # What is drawn counts: a contrast of whole numbers may be none.
        structs, _ = replace(wanted, under=None).traced(inputs.sizes)
    sampled = [n for n, s in fit.sites.items() if s.kind in ("latent", "observed")]
    drawn = {n: structs[n].dtype if n in structs else fit.sites[n].dtype for n in sampled}
    whole = {n: np.dtype(dtype) for n, dtype in drawn.items() if np.dtype(dtype).kind != "f"}
    if not whole:
        return wanted
    worlds = None if under is None else under.worlds
    drawing = Drawing(fit, inputs, wanted.drawn, worlds)
    return replace(wanted, inputs=without_holes(drawing, wanted.sites, whole))


def _named(
    wanted: Evaluation,
    task: Task,
    cut: Plan,
    outputs: Mapping[str, tuple[tuple[str, ...], Any]],
) -> xr.Dataset:
    """The draws of the outputs, or what is asked of them, under their names in a Dataset."""
    names = {n: result_name(wanted.fit.binding, wanted.fit.sites[n]) for n in outputs}
    if wanted.statistics:
        task = replace(task, after=_Reduction(wanted.statistics))
        names, outputs = suffixed(names, wanted.statistics), reduced(outputs, wanted.statistics)
    else:
        outputs = {n: (("chain", "draw", *dims), one) for n, (dims, one) in outputs.items()}
    lazy = lazy_sites(task, cut, wanted.inputs, wanted.latents, _site_keys(wanted), outputs)
    result = xr.Dataset({names[n]: (outputs[n][0], array) for n, array in lazy.items()})
    result = in_cells(result, wanted.fit, wanted.inputs, wanted.leading)
    if not wanted.statistics:
        return result
    # Cells were cut to have room for all draws; what is left of those is small.
    return result.chunk({d: c for d, c in wanted.inputs.chunks.items() if d in result.dims})


@dataclass(frozen=True)
class _Reduction:
    """Statistics of a block's draws."""

    statistics: tuple[Statistic, ...]

    def __call__(self, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return reduce(draws, self.statistics)

    def __dask_tokenize__(self) -> Any:
        # By what it computes: not by where our code stands, which moves.
        return "statistics", *(tuple(vars(one).items()) for one in self.statistics)


def _check_cut(wanted: Evaluation, cut: Plan) -> None:
    """What has no part in a dimension that is cut must be the same in all its blocks."""
    pieces = {d for d, chunks in cut.chunks.items() if len(chunks) > 1}
    check_not_cut(wanted.fit.binding, pieces, "into blocks")
    reads = {k: pieces & set(map(str, a.dims)) for k, a in wanted.inputs.arrays.items()}
    reads |= {n: pieces & set(map(str, a.dims)) for n, a in wanted.latents.items()}
    sites = {n: wanted.fit.sites[n] for n in wanted.drawn}
    reads |= {n: pieces & set(dims_in_dataset(s, wanted.fit.binding)) for n, s in sites.items()}
    for name in wanted.latents:
        if lengths := sorted(wanted.fit.sites[name].lengths & pieces):
            raise ModelError(
                f"latent site {name!r} has an axis of its own whose length the model makes from "
                f"that of {lengths[0]!r}, which is cut into blocks: none of them has the whole "
                f"length. Fit with core_dim={lengths[0]!r}, or give the site a value for each "
                f"label: with xr_aimz.plate({lengths[0]!r})"
            )
    # What a scan draws, all of its block depends on, asked for or not.
    partly = [n for n in wanted.latents if KNOWN + n in wanted.inputs.arrays]
    for name in dict.fromkeys((*wanted.sites, *wanted.drawn, *partly)):
        site = wanted.fit.sites[name]
        dims = dims_in_dataset(site, wanted.fit.binding)
        step = next(iter(dims[len(wanted.fit.binding.per) :]), None) if site.scanned else None
        if step in pieces:
            raise ModelError(
                f"site {name!r} is inside a scan along {step!r}, which is cut into blocks; "
                f"fit with core_dim={step!r}"
            )
        through = {k: d - set(dims) for k, d in reads.items() if d - set(dims)}
        if site.kind == "deterministic" and through:
            reached = wanted.reached(name) & set(through)
            if reached:
                lost = sorted(set().union(*(through[k] for k in reached)))
                raise ModelError(
                    f"deterministic {name!r} has no dimension {lost!r} but is made from "
                    f"{sorted(reached)!r}, which have: each block would give another. Leave it "
                    f"out, sites=..., or keep the dimension whole: core_dim={lost!r} at the fit"
                )


def _check_independent(wanted: Evaluation, cut: Plan, judged: Callable[..., Verdict]) -> Verdict:
    """The model, as one cell of a fit with ``per`` sees it, needs no block but its own."""
    blocks = {d: cut.largest(d) for d in wanted.fit.binding.dims if len(cut.chunks[d]) > 1}
    if not blocks:
        return Verdict()
    case = _case(wanted)
    verdict = judged(case, blocks, wanted.assumed)
    needed = {d: n for d, n in blocks.items() if d not in wanted.assumed}
    raise_if_coupled(verdict, case.program.returns, needed)
    _check_functions(wanted, case.program, needed)
    return verdict


def _check_functions(wanted: Evaluation, program: Program, blocks: Mapping[str, int]) -> None:
    """What callables of the caller's make of a site's values, they make cell by cell."""
    if wanted.under is None or not blocks:
        return
    worlds, sites, sizes = wanted.under.worlds, wanted.fit.sites, wanted.inputs.sizes
    layout = partial(site_layout, program, whole=sizes, block={**sizes, **blocks}, dims=blocks)
    for change in worlds.sites:
        for function in change.functions:
            obstacle = function_obstacle(function, [layout(sites[change.target])])
            if obstacle is not None:
                raise_not_cellwise(f"do={{{change.target!r}: ...}}", obstacle, blocks)
    if worlds.contrast is not None:
        for name in program.returns:
            obstacle = function_obstacle(worlds.contrast, [layout(sites[name])] * 2)
            if obstacle is not None:
                raise_not_cellwise(f"contrast={worlds.contrast!r}", obstacle, blocks)


def _case(wanted: Evaluation) -> Case:
    """The model of one cell of ``per``, with what ``do`` makes of its arguments."""
    fit, per = wanted.fit, wanted.fit.binding.per
    first = dict.fromkeys(per, 0)
    seen = {str(n): a for ds in (fit.constant_data, fit.observed_data) for n, a in ds.items()}
    latents, seen = (
        {n: a.isel(first, drop=True, missing_dims="ignore") for n, a in arrays.items()}
        for arrays in (wanted.latents, seen)
    )
    inputs = wanted.inputs
    if wanted.under is not None:
        inputs = wanted.under.with_dims_of_values(inputs, fit.binding)
    inputs = inputs.of_cell(per)
    cell = fit.binding.without_data().of_cell()
    program = replace(wanted.program, binding=cell, dims=inputs.dims, worlds=None)
    return Case(program, inputs, latents, fit.params, seen)
