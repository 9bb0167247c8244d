"""``Dataset.aimz``: one call a method, into the public function of the same name.

The accessor keeps no state, and imports a room only when someone enters it, so that
``import xr_aimz`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

if TYPE_CHECKING:
    from xr_aimz.describe import Description
    from xr_aimz.posterior import Fit

__all__ = ["AimzAccessor"]


@xr.register_dataset_accessor("aimz")
class AimzAccessor:
    """Bayesian models on a labelled Dataset: ``ds.aimz.fit(model)`` and what follows."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def fit(self, model: Any, variables: Any = None, **options: Any) -> Fit:
        """Fit a NumPyro model to this Dataset. See :func:`xr_aimz.fit`."""
        from xr_aimz.fit import fit

        return fit(self._ds, model, variables, **options)

    def from_posterior(
        self, model: Any, posterior: Any, variables: Any = None, **options: Any
    ) -> Fit:
        """A Fit from draws made elsewhere. See :func:`xr_aimz.from_posterior`."""
        from xr_aimz.from_posterior import from_posterior

        return from_posterior(self._ds, model, posterior, variables, **options)

    def predict(self, fit: Fit, **options: Any) -> xr.Dataset:
        """Posterior predictive draws, lazily. See :func:`xr_aimz.predict`."""
        from xr_aimz.predict import predict

        return predict(self._ds, fit, **options)

    def prior_predictive(self, model: Any, variables: Any = None, **options: Any) -> xr.Dataset:
        """Prior predictive draws, lazily. See :func:`xr_aimz.prior_predictive`."""
        from xr_aimz.prior import prior_predictive

        return prior_predictive(self._ds, model, variables, **options)

    def intervene(self, fit: Fit, do: Any, **options: Any) -> xr.Dataset:
        """The effect of setting variables or sites, lazily. See :func:`xr_aimz.intervene`."""
        from xr_aimz.effects import intervene

        return intervene(self._ds, fit, do, **options)

    def log_likelihood(self, fit: Fit, **options: Any) -> xr.Dataset:
        """The log density of each observation, lazily. See :func:`xr_aimz.log_likelihood`."""
        from xr_aimz.predict import log_likelihood

        return log_likelihood(self._ds, fit, **options)

    def describe(self, model_or_fit: Any, variables: Any = None, **options: Any) -> Description:
        """What is bound to what, as a table. See :func:`xr_aimz.describe`."""
        from xr_aimz.describe import describe

        return describe(self._ds, model_or_fit, variables, **options)

    def summary(self, *names: Any, statistics: Any = None) -> xr.Dataset:
        """Statistics over chains and draws. See :func:`xr_aimz.summary`."""
        from xr_aimz.summary import summary

        return summary(self._ds, *names, statistics=statistics)

    def to_zarr(self, store: Any, **options: Any) -> xr.Dataset:
        """Stream this Dataset to Zarr and reopen it. See :func:`xr_aimz.to_zarr`."""
        from xr_aimz.store import to_zarr

        return to_zarr(self._ds, store, **options)
