"""Further draws of a fit that was loaded: its chains or its guide taken up again.

Nothing is run, and no model traced, before the first draws are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xr_aimz.assembly import Further
from xr_aimz.bound import Bound
from xr_aimz.errors import OptionError
from xr_aimz.fit import for_masked, problem_of
from xr_aimz.further import Kept
from xr_aimz.infer import mcmc, minibatch, svi
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.infer.worded import guide_from, kernel_from
from xr_aimz.labelling import result_name
from xr_aimz.options import shows_progress
from xr_aimz.posterior import Fit

__all__ = ["Reopened", "Unkept"]


@dataclass(frozen=True, eq=False)
class Unkept:
    """Stands where a method's further draws cannot be kept."""

    method: str

    def __call__(self, draws: int, seed: int) -> Fit:
        raise OptionError(
            f"there is nothing to draw from: a store keeps the chains of HMC and NUTS and guides, "
            f"and this fit was made by {self.method}. Fit again, or sample before saving"
        )

    def kept(self) -> None:
        """Nothing."""
        return


@dataclass(frozen=True, eq=False)
class Reopened:
    """Further draws from what a store kept.

    Parameters
    ----------
    bound : Bound
    what : Kept
    fit : Fit
        The fit that was loaded, whose draws say where a guide can start.
    method : optional
        The kernel, SVI or guide of the caller's.
    trust_import : bool
        Whether a guide may be imported by the path in the store.
    """

    bound: Bound
    what: Kept
    fit: Fit
    method: Any
    trust_import: bool

    def kept(self) -> Kept:
        """What it was made from."""
        return self.what

    def __call__(self, draws: int, seed: int) -> Fit:
        origin = self.what.origin
        problem, arrays, _ = problem_of(self.bound, streamed=origin.kind == "batches")
        given = self.method
        if problem.model is not self.bound.model:
            given = for_masked(given, self.bound, problem.model)
        more = (self._chains if origin.kind == "chains" else self._guide)(problem, given)
        posterior = self.fit.posterior
        shape = (posterior.sizes.get("chain", 1), posterior.sizes.get("draw", 1))
        drawn = Draws(
            samples={},
            shape=shape,
            method=self.fit.method,
            params=self.fit.params,
            more=more,
            state=self.fit.state,
            origin=origin,
        )
        found = Further(self.bound, drawn, arrays, self.what.first)(draws, seed)
        if origin.kind == "chains":
            return found
        # Of a guide they are about its training, of which nothing has changed.
        return replace(found, losses=self.fit.losses, concerns=self.fit.concerns)

    def _chains(self, problem: Problem, given: Any) -> Callable[[int, int], Draws]:
        origin = self.what.origin
        settings = {n: origin.settings[n] for n in ("chains", "warmup")}
        kernel = kernel_from(origin.by, problem.model, given)
        progress = shows_progress(None)
        sampler = mcmc.sampler_for(kernel, draws=1, progress=progress, **settings)
        sampler.thinning = origin.settings["thinning"]
        return mcmc.continuation(problem, sampler, origin.tree)

    def _guide(self, problem: Problem, given: Any) -> Callable[[int, int], Mapping[str, Any]]:
        origin = self.what.origin
        start = _values(self.fit, problem) if origin.kind == "guide" else None
        guide = guide_from(origin.by, problem.model, start, given, self.trust_import)
        if origin.kind == "guide":
            return svi.reopened(problem, guide, origin.tree)
        return minibatch.reopened(problem, guide, origin.settings["sizes"], origin.tree)


def _values(fit: Fit, problem: Problem) -> dict[str, np.ndarray]:
    """The first draw by site: a place where the model's density is finite."""
    found = {}
    for name in problem.named("latent"):
        draw = fit.posterior[result_name(fit.binding, fit.sites[name])].isel(chain=0, draw=0)
        found[name] = np.asarray(draw.values).reshape(fit.sites[name].shape)
    return found
