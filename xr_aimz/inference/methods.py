"""Make an inference from ``method=``: a name, or an inference object of NumPyro's.

The objects are kernels, MCMC, SVI, SteinVI and autoguides. The options of a method are checked
when the inference is made, before any work. The inference is a function from an
InferenceProblem to PosteriorDraws.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from numpyro.contrib.einstein import SteinVI
from numpyro.infer import HMC, MCMC, SVI
from numpyro.infer.autoguide import AutoGuide, AutoGuideList, AutoNormal
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from xr_aimz.errors import OptionError, list_names, suggest
from xr_aimz.inference.iterates import adam
from xr_aimz.inference.laplace import run_laplace
from xr_aimz.inference.mcmc import kernel_for, run_mcmc, sampler_for
from xr_aimz.inference.minibatch import LAST_RATE, MinibatchSettings, run_minibatch
from xr_aimz.inference.per_cell_program import (
    CellMethod,
    laplace_per_cell,
    mcmc_per_cell,
    svi_per_cell,
)
from xr_aimz.inference.problem import (
    CHAINS,
    DRAWN,
    LEARNING_RATE,
    STEPPED,
    InferenceProblem,
    PosteriorDraws,
    PreviousFit,
)
from xr_aimz.inference.reflection import is_normal
from xr_aimz.inference.variational import FULL_RATE, run_stein, run_svi, svi_for
from xr_aimz.options import parse_count

_METHOD_NAMES = ("nuts", "svi", "laplace")


def make_inference(
    model: Callable, method: Any, passed_options: dict[str, Any], seed: int, progress: bool
) -> Callable[[InferenceProblem], PosteriorDraws]:
    """Make the function from a problem to posterior draws; options are checked before any work."""
    if "batch" in passed_options:
        return _prepare_minibatch(model, method, passed_options, seed, progress)
    _check_whole(passed_options)
    if method == "nuts" or isinstance(method, MCMCKernel):
        return _prepare_mcmc(model, method, passed_options, seed, progress)
    if isinstance(method, MCMC):
        _check_options(method, passed_options, set())
        _check_same_model(model, method.sampler)
        return lambda problem: run_mcmc(problem, method, seed=seed)
    if isinstance(method, SVI):
        options = _check_options(method, passed_options, {"draws", "steps"})
        _check_same_model(model, method)
        return _prepare_svi(method, options, seed, progress)
    if isinstance(method, SteinVI):
        return _prepare_stein(model, method, passed_options, seed, progress)
    if method == "svi" or _is_guide(method):
        return _prepare_guide(model, method, passed_options, seed, progress)
    if method == "laplace":
        return _prepare_laplace(_check_options(method, passed_options, {"draws", "init"}), seed)
    raise OptionError(
        f"method={method!r}: there are 'nuts', 'svi', 'laplace', and NumPyro's own kernels, MCMC, "
        f"SVI, SteinVI and autoguides{suggest(_METHOD_NAMES, [method])}"
    )


def _prepare_mcmc(
    model: Callable, method: Any, kwargs: dict[str, Any], seed: int, progress: bool
) -> Callable[[InferenceProblem], PosteriorDraws]:
    accepted = {"draws", "chains", "warmup"} | ({"init"} if method == "nuts" else set())
    options = _check_options(method, kwargs, accepted)
    kernel = kernel_for(model, options.pop("init", None)) if method == "nuts" else method
    _check_same_model(model, kernel)
    settings = {**CHAINS, **options}
    sampler = sampler_for(kernel, progress=progress, **settings)
    return lambda problem: run_mcmc(problem, sampler, seed=seed)


def _prepare_guide(
    model: Callable, method: Any, kwargs: dict[str, Any], seed: int, progress: bool
) -> Callable[[InferenceProblem], PosteriorDraws]:
    options = _check_options(method, kwargs, {"draws", "steps", "optimizer", "init"})
    optimizer, init = options.pop("optimizer", None), options.pop("init", None)
    guide = None if method == "svi" else method
    if isinstance(method, AutoGuide):
        _check_same_model(model, method)
    svi = svi_for(model, guide, optimizer, init, options.get("steps", STEPPED["steps"]))
    if optimizer is None or isinstance(optimizer, (int, float)):
        options["full_rate"] = FULL_RATE
    return _prepare_svi(svi, options, seed, progress)


def _prepare_laplace(
    options: dict[str, Any], seed: int
) -> Callable[[InferenceProblem], PosteriorDraws]:
    settings = {**DRAWN, "init": None, **options}
    return lambda problem: run_laplace(problem, seed=seed, **settings)


def make_cell_inference(
    model: Callable, method: Any, passed_options: dict[str, Any]
) -> CellMethod:
    """Make the method that fits each cell of a fit with ``per``, from checked options."""
    if method == "laplace":
        options = {**DRAWN, **_check_options(method, passed_options, {"draws", "init"})}
        return laplace_per_cell(options.pop("init", None), **options)
    if method == "nuts" or isinstance(method, HMC):
        accepted = {"draws", "chains", "warmup"} | ({"init"} if method == "nuts" else set())
        options = {**CHAINS, **_check_options(method, passed_options, accepted)}
        init = options.pop("init", None)
        if method == "nuts":
            return mcmc_per_cell(lambda cell_model: kernel_for(cell_model, init), **options)
        _check_same_model(model, method)
        # A copy for each trace: a kernel stores values of its first trace.
        return mcmc_per_cell(lambda cell_model: method.wrap_model(lambda _: cell_model), **options)
    if method == "svi" or (inspect.isclass(method) and issubclass(method, AutoGuide)):
        options = _check_options(method, passed_options, {"draws", "steps", "optimizer", "init"})
        settings = {**STEPPED, **options}
        optimizer, init = settings.pop("optimizer", None), settings.pop("init", None)
        has_default_schedule = optimizer is None or isinstance(optimizer, (int, float))
        full_rate = FULL_RATE if has_default_schedule else 1.0
        guide = None if method == "svi" else method
        return svi_per_cell(guide, optimizer, init, full_rate=full_rate, **settings)
    raise OptionError(
        f"method={method!r} does not go with per=, which runs one compiled program in every "
        "cell: there are 'nuts', 'svi', 'laplace', NumPyro's HMC and NUTS, and classes of "
        f"autoguides, such as AutoMultivariateNormal{suggest(_METHOD_NAMES, [method])}"
    )


def _prepare_minibatch(
    model: Callable, method: Any, kwargs: dict[str, Any], seed: int, progress: bool
) -> Callable[[InferenceProblem], PosteriorDraws]:
    """Make a variational inference on batches, from a name, an autoguide or an SVI."""
    options = _parse_batch_options(model, method, kwargs)
    previous, init = _split_init(options.pop("init", None))
    optimizer, draws = options.pop("optimizer", None), options.pop("draws", DRAWN["draws"])
    options.pop("assume_independent", None)
    full_rate = None
    if isinstance(method, SVI):
        if init is not None:
            raise OptionError(
                f"init={init!r}: an SVI has its own initial values; give a Fit, or leave init= out"
            )
    elif optimizer is None or isinstance(optimizer, (int, float)):
        full_rate = FULL_RATE
    start_sites = tuple(init) if isinstance(init, dict) else ()
    settings = MinibatchSettings(
        previous=previous, started=start_sites, full_rate=full_rate, **options
    )

    def run(problem: InferenceProblem) -> PosteriorDraws:
        def make(steps: int) -> SVI:
            if isinstance(method, SVI):
                return method
            guide = AutoNormal if method == "svi" else method
            batch_optimizer = _choose_batch_optimizer(guide, optimizer, steps)
            return svi_for(problem.model, guide, batch_optimizer, init, steps, LAST_RATE)

        return run_minibatch(problem, make, settings, draws=draws, seed=seed, progress=progress)

    return run


def _choose_batch_optimizer(guide: Any, optimizer: Any, steps: int) -> Any:
    """Choose the optimizer: by default Adam with averaged iterates, which suits normal guides."""
    if is_normal(guide) and (optimizer is None or isinstance(optimizer, (int, float))):
        return adam(LEARNING_RATE if optimizer is None else float(optimizer), steps)
    return optimizer


def _parse_batch_options(model: Callable, method: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    accepted = {"batch", "draws", "steps", "epochs", "patience", "checkpoint", "init"}
    accepted |= {"assume_independent"}
    if not (isinstance(method, SVI) or method == "svi" or _is_guide(method)):
        raise OptionError(
            f"method={method!r} does not take ['batch']: batches are for variational inference, "
            "method='svi', an autoguide or an SVI"
        )
    options = _check_options(
        method, kwargs, accepted if isinstance(method, SVI) else accepted | {"optimizer"}
    )
    if isinstance(method, (SVI, AutoGuide)):
        _check_same_model(model, method)
    if {"steps", "epochs"} <= set(options):
        raise OptionError(
            f"steps={options['steps']!r} and epochs={options['epochs']!r} both set the length of "
            "the fit; give one of them"
        )
    epochs = options.get("epochs", 1)
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not epochs > 0:
        raise OptionError(f"epochs={epochs!r}: it must be a number above 0")
    return options if "epochs" in options else {"steps": STEPPED["steps"], **options}


def _is_guide(method: Any) -> bool:
    return isinstance(method, AutoGuide) or (
        inspect.isclass(method) and issubclass(method, AutoGuide)
    )


def _split_init(init: Any) -> tuple[Any, Any]:
    """Split ``init=`` into the state of a previous fit and initial values; one of them is None."""
    if not isinstance(init, PreviousFit):
        return None, init
    if not init.state:
        raise OptionError(
            f"init= is a fit by {init.method}, which kept nothing to continue from; a minibatch "
            "fit does"
        )
    return init.state, None


def _check_whole(kwargs: dict[str, Any]) -> None:
    """Refuse options that only a fit in batches takes."""
    batch_options = sorted(
        {"epochs", "patience", "checkpoint", "assume_independent"} & set(kwargs)
    )
    if batch_options:
        raise OptionError(
            f"{batch_options!r} go with batches: give batch={{'time': 100}}, or a number of "
            "observations, and method='svi'"
        )
    if isinstance(kwargs.get("init"), PreviousFit):
        raise OptionError(
            "init= a Fit continues a fit in batches: give the batch= that it had. For a fit on "
            "all data give values by site, or a strategy of numpyro.infer"
        )


def _prepare_svi(
    inference: SVI, options: dict[str, Any], seed: int, progress: bool
) -> Callable[[InferenceProblem], PosteriorDraws]:
    settings = {**STEPPED, **options}
    return lambda problem: run_svi(problem, inference, seed=seed, progress=progress, **settings)


def _prepare_stein(
    model: Callable, method: SteinVI, kwargs: dict[str, Any], seed: int, progress: bool
) -> Callable[[InferenceProblem], PosteriorDraws]:
    options = STEPPED | _check_options(method, kwargs, {"draws", "steps"})
    _check_same_model(model, method)
    return lambda problem: run_stein(problem, method, seed=seed, progress=progress, **options)


def _check_options(method: Any, kwargs: dict[str, Any], accepted: set[str]) -> dict[str, Any]:
    refused = sorted(set(kwargs) - accepted)
    if refused:
        raise OptionError(
            f"method={method!r} does not take {refused!r}; it takes "
            f"{list_names(sorted(accepted), refused)}"
        )
    counts = {"draws", "chains", "warmup", "steps", "patience"} & set(kwargs)
    return kwargs | {n: parse_count(n, kwargs[n], 0 if n == "warmup" else 1) for n in counts}


def _check_same_model(model: Callable, method: Any) -> None:
    method_model = getattr(method, "model", None)
    if method_model is not model:
        raise OptionError(
            f"method={type(method).__name__}(...) was made for the model {method_model!r}, and "
            f"fit was given {model!r}; make both the same"
        )


Wrap = Callable[[Callable], Callable]


def retarget(method: Any, model: Callable, other: Callable, wrap: Wrap) -> Any:
    """Copy ``method=`` with ``other`` in place of ``model``; return a name or a class unchanged.

    ``other`` is ``wrap(model)``. A kernel that contains other kernels contains models that it
    derived from the model it was given: those are wrapped.
    """
    swap = functools.partial(retarget, model=model, other=other, wrap=wrap)
    if method is model:
        return other
    if isinstance(method, MCMCKernel):
        return _retarget_kernel(method, model, other, wrap)
    if isinstance(method, MCMC):
        copied = copy.copy(method)
        copied.sampler = swap(method.sampler)
        copied._cache, copied._init_state_cache = {}, {}
        return copied
    if isinstance(method, SteinVI):
        copied = _copy_with(method, model=other, _inference_model=other, guide=swap(method.guide))
        copied._init_guide = swap(method._init_guide)
        return copied
    if isinstance(method, SVI):
        return _copy_with(method, model=other, guide=swap(method.guide))
    if isinstance(method, AutoGuideList):
        copied = _copy_with(method, model=swap(method.model))
        copied._guides = [swap(part) for part in method._guides]
        return copied
    if isinstance(method, AutoGuide):
        return _copy_with(method, model=swap(method.model))
    if isinstance(method, Messenger):
        # handlers.block(model, hide=[...]), as the parts of an AutoGuideList contain it.
        return _copy_with(method, fn=swap(method.fn))
    return method


def _retarget_kernel(
    kernel: MCMCKernel, model: Callable, other: Callable, wrap: Wrap
) -> MCMCKernel:
    try:
        return kernel.wrap_model(lambda inner: other if inner is model else wrap(inner))
    except NotImplementedError:
        # A kernel without wrap_model: the model is set on a copy of it below.
        pass
    if getattr(kernel, "_model", None) is not model:
        raise OptionError(
            f"method={type(kernel).__name__}(...) cannot be given a model that leaves missing "
            "values (NaN) out; fill or drop them, or take another kernel"
        )
    return _copy_with(kernel, _model=other)


def _copy_with(instance: Any, **attributes: Any) -> Any:
    instance = copy.copy(instance)
    for name, value in attributes.items():
        setattr(instance, name, value)
    return instance
