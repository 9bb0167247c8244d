"""Kernels and guides in words, and from words again: a closed list, and no code.

Words are enough for HMC and NUTS with plain settings, and for NumPyro's autoguides as their
classes make them. Of all else they say what it was; the object itself must be given again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from numpyro.infer import HMC, MCMC, NUTS, SVI, autoguide
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.hmc_util import euclidean_kinetic_energy
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.errors import OptionError
from xr_aimz.infer.mcmc import init_strategy
from xr_aimz.record import readable
from xr_aimz.source import found_again, told

__all__ = ["guide_from", "kernel_from", "words_of"]

_KERNELS = {"HMC": HMC, "NUTS": NUTS}
# Of a model alone; AutoLowRankMultivariateNormal also of a rank.
_GUIDES = {
    name: getattr(autoguide, name)
    for name in (
        "AutoBNAFNormal",
        "AutoDAIS",
        "AutoDelta",
        "AutoDiagonalNormal",
        "AutoIAFNormal",
        "AutoLaplaceApproximation",
        "AutoLowRankMultivariateNormal",
        "AutoMultivariateNormal",
        "AutoNormal",
    )
}
# Where a chain starts and how: its state knows.
_STARTS = {"init_strategy", "inverse_mass_matrix", "kinetic_fn", "model", "potential_fn"}
# What changes no draw of a guide that is trained.
_UNTRAINED = {"init_loc_fn", "init_scale", "model"}


def words_of(by: Any) -> dict[str, Any]:
    """A kernel or guide in words; ``settings`` is None where they are not enough."""
    if isinstance(by, dict):
        # In words already, as a store had them.
        return by
    if isinstance(by, MCMCKernel):
        return {"kernel": type(by).__name__, "settings": _kernel_settings(by), "was": readable(by)}
    if isinstance(by, AutoGuide):
        return {"guide": type(by).__name__, "settings": _guide_settings(by), "was": readable(by)}
    return {"function": told(by)}


def _kernel_settings(kernel: MCMCKernel) -> dict[str, Any] | None:
    if _KERNELS.get(type(kernel).__name__) is not type(kernel):
        return None
    if kernel._potential_fn is not None or kernel._kinetic_fn is not euclidean_kinetic_energy:
        return None
    names = set(inspect.signature(type(kernel)).parameters) - _STARTS
    return _plain({name: getattr(kernel, f"_{name}") for name in sorted(names)})


def _guide_settings(guide: AutoGuide) -> dict[str, Any] | None:
    """Only what a guide of this class is made with by default, but for its rank and prefix."""
    kind = type(guide)
    if _GUIDES.get(kind.__name__) is not kind or guide.create_plates is not None:
        return None
    found = {"prefix": guide.prefix}
    if kind is autoguide.AutoLowRankMultivariateNormal:
        found["rank"] = guide.rank
        return _plain(found)
    defaults = vars(kind(guide.model))
    for name in set(inspect.signature(kind).parameters) - _UNTRAINED - {"prefix", "create_plates"}:
        for kept in (name, f"_{name}"):
            if kept in defaults and not _alike(defaults[kept], getattr(guide, kept)):
                return None
    return found


def _alike(one: Any, other: Any) -> bool:
    if callable(one) and callable(other):
        # The default of a hessian is a function made anew by each guide.
        return bool(getattr(one, "__code__", one) == getattr(other, "__code__", other))
    return type(one) is type(other) and bool(one == other)


def _plain(settings: dict[str, Any]) -> dict[str, Any] | None:
    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(is_plain, value))
        return value is None or type(value) in (bool, int, float, str)

    return settings if all(map(is_plain, settings.values())) else None


def kernel_from(words: Mapping[str, Any], model: Callable, given: Any) -> MCMCKernel:
    """The kernel that the words are of, on a model; or the one that is given.

    Raises
    ------
    OptionError
        The words are not enough, or what is given is of another class.
    """
    given = given.sampler if isinstance(given, MCMC) else given
    if given is not None:
        _check_class(given, words["kernel"])
        return given
    if words["settings"] is None:
        raise OptionError(_needed(words))
    return _KERNELS[words["kernel"]](model, **words["settings"])


def guide_from(
    words: Mapping[str, Any], model: Callable, start: Any, given: Any, trust_import: bool
) -> Any:
    """The guide that the words are of, on a model; or the one that is given.

    ``start`` has values of latent sites at which the model's density is finite.
    """
    given = given.guide if isinstance(given, SVI) else given
    if "function" in words:
        return found_again(words["function"], given, trust_import, "method")
    if given is not None and not inspect.isclass(given):
        _check_class(given, words["guide"])
        return given
    if words["settings"] is None:
        raise OptionError(_needed(words))
    return _GUIDES[words["guide"]](model, init_loc_fn=init_strategy(start), **words["settings"])


def _check_class(given: Any, name: str) -> None:
    if type(given).__name__ != name:
        raise OptionError(f"method={readable(given)!r}: the fit was made with {name}; give that")


def _needed(words: Mapping[str, Any]) -> str:
    return (
        f"the fit was made with {words['was']!r}, which a store has no words for; give it the one "
        "that fit() had: load_fit(..., method=...)"
    )
