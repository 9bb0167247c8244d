"""From ``method=`` to an inference: a string, or one of NumPyro's own objects.

Each method takes its own options; one that it does not take is an error, not ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numpyro.infer import HMC, MCMC, SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.errors import OptionError
from xr_aimz.infer import laplace, mcmc, svi
from xr_aimz.infer.cells import CellMethod, laplace_cells, mcmc_cells, svi_cells
from xr_aimz.infer.problem import Draws, Problem

__all__ = ["cell_inference", "inference"]


def inference(
    model: Callable, method: Any, asked: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    """A function from a problem to draws; options are checked here, before any work."""
    if method == "nuts" or isinstance(method, MCMCKernel):
        taken = {"draws", "chains", "warmup"} | ({"init"} if method == "nuts" else set())
        options = _taken(method, asked, taken)
        kernel = mcmc.kernel_for(model, options.pop("init", None)) if method == "nuts" else method
        _same_model(model, kernel)
        settings = {"draws": 1000, "chains": 4, "warmup": 1000, **options}
        sampler = mcmc.sampler_for(kernel, progress=progress, **settings)
        return lambda problem: mcmc.run(problem, sampler, seed=seed)
    if isinstance(method, MCMC):
        _taken(method, asked, set())
        _same_model(model, method.sampler)
        return lambda problem: mcmc.run(problem, method, seed=seed)
    if isinstance(method, SVI):
        options = _taken(method, asked, {"draws", "steps"})
        _same_model(model, method)
        return _variational(method, options, seed, progress)
    is_guide = isinstance(method, AutoGuide) or (
        inspect.isclass(method) and issubclass(method, AutoGuide)
    )
    if method == "svi" or is_guide:
        options = _taken(method, asked, {"draws", "steps", "optimizer", "init"})
        optimizer, init = options.pop("optimizer", None), options.pop("init", None)
        guide = None if method == "svi" else method
        if isinstance(method, AutoGuide):
            _same_model(model, method)
        steps = options.get("steps", svi.STEPS)
        made = svi.svi_for(model, guide, optimizer, init, steps)
        own_schedule = optimizer is None or isinstance(optimizer, (int, float))
        if own_schedule:
            options["full_rate"] = svi.FULL_RATE
        return _variational(made, options, seed, progress)
    if method == "laplace":
        return _gaussian(_taken(method, asked, {"draws", "init"}), seed)
    raise OptionError(
        f"method={method!r}: there are 'nuts', 'svi', 'laplace', and NumPyro's own kernels, MCMC, "
        "SVI and autoguides"
    )


def _gaussian(options: dict[str, Any], seed: int) -> Callable[[Problem], Draws]:
    settings = {"draws": 1000, "init": None, **options}
    return lambda problem: laplace.run(problem, seed=seed, **settings)


def cell_inference(model: Callable, method: Any, asked: dict[str, Any]) -> CellMethod:
    """How each cell of a fit with ``per`` is fitted; options are checked here."""
    if method == "laplace":
        options = {"draws": 1000, **_taken(method, asked, {"draws", "init"})}
        return laplace_cells(options.pop("init", None), **options)
    if method == "nuts" or isinstance(method, HMC):
        taken = {"draws", "chains", "warmup"} | ({"init"} if method == "nuts" else set())
        options = {"draws": 1000, "chains": 4, "warmup": 1000, **_taken(method, asked, taken)}
        init = options.pop("init", None)
        if method == "nuts":
            return mcmc_cells(lambda own: mcmc.kernel_for(own, init), **options)
        _same_model(model, method)
        # A copy for each trace: a kernel keeps what its first one gave it.
        return mcmc_cells(lambda own: method.wrap_model(lambda _: own), **options)
    if method == "svi" or (inspect.isclass(method) and issubclass(method, AutoGuide)):
        options = _taken(method, asked, {"draws", "steps", "optimizer", "init"})
        settings = {"draws": 1000, "steps": svi.STEPS, **options}
        optimizer, init = settings.pop("optimizer", None), settings.pop("init", None)
        own_schedule = optimizer is None or isinstance(optimizer, (int, float))
        full_rate = svi.FULL_RATE if own_schedule else 1.0
        guide = None if method == "svi" else method
        return svi_cells(guide, optimizer, init, full_rate=full_rate, **settings)
    raise OptionError(
        f"method={method!r} does not go with per=, which runs one compiled program in every "
        "cell: there are 'nuts', 'svi', 'laplace', NumPyro's HMC and NUTS, and classes of "
        "autoguides, such as AutoMultivariateNormal"
    )


def _variational(
    inference: SVI, options: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    settings = {"draws": 1000, "steps": svi.STEPS, **options}
    return lambda problem: svi.run(problem, inference, seed=seed, progress=progress, **settings)


def _taken(method: Any, asked: dict[str, Any], taken: set[str]) -> dict[str, Any]:
    refused = sorted(set(asked) - taken)
    if refused:
        raise OptionError(
            f"method={method!r} does not take {refused!r}; it takes {sorted(taken)!r}"
        )
    for name in {"draws", "chains", "warmup", "steps"} & set(asked):
        value, least = asked[name], 0 if name == "warmup" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: it must be an int of at least {least}")
    return dict(asked)


def _same_model(model: Callable, owner: Any) -> None:
    own = getattr(owner, "model", None)
    if own is not model:
        raise OptionError(
            f"method={type(owner).__name__}(...) was made for the model {own!r}, and fit was "
            f"given {model!r}; make both the same"
        )
