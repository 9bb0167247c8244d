"""Predictions for one request after another: traced once, compiled for a few sizes.

:func:`xr_aimz.predict` traces a model anew each time, since a model in a notebook may have
changed meanwhile. One that is served does not, so what a trace found is kept here. Blocks are
padded to a few sizes: requests of any number of rows run the same few programs. Padding, like
cutting, is right only where no cell sees another, and so is answering row by row; both are
proved on a probe before the first answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import jax
import xarray as xr

from xr_aimz.errors import AimzError, InterventionError, ModelError
from xr_aimz.evaluation import Evaluation, check_split_along
from xr_aimz.flavour.asking import Asked
from xr_aimz.plan import Plan
from xr_aimz.posterior import Fit
from xr_aimz.predict import answered, asked, attrs_of
from xr_aimz.recursion import Dependence
from xr_aimz.unseen import check_draws

__all__ = ["Memory", "answer"]

# Lengths are padded to 1, 8, 16, 32 ..., unless a block in several dimensions would grow to
# more than twice its size, and be large.
_LEAST = 8
_GROWTH = 2
_SMALL = 4096
# A service runs for months, and its requests may have any shape.
_MOST = 10_000


@dataclass(frozen=True)
class Memory:
    """What was found out about a fit that is served; kept for as long as it is.

    ``traces`` are outputs and names of programs by what was asked and by shapes;
    ``dependences`` are those of sites along a dim; ``checked`` what was asked and found to be
    answered cell by cell; ``lock`` keeps two requests from finding out the same.
    """

    traces: dict[Any, Any] = field(default_factory=dict)
    dependences: dict[Any, Mapping[str, Dependence]] = field(default_factory=dict)
    checked: set[Any] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass(frozen=True)
class _Served(Evaluation):
    """An evaluation that remembers traces and pads to a few sizes."""

    memory: Memory = field(default_factory=Memory)
    key: tuple[Any, ...] = ()

    def traced(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        leaves, structure = jax.tree.flatten(self.structs(sizes))
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = (self.key, structure, shapes, tuple(sorted(sizes.items())))
        with self.memory.lock:
            traces = self.memory.traces
            if key not in traces:
                if len(traces) >= _MOST:
                    traces.clear()
                traces[key] = self._newly_traced(sizes)
            return traces[key]

    def _newly_traced(self, sizes: Mapping[str, int]) -> tuple[dict[str, Any], str]:
        try:
            return super().traced(sizes)
        except (TypeError, ModelError) as error:
            own = error.__cause__ if isinstance(error, ModelError) else error
            if self.under is None or own is None or isinstance(own, AimzError):
                raise
            # The same model ran at the fit, with other numbers.
            raise InterventionError(
                f"with do={json.loads(self.key[1])!r} the model does not run: "
                f"{type(own).__name__}: {own}. Give numbers of the kind that it takes there, "
                "2 and not 2.0 for an int"
            ) from error

    def dependences(self, dim: str) -> Mapping[str, Dependence]:
        leaves, structure = jax.tree.flatten(self.structs(self.inputs.sizes))
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = (self.key, dim, structure, shapes)
        with self.memory.lock:
            found = self.memory.dependences
            if key not in found:
                if len(found) >= _MOST:
                    found.clear()
                found[key] = super().dependences(dim)
            return found[key]

    def padded(self, cut: Plan) -> dict[str, int]:
        self._check_alone(cut)
        sizes = super().padded(cut)
        core = self.fit.binding.core_dims
        grown = {d: n if d in core else _rung(n) for d, n in sizes.items()}
        if prod(grown.values()) > max(_SMALL, _GROWTH * prod(sizes.values())):
            return sizes
        try:
            self.traced({**self.inputs.sizes, **grown})
        except Exception:
            # Sizes are written into the model: it runs on those alone.
            return sizes
        return grown

    def _check_alone(self, cut: Plan) -> None:
        """A row's answer depends on no other row: no cell sees another."""
        with self.memory.lock:
            if self.key in self.memory.checked:
                return
            free = [d for d in self.fit.binding.dims if d not in self.fit.binding.core_dims]
            try:
                check_split_along(self, cut, free)
            except ModelError as error:
                error.add_note(
                    "xr_aimz: a table is answered row by row, and may come in pieces of any size"
                )
                raise
            self.memory.checked.add(self.key)


def answer(ds: xr.Dataset, fit: Fit, wanted: Asked, memory: Memory) -> xr.Dataset:
    """What :func:`xr_aimz.predict` gives, computed.

    Parameters
    ----------
    ds : Dataset
        With the variables that the fit took, less the outcomes.
    fit : Fit
    wanted : Asked
    memory : Memory
        Of this fit: the same for all its requests.

    Returns
    -------
    Dataset
        Eager; equal to ``predict`` but for the rounding of another program.

    Raises
    ------
    ModelError
        The model couples cells along a dimension that is no ``core_dim``: an answer would
        depend on which rows come together.
    InterventionError
        The model does not run with the numbers that are set.
    """
    check_draws(fit.posterior, fit.sites, fit.binding)
    found = asked(ds, fit, wanted.question)
    own = {f.name: getattr(found, f.name) for f in fields(found)}
    served = _Served(**own, memory=memory, key=wanted.key)
    return answered(ds, served, attrs_of(served), "predict").load()


def _rung(length: int) -> int:
    return length if length == 1 else max(_LEAST, 1 << (length - 1).bit_length())
