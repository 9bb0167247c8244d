"""A model bound to a Dataset: arguments found, sites traced, their axes named.

The order matters and is this room's one idea: names give the arguments; a trace shows
which of them are observed and how many event dimensions the outcome has; those fix the
observation dimensions, and with them the layout that the trace itself used. So bindings
are tried, fewest event dimensions first, until one agrees with its own trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import xarray as xr

from xr_aimz.axes import probe_sizes, with_dims, with_lengths
from xr_aimz.binding import (
    LAYOUTS,
    Argument,
    Binding,
    arrange,
    block_of,
    labels_of,
    observation_dims,
    resolve,
)
from xr_aimz.concrete import find_concrete, resize_values, with_values
from xr_aimz.errors import BindingError, DimensionError, ModelError
from xr_aimz.inputs import Inputs, gather
from xr_aimz.labelling import result_name
from xr_aimz.model import (
    Parameter,
    Site,
    observed_through,
    parameters,
    read_by,
    trace_sites,
)
from xr_aimz.outcomes import check_observed_values, check_outcome_bound, make_structs
from xr_aimz.spelling import list_names, suggest

__all__ = ["Bound", "bind"]


@dataclass(frozen=True)
class Bound:
    """A model, a Dataset, and what each is to the other."""

    model: Callable
    binding: Binding
    inputs: Inputs
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
    known: Collection[str] | None = None,
) -> Bound:
    """Bind a model's arguments to a Dataset's variables and trace it on their shapes.

    Parameters
    ----------
    ds : Dataset
    model : callable
    variables, dim, core_dim, layout, per
        As in :func:`xr_aimz.fit`.
    known : collection of str, optional
        Sites whose draws are at hand; with it, an outcome need not be in the Dataset:
        latent sites that are not known are taken for outcomes.

    Raises
    ------
    BindingError, MissingVariableError, DimensionError, ModelError
    """
    if layout not in LAYOUTS:
        raise BindingError(f"layout={layout!r}: there are {list_names(LAYOUTS, [layout])}")
    signature = parameters(model)
    arguments, constants = resolve(ds, signature, variables)
    optional = {p.name for p in signature if not p.required and p.default is None}
    marked = tuple(replace(a, outcome=a.name in optional) for a in arguments)
    core = (core_dim,) if isinstance(core_dim, str) else tuple(core_dim or ())
    cells = (per,) if isinstance(per, str) else tuple(per or ())
    if known is None:
        check_outcome_bound(ds, _name(model), signature, marked, constants)
    _check_per(ds, marked, cells, core, dim)
    make = partial(_binding, ds, constants=constants, dim=dim, core=core, layout=layout, per=cells)
    bound = _settle(ds, model, marked, make, dim)
    observed = [s for s in bound.sites.values() if s.kind == "observed"]
    if known is None:
        _check_observed(bound, signature, observed)
    else:
        bound = _with_unknowns(bound, signature, known)
        _check_dims_known(bound, dim)
    check_observed_values(model, bound.binding, bound.inputs, bound.sites)
    bound = _named(bound)
    _check_names(bound)
    _check_constants(bound)
    return bound


def _binding(
    ds: xr.Dataset,
    arguments: tuple[Argument, ...],
    event_ndim: int,
    *,
    constants: dict[str, Any],
    dim: Any,
    core: tuple[str, ...],
    layout: str,
    per: tuple[str, ...],
) -> Binding:
    dims = observation_dims(ds, arguments, dim, event_ndim, per)
    # An event or extra dimension is never split anyway: to name it a core_dim is no mistake.
    known = {*dims, *(d for a in arguments for s in a.sources for d in s.dims)}
    strangers = [d for d in core if d not in known]
    if strangers:
        raise DimensionError(
            f"core_dim={strangers!r} is not among the observation dimensions {dims!r}, nor a "
            f"dimension of an argument; those have {sorted(known)!r}{suggest(known, strangers)}"
        )
    labels = labels_of(ds, arguments, per + dims)
    return Binding(arguments, constants, dims, core, layout, labels, per)


def _check_per(
    ds: xr.Dataset,
    arguments: tuple[Argument, ...],
    per: tuple[str, ...],
    core: tuple[str, ...],
    dim: Any,
) -> None:
    """Every cell has an outcome of its own, and is independent of the others."""
    if twice := sorted({d for d in per if per.count(d) > 1}):
        raise DimensionError(f"per={per!r} names {twice!r} more than once")
    dims = (dim,) if isinstance(dim, str) else tuple(dim or ())
    for name, others in (("core_dim", core), ("dim", dims)):
        if both := [d for d in per if d in others]:
            raise DimensionError(
                f"per={both!r} is in {name}={others!r} too: a model is fitted for each label of "
                "per, and sees no such dimension; leave it out of one of them"
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


def _settle(
    ds: xr.Dataset,
    model: Callable,
    arguments: tuple[Argument, ...],
    make: Callable[[tuple[Argument, ...], int], Binding],
    dim: Any,
    concrete: frozenset[str] = frozenset(),
) -> Bound:
    """The first number of event dims that its trace agrees with; values of ``concrete`` passed."""
    most = _most_event_dims(arguments, make(arguments, 0).per)
    first_error: Exception | None = None
    for event_ndim in range(1 if dim is not None else most + 1):
        try:
            binding = make(arguments, event_ndim)
        except DimensionError as error:
            # Of a core_dim that would be an event's: the model's own error says more.
            first_error = first_error or error
            break
        inputs = gather(binding, ds, outcomes=True)
        try:
            binding = with_values(binding, inputs, concrete)
            bound, reached = _traced(model, binding, inputs)
        except Exception as error:
            trace = partial(_trace_cell, model, inputs)
            if not concrete and (read := find_concrete(trace, binding, inputs)):
                return _settle(ds, model, arguments, make, dim, read)
            # The model's own error; another number of event dims may suit it better.
            first_error = first_error or error
            continue
        flagged = tuple(replace(a, outcome=a.outcome and a.name in reached) for a in arguments)
        if flagged != arguments:
            return _settle(ds, model, flagged, make, dim, concrete)
        if dim is not None or _agrees(bound, event_ndim):
            return bound
    if first_error is None:
        raise ModelError(
            "no number of event dimensions of the outcome agrees with its site's distribution; "
            "say which dims are observations: dim=(...)"
        )
    _note_absent(first_error, ds, model, arguments)
    raise first_error


def _most_event_dims(arguments: tuple[Argument, ...], per: tuple[str, ...]) -> int:
    dims = [set(s.dims) - set(per) for a in arguments if a.outcome for s in a.sources]
    return max(map(len, dims), default=0)


def _note_absent(
    error: Exception, ds: xr.Dataset, model: Callable, arguments: tuple[Argument, ...]
) -> None:
    """An outcome that is misspelled leaves the model without it: the likeliest cause."""
    bound = {a.name for a in arguments}
    absent = [p.name for p in parameters(model) if not p.required and p.name not in bound]
    if absent:
        there = sorted(map(str, [*ds.data_vars, *ds.coords]))
        error.add_note(
            f"xr_aimz: arguments {absent!r} were left to their defaults, for the Dataset has no "
            f"such variables; it has {list_names(there, absent)}. If one is meant, say "
            f"variables={{{absent[0]!r}: ...}}"
        )


def _traced(model: Callable, binding: Binding, inputs: Inputs) -> tuple[Bound, set[str]]:
    """The bound model, and the names of the arguments that reach an observed value."""
    cell = inputs.of_cell(binding.per)
    block = block_of(binding, cell.sizes)
    arranged = partial(arrange, binding, dims=cell.dims, block=block)
    structs = make_structs(cell, cell.sizes)
    sites = {s.name: s for s in _trace_cell(model, inputs, binding)}
    through = observed_through(model, arranged, structs, block) if structs else {}
    reads = read_by(model, arranged, structs, block) if structs else {}
    owner = {s.key: a.name for a in binding.arguments for s in a.sources}
    for name, site in sites.items():
        read, seen = (
            frozenset(owner[key] for key in found.get(name, ())) for found in (reads, through)
        )
        sites[name] = replace(site, reads=read - seen, seen=seen)
    reached: set[str] = set()
    for name, sources in through.items():
        names = {owner[source] for source in sources}
        outcomes = [a.name for a in binding.outcomes if a.name in names]
        reached |= names
        # A scan hands its body slices, so identity cannot tell; what reaches it can.
        if sites[name].scanned and len(outcomes) == 1:
            sites[name] = replace(sites[name], obs_argument=outcomes[0])
    return Bound(model, binding, inputs, sites), reached


def _trace_cell(model: Callable, inputs: Inputs, binding: Binding) -> tuple[Site, ...]:
    cell = inputs.of_cell(binding.per)
    block = block_of(binding, cell.sizes)
    arranged = partial(arrange, binding, dims=cell.dims, block=block)
    return trace_sites(model, arranged, make_structs(cell, cell.sizes), block)


def _agrees(bound: Bound, event_ndim: int) -> bool:
    outcomes = {a.name: a for a in bound.binding.outcomes}
    found = [
        (len(outcomes[s.obs_argument].sources[0].dims), s.event_ndim)
        for s in bound.sites.values()
        if s.obs_argument in outcomes
    ]
    return max(found)[1] == event_ndim if found else True


def _check_observed(bound: Bound, signature: tuple[Parameter, ...], observed: list[Site]) -> None:
    model = _name(bound.model)
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


def _name(model: Callable) -> str:
    return getattr(model, "__name__", repr(model))


def _bound_names(bound: Bound) -> set[str]:
    return {a.name for a in bound.binding.arguments} | set(bound.binding.constants)


def _with_unknowns(
    bound: Bound, signature: tuple[Parameter, ...], known: Collection[str]
) -> Bound:
    """Latent sites without draws are outcomes, if as many outcomes can be absent."""
    unknown = [n for n, s in bound.sites.items() if s.kind == "latent" and n not in known]
    optional = {p.name for p in signature if not p.required and p.default is None}
    absent = sorted(optional - _bound_names(bound))
    if len(unknown) > len(absent):
        raise ModelError(
            f"latent sites {unknown!r} have no draws in the posterior, which has "
            f"{sorted(known)!r}; only outcomes that are not in the Dataset, here {absent!r}, "
            "can do without"
        )
    sites = {n: replace(s, kind="observed") if n in unknown else s for n, s in bound.sites.items()}
    return replace(bound, sites=sites)


def _check_dims_known(bound: Bound, dim: Any) -> None:
    """Without its outcome a Dataset does not tell which dimensions are observed."""
    dims = {d for a in bound.binding.arguments for s in a.sources for d in s.dims}
    if dim is None and not bound.binding.outcomes and len(dims) > 1:
        raise DimensionError(
            "the outcome is not in the Dataset, so its dimensions are not known; say which of "
            f"{sorted(dims)!r} are the observations': dim=(...)"
        )


def _named(bound: Bound) -> Bound:
    """The sites with their dims, from a second trace on a probe where the model allows one."""
    binding, inputs = bound.binding, bound.inputs.of_cell(bound.binding.per)
    sizes = probe_sizes(binding, inputs.sizes)
    # None where sizes are written into the model: its axes are matched by position instead.
    probed = _traced_at(bound.model, binding, inputs, sizes)
    sites = with_dims(tuple(bound.sites.values()), probed, binding, inputs.sizes)
    sites = with_lengths(
        sites, probed, binding, inputs.sizes, partial(_traced_at, bound.model, binding, inputs)
    )
    labels = {
        d: inputs.labels[d]
        for site in sites
        for d, n in zip(site.dims, site.shape, strict=True)
        if d is not None
        and d in inputs.labels
        and d not in binding.cut_dims
        and inputs.sizes[d] == n
    }
    binding = replace(binding, labels={**binding.labels, **labels})
    return replace(bound, binding=binding, sites={s.name: s for s in sites})


def _traced_at(
    model: Callable, binding: Binding, inputs: Inputs, sizes: Mapping[str, int]
) -> tuple[Site, ...] | None:
    """The sites on a Dataset of those sizes; None if the model does not run on them."""
    block = block_of(binding, sizes)
    resized = resize_values(binding, inputs, sizes)
    arranged = partial(arrange, resized, dims=inputs.dims, block=block)
    try:
        return trace_sites(model, arranged, make_structs(inputs, sizes), block)
    except Exception:
        # Whatever a model raises on sizes that it was not made for.
        return None


def _check_names(bound: Bound) -> None:
    """Two results of one name would be one result."""
    taken: dict[str, str] = {}
    for site in bound.sites.values():
        name = result_name(bound.binding, site)
        if name in taken and site.kind != "param":
            raise ModelError(
                f"sites {taken[name]!r} and {site.name!r} would both be called {name!r} in a "
                "result; rename one of the sites, or the variable"
            )
        taken[name] = site.name


def _check_constants(bound: Bound) -> None:
    """An array along the observations has labels, or it cannot be selected with them."""
    sizes = {bound.inputs.sizes[d]: d for d in bound.binding.cut_dims if bound.inputs.sizes[d] > 1}
    for name, value in bound.binding.constants.items():
        along = [sizes[n] for n in getattr(value, "shape", ()) if n in sizes]
        if along:
            raise BindingError(
                f"variables={{{name!r}: ...}} is an array without labels, as long as "
                f"{along[0]!r}; say so, xr.DataArray(values, dims={along[0]!r}, coords=...), or "
                "give a tuple if it only happens to be"
            )
