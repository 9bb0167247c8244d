"""Outcomes of ints and bools have no NaN that could say that an input was missing.

So a missing input of theirs is refused: before any task where it is in memory, else by a
task of its own. A hole from which nothing is drawn does not matter: one that an intervention
fills in every world, and one in a cell of a fit with ``per`` that has no draws, where all
results are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from xr_aimz.binding import Argument, Source
from xr_aimz.cell_results import drawn_cells
from xr_aimz.errors import MissingValueError
from xr_aimz.inputs import Inputs
from xr_aimz.posterior import Fit
from xr_aimz.worlds import Value, Worlds

__all__ = ["may_have_holes", "without_holes"]


def may_have_holes(fit: Fit, inputs: Inputs) -> bool:
    """Whether an input has a NaN, or is lazy and might."""
    return any(True for _ in _open(fit, inputs))


def without_holes(
    fit: Fit, inputs: Inputs, worlds: Worlds | None, whole: Mapping[str, np.dtype]
) -> Inputs:
    """The inputs, none of them missing where a site of ``whole`` is drawn from it.

    Parameters
    ----------
    fit : Fit
    inputs : Inputs
    worlds : Worlds, optional
        The interventions, whose values are among the inputs.
    whole : mapping of site to dtype
        The outcomes whose values have no NaN.

    Returns
    -------
    Inputs
        A lazy array raises when it is computed.

    Raises
    ------
    MissingValueError
    """
    arrays = dict(inputs.arrays)
    for argument, source in _open(fit, inputs):
        site = next((n for n in whole if argument.name in fit.sites[n].reads), None)
        if site is None:
            continue
        what = (
            f"variable {source.name!r} (argument {argument.name!r}) has missing values (NaN), and "
            f"site {site!r} is drawn as {whole[site]}, which has none: predict from "
            f"ds.fillna({{{source.name!r}: 0}}), then mask the result, "
            f".where(ds[{source.name!r}].notnull())"
        )
        arrays[source.key] = _checked(source.key, fit, inputs, worlds, what)
    return replace(inputs, arrays=arrays)


def _open(fit: Fit, inputs: Inputs) -> Iterator[tuple[Argument, Source]]:
    """The sources of arguments, of those that can hold NaN, that do or might."""
    for argument in fit.binding.inputs:
        for source in argument.sources:
            array = inputs.arrays[source.key]
            if array.dtype.kind == "f" and (array.chunks is not None or array.isnull().any()):
                yield argument, source


def _checked(key: str, fit: Fit, inputs: Inputs, worlds: Worlds | None, what: str) -> xr.DataArray:
    array = inputs.arrays[key]
    # Variables, and not DataArrays: all of them are on the labels of the inputs.
    masks = [_left_alone(key, inputs, worlds), drawn_cells(fit, inputs)]
    used = [mask.variable for mask in masks if mask is not None]
    if any(not mask.dims and not mask.chunks and not mask.values for mask in used):
        return array
    read = [_over(_and(used), array.dims)] if used else []
    checked = xr.apply_ufunc(
        _check, array.variable, *read, kwargs={"what": what}, dask="parallelized",
        output_dtypes=[array.dtype], keep_attrs=True,
    )  # fmt: skip
    return array if checked.chunks is None else array.copy(data=checked.data)


def _left_alone(key: str, inputs: Inputs, worlds: Worlds | None) -> xr.DataArray | None:
    """The cells in which some world has the input itself; None if one has all of it."""
    change = None if worlds is None else next(
        (c for c in worlds.arguments if c.target == key), None
    )  # fmt: skip
    if change is None or any(not isinstance(w, Value) for w in change.worlds):
        return None
    found = xr.DataArray(False)
    for value in change.values:
        given = inputs.arrays[value.key].isel(value.at, drop=True)
        found = found | given.isnull().drop_vars(list(given.coords))
    return found


def _and(masks: list[xr.Variable]) -> xr.Variable:
    first, *rest = masks
    for mask in rest:
        first = first & mask
    return first


def _over(mask: xr.Variable, dims: tuple[Any, ...]) -> xr.Variable:
    gone = [d for d in mask.dims if d not in dims]
    return mask.any(gone) if gone else mask


def _check(array: np.ndarray, used: Any = True, *, what: str) -> np.ndarray:
    if (np.isnan(array) & used).any():
        raise MissingValueError(what)
    return array
