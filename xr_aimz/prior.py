"""Draws from the prior: a prediction whose posterior is empty.

Every latent is drawn as an outcome is, by its site's name, the draw and its labels. What is
of its own here is finding the outcomes of a model whose Dataset has none: a site is an
outcome if an array handed to an absent argument becomes what it observes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz.assembly import assemble
from xr_aimz.binding import arrange, block_of
from xr_aimz.bound import Bound, bind
from xr_aimz.casting import device_dtype
from xr_aimz.errors import ModelError
from xr_aimz.infer.problem import Draws
from xr_aimz.kinds import check_model
from xr_aimz.lineage import drawn_with
from xr_aimz.model import Site, observed_through, parameters
from xr_aimz.predict import Question, answered, asked, attrs_of
from xr_aimz.whole_numbers import parse_count, parse_seed

__all__ = ["prior_predictive"]

_PROBE = "absent outcome"


def prior_predictive(
    ds: xr.Dataset,
    model: Callable,
    variables: Mapping[str, Any] | None = None,
    *,
    draws: int = 500,
    seed: int = 0,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
    layout: str = "grid",
    sites: str | Sequence[str] | None = None,
    do: Mapping[str, Any] | None = None,
    assume_independent: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """Prior predictive draws for a Dataset, lazily: what the model says before it is fitted.

    Parameters
    ----------
    ds : Dataset
        Whose variables the model's arguments are; the outcome need not be in it. Chunked,
        each chunk is a block, as in :func:`predict`.
    model : callable
    variables, dim, core_dim, layout
        As in :func:`fit`. Without the outcome, ``dim`` is needed where several dimensions
        could be the observations'.
    draws : int, default 500
        They come as one chain.
    seed : int
        Draws are a function of the seed, the site, the draw, and the labels. More draws do
        not change the first ones.
    sites : str or sequence of str, optional
        Sites to return, latents among them, by their own name or by their outcome's. By
        default the outcomes and the deterministics: what ArviZ keeps in its group
        ``prior_predictive``; latents are its ``prior``. Both are of the same draws.
    do : mapping, optional
        What variables or sites are set to, as in :func:`intervene`; scenarios become
        dimensions after ``draw``.
    assume_independent : str or sequence of str, optional
        As in :func:`predict`.

    Returns
    -------
    Dataset
        Lazy, dask-backed, dims ``(chain, draw, *observation dims, *event dims)`` with one
        chain, the coordinates of ``ds`` and the attrs of the outcome's variable. Floats have
        JAX's dtype, float32 by default.

    Raises
    ------
    BindingError, MissingVariableError, DimensionError, DtypeError, LabelError, ChunkError
        Before any task runs.
    ModelError
        A ``param`` site, which has no prior.
    RandomnessError
        A prior that cannot be drawn from, such as ``ImproperUniform``.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr
    >>> import xr_aimz
    >>> def line(x, y=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 10))
    ...     numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
    >>> ds = xr.Dataset({"x": ("time", np.linspace(-1, 1, 50))})
    >>> prior = ds.aimz.prior_predictive(line, sites=["slope", "y"], draws=100)
    >>> prior.y.dims
    ('chain', 'draw', 'time')
    >>> prior.slope.shape
    (1, 100)
    """
    check_model(ds, model, "prior_predictive")
    draws, seed = parse_count("draws", draws), parse_seed(seed)
    bound = _bound(ds, model, variables, {"dim": dim, "core_dim": core_dim, "layout": layout})
    _check_priors(bound)
    _check_something(bound, sites)
    number = {"chain": np.arange(1), "draw": np.arange(draws)}
    empty = xr.Dataset(coords={d: (d, n) for d, n in number.items()})
    source = getattr(model, "__name__", "a model")
    known_nothing = assemble(bound, empty, Draws({}, (1, draws), source))
    question = Question(sites=sites, do=do, seed=seed, assume_independent=assume_independent)
    wanted = asked(ds, known_nothing, question)
    return drawn_with(answered(ds, wanted, attrs_of(wanted), "prior_predictive"), seed)


class _Anything:
    """Holds every name."""

    def __contains__(self, name: object) -> bool:
        return True


def _bound(
    ds: xr.Dataset, model: Callable, variables: Mapping[str, Any] | None, options: dict[str, Any]
) -> Bound:
    """The model bound to the Dataset, with its outcomes marked, there or not."""
    bound = bind(ds, model, variables, known=_Anything(), **options)  # type: ignore[arg-type] # only asked what it holds
    absent = _absent_outcomes(bound)
    if not absent:
        return bound
    return bind(ds, model, variables, known=set(bound.sites) - absent, **options)


def _absent_outcomes(bound: Bound) -> set[str]:
    """The sites that would be observed if an argument that is left out were not."""
    taken = {a.name for a in bound.binding.arguments} | set(bound.binding.constants)
    arguments = [
        p.name
        for p in parameters(bound.model)
        if not p.required and p.default is None and p.name not in taken
    ]
    latent = [s for s in bound.sites.values() if s.kind == "latent"]
    found: set[str] = set()
    for argument in arguments:
        # The outcome is most often the last of the sites.
        for site in reversed(latent):
            observed = _observed_by(bound, argument, site)
            if site.name in observed:
                found |= observed
                break
    return found


def _observed_by(bound: Bound, argument: str, site: Site) -> set[str]:
    """The sites that an array as large as a site's, handed to an argument, is observed by."""
    binding, inputs = bound.binding, bound.inputs
    block = block_of(binding, inputs.sizes)
    arrays = {
        key: jax.ShapeDtypeStruct(a.shape, device_dtype(a.dtype))
        for key, a in inputs.arrays.items()
    }
    arrays[_PROBE] = jax.ShapeDtypeStruct(site.shape, site.dtype)

    def arranged(given: dict[str, Any]) -> dict[str, Any]:
        return {**arrange(binding, given, inputs.dims, block), argument: given[_PROBE]}

    try:
        through = observed_through(bound.model, arranged, arrays, block)
    except Exception:
        # Not of a shape that the model takes there: some other site's, then.
        return set()
    return {name for name, sources in through.items() if _PROBE in sources}


def _check_priors(bound: Bound) -> None:
    params = [n for n, s in bound.sites.items() if s.trained]
    if params:
        raise ModelError(
            f"param sites {params!r} are trained and have no prior to draw from; fit the model "
            "and predict, give the values to from_posterior(params=...), or give them priors"
        )


def _check_something(bound: Bound, sites: Any) -> None:
    kinds = {s.kind for s in bound.sites.values()}
    if sites is None and not kinds & {"observed", "deterministic"}:
        latent = [n for n, s in bound.sites.items() if s.kind == "latent"]
        raise ModelError(
            "the model has neither an outcome, an argument whose default is None and that a site "
            f"observes, nor a deterministic; say which sites are wanted, sites=...: {latent!r}"
        )
