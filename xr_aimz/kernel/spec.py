"""Specification of a kernel: model, binding, dims of its arrays, sites to return, scenarios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from xr_aimz.binding import Binding
from xr_aimz.kernel.scenarios import ScenarioSet
from xr_aimz.tracing import Site

Dims = tuple[str | None, ...]
Addresses = Mapping[str | None, jax.Array]
Kernel = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, jax.Array]]
# A kernel is called with `draw`: {"keys": {site: uint32 (2,)}, "latents": {site: array}}
# and `shared`: {"arrays": {source: array}, "words": {dim: uint32 (n, 2)},
# "params": {site: pytree}}.
# NumPyro's own key is used only by calls without an address: numpyro.prng_key() in a network.
UNADDRESSED = "numpyro.prng_key"


class ArrayKey(str):
    """Key of an array that no argument is bound to; that of an argument is a plain source key.

    A string, which no source has for its key: an argument's name has no space. Names in graphs
    go by these strings, so that they stay as they are.

    Parameters
    ----------
    kind : {"condition", "known", "do"}
        The conditioned value of a site; the mask of the cells in which a site is fixed, to that
        value or to the draws of the posterior, all of them where there is no mask; or a value
        of ``do``.
    name : str
        The site, or the target of ``do``.
    number : int, optional
        The number of a value of ``do``.
    """

    kind: str
    name: str
    number: int | None

    def __new__(cls, kind: str, name: str, number: int | None = None) -> ArrayKey:
        words = (kind, name) if number is None else (kind, str(number), name)
        key = super().__new__(cls, " ".join(words))
        key.kind, key.name, key.number = kind, name, number
        return key

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.kind, self.name, self.number


def condition_key(site: str) -> ArrayKey:
    """Return the key of a site's conditioned value."""
    return ArrayKey("condition", site)


def known_key(site: str) -> ArrayKey:
    """Return the key of the mask of the cells in which a site is fixed."""
    return ArrayKey("known", site)


@dataclass(frozen=True)
class KernelSpec:
    """Specification of a kernel: everything that is the same for all blocks.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    binding : Binding
        Binding of its arguments to variables of the Dataset.
    sites : mapping of name to Site
        Its sites, as traced at the fit.
    dims : mapping of source name to tuple of str
        The dims of each array of a block.
    returns : tuple of str
        Names of the sites to return.
    scenarios : ScenarioSet, optional
        Scenarios under which the model is run, stacked along leading dims.
    """

    model: Callable
    binding: Binding
    sites: Mapping[str, Site]
    dims: Mapping[str, tuple[str, ...]]
    returns: tuple[str, ...]
    scenarios: ScenarioSet | None = None

    @property
    def leading(self) -> tuple[str, ...]:
        """Dims of the scenarios, which come before those of the sites."""
        return () if self.scenarios is None else tuple(self.scenarios.dims)

    def result_dims(self, name: str) -> tuple[str, ...]:
        """Return the dims of a site's result on a block, after chain and draw."""
        site_dims, n_per = self.sites[name].dataset_dims, len(self.binding.per)
        return (*site_dims[:n_per], *self.leading, *site_dims[n_per:])

    @property
    def random_sites(self) -> tuple[str, ...]:
        """Names of the sites that need a key for each draw."""
        return (
            *(n for n, s in self.sites.items() if s.kind in ("latent", "observed")),
            UNADDRESSED,
        )
