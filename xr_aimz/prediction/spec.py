"""Specify a prediction: the kernel, the inputs it is evaluated on, and the posterior draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    block_of,
    cell_binding,
    jax_dtype,
    probe_sizes,
    shape_in_model,
)
from xr_aimz.fits import Fit, explain_failure
from xr_aimz.kernel import (
    BlockData,
    DrawState,
    KernelSpec,
    PositionKernel,
    block_structs,
    condition_key,
    known_key,
    trace_outputs,
)
from xr_aimz.prediction.chunk_plan import ChunkPlan
from xr_aimz.prediction.dependence import DistributionInfo, distribution_info
from xr_aimz.prediction.graph import Factory
from xr_aimz.prediction.new_labels import posterior_draws
from xr_aimz.prediction.recursion import Dependence, find_dependences
from xr_aimz.prediction.scenarios import Intervention
from xr_aimz.prediction.statistics import Statistic
from xr_aimz.tracing import Node, Site, dependencies, trace_lock


class Tracer:
    """Traces a Prediction, and chooses the sizes to which its blocks are padded.

    That of a request to a served fit keeps traces in a cache of the fit.
    """

    def trace(
        self, prediction: Prediction, sizes: Mapping[str, int]
    ) -> tuple[dict[str, Any], str]:
        """Trace one draw of a block of ``sizes``: return output structs and the program's name."""
        return prediction.trace(sizes)

    def dependences(self, prediction: Prediction, dim: str) -> Mapping[str, Dependence]:
        """Find what the returned and the sampled sites depend on along a dimension."""
        return prediction.dependences(dim)

    def padded_sizes(self, prediction: Prediction, plan: ChunkPlan) -> dict[str, int]:
        """Return the sizes to which blocks are padded, so that one program serves all of them."""
        return {d: plan.largest(d) for d in prediction.fit.binding.block_dims}


@dataclass(frozen=True)
class Prediction:
    """Kernel to evaluate, with its fit, aligned inputs and posterior draws."""

    fit: Fit
    inputs: AlignedInputs
    posterior: xr.Dataset
    factory: Factory
    sites: tuple[str, ...]
    seed: int
    statistics: tuple[Statistic, ...] = ()
    intervention: Intervention | None = None
    assumed: tuple[str, ...] = ()

    @cached_property
    def program(self) -> KernelSpec:
        """Static part of the kernel: model, binding, sites and scenarios."""
        binding = self.fit.binding.without_data()
        scenarios = None if self.intervention is None else self.intervention.scenarios
        fit = self.fit
        return KernelSpec(fit.model, binding, fit.sites, self.inputs.dims, self.sites, scenarios)

    @cached_property
    def latents(self) -> dict[str, xr.DataArray]:
        """Posterior draws of each latent site; a local latent on the labels of this Dataset."""
        return {
            name: posterior_draws(self.posterior, site, self.fit.binding, self.inputs)
            for name, site in self.fit.sites.items()
            if site.kind == "latent" and name not in self.sampled_sites
        }

    @cached_property
    def sampled_sites(self) -> tuple[str, ...]:
        """Names of the sites that are sampled in every cell, unless they are conditioned."""
        resampled = (
            frozenset() if self.intervention is None else self.intervention.scenarios.resampled
        )

        def has_draws(name: str, site: Site) -> bool:
            return name not in resampled and site.variable in self.posterior

        return tuple(
            name
            for name, site in self.fit.sites.items()
            if site.kind == "observed" or (site.kind == "latent" and not has_draws(name, site))
        )

    @property
    def origins(self) -> dict[str, DistributionInfo]:
        """Parents and kind of each site's distribution, for one cell of ``per``."""
        cell = self._cell
        sizes = cell.inputs.sizes
        with explain_failure(self.fit, self.inputs, sizes):
            return distribution_info(cell.program, sizes, *cell.structs(sizes, with_sampled=True))

    def dependences(self, dim: str) -> Mapping[str, Dependence]:
        """Find what the returned and the sampled sites depend on along a dimension."""
        conditions = {key for n in self.sampled_sites for key in (condition_key(n), known_key(n))}
        arrays = {key: a for key, a in self.inputs.arrays.items() if key not in conditions}
        sites = tuple(dict.fromkeys((*self.sites, *self.sampled_sites)))
        unconditioned = replace(
            self, inputs=replace(self.inputs, arrays=arrays), sites=sites, intervention=None
        )
        cell = unconditioned._cell
        probe = probe_sizes(cell.fit.binding, cell.inputs.sizes)
        try:
            return find_dependences(
                cell.program, probe, dim, *cell.structs(probe, with_sampled=True)
            )
        except Exception:
            # Sizes are hard-coded in the model; with them, two dims may have the same length.
            sizes = cell.inputs.sizes
            return find_dependences(
                cell.program, sizes, dim, *cell.structs(sizes, with_sampled=True)
            )

    @property
    def _cell(self) -> Prediction:
        """Prediction of one cell of a fit with ``per``: the model itself has no ``per`` dims."""
        per = self.fit.binding.per
        if not per:
            return self
        first = dict.fromkeys(per, 0)
        binding, sites = cell_binding(self.fit.binding, self.fit.sites)
        fit = replace(self.fit, binding=binding, sites=sites)
        posterior = self.posterior.isel(first, drop=True, missing_dims="ignore")
        return replace(self, fit=fit, inputs=self.inputs.of_cell(per), posterior=posterior)

    @property
    def position_kernel(self) -> PositionKernel:
        """Kernel that returns the positions by which the model indexes arrays."""
        arrays = block_structs(self.program, self.inputs)
        latents = frozenset(self.latents)
        return PositionKernel(self.factory, self.program, latents, arrays, self.fit.params)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chains, and of draws a chain."""
        return self.posterior.sizes.get("chain", 1), self.posterior.sizes.get("draw", 1)

    def dims(self, site: str) -> tuple[str, ...]:
        """Return the dims of a site's result after ``chain`` and ``draw``."""
        return self.program.result_dims(site)

    @property
    def leading(self) -> tuple[str, ...]:
        """Dims that results have before those of their sites."""
        statistic_dims = [s.dim for s in self.statistics if s.dim is not None]
        return (*statistic_dims, "chain", "draw", *self.program.leading)

    def structs(
        self, sizes: Mapping[str, int], *, with_sampled: bool = False
    ) -> tuple[DrawState, BlockData]:
        """Make structs of a kernel's arguments, for one draw of a block of ``sizes``.

        With ``with_sampled``, sites that the kernel would sample are passed in, as latents are.
        """
        binding = self.fit.binding

        def struct(array: xr.DataArray) -> jax.ShapeDtypeStruct:
            dims = [str(d) for d in array.dims if d not in ("chain", "draw")]
            lengths = tuple(sizes[d] if d in binding.block_dims else array.sizes[d] for d in dims)
            return jax.ShapeDtypeStruct(lengths, jax_dtype(array.dtype))

        key_struct = jax.ShapeDtypeStruct((2,), np.uint32)
        latents = {name: struct(a) for name, a in self.latents.items()}
        for name in self.sampled_sites if with_sampled else ():
            site = self.fit.sites[name]
            cells = tuple(sizes[d] for d in binding.per)
            shape = cells + shape_in_model(site, binding, sizes)
            latents[name] = jax.ShapeDtypeStruct(shape, site.dtype)
        words = {d: jax.ShapeDtypeStruct((sizes[d], 2), np.uint32) for d in binding.block_dims}
        arrays = {key: struct(a) for key, a in self.inputs.arrays.items()}
        keys = dict.fromkeys(self.program.random_sites, key_struct)
        return DrawState(keys, latents), BlockData(arrays, self.fit.params, words)

    def trace(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        """Trace one draw of a block of ``sizes``: return output structs and the program's name."""
        block = block_of(self.fit.binding, sizes)
        with explain_failure(self.fit, self.inputs, sizes):
            return trace_outputs(self.factory(self.program, sizes), block, *self.structs(sizes))

    def inputs_of(self, name: str) -> frozenset[Node]:
        """Find the arrays and the sites that a site depends on."""
        sizes = self.inputs.sizes
        draw, shared = self.structs(sizes, with_sampled=True)
        kernel = self.factory(self.program, sizes)

        def site_value(array: Mapping[str, Any], site: Mapping[str, Any]) -> Any:
            return kernel(DrawState(zero_keys, site), BlockData(array, shared.params, words))[name]

        zero_keys = dict.fromkeys(draw.keys, np.zeros(2, np.uint32))
        words = {d: np.zeros(w.shape, np.uint32) for d, w in shared.words.items()}
        with trace_lock(block_of(self.fit.binding, sizes)):
            nodes: frozenset[Node] = dependencies(
                site_value, array=shared.arrays, site=draw.latents
            )
        return nodes
