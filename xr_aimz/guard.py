"""Whether a model couples cells along dimensions that are going to be split.

A block is computed without its neighbours, so a model that looks at them (a running sum,
``x - x.mean()``, a lag, a position counted from the block's start) gives another answer in
every block. It is found out on a small probe, evaluated whole and in halves. Every site is
given a value, so nothing is drawn; then its log density has to be the same cell by cell, and
so has the value of a deterministic. A site's value need not be likely for that: densities of
one family that agree at an arbitrary point in every cell are the same. Where they say nothing
there, the parameters are compared. Where cells together choose the branch of a ``cond``, it is
a coupling whatever they say (:mod:`xr_aimz.branches`). All is done in 64 bits, where rounding
is far below any effect. Most models need not be evaluated for it: that their cells are
independent is read off the two traces (:mod:`xr_aimz.pointwise`), which is much less work than
compiling them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz.densities import Evaluator, in_64_bits
from xr_aimz.errors import ModelError
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Program
from xr_aimz.probe import Probe, affordable, outline, probe_shapes, probes

__all__ = ["Case", "coupled", "coupled_at_any_length", "refuse"]

_verdicts: dict[Any, tuple[str, ...] | None] = {}


@dataclass(frozen=True)
class Case:
    """A model, and what it is going to be run on.

    Parameters
    ----------
    program : Program
        ``returns`` are the sites that are looked at.
    inputs : Inputs
        Whose arrays the program takes. Nothing lazy is computed.
    latents : mapping of site to DataArray ``(chain, draw, ...)``
        Known draws. Sites without, or with lazy ones, get values from their support.
    params : mapping of site to pytree
    seen : mapping of variable to DataArray, optional
        What a lazy input's values may be like: those of the fit.
    """

    program: Program
    inputs: Inputs
    latents: Mapping[str, xr.DataArray]
    params: Mapping[str, Any]
    seen: Mapping[str, xr.DataArray] = field(default_factory=dict)

    def outline(self, sizes: Mapping[str, int]) -> Probe:
        return outline(self.program, self.inputs, self.latents, sizes)

    def probes(self, sizes: Mapping[str, int]) -> tuple[Probe, ...]:
        return probes(self.program, self.inputs, self.latents, self.seen, sizes)

    def affords(self, sizes: Mapping[str, int]) -> bool:
        return affordable(self.program, self.inputs, sizes)


def refuse(case: Case, dims: tuple[str, ...] | None) -> None:
    """Refuse a model that couples cells along dims that are going to be split.

    Raises
    ------
    ModelError
        With the dimensions and the remedies, if there are any.
    """
    if not dims:
        return
    shown = dims[0] if len(dims) == 1 else dims
    raise ModelError(
        f"the model couples cells along {shown!r}, which is cut into blocks: a block of "
        f"{list(case.program.returns)!r} would come out otherwise than in the whole, as by a lag, "
        "a running sum, a mean, a count of positions, a rule on lengths or a cond that many cells "
        f"decide. Keep the dimension whole, core_dim={shown!r} at the fit, or compute what looks "
        "along it beforehand, as a variable of the Dataset"
    )


def coupled(case: Case, blocks: Mapping[str, int]) -> tuple[str, ...] | None:
    """The dims, of those that are going to be split, along which a model couples cells.

    Parameters
    ----------
    case : Case
    blocks : mapping of dim to int
        The dims that are going to be split, and how long a block is along each.

    Returns
    -------
    tuple of str or None
        Empty for a model whose cells are independent along each dim. None for one that cannot
        be judged, because it runs neither on a probe nor on two blocks: sizes are written into
        it.
    """
    if not blocks:
        return ()
    # As the model is going to be run: a proof has no use for more bits.
    direct = _first([blocks], (False,), partial(_direct, case))
    if direct is None:
        return coupled_at_any_length(case, blocks)
    if direct.proven:
        return ()
    # Whatever else differs, two models of which these traces are equal are one.
    key = (direct.digest, tuple(blocks.items()))
    if key not in _verdicts:
        found = _search(case, blocks)
        if found is not None and found.proven:
            # Proven for some lengths, and not for those that matter: they go by a rule on
            # lengths, which may be one of what is faster.
            shown = _first([blocks], (True, False), partial(_at_own_lengths, case))
            found = shown or _Verdict(tuple(blocks))
        _verdicts[key] = None if found is None else found.dims
    return _verdicts[key]


def coupled_at_any_length(case: Case, blocks: Mapping[str, int]) -> tuple[str, ...] | None:
    """As :func:`coupled`, of Datasets whose lengths are not known yet."""
    found = _search(case, blocks)
    return None if found is None else found.dims


@dataclass(frozen=True)
class _Verdict:
    """The dims along which cells are coupled, and whether two traces were enough to say so."""

    dims: tuple[str, ...]
    proven: bool = False
    digest: str = ""


def _direct(case: Case, blocks: Mapping[str, int]) -> _Verdict | None:
    """Whether two traces, of all the Dataset and of one block, show cells made by themselves."""
    sizes, part = case.inputs.sizes, _parts(blocks)
    if any(n >= sizes[d] for d, n in part.items()):
        return None
    whole, block = case.outline(sizes), case.outline({**sizes, **part})
    evaluate = Evaluator(_with_all_drawn(case.program, whole), case.params)
    if evaluate.proves(whole, block, tuple(blocks)):
        return _Verdict((), proven=True)
    return _Verdict((), digest=evaluate.digest(whole) + evaluate.digest(block))


def _parts(blocks: Mapping[str, int]) -> dict[str, int]:
    # In a block of one, what each cell has of its own looks like what all share.
    return {d: max(n, 2) for d, n in blocks.items()}


def _search(case: Case, blocks: Mapping[str, int]) -> _Verdict | None:
    """The dims along which a model that is not proven couples cells."""
    dims = tuple(blocks)
    look = partial(_look, case, dims)
    found = _first(probe_shapes(case.program, case.inputs, dims), (True, False), look)
    if found is None or found.proven:
        # What a model does with lengths it may do with a block's alone: months make whole years
        # in a block and not in a probe, and the lesser of 30 and a length is 30 in any probe.
        two = {**case.inputs.sizes, **{d: 2 * n for d, n in _parts(blocks).items()}}
        found = _first([two], (True, False), look) or found
    return found


def _at_own_lengths(case: Case, blocks: Mapping[str, int]) -> _Verdict:
    """What values show of the Dataset's own lengths against blocks at its ends."""
    dims = tuple(blocks)
    if not case.affords(case.inputs.sizes):
        return _Verdict(dims)
    tried = case.probes(case.inputs.sizes)
    evaluate = Evaluator(_with_sources(case, tried[0]), case.params)
    couples = any(evaluate.differs(p, evaluate(p), p.ends(_parts(blocks))) for p in tried)
    return _Verdict(dims if couples else ())


def _first(
    shapes: Iterable[Mapping[str, int]],
    widths: Sequence[bool],
    look: Callable[[Mapping[str, int]], _Verdict | None],
) -> _Verdict | None:
    """What is found on the first of these shapes on which the model runs, wide or not."""
    for sizes, wide in product(shapes, widths):
        with jax.enable_x64(wide or in_64_bits()), warnings.catch_warnings():
            # What a model warns of, it warns of where it is used.
            warnings.simplefilter("ignore")
            try:
                found = look(sizes)
            except Exception:
                # Whatever a model may raise on sizes and dtypes that it was not made for.
                continue
        if found is not None:
            return found
    return None


def _look(case: Case, dims: tuple[str, ...], sizes: Mapping[str, int]) -> _Verdict | None:
    """A proof; or else what values show, where a probe of them is not too large."""
    shape = case.outline(sizes)
    evaluate = Evaluator(_with_all_drawn(case.program, shape), case.params)
    if evaluate.proves(shape, shape.part(next(shape.halves(dims))), dims):
        return _Verdict((), proven=True)
    if not case.affords(sizes):
        return None
    tried = case.probes(sizes)
    evaluate = Evaluator(_with_sources(case, tried[0]), case.params)
    along = {*_judged(evaluate, tried, dims), *evaluate.branches(tried[0], dims)}
    return _Verdict(tuple(d for d in dims if d in along))


def _with_all_drawn(program: Program, probe: Probe) -> Program:
    """The program, with every drawn site among its ``returns``."""
    hidden = (name for name in probe.noise if name not in program.returns)
    return replace(program, returns=(*program.returns, *hidden))


def _with_sources(case: Case, probe: Probe) -> Program:
    """The program, with those drawn sites among its ``returns`` that its returns depend on."""
    program = case.program
    hidden = [name for name in probe.noise if name not in program.returns]
    if not hidden:
        return program
    evaluate = Evaluator(program, case.params)
    before, matters = evaluate(probe), []
    for name in hidden:
        dims, values = probe.noise[name]
        after = evaluate(replace(probe, noise={**probe.noise, name: (dims, -values)}))
        if any(not np.array_equal(before[n], after[n], equal_nan=True) for n in before):
            matters.append(name)
    return replace(program, returns=(*program.returns, *matters))


def _judged(evaluate: Evaluator, tried: tuple[Probe, ...], dims: tuple[str, ...]) -> Any:
    half = tried[0].part(next(tried[0].halves(dims)))
    key = (evaluate.digest(tried[0]), evaluate.digest(half), dims)
    if key not in _verdicts:
        wholes = [(probe, evaluate(probe)) for probe in tried]
        best = max(_finite(whole) for _, whole in wholes)
        told = [(probe, whole) for probe, whole in wholes if _finite(whole) == best]

        def differ(along: tuple[str, ...]) -> bool:
            return any(evaluate.differs(p, whole, p.halves(along)) for p, whole in told)

        found = dims if differ(dims) else ()
        # Each dim by itself costs another compilation, and only a refusal needs to know.
        _verdicts[key] = tuple(d for d in found if _alone(differ, d)) or found
    return _verdicts[key]


def _alone(differ: Callable[[tuple[str, ...]], bool], dim: str) -> bool:
    """Whether one dim by itself shows."""
    try:
        return differ((dim,))
    except Exception:
        # A model of two equal lengths raises whatever it may on half of one; both are named then.
        return False


def _finite(outputs: Mapping[str, np.ndarray]) -> float:
    """The share of densities that say something."""
    return float(np.mean([np.isfinite(v[..., 0]).mean() for v in outputs.values()]))
