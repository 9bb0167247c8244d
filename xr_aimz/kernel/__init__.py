"""Run a model for one posterior draw on one block.

Arrays of one block, the latents of one draw and its keys come in; the values or log densities of
sites over the block's dims come out. Pure functions, compiled once for each shape.
"""

from xr_aimz.kernel.compile import may_take_by_position, run_draws, scan_lengths, trace_outputs
from xr_aimz.kernel.coupling import (
    CouplingProblem,
    Verdict,
    find_coupling,
    find_coupling_at_any_length,
    function_obstacle,
    raise_if_coupled,
    raise_not_cellwise,
    site_layout,
)
from xr_aimz.kernel.index_ranges import PositionKernel, find_index_ranges, find_integers_cast
from xr_aimz.kernel.program import distributions, log_likelihood, predictive
from xr_aimz.kernel.scenarios import ScenarioSet, TargetChange, ValueRef, dims_replaced
from xr_aimz.kernel.spec import (
    ArrayKey,
    BlockData,
    DrawState,
    Kernel,
    KernelSpec,
    condition_key,
    known_key,
)
from xr_aimz.kernel.supports import block_structs, find_outcome_supports, find_supports

__all__ = [
    "ArrayKey", "BlockData", "CouplingProblem", "DrawState", "Kernel", "KernelSpec",
    "PositionKernel", "ScenarioSet", "TargetChange", "ValueRef", "Verdict", "block_structs",
    "condition_key", "dims_replaced", "distributions", "find_coupling",
    "find_coupling_at_any_length", "find_index_ranges", "find_integers_cast",
    "find_outcome_supports", "find_supports", "function_obstacle", "known_key",
    "log_likelihood", "may_take_by_position", "predictive", "raise_if_coupled",
    "raise_not_cellwise", "run_draws", "scan_lengths", "site_layout", "trace_outputs",
]  # fmt: skip
