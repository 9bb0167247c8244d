"""A Dataset and a model become a Fit.

Options, binding, loading and inference, in that order; what could be wrong is found before
the first array is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import xarray as xr

from xr_aimz.assembly import assemble, concerns_of, labelled, labelled_draws, wanted
from xr_aimz.axes import dims_in_dataset
from xr_aimz.batches import batch_sizes
from xr_aimz.binding import Binding, arrange, block_of
from xr_aimz.bound import Bound, bind
from xr_aimz.casting import device_dtype, measure_sd, to_device_dtype
from xr_aimz.concrete import check_not_cut
from xr_aimz.conversions import find_converted
from xr_aimz.errors import ConvergenceWarning, DimensionError, ModelError, OptionError, warn
from xr_aimz.gaps import cells_with_gaps, sample_with_gaps
from xr_aimz.guard import Case, judge, raise_if_coupled
from xr_aimz.index_ranges import PositionKernel, find_index_ranges
from xr_aimz.infer import batchable
from xr_aimz.infer.cells import CellMethod
from xr_aimz.infer.methods import cell_inference, inference
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.infer.retarget import on_model
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Program, predictive
from xr_aimz.kinds import check_model
from xr_aimz.memory import check_fits
from xr_aimz.missing import masked, prepare
from xr_aimz.model import factor_inputs
from xr_aimz.options import shows_progress
from xr_aimz.per_cell import Memory, Shelf, fit_cells, plan_cells
from xr_aimz.posterior import Fit
from xr_aimz.record import options_of, versions
from xr_aimz.requirements import (
    Requirement,
    check_in_memory,
    check_values,
    describe_variables,
    is_in_memory,
    label_whole,
)
from xr_aimz.shelf import Stored
from xr_aimz.spelling import suggest
from xr_aimz.supports import find_outcome_supports, structs_of
from xr_aimz.watch import watched
from xr_aimz.whole_numbers import parse_seed

__all__ = ["fit", "for_masked", "problem_of"]

Infer = Callable[[Problem], Draws]


def fit(
    ds: xr.Dataset,
    model: Callable,
    variables: Mapping[str, Any] | None = None,
    *,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
    per: str | tuple[str, ...] | None = None,
    layout: str = "grid",
    method: Any = "nuts",
    draws: int | None = None,
    chains: int | None = None,
    warmup: int | None = None,
    steps: int | None = None,
    batch: int | Mapping[str, int] | None = None,
    epochs: float | None = None,
    optimizer: Any = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    init: Any = None,
    seed: int = 0,
    assume_independent: str | tuple[str, ...] | None = None,
    store: str | Path | None = None,
    progress: bool | None = None,
) -> Fit:
    """Fit a NumPyro model to a Dataset: its arguments are the Dataset's own variables.

    Missing values (NaN) are left out cell by cell: a cell whose outcome is missing, or an
    input of it, has no part in the likelihood. An outcome of several entries a cell goes as
    a whole. A latent site of which all cells are missing has its prior. Constants are passed
    as they are, NaN included.

    Parameters
    ----------
    ds : Dataset
        Numpy- or dask-backed; the variables that the model takes are loaded, or with
        ``batch`` read a few chunks at a time.
    model : callable
        A plain NumPyro model. An argument whose default is ``None`` and that a site
        observes is an outcome.
    variables : mapping, optional
        For an argument: the name of a variable or coordinate, a list of names (stacked
        on a last axis ``feature``), a DataArray, or a constant, passed as it is. An
        argument left out is bound to the variable of its own name.
    dim : str or tuple of str, optional
        The observation dimensions. By default the outcome's, less those that the
        observed site takes as its event.
    core_dim : str or tuple of str, optional
        Dimensions that the model couples (a lag, a scan, a Gaussian process): never split. One
        that the observed site takes as its event, or that is no observation dimension, may be
        named as well.
    per : str or tuple of str, optional
        Dimensions of the outcome over which the model is fitted independently, once for each
        label: ``per=("lat", "lon")`` is a fit in every grid cell. The model sees arrays without
        them. Blocks of a chunked Dataset are loaded one after another.
    layout : {"grid", "table"}
        ``"grid"`` hands over arrays that broadcast against the outcome; ``"table"``
        flattens the observation dims to one leading axis.
    method : optional
        ``"nuts"`` (default), ``"svi"``, ``"laplace"`` (a mode and its curvature), or NumPyro's
        own: a kernel such as ``NUTS(model, target_accept_prob=0.95)``, an ``MCMC``, an ``SVI``,
        a ``SteinVI``, an autoguide class or instance. With missing values a copy of such an
        object is run, for a model that leaves them out; a guide written by hand is handed them
        as they are. ``SteinVI`` and ``ASVGD`` give posteriors that are too narrow; ``SVGD`` does
        not. With ``per``: the three names, an ``HMC`` or ``NUTS``, or an autoguide's class.
    draws : int, default 1000
        Draws a chain (MCMC), or of the guide (SVI) or the Gaussian (Laplace), which come as
        one chain.
    chains, warmup : int, default 4 and 1000
        For MCMC. Chains run in parallel over devices where there are enough, else
        vectorized on one; those of kernels that cannot, in turn.
    steps : int, default 10000
        For SVI and SteinVI: all steps, those of an earlier fit that is continued included.
    batch : int or mapping of dim to int, optional
        For SVI: how many entries along an observation dimension, ``{"time": 100}``, a step
        sees; or about how many observations, along the first dimension that is no
        ``core_dim``. The likelihood, and latents with an entry for each label, are scaled
        to the whole Dataset. Chunks stream in a shuffled order, at most some five times
        ``set_options(block_bytes)`` of them in memory; data of up to that size are read
        once. A normal autoguide is trained on pairs of a draw and its reflection in the mean.
        Deterministics are left to :func:`xr_aimz.predict`.
    epochs : float, optional
        With ``batch``, in place of ``steps``: passes over the data.
    optimizer : optional
        For SVI: an optimizer of NumPyro or optax, or a learning rate for Adam (0.05), which
        shrinks to a thousandth over the last three tenths of the steps. In batches, the rate
        for a normal autoguide falls to a tenth and the last quarter of the iterates are
        averaged; for other guides it falls to a ten-thousandth.
    patience : int, optional
        With ``batch``: once so many steps have not lowered the loss by more than its noise,
        only the steps at the shrinking rate are taken; with an optimizer of the caller's
        the fit ends there.
    checkpoint : path, optional
        With ``batch``: a file for the state, written now and then. The same call goes on
        from the file where there is one, and ends as if it had not been cut short.
    init : optional
        Values by site, or a strategy such as ``numpyro.infer.init_to_median``; with
        ``batch`` also a Fit, which is continued exactly. The rate of an optimizer of our
        own depends on ``steps``: give a Fit that is to be continued one of the caller's.
    seed : int
    assume_independent : str or tuple of str, optional
        With ``batch``: batched dimensions along which the caller vouches that no cell depends on
        another. A model whose independence along them is not proven is refused without; one
        whose values show a coupling is refused all the same.
    store : path, optional
        With ``per``: a Zarr store to which draws are written block by block, for a posterior
        larger than memory; ``fit.posterior`` is then lazy. The same call on a store that was
        cut short fits the blocks that are missing.
    progress : bool, optional
        By default as :class:`xr_aimz.set_options` says.

    Returns
    -------
    Fit
        With ``per``, the posterior has dims ``(chain, draw, *per, ...)``, and
        ``sample_stats.status`` says of each cell how its fit went. A cell without data, or one
        whose fit failed, has NaN draws, and leaves the others as they are.

    Warns
    -----
    ConvergenceWarning
        R-hat above 1.01, an effective sample size below 100 a chain, divergences, more than 1 %
        of the trees at their greatest depth; a loss that is not finite or still falling, too few
        steps to judge; in batches with a normal autoguide, means that may be off by more than
        0.3 posterior sds or sds by more than 10 %.

    Raises
    ------
    BindingError, MissingVariableError, DimensionError, DtypeError, LabelError, ModelError
        Before anything is loaded.
    MemoryLimitError
        Three copies of what would be loaded do not fit in memory.
    MissingValueError
        A missing value would touch more than its own cell: the model takes a mean or a lag of
        the variable, or makes a prior of it. Found by exchanging what stands in for it.
    OptionError
        An option that the method does not take; a batch larger than the data or along a
        core dim; a checkpoint or Fit that is not of this model, data and options.
    StoreError
        A checkpoint that cannot be written or read; ``store`` holds something else than a
        part of this fit.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr
    >>> import xr_aimz
    >>> def line(x, y=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 10))
    ...     numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
    >>> x = np.linspace(-1, 1, 50)
    >>> ds = xr.Dataset({"x": ("time", x), "y": ("time", 2 * x)})
    >>> fitted = ds.aimz.fit(line, draws=500, warmup=500, progress=False)
    >>> fitted.posterior.slope.dims
    ('chain', 'draw')
    """
    seed = _checked(ds, model, seed, store, per)
    given = {"chains": chains, "warmup": warmup, "steps": steps, "draws": draws, "init": init}
    given |= {"batch": batch, "epochs": epochs, "patience": patience, "checkpoint": checkpoint}
    given |= {"optimizer": optimizer, "assume_independent": assume_independent}
    asked = {name: value for name, value in given.items() if value is not None}
    bound_to = partial(bind, ds, model, variables, dim=dim, core_dim=core_dim, layout=layout)
    with watched() as told:
        if per:
            in_cell = cell_inference(model, method, asked)
            found = _fit_cells(bound_to(per=per), in_cell, seed, store, shows_progress(progress))
        else:
            by = partial(inference, asked=asked, seed=seed, progress=shows_progress(progress))
            found = _fit_whole(by(model, method), bound_to(), method, by, asked)
        return told(_looked_at(_recorded(found, method, asked, seed)))


def _checked(ds: Any, model: Any, seed: Any, store: Any, per: Any) -> int:
    """The seed of a fit, of a Dataset and a model and nothing else."""
    check_model(ds, model, "fit")
    if store is not None and not per:
        raise OptionError(f"store={str(store)!r} goes with per=; other fits are in memory")
    return parse_seed(seed)


def _check_batches(bound: Bound, batch: Any, assumed: tuple[str, ...]) -> None:
    """Refuse a model whose density of a batch depends on the observations that are not in it."""
    binding, inputs = bound.binding, bound.inputs
    if strange := [d for d in assumed if d not in binding.dims]:
        raise DimensionError(
            f"assume_independent={strange!r} is not among the observation dimensions "
            f"{binding.dims!r}{suggest(binding.dims, strange)}"
        )
    sizes = batch_sizes(batch, binding, inputs)
    check_not_cut(binding, sizes, f"by batch={batch!r}")
    blocks = {d: n for d, n in sizes.items() if n < inputs.sizes[d]}
    if blocks:
        whole = block_of(binding, inputs.sizes)
        batchable.check_model(Problem(bound.model, {}, whole, bound.sites, binding, inputs), sizes)
        drawn = tuple(n for n, s in bound.sites.items() if s.kind in ("latent", "observed"))
        program = Program(bound.model, binding.without_data(), bound.sites, inputs.dims, drawn)
        verdict = judge(Case(program, inputs, {}, {}), blocks, assumed)
        raise_if_coupled(verdict, drawn, [d for d in blocks if d not in assumed])
        _check_factors(bound, blocks)


def _check_factors(bound: Bound, dims: Collection[str]) -> None:
    """Refuse factors made from observations, which would count once for each of their batches."""
    binding, inputs = bound.binding, bound.inputs
    block = block_of(binding, inputs.sizes)
    arrays = {
        key: jax.ShapeDtypeStruct(a.shape, device_dtype(a.dtype))
        for key, a in inputs.arrays.items()
    }
    latents = {
        n: jax.ShapeDtypeStruct(s.shape, s.dtype)
        for n, s in bound.sites.items()
        if s.kind == "latent" and not s.scanned
    }
    along = {key: set(inputs.dims[key]) for key in arrays}
    along |= {name: set(dims_in_dataset(bound.sites[name], binding)) for name in latents}
    arranged = partial(arrange, binding, dims=inputs.dims, block=block)
    for name, sources in factor_inputs(bound.model, arranged, arrays, latents, block).items():
        cut = sorted(source for source in sources if along[source] & set(dims))
        if cut:
            raise ModelError(
                f"numpyro.factor({name!r}, ...) is computed from {cut!r}, which are cut into "
                f"batches along {sorted(dims)!r}: nothing tells how often a batch's part of it "
                "counts. Write it as the density of an observed site, or leave batch= out"
            )


def _fit_whole(
    infer: Infer,
    bound: Bound,
    method: Any,
    by: Callable[[Callable, Any], Infer],
    asked: Mapping[str, Any],
) -> Fit:
    """One fit of all the data, ``by`` a method on a model: a masked one where data are missing."""
    batch, assumed = asked.get("batch"), asked.get("assume_independent", ())
    if batch is not None:
        _check_batches(bound, batch, (assumed,) if isinstance(assumed, str) else tuple(assumed))
    problem, arrays, sd = problem_of(bound, streamed=batch is not None)
    if problem.model is not bound.model:
        infer = by(problem.model, for_masked(method, bound, problem.model))
    return replace(labelled(bound, infer(problem), arrays), data_sd=sd)


def problem_of(
    bound: Bound, *, streamed: bool
) -> tuple[Problem, Mapping[str, jax.Array], xr.Dataset]:
    """What an inference is given, the arrays that were loaded for it, and their sd.

    Of data that are ``streamed`` nothing stays loaded but what shows how the model takes
    missing values.
    """
    program = _program(bound)
    converted = partial(find_converted, program, bound.inputs, {})
    shown, lazily = bound.inputs, check_in_memory(_requirements(bound), bound.inputs)
    if streamed:
        shown, sd = sample_with_gaps(bound.binding, bound.inputs, converted)
    check_fits(bound.binding, shown.arrays)
    loaded = _load(shown)
    if not streamed:
        sd = measure_sd(bound.binding, bound.inputs, loaded, converted)
        raw = {key: a.values for key, a in loaded.items()}
        check_values(lazily, label_whole(bound.inputs, raw))
    arrays = _on_device(bound.binding, loaded)
    model = _without_gaps(bound, shown, arrays)
    whole = {} if streamed else arrays
    block = block_of(bound.binding, bound.inputs.sizes)
    arguments = arrange(bound.binding, whole, bound.inputs.dims, block)
    inputs = bound.inputs
    problem = Problem(model, arguments, block, bound.sites, bound.binding, inputs, lazily)
    return problem, whole, sd


def _program(bound: Bound) -> Program:
    binding = bound.binding.without_data()
    return Program(bound.model, binding, bound.sites, bound.inputs.dims, ())


def _requirements(bound: Bound) -> tuple[Requirement, ...]:
    """What outcomes, and inputs by which the model takes entries, must satisfy."""
    program, inputs, words = _program(bound), bound.inputs, describe_variables(bound.binding)
    labels = {**bound.binding.labels, **inputs.labels}
    latents = frozenset(n for n, site in bound.sites.items() if site.kind == "latent")
    kernel = PositionKernel(predictive, program, latents, structs_of(program, inputs), {})
    ranges = find_index_ranges(kernel, inputs, words, labels)
    return (*find_outcome_supports(program, inputs, {}), *ranges)


def for_masked(method: Any, bound: Bound, model: Callable) -> Any:
    """``method=`` for a model that leaves missing values out."""
    wrap = partial(masked, binding=bound.binding, sites=bound.sites)
    return on_model(method, bound.model, model, wrap)


def _fit_cells(bound: Bound, method: CellMethod, seed: int, store: Any, progress: bool) -> Fit:
    """An independent fit in each cell of ``per``."""
    # Masked whether or not there is a gap: a cell is fitted by one program wherever it lies.
    model = masked(bound.model, bound.binding, bound.sites)
    program = _program(bound)
    lazily = check_in_memory(_requirements(bound), bound.inputs)
    # Files are read in pieces: what xarray reads as a whole it keeps.
    known = {
        key: a.variable if is_in_memory(a) or a.chunks else a.variable.chunk("auto")
        for key, a in bound.inputs.arrays.items()
    }
    converted = partial(find_converted, program, bound.inputs, {})
    sd = measure_sd(bound.binding, bound.inputs, known, converted)
    for shown in cells_with_gaps(bound.binding, bound.inputs):
        _without_gaps(bound, shown, _on_device(bound.binding, _load(shown)))
    plan = plan_cells(replace(bound, model=model), method, seed, wanted(bound))
    shelf: Shelf = Memory(plan) if store is None else Stored(plan, store)
    drawn = fit_cells(plan, shelf, lazily, progress=progress)
    found = assemble(bound, labelled_draws(bound, drawn.samples, drawn.shape), drawn)
    return replace(found, data_sd=sd)


def _without_gaps(bound: Bound, inputs: Inputs, arrays: Mapping[str, jax.Array]) -> Callable:
    """The model, masked if these arrays have missing values."""
    block = block_of(bound.binding, inputs.sizes)
    arguments = arrange(bound.binding, arrays, inputs.dims, block)
    return prepare(bound.model, bound.binding, bound.sites, arguments, block)


def _load(inputs: Inputs) -> dict[str, xr.Variable]:
    # One Dataset, so that dask reads what variables share only once.
    numbered = {f"array {i}": a.variable for i, a in enumerate(inputs.arrays.values())}
    loaded = xr.Dataset(numbered).compute()
    return {key: loaded[n].variable for key, n in zip(inputs.arrays, numbered, strict=True)}


def _on_device(binding: Binding, loaded: Mapping[str, xr.Variable]) -> dict[str, jax.Array]:
    names = {s.key: s.name for a in binding.arguments for s in a.sources}
    return {k: jnp.asarray(to_device_dtype(names[k], v.values)) for k, v in loaded.items()}


def _recorded(fitted: Fit, method: Any, asked: Mapping[str, Any], seed: int) -> Fit:
    """The fit with how it was made."""
    options = options_of(fitted.binding, method, asked, seed)
    return replace(fitted, options=options, versions=versions())


def _looked_at(fitted: Fit) -> Fit:
    """The fit with what speaks against it, of which the caller is warned."""
    found = concerns_of(fitted)
    if found:
        warn("; ".join(found), ConvergenceWarning)
    return replace(fitted, concerns=found)
