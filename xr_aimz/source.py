"""Where a model comes from: an import path, a digest of its source, and the way back.

A model is code, and code is not kept in a store: what is kept says which code it was. The
way back is to be handed the same function, or, for who trusts the store, to import it. Only
a function that was imported by that very path has one: not a lambda, not a function inside
another, nothing of ``__main__``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from xr_aimz.errors import DamagedStoreError, ModelError
from xr_aimz.record import readable

__all__ = ["found_again", "told"]

_OURS = ("numpyro", "xr_aimz")


def told(model: Any) -> dict[str, str | None]:
    """What there is to tell of a model: its name, import path, source and its digest.

    Returns
    -------
    dict
        ``path`` is None for what cannot be imported, ``source`` and ``sha256`` for what has
        no source to read, as in an interactive session.
    """
    source = _source(model)
    digest = None if source is None else hashlib.sha256(source.encode()).hexdigest()
    path = _path(model)
    return {"name": _name(model), "path": path, "sha256": digest, "source": source}


def _name(model: Any) -> str:
    inner = model.func if isinstance(model, functools.partial) else model
    return str(getattr(inner, "__qualname__", type(inner).__qualname__))


def _source(model: Any) -> str | None:
    if isinstance(model, functools.partial):
        inner = _source(model.func)
        given = json.dumps(readable([model.args, model.keywords]), sort_keys=True)
        return None if inner is None else f"{inner}\n# partial of {given}"
    shown = model if inspect.isroutine(model) or inspect.isclass(model) else type(model)
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(shown)))
    except (OSError, TypeError):
        return None


def _path(model: Any) -> str | None:
    """The path by which the model, and no other, can be imported."""
    module, qualname = getattr(model, "__module__", None), getattr(model, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module == "__main__":
        return None
    path = f"{module}:{qualname}"
    if not _is_path(path) or module not in sys.modules:
        return None
    return path if _reached(sys.modules[module], qualname) is model else None


def _is_path(path: Any) -> bool:
    if not isinstance(path, str) or path.count(":") != 1:
        return False
    return all(part.isidentifier() for half in path.split(":") for part in half.split("."))


def _reached(module: Any, qualname: str) -> Any:
    found = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def found_again(
    spec: Mapping[str, Any], given: Callable | None, trust_import: bool, what: str = "model"
) -> Callable:
    """The model that a store tells of: the one that is given, or the one to import.

    Parameters
    ----------
    spec : mapping
        From :func:`told`.
    given : callable, optional
    trust_import : bool
        Whether importing by the path in the store is allowed. To import runs the module.
    what : str
        The name of the argument that ``given`` is.

    Raises
    ------
    ModelError
        The source differs, or there is nothing to take.
    DamagedStoreError
        The path leads to no model.
    """
    if given is not None:
        _check_same(spec, given, what)
        return given
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
    return _imported(spec, str(path), what)


def _imported(spec: Mapping[str, Any], path: str, what: str) -> Callable:
    module, _, qualname = path.partition(":")
    if not _is_path(path) or module.partition(".")[0] in {*sys.stdlib_module_names, "__main__"}:
        raise DamagedStoreError(f"{path!r} is no import path of a {what}; nothing was imported")
    try:
        home = import_module(module)
    except Exception as error:
        # A module may raise anything as it is run.
        raise ModelError(f"importing {module!r} failed ({error}); give the {what}") from error
    found = _reached(home, qualname)
    if not callable(found) or _path(found) != path or not _names_numpyro(home):
        raise DamagedStoreError(
            f"{path!r} is no {what} of a module that uses NumPyro; give the {what}"
        )
    _check_same(spec, found, what)
    if spec.get("sha256") is None:
        raise ModelError(f"the store has no digest of {path!r} to compare; give the {what}")
    return found


def _names_numpyro(home: Any) -> bool:
    homes = (getattr(v, "__name__", "") for v in vars(home).values() if inspect.ismodule(v))
    others = (getattr(v, "__module__", None) or "" for v in vars(home).values())
    return any(str(name).partition(".")[0] in _OURS for name in [*homes, *others])


def _check_same(spec: Mapping[str, Any], model: Callable, what: str) -> None:
    here, there = told(model), spec.get("sha256")
    if there is None or here["sha256"] == there:
        return
    raise ModelError(
        f"the source of {what} {here['name']!r} is not that of the fit: its sha256 is "
        f"{here['sha256']!r}, and {spec.get('name')!r} of the fit had {there!r}. Give the "
        f"{what} as it was; its source is kept in the store, for you to read. For a {what} that "
        "was changed on purpose, ds.aimz.from_posterior(model, draws) makes a fit of the draws"
    )
