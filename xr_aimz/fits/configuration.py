"""Record the options, method and model of a fit as JSON, and restore method and model."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import sys
import textwrap
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.contrib.einstein import SteinVI
from numpyro.infer import HMC, MCMC, NUTS, SVI, autoguide
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.hmc_util import euclidean_kinetic_energy
from numpyro.infer.mcmc import MCMCKernel

from xr_aimz.binding import Binding
from xr_aimz.errors import DamagedStoreError, ModelError, OptionError
from xr_aimz.inference import CHAINS, DRAWN, LEARNING_RATE, STEPPED, init_strategy
from xr_aimz.options import get_options

# Options with paths of files, which do not affect the draws.
_PATH_OPTIONS = ("checkpoint", "store")
# Arrays of up to so many entries are recorded with their values.
_LIMIT = 16


def fit_options(
    binding: Binding, method: Any, passed_options: Mapping[str, Any], seed: int | None
) -> dict[str, Any]:
    """Collect the options of a fit as JSON values, with defaults for those left out.

    Parameters
    ----------
    binding : Binding
    method : str or object
        As in :func:`xr_aimz.fit`.
    passed_options : mapping
        The options that were passed, by name.
    seed : int, optional

    Returns
    -------
    dict
        Values that JSON can represent.
    """
    options = {name: value for name, value in passed_options.items() if name not in _PATH_OPTIONS}
    record = {"method": jsonable(method)}
    record |= {n: jsonable(v) for n, v in {**_default_options(method, options), **options}.items()}
    if "batch" in options:
        # Decides the windows that the data are read in, and so the order of batches.
        record["block_bytes"] = get_options()["block_bytes"]
    record |= {} if seed is None else {"seed": int(seed)}
    record |= {"dim": list(binding.dims), "core_dim": list(binding.core_dims)}
    record |= {"per": list(binding.per), "layout": binding.layout}
    return record | {"float": jnp.result_type(float).name}


def _default_options(method: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default options of a method."""
    if isinstance(method, MCMC):
        return {
            "draws": method.num_samples // method.thinning,
            "chains": method.num_chains,
            "warmup": method.num_warmup,
        }
    if method == "nuts" or isinstance(method, MCMCKernel):
        return dict(CHAINS)
    if isinstance(method, (SVI, SteinVI)):
        defaults: dict[str, Any] = {**STEPPED, "optimizer": method.optim}
    elif method == "svi" or isinstance(method, AutoGuide) or inspect.isclass(method):
        defaults = {**STEPPED, "optimizer": LEARNING_RATE}
    else:
        return dict(DRAWN)
    if "epochs" in options:
        del defaults["steps"]
    return defaults


def jsonable(value: Any) -> Any:
    """Convert a value to one that JSON can represent; an object to its name and settings.

    Examples
    --------
    >>> from numpyro.infer import NUTS
    >>> jsonable({"time": 100}), jsonable(NUTS)
    ({'time': 100}, 'NUTS')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no nan and no inf.
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [jsonable(part) for part in value]
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _describe_array(value)
    if inspect.isclass(value) or inspect.isroutine(value):
        return str(value.__name__)
    if isinstance(value, functools.partial):
        return jsonable(value.func)
    if hasattr(value, "token"):
        return f"Fit {value.token}"
    return _describe_object(value)


def _describe_array(value: Any) -> Any:
    if isinstance(value.dtype, np.dtype) and value.dtype.kind in "iubf" and value.size <= _LIMIT:
        return jsonable(np.asarray(value).tolist())
    return f"array of {value.dtype} {tuple(value.shape)}"


def _describe_object(value: Any) -> str:
    """Format an object with the settings in its attributes: ``NUTS(target_accept_prob=0.95)``."""
    if isinstance(value, MCMC):
        return f"MCMC({_describe_object(value.sampler)})"
    if isinstance(value, (SVI, SteinVI)):
        return f"{type(value).__name__}({jsonable(value.guide)}, {jsonable(value.optim)})"
    settings = ", ".join(f"{n}={v!r}" for n, v in _read_settings(value).items())
    return f"{type(value).__name__}({settings})" if settings else type(value).__name__


def _read_settings(value: Any) -> dict[str, Any]:
    try:
        parameters = inspect.signature(type(value)).parameters
    except ValueError:
        # A class implemented in C may have no signature.
        return {}
    settings = {}
    for name, parameter in parameters.items():
        setting = getattr(value, f"_{name}", getattr(value, name, parameter.default))
        is_plain = isinstance(setting, (bool, int, float, str))
        if is_plain and setting != parameter.default:
            settings[name] = setting
    return settings


_PACKAGES = ("numpyro", "xr_aimz")


def model_reference(model: Any) -> dict[str, str | None]:
    """Describe a model by its name, import path, source and the sha256 of the source.

    Returns
    -------
    dict
        ``path`` is None for a model that cannot be imported, ``source`` and ``sha256`` for
        one without readable source, as in an interactive session.
    """
    source = _read_source(model)
    digest = None if source is None else hashlib.sha256(source.encode()).hexdigest()
    path = _find_path(model)
    return {"name": _find_name(model), "path": path, "sha256": digest, "source": source}


def _find_name(model: Any) -> str:
    inner = model.func if isinstance(model, functools.partial) else model
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))


def _read_source(model: Any) -> str | None:
    if isinstance(model, functools.partial):
        inner = _read_source(model.func)
        arguments = json.dumps(jsonable([model.args, model.keywords]), sort_keys=True)
        return None if inner is None else f"{inner}\n# partial of {arguments}"
    definition = model if inspect.isroutine(model) or inspect.isclass(model) else type(model)
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(definition)))
    except (OSError, TypeError):
        return None


def _find_path(model: Any) -> str | None:
    """Return the import path ``module:qualname``; None if it would not import this model."""
    module, qualname = getattr(model, "__module__", None), getattr(model, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module == "__main__":
        return None
    path = f"{module}:{qualname}"
    if not _is_path(path) or module not in sys.modules:
        return None
    return path if _resolve_name(sys.modules[module], qualname) is model else None


def _is_path(path: Any) -> bool:
    if not isinstance(path, str) or path.count(":") != 1:
        return False
    return all(part.isidentifier() for half in path.split(":") for part in half.split("."))


def _resolve_name(module: Any, qualname: str) -> Any:
    target = module
    for part in qualname.split("."):
        target = getattr(target, part, None)
    return target


def resolve_model(
    spec: Mapping[str, Any], given_model: Callable | None, trust_import: bool, what: str = "model"
) -> Callable:
    """Return the model of a saved fit: the given one, or the one at the stored import path.

    Parameters
    ----------
    spec : mapping
        From :func:`model_reference`.
    given_model : callable, optional
    trust_import : bool
        Allow importing by the path in the store. An import runs the module.
    what : str
        The argument that ``given_model`` is passed as, for messages.

    Raises
    ------
    ModelError
        The source differs, or no model is given and none may be imported.
    DamagedStoreError
        There is no model at the stored path.
    """
    if given_model is not None:
        _check_same(spec, given_model, what)
        return given_model
    path = spec.get("path")
    if path is None:
        raise ModelError(
            f"the {what} {spec.get('name')!r} of this fit has no import path (it is a lambda, an "
            f"instance, defined within a function, or in __main__); give it: load_fit(..., "
            f"{what}=...)"
        )
    if not trust_import:
        raise ModelError(
            f"the {what} of this fit is {path!r}. Give it, load_fit(..., {what}=...), or, if you "
            "trust the store and that module, have it imported: trust_import=True"
        )
    return _import_model(spec, str(path), what)


def _import_model(spec: Mapping[str, Any], path: str, what: str) -> Callable:
    module, _, qualname = path.partition(":")
    if not _is_path(path) or module.partition(".")[0] in {*sys.stdlib_module_names, "__main__"}:
        raise DamagedStoreError(f"{path!r} is no import path of a {what}; nothing was imported")
    try:
        namespace = import_module(module)
    except Exception as error:
        # A module may raise any exception when it is run.
        raise ModelError(f"importing {module!r} failed ({error}); give the {what}") from error
    model = _resolve_name(namespace, qualname)
    if not callable(model) or _find_path(model) != path or not _uses_numpyro(namespace):
        raise DamagedStoreError(
            f"{path!r} is no {what} of a module that uses NumPyro; give the {what}"
        )
    _check_same(spec, model, what)
    if spec.get("sha256") is None:
        raise ModelError(f"the store has no digest of {path!r} to compare; give the {what}")
    return model


def _uses_numpyro(namespace: Any) -> bool:
    modules = (getattr(v, "__name__", "") for v in vars(namespace).values() if inspect.ismodule(v))
    definitions = (getattr(v, "__module__", None) or "" for v in vars(namespace).values())
    return any(str(name).partition(".")[0] in _PACKAGES for name in [*modules, *definitions])


def _check_same(spec: Mapping[str, Any], model: Callable, what: str) -> None:
    reference, digest = model_reference(model), spec.get("sha256")
    if digest is None or reference["sha256"] == digest:
        return
    raise ModelError(
        f"the source of {what} {reference['name']!r} is not that of the fit: its sha256 is "
        f"{reference['sha256']!r}, and {spec.get('name')!r} of the fit had {digest!r}. Give the "
        f"{what} as it was; its source is kept in the store, for you to read. For a {what} that "
        "was changed on purpose, ds.aimz.from_posterior(model, draws) makes a fit of the draws"
    )


_KERNELS = {"HMC": HMC, "NUTS": NUTS}
# Made from a model alone; AutoLowRankMultivariateNormal also from a rank.
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
# Settings of the start of a chain: its saved state has their results.
_START = {"init_strategy", "inverse_mass_matrix", "kinetic_fn", "model", "potential_fn"}
# Settings that do not affect the draws of a trained guide.
_TRAINING = {"init_loc_fn", "init_scale", "model"}


def method_reference(by: Any) -> dict[str, Any]:
    """Describe a kernel or guide by class and settings; None for settings that do not suffice."""
    if isinstance(by, dict):
        # A reference already, as read from a store.
        return by
    if isinstance(by, MCMCKernel):
        return {"kernel": type(by).__name__, "settings": _kernel_settings(by), "was": jsonable(by)}
    if isinstance(by, AutoGuide):
        return {"guide": type(by).__name__, "settings": _guide_settings(by), "was": jsonable(by)}
    return {"function": model_reference(by)}


def _kernel_settings(kernel: MCMCKernel) -> dict[str, Any] | None:
    if _KERNELS.get(type(kernel).__name__) is not type(kernel):
        return None
    if kernel._potential_fn is not None or kernel._kinetic_fn is not euclidean_kinetic_energy:
        return None
    names = set(inspect.signature(type(kernel)).parameters) - _START
    return _plain_or_none({name: getattr(kernel, f"_{name}") for name in sorted(names)})


def _guide_settings(guide: AutoGuide) -> dict[str, Any] | None:
    """Return prefix and rank; None if another setting is not the default of the guide's class."""
    kind = type(guide)
    if _GUIDES.get(kind.__name__) is not kind or guide.create_plates is not None:
        return None
    settings = {"prefix": guide.prefix}
    if kind is autoguide.AutoLowRankMultivariateNormal:
        settings["rank"] = guide.rank
        return _plain_or_none(settings)
    defaults = vars(kind(guide.model))
    for name in set(inspect.signature(kind).parameters) - _TRAINING - {"prefix", "create_plates"}:
        for attr in (name, f"_{name}"):
            if attr in defaults and not _is_same(defaults[attr], getattr(guide, attr)):
                return None
    return settings


def _is_same(default: Any, value: Any) -> bool:
    if callable(default) and callable(value):
        # The default for a hessian is a function that each guide defines anew.
        return bool(getattr(default, "__code__", default) == getattr(value, "__code__", value))
    return type(default) is type(value) and bool(default == value)


def _plain_or_none(settings: dict[str, Any]) -> dict[str, Any] | None:
    def is_plain(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(map(is_plain, value))
        return value is None or type(value) in (bool, int, float, str)

    return settings if all(map(is_plain, settings.values())) else None


def kernel_from_reference(
    words: Mapping[str, Any], model: Callable, given_model: Any
) -> MCMCKernel:
    """Restore a kernel on a model from its reference, or return the given one.

    Raises
    ------
    OptionError
        The reference has no settings, or the given kernel is of another class.
    """
    given_model = given_model.sampler if isinstance(given_model, MCMC) else given_model
    if given_model is not None:
        _check_class(given_model, words["kernel"])
        return given_model
    if words["settings"] is None:
        raise OptionError(_explain_missing_method(words))
    return _KERNELS[words["kernel"]](model, **words["settings"])


def guide_from_reference(
    words: Mapping[str, Any], model: Callable, start: Any, given_model: Any, trust_import: bool
) -> Any:
    """Restore a guide on a model from its reference, or return the given one.

    ``start`` has values of latent sites at which the model's density is finite.
    """
    given_model = given_model.guide if isinstance(given_model, SVI) else given_model
    if "function" in words:
        return resolve_model(words["function"], given_model, trust_import, "method")
    if given_model is not None and not inspect.isclass(given_model):
        _check_class(given_model, words["guide"])
        return given_model
    if words["settings"] is None:
        raise OptionError(_explain_missing_method(words))
    return _GUIDES[words["guide"]](model, init_loc_fn=init_strategy(start), **words["settings"])


def _check_class(method: Any, name: str) -> None:
    if type(method).__name__ != name:
        raise OptionError(f"method={jsonable(method)!r}: the fit was made with {name}; give that")


def _explain_missing_method(reference: Mapping[str, Any]) -> str:
    return (
        f"the fit was made with {reference['was']!r}, which no store can restore; give the "
        "method that fit() was given: load_fit(..., method=...)"
    )
