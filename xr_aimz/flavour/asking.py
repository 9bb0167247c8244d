"""The parameters of a request: what is asked of a prediction, in words that JSON has.

They have the names of :func:`xr_aimz.predict`'s where they are the same. ``quantiles`` are
kept apart from the other statistics, since a list in a request holds one kind of value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from xr_aimz.errors import InterventionError, OptionError
from xr_aimz.predict import Question
from xr_aimz.spelling import list_names

__all__ = ["DEFAULTS", "Asked", "asked_for", "defaults_with"]

DEFAULTS: Mapping[str, Any] = {
    "summary": ["mean", "std"],
    "quantiles": [0.05, 0.5, 0.95],
    "returns": "summary",
    "draws": None,
    "seed": 0,
    "do": None,
    "sites": [],
    "new_labels": "raise",
}
_RETURNS = ("summary", "draws")


@dataclass(frozen=True)
class Asked:
    """A question, whether draws are to come back, and a name for what must be traced for it."""

    question: Question
    draws: bool
    key: tuple[Any, ...]


def defaults_with(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters with their defaults, some of which may be given.

    Raises
    ------
    OptionError
        A parameter that there is not.
    """
    strangers = sorted(set(given or {}) - set(DEFAULTS))
    if strangers:
        raise OptionError(
            f"no parameter {strangers!r}; there are {list_names(sorted(DEFAULTS), strangers)}"
        )
    return {**DEFAULTS, **(given or {})}


def asked_for(params: Mapping[str, Any] | None) -> Asked:
    """What the parameters of a request ask.

    Raises
    ------
    OptionError, InterventionError
        A parameter that there is not, or a value that it cannot take.
    """
    given = defaults_with(params)
    returns = given["returns"]
    if returns not in _RETURNS:
        raise OptionError(f"returns={returns!r}: there are {list_names(_RETURNS, [returns])}")
    lists = {name: _list(name, given[name]) for name in ("summary", "quantiles", "sites")}
    wanted = [*lists["summary"], *(_number("quantiles", q) for q in lists["quantiles"])]
    if returns == "summary" and not wanted:
        raise OptionError(
            "summary=[] and quantiles=[] ask for nothing; give statistics, or returns='draws'"
        )
    question = Question(
        sites=lists["sites"] or None,
        do=_do(given["do"]),
        draws=None if given["draws"] is None else _whole("draws", given["draws"]),
        seed=_seed(given["seed"]),
        new_labels=given["new_labels"],
        summary=wanted if returns == "summary" else None,
    )
    key = (tuple(lists["sites"]), json.dumps(question.do), question.new_labels)
    return Asked(question, returns == "draws", key)


def _list(name: str, given: Any) -> list[Any]:
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise OptionError(f"{name}={given!r}: give a list, {DEFAULTS[name]!r}")
    return list(given)


def _number(name: str, given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError):
        raise OptionError(f"{name}: {given!r} is no number") from None


def _whole(name: str, given: Any) -> int:
    try:
        number = int(given)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != given:
        raise OptionError(f"{name}={given!r} is no whole number")
    return number


def _seed(given: Any) -> int:
    seed = _whole("seed", given)
    if not -(2**63) <= seed < 2**64:
        raise OptionError(f"seed={seed!r}: a seed has at most 64 bits")
    return seed


def _do(given: Any) -> dict[str, Any] | None:
    """Targets and numbers, or scenarios of them, from JSON or as they are."""
    if given is None or given == "":
        return None
    try:
        read = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise InterventionError(
            f"do={given!r} is no JSON: {error}. Give it as text, '{{\"co2\": 280.0}}'"
        ) from None
    if not isinstance(read, Mapping) or not all(_is_setting(v) for v in read.values()):
        raise InterventionError(
            f"do={given!r}: a request sets names to numbers, {{'co2': 280.0}}, or names scenarios "
            "of these, {'low': {'co2': 280.0}, 'high': {'co2': 560.0}}"
        )
    if read and all(isinstance(v, Mapping) and not v for v in read.values()):
        raise InterventionError(
            f"do={given!r}: scenarios that set nothing; give names and numbers"
        )
    return dict(read)


def _is_setting(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_number(v) for v in value.values())
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)
