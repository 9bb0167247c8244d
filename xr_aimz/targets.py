"""What a name in ``do`` stands for: an argument's arrays, or a site.

A name may be an argument's, that of the variable it is bound to, or a site's. Where these
are different things, the name is refused: it must not be guessed what is intervened on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xr_aimz.binding import Binding
from xr_aimz.errors import InterventionError, MissingVariableError
from xr_aimz.labelling import result_name
from xr_aimz.model import Site
from xr_aimz.spelling import list_names

__all__ = ["Target", "targets_of"]


@dataclass(frozen=True)
class Target:
    """An array of an argument, by its source's key, or a site, by its name."""

    kind: str  # "array" or "site"
    name: str

    @property
    def node(self) -> str:
        """Its name among the arrows of the model."""
        return f"{self.kind} {self.name}"


def targets_of(name: str, binding: Binding, sites: Mapping[str, Site]) -> tuple[Target, ...]:
    """What is changed when a name is: several arrays where one variable is several arguments.

    Raises
    ------
    MissingVariableError
        There is nothing of that name.
    InterventionError
        There is, and it cannot be intervened on; or it is not clear which is meant.
    """
    readings = {r for r in (_argument(name, binding), _variable(name, binding)) if r}
    readings |= {r for r in (_site(name, binding, sites),) if r}
    if len(readings) > 1:
        meant = [", ".join(f"{t.kind} {t.name!r}" for t in r) for r in sorted(readings, key=str)]
        raise InterventionError(
            f"do={{{name!r}: ...}} may mean {' or '.join(meant)}: an argument, a variable and a "
            "site share the name; use another of its names, or rename one"
        )
    if not readings:
        raise _unknown(name, binding, sites)
    found = readings.pop()
    _check_arguments(name, found, binding)
    _check_sites(name, found, binding, sites)
    return found


def _check_arguments(name: str, targets: tuple[Target, ...], binding: Binding) -> None:
    keys = {t.name for t in targets if t.kind == "array"}
    for argument in (a for a in binding.arguments if a.name in binding.concrete):
        if keys & {s.key for s in argument.sources}:
            raise InterventionError(
                f"do={{{name!r}: ...}}: the model reads the values of argument {argument.name!r} "
                "in Python, where nothing that is set reaches it. Use jax.numpy on it, so that "
                "the model takes any values, and fit anew"
            )


def _argument(name: str, binding: Binding) -> tuple[Target, ...]:
    for argument in binding.inputs:
        if argument.name == name and argument.stacked:
            columns = [s.name for s in argument.sources]
            if name in columns:
                return ()
            raise InterventionError(
                f"do={{{name!r}: ...}}: the argument is a stack of {columns!r}; set those, each "
                "by its own name"
            )
        if argument.name == name:
            return (Target("array", argument.sources[0].key),)
    return ()


def _variable(name: str, binding: Binding) -> tuple[Target, ...]:
    return tuple(
        Target("array", source.key)
        for argument in binding.inputs
        for source in argument.sources
        if source.name == name
    )


def _site(name: str, binding: Binding, sites: Mapping[str, Site]) -> tuple[Target, ...]:
    """By the site's own name, its result's, or that of the outcome that it observes."""
    return tuple(
        Target("site", site.name)
        for site in sites.values()
        if name in (site.name, result_name(binding, site), site.obs_argument)
    )


def _unknown(name: str, binding: Binding, sites: Mapping[str, Site]) -> Exception:
    can = _possible(binding, sites)
    if name in binding.constants:
        return InterventionError(
            f"do={{{name!r}: ...}}: at the fit {name!r} was the constant "
            f"{binding.constants[name]!r}, not a variable, and the model may rely on it; make it "
            f"a variable of the Dataset and fit anew. There are {can!r}"
        )
    return MissingVariableError(
        f"do={{{name!r}: ...}}: the model has no argument, variable or site {name!r}; "
        f"there are {list_names(can, name)}"
    )


def _possible(binding: Binding, sites: Mapping[str, Site]) -> list[str]:
    found = {s.name for a in binding.inputs for s in a.sources}
    found |= {n for n, s in sites.items() if s.kind in ("latent", "observed") and not s.scanned}
    return sorted(found)


def _check_sites(
    name: str, targets: tuple[Target, ...], binding: Binding, sites: Mapping[str, Site]
) -> None:
    for site in (sites[t.name] for t in targets if t.kind == "site"):
        if site.kind in ("latent", "observed") and not site.scanned:
            continue
        why = f"{name!r} is a {site.kind}"
        if site.kind == "deterministic":
            why = f"site {name!r} is deterministic: a function of others, which can be set"
        elif site.scanned:
            why = f"site {name!r} is inside a scan, whose steps cannot be set one by one"
        raise InterventionError(
            f"do={{{name!r}: ...}}: {why}. What can be set: {_possible(binding, sites)!r}"
        )
