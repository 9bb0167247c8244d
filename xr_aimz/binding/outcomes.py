"""Check a model's outcomes: present in the Dataset at the fit, and omitted in a prediction.

An outcome is an argument whose default is ``None``, so a misspelled one leaves a model that
observes nothing, and a model that needs its outcome for more than ``obs=`` cannot predict.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import jax
import xarray as xr

from xr_aimz.binding.alignment import AlignedInputs
from xr_aimz.binding.casting import jax_dtype
from xr_aimz.binding.layout import arrange, block_of
from xr_aimz.binding.spec import Binding, BoundArgument
from xr_aimz.errors import BindingError, ModelError, find_closest, list_names
from xr_aimz.tracing import Parameter, Site, location_note, trace_sites

# A variable counts as a misspelled argument only if the names differ by a letter or two: 'flow'
# and 'flwo' are as near as that, 'tas_min' and 'tas_max' are not.
_SPELLING_CUTOFF = 0.75


def check_outcome_bound(
    ds: xr.Dataset,
    name: str,
    signature: tuple[Parameter, ...],
    arguments: tuple[BoundArgument, ...],
    constants: Collection[str],
) -> None:
    """
    Check that an outcome is bound, and that no default hides a variable of nearly its name.

    Parameters
    ----------
    ds : Dataset
    name : str
        Name of the model.
    signature : tuple of Parameter
    arguments : tuple of BoundArgument
        Those bound to variables; ``outcome`` marks those that may be one.
    constants : collection of str

    Raises
    ------
    BindingError
    """
    bound = {a.name for a in arguments} | set(constants)
    defaulted = [p for p in signature if not p.required and p.name not in bound]
    variables = {s.name for a in arguments for s in a.sources}
    unused = sorted(str(v) for v in ds.variables if v not in variables and v not in ds.dims)
    for parameter in defaulted:
        nearest = find_closest(parameter.name, unused, _SPELLING_CUTOFF)
        if nearest is not None:
            raise BindingError(
                f"argument {parameter.name!r} of {name} is left to its default, "
                f"{parameter.default!r}: the Dataset has no such variable, but it has "
                f"{nearest!r}, which is bound to no argument. Say which is meant: "
                f"variables={{{parameter.name!r}: {nearest!r}}}, or "
                f"variables={{{parameter.name!r}: {parameter.default!r}}}"
            )
    absent = [p.name for p in defaulted if p.default is None]
    if absent and not any(a.outcome for a in arguments):
        names = sorted(map(str, [*ds.data_vars, *ds.coords]))
        raise BindingError(
            f"{name} has no outcome here: an outcome is an argument whose default is None and "
            f"that a site observes, and {absent!r} are bound to nothing: the Dataset has "
            f"{list_names(names, absent)}. Say variables={{{absent[0]!r}: ...}}"
        )


def make_structs(
    inputs: AlignedInputs, sizes: Mapping[str, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of each input array, by key, on a Dataset of other sizes."""
    return {
        key: jax.ShapeDtypeStruct(tuple(sizes[str(d)] for d in a.dims), jax_dtype(a.dtype))
        for key, a in inputs.arrays.items()
    }


def trace_without_outcomes(
    model: Callable, binding: Binding, inputs: AlignedInputs
) -> Exception | None:
    """
    Trace a model without its outcomes, as a prediction on the same Dataset does.

    Parameters
    ----------
    model : callable
    binding : Binding
    inputs : AlignedInputs
        Outcomes in them are omitted.

    Returns
    -------
    Exception or None
        The exception that the model raised.
    """
    cell = inputs.of_cell(binding.per)
    block = block_of(binding, cell.sizes)
    keys = {s.key for a in binding.inputs for s in a.sources}
    structs = {k: struct for k, struct in make_structs(cell, cell.sizes).items() if k in keys}
    try:
        trace_sites(model, partial(arrange, binding, dims=cell.dims, block=block), structs, block)
    except Exception as error:
        # A model may raise an error of any class.
        return error
    return None


def explain_need_of_outcome(error: Exception, binding: Binding) -> str:
    """Explain that a model does not run without its outcomes, and what to change."""
    names = [a.name for a in binding.outcomes]
    location = location_note(error)
    length = "X.shape[0]"
    if binding.layout == "grid" and binding.dims:
        length = f"xr_aimz.plate({binding.dims[0]!r}).size"
    return (
        f"the model does not run without its outcomes {names!r}, which are None in a prediction: "
        f"it raised {type(error).__name__}: {error}{f' ({location})' if location else ''}. What "
        "only an outcome provides, such as a length, must come from an input, x.shape[0], or from "
        f"the Dataset: scan(..., length={length})"
    )


def check_observed_values(
    model: Callable, binding: Binding, inputs: AlignedInputs, sites: Mapping[str, Site]
) -> None:
    """
    Refuse a site that observes a part or a function of an outcome, if it fails on None.

    Raises
    ------
    ModelError
    """
    outcomes = {a.name for a in binding.outcomes}
    derived = [
        s
        for s in sites.values()
        if s.kind == "observed"
        and not s.scanned
        and s.obs_argument is None
        and s.observed_inputs & outcomes
    ]
    error = trace_without_outcomes(model, binding, inputs) if derived else None
    if error is None:
        return
    site, name = derived[0].name, sorted(derived[0].observed_inputs & outcomes)[0]
    lag = f"ds[{binding.argument(name).sources[0].name!r}].shift({(*binding.dims, 'time')[0]}=1)"
    raise ModelError(
        f"site {site!r} observes a part or a function of the outcome {name!r}, which is None in a "
        f"prediction: there the model raises {type(error).__name__}: {error}. Bind what is "
        f"observed as a variable and observe it as it is, obs={name} (for a lag bind {lag} as an "
        f"input, and drop the labels that it has no value for); or write obs=None if {name} is "
        "None else ..."
    ) from error
