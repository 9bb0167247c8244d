"""Mask cells with missing values (NaN) out of the likelihood of a model.

A model that takes a missing value into the densities of other cells is refused: those cells would
depend on the number that stands in for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_, or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.primitives import Messenger

from xr_aimz.binding import (
    AlignedInputs,
    Binding,
    BoundArgument,
    check_moments,
    is_float,
    reduce_moments,
)
from xr_aimz.errors import MissingValueError, ModelError
from xr_aimz.tracing import Block, Site, observed_values, trace_lock

Row = Callable[[str, jax.Array, jax.Array], jax.Array]


def prepare_masked(
    model: Callable,
    binding: Binding,
    sites: Mapping[str, Site],
    passed: Mapping[str, Any],
    block: Block,
) -> Callable:
    """Return the model to fit to these arguments, masked in cells where they are NaN.

    Raises
    ------
    MissingValueError
        A missing value would affect other cells than its own, or no cell is complete.
    """
    arrays = {a.name: passed[a.name] for a in binding.arguments if a.name in passed}
    incomplete = [name for name, x in arrays.items() if is_float(x) and bool(jnp.isnan(x).any())]
    if not incomplete:
        return model
    shape = _Shape(binding, sites)
    for name in incomplete:
        if not shape.observational(binding.argument(name)):
            raise MissingValueError(
                f"{_describe_nan(binding, passed, name)}, and no observation dimension "
                f"{binding.dims!r}: all cells would be missing. Fill it: ds.fillna(...)"
            )
    with trace_lock(block):
        _check_nan_is_observed(model, shape, passed, incomplete)
        _check_local(model, shape, passed, incomplete)
    return mask_model(model, binding, sites)


def mask_model(model: Callable, binding: Binding, sites: Mapping[str, Site]) -> Callable:
    """Wrap a model so that cells with NaN in its arguments are masked out of its likelihood."""
    return _mask_cells(
        model, _Shape(binding, sites), lambda name, rows, is_valid: _pick_first(rows, is_valid)
    )


def _mask_cells(model: Callable, shape: _Shape, pick_row: Row) -> Callable:
    @functools.wraps(model)
    def masked_model(**passed: Any) -> Any:
        missing = shape.count_missing(passed)
        filled = dict(passed)
        for name, missing_mask in missing.items():
            ndim = shape.row_ndim(name, missing_mask.ndim)
            filled[name] = _fill_rows(
                passed[name], missing_mask, ndim, functools.partial(pick_row, name)
            )
        indirect = shape.indirect()
        nan_values = _send_nan(model, shape, passed, filled, missing, indirect) if indirect else {}

        def mask_site(message: Mapping[str, Any]) -> jax.Array | None:
            return _find_complete(shape, message, filled, missing, nan_values)

        with _Masking(mask_site):
            return model(**filled)

    return masked_model


class _Masking(Messenger):  # type: ignore[misc] # NumPyro's is untyped
    """Handler that masks the distributions of observed sites."""

    def __init__(self, mask: Callable[[Mapping[str, Any]], jax.Array | None]) -> None:
        self.mask = mask
        super().__init__()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not msg["is_observed"] or msg["value"] is None:
            return
        mask = self.mask(msg)
        if mask is not None:
            msg["fn"] = msg["fn"].mask(mask)


@dataclass(frozen=True)
class _Shape:
    """Axes of the model's arguments: leading ones that are cells, trailing ones within a cell."""

    binding: Binding
    sites: Mapping[str, Site]

    @property
    def rank(self) -> int:
        return 1 if self.binding.layout == "table" else len(self.binding.dims)

    def observational(self, argument: BoundArgument) -> bool:
        if argument.name in self.binding.concrete:
            # A concrete argument has no missing values, and the model needs its own values.
            return False
        return any(d in self.binding.dims for s in argument.sources for d in s.dims)

    def row_ndim(self, name: str, ndim: int) -> int:
        """Return the number of trailing axes that are missing together, as one row."""
        extra = ndim - self.rank
        events = [s.event_ndim for s in self.sites.values() if name in s.observed_inputs]
        return min(extra, max(events)) if events else extra

    def count_missing(self, passed: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Compute the mask of missing values of each argument; the axes of a row have length 1."""
        result = {}
        for argument in self.binding.arguments:
            value = passed.get(argument.name)
            if value is not None and is_float(value) and self.observational(argument):
                ndim = self.row_ndim(argument.name, value.ndim)
                row_axes = tuple(range(value.ndim - ndim, value.ndim))
                result[argument.name] = jnp.isnan(value).any(row_axes, keepdims=True)
        return result

    def indirect(self) -> list[str]:
        """List the sites that observe a function of arguments, or slices of them in a scan."""
        return [
            n
            for n, s in self.sites.items()
            if s.observed_inputs and (s.scanned or s.obs_argument is None)
        ]

    def inputs(
        self, site: Site, missing: Mapping[str, jax.Array], batch_shape: tuple[int, ...]
    ) -> Any:
        """Compute the mask of cells whose density at a site depends on a missing input.

        The mask has the axes of ``batch_shape``, of length 1 where it is broadcast.
        """
        result: Any = np.zeros((1,) * len(batch_shape), bool)
        for name in site.density_inputs & set(missing):
            mask = missing[name]
            mask = mask.any(tuple(range(min(self.rank, len(batch_shape)), mask.ndim)))
            mask = jnp.reshape(mask, mask.shape + (1,) * (len(batch_shape) - mask.ndim))
            # A value that spans a dimension depends on all inputs along it.
            axes = [i for i, n in enumerate(batch_shape) if n == 1 and mask.shape[i] > 1]
            result = result | mask.any(tuple(axes), keepdims=True)
        return result


def _fill_rows(value: jax.Array, mask: jax.Array, ndim: int, pick_row: Callable) -> jax.Array:
    rows = jnp.reshape(value, (-1, *value.shape[value.ndim - ndim :]))
    return jnp.where(mask, pick_row(rows, jnp.reshape(~mask, (-1,))), value)


def _pick_first(rows: jax.Array, is_valid: jax.Array) -> jax.Array:
    # 0.5 lies in most supports; without any valid row there is no value of the data to take.
    return jnp.where(is_valid.any(), rows[jnp.argmax(is_valid)], jnp.asarray(0.5, rows.dtype))


def _pick_far(rows: jax.Array, is_valid: jax.Array) -> jax.Array:
    """Take the smallest or the largest of the data, whichever is farther from the first row."""
    first = _pick_first(rows, is_valid)
    row_mask = jnp.reshape(is_valid, (-1,) + (1,) * (rows.ndim - 1))
    low = jnp.where(row_mask, rows, jnp.inf).min(0)
    high = jnp.where(row_mask, rows, -jnp.inf).max(0)
    distant = jnp.where(high - first >= first - low, high, low)
    return jnp.where((distant == first) | ~jnp.isfinite(distant), first + 1, distant)


def _find_complete(
    shape: _Shape,
    message: Mapping[str, Any],
    filled: Mapping[str, Any],
    missing: Mapping[str, jax.Array],
    nan_values: Mapping[str, Any],
) -> jax.Array | None:
    """Compute the mask of an observed site's complete cells; None for a site without cells."""
    name, value, event = message["name"], message["value"], message["fn"].event_dim
    if message["infer"].get("is_auxiliary", False):
        return None
    site = shape.sites.get(name)
    if site is None:
        raise ModelError(
            f"site {name!r} is not in the model as it was traced, and missing values cannot be "
            "found in it (a scan over a discrete latent site?). Fill or drop them"
        )
    if name in nan_values:
        nan_mask = jnp.isnan(nan_values[name])
        return ~nan_mask.any(tuple(range(nan_mask.ndim - event, nan_mask.ndim)))
    arguments = [n for n in site.observed_inputs if value is filled.get(n)]
    if not arguments:
        return None
    batch_shape = value.shape[: value.ndim - event]
    no_mask: Any = np.zeros((1,) * value.ndim, bool)
    mask = missing.get(arguments[0], no_mask).any(tuple(range(len(batch_shape), value.ndim)))
    return jnp.broadcast_to(~(mask | shape.inputs(site, missing, batch_shape)), batch_shape)


def _send_nan(
    model: Callable,
    shape: _Shape,
    passed: Mapping[str, Any],
    filled: Mapping[str, Any],
    missing: Mapping[str, jax.Array],
    indirect: list[str],
) -> dict[str, Any]:
    """Compute what indirect sites observe if every cell that depends on a missing value is NaN.

    Only the model determines where an entry of an argument is observed, so the model is run
    with NaN in these entries.
    """
    observed = {}
    for name in indirect:
        site, arguments = shape.sites[name], dict(filled)
        for argument in site.observed_inputs & {a.name for a in shape.binding.arguments}:
            value = jnp.asarray(passed[argument], jnp.result_type(float))
            batch_shape = value.shape[: shape.rank]
            mask = shape.inputs(site, missing, batch_shape)
            mask = jnp.reshape(mask, mask.shape + (1,) * (value.ndim - len(batch_shape)))
            arguments[argument] = jnp.where(mask | missing.get(argument, mask), jnp.nan, value)
        observed[name] = _observe(model, arguments, name)
    return observed


def _observe(model: Callable, passed: Mapping[str, Any], name: str) -> jax.Array:
    arrays = {n: x for n, x in passed.items() if isinstance(x, jax.Array)}
    constants = {n: x for n, x in passed.items() if n not in arrays}
    # Traced, since NumPyro's checks of parameters would raise on concrete NaN.
    return jax.jit(lambda arrays: observed_values(model, {**constants, **arrays})[name])(arrays)


def _check_nan_is_observed(
    model: Callable, shape: _Shape, passed: Mapping[str, Any], incomplete: list[str]
) -> None:
    """Check that a site that observes a function of an argument is NaN where the argument is."""
    for name in shape.indirect():
        site = shape.sites[name]
        if not (site.observed_inputs | site.density_inputs) & set(incomplete):
            continue
        try:
            hides_nan = not bool(_propagates_nan(model, passed, site))
        except (TypeError, IndexError):
            hides_nan = True  # it takes only integers, which have no NaN
        if hides_nan:
            raise MissingValueError(
                f"{_describe_nan(shape.binding, passed, incomplete[0])}, and site {name!r} "
                f"observes a function of {sorted(site.observed_inputs)!r} that turns NaN into a "
                "number: "
                "which of its cells are missing is unknown. Make what is observed a variable of "
                "the Dataset, or fill or drop the missing values"
            )


def _propagates_nan(model: Callable, passed: Mapping[str, Any], site: Site) -> Any:
    """Return whether a site observes only NaN when all arguments that it observes are NaN."""
    nan_arrays = {n: jnp.full(jnp.shape(passed[n]), jnp.nan) for n in site.observed_inputs}
    observed = _observe(model, {**passed, **nan_arrays}, site.name)
    return is_float(observed) and jnp.isnan(observed).all()


def _check_local(
    model: Callable, shape: _Shape, passed: Mapping[str, Any], incomplete: list[str]
) -> None:
    """Check that only cells with missing values depend on the numbers filled in for them."""
    arrays = {n: x for n, x in passed.items() if isinstance(x, jax.Array)}
    constants = {n: x for n, x in passed.items() if n not in arrays}

    @jax.jit
    def densities(arrays: Any, exchanged: Any) -> Any:
        def pick_row(name: str, rows: jax.Array, is_valid: jax.Array) -> jax.Array:
            near, far = _pick_first(rows, is_valid), _pick_far(rows, is_valid)
            return jnp.where(exchanged[name], far, near)

        seeded = handlers.seed(_mask_cells(model, shape, pick_row), jax.random.key(0))
        initialised = handlers.substitute(seeded, substitute_fn=init_to_uniform)
        trace = handlers.trace(initialised).get_trace(**arrays, **constants)
        sites = {n: m for n, m in trace.items() if m["type"] == "sample"}
        cells = {n: getattr(m["fn"], "_mask", True) for n, m in sites.items() if n in observed}
        terms = {n: m["fn"].log_prob(m["value"]) for n, m in sites.items()}
        return terms, {n: jnp.any(mask) for n, mask in cells.items()}

    observed = [n for n, s in shape.sites.items() if s.kind == "observed" and s.observed_inputs]
    none = dict.fromkeys(shape.count_missing(passed), False)
    expected, cells = densities(arrays, none)
    empty = [n for n, has_cells in cells.items() if not has_cells]
    if empty:
        raise MissingValueError(
            f"{_describe_nan(shape.binding, passed, incomplete[0])}: no cell of "
            f"site {empty[0]!r} has its outcome and all of its inputs "
            f"{sorted(shape.sites[empty[0]].density_inputs)!r}"
        )
    for name in incomplete:
        terms, _ = densities(arrays, {**none, name: True})
        moved = [n for n, x in terms.items() if not np.array_equal(x, expected[n], equal_nan=True)]
        if moved:
            raise MissingValueError(
                f"{_describe_nan(shape.binding, passed, name)}, and they would "
                f"change the densities of sites {moved!r} in cells that are not missing: the "
                f"model uses {name!r} outside of its own cell (a mean, a lag, a prior). Fill or "
                "drop them, ds.fillna(...), ds.dropna(...); or compute what is shared beforehand"
            )


def _describe_nan(binding: Binding, passed: Mapping[str, Any], name: str) -> str:
    variables = ", ".join(repr(s.name) for s in binding.argument(name).sources)
    count = int(jnp.isnan(passed[name]).sum())
    return (
        f"variable {variables} (argument {name!r}) has {count} missing values (NaN) of "
        f"{passed[name].size}"
    )


_N_LABELS = 8


def sample_missing(
    binding: Binding, inputs: AlignedInputs, converted: Callable[[], Collection[str]]
) -> tuple[AlignedInputs, xr.Dataset]:
    """Select the inputs at a few labels, and compute the standard deviation of every variable.

    The inputs have no arrays if nothing is missing. Reads all of the data once, block by block,
    and again for variables with missing values. Core dims keep all labels. ``converted`` is as in
    :func:`xr_aimz.binding.casting.measure_sd`.

    Raises
    ------
    DtypeError
        Distinct values of a variable become equal in JAX's float dtype.
    """
    floats = {key: a.variable for key, a in inputs.arrays.items() if a.dtype.kind == "f"}
    free = [d for d in binding.dims if d not in binding.core_dims]
    # One Dataset, so that dask reads what variables share only once; and one block after
    # another, since the blocks of a large store take much memory.
    arrays = {key: a.variable for key, a in inputs.arrays.items()}
    counted = {f"missing {key}": a.isnull().sum() for key, a in floats.items()}
    statistics = xr.Dataset({**counted, **reduce_moments(arrays, binding.per)})
    statistics = statistics.compute(scheduler="synchronous")
    sd = check_moments(binding, inputs, statistics, arrays, converted)
    incomplete = [key for key in floats if int(statistics[f"missing {key}"])]
    if not incomplete:
        return replace(inputs, arrays={}), sd
    # Counts along each dim only now: with very many labels they take as much memory as data.
    counts = {
        f"{d} {key}": floats[key].isnull().sum([e for e in floats[key].dims if e != d])
        for key in incomplete
        for d in free
        if d in floats[key].dims
    }
    missing = xr.Dataset(counts).compute(scheduler="synchronous")
    missing_positions = [_locate_missing(floats[key], free) for key in incomplete]
    positions = {d: _choose_labels(missing, d, inputs.sizes[d], missing_positions) for d in free}
    subset = {
        key: a.isel({d: at for d, at in positions.items() if d in a.dims})
        for key, a in inputs.arrays.items()
    }
    sizes = {**inputs.sizes, **{d: len(at) for d, at in positions.items()}}
    labels = {
        d: index[positions[d]] if d in positions else index for d, index in inputs.labels.items()
    }
    return replace(inputs, arrays=subset, sizes=sizes, labels=labels, chunks={}), sd


def _locate_missing(array: xr.Variable, free: list[str]) -> dict[str, int]:
    """Locate one missing value of a variable: along each dim in turn, where most are missing."""
    positions: dict[str, int] = {}
    for d in (d for d in free if d in array.dims):
        counts = array.isnull().sum([e for e in array.dims if e != d]).compute()
        positions[d] = int(counts.values.argmax())
        array = array.isel({d: positions[d]})
    return positions


def _choose_labels(
    missing: xr.Dataset, dim: str, size: int, positions: list[dict[str, int]]
) -> np.ndarray:
    """Choose labels by position: with most missing values, with fewest, and ``positions``."""
    count = sum((m.values for m in missing.values() if m.dims == (dim,)), np.zeros(size))
    order = np.argsort(count, kind="stable")
    missing_labels = [position[dim] for position in positions if dim in position]
    return np.unique(
        np.concatenate([order[:_N_LABELS], order[-_N_LABELS:], missing_labels]).astype(int)
    )


def cells_with_missing(binding: Binding, inputs: AlignedInputs) -> Iterator[AlignedInputs]:
    """Yield, for each variable with missing values, the inputs of a cell that has some, and data.

    Reads all of the data once.
    """
    floats = {k: a.variable for k, a in inputs.arrays.items() if a.dtype.kind == "f"}
    outcomes = {s.key for a in binding.outcomes for s in a.sources}
    valid = {k: _complete_mask(a, binding) for k, a in floats.items()}
    outcome_masks = [t for k, t in valid.items() if k in outcomes]
    input_masks = [t for k, t in valid.items() if k not in outcomes]
    if not valid:
        return
    data = reduce(and_, [*input_masks, *([reduce(or_, outcome_masks)] if outcome_masks else [])])
    cells = {
        f"gaps {k}": a.isnull().any([d for d in a.dims if d not in binding.per])
        for k, a in floats.items()
    }
    masks = xr.Dataset({**cells, "data": data.any([d for d in data.dims if d in binding.dims])})
    masks = masks.compute()
    for key in floats:
        cell_mask = masks[f"gaps {key}"].variable & masks["data"].variable
        if bool(cell_mask.any()):
            position = np.argwhere(cell_mask.values)[0]
            cell = {str(d): int(i) for d, i in zip(cell_mask.dims, position, strict=True)}
            yield _select_cell(inputs, cell).of_cell(binding.per)


def _complete_mask(array: xr.Variable, binding: Binding) -> xr.Variable:
    """Compute the mask of values that are not missing in any entry along their other dims."""
    return array.notnull().all([d for d in array.dims if d not in binding.block_dims])


def _select_cell(inputs: AlignedInputs, cell: dict[str, int]) -> AlignedInputs:
    arrays = {
        key: a.isel({d: [i] for d, i in cell.items() if d in a.dims})
        for key, a in inputs.arrays.items()
    }
    return replace(inputs, arrays=arrays)
