"""How a fit was made, as data: its options, as given and as defaulted, and versions.

What is recorded is text, numbers and lists of them, so that any store and any reader can
keep it. An object is recorded by its name and the settings that it shows, never by where
it lies in memory: two equal calls leave equal records.
"""

from __future__ import annotations

import functools
import inspect
import math
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.contrib.einstein import SteinVI
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.binding import Binding
from xr_aimz.defaults import CHAINS, DRAWN, LEARNING_RATE, STEPPED
from xr_aimz.options import get_options

__all__ = ["options_of", "readable", "versions"]

# What says where something was put, and not how the draws came about.
_PLACES = ("checkpoint", "store")
_ALWAYS = ("dask", "jax", "jaxlib", "numpy", "numpyro", "xarray", "xr_aimz", "zarr")
# These have a part in a fit only where somebody has imported them.
_SOMETIMES = ("flax", "optax")
_SHORT = 16


def options_of(
    binding: Binding, method: Any, asked: Mapping[str, Any], seed: int | None
) -> dict[str, Any]:
    """The options of a fit, those that were left out with their defaults.

    Parameters
    ----------
    binding : Binding
    method : str or object
        As in :func:`xr_aimz.fit`.
    asked : mapping
        The options that were given.
    seed : int, optional

    Returns
    -------
    dict
        What JSON can hold.
    """
    given = {name: value for name, value in asked.items() if name not in _PLACES}
    found = {"method": readable(method)}
    found |= {n: readable(v) for n, v in {**_defaults(method, given), **given}.items()}
    if "batch" in given:
        # How the data are cut into windows, and with that the order of batches.
        found["block_bytes"] = get_options()["block_bytes"]
    found |= {} if seed is None else {"seed": int(seed)}
    found |= {"dim": list(binding.dims), "core_dim": list(binding.core_dims)}
    found |= {"per": list(binding.per), "layout": binding.layout}
    return found | {"float": jnp.result_type(float).name}


def _defaults(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a method takes where nothing is said."""
    if isinstance(method, MCMC):
        return {
            "draws": method.num_samples // method.thinning,
            "chains": method.num_chains,
            "warmup": method.num_warmup,
        }
    if method == "nuts" or isinstance(method, MCMCKernel):
        return dict(CHAINS)
    if isinstance(method, (SVI, SteinVI)):
        found: dict[str, Any] = {**STEPPED, "optimizer": method.optim}
    elif method == "svi" or isinstance(method, AutoGuide) or inspect.isclass(method):
        found = {**STEPPED, "optimizer": LEARNING_RATE}
    else:
        return dict(DRAWN)
    if "epochs" in given:
        del found["steps"]
    return found


def versions() -> dict[str, str]:
    """The versions of the packages that make a fit, and Python's."""
    names = [*_ALWAYS, *(n for n in _SOMETIMES if n in sys.modules)]
    return {"python": platform.python_version(), **{n: _version(n) for n in sorted(names)}}


@functools.cache
def _version(package: str) -> str:
    return version(package)


def readable(value: Any) -> Any:
    """A value as JSON can hold it; of an object its name and settings.

    Examples
    --------
    >>> from numpyro.infer import NUTS
    >>> readable({"time": 100}), readable(NUTS)
    ({'time': 100}, 'NUTS')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        # Of which JSON has none.
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): readable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [readable(part) for part in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _array(value)
    if inspect.isclass(value) or inspect.isroutine(value):
        return str(value.__name__)
    if isinstance(value, functools.partial):
        return readable(value.func)
    if hasattr(value, "token"):
        return f"Fit {value.token}"
    return _object(value)


def _array(value: Any) -> Any:
    if isinstance(value.dtype, np.dtype) and value.dtype.kind in "iubf" and value.size <= _SHORT:
        return readable(np.asarray(value).tolist())
    return f"array of {value.dtype} {tuple(value.shape)}"


def _object(value: Any) -> str:
    """``NUTS(target_accept_prob=0.95)``: the settings that the object shows under their names."""
    if isinstance(value, MCMC):
        return f"MCMC({_object(value.sampler)})"
    if isinstance(value, (SVI, SteinVI)):
        return f"{type(value).__name__}({readable(value.guide)}, {readable(value.optim)})"
    shown = ", ".join(f"{n}={v!r}" for n, v in _settings(value).items())
    return f"{type(value).__name__}({shown})" if shown else type(value).__name__


def _settings(value: Any) -> dict[str, Any]:
    try:
        taken = inspect.signature(type(value)).parameters
    except ValueError:
        # A class of C code may have no signature to read.
        return {}
    found = {}
    for name, parameter in taken.items():
        kept = getattr(value, f"_{name}", getattr(value, name, parameter.default))
        plain = isinstance(kept, (bool, int, float, str))
        if plain and kept != parameter.default:
            found[name] = kept
    return found
