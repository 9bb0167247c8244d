"""What ``do`` means on a Dataset: named scenarios of targets and their labelled values.

Values are aligned by label and checked here, lazily, before anything is traced. A dimension
that neither the Dataset nor the model has, such as one over five levels of a gas, is a
dimension of scenarios, and so is that of their names. Each combination of their labels is a
world (:mod:`xr_aimz.worlds`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.axes import dims_in_dataset
from xr_aimz.errors import DimensionError, InterventionError, LabelError
from xr_aimz.inputs import Inputs
from xr_aimz.labelling import result_name
from xr_aimz.posterior import Fit
from xr_aimz.targets import Target, targets_of
from xr_aimz.values import Context, Setting, setting
from xr_aimz.worlds import Change, Value, Worlds

__all__ = ["BASELINE", "SCENARIO", "Scenario", "Scenarios", "check_shown", "scenarios"]

SCENARIO = "scenario"
BASELINE = "baseline"
Do = Mapping[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One ``do``: what each target is set to, and under which name of the user's."""

    settings: Mapping[Target, Setting]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scenarios:
    """Several, by name, and the baseline that they are held against.

    Parameters
    ----------
    named : mapping of name to Scenario
        One without a name, of ``None``, where ``do`` maps targets alone.
    baseline : Scenario, optional
    levels : mapping of dim to DataArray
        The dims that values bring along, with their coordinate where they have one.
    """

    named: Mapping[str | None, Scenario]
    baseline: Scenario | None
    levels: Mapping[str, xr.DataArray]

    @property
    def all(self) -> tuple[Scenario, ...]:
        first = () if self.baseline is None else (self.baseline,)
        return (*first, *self.named.values())

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(t for s in self.all for t in s.settings))

    @property
    def replaced(self) -> frozenset[str]:
        """The arrays that every world has another value of, in every cell."""
        each = [{t for t, s in one.settings.items() if s.everywhere} for one in self.all]
        return frozenset(t.name for t in set.intersection(*each) if t.kind == "array")

    @property
    def names(self) -> tuple[str, ...]:
        """What is intervened on, as the user calls it."""
        return tuple(dict.fromkeys(n for s in self.all for n in s.names))

    @property
    def entries(self) -> dict[tuple[int, Target], tuple[str, Setting]]:
        """The values that travel as arrays: by place of the scenario and target."""
        found: dict[tuple[int, Target], tuple[str, Setting]] = {}
        for place, scenario in enumerate(self.all):
            for target, made in scenario.settings.items():
                if made.value is not None:
                    found[place, target] = f"do {len(found)} {target.name}", made
        return found

    @property
    def arrays(self) -> dict[str, xr.DataArray]:
        return {key: s.value for key, s in self.entries.values() if s.value is not None}

    def coords(self, side_by_side: bool) -> dict[str, xr.DataArray]:
        """The coordinates of the dims of the scenarios that have one."""
        found = {d: c for d, c in self.levels.items() if c.coords}
        names = self._labels(side_by_side)
        if names:
            found = {SCENARIO: xr.DataArray(np.array(names), dims=SCENARIO)} | found
        return found

    def _labels(self, side_by_side: bool) -> list[str]:
        """Along ``scenario``; empty if there is no such dimension."""
        if self.shows_baseline(side_by_side):
            return [BASELINE, *(n or "do" for n in self.named)]
        return [n for n in self.named if n is not None]

    def shows_baseline(self, side_by_side: bool) -> bool:
        """Whether the baseline is an entry of the result: it has no place in a sweep."""
        return side_by_side and self.baseline is not None and not self.levels

    def worlds(self, redrawn: frozenset[str], contrast: Callable | None) -> Worlds:
        """The worlds of a program: the baseline first, if it is used at all."""
        alone = contrast is None
        sizes = {d: a.sizes[d] for d, a in self.levels.items()}
        labels = self._labels(alone)
        dims = ({SCENARIO: len(labels)} if labels else {}) | sizes
        places = self._places(sizes, with_baseline=not alone or self.shows_baseline(alone))
        made: dict[str, list[Change]] = {"array": [], "site": []}
        for target in self.targets:
            each = tuple(self._at(place, at, target) for place, at in places)
            made[target.kind].append(Change(target.name, each))
        return Worlds(tuple(made["array"]), tuple(made["site"]), dims, redrawn, contrast)

    def _places(
        self, sizes: Mapping[str, int], with_baseline: bool
    ) -> list[tuple[int, dict[str, int]]]:
        """For each world its scenario, and where it is along the levels."""
        first = 0 if self.baseline is None else 1
        levels = [dict(zip(sizes, at, strict=True)) for at in product(*map(range, sizes.values()))]
        found = [(first + n, at) for n in range(len(self.named)) for at in levels]
        return [(0, {}), *found] if with_baseline and self.baseline is not None else found

    def _at(self, place: int, at: Mapping[str, int], target: Target) -> Value | Callable | None:
        made = self.all[place].settings.get(target)
        if made is None or made.value is None:
            return None if made is None else made.function
        here = {d: at[d] for d in made.levels}
        return Value(self.entries[place, target][0], here, made.whole)


def scenarios(do: Do, baseline: Do | None, fit: Fit, inputs: Inputs, ds: xr.Dataset) -> Scenarios:
    """Read ``do`` and ``baseline``, checked.

    Parameters
    ----------
    do, baseline : mapping
        As in :func:`xr_aimz.intervene`.
    fit : Fit
    inputs : Inputs
        What the Dataset gives to the fit.
    ds : Dataset

    Raises
    ------
    MissingVariableError, InterventionError, LabelError, DimensionError, UnitsError, DtypeError
    """
    named = _named(do)
    own = {d for s in fit.sites.values() for d in dims_in_dataset(s, fit.binding)}
    own |= {result_name(fit.binding, s) for s in fit.sites.values()}
    taken = {*map(str, ds.dims), *inputs.sizes, *own, "chain", "draw"}
    if None not in named and SCENARIO in taken:
        raise DimensionError(
            f"scenarios with names need a dimension {SCENARIO!r}, and the Dataset or the model "
            "has that name already; rename it"
        )
    if None not in named:
        taken.add(SCENARIO)
    context = Context(fit, inputs, frozenset(taken))
    read = {name: _scenario(one, context) for name, one in named.items()}
    base = None if baseline is None else _scenario(baseline, context)
    if base is not None and any(s.levels for s in base.settings.values()):
        extra = sorted({d for s in base.settings.values() for d in s.levels})
        raise DimensionError(f"baseline= has dimensions {extra!r} of its own; it is one world")
    return Scenarios(read, base, _levels(read))


def check_shown(found: Scenarios) -> None:
    """Scenarios side by side show the baseline that was asked for, or refuse it."""
    if BASELINE in found.named:
        raise InterventionError(
            f"a scenario is called {BASELINE!r}, as the world beside it; rename it, or say "
            "baseline= instead"
        )
    if found.levels and found.baseline is not None and found.baseline.settings:
        raise InterventionError(
            f"baseline= has no place beside a sweep along {list(found.levels)!r}; take a "
            "contrast, or make it a scenario of its own"
        )


def _named(do: Any) -> dict[str | None, Do]:
    if not isinstance(do, Mapping) or not do:
        raise InterventionError(
            f"do={do!r}: give a mapping of names to values, such as do={{'co2': 280.0}}, or of "
            "names of scenarios to such mappings"
        )
    nested = [n for n, v in do.items() if isinstance(v, Mapping)]
    if not nested:
        return {None: do}
    if len(nested) < len(do):
        flat = [n for n in do if n not in nested]
        raise InterventionError(
            f"do= has scenarios {nested!r} and, beside them, values of {flat!r}; put those into "
            "each scenario that they belong to"
        )
    return {str(name): one for name, one in do.items()}


def _scenario(do: Any, context: Context) -> Scenario:
    if not isinstance(do, Mapping):
        raise InterventionError(f"baseline={do!r}: give a mapping of names to values, as do=")
    found: dict[Target, Setting] = {}
    for name, given in do.items():
        for target in targets_of(str(name), context.fit.binding, context.fit.sites):
            if target in found:
                raise InterventionError(
                    f"do={{{name!r}: ...}} sets {target.kind} {target.name!r}, and so does "
                    f"another name in {list(do)!r}; keep one"
                )
            found[target] = setting(str(name), given, target, context)
    return Scenario(found, tuple(map(str, do)))


def _levels(named: Mapping[str | None, Scenario]) -> dict[str, xr.DataArray]:
    """The dims that values bring along; values that share one share its labels."""
    found: dict[str, xr.DataArray] = {}
    for scenario in named.values():
        for target, made in scenario.settings.items():
            for dim, labels in made.levels.items():
                first = found.setdefault(dim, labels)
                if not labels.equals(first):
                    raise LabelError(
                        f"values along {dim!r} do not meet: {target.name!r} has "
                        f"{labels.values[:5].tolist()!r}, another {first.values[:5].tolist()!r}; "
                        "values vary together along a dimension that they share. Give them the "
                        "same labels, or dimensions of their own"
                    )
    return found
