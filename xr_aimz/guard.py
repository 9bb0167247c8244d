"""Whether the cells of a block can be computed without those of other blocks.

A model that looks at other cells (a running sum, ``x - x.mean()``, a lag, a position counted
from the block's start) gives another answer in every block. It is let through where its
independence is proven from two traces, of the Dataset and of a block
(:mod:`xr_aimz.independence`). Where it is not, the model is evaluated on small probes, whole and
in pieces: a difference shows a coupling, which is always refused. No difference proves nothing,
so such a model is refused as well, unless the caller says that its cells are independent.

Every site is given a value, so nothing is drawn; then its log density has to be the same cell by
cell, and so has the value of a deterministic. A site's value need not be likely for that:
densities of one family that agree at an arbitrary point in every cell are the same. Where they
say nothing there, the parameters are compared. Probes are evaluated in 64 bits, where rounding is
far below any effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import jax
import numpy as np
import xarray as xr
from jax.extend.core import ClosedJaxpr

from xr_aimz.axes import TABLE, shape_in_model
from xr_aimz.axis_rules import FlattenedAxes, Tags
from xr_aimz.densities import Evaluator, in_64_bits
from xr_aimz.errors import ModelError
from xr_aimz.fingerprint import RecentlyUsed
from xr_aimz.independence import Obstacle, find_obstacles
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Program
from xr_aimz.model import Site
from xr_aimz.probe import Probe, affordable, outline, probe_shapes, probes

__all__ = [
    "Case",
    "Verdict",
    "function_obstacle",
    "judge",
    "judge_at_any_length",
    "raise_if_coupled",
    "raise_not_cellwise",
    "site_layout",
]

Pieces = Mapping[str, slice]


@dataclass(frozen=True)
class Verdict:
    """What is known of a model's cells along the dims that are going to be cut.

    Parameters
    ----------
    obstacle : Obstacle, optional
        What kept them from being proven independent; None where they are.
    coupled : tuple of str
        The dims along which values showed a coupling.
    least : int
        How long a block must be along each dim for the proof to hold.
    """

    obstacle: Obstacle | None = None
    coupled: tuple[str, ...] = ()
    least: int = 1


_couplings = RecentlyUsed[tuple[str, ...]](512)


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


def raise_if_coupled(verdict: Verdict, sites: Collection[str], dims: Collection[str]) -> None:
    """Refuse a model whose cells along some dims are coupled, or not proven independent.

    Parameters
    ----------
    verdict : Verdict
    sites : collection of str
        Those that are returned.
    dims : collection of str
        Those that are going to be cut and need a proof.

    Raises
    ------
    ModelError
        With the dimensions and the remedies.
    """
    names = sorted(sites)
    if verdict.coupled:
        shown = _shown(verdict.coupled)
        because = "" if verdict.obstacle is None else f" ({verdict.obstacle})"
        raise ModelError(
            f"the model couples cells along {shown}, which is cut into blocks{because}: a block "
            f"of {names!r} would come out otherwise than in the whole, as by a lag, a running "
            "sum, a mean, a count of positions, a rule on lengths or a branch that many cells "
            f"decide. Keep the dimension whole, core_dim={shown} at the fit, or compute what "
            "looks along it beforehand, as a variable of the Dataset"
        )
    if verdict.obstacle is not None:
        shown = _shown(dims)
        raise ModelError(
            f"it is not proven that the model computes {names!r} cell by cell along {shown}, "
            f"which is cut into blocks: {verdict.obstacle}. Keep the dimension whole, "
            f"core_dim={shown} at the fit; or, if you know that no cell depends on another "
            f"along it, say so: assume_independent={shown}"
        )


def raise_not_cellwise(what: str, obstacle: Obstacle, dims: Collection[str]) -> None:
    """Refuse a callable that may combine cells along dims that are going to be cut.

    Raises
    ------
    ModelError
    """
    shown = _shown(dims)
    raise ModelError(
        f"{what}: it is not proven that the callable works cell by cell along {shown}, which "
        f"is cut into blocks: {obstacle}. Compute what looks along it beforehand, as a "
        "DataArray; or, if you know that no cell depends on another, say so: "
        f"assume_independent={shown}"
    )


def _shown(dims: Collection[str]) -> str:
    names = tuple(dims)
    return repr(names[0] if len(names) == 1 else names)


def judge(case: Case, blocks: Mapping[str, int], assumed: Collection[str] = ()) -> Verdict:
    """
    Judge whether a model's cells can be computed in blocks of some lengths.

    Parameters
    ----------
    case : Case
    blocks : mapping of dim to int
        The dims that are going to be cut, and how long a block is along each.
    assumed : collection of str
        Dims of these that need no proof. Values that show a coupling along them still count.

    Returns
    -------
    Verdict
    """
    if not blocks:
        return Verdict()
    # As the model is going to be run: a proof has no use for more bits.
    obstacle, name = _read_traces(case, blocks)
    if obstacle is None:
        return Verdict()
    # In a block of one, what each cell has of its own can look like what all share.
    wider = {d: max(n, 2) for d, n in blocks.items()}
    if wider != blocks and _read_traces(case, wider)[0] is None:
        return Verdict(least=2)
    # Whatever else differs, two models of which these traces are equal are one.
    key = (name, tuple(blocks.items()))
    coupled = _couplings.get(key) if name else None
    if coupled is None:
        coupled = _couplings.put(key, _coupled_dims(case, wider))
    needed = {d: n for d, n in blocks.items() if d not in assumed}
    if needed != blocks:
        obstacle = _read_traces(case, needed)[0] if needed else None
    return Verdict(obstacle, coupled)


def judge_at_any_length(
    case: Case, dims: tuple[str, ...], assumed: Collection[str] = ()
) -> Verdict:
    """As :func:`judge`, of Datasets whose lengths are not known yet: on those of a probe."""
    verdict = Verdict(Obstacle("it runs on no small Dataset: sizes are written into it"))
    for sizes in probe_shapes(case.program, case.inputs, dims):
        blocks = {d: sizes[d] // 2 for d in dims}
        inputs = replace(case.inputs, sizes={**case.inputs.sizes, **sizes})
        verdict = judge(replace(case, inputs=inputs), blocks, assumed)
        if verdict == Verdict():
            return verdict
    return verdict


@dataclass(frozen=True)
class Layout:
    """A site's values in the whole and in a block: shapes, dtype, split dim of each axis."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: Any
    tags: Tags


def site_layout(
    program: Program,
    site: Site,
    *,
    whole: Mapping[str, int],
    block: Mapping[str, int],
    dims: Collection[str],
) -> Layout:
    """How a site's values lie in the model, on Datasets of those sizes, ``dims`` being cut."""
    own = program.binding.dims
    shapes = (
        shape_in_model(site, program.binding, whole),
        shape_in_model(site, program.binding, block),
    )
    row = FlattenedAxes(tuple((d if d in dims else None, whole[d], block[d]) for d in own))
    of_row = row.axes[0][0] if len(own) == 1 else row
    tags = tuple(of_row if d == TABLE else d if d in dims else None for d in site.dims)
    return Layout(shapes, site.dtype, tags)


def function_obstacle(function: Callable, layouts: Sequence[Layout]) -> Obstacle | None:
    """What keeps a function of arrays from being proven to work cell by cell, if anything."""

    def trace(number: int) -> ClosedJaxpr:
        structs = (jax.ShapeDtypeStruct(each.shapes[number], each.dtype) for each in layouts)
        return jax.make_jaxpr(function)(*structs)

    tags = [layout.tags for layout in layouts]
    return find_obstacles(trace(0), trace(1), tags, tags[:1])[0]


def _read_traces(case: Case, blocks: Mapping[str, int]) -> tuple[Obstacle | None, str]:
    """What keeps two traces, of all the Dataset and of one block, from being a proof.

    And the name of both, empty where the model does not run on one of them.
    """
    sizes = case.inputs.sizes
    # A block that is padded may be as long as the Dataset: then any longer one serves.
    longer = {d: max(sizes[d], n + 1) for d, n in blocks.items()}
    whole, block = case.outline({**sizes, **longer}), case.outline({**sizes, **blocks})
    evaluate = Evaluator(_with_all_drawn(case.program, whole), case.params)
    try:
        obstacles = evaluate.obstacles(whole, block, tuple(blocks))
        name = evaluate.fingerprint(whole) + evaluate.fingerprint(block)
        matter = evaluate.sources(whole, case.program.returns)
    except Exception as error:
        # Whatever a model may raise on the shapes of a block.
        return Obstacle(
            f"on one of its blocks it raises {type(error).__name__}: {error}".rstrip(".")
        ), ""
    return next((obstacles[n] for n in matter if obstacles[n] is not None), None), name


def _with_all_drawn(program: Program, probe: Probe) -> Program:
    """The program, with every drawn site among its ``returns``."""
    hidden = (name for name in probe.noise if name not in program.returns)
    return replace(program, returns=(*program.returns, *hidden))


def _coupled_dims(case: Case, blocks: Mapping[str, int]) -> tuple[str, ...]:
    """The dims along which values differ between a whole and its pieces."""
    dims = tuple(blocks)

    def halves(probe: Probe, along: tuple[str, ...]) -> Iterator[Pieces]:
        return probe.halves(along)

    def ends(probe: Probe, along: tuple[str, ...]) -> Iterator[Pieces]:
        return probe.ends({d: blocks[d] for d in along})

    # What a model does with lengths it may do with a block's alone: months make whole years in a
    # block and not in a probe, and the lesser of 30 and a length is 30 in any probe.
    two = {**case.inputs.sizes, **{d: 2 * n for d, n in blocks.items()}}
    attempts: tuple[tuple[Iterable[Mapping[str, int]], Any], ...] = (
        (probe_shapes(case.program, case.inputs, dims), halves),
        ((two,), halves),
        ((case.inputs.sizes,), ends),
    )
    # Pieces at both ends of a Dataset that is no longer than they are would be the whole.
    attempts = attempts if _is_longer(case, blocks) else attempts[:2]
    for shapes, pieces in attempts:
        found = _first_that_runs(case, shapes, pieces, dims)
        if found:
            return found
    return ()


def _is_longer(case: Case, blocks: Mapping[str, int]) -> bool:
    return all(case.inputs.sizes[d] > n for d, n in blocks.items())


def _first_that_runs(
    case: Case, shapes: Iterable[Mapping[str, int]], pieces: Any, dims: tuple[str, ...]
) -> tuple[str, ...]:
    """What values show on the first of these shapes on which the model runs."""
    for sizes, wide in product(shapes, (True, False)):
        if not case.affords(sizes):
            continue
        with jax.enable_x64(wide or in_64_bits()), warnings.catch_warnings():
            # What a model warns of, it warns of where it is used.
            warnings.simplefilter("ignore")
            try:
                return _differing_dims(case, case.probes(sizes), pieces, dims)
            except Exception:
                # Whatever a model may raise on sizes and dtypes that it was not made for.
                continue
    return ()


def _differing_dims(
    case: Case, tried: tuple[Probe, ...], pieces: Any, dims: tuple[str, ...]
) -> tuple[str, ...]:
    evaluate = Evaluator(_with_sources(case, tried[0]), case.params)
    wholes = [(probe, evaluate(probe)) for probe in tried]
    best = max(_finite(whole) for _, whole in wholes)
    telling = [(probe, whole) for probe, whole in wholes if _finite(whole) == best]

    def differ(along: tuple[str, ...]) -> bool:
        return any(evaluate.differs(p, whole, pieces(p, along)) for p, whole in telling)

    found = dims if differ(dims) else ()
    # Each dim by itself costs another compilation, and only a refusal needs to know.
    return tuple(d for d in found if _alone(differ, d)) or found


def _alone(differ: Callable[[tuple[str, ...]], bool], dim: str) -> bool:
    """Whether one dim by itself shows."""
    try:
        return differ((dim,))
    except Exception:
        # A model of two equal lengths raises whatever it may on half of one; both are named then.
        return False


def _with_sources(case: Case, probe: Probe) -> Program:
    """The program, with those drawn sites among its ``returns`` that its returns depend on."""
    evaluate = Evaluator(_with_all_drawn(case.program, probe), case.params)
    return replace(case.program, returns=evaluate.sources(probe, case.program.returns))


def _finite(outputs: Mapping[str, np.ndarray]) -> float:
    """The share of densities that say something."""
    return float(np.mean([np.isfinite(v[..., 0]).mean() for v in outputs.values()]))
