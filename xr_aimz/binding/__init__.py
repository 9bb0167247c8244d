"""Bind the variables of a Dataset to the arguments of a model, and label arrays of sites.

A Dataset with observation dims and a model come in; aligned arrays in the order of the model's
axes come out, and arrays of sites go back to labelled dims.
"""

from xr_aimz.binding.alignment import (
    AlignedInputs,
    align,
    extra_labels,
    label_arrays,
    select_labels,
    with_coords,
)
from xr_aimz.binding.bound import BoundModel, bind, check_dataset, describe_kind, object_name
from xr_aimz.binding.casting import (
    Precision,
    align_memory,
    as_jax_array,
    as_jax_arrays,
    check_moments,
    is_wide,
    jax_dtype,
    loses_bits,
    measure_sd,
    reduce_moments,
)
from xr_aimz.binding.concrete import check_not_cut, check_sizes, require_same_values
from xr_aimz.binding.labels import check_float_labels, check_units, match_labels, reorder_like
from xr_aimz.binding.layout import (
    TABLE,
    arrange,
    assign_variables,
    block_of,
    broadcast_in_model,
    cell_binding,
    is_float,
    probe_sizes,
    shape_in_dataset,
    shape_in_model,
)
from xr_aimz.binding.outcomes import explain_need_of_outcome, trace_without_outcomes
from xr_aimz.binding.requirements import (
    BlockValues,
    Requirement,
    check_in_memory,
    check_values,
    describe_variables,
    is_in_memory,
    part_block,
    resize,
    whole_block,
)
from xr_aimz.binding.spec import LAYOUTS, Binding, BoundArgument, VariableRef

__all__ = [
    "LAYOUTS", "TABLE", "AlignedInputs", "Binding", "BlockValues", "BoundArgument",
    "BoundModel", "Precision", "Requirement", "VariableRef", "align", "align_memory",
    "arrange", "as_jax_array", "as_jax_arrays", "assign_variables", "bind", "block_of",
    "broadcast_in_model", "cell_binding", "check_dataset", "check_float_labels",
    "check_in_memory", "check_moments", "check_not_cut", "check_sizes", "check_units",
    "check_values", "describe_kind", "describe_variables", "explain_need_of_outcome",
    "extra_labels", "is_float", "is_in_memory", "is_wide", "jax_dtype", "label_arrays",
    "loses_bits", "match_labels", "measure_sd", "object_name", "part_block", "probe_sizes",
    "reduce_moments", "reorder_like", "require_same_values", "resize", "select_labels",
    "shape_in_dataset", "shape_in_model", "trace_without_outcomes", "whole_block",
    "with_coords",
]  # fmt: skip
