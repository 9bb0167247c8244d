"""Whether a model and a guide can be fitted in batches at all: seen before any data are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from numpyro.infer import autoguide

from xr_aimz.axes import shape_in_model
from xr_aimz.binding import arrange, block_of
from xr_aimz.casting import device_dtype
from xr_aimz.errors import AimzError, ModelError, OptionError
from xr_aimz.infer.problem import Problem
from xr_aimz.infer.scaled import batched_dims
from xr_aimz.model import location_of, trace_sites

__all__ = ["check_guide", "check_model", "check_start", "local_sites"]

# They look at the density of all the data, of which a step sees a batch.
_WHOLE = (
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoDAIS,
    autoguide.AutoSemiDAIS,
    autoguide.AutoSurrogateLikelihoodDAIS,
)
_LOCAL = (autoguide.AutoNormal, autoguide.AutoDelta)


def local_sites(problem: Problem, batched: Mapping[str, Any]) -> list[str]:
    """The latent sites with an entry for each label of a batched dimension."""
    binding = problem.binding
    assert binding is not None
    latent = problem.named("latent")
    return [n for n in latent if batched_dims(problem.sites[n], binding, batched)]


def check_guide(problem: Problem, guide: Any, batched: Mapping[str, Any]) -> None:
    """A guide that a batch can train.

    Raises
    ------
    OptionError
        It needs all of the data at once; or there are local latents, and its parameters
        are not one entry a label.
    """
    name = type(guide).__name__
    if isinstance(guide, _WHOLE):
        raise OptionError(f"{name} needs all of the data at once: leave batch= out")
    local = local_sites(problem, batched)
    if local and type(guide) not in _LOCAL:
        raise OptionError(
            f"latent sites {local!r} have entries along the batched dims {list(batched)!r}, which "
            f"{name} does not train label by label; use method='svi' (AutoNormal) or AutoDelta, "
            "or batch along another dimension"
        )


def check_start(problem: Problem, started: tuple[str, ...], batched: Mapping[str, Any]) -> None:
    """Values to start from, for sites that all batches share.

    Raises
    ------
    OptionError
        A site has entries along the batched dimensions: those start by themselves.
    """
    local = sorted({*local_sites(problem, batched)} & {*started})
    if local:
        raise OptionError(
            f"init= has values of {local!r}, which have entries along the batched dims "
            f"{list(batched)!r}: those start by themselves. Leave them out"
        )


def check_model(problem: Problem, sizes: Mapping[str, int]) -> None:
    """A model that a batch fits: its sites are as long as the batch.

    Raises
    ------
    ModelError
        A site is not, or the model does not run on a batch.
    """
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    here = {**inputs.sizes, **sizes}
    structs = {
        k: jax.ShapeDtypeStruct(tuple(here[str(d)] for d in a.dims), device_dtype(a.dtype))
        for k, a in inputs.arrays.items()
    }
    block = block_of(binding, here)
    arranged = partial(arrange, binding, dims=inputs.dims, block=block)
    try:
        found = trace_sites(problem.model, arranged, structs, block)
    except AimzError:
        raise
    except Exception as error:
        # Whatever a model raises on sizes that are not those of the data.
        whole = {d: inputs.sizes[d] for d in sizes}
        raise ModelError(
            f"the model does not run on a batch of {dict(sizes)!r}, where the data have "
            f"{whole!r}: it raised {type(error).__name__}: {error} ({location_of(error)}). Take "
            "sizes from the arguments, x.shape[0], or from xr_aimz.plate, or leave batch= out"
        ) from error
    for site in found:
        fitted = problem.sites.get(site.name)
        if site.kind == "param" or fitted is None:
            continue
        expected = shape_in_model(fitted, binding, here)
        if site.shape != expected:
            raise ModelError(
                f"site {site.name!r} has shape {site.shape!r} for a batch of {dict(sizes)!r}, and "
                f"{expected!r} was expected; take sizes from the arguments or from xr_aimz.plate, "
                "not from the model"
            )
