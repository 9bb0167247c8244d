"""Names that do not exist, listed with the names that do and the nearest of these."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["find_closest", "list_names", "suggest"]

# difflib's own cutoff: of four letters one may differ, two may change places.
_NEAR = 0.6


def find_closest(name: str, names: Iterable[str], cutoff: float = _NEAR) -> str | None:
    """
    Find the name that a misspelled one is most likely to mean.

    Parameters
    ----------
    name : str
    names : iterable of str
        Those that exist.
    cutoff : float
        The least likeness, from 0 to 1; case does not count.

    Returns
    -------
    str or None
        None where nothing is near.
    """
    folded: dict[str, str] = {}
    for existing in names:
        folded.setdefault(existing.casefold(), existing)
    matches = get_close_matches(name.casefold(), folded, n=1, cutoff=cutoff)
    return folded[matches[0]] if matches else None


def list_names(names: Iterable[object], unknown: str | Iterable[object] = ()) -> str:
    """
    List the names that exist, for an error about some that do not.

    Parameters
    ----------
    names : iterable
        Those that exist, in the order in which to list them.
    unknown : str or iterable
        Those that do not. What is no string is near to nothing.

    Returns
    -------
    str
        ``['co2', 'tas'] (did you mean 'co2' by 'co_2'?)``
    """
    return f"{list(map(str, names))!r}{suggest(names, unknown)}"


def suggest(names: Iterable[object], unknown: str | Iterable[object]) -> str:
    """Say which name is meant: `` (did you mean 'co2' by 'co_2'?)``, or nothing."""
    existing = [str(n) for n in names]
    misspelled = [unknown] if isinstance(unknown, str) else unknown
    closest = {n: find_closest(n, existing) for n in misspelled if isinstance(n, str)}
    pairs = ", ".join(f"{right!r} by {name!r}" for name, right in closest.items() if right)
    return f" (did you mean {pairs}?)" if pairs else ""
