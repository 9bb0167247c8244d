"""A model as a traced program.

A NumPyro model and shapes come in; sites with their plates, what reaches what, fingerprints,
and a proof that cells along a dim are independent come out. Nothing is computed.
"""

from xr_aimz.tracing.axis_rules import FlattenedAxes, Tags
from xr_aimz.tracing.dataflow import (
    CARRY,
    ForwardScans,
    Labels,
    MarkedCarry,
    Node,
    dependencies,
    inner_programs,
    largest_product,
    reaches,
    recursion_length,
    recursion_lengths,
    scan_counts,
    split_constants,
)
from xr_aimz.tracing.fingerprint import LRUCache, program_fingerprint, traced_fingerprint
from xr_aimz.tracing.independence import Obstacle, find_obstacles
from xr_aimz.tracing.index_bounds import Position, find_positions, has_positions, positions_of
from xr_aimz.tracing.shared_terms import is_difference, without_shared_terms
from xr_aimz.tracing.sites import (
    FEATURE,
    Block,
    Parameter,
    Plate,
    Site,
    density_inputs,
    factor_inputs,
    location_note,
    model_name,
    model_parameters,
    note_location,
    observed_inputs,
    observed_values,
    plate,
    trace_lock,
    trace_sites,
)

__all__ = [
    "CARRY", "FEATURE", "Block", "FlattenedAxes", "ForwardScans", "LRUCache", "Labels",
    "MarkedCarry", "Node", "Obstacle", "Parameter", "Plate", "Position", "Site", "Tags",
    "density_inputs", "dependencies", "factor_inputs", "find_obstacles", "find_positions",
    "has_positions", "inner_programs", "is_difference", "largest_product", "location_note",
    "model_name", "model_parameters", "note_location", "observed_inputs", "observed_values",
    "plate", "positions_of", "program_fingerprint", "reaches", "recursion_length",
    "recursion_lengths", "scan_counts", "split_constants", "trace_lock", "trace_sites",
    "traced_fingerprint", "without_shared_terms",
]  # fmt: skip
