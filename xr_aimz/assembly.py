"""Draws become a Fit: their labels, their deterministics, and what they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz import diagnostics
from xr_aimz.axes import dims_in_dataset
from xr_aimz.binding import Binding, block_of
from xr_aimz.bound import Bound
from xr_aimz.cell_diagnostics import cell_concerns
from xr_aimz.device import run, traced
from xr_aimz.further import Kept
from xr_aimz.infer.cells import FLAGS
from xr_aimz.infer.problem import Draws
from xr_aimz.infer.worded import words_of
from xr_aimz.kernel import Program, predictive
from xr_aimz.labelling import label
from xr_aimz.labels import label_words
from xr_aimz.model import Site
from xr_aimz.posterior import Fit

__all__ = ["Further", "assemble", "concerns_of", "labelled", "labelled_draws", "wanted"]

_STATUS = {
    "long_name": "how the fit of a cell went",
    "flag_values": np.arange(len(FLAGS), dtype=np.int8),
    "flag_meanings": " ".join(FLAGS),
}


def labelled(bound: Bound, drawn: Draws, arrays: Mapping[str, jax.Array], first: int = 0) -> Fit:
    """The draws with their labels, and the deterministics that belong with them."""
    values, also = dict(drawn.samples), wanted(bound)
    if also and arrays:
        values |= _deterministics(bound, drawn, arrays, also)
    fitted = assemble(bound, labelled_draws(bound, values, drawn.shape, first), drawn)
    if drawn.more is None:
        return fitted
    return replace(fitted, more=Further(bound, drawn, arrays, first + drawn.shape[1]))


@dataclass(frozen=True, eq=False)
class Further:
    """Further draws, numbered from ``first`` on: what a Fit calls as ``more``."""

    bound: Bound
    drawn: Draws
    arrays: Mapping[str, jax.Array]
    first: int

    def __call__(self, draws: int, seed: int) -> Fit:
        drawn = self.drawn
        assert drawn.more is not None
        # With the number: the same seed twice in a row must not give the same draws twice.
        own = int(np.random.SeedSequence([seed % 2**64, self.first]).generate_state(1)[0])
        found = drawn.more(draws, own)
        if not isinstance(found, Draws):
            found = replace(drawn, samples=found, shape=(drawn.shape[0], draws), stats={})
        fitted = labelled(self.bound, found, self.arrays, self.first)
        return replace(fitted, concerns=concerns_of(fitted))

    def kept(self) -> Kept | None:
        """What a store keeps of it; None of a method that it has no place for."""
        origin = self.drawn.origin
        if origin is None:
            return None
        return Kept(replace(origin, by=words_of(origin.by)), self.bound.inputs, self.first)


def wanted(bound: Bound) -> tuple[str, ...]:
    """The deterministics that belong in a posterior."""
    sites = bound.sites.items()
    return tuple(n for n, s in sites if s.kind == "deterministic" and not _spans(s, bound.binding))


def labelled_draws(
    bound: Bound, values: Mapping[str, Any], shape: tuple[int, int], first: int = 0
) -> xr.Dataset:
    """Draws of sites with their dims and labels; the draws are numbered from ``first`` on."""
    chain, draw = np.arange(shape[0]), first + np.arange(shape[1])
    return label(values, bound.sites, bound.binding, bound.inputs, chain, draw)


def _spans(site: Site, binding: Binding) -> bool:
    return bool(binding.dims) and set(binding.dims) <= set(dims_in_dataset(site, binding))


def _deterministics(
    bound: Bound, drawn: Draws, arrays: Mapping[str, jax.Array], wanted: tuple[str, ...]
) -> dict[str, np.ndarray]:
    binding, inputs = bound.binding.without_data(), bound.inputs
    program = Program(bound.model, binding, bound.sites, inputs.dims, wanted)
    chains, draws = drawn.shape
    latents = {n: v.reshape(chains * draws, *v.shape[2:]) for n, v in drawn.samples.items()}
    # Every site is known, so no key is used.
    blank = np.zeros((chains * draws, 2), np.uint32)
    each = {"keys": dict.fromkeys(program.keyed, blank), "latents": latents}
    shared = {
        # With the outcomes: a deterministic may be of what was observed.
        "arrays": {key: np.asarray(a) for key, a in arrays.items()},
        "words": {
            d: label_words(d, inputs.labels.get(d), size=inputs.sizes[d]) for d in binding.dims
        },
        "params": dict(drawn.params),
    }
    block = block_of(binding, inputs.sizes)
    call = predictive(program, inputs.sizes)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), each)
    _, name = traced(call, block, one, shared)
    found = run(name, lambda: call, block, each, shared)
    return {n: _in_model_shape(bound, n, v, (chains, draws)) for n, v in found.items()}


def _in_model_shape(
    bound: Bound, name: str, value: np.ndarray, lead: tuple[int, int]
) -> np.ndarray:
    return value.reshape(*lead, *bound.sites[name].shape)


def assemble(bound: Bound, posterior: xr.Dataset, drawn: Draws) -> Fit:
    """A Fit from a labelled posterior and what else the inference gave back."""
    binding, inputs = bound.binding, bound.inputs
    arrays = inputs.arrays
    observed = {s.name: arrays[s.key] for a in binding.outcomes for s in a.sources}
    constant = {s.name: arrays[s.key] for a in binding.inputs for s in a.sources}
    chains = {d: posterior[d] for d in ("chain", "draw") if d in posterior.coords}
    stats: dict[str, Any] = {
        name: (("chain", "draw", *binding.per), v) for name, v in drawn.stats.items()
    }
    if drawn.max_tree_depth is not None:
        stats["n_steps"] = (*stats["n_steps"], {"max_tree_depth": drawn.max_tree_depth})
    cells = {d: posterior[d] for d in binding.per if d in posterior.coords}
    chains |= cells
    if drawn.status is not None:
        stats["status"] = (binding.per, drawn.status, _STATUS)
    losses = None
    if drawn.losses is not None:
        losses = _losses(drawn, binding.per, cells)
    return Fit(
        model=bound.model,
        binding=binding,
        sites=bound.sites,
        posterior=posterior.assign_attrs(inference_library="numpyro", method=drawn.method),
        sample_stats=xr.Dataset(stats, coords=chains if stats else None),
        losses=losses,
        params=drawn.params,
        method=drawn.method,
        attrs={a.name: dict(arrays[a.sources[0].key].attrs) for a in binding.outcomes},
        observed_data=_group(observed),
        constant_data=_group(constant),
        concerns=drawn.concerns or None,
        state=drawn.state,
    )


def _losses(drawn: Draws, per: tuple[str, ...], cells: Mapping[str, Any]) -> xr.DataArray:
    attrs = {"full_rate_steps": drawn.full_rate_steps, "epoch_steps": drawn.epoch_steps}
    losses = xr.DataArray(drawn.losses, cells, ("step", *per), name="loss", attrs=attrs)
    if drawn.loss_steps:
        return losses.assign_coords(step=list(drawn.loss_steps))
    if drawn.loss_every == 1:
        return losses
    # The last step behind each mean.
    return losses.assign_coords(step=np.arange(1, losses.size + 1) * drawn.loss_every - 1)


def _group(arrays: Mapping[str, xr.DataArray]) -> xr.Dataset:
    # A variable that bears a dimension's name is that dimension's coordinate.
    coords = {n: a for n, a in arrays.items() if n in a.dims}
    return xr.Dataset({n: a for n, a in arrays.items() if n not in coords}, coords)


def concerns_of(fitted: Fit) -> tuple[str, ...]:
    """What speaks against a fit, in sentences with figures."""
    about = (fitted.posterior, fitted.sample_stats, fitted.losses)
    per = fitted.binding.per
    found = cell_concerns(*about, per) if per else diagnostics.concerns(*about)
    return (*(fitted.concerns or ()), *found)
