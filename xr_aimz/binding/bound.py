"""Bind a model to a Dataset: resolve its arguments, trace its sites, and name their axes.

The order of these steps matters. Names determine the arguments; a trace shows which of
them are observed and how many event dimensions the outcome has; those determine the
observation dimensions, and with them the layout that the trace itself used. So bindings
are tried, fewest event dimensions first, until one agrees with its own trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import xarray as xr

from xr_aimz.binding.alignment import AlignedInputs, align
from xr_aimz.binding.concrete import find_concrete, resize_values, with_concrete_values
from xr_aimz.binding.layout import (
    arrange,
    assign_dims,
    assign_lengths,
    assign_variables,
    block_of,
    probe_sizes,
)
from xr_aimz.binding.outcomes import check_observed_values, check_outcome_bound, make_structs
from xr_aimz.binding.spec import (
    LAYOUTS,
    Binding,
    BoundArgument,
    dimension_labels,
    observation_dims,
    resolve,
)
from xr_aimz.errors import (
    BindingError,
    DimensionError,
    ModelError,
    OptionError,
    list_names,
    suggest,
)
from xr_aimz.tracing import (
    Parameter,
    Site,
    density_inputs,
    model_name,
    model_parameters,
    observed_inputs,
    trace_sites,
)


@dataclass(frozen=True)
class BoundModel:
    """Model bound to a Dataset: its binding, aligned inputs, and traced sites by name."""

    model: Callable
    binding: Binding
    inputs: AlignedInputs
    sites: Mapping[str, Site]


def bind(
    ds: xr.Dataset,
    model: Callable,
    variables: Mapping[str, Any] | None = None,
    *,
    dim: Any = None,
    core_dim: Any = None,
    layout: str = "grid",
    per: Any = None,
    data_sites: Collection[str] | None = None,
) -> BoundModel:
    """Bind a model's arguments to a Dataset's variables and trace it on their shapes.

    Parameters
    ----------
    ds : Dataset
    model : callable
    variables, dim, core_dim, layout, per
        As in :func:`xr_aimz.fit`.
    data_sites : collection of str, optional
        Latent sites that have draws. With it, an outcome need not be in the Dataset:
        latent sites without draws are taken for outcomes.

    Raises
    ------
    BindingError, MissingVariableError, DimensionError, ModelError
    """
    if layout not in LAYOUTS:
        raise BindingError(f"layout={layout!r}: there are {list_names(LAYOUTS, [layout])}")
    signature = model_parameters(model)
    arguments, constants = resolve(ds, signature, variables)
    optional = {p.name for p in signature if not p.required and p.default is None}
    candidates = tuple(replace(a, outcome=a.name in optional) for a in arguments)
    core = (core_dim,) if isinstance(core_dim, str) else tuple(core_dim or ())
    per_dims = (per,) if isinstance(per, str) else tuple(per or ())
    if data_sites is None:
        check_outcome_bound(ds, model_name(model), signature, candidates, constants)
    _check_per(ds, candidates, per_dims, core, dim)
    make = partial(
        _make_binding, ds, constants=constants, dim=dim, core=core, layout=layout, per=per_dims
    )
    bound = _infer_event_dims(ds, model, candidates, make, dim)
    observed = [s for s in bound.sites.values() if s.kind == "observed"]
    if data_sites is None:
        _check_observed(bound, signature, observed)
    else:
        bound = _mark_absent_outcomes(bound, signature, data_sites)
        _check_dims_known(bound, dim)
    check_observed_values(model, bound.binding, bound.inputs, bound.sites)
    bound = _name_axes(bound)
    _check_site_names(bound)
    _check_constants(bound)
    return bound


def _make_binding(
    ds: xr.Dataset,
    arguments: tuple[BoundArgument, ...],
    event_ndim: int,
    *,
    constants: dict[str, Any],
    dim: Any,
    core: tuple[str, ...],
    layout: str,
    per: tuple[str, ...],
) -> Binding:
    dims = observation_dims(ds, arguments, dim, event_ndim, per)
    # An event or extra dimension is never split anyway, so it is allowed as a core_dim.
    all_dims = {*dims, *(d for a in arguments for s in a.sources for d in s.dims)}
    absent = [d for d in core if d not in all_dims]
    if absent:
        raise DimensionError(
            f"core_dim={absent!r} is not among the observation dimensions {dims!r}, nor a "
            f"dimension of an argument; those have {sorted(all_dims)!r}{suggest(all_dims, absent)}"
        )
    labels = dimension_labels(ds, arguments, per + dims)
    return Binding(arguments, constants, dims, core, layout, labels, per)


def _check_per(
    ds: xr.Dataset,
    arguments: tuple[BoundArgument, ...],
    per: tuple[str, ...],
    core: tuple[str, ...],
    dim: Any,
) -> None:
    """Check that ``per`` dims are unique, not in ``core`` or ``dim``, and in every outcome."""
    if duplicates := sorted({d for d in per if per.count(d) > 1}):
        raise DimensionError(f"per={per!r} names {duplicates!r} more than once")
    dims = (dim,) if isinstance(dim, str) else tuple(dim or ())
    for name, others in (("core_dim", core), ("dim", dims)):
        if shared := [d for d in per if d in others]:
            raise DimensionError(
                f"per={shared!r} is in {name}={others!r} too: a model is fitted for each label of "
                "per, and gets arrays without that dimension; leave it out of one of them"
            )
    for argument in arguments if per else ():
        for source in argument.sources if argument.outcome else ():
            absent = [d for d in per if d not in source.dims]
            if absent:
                scalar = [d for d in absent if d in ds.coords and ds[d].ndim == 0]
                raise DimensionError(
                    f"per={absent!r}: the outcome {source.name!r} has no such dimension, it has "
                    f"{source.dims!r}{suggest(source.dims, absent)}"
                    + (f"; give it back with ds.expand_dims({scalar!r})" if scalar else "")
                )


def _infer_event_dims(
    ds: xr.Dataset,
    model: Callable,
    arguments: tuple[BoundArgument, ...],
    make: Callable[[tuple[BoundArgument, ...], int], Binding],
    dim: Any,
    concrete: frozenset[str] = frozenset(),
) -> BoundModel:
    """Bind with the smallest number of event dims that agrees with the model's trace.

    The ``concrete`` arguments are passed by their values.
    """
    max_ndim = _max_event_ndim(arguments, make(arguments, 0).per)
    first_error: Exception | None = None
    for event_ndim in range(1 if dim is not None else max_ndim + 1):
        try:
            binding = make(arguments, event_ndim)
        except DimensionError as error:
            # A core_dim would be an event dim; an error of the model itself is more informative.
            first_error = first_error or error
            break
        inputs = align(binding, ds, outcomes=True)
        try:
            binding = with_concrete_values(binding, inputs, concrete)
            bound, observed = _trace_bound(model, binding, inputs)
        except Exception as error:
            trace = partial(_trace_cell, model, inputs)
            if not concrete and (needed := find_concrete(trace, binding, inputs)):
                return _infer_event_dims(ds, model, arguments, make, dim, needed)
            # An error of the model itself, which may run with another number of event dims.
            first_error = first_error or error
            continue
        flagged = tuple(replace(a, outcome=a.outcome and a.name in observed) for a in arguments)
        if flagged != arguments:
            return _infer_event_dims(ds, model, flagged, make, dim, concrete)
        if dim is not None or _agrees(bound, event_ndim):
            return bound
    if first_error is None:
        raise ModelError(
            "no number of event dimensions of the outcome agrees with its site's distribution; "
            "say which dims are observations: dim=(...)"
        )
    _note_absent_variables(first_error, ds, model, arguments)
    raise first_error


def _max_event_ndim(arguments: tuple[BoundArgument, ...], per: tuple[str, ...]) -> int:
    dims = [set(s.dims) - set(per) for a in arguments if a.outcome for s in a.sources]
    return max(map(len, dims), default=0)


def _note_absent_variables(
    error: Exception, ds: xr.Dataset, model: Callable, arguments: tuple[BoundArgument, ...]
) -> None:
    """Add a note on arguments left to their defaults: a misspelled outcome is a likely cause."""
    bound = {a.name for a in arguments}
    absent = [p.name for p in model_parameters(model) if not p.required and p.name not in bound]
    if absent:
        names = sorted(map(str, [*ds.data_vars, *ds.coords]))
        error.add_note(
            f"xr_aimz: arguments {absent!r} were left to their defaults: the Dataset has no "
            f"such variables; it has {list_names(names, absent)}. If one is meant, say "
            f"variables={{{absent[0]!r}: ...}}"
        )


def _trace_bound(
    model: Callable, binding: Binding, inputs: AlignedInputs
) -> tuple[BoundModel, set[str]]:
    """Trace a binding; return the bound model and the arguments that reach an observed value."""
    cell = inputs.of_cell(binding.per)
    block = block_of(binding, cell.sizes)
    arranged = partial(arrange, binding, dims=cell.dims, block=block)
    structs = make_structs(cell, cell.sizes)
    sites = {s.name: s for s in _trace_cell(model, inputs, binding)}
    observed_keys = observed_inputs(model, arranged, structs, block) if structs else {}
    density_keys = density_inputs(model, arranged, structs, block) if structs else {}
    argument_of = {s.key: a.name for a in binding.arguments for s in a.sources}
    for name, site in sites.items():
        density_args, observed_args = (
            frozenset(argument_of[key] for key in keys_of_site.get(name, ()))
            for keys_of_site in (density_keys, observed_keys)
        )
        sites[name] = replace(
            site, density_inputs=density_args - observed_args, observed_inputs=observed_args
        )
    all_observed: set[str] = set()
    for name, keys in observed_keys.items():
        names = {argument_of[k] for k in keys}
        outcomes = [a.name for a in binding.outcomes if a.name in names]
        all_observed |= names
        # A scan passes slices to its body, so the outcome is found by what reaches the site,
        # not by identity.
        if sites[name].scanned and len(outcomes) == 1:
            sites[name] = replace(sites[name], obs_argument=outcomes[0])
    return BoundModel(model, binding, inputs, sites), all_observed


def _trace_cell(model: Callable, inputs: AlignedInputs, binding: Binding) -> tuple[Site, ...]:
    cell = inputs.of_cell(binding.per)
    block = block_of(binding, cell.sizes)
    arranged = partial(arrange, binding, dims=cell.dims, block=block)
    return trace_sites(model, arranged, make_structs(cell, cell.sizes), block)


def _agrees(bound: BoundModel, event_ndim: int) -> bool:
    outcomes = {a.name: a for a in bound.binding.outcomes}
    ndims = [
        (len(outcomes[s.obs_argument].sources[0].dims), s.event_ndim)
        for s in bound.sites.values()
        if s.obs_argument in outcomes
    ]
    return max(ndims)[1] == event_ndim if ndims else True


def _check_observed(
    bound: BoundModel, signature: tuple[Parameter, ...], observed: list[Site]
) -> None:
    model = model_name(bound.model)
    if not observed:
        absent = [p.name for p in signature if p.name not in _bound_names(bound)]
        raise ModelError(
            f"{model} observes nothing: no site had obs=. Arguments {absent!r} were left to "
            "their defaults; bind the outcome, variables={'y': 'tas'}, and pass it as obs=y"
        )
    if not bound.binding.outcomes:
        raise ModelError(
            f"{model} has observed sites {[s.name for s in observed]!r} but no outcome: an "
            "outcome is an argument whose default is None, def model(X, y=None), so that a "
            "prediction can leave it out"
        )


def _bound_names(bound: BoundModel) -> set[str]:
    return {a.name for a in bound.binding.arguments} | set(bound.binding.constants)


def _mark_absent_outcomes(
    bound: BoundModel, signature: tuple[Parameter, ...], sampled: Collection[str]
) -> BoundModel:
    """Mark latent sites without draws as observed, if as many outcomes can be absent."""
    missing = [n for n, s in bound.sites.items() if s.kind == "latent" and n not in sampled]
    optional = {p.name for p in signature if not p.required and p.default is None}
    absent = sorted(optional - _bound_names(bound))
    if len(missing) > len(absent):
        raise ModelError(
            f"latent sites {missing!r} have no draws in the posterior, which has "
            f"{sorted(sampled)!r}; only outcomes that are not in the Dataset, here {absent!r}, "
            "may have none"
        )
    sites = {n: replace(s, kind="observed") if n in missing else s for n, s in bound.sites.items()}
    return replace(bound, sites=sites)


def _check_dims_known(bound: BoundModel, dim: Any) -> None:
    """Check that the observation dims are determined: by an outcome, ``dim``, or a single dim."""
    dims = {d for a in bound.binding.arguments for s in a.sources for d in s.dims}
    if dim is None and not bound.binding.outcomes and len(dims) > 1:
        raise DimensionError(
            "the outcome is not in the Dataset, so its dimensions are not known; give the "
            f"observation dimensions, some of {sorted(dims)!r}: dim=(...)"
        )


def _name_axes(bound: BoundModel) -> BoundModel:
    """Assign dims to the axes of sites, by a second trace on probe sizes if possible."""
    binding, inputs = bound.binding, bound.inputs.of_cell(bound.binding.per)
    sizes = probe_sizes(binding, inputs.sizes)
    # None if the model hard-codes sizes: its axes are then matched by position.
    probed = _trace_at(bound.model, binding, inputs, sizes)
    sites = assign_dims(tuple(bound.sites.values()), probed, binding, inputs.sizes)
    sites = assign_lengths(
        sites, probed, binding, inputs.sizes, partial(_trace_at, bound.model, binding, inputs)
    )
    labels = {
        d: inputs.labels[d]
        for site in sites
        for d, n in zip(site.dims, site.shape, strict=True)
        if d is not None
        and d in inputs.labels
        and d not in binding.block_dims
        and inputs.sizes[d] == n
    }
    binding = replace(binding, labels={**binding.labels, **labels})
    named = assign_variables({s.name: s for s in sites}, binding)
    return replace(bound, binding=binding, sites=named)


def _trace_at(
    model: Callable, binding: Binding, inputs: AlignedInputs, sizes: Mapping[str, int]
) -> tuple[Site, ...] | None:
    """Trace the sites on a Dataset of other sizes; return None if the model does not run."""
    block = block_of(binding, sizes)
    resized = resize_values(binding, inputs, sizes)
    arranged = partial(arrange, resized, dims=inputs.dims, block=block)
    try:
        return trace_sites(model, arranged, make_structs(inputs, sizes), block)
    except Exception:
        # A model may raise any error on sizes for which it was not written.
        return None


def _check_site_names(bound: BoundModel) -> None:
    """Check that no two sites have the same name in a result: one would replace the other."""
    site_of: dict[str, str] = {}
    for site in bound.sites.values():
        name = site.variable
        if name in site_of and site.kind != "param":
            raise ModelError(
                f"sites {site_of[name]!r} and {site.name!r} would both be called {name!r} in a "
                "result; rename one of the sites, or the variable"
            )
        site_of[name] = site.name


def _check_constants(bound: BoundModel) -> None:
    """Check that no constant is an array along the observations: it needs labels to select by."""
    sizes = {
        bound.inputs.sizes[d]: d for d in bound.binding.block_dims if bound.inputs.sizes[d] > 1
    }
    for name, value in bound.binding.constants.items():
        along = [sizes[n] for n in getattr(value, "shape", ()) if n in sizes]
        if along:
            raise BindingError(
                f"variables={{{name!r}: ...}} is an array without labels, as long as "
                f"{along[0]!r}; add labels, xr.DataArray(values, dims={along[0]!r}, coords=...), "
                "or give a tuple if the equal length is a coincidence"
            )


def check_dataset(ds: Any, verb: str) -> None:
    """
    Check that the first argument of a public function is a Dataset.

    Parameters
    ----------
    ds : object
    verb : str
        The function that was called with it.

    Raises
    ------
    OptionError
    """
    if isinstance(ds, xr.Dataset):
        return
    remedy = f"it is called as xr_aimz.{verb}(ds, ...), or as ds.aimz.{verb}(...)"
    if isinstance(ds, xr.DataArray):
        remedy = f"convert it: {_array_name(ds.name)}.to_dataset(name={str(ds.name or 'y')!r})"
    raise OptionError(f"{verb} takes a Dataset first; found {describe_kind(ds)}: {remedy}")


def describe_kind(value: Any) -> str:
    """Describe an argument in a message: its type, and its value or name where that is short."""
    kind = type(value).__name__
    # The repr of a Dataset, a DataArray, a DataTree or a Fit is long.
    if type(value).__module__.partition(".")[0] in ("xarray", "xr_aimz"):
        return f"a {kind}"
    return (
        f"{object_name(value)!r}, a {kind}"
        if hasattr(value, "__name__")
        else f"{value!r}, a {kind}"
    )


def object_name(value: Any) -> str:
    """Return the name of a function, or of the type of another object."""
    return getattr(value, "__name__", type(value).__name__)


def _array_name(name: Any) -> str:
    return "da" if name is None else str(name)
