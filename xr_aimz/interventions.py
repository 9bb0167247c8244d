"""An intervention made ready: what it sets, what that reaches, and what is drawn anew.

A latent site below a target is drawn given it, in every world and from the same bits, so
that worlds differ by what was set and by nothing else; sites above keep their posterior.
A target that reaches nothing that is asked for cannot act, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import Binding
from xr_aimz.errors import InterventionError
from xr_aimz.failures import explain_failure
from xr_aimz.inputs import Inputs
from xr_aimz.ints import unread
from xr_aimz.paths import Parents, arrows_of, below
from xr_aimz.posterior import Fit
from xr_aimz.scenarios import Scenario, check_shown, scenarios
from xr_aimz.worlds import Worlds, dims_replaced

__all__ = ["Intervention", "intervention"]


@dataclass(frozen=True)
class Intervention:
    """The worlds of a program, and what they need and bring.

    Parameters
    ----------
    worlds : Worlds
    arrays : mapping of key to DataArray
        The values, to go in with the inputs.
    coords : mapping of dim to DataArray
        Of the dims of the scenarios.
    names : tuple of str
        What is intervened on.
    reached : frozenset of str
        The sites that it changes or may change.
    """

    worlds: Worlds
    arrays: Mapping[str, xr.DataArray]
    coords: Mapping[str, xr.DataArray]
    names: tuple[str, ...]
    reached: frozenset[str]

    def __str__(self) -> str:
        redrawn = sorted(self.worlds.redrawn)
        return f"do {', '.join(self.names)}" + (f"; drawn given it {redrawn}" if redrawn else "")

    def added_to(self, inputs: Inputs) -> Inputs:
        return replace(inputs, arrays={**inputs.arrays, **self.arrays})

    def with_dims_of_values(self, inputs: Inputs, binding: Binding) -> Inputs:
        """The inputs, each with the dims and the dtype that the values set in it give it."""
        dims, arrays = dims_replaced(self.worlds, binding, inputs.dims), dict(inputs.arrays)
        for change in self.worlds.arguments:
            array = arrays[change.target]
            values = [arrays[v.key].dtype for v in change.values if not v.whole]
            array = array.astype(np.result_type(array.dtype, *values), copy=False)
            gained = [d for d in dims[change.target] if d not in array.dims]
            array = array.expand_dims({d: inputs.sizes[d] for d in gained})
            arrays[change.target] = array.transpose(*dims[change.target])
        return replace(inputs, arrays=arrays)


def intervention(
    ds: xr.Dataset,
    fit: Fit,
    inputs: Inputs,
    returns: tuple[str, ...],
    *,
    do: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    contrast: Callable | None,
) -> Intervention:
    """Read ``do`` on a Dataset, and see that each part of it reaches a site of ``returns``."""
    read = scenarios(do, baseline, fit, inputs, ds)
    if contrast is None and baseline is not None:
        check_shown(read)
    blank = unread(fit, inputs, read.replaced)
    with explain_failure(fit, inputs, inputs.sizes):
        arrows = arrows_of(fit, inputs, {**inputs.arrays, **blank})
    for scenario in read.all:
        _check_reach(scenario, arrows, returns)
    nodes = below(arrows, {t.node for t in read.targets})
    redrawn = {n for n, s in fit.sites.items() if s.kind == "latent" and f"site {n}" in nodes}
    set_sites = {t.name for t in read.targets if t.kind == "site"}
    reached = {n for n in fit.sites if f"site {n}" in nodes} | set_sites
    return Intervention(
        read.worlds(frozenset(redrawn), contrast),
        {**read.arrays, **blank},
        read.coords(contrast is None),
        read.names,
        frozenset(reached),
    )


def _check_reach(scenario: Scenario, arrows: Parents, returns: tuple[str, ...]) -> None:
    wanted = {f"site {name}" for name in returns}
    everywhere = {t.node for t, s in scenario.settings.items() if s.everywhere}
    for target in scenario.settings:
        # What is set in every cell hears of nothing above it any more.
        deaf = everywhere - {target.node}
        if below(arrows, {target.node}, deaf) & wanted:
            continue
        raise InterventionError(
            f"do={{{target.name!r}: ...}} cannot change {list(returns)!r}: "
            f"{_break(target.node, arrows, deaf)}"
        )


def _break(node: str, arrows: Parents, deaf: set[str]) -> str:
    """Where the path from a target ends."""
    name = node.partition(" ")[2]
    next_ones = {n for n, made_of in arrows.items() if node in made_of}
    if not next_ones:
        return f"no site of the model is made from {name!r}"
    blocked = next_ones & deaf
    if blocked and not next_ones - deaf:
        return f"{name!r} acts through {_sites(blocked)!r} alone, set as well by the same do="
    reached = below(arrows, {node}, deaf)
    also = f", and {_sites(deaf)!r} is set as well" if deaf & below(arrows, {node}) else ""
    return (
        f"it reaches {_sites(next_ones)!r} first and {_sites(reached)!r} in all, and none of "
        f"these is among them{also}. Ask for one of those, sites=..., or change the model"
    )


def _sites(nodes: set[str] | frozenset[str]) -> list[str]:
    return sorted(n.partition(" ")[2] for n in nodes)
