"""The columns of a table that a fit is asked with.

A table has a row for each cell: a column for each observation dimension, with its labels, and
one for each variable that the model takes. A variable with further dimensions has a column
for each of their labels, ``rain[summer]``; results are named by the same rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from xr_aimz.binding import Source
from xr_aimz.errors import LabelError
from xr_aimz.labelling import extra_labels
from xr_aimz.posterior import Fit

__all__ = [
    "Columns",
    "LabelColumn",
    "Variable",
    "columns_of",
    "entry",
    "labels_at_fit",
    "same_name",
]


@dataclass(frozen=True)
class LabelColumn:
    """The labels of an observation dimension.

    ``like`` is the fit's own index, None where the fit had no labels; ``required`` says that
    a table without the column has no labels to draw by.
    """

    dim: str
    like: pd.Index | None
    required: bool


@dataclass(frozen=True)
class Variable:
    """A variable that the model takes, and its columns.

    Parameters
    ----------
    name : str
    dims : tuple of str
        The observation dimensions that it had at the fit.
    extra : mapping of dim to labels
        Its other dimensions.
    dtype : numpy.dtype, optional
        As the fit had it; None where that is not known.
    held : bool
        The fit has the values itself, and a table may leave them out.
    """

    name: str
    dims: tuple[str, ...]
    extra: dict[str, tuple[Any, ...]]
    dtype: np.dtype | None
    held: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(entry(self.name, labels) for labels in product(*self.extra.values()))


@dataclass(frozen=True)
class Columns:
    """All columns that a table may have; any other column is left alone."""

    labels: tuple[LabelColumn, ...]
    variables: tuple[Variable, ...]
    core_dims: tuple[str, ...] = ()

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(label.dim for label in self.labels)

    @property
    def required(self) -> tuple[str, ...]:
        own = [label.dim for label in self.labels if label.required]
        return (*own, *(c for v in self.variables if not v.held for c in v.columns))


def entry(name: str, labels: Iterable[Any]) -> str:
    """The column of one entry of a variable with further dimensions: ``rain[summer]``."""
    shown = ", ".join(_shown(label) for label in labels)
    return f"{name}[{shown}]" if shown else name


def same_name(columns: Iterable[str]) -> LabelError:
    """What to raise where two entries would be one column."""
    return LabelError(
        f"the table would have several columns called {sorted(set(columns))!r}: labels are joined "
        "by ', ' there, and a variable may be called as another's entry is. Give other labels or "
        "names to the Dataset, and fit with those"
    )


def _shown(label: Any) -> str:
    if isinstance(label, np.datetime64):
        return str(pd.Timestamp(label).isoformat())
    return str(label)


def columns_of(fit: Fit) -> Columns:
    """The columns that a table for this fit has.

    Raises
    ------
    LabelError
        A dimension has a MultiIndex, of which no single column is; or two columns would have
        the same name.
    """
    binding = fit.binding
    alone = len(binding.cut_dims) == 1
    labels = []
    for dim in binding.cut_dims:
        like = labels_at_fit(fit, dim)
        if isinstance(like, pd.MultiIndex):
            raise LabelError(
                f"dimension {dim!r} has a MultiIndex of {list(like.names)!r}, and a table has one "
                f"column for a dimension; fit with ds.unstack({dim!r}), or with other labels"
            )
        labels.append(LabelColumn(dim, like, required=like is not None or not alone))
    sources = {s.name: s for a in binding.inputs for s in a.sources}
    variables = tuple(_variable(fit, s) for s in sources.values() if not _from_labels(fit, s))
    names = Counter([*(c.dim for c in labels), *(c for v in variables for c in v.columns)])
    if twice := [name for name, count in names.items() if count > 1]:
        raise same_name(twice)
    core = tuple(d for d in binding.core_dims if d in binding.cut_dims)
    return Columns(tuple(labels), variables, core)


def labels_at_fit(fit: Fit, dim: str) -> pd.Index | None:
    """The index that a dimension had at the fit."""
    for held in (fit.observed_data, fit.constant_data, fit.posterior):
        if dim in held.indexes:
            return held.indexes[dim]
    return None


def _from_labels(fit: Fit, source: Source) -> bool:
    """Whether the label columns hold a variable already: ``time`` or ``time.dayofyear``."""
    return source.data is None and source.name.partition(".")[0] in fit.binding.cut_dims


def _variable(fit: Fit, source: Source) -> Variable:
    cut, known = fit.binding.cut_dims, extra_labels(fit.binding)
    there = source.name in fit.constant_data
    at_fit = fit.constant_data[source.name] if there else None
    extra: dict[str, tuple[Any, ...]] = {}
    for dim in (d for d in source.dims if d not in cut):
        labels = known.get(dim)
        size = 0 if at_fit is None else at_fit.sizes[dim]
        extra[dim] = tuple(range(size)) if labels is None else tuple(labels)
    return Variable(
        name=source.name,
        dims=tuple(d for d in cut if d in source.dims),
        extra=extra,
        dtype=None if at_fit is None else at_fit.dtype,
        # What varies with no cell belongs to the model; so does what was given as data.
        held=source.data is not None or (there and not set(source.dims) & set(cut)),
    )
