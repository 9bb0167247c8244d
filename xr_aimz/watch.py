"""Who looks on at fits: told when one begins, handed it when it is done, told when it fails.

A fit knows nothing of who looks on. A watcher is a context around the whole of a call of
:func:`xr_aimz.fit`; what it yields is called with the Fit and returns it, perhaps with more in
its lineage. It must not raise: a fit that somebody looked at is the fit that nobody did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from xr_aimz.posterior import Fit

__all__ = ["Watcher", "watch", "watched"]

Watcher = Callable[[], AbstractContextManager[Callable[[Fit], Fit]]]

_watchers: dict[str, Watcher] = {}


def watch(name: str, watcher: Watcher) -> None:
    """Have every fit from now on looked at; a watcher of the same name is replaced."""
    _watchers[name] = watcher


@contextmanager
def watched() -> Iterator[Callable[[Fit], Fit]]:
    """A context for one fit; what it yields shows the Fit to everyone who looks on."""
    with ExitStack() as stack:
        told = [stack.enter_context(watcher()) for watcher in tuple(_watchers.values())]

        def shown(fit: Fit) -> Fit:
            for tell in told:
                fit = tell(fit)
            return fit

        yield shown
