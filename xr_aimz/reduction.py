"""Statistics over chains and draws: what is asked, what comes out, and how it is made.

:func:`parse` reads what is asked, :func:`outputs` says what will come out, and :func:`reduce`
makes it, of any arrays whose first dims are chain and draw. Rows of draws are sorted once, a
tile of cells at a time, and everything is read off the sorted rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from xr_aimz.errors import OptionError
from xr_aimz.spelling import suggest

__all__ = ["Statistic", "dtype_of", "outputs", "parse", "reduce", "suffixed"]

# ArviZ's own since 1.0 (0.94 before): a number must not depend on what is installed.
_HDI = 89.0
# Cells in a tile: its draws, twice, stay in a core's cache. Transposed whole, rows that are a
# power of two apart evict each other: 1 GB/s, where tiles make 5.
_TILE = 64
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">": np.greater,
    ">=": np.greater_equal,
    "<": np.less,
    "<=": np.less_equal,
}
_PROB = re.compile(r"prob\s*(>=|<=|>|<)\s*(\S+)")
_INTERVAL = re.compile(r"hdi(\d+(?:\.\d+)?)?")
_ALONE = ("mean", "std", "median")


@dataclass(frozen=True)
class Statistic:
    """One statistic, or several of a kind on a dimension of their own.

    Parameters
    ----------
    suffix : str
        What a variable's name is followed by in the result.
    kind : {"mean", "std", "median", "quantile", "prob", "hdi"}
    arguments : tuple
        The quantiles; or pairs of operator and threshold; or the interval's percentage.
    dim : str, optional
        Its own dimension, the first of the result.
    labels : tuple
        Along ``dim``.
    """

    suffix: str
    kind: str
    arguments: tuple = ()
    dim: str | None = None
    labels: tuple = ()

    @property
    def lead(self) -> dict[str, int]:
        return {} if self.dim is None else {self.dim: len(self.labels)}


def parse(asked: Any) -> tuple[Statistic, ...]:
    """Read the statistics that are named.

    Parameters
    ----------
    asked : str, float or sequence of them
        One or several, in sequences of sequences too: ``"mean"``, ``"std"``, ``"median"``, a
        number between 0 and 1 (a quantile), ``"prob>x"`` (also ``<``, ``>=``, ``<=``),
        ``"hdi"`` or ``"hdi94"`` (per cent).

    Raises
    ------
    OptionError
        Anything else.
    """
    found: dict[str, Statistic] = {}
    for item in _flat(asked):
        one = _parsed(item)
        if one is None:
            raise OptionError(
                f"summary={asked!r}: {item!r} is no statistic; there are 'mean', 'std', "
                "'median', quantiles from 0 to 1, 'prob>x' (or <, >=, <=), 'hdi' and 'hdi94'"
                f"{suggest((*_ALONE, 'hdi'), [item])}"
            )
        found[one.suffix] = _joined(found.get(one.suffix), one)
    if not found:
        raise OptionError(f"summary={asked!r} names no statistic; say 'mean', for example")
    return tuple(found.values())


def _flat(asked: Any) -> Iterator[Any]:
    if getattr(asked, "ndim", None) == 0:
        # NumPy's and JAX's scalars, which look as if they could be iterated over.
        yield asked.item()
    elif isinstance(asked, Iterable) and not isinstance(asked, str | Mapping):
        for item in asked:
            yield from _flat(item)
    else:
        yield asked


def _parsed(item: Any) -> Statistic | None:
    if isinstance(item, bool | np.bool_):
        return None
    if isinstance(item, int | float | np.number):
        q = float(item)
        inside = 0 <= q <= 1
        return Statistic("quantile", "quantile", (q,), "quantile", (q,)) if inside else None
    if not isinstance(item, str):
        return None
    if item in _ALONE:
        return Statistic(item, item)
    if match := _INTERVAL.fullmatch(item):
        percent = float(match[1] or _HDI)
        ends = ("lower", "upper")
        inside = 0 < percent < 100
        return Statistic(item, "hdi", (percent,), "ci_bound", ends) if inside else None
    if match := _PROB.fullmatch(item):
        sign, text = match.groups()
        try:
            threshold = float(text)
        except ValueError:
            return None
        return Statistic("prob", "prob", ((sign, threshold),), "threshold", (sign + text,))
    return None


def _joined(before: Statistic | None, new: Statistic) -> Statistic:
    """Quantiles go on one dimension, thresholds on another."""
    if before is None or before.kind not in ("quantile", "prob"):
        return new
    pairs = zip((*before.labels, *new.labels), (*before.arguments, *new.arguments), strict=True)
    both = dict(pairs)
    return Statistic(new.suffix, new.kind, tuple(both.values()), new.dim, tuple(both))


def suffixed(names: Mapping[str, str], statistics: Iterable[Statistic]) -> dict[str, str]:
    """Names of arrays and what they are called in a Dataset, once summarized."""
    statistics = tuple(statistics)
    return {
        f"{key}_{s.suffix}": f"{name}_{s.suffix}"
        for key, name in names.items()
        for s in statistics
    }


def outputs(
    arrays: Mapping[str, tuple[tuple[str, ...], Any]], statistics: Iterable[Statistic]
) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Dims, shape and dtype of what :func:`reduce` makes.

    Parameters
    ----------
    arrays : mapping of name to (dims, struct)
        Without chain and draw: the dims and the struct of one draw.
    statistics : iterable of Statistic
    """
    statistics = tuple(statistics)
    return {
        f"{name}_{s.suffix}": (
            (*s.lead, *dims),
            jax.ShapeDtypeStruct((*s.lead.values(), *struct.shape), dtype_of(struct.dtype)),
        )
        for name, (dims, struct) in arrays.items()
        for s in statistics
    }


def dtype_of(dtype: np.dtype) -> np.dtype:
    """Floats keep their precision; what is counted gets as many bits as it had."""
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)


def reduce(
    arrays: Mapping[str, np.ndarray], statistics: Iterable[Statistic]
) -> dict[str, np.ndarray]:
    """Arrays of draws to arrays of statistics.

    Parameters
    ----------
    arrays : mapping of name to array ``(chain, draw, ...)``
        Of floats, ints or bools.
    statistics : iterable of Statistic

    Returns
    -------
    dict of numpy.ndarray
        ``name_suffix``, of the shapes and dtypes that :func:`outputs` tells. A cell with a
        draw that is NaN is NaN.
    """
    statistics = tuple(statistics)
    found: dict[str, np.ndarray] = {}
    for name, draws in arrays.items():
        rest = draws.shape[2:]
        flat = draws.reshape(draws.shape[0] * draws.shape[1], -1)
        made = [
            np.empty((len(s.labels) or 1, flat.shape[1]), dtype_of(flat.dtype)) for s in statistics
        ]
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, flat.shape[1], _TILE):
                here = slice(start, start + _TILE)
                _reduce_tile(flat[:, here], statistics, [array[:, here] for array in made])
        for s, array in zip(statistics, made, strict=True):
            found[f"{name}_{s.suffix}"] = array.reshape((*s.lead.values(), *rest))
    return found


def _reduce_tile(
    draws: np.ndarray, statistics: tuple[Statistic, ...], made: list[np.ndarray]
) -> None:
    # Copied first: strides within a small copy are short.
    rows = np.ascontiguousarray(draws.copy().T)
    if any(s.kind in ("median", "quantile", "hdi") for s in statistics):
        rows.sort(axis=1)
    for s, array in zip(statistics, made, strict=True):
        array[:] = _KINDS[s.kind](rows, s.arguments)


def _mean(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    return rows.mean(axis=1, dtype=np.float64)


def _std(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    # A mean rounded to the rows' precision enters by its square only.
    centred = rows - rows.mean(axis=1, dtype=np.float64, keepdims=True).astype(
        dtype_of(rows.dtype)
    )
    return np.sqrt(np.square(centred).mean(axis=1, dtype=np.float64))


def _median(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    return _quantiles(rows, (0.5,))


def _quantiles(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    """By linear interpolation, of rows that are sorted: NaN is the last of its row."""
    places = np.asarray(arguments) * (rows.shape[1] - 1)
    low = np.floor(places).astype(int)
    below, above = (rows[:, np.minimum(i, rows.shape[1] - 1)] for i in (low, low + 1))
    below, above = below.astype(np.float64), above.astype(np.float64)
    step = places - low
    # Where there is nothing to interpolate, infinities stay what they are.
    exact = (step == 0) | (below == above)
    found = np.where(exact, below, below + (above - below) * step)
    return np.where(_absent(rows[:, -1:]), np.nan, found).T


def _prob(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    shares = np.stack([_OPERATORS[sign](rows, x).mean(axis=1) for sign, x in arguments])
    return np.where(_absent(rows).any(axis=1), np.nan, shares)


def _hdi(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    """The shortest interval with that share of the draws, as ArviZ finds it."""
    count = rows.shape[1]
    within = min(int(arguments[0] * count / 100), count - 1)
    widths = np.subtract(rows[:, within:], rows[:, : count - within], dtype=np.float64)
    first = widths.argmin(axis=1)
    ends = np.stack(
        [np.take_along_axis(rows, i[:, None], 1)[:, 0] for i in (first, first + within)]
    )
    return np.where(_absent(rows[:, -1]), np.nan, ends)


def _absent(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


_KINDS: dict[str, Callable[[np.ndarray, tuple], np.ndarray]] = {
    "mean": _mean,
    "std": _std,
    "median": _median,
    "quantile": _quantiles,
    "prob": _prob,
    "hdi": _hdi,
}
