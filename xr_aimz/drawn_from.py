"""In which cells a site is drawn from an input, itself or through other sites that are drawn.

A prediction draws a site in all cells, in some, or in none: values are given, set by an
intervention, or known from the posterior. Where a site is not drawn, nothing passes through
it. So every way from the input to the site is followed through the arrows of the model, in
each world by itself, and what is left open of all of them is a mask of the input's cells.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import xarray as xr

from xr_aimz.axes import dims_in_dataset
from xr_aimz.binding import Argument, Source
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import CONDITION, KNOWN
from xr_aimz.model import Site
from xr_aimz.paths import Parents, arrows_of, below
from xr_aimz.posterior import Fit
from xr_aimz.upstream import step_dim
from xr_aimz.worlds import Change, Value, Worlds

__all__ = ["Drawing", "is_nowhere", "over"]

_EVERYWHERE, _NOWHERE = xr.Variable((), True), xr.Variable((), False)


@dataclass(frozen=True)
class Drawing:
    """What a prediction draws.

    Parameters
    ----------
    fit : Fit
    inputs : Inputs
        With the values and masks of what is given, known and set.
    drawn : tuple of str
        The sites that are drawn in every cell, unless they are given.
    worlds : Worlds, optional
    """

    fit: Fit
    inputs: Inputs
    drawn: tuple[str, ...]
    worlds: Worlds | None = None

    def cells(self, argument: Argument, source: Source, site: str) -> xr.Variable:
        """A mask of the input's cells: those from which ``site`` is drawn in some world.

        Cells along a dimension that the model couples, and along one that some site on the
        way lacks, are taken together. Lazy where a mask of what is given is.
        """
        found = _NOWHERE
        for world in range(self._count):
            for way in self._ways(argument, source, site, world):
                found = found | (self._untouched("arguments", source.key, world) & way)
                if not found.dims and found.chunks is None and found.values:
                    return found
        return found

    def between(self, argument: Argument, source: Source, site: str) -> tuple[str, ...]:
        """The sites through which the input reaches ``site``; none if that is made from it."""
        arrows = self._arrows(argument, source)
        if f"array {source.key}" in arrows[f"site {site}"]:
            return ()
        way = self._on_the_way(arrows, source.key, site, self._ever)
        return tuple(n for n in way if n != site)

    def feeds(self, site: str, wanted: Collection[str]) -> bool:
        """Whether a drawn value of ``site`` is asked for, or is part of what is."""
        if site not in self._ever or site in wanted:
            return site in self._ever
        reached = below(self._parents, {f"site {site}"}, self._closed(self._ever))
        return any(f"site {n}" in reached for n in wanted)

    @property
    def _count(self) -> int:
        changes = () if self.worlds is None else (*self.worlds.arguments, *self.worlds.sites)
        return max((len(c.worlds) for c in changes), default=1)

    @cached_property
    def _parents(self) -> Parents:
        own = {s.key for a in self.fit.binding.inputs for s in a.sources}
        arrays = {key: a for key, a in self.inputs.arrays.items() if key in own}
        return arrows_of(self.fit, self.inputs, arrays)

    def _arrows(self, argument: Argument, source: Source) -> Parents:
        """With those that the fit found, where a distribution can only be drawn from."""
        own = frozenset({f"array {source.key}"})
        return {
            node: made_of | own if self._reads(node, argument) else made_of
            for node, made_of in self._parents.items()
        }

    def _reads(self, node: str, argument: Argument) -> bool:
        return argument.name in self.fit.sites[node.removeprefix("site ")].reads

    def _ways(
        self, argument: Argument, source: Source, site: str, world: int
    ) -> Iterator[xr.Variable]:
        """Of each way from an input to a site, in which cells all of its sites are drawn."""
        arrows, free = self._arrows(argument, source), self._free[world]
        whole = {n for n, mask in free.items() if not mask.dims and mask.chunks is None}
        partly = [n for n in free if n not in whole]
        seen: list[set[str]] = []
        for some in (set(c) for k in range(len(partly) + 1) for c in combinations(partly, k)):
            if any(s <= some for s in seen):
                continue
            on_the_way = self._on_the_way(arrows, source.key, site, whole | some)
            if site in on_the_way:
                seen.append(some)
                kept = self._apart(source, on_the_way)
                yield _all([over(free[n], kept) for n in sorted(some)])

    def _on_the_way(
        self, arrows: Parents, key: str, site: str, passable: Collection[str]
    ) -> list[str]:
        closed = self._closed(passable)
        reached = below(arrows, {f"array {key}"}, closed)
        return [
            name
            for name in self.fit.sites
            if f"site {name}" in reached
            and name in passable
            and (name == site or f"site {site}" in below(arrows, {f"site {name}"}, closed))
        ]

    def _closed(self, passable: Collection[str]) -> set[str]:
        return {f"site {n}" for n in self.fit.sites if n not in passable}

    def _apart(self, source: Source, names: list[str]) -> set[str]:
        """The dims along which a cell of the input is part of the same cell of each site."""
        binding, sites = self.fit.binding, [self.fit.sites[n] for n in names]
        kept = {d for d in binding.cut_dims if d in self.inputs.arrays[source.key].dims}
        for site in sites:
            kept &= set(dims_in_dataset(site, binding)) - {step_dim(site, binding)}
        return kept - set(binding.core_dims)

    @cached_property
    def _ever(self) -> set[str]:
        """The sites of which some cell may be drawn in some world."""
        return {name for free in self._free for name in free}

    @cached_property
    def _free(self) -> list[dict[str, xr.Variable]]:
        return [self._free_in(world) for world in range(self._count)]

    def _free_in(self, world: int) -> dict[str, xr.Variable]:
        """In which cells each site is drawn in a world, of those that are in any."""
        found = {
            name: self._undecided(site) & self._untouched("sites", name, world)
            for name, site in self.fit.sites.items()
            if site.kind in ("latent", "observed")
        }
        return {name: mask for name, mask in found.items() if not is_nowhere(mask)}

    def _undecided(self, site: Site) -> xr.Variable:
        """The cells that have no value, given or of the posterior."""
        arrays = self.inputs.arrays
        known = arrays.get(KNOWN + site.name)
        if CONDITION + site.name not in arrays and site.name in self.drawn:
            return _EVERYWHERE
        return _NOWHERE if known is None else ~known.variable

    def _untouched(self, kind: str, target: str, world: int) -> xr.Variable:
        """The cells in which no value is set in a world; a function is of what is there."""
        changes: tuple[Change, ...] = () if self.worlds is None else getattr(self.worlds, kind)
        value = next((c.worlds[world] for c in changes if c.target == target), None)
        if not isinstance(value, Value):
            return _EVERYWHERE
        return self.inputs.arrays[value.key].isel(value.at, drop=True).isnull().variable


def is_nowhere(mask: xr.Variable) -> bool:
    """Whether a mask in memory has no cell."""
    return mask.chunks is None and not mask.values.any()


def _all(masks: list[xr.Variable]) -> xr.Variable:
    found = _EVERYWHERE
    for mask in masks:
        found = found & mask
    return found


def over(mask: xr.Variable, kept: Collection[Hashable]) -> xr.Variable:
    """A mask over some dims: true where it is anywhere along the others."""
    gone = [d for d in mask.dims if d not in kept]
    return mask.any(gone) if gone else mask
