"""What kind of object a public function takes: a Dataset, a Fit or a model, checked."""

from __future__ import annotations

from typing import Any

import xarray as xr

from xr_aimz.errors import OptionError
from xr_aimz.posterior import Fit

__all__ = ["check_dataset", "check_fit", "check_model"]


def check_dataset(ds: Any, verb: str) -> None:
    """
    Refuse what is no Dataset.

    Parameters
    ----------
    ds : object
    verb : str
        The function that was called with it.

    Raises
    ------
    OptionError
    """
    if isinstance(ds, xr.Dataset):
        return
    remedy = f"it is called as xr_aimz.{verb}(ds, ...), or as ds.aimz.{verb}(...)"
    if isinstance(ds, xr.DataArray):
        remedy = f"make it one: {_called(ds.name)}.to_dataset(name={str(ds.name or 'y')!r})"
    raise OptionError(f"{verb} takes a Dataset first; found {_kind_of(ds)}: {remedy}")


def check_fit(fit: Any, verb: str) -> None:
    """
    Refuse what is no Fit.

    Parameters
    ----------
    fit : object
    verb : str
        The function that was called with it.

    Raises
    ------
    OptionError
    """
    if isinstance(fit, Fit):
        return
    remedy = "a Fit comes from ds.aimz.fit(model), ds.aimz.from_posterior(...) or load_fit(...)"
    if isinstance(fit, xr.Dataset | xr.DataTree | dict):
        remedy = "make a Fit of draws: ds.aimz.from_posterior(model, draws)"
    elif callable(fit):
        remedy = (
            f"fit the model first, fit = ds.aimz.fit({_name(fit)}), and give that; or draw from "
            f"its prior: ds.aimz.prior_predictive({_name(fit)})"
        )
    raise OptionError(f"{verb} takes a Fit; found {_kind_of(fit)}: {remedy}")


def check_model(ds: Any, model: Any, verb: str) -> None:
    """
    Refuse what is no Dataset, and a Fit where a model belongs.

    Raises
    ------
    OptionError
    """
    check_dataset(ds, verb)
    if isinstance(model, Fit):
        raise OptionError(
            f"{verb} takes a model; found a Fit of {_name(model.model)}: give its model, fit.model"
        )


def _kind_of(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, xr.Dataset | xr.DataArray | xr.DataTree | Fit):
        return f"a {kind}"
    return f"{_name(value)!r}, a {kind}" if hasattr(value, "__name__") else f"{value!r}, a {kind}"


def _name(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)


def _called(name: Any) -> str:
    return "da" if name is None else str(name)
