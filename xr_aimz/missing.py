"""Missing values: a cell with a NaN leaves the likelihood, and touches nothing else.

A fit wraps the model once. The wrapped one takes the same arguments and may be handed
arrays with NaN, also while traced: in the gaps it puts a value of the data's own, which
lies in the support and has a finite gradient, and it masks the density of every cell
that is made from a gap. What stands in a gap must not matter, then; :func:`prepare`
finds out whether it does, by exchanging it and comparing the densities of all that is
not missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.primitives import Messenger

from xr_aimz.binding import Argument, Binding
from xr_aimz.blanks import is_float
from xr_aimz.errors import MissingValueError, ModelError
from xr_aimz.model import Block, Site, observed_values, tracing

__all__ = ["masked", "prepare"]

Row = Callable[[str, jax.Array, jax.Array], jax.Array]


def prepare(
    model: Callable,
    binding: Binding,
    sites: Mapping[str, Site],
    passed: Mapping[str, Any],
    block: Block,
) -> Callable:
    """The model to fit to these arguments: itself, or masked where they have NaN.

    Raises
    ------
    MissingValueError
        A gap would touch more than its own cell, or leaves no cell.
    """
    arrays = {a.name: passed[a.name] for a in binding.arguments if a.name in passed}
    gappy = [name for name, x in arrays.items() if is_float(x) and bool(jnp.isnan(x).any())]
    if not gappy:
        return model
    shape = _Shape(binding, sites)
    for name in gappy:
        if not shape.observational(binding.argument(name)):
            raise MissingValueError(
                f"{_what(binding, passed, name)}, and no observation dimension "
                f"{binding.dims!r}: all cells would be missing. Fill it: ds.fillna(...)"
            )
    with tracing(block):
        _check_passed_on(model, shape, passed, gappy)
        _check_reach(model, shape, passed, gappy)
    return masked(model, binding, sites)


def masked(model: Callable, binding: Binding, sites: Mapping[str, Site]) -> Callable:
    """A model of the same arguments that leaves cells with NaN out of its likelihood."""
    return _masked(model, _Shape(binding, sites), lambda name, rows, ok: _first(rows, ok))


def _masked(model: Callable, shape: _Shape, row: Row) -> Callable:
    @functools.wraps(model)
    def without_gaps(**passed: Any) -> Any:
        gaps = shape.gaps(passed)
        filled = dict(passed)
        for name, gap in gaps.items():
            ndim = shape.row_ndim(name, gap.ndim)
            filled[name] = _filled(passed[name], gap, ndim, functools.partial(row, name))
        indirect = shape.indirect()
        shadow = _shadow(model, shape, passed, filled, gaps, indirect) if indirect else {}

        def mask(message: Mapping[str, Any]) -> jax.Array | None:
            return _mask(shape, message, filled, gaps, shadow)

        with _Masking(mask):
            return model(**filled)

    return without_gaps


class _Masking(Messenger):  # type: ignore[misc] # NumPyro's is untyped
    """Masks the distributions of observed sites."""

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
    """Which axes of an argument are cells, and which make up one cell's value."""

    binding: Binding
    sites: Mapping[str, Site]

    @property
    def rank(self) -> int:
        return 1 if self.binding.layout == "table" else len(self.binding.dims)

    def observational(self, argument: Argument) -> bool:
        if argument.name in self.binding.concrete:
            # It has no missing values, and the model needs those that it has.
            return False
        return any(d in self.binding.dims for s in argument.sources for d in s.dims)

    def row_ndim(self, name: str, ndim: int) -> int:
        """How many trailing axes are missing together."""
        extra = ndim - self.rank
        events = [s.event_ndim for s in self.sites.values() if name in s.seen]
        return min(extra, max(events)) if events else extra

    def gaps(self, passed: Mapping[str, Any]) -> dict[str, jax.Array]:
        """By argument, where a value is missing: as it is laid out, its row one entry."""
        found = {}
        for argument in self.binding.arguments:
            value = passed.get(argument.name)
            if value is not None and is_float(value) and self.observational(argument):
                ndim = self.row_ndim(argument.name, value.ndim)
                rows = tuple(range(value.ndim - ndim, value.ndim))
                found[argument.name] = jnp.isnan(value).any(rows, keepdims=True)
        return found

    def indirect(self) -> list[str]:
        """Sites that observe a function of arguments, or slices of them in a scan."""
        return [
            n for n, s in self.sites.items() if s.seen and (s.scanned or s.obs_argument is None)
        ]

    def inputs(self, site: Site, gaps: Mapping[str, jax.Array], lead: tuple[int, ...]) -> Any:
        """Where a site's density is made from a missing input, over cells of that shape."""
        found: Any = np.zeros((1,) * len(lead), bool)
        for name in site.reads & set(gaps):
            cells = gaps[name]
            cells = cells.any(tuple(range(min(self.rank, len(lead)), cells.ndim)))
            cells = jnp.reshape(cells, cells.shape + (1,) * (len(lead) - cells.ndim))
            # A value that spans a dimension is made from all inputs along it.
            over = [i for i, n in enumerate(lead) if n == 1 and cells.shape[i] > 1]
            found = found | cells.any(tuple(over), keepdims=True)
        return found


def _filled(value: jax.Array, gap: jax.Array, ndim: int, row: Callable) -> jax.Array:
    rows = jnp.reshape(value, (-1, *value.shape[value.ndim - ndim :]))
    return jnp.where(gap, row(rows, jnp.reshape(~gap, (-1,))), value)


def _first(rows: jax.Array, ok: jax.Array) -> jax.Array:
    # Half lies inside of most supports; a cell without data has nothing of its own.
    return jnp.where(ok.any(), rows[jnp.argmax(ok)], jnp.asarray(0.5, rows.dtype))


def _other(rows: jax.Array, ok: jax.Array) -> jax.Array:
    """A row as far from the first as the data go."""
    first = _first(rows, ok)
    mine = jnp.reshape(ok, (-1,) + (1,) * (rows.ndim - 1))
    low = jnp.where(mine, rows, jnp.inf).min(0)
    high = jnp.where(mine, rows, -jnp.inf).max(0)
    far = jnp.where(high - first >= first - low, high, low)
    return jnp.where((far == first) | ~jnp.isfinite(far), first + 1, far)


def _mask(
    shape: _Shape,
    message: Mapping[str, Any],
    filled: Mapping[str, Any],
    gaps: Mapping[str, jax.Array],
    shadow: Mapping[str, Any],
) -> jax.Array | None:
    """Which cells of an observed site's batch are there; None for a site without cells."""
    name, value, event = message["name"], message["value"], message["fn"].event_dim
    if message["infer"].get("is_auxiliary", False):
        return None
    site = shape.sites.get(name)
    if site is None:
        raise ModelError(
            f"site {name!r} is not in the model as it was traced, and missing values cannot be "
            "told in it (a scan over a discrete latent site?). Fill or drop them"
        )
    if name in shadow:
        gone = jnp.isnan(shadow[name])
        return ~gone.any(tuple(range(gone.ndim - event, gone.ndim)))
    own = [n for n in site.seen if value is filled.get(n)]
    if not own:
        return None
    lead = value.shape[: value.ndim - event]
    whole: Any = np.zeros((1,) * value.ndim, bool)
    gap = gaps.get(own[0], whole).any(tuple(range(len(lead), value.ndim)))
    return jnp.broadcast_to(~(gap | shape.inputs(site, gaps, lead)), lead)


def _shadow(
    model: Callable,
    shape: _Shape,
    passed: Mapping[str, Any],
    filled: Mapping[str, Any],
    gaps: Mapping[str, jax.Array],
    indirect: list[str],
) -> dict[str, Any]:
    """What indirect sites observe if every cell that is made from a gap is NaN.

    Nothing tells where the model puts an entry of an argument but the model; so NaN is sent
    along.
    """
    found = {}
    for name in indirect:
        site, sent = shape.sites[name], dict(filled)
        for own in site.seen & {a.name for a in shape.binding.arguments}:
            value = jnp.asarray(passed[own], jnp.result_type(float))
            lead = value.shape[: shape.rank]
            gap = shape.inputs(site, gaps, lead)
            gap = jnp.reshape(gap, gap.shape + (1,) * (value.ndim - len(lead)))
            sent[own] = jnp.where(gap | gaps.get(own, gap), jnp.nan, value)
        found[name] = _observed(model, sent, name)
    return found


def _observed(model: Callable, passed: Mapping[str, Any], name: str) -> jax.Array:
    arrays = {n: x for n, x in passed.items() if isinstance(x, jax.Array)}
    rest = {n: x for n, x in passed.items() if n not in arrays}
    # Traced, for NumPyro's checks of parameters would raise on NaN that it can see.
    return jax.jit(lambda arrays: observed_values(model, {**rest, **arrays})[name])(arrays)


def _check_passed_on(
    model: Callable, shape: _Shape, passed: Mapping[str, Any], gappy: list[str]
) -> None:
    """A site that observes a function of an argument must show what is missing of it."""
    for name in shape.indirect():
        site = shape.sites[name]
        if not (site.seen | site.reads) & set(gappy):
            continue
        try:
            swallowed = not bool(_sends_nan(model, passed, site))
        except (TypeError, IndexError):
            swallowed = True  # it takes ints only, and those have no NaN
        if swallowed:
            raise MissingValueError(
                f"{_what(shape.binding, passed, gappy[0])}, and site {name!r} observes a function "
                f"of {sorted(site.seen)!r} that turns NaN into a number: which of its cells are "
                "missing cannot be told. Make what is observed a variable of the Dataset, or "
                "fill or drop the missing values"
            )


def _sends_nan(model: Callable, passed: Mapping[str, Any], site: Site) -> Any:
    """Whether a site observes NaN alone where all that it observes is NaN."""
    blank = {n: jnp.full(jnp.shape(passed[n]), jnp.nan) for n in site.seen}
    found = _observed(model, {**passed, **blank}, site.name)
    return is_float(found) and jnp.isnan(found).all()


def _check_reach(
    model: Callable, shape: _Shape, passed: Mapping[str, Any], gappy: list[str]
) -> None:
    """Nothing but the missing cells may depend on what stands in a gap."""
    arrays = {n: x for n, x in passed.items() if isinstance(x, jax.Array)}
    rest = {n: x for n, x in passed.items() if n not in arrays}

    @jax.jit
    def densities(arrays: Any, exchanged: Any) -> Any:
        def row(name: str, rows: jax.Array, ok: jax.Array) -> jax.Array:
            return jnp.where(exchanged[name], _other(rows, ok), _first(rows, ok))

        seeded = handlers.seed(_masked(model, shape, row), jax.random.key(0))
        started = handlers.substitute(seeded, substitute_fn=init_to_uniform)
        trace = handlers.trace(started).get_trace(**arrays, **rest)
        sites = {n: m for n, m in trace.items() if m["type"] == "sample"}
        there = {n: getattr(m["fn"], "_mask", True) for n, m in sites.items() if n in observed}
        found = {n: m["fn"].log_prob(m["value"]) for n, m in sites.items()}
        return found, {n: jnp.any(mask) for n, mask in there.items()}

    observed = [n for n, s in shape.sites.items() if s.kind == "observed" and s.seen]
    none = dict.fromkeys(shape.gaps(passed), False)
    expected, there = densities(arrays, none)
    empty = [n for n, some in there.items() if not some]
    if empty:
        raise MissingValueError(
            f"{_what(shape.binding, passed, gappy[0])}: no cell of site {empty[0]!r} has its "
            f"outcome and all of its inputs {sorted(shape.sites[empty[0]].reads)!r}"
        )
    for name in gappy:
        found, _ = densities(arrays, {**none, name: True})
        moved = [n for n, x in found.items() if not np.array_equal(x, expected[n], equal_nan=True)]
        if moved:
            raise MissingValueError(
                f"{_what(shape.binding, passed, name)}, and they would change the densities of "
                f"sites {moved!r} in cells that are not missing: the model takes {name!r} where "
                "it is more than its own cell's (a mean, a lag, a prior). Fill or drop them, "
                "ds.fillna(...), ds.dropna(...); or compute what is shared beforehand"
            )


def _what(binding: Binding, passed: Mapping[str, Any], name: str) -> str:
    variables = ", ".join(repr(s.name) for s in binding.argument(name).sources)
    count = int(jnp.isnan(passed[name]).sum())
    return (
        f"variable {variables} (argument {name!r}) has {count} missing values (NaN) of "
        f"{passed[name].size}"
    )
