"""The requirements on the arrays that a prediction is made from."""

from __future__ import annotations

import xarray as xr

from xr_aimz.casting import Precision, is_wide, loses_bits
from xr_aimz.concrete import require_same_values
from xr_aimz.conversions import find_converted
from xr_aimz.index_ranges import PositionKernel, find_index_ranges
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import CONDITION, Program
from xr_aimz.labelling import result_name
from xr_aimz.posterior import Fit
from xr_aimz.requirements import Requirement, describe_variables, is_in_memory
from xr_aimz.supports import find_outcome_supports, find_supports
from xr_aimz.worlds import Worlds

__all__ = ["collect_index_ranges", "collect_requirements"]

# Every integer up to here is a float of 32 bits.
_DIGITS = 2**24


def collect_requirements(fit: Fit, inputs: Inputs, program: Program) -> tuple[Requirement, ...]:
    """The requirements on inputs and outcomes, and on values of ``do`` and ``condition``."""
    conditions = _conditions(fit)
    described = {**_variables(fit), **conditions, **_settings(fit, program.worlds)}
    found: list[Requirement] = []
    wide = [k for k, a in inputs.arrays.items() if k in described and _may_be_wide(a)]
    converted = find_converted(program, inputs, fit.params) if wide else frozenset()
    for key, array in inputs.arrays.items():
        if key in described and (loses_bits(array.dtype) or (key in wide and key in converted)):
            what, name = described[key]
            found.append(Precision(key, what, fit.data_sd.get(name), fit.binding.per))
    given = {
        site: conditions[CONDITION + site][0]
        for site in fit.sites
        if CONDITION + site in inputs.arrays
    }
    found += require_same_values(fit.binding)
    found += find_supports(program, inputs, fit.params, given)
    return (*found, *find_outcome_supports(program, inputs, fit.params))


def collect_index_ranges(
    fit: Fit, inputs: Inputs, kernel: PositionKernel, name: str
) -> tuple[Requirement, ...]:
    """The requirements on inputs, and values of ``do``, by which a model takes entries."""
    described = {**_variables(fit), **_conditions(fit), **_settings(fit, kernel.program.worlds)}
    words = {key: what for key, (what, _) in described.items()}
    labels = {**fit.binding.labels, **inputs.labels}
    return find_index_ranges(kernel, inputs, words, labels, name)


def _may_be_wide(array: xr.DataArray) -> bool:
    """Whether integers have, or are lazy and may have, more digits than JAX's floats."""
    if not is_wide(array.dtype) or not is_in_memory(array) or not array.size:
        return is_wide(array.dtype) and not is_in_memory(array)
    return int(array.max()) > _DIGITS or int(array.min()) < -_DIGITS


# Of an array its key, what it is in words, and the variable that it gives values to.
_Described = dict[str, tuple[str, str]]


def _variables(fit: Fit) -> _Described:
    names = {s.key: s.name for a in fit.binding.arguments for s in a.sources}
    return {k: (words, names[k]) for k, words in describe_variables(fit.binding).items()}


def _conditions(fit: Fit) -> _Described:
    names = {n: result_name(fit.binding, s) for n, s in fit.sites.items()}
    return {CONDITION + site: (f"condition={name!r}", name) for site, name in names.items()}


def _settings(fit: Fit, worlds: Worlds | None) -> _Described:
    if worlds is None:
        return {}
    arguments = {s.key: s.name for a in fit.binding.arguments for s in a.sources}
    sites = {n: result_name(fit.binding, s) for n, s in fit.sites.items()}
    changes = [(arguments[c.target], c) for c in worlds.arguments]
    changes += [(sites[c.target], c) for c in worlds.sites]
    return {v.key: (f"do={{{n!r}: ...}}", n) for n, c in changes for v in c.values}
