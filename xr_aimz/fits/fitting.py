"""Fit a model to a Dataset: check the options, run the inference, call the hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    Binding,
    BoundModel,
    Requirement,
    arrange,
    as_jax_arrays,
    bind,
    block_of,
    check_in_memory,
    check_not_cut,
    check_values,
    describe_variables,
    is_in_memory,
    jax_dtype,
    measure_sd,
    whole_block,
)
from xr_aimz.errors import (
    ConvergenceWarning,
    DimensionError,
    ModelError,
    OptionError,
    suggest,
    warn,
)
from xr_aimz.fits.assembly import (
    assemble,
    collect_concerns,
    label_draws,
    label_posterior,
    select_deterministics,
)
from xr_aimz.fits.configuration import fit_options
from xr_aimz.fits.memory import check_memory
from xr_aimz.fits.posterior import Fit, check_model
from xr_aimz.inference import (
    CellMethod,
    CellStore,
    InferenceProblem,
    InMemoryCells,
    PosteriorDraws,
    PreviousFit,
    ZarrCells,
    batch_sizes,
    cells_with_missing,
    check_batch_model,
    fit_cells,
    make_cell_inference,
    make_inference,
    mask_model,
    plan_cell_fits,
    prepare_masked,
    retarget,
    sample_missing,
)
from xr_aimz.kernel import (
    CouplingProblem,
    KernelSpec,
    PositionKernel,
    block_structs,
    find_coupling,
    find_index_ranges,
    find_integers_cast,
    find_outcome_supports,
    predictive,
    raise_if_coupled,
)
from xr_aimz.options import parse_seed, shows_progress
from xr_aimz.provenance import package_versions
from xr_aimz.tracing import factor_inputs

FitHook = Callable[[], AbstractContextManager[Callable[[Fit], Fit]]]

_registered_hooks: dict[str, FitHook] = {}


def add_fit_hook(name: str, watcher: FitHook) -> None:
    """Register a hook around every fit from now on; one of the same name is replaced.

    ``watcher()`` is a context for one fit: it is entered before, yields a function that takes the
    finished Fit and returns it, and is left with the exception of a fit that fails.
    """
    _registered_hooks[name] = watcher


@contextmanager
def fit_hooks() -> Iterator[Callable[[Fit], Fit]]:
    """Enter all hooks for one fit; yields a function that passes the finished Fit through each."""
    with ExitStack() as stack:
        callbacks = [
            stack.enter_context(watcher()) for watcher in tuple(_registered_hooks.values())
        ]

        def notify(fit: Fit) -> Fit:
            for callback in callbacks:
                fit = callback(fit)
            return fit

        yield notify


Infer = Callable[[InferenceProblem], PosteriorDraws]


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
    """Fit a NumPyro model to a Dataset; the model's arguments are bound to its variables.

    Missing values (NaN) are left out cell by cell: a cell whose outcome is missing, or an
    input of it, has no part in the likelihood. An outcome of several entries a cell is left out
    as a whole. A latent site of which all cells are missing has its prior. Constants are passed
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
        argument left out is bound to the variable of the same name.
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
        ``"grid"`` passes arrays that broadcast against the outcome; ``"table"``
        flattens the observation dims to one leading axis.
    method : optional
        ``"nuts"`` (default), ``"svi"``, ``"laplace"`` (a mode and its curvature), or NumPyro's
        own: a kernel such as ``NUTS(model, target_accept_prob=0.95)``, an ``MCMC``, an ``SVI``,
        a ``SteinVI``, an autoguide class or instance. With missing values a copy of such an
        object is run, for a model that leaves them out; a guide written by hand is passed them
        as they are. ``SteinVI`` and ``ASVGD`` give posteriors that are too narrow; ``SVGD`` does
        not. With ``per``: the three names, an ``HMC`` or ``NUTS``, or an autoguide's class.
    draws : int, default 1000
        Draws a chain (MCMC), or of the guide (SVI) or the Gaussian (Laplace), which come as
        one chain.
    chains, warmup : int, default 4 and 1000
        For MCMC. Chains run in parallel over devices where there are enough, else
        vectorized on one; those of kernels that cannot be vectorized, in turn.
    steps : int, default 10000
        For SVI and SteinVI: all steps, those of an earlier fit that is continued included.
    batch : int or mapping of dim to int, optional
        For SVI: the number of entries along an observation dimension in a step,
        ``{"time": 100}``; or about the number of observations, along the first dimension that
        is no ``core_dim``. The likelihood, and latents with an entry for each label, are scaled
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
        With ``batch``: a file for the state, written now and then. The same call continues
        from the file if it exists, and ends as if it had not been cut short.
    init : optional
        Values by site, or a strategy such as ``numpyro.infer.init_to_median``; with
        ``batch`` also a Fit, which is continued exactly. The learning rate of the default
        optimizer depends on ``steps``: for a Fit to be continued, pass an ``optimizer``.
    seed : int
    assume_independent : str or tuple of str, optional
        With ``batch``: batched dimensions along which the caller asserts that no cell depends on
        another. Without it, a model whose independence along them is not proven is refused; one
        whose values show a coupling is refused with it too.
    store : path, optional
        With ``per``: a Zarr store to which draws are written block by block, for a posterior
        larger than memory; ``fit.posterior`` is then lazy. The same call on a store that was
        cut short fits the blocks that are missing.
    progress : bool, optional
        Show a progress bar; by default as set by :class:`xr_aimz.set_options`.

    Returns
    -------
    Fit
        With ``per``, the posterior has dims ``(chain, draw, *per, ...)``, and
        ``sample_stats.status`` is a flag for each cell's fit. A cell without data, or one whose
        fit failed, has NaN draws, and does not affect the others.

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
        Raised before anything is loaded.
    MemoryLimitError
        Three copies of what would be loaded do not fit in memory.
    MissingValueError
        A missing value would affect more than its own cell: the model takes a mean or a lag of
        the variable, or makes a prior of it. Detected by changing the values filled in for it.
    OptionError
        An option that the method does not take; a batch larger than the data or along a
        core dim; a checkpoint or Fit that is not of this model, data and options.
    StoreError
        A checkpoint that cannot be written or read; ``store`` has content that is no
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
    seed = _check_arguments(ds, model, seed, store, per)
    arguments = {"chains": chains, "warmup": warmup, "steps": steps, "draws": draws, "init": init}
    arguments |= {"batch": batch, "epochs": epochs, "patience": patience, "checkpoint": checkpoint}
    arguments |= {"optimizer": optimizer, "assume_independent": assume_independent}
    options = {name: value for name, value in arguments.items() if value is not None}
    bind_to = partial(bind, ds, model, variables, dim=dim, core_dim=core_dim, layout=layout)
    with fit_hooks() as notify:
        if per:
            infer = make_cell_inference(model, method, options)
            fitted = _fit_cells(bind_to(per=per), infer, seed, store, shows_progress(progress))
        else:
            continued, is_shown = _with_previous(options), shows_progress(progress)
            make = partial(make_inference, passed_options=continued, seed=seed, progress=is_shown)
            fitted = _fit_at_once(make(model, method), bind_to(), method, make, options)
        return notify(_warn_of_concerns(_record_options(fitted, method, options, seed)))


def _with_previous(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with a Fit in ``init`` replaced by the state to continue from."""
    init = options.get("init")
    if not isinstance(init, Fit):
        return dict(options)
    return {**options, "init": PreviousFit(init.method, init.state)}


def _check_arguments(ds: Any, model: Any, seed: Any, store: Any, per: Any) -> int:
    """Check a fit's Dataset and model, and that ``store`` goes with ``per``; return its seed."""
    check_model(ds, model, "fit")
    if store is not None and not per:
        raise OptionError(f"store={str(store)!r} goes with per=; other fits are in memory")
    return parse_seed(seed)


def _check_batches(bound: BoundModel, batch: Any, independent_dims: tuple[str, ...]) -> None:
    """Refuse a model whose density of a batch depends on observations that are not in it."""
    binding, inputs = bound.binding, bound.inputs
    if unknown_dims := [d for d in independent_dims if d not in binding.dims]:
        raise DimensionError(
            f"assume_independent={unknown_dims!r} is not among the observation dimensions "
            f"{binding.dims!r}{suggest(binding.dims, unknown_dims)}"
        )
    sizes = batch_sizes(batch, binding, inputs)
    check_not_cut(binding, sizes, f"by batch={batch!r}")
    blocks = {d: n for d, n in sizes.items() if n < inputs.sizes[d]}
    if blocks:
        data_block = block_of(binding, inputs.sizes)
        check_batch_model(
            InferenceProblem(bound.model, {}, data_block, bound.sites, binding, inputs), sizes
        )
        names = tuple(n for n, s in bound.sites.items() if s.kind in ("latent", "observed"))
        program = KernelSpec(bound.model, binding.without_data(), bound.sites, inputs.dims, names)
        verdict = find_coupling(CouplingProblem(program, inputs, {}, {}), blocks, independent_dims)
        raise_if_coupled(verdict, names, [d for d in blocks if d not in independent_dims])
        _check_factors(bound, blocks)


def _check_factors(bound: BoundModel, dims: Collection[str]) -> None:
    """Refuse factors computed from batched data, which would count once for each batch."""
    binding, inputs = bound.binding, bound.inputs
    block = block_of(binding, inputs.sizes)
    arrays = {
        key: jax.ShapeDtypeStruct(a.shape, jax_dtype(a.dtype)) for key, a in inputs.arrays.items()
    }
    latents = {
        n: jax.ShapeDtypeStruct(s.shape, s.dtype)
        for n, s in bound.sites.items()
        if s.kind == "latent" and not s.scanned
    }
    dims_of = {key: set(inputs.dims[key]) for key in arrays}
    dims_of |= {name: set(bound.sites[name].dataset_dims) for name in latents}
    arrange_block = partial(arrange, binding, dims=inputs.dims, block=block)
    for name, sources in factor_inputs(bound.model, arrange_block, arrays, latents, block).items():
        batched = sorted(source for source in sources if dims_of[source] & set(dims))
        if batched:
            raise ModelError(
                f"numpyro.factor({name!r}, ...) is computed from {batched!r}, which are cut into "
                f"batches along {sorted(dims)!r}: it is undefined how often a batch's part of it "
                "counts. Write it as the density of an observed site, or leave batch= out"
            )


def _fit_at_once(
    infer: Infer,
    bound: BoundModel,
    method: Any,
    make: Callable[[Callable, Any], Infer],
    options: Mapping[str, Any],
) -> Fit:
    """Fit all data at once; ``make`` makes the inference anew for a model that is masked."""
    batch, dims = options.get("batch"), options.get("assume_independent", ())
    if batch is not None:
        _check_batches(bound, batch, (dims,) if isinstance(dims, str) else tuple(dims))
    problem, arrays, sd = build_problem(bound, streamed=batch is not None)
    if problem.model is not bound.model:
        infer = make(problem.model, retarget_method(method, bound, problem.model))
    return replace(label_posterior(bound, infer(problem), arrays), data_sd=sd)


def build_problem(
    bound: BoundModel, *, streamed: bool
) -> tuple[InferenceProblem, Mapping[str, jax.Array], xr.Dataset]:
    """Build the problem of an inference; also return its loaded arrays, and the data's sd.

    Of ``streamed`` data no arrays are returned; a few labels are loaded to check how the model
    uses missing values.
    """
    program = _make_program(bound)
    find_cast = partial(find_integers_cast, program, bound.inputs, {})
    to_load, lazy_checks = bound.inputs, check_in_memory(_find_requirements(bound), bound.inputs)
    if streamed:
        to_load, sd = sample_missing(bound.binding, bound.inputs, find_cast)
    check_memory(bound.binding, to_load.arrays)
    loaded = to_load.load()
    if not streamed:
        sd = measure_sd(bound.binding, bound.inputs, loaded, find_cast)
        raw = {key: a.values for key, a in loaded.items()}
        check_values(lazy_checks, whole_block(bound.inputs, raw))
    arrays = _to_device(bound.binding, loaded)
    model = _mask_missing(bound, to_load, arrays)
    data = {} if streamed else arrays
    block = block_of(bound.binding, bound.inputs.sizes)
    arguments = arrange(bound.binding, data, bound.inputs.dims, block)
    inputs = bound.inputs
    problem = InferenceProblem(
        model, arguments, block, bound.sites, bound.binding, inputs, lazy_checks
    )
    return problem, data, sd


def _make_program(bound: BoundModel) -> KernelSpec:
    binding = bound.binding.without_data()
    return KernelSpec(bound.model, binding, bound.sites, bound.inputs.dims, ())


def _find_requirements(bound: BoundModel) -> tuple[Requirement, ...]:
    """Find requirements on values: supports of outcomes, and ranges of inputs used as indices."""
    program, inputs, names = _make_program(bound), bound.inputs, describe_variables(bound.binding)
    labels = {**bound.binding.labels, **inputs.labels}
    latents = frozenset(n for n, site in bound.sites.items() if site.kind == "latent")
    kernel = PositionKernel(predictive, program, latents, block_structs(program, inputs), {})
    ranges = find_index_ranges(kernel, inputs, names, labels)
    return (*find_outcome_supports(program, inputs, {}), *ranges)


def retarget_method(method: Any, bound: BoundModel, model: Callable) -> Any:
    """Return ``method=`` with its model replaced by one that leaves missing values out."""
    wrap = partial(mask_model, binding=bound.binding, sites=bound.sites)
    return retarget(method, bound.model, model, wrap)


def _fit_cells(
    bound: BoundModel, method: CellMethod, seed: int, store: Any, progress: bool
) -> Fit:
    """Fit the model independently in each cell of ``per``."""
    # Masked with or without missing values: every cell is fitted by the same program.
    model = mask_model(bound.model, bound.binding, bound.sites)
    program = _make_program(bound)
    lazy_checks = check_in_memory(_find_requirements(bound), bound.inputs)
    # Files are read chunk by chunk: xarray caches an array that is read as a whole.
    variables = {
        key: a.variable if is_in_memory(a) or a.chunks else a.variable.chunk("auto")
        for key, a in bound.inputs.arrays.items()
    }
    find_cast = partial(find_integers_cast, program, bound.inputs, {})
    sd = measure_sd(bound.binding, bound.inputs, variables, find_cast)
    for cell in cells_with_missing(bound.binding, bound.inputs):
        _mask_missing(bound, cell, _to_device(bound.binding, cell.load()))
    plan = plan_cell_fits(replace(bound, model=model), method, seed, select_deterministics(bound))
    cells: CellStore = InMemoryCells(plan) if store is None else ZarrCells(plan, store)
    draws = fit_cells(plan, cells, lazy_checks, progress=progress)
    fitted = assemble(bound, label_draws(bound, draws.samples, draws.shape), draws)
    return replace(fitted, data_sd=sd)


def _mask_missing(
    bound: BoundModel, inputs: AlignedInputs, arrays: Mapping[str, jax.Array]
) -> Callable:
    """Return the model, masked if these arrays have missing values."""
    block = block_of(bound.binding, inputs.sizes)
    arguments = arrange(bound.binding, arrays, inputs.dims, block)
    return prepare_masked(bound.model, bound.binding, bound.sites, arguments, block)


def _to_device(binding: Binding, loaded: Mapping[str, xr.Variable]) -> dict[str, jax.Array]:
    return {key: jnp.asarray(a) for key, a in as_jax_arrays(binding, loaded).items()}


def _record_options(fitted: Fit, method: Any, options: Mapping[str, Any], seed: int) -> Fit:
    """Return the fit with its options and the versions of packages."""
    record = fit_options(fitted.binding, method, options, seed)
    return replace(fitted, options=record, versions=package_versions())


def _warn_of_concerns(fitted: Fit) -> Fit:
    """Return the fit with its concerns, and warn of them."""
    messages = collect_concerns(fitted)
    if messages:
        warn("; ".join(messages), ConvergenceWarning)
    return replace(fitted, concerns=messages)
