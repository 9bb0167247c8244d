"""Outcomes of ints and bools have no NaN that could say that an input was missing.

So a missing input of theirs is refused, be it read by the outcome or by a site that is drawn
on the way to it: before any task where it is in memory, else by a task of its own. A hole
from which nothing is drawn does not matter: one that an intervention fills in every world,
one behind values that are given, and one in a cell of a fit with ``per`` that has no draws,
where all results are missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import Argument, Source
from xr_aimz.cell_results import drawn_cells
from xr_aimz.drawn_from import Drawing, is_nowhere, over
from xr_aimz.errors import MissingValueError
from xr_aimz.inputs import Inputs
from xr_aimz.posterior import Fit

__all__ = ["may_have_holes", "without_holes"]


def may_have_holes(fit: Fit, inputs: Inputs) -> bool:
    """Whether an input has a NaN, or is lazy and might."""
    return any(True for _ in _open(fit, inputs))


def without_holes(
    drawing: Drawing, wanted: Collection[str], whole: Mapping[str, np.dtype]
) -> Inputs:
    """The inputs, none of them missing where a site of ``whole`` is drawn from it.

    Parameters
    ----------
    drawing : Drawing
        With the values of interventions among its inputs.
    wanted : collection of str
        The sites that are asked for.
    whole : mapping of site to dtype
        The sites whose values have no NaN. Those that no wanted site is made from are let be.

    Returns
    -------
    Inputs
        A lazy array raises when it is computed.

    Raises
    ------
    MissingValueError
    """
    fit, inputs = drawing.fit, drawing.inputs
    arrays = dict(inputs.arrays)
    open_ = list(_open(fit, inputs))
    drawn = [n for n in whole if drawing.feeds(n, wanted)] if open_ else []
    for argument, source in open_:
        for site in drawn:
            cells = drawing.cells(argument, source, site)
            if is_nowhere(cells):
                continue
            way = drawing.between(argument, source, site)
            through = f", which is made from it through {list(way)!r}," if way else ""
            what = (
                f"variable {source.name!r} (argument {argument.name!r}) has missing values "
                f"(NaN), and site {site!r}{through} is drawn as {whole[site]}, which has none: "
                f"predict from ds.fillna({{{source.name!r}: 0}}), then mask the result, "
                f".where(ds[{source.name!r}].notnull())"
            )
            arrays[source.key] = _checked(arrays[source.key], fit, inputs, cells, what)
            if not cells.dims and cells.chunks is None:
                # All of its cells are looked at.
                break
    return replace(inputs, arrays=arrays)


def _open(fit: Fit, inputs: Inputs) -> Iterator[tuple[Argument, Source]]:
    """The sources of arguments, of those that can hold NaN, that do or might."""
    for argument in fit.binding.inputs:
        for source in argument.sources:
            array = inputs.arrays[source.key]
            if array.dtype.kind == "f" and (array.chunks is not None or array.isnull().any()):
                yield argument, source


def _checked(
    array: xr.DataArray, fit: Fit, inputs: Inputs, cells: xr.Variable, what: str
) -> xr.DataArray:
    # Variables, and not DataArrays: all of them are on the labels of the inputs.
    with_draws = drawn_cells(fit, inputs)
    used = cells if with_draws is None else cells & with_draws.variable
    checked = xr.apply_ufunc(
        _check_nothing_missing, array.variable, over(used, array.dims), kwargs={"what": what},
        dask="parallelized", output_dtypes=[array.dtype], keep_attrs=True,
    )  # fmt: skip
    return array if checked.chunks is None else array.copy(data=checked.data)


def _check_nothing_missing(array: np.ndarray, used: Any, *, what: str) -> np.ndarray:
    if (np.isnan(array) & used).any():
        raise MissingValueError(what)
    return array
