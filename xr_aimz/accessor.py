"""``Dataset.aimz``: one call a method, into the public function of the same name.

The accessor keeps no state, and imports a folder with the first call into it, so that
``import xr_aimz`` costs next to nothing. Its signatures are those of the functions, so that
completion and ``help`` show them; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

if TYPE_CHECKING:
    from pathlib import Path

    from xr_aimz.fits import Description, Fit
    from xr_aimz.prediction import Condition


@xr.register_dataset_accessor("aimz")
class AimzAccessor:
    """Bayesian models on a labelled Dataset: ``ds.aimz.fit(model)`` and what follows."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    def fit(
        self,
        model: Callable,
        variables: Mapping[str, Any] | None = None,
        *,
        dim: str | tuple[str, ...] | None = None,
        core_dim: str | tuple[str, ...] | None = None,
        per: str | tuple[str, ...] | None = None,
        layout: str = "grid",
        method: Any = "nuts",
        draws: int | None = None,
        chains: int | None = None,
        warmup: int | None = None,
        steps: int | None = None,
        batch: int | Mapping[str, int] | None = None,
        epochs: float | None = None,
        optimizer: Any = None,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        init: Any = None,
        seed: int = 0,
        assume_independent: str | tuple[str, ...] | None = None,
        store: str | Path | None = None,
        progress: bool | None = None,
    ) -> Fit:
        """Fit a NumPyro model to this Dataset.

        See :func:`xr_aimz.fit`.
        """
        from xr_aimz.fits import fit

        return fit(
            self._ds,
            model,
            variables,
            dim=dim,
            core_dim=core_dim,
            per=per,
            layout=layout,
            method=method,
            draws=draws,
            chains=chains,
            warmup=warmup,
            steps=steps,
            batch=batch,
            epochs=epochs,
            optimizer=optimizer,
            patience=patience,
            checkpoint=checkpoint,
            init=init,
            seed=seed,
            assume_independent=assume_independent,
            store=store,
            progress=progress,
        )

    def from_posterior(
        self,
        model: Callable,
        posterior: Any,
        variables: Mapping[str, Any] | None = None,
        *,
        dim: str | tuple[str, ...] | None = None,
        core_dim: str | tuple[str, ...] | None = None,
        layout: str = "grid",
        params: Mapping[str, Any] | None = None,
    ) -> Fit:
        """Make a Fit from draws of a posterior that was sampled elsewhere.

        See :func:`xr_aimz.from_posterior`.
        """
        from xr_aimz.fits import from_posterior

        return from_posterior(
            self._ds,
            model,
            posterior,
            variables,
            dim=dim,
            core_dim=core_dim,
            layout=layout,
            params=params,
        )

    def predict(
        self,
        fit: Fit,
        *,
        sites: str | Sequence[str] | None = None,
        do: Mapping[str, Any] | None = None,
        condition: Condition | None = None,
        draws: int | None = None,
        seed: int = 0,
        new_labels: str = "raise",
        summary: Any = None,
        assume_independent: str | Sequence[str] | None = None,
    ) -> xr.Dataset:
        """Draw posterior predictions, lazily: dims ``(chain, draw, *observation dims)``.

        See :func:`xr_aimz.predict`.
        """
        from xr_aimz.prediction import predict

        return predict(
            self._ds,
            fit,
            sites=sites,
            do=do,
            condition=condition,
            draws=draws,
            seed=seed,
            new_labels=new_labels,
            summary=summary,
            assume_independent=assume_independent,
        )

    def prior_predictive(
        self,
        model: Callable,
        variables: Mapping[str, Any] | None = None,
        *,
        draws: int = 500,
        seed: int = 0,
        dim: str | tuple[str, ...] | None = None,
        core_dim: str | tuple[str, ...] | None = None,
        layout: str = "grid",
        sites: str | Sequence[str] | None = None,
        do: Mapping[str, Any] | None = None,
        assume_independent: str | Sequence[str] | None = None,
    ) -> xr.Dataset:
        """Draw prior predictions, lazily: dims ``(chain, draw, *observation dims)``.

        See :func:`xr_aimz.prior_predictive`.
        """
        from xr_aimz.prediction import prior_predictive

        return prior_predictive(
            self._ds,
            model,
            variables,
            draws=draws,
            seed=seed,
            dim=dim,
            core_dim=core_dim,
            layout=layout,
            sites=sites,
            do=do,
            assume_independent=assume_independent,
        )

    def intervene(
        self,
        fit: Fit,
        do: Mapping[str, Any],
        *,
        baseline: Mapping[str, Any] | None = None,
        contrast: str | Callable | None = "difference",
        sites: str | Sequence[str] | None = None,
        condition: Condition | None = None,
        draws: int | None = None,
        seed: int = 0,
        new_labels: str = "raise",
        summary: Any = None,
        assume_independent: str | Sequence[str] | None = None,
    ) -> xr.Dataset:
        """Compute the effect of setting variables or sites, lazily, with paired draws.

        See :func:`xr_aimz.intervene`.
        """
        from xr_aimz.prediction import intervene

        return intervene(
            self._ds,
            fit,
            do,
            baseline=baseline,
            contrast=contrast,
            sites=sites,
            condition=condition,
            draws=draws,
            seed=seed,
            new_labels=new_labels,
            summary=summary,
            assume_independent=assume_independent,
        )

    def log_likelihood(
        self,
        fit: Fit,
        *,
        draws: int | None = None,
        assume_independent: str | Sequence[str] | None = None,
    ) -> xr.Dataset:
        """Compute the log density of each observation under each draw, lazily.

        See :func:`xr_aimz.log_likelihood`.
        """
        from xr_aimz.prediction import log_likelihood

        return log_likelihood(self._ds, fit, draws=draws, assume_independent=assume_independent)

    def describe(
        self,
        model_or_fit: Callable | Fit,
        variables: Mapping[str, Any] | None = None,
        *,
        dim: str | tuple[str, ...] | None = None,
        core_dim: str | tuple[str, ...] | None = None,
        per: str | tuple[str, ...] | None = None,
        layout: str = "grid",
    ) -> Description:
        """Tabulate the arguments, dimensions and sites of a model on this Dataset.

        See :func:`xr_aimz.describe`.
        """
        from xr_aimz.fits import describe

        return describe(
            self._ds, model_or_fit, variables, dim=dim, core_dim=core_dim, per=per, layout=layout
        )

    def summary(self, *names: Any, statistics: Any = None) -> xr.Dataset:
        """Compute statistics over the chains and draws of this Dataset, block by block.

        See :func:`xr_aimz.summary`.
        """
        from xr_aimz.prediction import summary

        return summary(self._ds, *names, statistics=statistics)

    def to_zarr(
        self,
        store: Any,
        *,
        mode: Literal["w-", "w"] = "w-",
        resume: bool = True,
        precision: int | None = None,
        shards: Mapping[str, int] | None = None,
        progress: bool | None = None,
    ) -> xr.Dataset:
        """Compute this lazy Dataset into a Zarr store, block by block, and reopen it.

        See :func:`xr_aimz.to_zarr`.
        """
        from xr_aimz.storage import to_zarr

        return to_zarr(
            self._ds,
            store,
            mode=mode,
            resume=resume,
            precision=precision,
            shards=shards,
            progress=progress,
        )
