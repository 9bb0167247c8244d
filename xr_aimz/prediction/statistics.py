"""Compute statistics over chains and draws: mean, std, quantiles, probabilities, HDI.

Statistics are computed for draws in memory, in the task of a prediction's block, and for a Dataset
of draws, by :func:`summary`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz.binding import check_dataset
from xr_aimz.errors import DimensionError, DtypeError, OptionError, suggest
from xr_aimz.options import get_options
from xr_aimz.prediction.chunk_plan import split_chunks

# ArviZ's default since 1.0 (0.94 before): fixed, so that no number depends on its version.
_HDI_PERCENT = 89.0
# Cells in a tile: its draws, twice, stay in a core's cache. If the array is transposed at once,
# rows that are a power of two apart evict each other: 1 GB/s, where tiles reach 5.
_TILE = 64
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">": np.greater,
    ">=": np.greater_equal,
    "<": np.less,
    "<=": np.less_equal,
}
_PROB = re.compile(r"prob\s*(>=|<=|>|<)\s*(\S+)")
_INTERVAL = re.compile(r"hdi(\d+(?:\.\d+)?)?")
_WITHOUT_ARGUMENTS = ("mean", "std", "median")


@dataclass(frozen=True)
class Statistic:
    """One statistic, or several of one kind along a dimension.

    Parameters
    ----------
    suffix : str
        Suffix of a variable's name in the result.
    kind : {"mean", "std", "median", "quantile", "prob", "hdi"}
    arguments : tuple
        The quantiles; or pairs of operator and threshold; or the interval's percentage.
    dim : str, optional
        Dimension of the statistic, the first of the result.
    labels : tuple
        Labels along ``dim``.
    """

    suffix: str
    kind: str
    arguments: tuple = ()
    dim: str | None = None
    labels: tuple = ()

    @property
    def lead(self) -> dict[str, int]:
        """Sizes of the dimension of the statistic; empty if it has none."""
        return {} if self.dim is None else {self.dim: len(self.labels)}


def parse_statistics(statistics: Any) -> tuple[Statistic, ...]:
    """Parse names and numbers of statistics.

    Parameters
    ----------
    statistics : str, float or sequence of them
        One or several, in sequences of sequences too: ``"mean"``, ``"std"``, ``"median"``, a
        number between 0 and 1 (a quantile), ``"prob>x"`` (also ``<``, ``>=``, ``<=``),
        ``"hdi"`` or ``"hdi94"`` (per cent).

    Raises
    ------
    OptionError
        Any other value.
    """
    by_suffix: dict[str, Statistic] = {}
    for item in _flatten_items(statistics):
        statistic = _parse_item(item)
        if statistic is None:
            raise OptionError(
                f"summary={statistics!r}: {item!r} is no statistic; there are 'mean', 'std', "
                "'median', quantiles from 0 to 1, 'prob>x' (or <, >=, <=), 'hdi' and 'hdi94'"
                f"{suggest((*_WITHOUT_ARGUMENTS, 'hdi'), [item])}"
            )
        by_suffix[statistic.suffix] = _join(by_suffix.get(statistic.suffix), statistic)
    if not by_suffix:
        raise OptionError(f"summary={statistics!r} names no statistic; say 'mean', for example")
    return tuple(by_suffix.values())


def _flatten_items(items: Any) -> Iterator[Any]:
    if getattr(items, "ndim", None) == 0:
        # NumPy's and JAX's scalars, which look as if they could be iterated over.
        yield items.item()
    elif isinstance(items, Iterable) and not isinstance(items, str | Mapping):
        for item in items:
            yield from _flatten_items(item)
    else:
        yield items


def _parse_item(item: Any) -> Statistic | None:
    if isinstance(item, bool | np.bool_):
        return None
    if isinstance(item, int | float | np.number):
        q = float(item)
        inside = 0 <= q <= 1
        return Statistic("quantile", "quantile", (q,), "quantile", (q,)) if inside else None
    if not isinstance(item, str):
        return None
    if item in _WITHOUT_ARGUMENTS:
        return Statistic(item, item)
    if match := _INTERVAL.fullmatch(item):
        percent = float(match[1] or _HDI_PERCENT)
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


def _join(old: Statistic | None, new: Statistic) -> Statistic:
    """Join quantiles along one dimension, and thresholds along another."""
    if old is None or old.kind not in ("quantile", "prob"):
        return new
    pairs = zip((*old.labels, *new.labels), (*old.arguments, *new.arguments), strict=True)
    arguments_by_label = dict(pairs)
    return Statistic(
        new.suffix,
        new.kind,
        tuple(arguments_by_label.values()),
        new.dim,
        tuple(arguments_by_label),
    )


def statistic_names(names: Mapping[str, str], statistics: Iterable[Statistic]) -> dict[str, str]:
    """Map names of arrays to names in a Dataset, both with the suffix of each statistic."""
    statistics = tuple(statistics)
    return {
        f"{key}_{s.suffix}": f"{name}_{s.suffix}"
        for key, name in names.items()
        for s in statistics
    }


def statistic_structs(
    arrays: Mapping[str, tuple[tuple[str, ...], Any]], statistics: Iterable[Statistic]
) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return the dims, shape and dtype of each result of :func:`compute_statistics`.

    Parameters
    ----------
    arrays : mapping of name to (dims, struct)
        The dims and the struct of one draw, without chain and draw.
    statistics : iterable of Statistic
    """
    statistics = tuple(statistics)
    return {
        f"{name}_{s.suffix}": (
            (*s.lead, *dims),
            jax.ShapeDtypeStruct((*s.lead.values(), *struct.shape), statistic_dtype(struct.dtype)),
        )
        for name, (dims, struct) in arrays.items()
        for s in statistics
    }


def statistic_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype of a statistic: floats keep theirs, others get float32 or float64."""
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float64 if dtype.itemsize > 4 else np.float32)


def compute_statistics(
    arrays: Mapping[str, np.ndarray], statistics: Iterable[Statistic]
) -> dict[str, np.ndarray]:
    """Reduce arrays of draws ``(chain, draw, ...)`` to arrays of statistics.

    Parameters
    ----------
    arrays : mapping of name to array ``(chain, draw, ...)``
        Arrays of floats, ints or bools.
    statistics : iterable of Statistic

    Returns
    -------
    dict of numpy.ndarray
        By ``name_suffix``, with the shapes and dtypes that :func:`statistic_structs` returns. A
        cell with a draw that is NaN is NaN.
    """
    statistics = tuple(statistics)
    results: dict[str, np.ndarray] = {}
    for name, draws in arrays.items():
        rest = draws.shape[2:]
        flat = draws.reshape(draws.shape[0] * draws.shape[1], -1)
        outputs = [
            np.empty((len(s.labels) or 1, flat.shape[1]), statistic_dtype(flat.dtype))
            for s in statistics
        ]
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, flat.shape[1], _TILE):
                tile = slice(start, start + _TILE)
                _reduce_tile(flat[:, tile], statistics, [array[:, tile] for array in outputs])
        for s, array in zip(statistics, outputs, strict=True):
            results[f"{name}_{s.suffix}"] = array.reshape((*s.lead.values(), *rest))
    return results


def _reduce_tile(
    draws: np.ndarray, statistics: tuple[Statistic, ...], outputs: list[np.ndarray]
) -> None:
    # Copy the tile before it is transposed: strides within a small copy are short.
    rows = np.ascontiguousarray(draws.copy().T)
    if any(s.kind in ("median", "quantile", "hdi") for s in statistics):
        rows.sort(axis=1)
    for s, array in zip(statistics, outputs, strict=True):
        array[:] = _KINDS[s.kind](rows, s.arguments)


def _mean(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    return rows.mean(axis=1, dtype=np.float64)


def _std(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    # The error of a mean rounded to the rows' precision enters as its square only.
    centred = rows - rows.mean(axis=1, dtype=np.float64, keepdims=True).astype(
        statistic_dtype(rows.dtype)
    )
    return np.sqrt(np.square(centred).mean(axis=1, dtype=np.float64))


def _median(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    return _quantiles(rows, (0.5,))


def _quantiles(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    """Compute quantiles of sorted rows by linear interpolation; NaN is the last of its row."""
    positions = np.asarray(arguments) * (rows.shape[1] - 1)
    low = np.floor(positions).astype(int)
    lower, upper = (rows[:, np.minimum(i, rows.shape[1] - 1)] for i in (low, low + 1))
    lower, upper = lower.astype(np.float64), upper.astype(np.float64)
    step = positions - low
    # Without interpolation, infinities stay infinite (inf - inf is NaN).
    exact = (step == 0) | (lower == upper)
    values = np.where(exact, lower, lower + (upper - lower) * step)
    return np.where(_is_nan(rows[:, -1:]), np.nan, values).T


def _prob(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    shares = np.stack([_OPERATORS[sign](rows, x).mean(axis=1) for sign, x in arguments])
    return np.where(_is_nan(rows).any(axis=1), np.nan, shares)


def _hdi(rows: np.ndarray, arguments: tuple) -> np.ndarray:
    """Compute the shortest interval with a share of the draws, as ArviZ does, of sorted rows."""
    count = rows.shape[1]
    span = min(int(arguments[0] * count / 100), count - 1)
    widths = np.subtract(rows[:, span:], rows[:, : count - span], dtype=np.float64)
    first = widths.argmin(axis=1)
    ends = np.stack([np.take_along_axis(rows, i[:, None], 1)[:, 0] for i in (first, first + span)])
    return np.where(_is_nan(rows[:, -1]), np.nan, ends)


def _is_nan(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


_KINDS: dict[str, Callable[[np.ndarray, tuple], np.ndarray]] = {
    "mean": _mean,
    "std": _std,
    "median": _median,
    "quantile": _quantiles,
    "prob": _prob,
    "hdi": _hdi,
}

DEFAULT = ("mean", "std", 0.05, 0.5, 0.95)
_DRAWS = ("chain", "draw")
_CELL_METHODS = {"mean": "mean", "std": "standard_deviation", "median": "median"}


def with_statistic_attrs(
    ds: xr.Dataset, statistics: Iterable[Statistic], attrs: Mapping[str, Mapping[str, Any]]
) -> xr.Dataset:
    """Add labels of the statistics' dims to a summary, and attrs made from those of the draws.

    Parameters
    ----------
    ds : Dataset
        With the variables that :func:`statistic_names` names.
    statistics : iterable of Statistic
    attrs : mapping of variable, before it was summarized, to its attrs
    """
    for s in statistics:
        if s.dim is not None:
            ds = ds.assign_coords({s.dim: (s.dim, list(s.labels), _LABELS[s.dim])})
        for name, old in attrs.items():
            ds[f"{name}_{s.suffix}"].attrs = _make_attrs(name, old, s)
    return ds


_LABELS = {
    "quantile": {"long_name": "quantile over chains and draws", "units": "1"},
    "threshold": {"long_name": "event whose probability is given"},
    "ci_bound": {"long_name": "end of the interval"},
}


def _make_attrs(name: str, old: Mapping[str, Any], s: Statistic) -> dict[str, Any]:
    new = dict(old)
    words = {"std": "standard deviation", "prob": "probability"}
    if s.kind == "hdi":
        words["hdi"] = f"{s.arguments[0]:g} % highest density interval"
    new["long_name"] = f"{words.get(s.kind, s.kind)} of {old.get('long_name', name)}"
    if s.kind == "prob":
        # A probability of a temperature is not a temperature.
        new.pop("standard_name", None)
        new["units"] = "1"
    if s.kind in _CELL_METHODS:
        # CF has no cell method for a quantile, a probability or an interval, so none is set.
        method = f"realization: {_CELL_METHODS[s.kind]}"
        new["cell_methods"] = f"{old.get('cell_methods', '')} {method}".strip()
    return new


def summary(ds: xr.Dataset, *names: Any, statistics: Any = None) -> xr.Dataset:
    """Compute statistics over the chains and draws of a Dataset, block by block.

    Parameters
    ----------
    ds : Dataset
        Its variables have dims ``chain`` and ``draw``, or one of them: a prediction,
        opened from a store or not, or a posterior.
    *names : str, float or sequence of them
        The statistics, one by one or in a sequence: ``"mean"``, ``"std"`` (over the number of
        draws, as xarray's), ``"median"``; numbers from 0 to 1, which are quantiles;
        ``"prob>x"`` (or ``<``, ``>=``, ``<=``), the share of draws beyond ``x``; ``"hdi"``,
        the shortest interval with 89 % of the draws, or ``"hdi94"``. By default the mean, the
        standard deviation and the quantiles 0.05, 0.5 and 0.95.
    statistics : str, float or sequence of them
        The same by name.

    Returns
    -------
    Dataset
        Lazy where ``ds`` is. For a variable ``tas``: ``tas_mean``, ``tas_std``,
        ``tas_median``, ``tas_quantile (quantile, ...)``, ``tas_prob (threshold, ...)`` labelled
        ``">x"``, ``tas_hdi (ci_bound, ...)`` labelled ``"lower"`` and ``"upper"``. Floats keep
        their dtype; ints and bools give floats. Variables without draws stay.

    Raises
    ------
    OptionError
        A statistic that does not exist, or ``names`` and ``statistics`` both.
    DimensionError
        No variable has a dimension ``chain`` or ``draw``.
    DtypeError
        Draws that are not numbers.

    Notes
    -----
    A cell with a draw that is NaN gives NaN. Draws in several chunks are brought together,
    for as many cells at once as ``set_options(block_bytes=...)`` allows. Where the draws are
    not needed for anything else, ``predict(..., summary=...)`` keeps them within a task.

    Examples
    --------
    >>> import numpy as np, xarray as xr, xr_aimz
    >>> draws = xr.Dataset({"tas": (("chain", "draw", "lat"), np.arange(30.0).reshape(2, 5, 3))})
    >>> found = draws.aimz.summary("mean", 0.5, "prob>20")
    >>> found.tas_mean.values
    array([13.5, 14.5, 15.5])
    >>> found.tas_prob.sel(threshold=">20").values
    array([0.3, 0.3, 0.3])
    """
    check_dataset(ds, "summary")
    if names and statistics is not None:
        raise OptionError(
            f"summary is given {names!r} and statistics={statistics!r}; give all in one of them"
        )
    chosen = DEFAULT if statistics is None else statistics
    parsed = parse_statistics(names or chosen)
    with_draws = {str(n): a for n, a in ds.data_vars.items() if set(_DRAWS) & set(a.dims)}
    if not with_draws:
        raise DimensionError(
            f"no variable has a dimension 'chain' or 'draw'; the Dataset has {tuple(ds.dims)!r}"
        )
    for name, array in with_draws.items():
        if array.dtype.kind not in "fiub":
            raise DtypeError(f"variable {name!r} has dtype {array.dtype}; a summary takes numbers")
    names_in_result = statistic_names({n: n for n in with_draws}, parsed)
    draws = ds[list(with_draws)].reset_coords(drop=True).drop_vars(_DRAWS, errors="ignore")
    # The history has the time of day, which no task may hold: equal results have equal names.
    draws = draws.drop_attrs(deep=False)
    reduced = _map_blocks(draws, parsed) if draws.chunks else _of_block(draws, parsed)
    others = ds.drop_vars(list(with_draws)).drop_dims(_DRAWS, errors="ignore")
    result = with_statistic_attrs(
        reduced[list(names_in_result)], parsed, {n: a.attrs for n, a in with_draws.items()}
    )
    return others.assign(result.data_vars).assign_coords(result.coords).assign_attrs(ds.attrs)


def _map_blocks(ds: xr.Dataset, statistics: tuple[Statistic, ...]) -> xr.Dataset:
    """Reduce a chunked Dataset, one task for each block, which has all draws of its cells."""
    unified = ds.unify_chunks()
    lengths = {str(d): c for d, c in unified.chunks.items() if d not in _DRAWS}
    chunks = split_chunks(lengths, (), _count_max_cells(unified, lengths))
    rechunked = unified.chunk({**{d: -1 for d in _DRAWS if d in unified.dims}, **chunks})
    reduced = xr.map_blocks(
        _of_block,
        rechunked,
        kwargs={"statistics": statistics},
        template=_make_template(rechunked, statistics),
    )
    return reduced.chunk({d: c for d, c in lengths.items() if d in reduced.dims})


def _count_max_cells(ds: xr.Dataset, lengths: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many cells of the largest block may be in memory with all their draws."""
    max_sizes = {d: max(c) for d, c in lengths.items()}
    n_bytes = sum(
        a.dtype.itemsize * math.prod(max_sizes.get(str(d), n) for d, n in a.sizes.items())
        for a in ds.values()
    )
    return max(
        int(math.prod(max_sizes.values()) * get_options()["block_bytes"] / max(n_bytes, 1)), 1
    )


def _make_template(ds: xr.Dataset, statistics: tuple[Statistic, ...]) -> xr.Dataset:
    first_draw = ds.isel({d: 0 for d in _DRAWS if d in ds.dims}, drop=True)
    return xr.Dataset(
        {
            f"{name}_{s.suffix}": array.astype(statistic_dtype(array.dtype)).expand_dims(
                {d: list(s.labels) for d in s.lead}
            )
            for name, array in first_draw.items()
            for s in statistics
        }
    )


def _of_block(ds: xr.Dataset, statistics: tuple[Statistic, ...]) -> xr.Dataset:
    arrays = {str(n): a.expand_dims([d for d in _DRAWS if d not in a.dims]) for n, a in ds.items()}
    values = {n: a.transpose(*_DRAWS, ...).values for n, a in arrays.items()}
    reduced = compute_statistics(values, statistics)
    rest = {n: [d for d in a.dims if d not in _DRAWS] for n, a in ds.items()}
    coords = {s.dim: list(s.labels) for s in statistics if s.dim is not None}
    return xr.Dataset(
        {
            f"{name}_{s.suffix}": ((*s.lead, *rest[name]), reduced[f"{name}_{s.suffix}"])
            for name in values
            for s in statistics
        },
        {**{d: c for d, c in ds.coords.items() if d in ds.dims}, **coords},
    )
