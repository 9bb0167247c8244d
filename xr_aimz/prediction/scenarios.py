"""Read the scenarios of ``do=``: their targets and values, and the sites that they reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import AlignedInputs, Binding
from xr_aimz.errors import DimensionError, InterventionError, LabelError
from xr_aimz.fits import Fit, explain_failure
from xr_aimz.kernel import ArrayKey, ScenarioSet, TargetChange, ValueRef, dims_replaced
from xr_aimz.prediction.dependence import Parents, descendants, site_graph
from xr_aimz.prediction.interventions import (
    AlignedValue,
    Target,
    TargetContext,
    align_value,
    resolve_target,
)
from xr_aimz.prediction.missing_inputs import integer_placeholders
from xr_aimz.tracing import Node

SCENARIO = "scenario"
BASELINE = "baseline"
Do = Mapping[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One scenario of ``do``: the value of each target, and the names the user gave to targets."""

    settings: Mapping[Target, AlignedValue]
    names: tuple[str, ...]


@dataclass(frozen=True)
class ScenarioTable:
    """Scenarios by name, and the baseline with which they are contrasted.

    Parameters
    ----------
    named : mapping of name to Scenario
        A single scenario with the name None, where ``do`` maps targets to values.
    baseline : Scenario, optional
    levels : mapping of dim to DataArray
        Dims of values that neither Dataset nor model has, with their coordinate if any.
    """

    named: Mapping[str | None, Scenario]
    baseline: Scenario | None
    levels: Mapping[str, xr.DataArray]

    @property
    def all(self) -> tuple[Scenario, ...]:
        """Every scenario, after the baseline if there is one."""
        first = () if self.baseline is None else (self.baseline,)
        return (*first, *self.named.values())

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(dict.fromkeys(t for s in self.all for t in s.settings))

    @property
    def replaced(self) -> frozenset[str]:
        """Keys of the arrays that every scenario replaces in every cell."""
        per_scenario = [{t for t, s in item.settings.items() if s.everywhere} for item in self.all]
        return frozenset(t.name for t in set.intersection(*per_scenario) if t.kind == "array")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the targets, as in ``do``."""
        return tuple(dict.fromkeys(n for s in self.all for n in s.names))

    @property
    def entries(self) -> dict[tuple[int, Target], tuple[str, AlignedValue]]:
        """Values that are arrays, with their keys: by index of the scenario and target."""
        result: dict[tuple[int, Target], tuple[str, AlignedValue]] = {}
        for index, scenario in enumerate(self.all):
            for target, change in scenario.settings.items():
                if change.value is not None:
                    key = ArrayKey("do", target.name, len(result))
                    result[index, target] = key, change
        return result

    @property
    def arrays(self) -> dict[str, xr.DataArray]:
        return {key: s.value for key, s in self.entries.values() if s.value is not None}

    def coords(self, side_by_side: bool) -> dict[str, xr.DataArray]:
        """Return the coordinates of those scenario dims that have one."""
        result = {d: c for d, c in self.levels.items() if c.coords}
        names = self._labels(side_by_side)
        if names:
            result = {SCENARIO: xr.DataArray(np.array(names), dims=SCENARIO)} | result
        return result

    def _labels(self, side_by_side: bool) -> list[str]:
        """Return the labels along ``scenario``; empty if there is no such dimension."""
        if self.shows_baseline(side_by_side):
            return [BASELINE, *(n or "do" for n in self.named)]
        return [n for n in self.named if n is not None]

    def shows_baseline(self, side_by_side: bool) -> bool:
        """Return whether the baseline is an entry of the result; in a sweep it is none."""
        return side_by_side and self.baseline is not None and not self.levels

    def to_scenario_set(self, resampled: frozenset[str], contrast: Callable | None) -> ScenarioSet:
        """Make the scenario set of a program: the baseline first, if it is used."""
        no_contrast = contrast is None
        sizes = {d: a.sizes[d] for d, a in self.levels.items()}
        labels = self._labels(no_contrast)
        dims = ({SCENARIO: len(labels)} if labels else {}) | sizes
        positions = self._places(
            sizes, with_baseline=not no_contrast or self.shows_baseline(no_contrast)
        )
        change: dict[str, list[TargetChange]] = {"array": [], "site": []}
        for target in self.targets:
            per_scenario = tuple(self._at(index, at, target) for index, at in positions)
            change[target.kind].append(TargetChange(target.name, per_scenario))
        return ScenarioSet(
            tuple(change["array"]), tuple(change["site"]), dims, resampled, contrast
        )

    def _places(
        self, sizes: Mapping[str, int], with_baseline: bool
    ) -> list[tuple[int, dict[str, int]]]:
        """List each run's scenario index, and its index along each level dim."""
        first = 0 if self.baseline is None else 1
        levels = [dict(zip(sizes, at, strict=True)) for at in product(*map(range, sizes.values()))]
        result = [(first + n, at) for n in range(len(self.named)) for at in levels]
        return [(0, {}), *result] if with_baseline and self.baseline is not None else result

    def _at(self, index: int, at: Mapping[str, int], target: Target) -> ValueRef | Callable | None:
        change = self.all[index].settings.get(target)
        if change is None or change.value is None:
            return None if change is None else change.function
        level_indices = {d: at[d] for d in change.levels}
        return ValueRef(self.entries[index, target][0], level_indices, change.is_integer)


def parse_do(
    do: Do, baseline: Do | None, fit: Fit, inputs: AlignedInputs, ds: xr.Dataset
) -> ScenarioTable:
    """Parse and check ``do`` and ``baseline``.

    Parameters
    ----------
    do, baseline : mapping
        As in :func:`xr_aimz.intervene`.
    fit : Fit
    inputs : AlignedInputs
        Inputs of the Dataset, aligned to the fit.
    ds : Dataset

    Raises
    ------
    MissingVariableError, InterventionError, LabelError, DimensionError, UnitsError, DtypeError
    """
    named = _parse_scenarios(do)
    model_names = {d for s in fit.sites.values() for d in s.dataset_dims}
    model_names |= {s.variable for s in fit.sites.values()}
    taken_names = {*map(str, ds.dims), *inputs.sizes, *model_names, "chain", "draw"}
    if None not in named and SCENARIO in taken_names:
        raise DimensionError(
            f"scenarios with names need a dimension {SCENARIO!r}, and the Dataset or the model "
            "has that name already; rename it"
        )
    if None not in named:
        taken_names.add(SCENARIO)
    context = TargetContext(fit, inputs, frozenset(taken_names))
    scenarios = {name: _align_scenario(values, context) for name, values in named.items()}
    baseline_scenario = None if baseline is None else _align_scenario(baseline, context)
    if baseline_scenario is not None and any(
        s.levels for s in baseline_scenario.settings.values()
    ):
        extra = sorted({d for s in baseline_scenario.settings.values() for d in s.levels})
        raise DimensionError(f"baseline= has dimensions {extra!r} of its own; it is one scenario")
    return ScenarioTable(scenarios, baseline_scenario, _collect_levels(scenarios))


def check_baseline(scenario_table: ScenarioTable) -> None:
    """Check that scenarios side by side can show the baseline beside them."""
    if BASELINE in scenario_table.named:
        raise InterventionError(
            f"a scenario is called {BASELINE!r}, as is the baseline beside it; rename it, or give "
            "baseline= instead"
        )
    if (
        scenario_table.levels
        and scenario_table.baseline is not None
        and scenario_table.baseline.settings
    ):
        raise InterventionError(
            f"baseline= has no place beside a sweep along {list(scenario_table.levels)!r}; take a "
            "contrast, or make it a scenario of its own"
        )


def _parse_scenarios(do: Any) -> dict[str | None, Do]:
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
    return {str(name): values for name, values in do.items()}


def _align_scenario(do: Any, context: TargetContext) -> Scenario:
    if not isinstance(do, Mapping):
        raise InterventionError(f"baseline={do!r}: give a mapping of names to values, as do=")
    settings: dict[Target, AlignedValue] = {}
    for name, value in do.items():
        for target in resolve_target(str(name), context.fit.binding, context.fit.sites):
            if target in settings:
                raise InterventionError(
                    f"do={{{name!r}: ...}} sets {target.kind} {target.name!r}, and so does "
                    f"another name in {list(do)!r}; keep one"
                )
            settings[target] = align_value(str(name), value, target, context)
    return Scenario(settings, tuple(map(str, do)))


def _collect_levels(named: Mapping[str | None, Scenario]) -> dict[str, xr.DataArray]:
    """Collect the level dims of values; values that share one must have the same labels."""
    levels: dict[str, xr.DataArray] = {}
    for scenario in named.values():
        for target, value in scenario.settings.items():
            for dim, labels in value.levels.items():
                first = levels.setdefault(dim, labels)
                if not labels.equals(first):
                    raise LabelError(
                        f"values along {dim!r} do not meet: {target.name!r} has "
                        f"{labels.values[:5].tolist()!r}, another {first.values[:5].tolist()!r}; "
                        "values vary together along a dimension that they share. Give them the "
                        "same labels, or dimensions of their own"
                    )
    return levels


@dataclass(frozen=True)
class Intervention:
    """Scenarios of a program, with the arrays that they need and the coordinates that they add.

    Parameters
    ----------
    scenarios : ScenarioSet
    arrays : mapping of key to DataArray
        The values, to be added to the inputs.
    coords : mapping of dim to DataArray
        Coordinates of the scenario dims.
    names : tuple of str
        Names of the targets.
    affected_sites : frozenset of str
        The sites that it changes or may change.
    """

    scenarios: ScenarioSet
    arrays: Mapping[str, xr.DataArray]
    coords: Mapping[str, xr.DataArray]
    names: tuple[str, ...]
    affected_sites: frozenset[str]

    def __str__(self) -> str:
        resampled = sorted(self.scenarios.resampled)
        return f"do {', '.join(self.names)}" + (
            f"; drawn given it {resampled}" if resampled else ""
        )

    def added_to(self, inputs: AlignedInputs) -> AlignedInputs:
        return replace(inputs, arrays={**inputs.arrays, **self.arrays})

    def with_dims_of_values(self, inputs: AlignedInputs, binding: Binding) -> AlignedInputs:
        """Give each input the dims and dtype that the values set in it require."""
        dims, arrays = dims_replaced(self.scenarios, binding, inputs.dims), dict(inputs.arrays)
        for change in self.scenarios.arguments:
            array = arrays[change.target]
            values = [arrays[v.key].dtype for v in change.values if not v.is_integer]
            array = array.astype(np.result_type(array.dtype, *values), copy=False)
            new_dims = [d for d in dims[change.target] if d not in array.dims]
            array = array.expand_dims({d: inputs.sizes[d] for d in new_dims})
            arrays[change.target] = array.transpose(*dims[change.target])
        return replace(inputs, arrays=arrays)


def resolve_intervention(
    ds: xr.Dataset,
    fit: Fit,
    inputs: AlignedInputs,
    returns: tuple[str, ...],
    *,
    do: Mapping[str, Any],
    baseline: Mapping[str, Any] | None,
    contrast: Callable | None,
) -> Intervention:
    """Resolve ``do`` on a Dataset, and check that each target reaches a site of ``returns``."""
    table = parse_do(do, baseline, fit, inputs, ds)
    if contrast is None and baseline is not None:
        check_baseline(table)
    placeholders = integer_placeholders(fit, inputs, table.replaced)
    with explain_failure(fit, inputs, inputs.sizes):
        graph = site_graph(fit, inputs, {**inputs.arrays, **placeholders})
    for scenario in table.all:
        _check_reach(scenario, graph, returns)
    nodes = descendants(graph, {t.node for t in table.targets})
    resampled = {
        n for n, s in fit.sites.items() if s.kind == "latent" and Node("site", n) in nodes
    }
    target_sites = {t.name for t in table.targets if t.kind == "site"}
    reached = {n for n in fit.sites if Node("site", n) in nodes} | target_sites
    return Intervention(
        table.to_scenario_set(frozenset(resampled), contrast),
        {**table.arrays, **placeholders},
        table.coords(contrast is None),
        table.names,
        frozenset(reached),
    )


def _check_reach(scenario: Scenario, graph: Parents, returns: tuple[str, ...]) -> None:
    returned_nodes = {Node("site", name) for name in returns}
    fully_set = {t.node for t, s in scenario.settings.items() if s.everywhere}
    for target in scenario.settings:
        # A target that is set in every cell no longer depends on its ancestors.
        blocking = fully_set - {target.node}
        if descendants(graph, {target.node}, blocking) & returned_nodes:
            continue
        raise InterventionError(
            f"do={{{target.name!r}: ...}} cannot change {list(returns)!r}: "
            f"{_explain_break(target.node, graph, blocking)}"
        )


def _explain_break(node: Node, graph: Parents, blocking: set[Node]) -> str:
    """Explain where the path from a target to the returned sites ends, for a message."""
    name = node.name
    children = {n for n, parents in graph.items() if node in parents}
    if not children:
        return f"no site of the model is made from {name!r}"
    blocked = children & blocking
    if blocked and not children - blocking:
        return f"{name!r} acts through {_list_sites(blocked)!r} alone, set as well by the same do="
    reached = descendants(graph, {node}, blocking)
    also = (
        f", and {_list_sites(blocking)!r} is set as well"
        if blocking & descendants(graph, {node})
        else ""
    )
    return (
        f"it reaches {_list_sites(children)!r} first and {_list_sites(reached)!r} in all, and "
        f"none of these is among them{also}. Ask for one of those, sites=..., or change the model"
    )


def _list_sites(nodes: set[Node] | frozenset[Node]) -> list[str]:
    return sorted(node.name for node in nodes)
