"""Statistics in place of draws: under their names, with their labels and attrs.

A task that has all draws of its cells can reduce them before anything leaves it: what is
held, moved and stored is then a few numbers a cell. A prediction does so with ``summary=``;
:func:`summary` does it with the draws of any Dataset, block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import xarray as xr

from xr_aimz.errors import DimensionError, DtypeError, OptionError
from xr_aimz.kinds import check_dataset
from xr_aimz.options import get_options
from xr_aimz.plan import finer
from xr_aimz.reduction import Statistic, dtype_of, parse, reduce, suffixed

__all__ = ["dressed", "summary"]

DEFAULT = ("mean", "std", 0.05, 0.5, 0.95)
_DRAWS = ("chain", "draw")
_CELL_METHODS = {"mean": "mean", "std": "standard_deviation", "median": "median"}


def dressed(
    ds: xr.Dataset, statistics: Iterable[Statistic], attrs: Mapping[str, Mapping[str, Any]]
) -> xr.Dataset:
    """A summary with the labels of its own dims, and with attrs from its variables'.

    Parameters
    ----------
    ds : Dataset
        With the variables that :func:`suffixed` names.
    statistics : iterable of Statistic
    attrs : mapping of variable, before it was summarized, to its attrs
    """
    for s in statistics:
        if s.dim is not None:
            ds = ds.assign_coords({s.dim: (s.dim, list(s.labels), _LABELS[s.dim])})
        for name, old in attrs.items():
            ds[f"{name}_{s.suffix}"].attrs = _attrs(name, old, s)
    return ds


_LABELS = {
    "quantile": {"long_name": "quantile over chains and draws", "units": "1"},
    "threshold": {"long_name": "event whose probability is given"},
    "ci_bound": {"long_name": "end of the interval"},
}


def _attrs(name: str, old: Mapping[str, Any], s: Statistic) -> dict[str, Any]:
    new = dict(old)
    words = {"std": "standard deviation", "prob": "probability"}
    if s.kind == "hdi":
        words["hdi"] = f"{s.arguments[0]:g} % highest density interval"
    new["long_name"] = f"{words.get(s.kind, s.kind)} of {old.get('long_name', name)}"
    if s.kind == "prob":
        # A probability of a temperature is no temperature.
        new.pop("standard_name", None)
        new["units"] = "1"
    if s.kind in _CELL_METHODS:
        # CF has no method for a quantile, a probability or an interval, so none is claimed.
        method = f"realization: {_CELL_METHODS[s.kind]}"
        new["cell_methods"] = f"{old.get('cell_methods', '')} {method}".strip()
    return new


def summary(ds: xr.Dataset, *names: Any, statistics: Any = None) -> xr.Dataset:
    """Statistics over the chains and draws of a Dataset, block by block.

    Parameters
    ----------
    ds : Dataset
        Whose variables have dims ``chain`` and ``draw``, or one of them: a prediction,
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
        Draws that are no numbers.

    Notes
    -----
    A cell with a draw that is NaN gives NaN. Draws in several chunks are brought together,
    for as many cells at once as ``set_options(block_bytes=...)`` allows. Where the draws are
    not needed for anything else, ``predict(..., summary=...)`` never makes them leave a task.

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
    asked = parse(names or chosen)
    drawn = {str(n): a for n, a in ds.data_vars.items() if set(_DRAWS) & set(a.dims)}
    if not drawn:
        raise DimensionError(
            f"no variable has a dimension 'chain' or 'draw'; the Dataset has {tuple(ds.dims)!r}"
        )
    for name, array in drawn.items():
        if array.dtype.kind not in "fiub":
            raise DtypeError(f"variable {name!r} has dtype {array.dtype}; a summary takes numbers")
    made = suffixed({n: n for n in drawn}, asked)
    held = ds[list(drawn)].reset_coords(drop=True).drop_vars(_DRAWS, errors="ignore")
    found = _by_block(held, asked) if held.chunks else _of_block(held, asked)
    kept = ds.drop_vars(list(drawn)).drop_dims(_DRAWS, errors="ignore")
    result = dressed(found[list(made)], asked, {n: a.attrs for n, a in drawn.items()})
    return kept.assign(result.data_vars).assign_coords(result.coords).assign_attrs(ds.attrs)


def _by_block(ds: xr.Dataset, statistics: tuple[Statistic, ...]) -> xr.Dataset:
    """One task for each block, which has all draws of its cells."""
    whole = ds.unify_chunks()
    lengths = {str(d): c for d, c in whole.chunks.items() if d not in _DRAWS}
    cut = finer(lengths, (), _cells(whole, lengths))
    pieces = whole.chunk({**{d: -1 for d in _DRAWS if d in whole.dims}, **cut})
    made = xr.map_blocks(
        _of_block,
        pieces,
        kwargs={"statistics": statistics},
        template=_template(pieces, statistics),
    )
    return made.chunk({d: c for d, c in lengths.items() if d in made.dims})


def _cells(ds: xr.Dataset, lengths: Mapping[str, tuple[int, ...]]) -> int:
    """How many cells of the largest block may be held with all their draws."""
    most = {d: max(c) for d, c in lengths.items()}
    weight = sum(
        a.dtype.itemsize * math.prod(most.get(str(d), n) for d, n in a.sizes.items())
        for a in ds.values()
    )
    return max(int(math.prod(most.values()) * get_options()["block_bytes"] / max(weight, 1)), 1)


def _template(ds: xr.Dataset, statistics: tuple[Statistic, ...]) -> xr.Dataset:
    one = ds.isel({d: 0 for d in _DRAWS if d in ds.dims}, drop=True)
    return xr.Dataset(
        {
            f"{name}_{s.suffix}": array.astype(dtype_of(array.dtype)).expand_dims(
                {d: list(s.labels) for d in s.lead}
            )
            for name, array in one.items()
            for s in statistics
        }
    )


def _of_block(ds: xr.Dataset, statistics: tuple[Statistic, ...]) -> xr.Dataset:
    arrays = {str(n): a.expand_dims([d for d in _DRAWS if d not in a.dims]) for n, a in ds.items()}
    values = {n: a.transpose(*_DRAWS, ...).values for n, a in arrays.items()}
    reduced = reduce(values, statistics)
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
