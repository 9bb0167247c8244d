"""Inputs that were ints at the fit and are floats now, as ints with missing values are.

A model may take them all the same, a year for instance. One that may not, an index for
instance, fails on them when it is traced; there it is said which variable became a float. An
input that an intervention replaces everywhere is read by no world, and is an int again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import xarray as xr

from xr_aimz.inputs import Inputs
from xr_aimz.posterior import Fit

__all__ = ["ints_as_floats", "unread"]


def unread(fit: Fit, inputs: Inputs, replaced: Collection[str]) -> Mapping[str, xr.DataArray]:
    """Those of the ``replaced`` arrays that were ints, as ints, of any value."""
    return {
        key: xr.zeros_like(inputs.arrays[key], np.int32)
        for key in ints_as_floats(fit, inputs)
        if key in replaced
    }


def ints_as_floats(fit: Fit, inputs: Inputs) -> dict[str, str]:
    """The keys of inputs that were ints and are floats, and their variables' names."""
    return {
        source.key: source.name
        for argument in fit.binding.inputs
        for source in argument.sources
        if source.name in fit.constant_data
        and fit.constant_data[source.name].dtype.kind in "iu"
        and inputs.arrays[source.key].dtype.kind == "f"
    }
