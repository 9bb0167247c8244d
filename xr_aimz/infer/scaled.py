"""A batch stands for all of the data: log densities scaled up, site by site.

A site with an entry for each label of a batched dimension counts ``length / batch`` times,
outcomes and latents alike, in the model and in the guide; a site without one counts once.
The loss of a batch is then an unbiased estimate of the loss of all data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from numpyro.handlers import scale
from numpyro.primitives import Messenger

from xr_aimz.axes import TABLE
from xr_aimz.batches import Batches
from xr_aimz.binding import Binding
from xr_aimz.model import Site

__all__ = ["batched_dims", "scaled", "scales"]


def batched_dims(site: Site, binding: Binding, batched: Mapping[str, Any]) -> tuple[str, ...]:
    """The batched dimensions of which a site has an entry for each label."""
    whole = binding.dims if TABLE in site.dims else ()
    return tuple(d for d in batched if d in (*site.dims, *whole))


def scales(sites: Mapping[str, Site], binding: Binding, made: Batches) -> dict[str, float]:
    """How often each site of a batch counts, of those with an entry a label."""
    found = {}
    for name, site in sites.items():
        dims = batched_dims(site, binding, made.sizes)
        if site.kind in ("latent", "observed") and dims:
            found[name] = prod(made.lengths[d] / made.sizes[d] for d in dims)
    return found


def scaled(fn: Callable, by: Mapping[str, float]) -> Callable:
    """A model or a guide whose sites count that often."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        with _Scaled(by):
            return fn(*args, **kwargs)

    return counted


class _Scaled(Messenger):  # type: ignore[misc] # NumPyro is untyped
    def __init__(self, by: Mapping[str, float]) -> None:
        self._by = by
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self._by:
            scale(scale=self._by[msg["name"]]).process_message(msg)
