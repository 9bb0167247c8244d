"""Whether a guide covers the latent sites of its model, and nothing else.

NumPyro would draw a latent site without a guide from its prior in every step, and leave a
site that only the guide has out of account; either would give a posterior of another
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from numpyro import handlers

from xr_aimz.errors import ModelError
from xr_aimz.infer.problem import Problem

__all__ = ["check_guide"]


def check_guide(problem: Problem, guide: Callable, params: Mapping[str, Any]) -> None:
    """Compare the sites of a guide with the model's latents, before the first step.

    Raises
    ------
    ModelError
        A latent site that the guide lacks, or a site of the guide's that the model lacks.
    """
    found: set[str] = set()

    def visit(params: Any) -> None:
        seeded = handlers.seed(handlers.substitute(guide, data=params), jax.random.key(0))
        sites = handlers.trace(seeded).get_trace(**problem.arguments)
        found.update(n for n, m in sites.items() if m["type"] == "sample" and not _inner(m))

    jax.eval_shape(visit, dict(params))
    latent = problem.named("latent")
    name = getattr(guide, "__name__", type(guide).__name__)
    absent = [n for n in latent if n not in found]
    if absent:
        raise ModelError(
            f"the guide {name} does not cover the latent sites {absent!r} of the model; it has "
            f"{sorted(found)!r}. Sample them in the guide, or take method='svi', whose guide "
            "covers all"
        )
    strangers = sorted(found - set(latent))
    if strangers:
        raise ModelError(
            f"the guide {name} samples {strangers!r}, which are no latent sites of the model; it "
            f"has {latent!r}. Rename them, or mark what only helps the guide "
            'infer={"is_auxiliary": True}'
        )


def _inner(message: Mapping[str, Any]) -> bool:
    return bool(message["is_observed"]) or bool(message["infer"].get("is_auxiliary", False))
