"""Specification of a kernel: model, binding, dims of its arrays, sites to return, scenarios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from xr_aimz.binding import Binding
from xr_aimz.kernel.scenarios import ScenarioSet
from xr_aimz.tracing import Site

Dims = tuple[str | None, ...]
Addresses = Mapping[str | None, jax.Array]
# NumPyro's own key is used only by calls without an address: numpyro.prng_key() in a network.
UNADDRESSED = "numpyro.prng_key"


# Fields of these two are in the order of the alphabet, that of the keys of a dict in JAX: it is
# the order of a program's arguments, and names in graphs go by it.
class DrawState(NamedTuple):
    """Input of a kernel that changes from draw to draw.

    Parameters
    ----------
    keys : mapping of site to array of uint32 ``(2,)``
    latents : mapping of site to array
        Values of the sites that are in the posterior.
    """

    keys: Mapping[str, Any]
    latents: Mapping[str, Any]


class BlockData(NamedTuple):
    """Input of a kernel that all draws of a block share.

    Parameters
    ----------
    arrays : mapping of key to array
        By source key, or by :class:`ArrayKey` where no argument is bound to it.
    params : mapping of site to pytree
    words : mapping of dim to array of uint32 ``(n, 2)``
        Hashes of the labels.
    """

    arrays: Mapping[str, Any]
    params: Mapping[str, Any]
    words: Mapping[str, Any]


Kernel = Callable[[DrawState, BlockData], dict[str, jax.Array]]


def leaf_paths(draw: DrawState, shared: BlockData) -> list[tuple[Any, ...]]:
    """Return the path of each leaf of a kernel's arguments: ``("arrays", key)`` for an array."""
    leaves = jax.tree_util.tree_leaves_with_path((draw, shared))
    return [(path[1].name, *(getattr(p, "key", str(p)) for p in path[2:])) for path, _ in leaves]


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
