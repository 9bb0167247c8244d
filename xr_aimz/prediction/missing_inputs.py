"""Refuse missing inputs (NaN) of outcomes that are integers or bools, which have no NaN."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import AlignedInputs, BoundArgument, VariableRef
from xr_aimz.errors import MissingValueError
from xr_aimz.fits import Fit, cells_with_draws, integers_as_floats
from xr_aimz.kernel import ScenarioSet, TargetChange, ValueRef, condition_key, known_key
from xr_aimz.prediction.dependence import Parents, descendants, scan_dim, site_graph
from xr_aimz.tracing import Node, Site


def integer_placeholders(
    fit: Fit, inputs: AlignedInputs, replaced: Collection[str]
) -> Mapping[str, xr.DataArray]:
    """Return int32 zeros for the ``replaced`` arrays that were ints at the fit and are floats."""
    return {
        key: xr.zeros_like(inputs.arrays[key], np.int32)
        for key in integers_as_floats(fit, inputs)
        if key in replaced
    }


_EVERYWHERE, _NOWHERE = xr.Variable((), True), xr.Variable((), False)


@dataclass(frozen=True)
class SampledSites:
    """Sites that a prediction samples, and the cells in which it samples them.

    Parameters
    ----------
    fit : Fit
    inputs : AlignedInputs
        With the values and masks of ``condition``, ``new_labels`` and ``do``.
    sampled_sites : tuple of str
        The sites that are sampled in every cell, unless they are conditioned.
    scenarios : ScenarioSet, optional
    """

    fit: Fit
    inputs: AlignedInputs
    sampled_sites: tuple[str, ...]
    scenarios: ScenarioSet | None = None

    def cells(self, argument: BoundArgument, source: VariableRef, site: str) -> xr.Variable:
        """Make a mask of the cells of an input on which ``site`` depends, where it is sampled.

        A cell counts if the site is sampled from it in any scenario. Cells along a dimension that
        the model couples, or that some site on the path lacks, are taken together. Lazy where
        the mask of a conditioned site is lazy.
        """
        graph, dims = self._arrows(argument, source), self.inputs.arrays[source.key].dims
        source_dims = set(self.fit.binding.block_dims) & set(dims) - set(
            self.fit.binding.core_dims
        )
        result = _NOWHERE
        for scenario, sites in enumerate(self._free_sites):
            cells = spread_cells(Node("array", source.key), source_dims, graph, sites)
            if Node("site", site) in cells:
                untouched = self._untouched("arguments", source.key, scenario)
                result = result | (untouched & cells[Node("site", site)])
            if _is_everywhere(result):
                return result
        return result

    def between(self, argument: BoundArgument, source: VariableRef, site: str) -> tuple[str, ...]:
        """Return the sites between an input and ``site``; none if the input is a parent of it."""
        graph = self._arrows(argument, source)
        if Node("array", source.key) in graph[Node("site", site)]:
            return ()
        path = self._on_the_way(graph, source.key, site, self._ever)
        return tuple(n for n in path if n != site)

    def feeds(self, site: str, sites: Collection[str]) -> bool:
        """Return whether samples of ``site`` are returned, or a returned site depends on them."""
        if site not in self._ever or site in sites:
            return site in self._ever
        reached = descendants(self._parents, {Node("site", site)}, self._closed(self._ever))
        return any(Node("site", n) in reached for n in sites)

    @property
    def _count(self) -> int:
        changes = (
            () if self.scenarios is None else (*self.scenarios.arguments, *self.scenarios.sites)
        )
        return max((len(c.by_scenario) for c in changes), default=1)

    @cached_property
    def _parents(self) -> Parents:
        input_names = {s.key for a in self.fit.binding.inputs for s in a.sources}
        arrays = {key: a for key, a in self.inputs.arrays.items() if key in input_names}
        return site_graph(self.fit, self.inputs, arrays)

    def _arrows(self, argument: BoundArgument, source: VariableRef) -> Parents:
        """Add to the graph the inputs that the fit found, where a distribution has no density."""
        input_names = frozenset({Node("array", source.key)})
        return {
            node: parents | input_names if self._reads(node, argument) else parents
            for node, parents in self._parents.items()
        }

    def _reads(self, node: Node, argument: BoundArgument) -> bool:
        return argument.name in self.fit.sites[node.name].density_inputs

    @cached_property
    def _free_sites(self) -> list[dict[Node, FreeSite]]:
        """The sites that are sampled in some cell, in each scenario."""
        binding, sites = self.fit.binding, self.fit.sites
        dims = {n: frozenset(s.dataset_dims) - {scan_dim(s, binding)} for n, s in sites.items()}
        return [
            {Node("site", name): FreeSite(dims[name], mask) for name, mask in free_masks.items()}
            for free_masks in self._free
        ]

    def _on_the_way(
        self, graph: Parents, key: str, site: str, passable: Collection[str]
    ) -> list[str]:
        closed = self._closed(passable)
        reached = descendants(graph, {Node("array", key)}, closed)
        return [
            name
            for name in self.fit.sites
            if Node("site", name) in reached
            and name in passable
            and (
                name == site
                or Node("site", site) in descendants(graph, {Node("site", name)}, closed)
            )
        ]

    def _closed(self, passable: Collection[str]) -> set[Node]:
        return {Node("site", n) for n in self.fit.sites if n not in passable}

    @cached_property
    def _ever(self) -> set[str]:
        """Names of the sites of which some cell may be sampled in some scenario."""
        return {name for free_masks in self._free for name in free_masks}

    @cached_property
    def _free(self) -> list[dict[str, xr.Variable]]:
        return [self._free_in(scenario) for scenario in range(self._count)]

    def _free_in(self, scenario: int) -> dict[str, xr.Variable]:
        """Return masks of the cells where sites are sampled in a scenario, less empty masks."""
        result = {
            name: self._undecided(site) & self._untouched("sites", name, scenario)
            for name, site in self.fit.sites.items()
            if site.kind in ("latent", "observed")
        }
        return {name: mask for name, mask in result.items() if not is_empty_mask(mask)}

    def _undecided(self, site: Site) -> xr.Variable:
        """Return the mask of the cells that have no value, conditioned or of the posterior."""
        arrays = self.inputs.arrays
        known_mask = arrays.get(known_key(site.name))
        if condition_key(site.name) not in arrays and site.name in self.sampled_sites:
            return _EVERYWHERE
        return _NOWHERE if known_mask is None else ~known_mask.variable

    def _untouched(self, kind: str, target: str, scenario: int) -> xr.Variable:
        """Return the mask of cells without a set value; a function keeps missing values."""
        changes: tuple[TargetChange, ...] = (
            () if self.scenarios is None else getattr(self.scenarios, kind)
        )
        value = next((c.by_scenario[scenario] for c in changes if c.target == target), None)
        if not isinstance(value, ValueRef):
            return _EVERYWHERE
        return self.inputs.arrays[value.key].isel(value.at, drop=True).isnull().variable


def is_empty_mask(mask: xr.Variable) -> bool:
    """Return whether a mask is in memory and has no true cell."""
    return mask.chunks is None and not mask.values.any()


def _is_everywhere(mask: xr.Variable) -> bool:
    """Return whether a mask is in memory and is one true cell, for all cells."""
    return not mask.dims and mask.chunks is None and bool(mask.values)


@dataclass(frozen=True)
class FreeSite:
    """Site that is sampled in the cells of a mask.

    ``dims`` are those along which a cell of the site is made from that cell of its parents only.
    """

    dims: frozenset[str | None]
    mask: xr.Variable


def spread_cells(
    source: Node, dims: Collection[str], graph: Parents, sites: Mapping[Node, FreeSite]
) -> dict[Node, xr.Variable]:
    """Make masks of the cells of an input from which sites are sampled, by whatever path.

    Parameters
    ----------
    source : Node
        The input.
    dims : collection of str
        Dims of the input along which its cells are told apart.
    graph : mapping of Node to frozenset of Node
        Parents of each site.
    sites : mapping of Node to FreeSite
        The sites that are sampled in some cell.

    Returns
    -------
    mapping of Node to mask
        Of the sites that depend on the input. A cell is in a mask if it has a path to the site on
        which all sites are sampled, where such a path may jump between cells along dims that a
        site lacks.
    """
    same_cell_dims = _same_cell_dims(source, dims, graph, sites)
    order = [node for node in sites if node in same_cell_dims]
    # A pass carries masks along all steps forward. Sites of a scan are made from each other: there
    # are steps backward, and a path has at most one to each site.
    place = {node: number for number, node in enumerate(order)}
    backward = sum(any(place.get(p, -1) >= place[n] for p in graph[n]) for n in order)
    cells = {source: _EVERYWHERE}
    for _ in range(1 + backward):
        for node in order:
            parents = sorted(p for p in graph[node] if p in cells)
            if parents:
                site = sites[node]
                cells[node] = _union(
                    [_through(cells[p], site, same_cell_dims[p] & site.dims) for p in parents]
                )
    return cells


def _same_cell_dims(
    source: Node, dims: Collection[str], graph: Parents, sites: Mapping[Node, FreeSite]
) -> dict[Node, frozenset[Any]]:
    """Find the dims along which a cell of each site depends on that cell of an input only."""
    result = {source: frozenset[Any](dims)}
    while True:
        before = dict(result)
        for node, site in sites.items():
            parents = [result[p] for p in graph.get(node, ()) if p in result]
            if parents:
                result[node] = frozenset.intersection(*parents) & site.dims
        if result == before:
            return result


def _through(cells: xr.Variable, site: FreeSite, dims: Collection[Any]) -> xr.Variable:
    """Return those of a parent's cells from which a site is sampled."""
    # A mask that is everywhere is left out: it would be one operation more in a lazy graph.
    return cells if _is_everywhere(site.mask) else cells & any_over_other_dims(site.mask, dims)


def _union(masks: list[xr.Variable]) -> xr.Variable:
    return _EVERYWHERE if any(map(_is_everywhere, masks)) else reduce(or_, masks)


def any_over_other_dims(mask: xr.Variable, dims: Collection[Hashable]) -> xr.Variable:
    """Reduce a mask to some dims: true where it is true anywhere along the others."""
    other_dims = [d for d in mask.dims if d not in dims]
    return mask.any(other_dims) if other_dims else mask


def may_have_missing(fit: Fit, inputs: AlignedInputs) -> bool:
    """Return whether an input has a NaN, or is lazy and may have one."""
    return any(True for _ in _find_missing(fit, inputs))


def check_integer_outcomes(
    sampled: SampledSites, sites: Collection[str], integer_sites: Mapping[str, np.dtype]
) -> AlignedInputs:
    """Refuse missing inputs from which one of ``integer_sites`` is sampled; return checked inputs.

    Parameters
    ----------
    sampled : SampledSites
        Its inputs have the values of interventions.
    sites : collection of str
        The sites that are returned.
    integer_sites : mapping of site to dtype
        The sites whose values have no NaN. Those on which no returned site depends are skipped.

    Returns
    -------
    AlignedInputs
        A lazy array raises when it is computed.

    Raises
    ------
    MissingValueError
    """
    fit, inputs = sampled.fit, sampled.inputs
    arrays = dict(inputs.arrays)
    candidates = list(_find_missing(fit, inputs))
    site_names = [n for n in integer_sites if sampled.feeds(n, sites)] if candidates else []
    for argument, source in candidates:
        for site in site_names:
            mask = sampled.cells(argument, source, site)
            if is_empty_mask(mask):
                continue
            path = sampled.between(argument, source, site)
            through = f", which is made from it through {list(path)!r}," if path else ""
            message = (
                f"variable {source.name!r} (argument {argument.name!r}) has missing values "
                f"(NaN), and site {site!r}{through} is drawn as {integer_sites[site]}, which has "
                "none: "
                f"predict from ds.fillna({{{source.name!r}: 0}}), then mask the result, "
                f".where(ds[{source.name!r}].notnull())"
            )
            arrays[source.key] = _check_complete(arrays[source.key], fit, inputs, mask, message)
            if not mask.dims and mask.chunks is None:
                # Already checked in all cells, so the other sites need no check.
                break
    return replace(inputs, arrays=arrays)


def _find_missing(fit: Fit, inputs: AlignedInputs) -> Iterator[tuple[BoundArgument, VariableRef]]:
    """Yield arguments and sources of floats that have a NaN, or are lazy and may have one."""
    for argument in fit.binding.inputs:
        for source in argument.sources:
            array = inputs.arrays[source.key]
            if array.dtype.kind == "f" and (array.chunks is not None or array.isnull().any()):
                yield argument, source


def _check_complete(
    array: xr.DataArray, fit: Fit, inputs: AlignedInputs, mask: xr.Variable, message: str
) -> xr.DataArray:
    # Variables, not DataArrays: all are already on the labels of the inputs.
    with_draws = cells_with_draws(fit, inputs)
    used_mask = mask if with_draws is None else mask & with_draws.variable
    checked = xr.apply_ufunc(
        _check_nothing_missing,
        array.variable,
        any_over_other_dims(used_mask, array.dims),
        kwargs={"what": message},
        dask="parallelized",
        output_dtypes=[array.dtype],
        keep_attrs=True,
    )
    return array if checked.chunks is None else array.copy(data=checked.data)


def _check_nothing_missing(array: np.ndarray, used: Any, *, what: str) -> np.ndarray:
    if (np.isnan(array) & used).any():
        raise MissingValueError(what)
    return array
