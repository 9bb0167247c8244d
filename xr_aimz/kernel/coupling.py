"""Check that the cells of a block can be computed without the cells of other blocks.

A model that combines cells (a running sum, ``x - x.mean()``, a lag, a position counted from the
block's start) returns another result in every block. A model is accepted if its independence is
proven from two traces, of the Dataset and of a block (``xr_aimz.tracing.independence``). Without a
proof, the model is evaluated on small probes, whole and split: a difference shows a coupling,
which is always refused. No difference proves nothing, so such a model is refused as well, unless
the caller asserts that its cells are independent.

Every site has a fixed value, so nothing is drawn; then its log density has to be the same cell by
cell, and so has the value of a deterministic. The value need not be likely: densities of one
family that agree at an arbitrary point in every cell are the same. Where the densities are not
finite, the parameters are compared. Probes are evaluated in 64 bits, where rounding is far below
any effect.
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

from xr_aimz.binding import TABLE, AlignedInputs, shape_in_model
from xr_aimz.errors import ModelError
from xr_aimz.kernel.probe import (
    DensityEvaluator,
    Probe,
    is_affordable,
    is_double_precision,
    make_probes,
    probe_shapes,
    zero_probe,
)
from xr_aimz.kernel.spec import KernelSpec
from xr_aimz.tracing import FlattenedAxes, LRUCache, Obstacle, Site, Tags, find_obstacles

Pieces = Mapping[str, slice]


@dataclass(frozen=True)
class Verdict:
    """Result of a check for coupling: an obstacle to the proof, and dims shown to be coupled.

    Parameters
    ----------
    obstacle : Obstacle, optional
        Reason why the cells are not proven independent along the block dims; None if they are.
    coupled : tuple of str
        Dims along which values showed a coupling.
    least : int
        Least length of a block along each dim for which the proof holds.
    """

    obstacle: Obstacle | None = None
    coupled: tuple[str, ...] = ()
    least: int = 1


_coupling_cache = LRUCache[tuple[str, ...]](512)


@dataclass(frozen=True)
class CouplingProblem:
    """Program of a model, with the inputs, latents and params that it is going to be run on.

    Parameters
    ----------
    program : KernelSpec
        ``returns`` are the sites that are checked.
    inputs : AlignedInputs
        Arrays that the program takes. Nothing lazy is computed.
    latents : mapping of site to DataArray ``(chain, draw, ...)``
        Posterior draws. Sites without draws, or with lazy ones, get values from their support.
    params : mapping of site to pytree
    seen : mapping of variable to DataArray, optional
        Values of the fit, used in place of lazy inputs.
    """

    program: KernelSpec
    inputs: AlignedInputs
    latents: Mapping[str, xr.DataArray]
    params: Mapping[str, Any]
    seen: Mapping[str, xr.DataArray] = field(default_factory=dict)

    def outline(self, sizes: Mapping[str, int]) -> Probe:
        return zero_probe(self.program, self.inputs, self.latents, sizes)

    def probes(self, sizes: Mapping[str, int]) -> tuple[Probe, ...]:
        return make_probes(self.program, self.inputs, self.latents, self.seen, sizes)

    def affords(self, sizes: Mapping[str, int]) -> bool:
        return is_affordable(self.program, self.inputs, sizes)


def raise_if_coupled(verdict: Verdict, sites: Collection[str], dims: Collection[str]) -> None:
    """Refuse a model whose cells along some dims are coupled, or not proven independent.

    Parameters
    ----------
    verdict : Verdict
    sites : collection of str
        Sites that are returned.
    dims : collection of str
        Block dims that need a proof.

    Raises
    ------
    ModelError
        With the dimensions and the remedies.
    """
    names = sorted(sites)
    if verdict.coupled:
        shown = _format_dims(verdict.coupled)
        reason = "" if verdict.obstacle is None else f" ({verdict.obstacle})"
        raise ModelError(
            f"the model couples cells along {shown}, which is cut into blocks{reason}: a block "
            f"of {names!r} would differ from the same cells of the whole, as with a lag, a "
            "running sum, a mean, a count of positions, a rule on lengths or a branch that many "
            f"cells decide. Keep the dimension whole, core_dim={shown} at the fit, or compute "
            "what combines cells along it beforehand, as a variable of the Dataset"
        )
    if verdict.obstacle is not None:
        shown = _format_dims(dims)
        raise ModelError(
            f"it is not proven that the model computes {names!r} cell by cell along {shown}, "
            f"which is cut into blocks: {verdict.obstacle}. Keep the dimension whole, "
            f"core_dim={shown} at the fit; or, if you know that no cell depends on another "
            f"along it, say so: assume_independent={shown}"
        )


def raise_not_cellwise(what: str, obstacle: Obstacle, dims: Collection[str]) -> None:
    """Refuse a callable that may combine cells along dims that are split into blocks.

    Raises
    ------
    ModelError
    """
    shown = _format_dims(dims)
    raise ModelError(
        f"{what}: it is not proven that the callable works cell by cell along {shown}, which "
        f"is cut into blocks: {obstacle}. Compute what combines cells along it beforehand, as a "
        "DataArray; or, if you know that no cell depends on another, say so: "
        f"assume_independent={shown}"
    )


def _format_dims(dims: Collection[str]) -> str:
    names = tuple(dims)
    return repr(names[0] if len(names) == 1 else names)


def find_coupling(
    case: CouplingProblem, blocks: Mapping[str, int], assumed: Collection[str] = ()
) -> Verdict:
    """
    Check whether a model's cells can be computed in blocks of given lengths.

    Parameters
    ----------
    case : CouplingProblem
    blocks : mapping of dim to int
        Block dims, and the length of a block along each.
    assumed : collection of str
        Block dims that need no proof. Values that show a coupling along them still count.

    Returns
    -------
    Verdict
    """
    if not blocks:
        return Verdict()
    # Traced with the dtypes that the model is going to be run with: a proof needs no more bits.
    obstacle, name = _read_traces(case, blocks)
    if obstacle is None:
        return Verdict()
    # In a block of length 1, an array with a value for each cell can look like one that all share.
    wider = {d: max(n, 2) for d, n in blocks.items()}
    if wider != blocks and _read_traces(case, wider)[0] is None:
        return Verdict(least=2)
    # Two models whose traces are equal have the same result.
    key = (name, tuple(blocks.items()))
    coupled = _coupling_cache.get(key) if name else None
    if coupled is None:
        coupled = _coupling_cache.put(key, _coupled_dims(case, wider))
    needed = {d: n for d, n in blocks.items() if d not in assumed}
    if needed != blocks:
        obstacle = _read_traces(case, needed)[0] if needed else None
    return Verdict(obstacle, coupled)


def find_coupling_at_any_length(
    case: CouplingProblem, dims: tuple[str, ...], assumed: Collection[str] = ()
) -> Verdict:
    """Apply :func:`find_coupling` to probes, for Datasets whose lengths are not known yet."""
    verdict = Verdict(Obstacle("it runs on no small Dataset: sizes are written into it"))
    for sizes in probe_shapes(case.program, case.inputs, dims):
        blocks = {d: sizes[d] // 2 for d in dims}
        inputs = replace(case.inputs, sizes={**case.inputs.sizes, **sizes})
        verdict = find_coupling(replace(case, inputs=inputs), blocks, assumed)
        if verdict == Verdict():
            return verdict
    return verdict


@dataclass(frozen=True)
class SiteLayout:
    """Shapes of a site's values in the whole and in a block, dtype, and split dim of each axis."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: Any
    tags: Tags


def site_layout(
    program: KernelSpec,
    site: Site,
    *,
    full: Mapping[str, int],
    block: Mapping[str, int],
    dims: Collection[str],
) -> SiteLayout:
    """Return the layout of a site in the model, for a whole and a block split along ``dims``."""
    all_dims = program.binding.dims
    shapes = (
        shape_in_model(site, program.binding, full),
        shape_in_model(site, program.binding, block),
    )
    axes = FlattenedAxes(tuple((d if d in dims else None, full[d], block[d]) for d in all_dims))
    tag = axes.axes[0][0] if len(all_dims) == 1 else axes
    tags = tuple(tag if d == TABLE else d if d in dims else None for d in site.dims)
    return SiteLayout(shapes, site.dtype, tags)


def function_obstacle(function: Callable, layouts: Sequence[SiteLayout]) -> Obstacle | None:
    """Return the obstacle to a proof that a function of arrays works cell by cell, or None."""

    def trace(number: int) -> ClosedJaxpr:
        structs = (jax.ShapeDtypeStruct(entry.shapes[number], entry.dtype) for entry in layouts)
        return jax.make_jaxpr(function)(*structs)

    tags = [layout.tags for layout in layouts]
    return find_obstacles(trace(0), trace(1), tags, tags[:1])[0]


def _read_traces(case: CouplingProblem, blocks: Mapping[str, int]) -> tuple[Obstacle | None, str]:
    """Return the obstacle to a proof from the traces of the Dataset and of one block, or None.

    The second value is the fingerprint of both, empty where the model does not run on one of them.
    """
    sizes = case.inputs.sizes
    # A padded block may be as long as the Dataset: then it is compared with a longer Dataset.
    longer = {d: max(sizes[d], n + 1) for d, n in blocks.items()}
    full, block = case.outline({**sizes, **longer}), case.outline({**sizes, **blocks})
    evaluate = DensityEvaluator(_return_all_sampled(case.program, full), case.params)
    try:
        obstacles = evaluate.obstacles(full, block, tuple(blocks))
        name = evaluate.fingerprint(full) + evaluate.fingerprint(block)
        sources = evaluate.sources(full, case.program.returns)
    except Exception as error:
        # A model may raise any class on the shapes of a block.
        return Obstacle(
            f"on one of its blocks it raises {type(error).__name__}: {error}".rstrip(".")
        ), ""
    return next((obstacles[n] for n in sources if obstacles[n] is not None), None), name


def _return_all_sampled(program: KernelSpec, probe: Probe) -> KernelSpec:
    """Return the program with every sampled site among its ``returns``."""
    others = (name for name in probe.noise if name not in program.returns)
    return replace(program, returns=(*program.returns, *others))


def _coupled_dims(case: CouplingProblem, blocks: Mapping[str, int]) -> tuple[str, ...]:
    """Return the dims along which values differ between a whole probe and its parts."""
    dims = tuple(blocks)

    def halves(probe: Probe, along: tuple[str, ...]) -> Iterator[Pieces]:
        return probe.halves(along)

    def ends(probe: Probe, along: tuple[str, ...]) -> Iterator[Pieces]:
        return probe.ends({d: blocks[d] for d in along})

    # A model may use lengths in a way that only the block's length shows: months make whole years
    # in a block and not in a probe, and the lesser of 30 and a length is 30 in any probe.
    doubled = {**case.inputs.sizes, **{d: 2 * n for d, n in blocks.items()}}
    attempts: tuple[tuple[Iterable[Mapping[str, int]], Any], ...] = (
        (probe_shapes(case.program, case.inputs, dims), halves),
        ((doubled,), halves),
        ((case.inputs.sizes,), ends),
    )
    # The ends of a Dataset that is no longer than a block would be the whole Dataset.
    attempts = attempts if _is_longer_than_block(case, blocks) else attempts[:2]
    for shapes, windows in attempts:
        coupled = _check_first_shape(case, shapes, windows, dims)
        if coupled:
            return coupled
    return ()


def _is_longer_than_block(case: CouplingProblem, blocks: Mapping[str, int]) -> bool:
    return all(case.inputs.sizes[d] > n for d, n in blocks.items())


def _check_first_shape(
    case: CouplingProblem, shapes: Iterable[Mapping[str, int]], windows: Any, dims: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the coupled dims from probes of the first of these shapes on which the model runs."""
    for sizes, is_wide in product(shapes, (True, False)):
        if not case.affords(sizes):
            continue
        with jax.enable_x64(is_wide or is_double_precision()), warnings.catch_warnings():
            # The model warns again where it is used.
            warnings.simplefilter("ignore")
            try:
                return _compare_values(case, case.probes(sizes), windows, dims)
            except Exception:
                # A model may raise any class on sizes and dtypes that it was not written for.
                continue
    return ()


def _compare_values(
    case: CouplingProblem, probes: tuple[Probe, ...], windows: Any, dims: tuple[str, ...]
) -> tuple[str, ...]:
    evaluate = DensityEvaluator(_return_sources(case, probes[0]), case.params)
    outputs = [(probe, evaluate(probe)) for probe in probes]
    best_share = max(_finite_share(full) for _, full in outputs)
    informative = [(probe, full) for probe, full in outputs if _finite_share(full) == best_share]

    def differ(along: tuple[str, ...]) -> bool:
        return any(evaluate.differs(p, full, windows(p, along)) for p, full in informative)

    coupled = dims if differ(dims) else ()
    # Each dim by itself costs another compilation, and only a refusal needs the result.
    return tuple(d for d in coupled if _differs_alone(differ, d)) or coupled


def _differs_alone(differ: Callable[[tuple[str, ...]], bool], dim: str) -> bool:
    """Return whether the model couples cells along one dim by itself."""
    try:
        return differ((dim,))
    except Exception:
        # A model that needs two equal lengths may raise any class on half of one; then both dims
        # are named.
        return False


def _return_sources(case: CouplingProblem, probe: Probe) -> KernelSpec:
    """Return the program with the sampled sites that its ``returns`` depend on added to them."""
    evaluate = DensityEvaluator(_return_all_sampled(case.program, probe), case.params)
    return replace(case.program, returns=evaluate.sources(probe, case.program.returns))


def _finite_share(outputs: Mapping[str, np.ndarray]) -> float:
    """Return the share of densities that are finite."""
    return float(np.mean([np.isfinite(v[..., 0]).mean() for v in outputs.values()]))
