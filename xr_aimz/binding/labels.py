"""Match the labels and units of one array with those of a Dataset or a fit.

Every alignment of the package goes through :func:`match_labels` or :func:`reorder_like`.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.errors import DimensionError, LabelError, UnitsError

Labelled = TypeVar("Labelled", xr.Dataset, xr.DataArray)


def new_labels_error(what: str, dim: str, new: pd.Index, remedy: str = "") -> LabelError:
    """Make the error for labels that the fit did not have."""
    default_remedy = (
        "new_labels='sample' draws latents for new labels of observation dimensions alone, and "
        "this is not one. Select labels that the fit had, or fit with these"
    )
    return LabelError(
        f"{what} has {len(new)} labels of {dim!r} that the fit never saw, {list(new[:3])!r} among "
        f"them; {remedy or default_remedy}"
    )


def reorder_like(
    labelled: Labelled, dim: str, index: pd.Index, what: str, remedy: str = ""
) -> Labelled:
    """Reorder the labels of ``dim`` like ``index``; an object without labels is returned as it is.

    Raises
    ------
    LabelError
        The labels differ from those of ``index``. ``what`` is the subject of the message, and
        ``remedy`` is the advice where labels are new or absent.
    """
    labels = labelled.indexes.get(dim)
    if labels is None or labels.equals(index):
        return labelled
    new, absent = labels.difference(index, sort=False), index.difference(labels, sort=False)
    if not len(new) and not len(absent) and len(labels) == len(index):
        return labelled.sel({dim: index})
    if len(new):
        raise new_labels_error(what, dim, new, remedy)
    if not len(absent):
        raise LabelError(
            f"{what} has labels of {dim!r} more than once, "
            f"{list(labels[labels.duplicated()][:3])!r} among them; give each once"
        )
    default_remedy = (
        "the model may combine them (by a sum, or an index, which counts among all of them), so "
        f"give them all, in any order, and select from the result: .sel({dim}=...)"
    )
    raise LabelError(
        f"{what} lacks {len(absent)} of the {len(index)} labels of {dim!r} that the fit had, "
        f"{list(absent[:3])!r} among them; {remedy or default_remedy}"
    )


# Relative to a label: the difference that 64-bit arithmetic leaves between two computations of
# the same label.
_REL_TOLERANCE = 1e-12


def check_float_labels(what: str, dim: str, new: pd.Index, fitted: pd.Index) -> None:
    """Refuse a new label that differs from one of the others by rounding alone."""
    if {new.dtype.kind, fitted.dtype.kind} - set("fiu") or not len(new) or not len(fitted):
        return
    new_values, sorted_values = new.to_numpy(np.float64), np.sort(fitted.to_numpy(np.float64))
    after = np.searchsorted(sorted_values, new_values)
    for indices in (after - 1, after):
        nearest = sorted_values[np.clip(indices, 0, len(sorted_values) - 1)]
        if (is_rounded := _differ_by_rounding(new_values, nearest)).any():
            raise LabelError(
                f"{what}, {float(new_values[is_rounded][0])!r} among them, which is "
                f"{float(nearest[is_rounded][0])!r} but for rounding; give {dim!r} the same "
                "values in both"
            )


def _differ_by_rounding(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return a mask of pairs that differ by rounding: in the last digits, or to 32 bits."""
    is_near = np.abs(left - right) <= _REL_TOLERANCE * np.abs(left)
    as_float32 = [x.astype(np.float32) for x in (left, right)]
    is_rounded = (as_float32[0] == as_float32[1]) & (
        (as_float32[0] == left) != (as_float32[1] == right)
    )
    # Integers, such as seconds since 1970, are taken as exact.
    is_integer = (left == np.floor(left)) & (right == np.floor(right))
    return (left != right) & (is_near | (is_rounded & ~is_integer))


def match_labels(
    what: str, array: xr.DataArray, dim: str, labels: pd.Index | None, size: int
) -> np.ndarray | None:
    """Find the position in an array of each label of a Dataset along ``dim``, -1 where absent.

    Parameters
    ----------
    what : str
        Subject of the messages: the array.
    array : DataArray
    dim : str
        A dim of the array.
    labels : Index or None
        Labels of the Dataset; None if it has none.
    size : int
        Of the Dataset along ``dim``.

    Returns
    -------
    ndarray of int, or None
        None if the array lies on these labels as it is, or neither has labels.

    Raises
    ------
    DimensionError
        Neither has labels, and the sizes differ.
    LabelError
        One has labels and the other none, or the array has a label more than once.
    """
    index = array.indexes.get(dim)
    if index is None and labels is None:
        if array.sizes[dim] != size:
            raise DimensionError(
                f"{what} has {array.sizes[dim]} entries along {dim!r}, where {size} are wanted, "
                "and no labels tell which; give both the same coordinate"
            )
        return None
    if index is None or labels is None:
        raise LabelError(
            f"{what} has {'no ' if index is None else ''}labels on {dim!r}, and the Dataset has "
            f"{'some' if index is None else 'none'}; give both the same coordinate"
        )
    if not index.is_unique:
        duplicates = list(index[index.duplicated()][:3])
        raise LabelError(
            f"{what} has duplicate labels of {dim!r}, {duplicates!r} among them; give each value "
            "one label"
        )
    return None if index.equals(labels) else index.get_indexer(labels)


def check_units(what: str, array: xr.DataArray, expected: object) -> None:
    """Refuse an array whose units differ, as text, from those of the fit's variable.

    Raises
    ------
    UnitsError
    """
    units = array.attrs.get("units")
    if units is not None and expected is not None and str(units) != str(expected):
        raise UnitsError(
            f"{what} is in {str(units)!r}; the fit was in {str(expected)!r}. Convert it, or set "
            "its attrs['units'] if only the name differs"
        )
