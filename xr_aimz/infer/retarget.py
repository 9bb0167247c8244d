"""The same method on another model: one of NumPyro's own objects, made for a masked model.

A kernel, an ``MCMC``, an ``SVI`` or a guide holds the model that it was made for. Each is
copied with the other model in its place, and so is whatever it holds in turn; the
caller's object is left as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from numpyro.contrib.einstein import SteinVI
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoGuide, AutoGuideList
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from xr_aimz.errors import OptionError

__all__ = ["on_model"]


Wrap = Callable[[Callable], Callable]


def on_model(method: Any, model: Callable, other: Callable, wrap: Wrap) -> Any:
    """``method=`` with ``other`` wherever it holds ``model``; a name or a class as it is.

    ``other`` is ``wrap(model)``. A kernel that holds other kernels holds models that it made
    of the one it was given: those are wrapped.
    """
    put = functools.partial(on_model, model=model, other=other, wrap=wrap)
    if method is model:
        return other
    if isinstance(method, MCMCKernel):
        return _kernel(method, model, other, wrap)
    if isinstance(method, MCMC):
        made = copy.copy(method)
        made.sampler = put(method.sampler)
        made._cache, made._init_state_cache = {}, {}
        return made
    if isinstance(method, SteinVI):
        made = _with(method, model=other, _inference_model=other, guide=put(method.guide))
        made._init_guide = put(method._init_guide)
        return made
    if isinstance(method, SVI):
        return _with(method, model=other, guide=put(method.guide))
    if isinstance(method, AutoGuideList):
        made = _with(method, model=put(method.model))
        made._guides = [put(part) for part in method._guides]
        return made
    if isinstance(method, AutoGuide):
        return _with(method, model=put(method.model))
    if isinstance(method, Messenger):
        # handlers.block(model, hide=[...]), as the parts of an AutoGuideList have it.
        return _with(method, fn=put(method.fn))
    return method


def _kernel(kernel: MCMCKernel, model: Callable, other: Callable, wrap: Wrap) -> MCMCKernel:
    try:
        return kernel.wrap_model(lambda held: other if held is model else wrap(held))
    except NotImplementedError:
        # A kernel without a way of its own: a copy is handed the model below.
        pass
    if getattr(kernel, "_model", None) is not model:
        raise OptionError(
            f"method={type(kernel).__name__}(...) cannot be given a model that leaves missing "
            "values (NaN) out; fill or drop them, or take another kernel"
        )
    return _with(kernel, _model=other)


def _with(made: Any, **attributes: Any) -> Any:
    made = copy.copy(made)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made
