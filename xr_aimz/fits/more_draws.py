"""Continue the sampler of a loaded fit: its chains, or its guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xr_aimz.binding import BoundModel
from xr_aimz.errors import OptionError
from xr_aimz.fits.assembly import LiveSampler
from xr_aimz.fits.configuration import guide_from_reference, kernel_from_reference
from xr_aimz.fits.fitting import build_problem, retarget_method
from xr_aimz.fits.posterior import Fit
from xr_aimz.inference import (
    InferenceProblem,
    PosteriorDraws,
    SavedSampler,
    continuation,
    restore_guide,
    restore_minibatch,
    sampler_for,
)
from xr_aimz.options import shows_progress


@dataclass(frozen=True, eq=False)
class NoSampler:
    """Sampler of a loaded fit whose method cannot be continued; raises OptionError when called."""

    method: str

    def __call__(self, draws: int, seed: int) -> Fit:
        raise OptionError(
            f"there is nothing to draw from: a store keeps the chains of HMC and NUTS and guides, "
            f"and this fit was made by {self.method}. Fit again, or sample before saving"
        )

    def saved_state(self) -> None:
        """Return None: there is no sampler to store."""
        return


@dataclass(frozen=True, eq=False)
class RestoredSampler:
    """Sampler of a loaded fit, restored from its store; returns further draws as a Fit.

    Parameters
    ----------
    bound : BoundModel
    what : SavedSampler
    fit : Fit
        The loaded fit; its first draw is the start of a guide.
    method : optional
        The caller's kernel, SVI or guide.
    trust_import : bool
        Allow importing a guide by the path in the store.
    """

    bound: BoundModel
    what: SavedSampler
    fit: Fit
    method: Any
    trust_import: bool

    def saved_state(self) -> SavedSampler:
        """Return the stored sampler, to be stored again."""
        return self.what

    def __call__(self, draws: int, seed: int) -> Fit:
        origin = self.what.origin
        problem, arrays, _ = build_problem(self.bound, streamed=origin.kind == "batches")
        caller_method = self.method
        if problem.model is not self.bound.model:
            caller_method = retarget_method(caller_method, self.bound, problem.model)
        continue_ = (self._chains if origin.kind == "chains" else self._guide)(
            problem, caller_method
        )
        posterior = self.fit.posterior
        shape = (posterior.sizes.get("chain", 1), posterior.sizes.get("draw", 1))
        restored = PosteriorDraws(
            samples={},
            shape=shape,
            method=self.fit.method,
            params=self.fit.params,
            continue_=continue_,
            state=self.fit.state,
            origin=origin,
        )
        fitted = LiveSampler(self.bound, restored, arrays, self.what.first)(draws, seed)
        if origin.kind == "chains":
            return fitted
        # For a guide, losses and concerns are about its training, which has not changed.
        return replace(fitted, losses=self.fit.losses, concerns=self.fit.concerns)

    def _chains(
        self, problem: InferenceProblem, caller_method: Any
    ) -> Callable[[int, int], PosteriorDraws]:
        origin = self.what.origin
        settings = {n: origin.settings[n] for n in ("chains", "warmup")}
        kernel = kernel_from_reference(origin.by, problem.model, caller_method)
        progress = shows_progress(None)
        sampler = sampler_for(kernel, draws=1, progress=progress, **settings)
        sampler.thinning = origin.settings["thinning"]
        return continuation(problem, sampler, origin.tree)

    def _guide(
        self, problem: InferenceProblem, caller_method: Any
    ) -> Callable[[int, int], Mapping[str, Any]]:
        origin = self.what.origin
        start = _first_draw(self.fit, problem) if origin.kind == "guide" else None
        guide = guide_from_reference(
            origin.by, problem.model, start, caller_method, self.trust_import
        )
        if origin.kind == "guide":
            return restore_guide(problem, guide, origin.tree)
        return restore_minibatch(problem, guide, origin.settings["sizes"], origin.tree)


def _first_draw(fit: Fit, problem: InferenceProblem) -> dict[str, np.ndarray]:
    """Return the first draw by latent site: values at which the model's density is finite."""
    values = {}
    for name in problem.named("latent"):
        draw = fit.posterior[fit.sites[name].variable].isel(chain=0, draw=0)
        values[name] = np.asarray(draw.values).reshape(fit.sites[name].shape)
    return values
