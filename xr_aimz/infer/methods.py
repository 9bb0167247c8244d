"""From ``method=`` to an inference: a string, or one of NumPyro's own objects.

Each method takes its own options; one that it does not take is an error, not ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numpyro.contrib.einstein import SteinVI
from numpyro.infer import HMC, MCMC, SVI
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.defaults import CHAINS, DRAWN, LEARNING_RATE, STEPPED
from xr_aimz.errors import OptionError
from xr_aimz.infer import laplace, mcmc, minibatch, stein, svi
from xr_aimz.infer.cells import CellMethod, laplace_cells, mcmc_cells, svi_cells
from xr_aimz.infer.iterates import adam
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.infer.reflection import is_normal
from xr_aimz.posterior import Fit
from xr_aimz.spelling import list_names, suggest
from xr_aimz.whole_numbers import parse_count

__all__ = ["cell_inference", "inference"]

_NAMED = ("nuts", "svi", "laplace")


def inference(
    model: Callable, method: Any, asked: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    """A function from a problem to draws; options are checked here, before any work."""
    if "batch" in asked:
        return _in_batches(model, method, asked, seed, progress)
    _check_whole(asked)
    if method == "nuts" or isinstance(method, MCMCKernel):
        return _chains(model, method, asked, seed, progress)
    if isinstance(method, MCMC):
        _taken(method, asked, set())
        _same_model(model, method.sampler)
        return lambda problem: mcmc.run(problem, method, seed=seed)
    if isinstance(method, SVI):
        options = _taken(method, asked, {"draws", "steps"})
        _same_model(model, method)
        return _variational(method, options, seed, progress)
    if isinstance(method, SteinVI):
        return _stein(model, method, asked, seed, progress)
    if method == "svi" or _is_guide(method):
        return _guided(model, method, asked, seed, progress)
    if method == "laplace":
        return _gaussian(_taken(method, asked, {"draws", "init"}), seed)
    raise OptionError(
        f"method={method!r}: there are 'nuts', 'svi', 'laplace', and NumPyro's own kernels, MCMC, "
        f"SVI, SteinVI and autoguides{suggest(_NAMED, [method])}"
    )


def _chains(
    model: Callable, method: Any, asked: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    taken = {"draws", "chains", "warmup"} | ({"init"} if method == "nuts" else set())
    options = _taken(method, asked, taken)
    kernel = mcmc.kernel_for(model, options.pop("init", None)) if method == "nuts" else method
    _same_model(model, kernel)
    settings = {**CHAINS, **options}
    sampler = mcmc.sampler_for(kernel, progress=progress, **settings)
    return lambda problem: mcmc.run(problem, sampler, seed=seed)


def _guided(
    model: Callable, method: Any, asked: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    options = _taken(method, asked, {"draws", "steps", "optimizer", "init"})
    optimizer, init = options.pop("optimizer", None), options.pop("init", None)
    guide = None if method == "svi" else method
    if isinstance(method, AutoGuide):
        _same_model(model, method)
    made = svi.svi_for(model, guide, optimizer, init, options.get("steps", STEPPED["steps"]))
    if optimizer is None or isinstance(optimizer, (int, float)):
        options["full_rate"] = svi.FULL_RATE
    return _variational(made, options, seed, progress)


def _gaussian(options: dict[str, Any], seed: int) -> Callable[[Problem], Draws]:
    settings = {**DRAWN, "init": None, **options}
    return lambda problem: laplace.run(problem, seed=seed, **settings)


def cell_inference(model: Callable, method: Any, asked: dict[str, Any]) -> CellMethod:
    """How each cell of a fit with ``per`` is fitted; options are checked here."""
    if method == "laplace":
        options = {**DRAWN, **_taken(method, asked, {"draws", "init"})}
        return laplace_cells(options.pop("init", None), **options)
    if method == "nuts" or isinstance(method, HMC):
        taken = {"draws", "chains", "warmup"} | ({"init"} if method == "nuts" else set())
        options = {**CHAINS, **_taken(method, asked, taken)}
        init = options.pop("init", None)
        if method == "nuts":
            return mcmc_cells(lambda own: mcmc.kernel_for(own, init), **options)
        _same_model(model, method)
        # A copy for each trace: a kernel keeps what its first one gave it.
        return mcmc_cells(lambda own: method.wrap_model(lambda _: own), **options)
    if method == "svi" or (inspect.isclass(method) and issubclass(method, AutoGuide)):
        options = _taken(method, asked, {"draws", "steps", "optimizer", "init"})
        settings = {**STEPPED, **options}
        optimizer, init = settings.pop("optimizer", None), settings.pop("init", None)
        own_schedule = optimizer is None or isinstance(optimizer, (int, float))
        full_rate = svi.FULL_RATE if own_schedule else 1.0
        guide = None if method == "svi" else method
        return svi_cells(guide, optimizer, init, full_rate=full_rate, **settings)
    raise OptionError(
        f"method={method!r} does not go with per=, which runs one compiled program in every "
        "cell: there are 'nuts', 'svi', 'laplace', NumPyro's HMC and NUTS, and classes of "
        f"autoguides, such as AutoMultivariateNormal{suggest(_NAMED, [method])}"
    )


def _in_batches(
    model: Callable, method: Any, asked: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    """Variational inference on batches, by any of its doors."""
    options = _batch_options(model, method, asked)
    previous, init = _previous(options.pop("init", None))
    optimizer, draws = options.pop("optimizer", None), options.pop("draws", DRAWN["draws"])
    options.pop("assume_independent", None)
    full_rate = None
    if isinstance(method, SVI):
        if init is not None:
            raise OptionError(
                f"init={init!r}: an SVI has its own start; give it a Fit, or nothing"
            )
    elif optimizer is None or isinstance(optimizer, (int, float)):
        full_rate = svi.FULL_RATE
    started = tuple(init) if isinstance(init, dict) else ()
    settings = minibatch.Settings(
        previous=previous, started=started, full_rate=full_rate, **options
    )

    def run(problem: Problem) -> Draws:
        def make(steps: int) -> SVI:
            if isinstance(method, SVI):
                return method
            guide = AutoNormal if method == "svi" else method
            by = _batch_optimizer(guide, optimizer, steps)
            return svi.svi_for(problem.model, guide, by, init, steps, minibatch.LAST_RATE)

        return minibatch.run(problem, make, settings, draws=draws, seed=seed, progress=progress)

    return run


def _batch_optimizer(guide: Any, optimizer: Any, steps: int) -> Any:
    """An Adam of our own that averages, for a guide of which averages are known to be good."""
    if is_normal(guide) and (optimizer is None or isinstance(optimizer, (int, float))):
        return adam(LEARNING_RATE if optimizer is None else float(optimizer), steps)
    return optimizer


def _batch_options(model: Callable, method: Any, asked: dict[str, Any]) -> dict[str, Any]:
    taken = {"batch", "draws", "steps", "epochs", "patience", "checkpoint", "init"}
    taken |= {"assume_independent"}
    if not (isinstance(method, SVI) or method == "svi" or _is_guide(method)):
        raise OptionError(
            f"method={method!r} does not take ['batch']: batches are for variational inference, "
            "method='svi', an autoguide or an SVI"
        )
    options = _taken(method, asked, taken if isinstance(method, SVI) else taken | {"optimizer"})
    if isinstance(method, (SVI, AutoGuide)):
        _same_model(model, method)
    if {"steps", "epochs"} <= set(options):
        raise OptionError(
            f"steps={options['steps']!r} and epochs={options['epochs']!r} both say how long; give "
            "one"
        )
    epochs = options.get("epochs", 1)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not epochs > 0:
        raise OptionError(f"epochs={epochs!r}: it must be a number above 0")
    return options if "epochs" in options else {"steps": STEPPED["steps"], **options}


def _is_guide(method: Any) -> bool:
    return isinstance(method, AutoGuide) or (
        inspect.isclass(method) and issubclass(method, AutoGuide)
    )


def _previous(init: Any) -> tuple[Any, Any]:
    """The state of the fit to go on from, or else how to start."""
    if not isinstance(init, Fit):
        return None, init
    if not init.state:
        raise OptionError(
            f"init= is a fit by {init.method}, which kept nothing to continue from; a minibatch "
            "fit does"
        )
    return init.state, None


def _check_whole(asked: dict[str, Any]) -> None:
    """What only a fit in batches takes."""
    strays = sorted({"epochs", "patience", "checkpoint", "assume_independent"} & set(asked))
    if strays:
        raise OptionError(
            f"{strays!r} go with batches: say batch={{'time': 100}}, or a number of observations, "
            "and method='svi'"
        )
    if isinstance(asked.get("init"), Fit):
        raise OptionError(
            "init= a Fit continues a fit in batches: say batch= as that one had it. Here give "
            "values by site, or a strategy of numpyro.infer"
        )


def _variational(
    inference: SVI, options: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    settings = {**STEPPED, **options}
    return lambda problem: svi.run(problem, inference, seed=seed, progress=progress, **settings)


def _stein(
    model: Callable, method: SteinVI, asked: dict[str, Any], seed: int, progress: bool
) -> Callable[[Problem], Draws]:
    options = STEPPED | _taken(method, asked, {"draws", "steps"})
    _same_model(model, method)
    return lambda problem: stein.run(problem, method, seed=seed, progress=progress, **options)


def _taken(method: Any, asked: dict[str, Any], taken: set[str]) -> dict[str, Any]:
    refused = sorted(set(asked) - taken)
    if refused:
        raise OptionError(
            f"method={method!r} does not take {refused!r}; it takes "
            f"{list_names(sorted(taken), refused)}"
        )
    counts = {"draws", "chains", "warmup", "steps", "patience"} & set(asked)
    return asked | {n: parse_count(n, asked[n], 0 if n == "warmup" else 1) for n in counts}


def _same_model(model: Callable, owner: Any) -> None:
    own = getattr(owner, "model", None)
    if own is not model:
        raise OptionError(
            f"method={type(owner).__name__}(...) was made for the model {own!r}, and fit was "
            f"given {model!r}; make both the same"
        )
