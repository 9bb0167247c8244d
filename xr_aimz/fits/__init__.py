"""Fit a model to a Dataset, and describe, save, load and continue the Fit.

A Dataset with observation dims comes in; a Fit comes out: labelled draws ``(chain, draw, *dims)``,
their diagnostics, the binding, the options and versions. Saved and loaded without running code.
"""

from xr_aimz.fits.assembly import assemble_prior, from_posterior
from xr_aimz.fits.configuration import model_reference
from xr_aimz.fits.description import Description, describe
from xr_aimz.fits.failures import explain_failure, integers_as_floats
from xr_aimz.fits.fitting import add_fit_hook, fit
from xr_aimz.fits.loading import load_fit
from xr_aimz.fits.posterior import Fit, cells_with_draws, check_fit, check_model, labels_at_fit

__all__ = [
    "Description", "Fit", "add_fit_hook", "assemble_prior", "cells_with_draws", "check_fit",
    "check_model", "describe", "explain_failure", "fit", "from_posterior",
    "integers_as_floats", "labels_at_fit", "load_fit", "model_reference",
]  # fmt: skip
