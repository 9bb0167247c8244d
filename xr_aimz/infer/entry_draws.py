"""Draws of a guide that has parameters for each label, a batch of labels at a time.

Draw by draw, the sites without a batched dimension are drawn once and then held; each
piece of the labels is drawn with a key of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import jax
import numpy as np
from numpyro import handlers

from xr_aimz.infer.batchable import local_sites
from xr_aimz.infer.entries import entries_of_site
from xr_aimz.infer.training import Training
from xr_aimz.model import tracing

__all__ = ["draw_entries"]


def draw_entries(
    ready: Training, leaves: list[Any], key: Any, draws: int
) -> dict[str, np.ndarray]:
    """Draws of every latent site, ``(1, draw, *site axes)``, over the whole Dataset."""
    problem, made = ready.problem, ready.data.batches
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    sites = problem.sites
    local = local_sites(problem, made.sizes)
    entries = {n: entries_of_site(sites[n], binding, made.sizes) for n in local}
    out: dict[str, np.ndarray] = {}
    held: dict[str, Any] = {}
    with tracing(ready.block):
        draw = jax.jit(jax.vmap(_one(ready), in_axes=(0, None, 0)))
        for number, starts in enumerate(_pieces(made.sizes, made.lengths)):
            keys = jax.random.split(jax.random.fold_in(key, number), draws)
            found = draw(keys, ready.part(leaves, starts), held)
            held = held or {n: v for n, v in found.items() if n not in local}
            for n, e in entries.items():
                rows = np.asarray(e.rows(found[n], ready.block.sizes))
                lengths = [made.lengths[d] for d in e.batched]
                if n not in out:
                    out[n] = np.empty((*lengths, *rows.shape[len(lengths) :]), rows.dtype)
                out[n][tuple(slice(starts[d], starts[d] + made.sizes[d]) for d in e.batched)] = (
                    rows
                )
    whole = {n: np.asarray(entries[n].folded(rows)) for n, rows in out.items()}
    return {n: np.asarray(v)[None] for n, v in {**held, **whole}.items()}


def _one(ready: Training) -> Any:
    """One draw from the guide for one piece, given values of some of its sites."""
    latent = ready.problem.named("latent")
    arguments = ready.arguments(ready.data.first)

    def one(key: Any, state: Any, held: Mapping[str, Any]) -> dict[str, Any]:
        known = {**ready.svi.get_params(state), **held}
        guide = handlers.substitute(handlers.seed(ready.guide, key), data=known)
        trace = handlers.trace(guide).get_trace(**arguments)
        return {name: trace[name]["value"] for name in latent}

    return one


def _pieces(sizes: Mapping[str, int], lengths: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Where pieces of a batch's size begin, which cover all labels; the last may overlap."""
    starts = (
        [min(k, lengths[d] - size) for k in range(0, lengths[d], size)]
        for d, size in sizes.items()
    )
    for place in product(*starts):
        yield dict(zip(sizes, place, strict=True))
