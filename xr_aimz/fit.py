"""A Dataset and a model become a Fit.

Binding, loading, inference and labels, in that order; what could be wrong is found
before the first array is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from xr_aimz import diagnostics
from xr_aimz.axes import dims_in_dataset
from xr_aimz.binding import Binding, arrange, block_of
from xr_aimz.bound import Bound, bind
from xr_aimz.cell_diagnostics import cell_concerns
from xr_aimz.device import run, to_device_dtype, traced
from xr_aimz.errors import BindingError, ConvergenceWarning, OptionError
from xr_aimz.infer.cells import FLAGS, CellMethod
from xr_aimz.infer.methods import cell_inference, inference
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Program, predictive
from xr_aimz.labelling import label
from xr_aimz.labels import label_words
from xr_aimz.model import Site
from xr_aimz.options import shows_progress
from xr_aimz.per_cell import Memory, Shelf, fit_cells, plan_cells
from xr_aimz.posterior import Fit
from xr_aimz.shelf import Stored

__all__ = ["assemble", "fit"]

_STATUS = {
    "long_name": "how the fit of a cell went",
    "flag_values": np.arange(len(FLAGS), dtype=np.int8),
    "flag_meanings": " ".join(FLAGS),
}


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
    optimizer: Any = None,
    init: Any = None,
    seed: int = 0,
    store: str | Path | None = None,
    progress: bool | None = None,
) -> Fit:
    """Fit a NumPyro model to a Dataset: its arguments are the Dataset's own variables.

    Parameters
    ----------
    ds : Dataset
        Numpy- or dask-backed; the variables that the model takes are loaded.
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
        Observation dimensions that the model couples (a lag, a scan): never split.
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
        an autoguide class or instance. With ``per``: the three names, an ``HMC`` or ``NUTS``, or
        an autoguide's class.
    draws : int, default 1000
        Draws a chain (MCMC), or of the guide (SVI) or the Gaussian (Laplace), which come as
        one chain.
    chains, warmup : int, default 4 and 1000
        For MCMC. Chains run in parallel over devices where there are enough, else
        vectorized on one.
    steps : int, default 10000
        For SVI.
    optimizer : optional
        For SVI: an optimizer of NumPyro or optax, or a learning rate for Adam (0.05), which
        shrinks to a thousandth over the last three tenths of the steps.
    init : optional
        Values by site, or a strategy such as ``numpyro.infer.init_to_median``.
    seed : int
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
        R-hat above 1.01, an effective sample size below 100 a chain, divergences, a loss
        that is not finite or still falling.

    Raises
    ------
    BindingError, MissingVariableError, DimensionError, DtypeError, LabelError, ModelError
        Before anything is loaded.
    OptionError
        An option that the method does not take.
    StoreError
        ``store`` holds something else than a part of this fit.

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
    given = {"chains": chains, "warmup": warmup, "steps": steps, "optimizer": optimizer}
    given |= {"draws": draws, "init": init}
    asked = {name: value for name, value in given.items() if value is not None}
    names: dict[str, Any] = {"dim": dim, "core_dim": core_dim, "layout": layout}
    if per:
        infer_cell = cell_inference(model, method, asked)
        bound = bind(ds, model, variables, per=per, **names)
        return _looked_at(_fit_cells(bound, infer_cell, seed, store, shows_progress(progress)))
    if store is not None:
        raise OptionError(f"store={str(store)!r} goes with per=; other fits are kept in memory")
    infer = inference(model, method, asked, seed, shows_progress(progress))
    bound = bind(ds, model, variables, **names)
    arrays = _load(bound.binding, bound.inputs)
    block = block_of(bound.binding, bound.inputs.sizes)
    arguments = arrange(bound.binding, arrays, bound.inputs.dims, block)
    drawn = infer(Problem(model, arguments, block, bound.sites))
    return _looked_at(_labelled(bound, drawn, arrays))


def _looked_at(fitted: Fit) -> Fit:
    """The fit with what speaks against it, of which the caller is warned."""
    about = (fitted.posterior, fitted.sample_stats, fitted.losses)
    per = fitted.binding.per
    found = cell_concerns(*about, per) if per else diagnostics.concerns(*about)
    _warn(tuple(found))
    return replace(fitted, concerns=tuple(found))


def _fit_cells(bound: Bound, method: CellMethod, seed: int, store: Any, progress: bool) -> Fit:
    """An independent fit in each cell of ``per``."""
    plan = plan_cells(bound, method, seed, _wanted(bound))
    shelf: Shelf = Memory(plan) if store is None else Stored(plan, store)
    drawn = fit_cells(plan, shelf, progress=progress)
    return assemble(bound, _posterior(bound, drawn.samples, drawn.shape), drawn)


def _load(binding: Binding, inputs: Inputs) -> dict[str, jax.Array]:
    # One Dataset, so that dask reads what variables share only once.
    numbered = {f"array {i}": a.variable for i, a in enumerate(inputs.arrays.values())}
    loaded = xr.Dataset(numbered).compute()
    names = {s.key: s.name for a in binding.arguments for s in a.sources}
    arrays = {}
    for key, number in zip(inputs.arrays, numbered, strict=True):
        values = to_device_dtype(names[key], loaded[number].values)
        if values.dtype.kind == "f" and (count := int(np.isnan(values).sum())):
            raise BindingError(
                f"variable {names[key]!r} has {count} missing values (NaN) of {values.size}; "
                "every density would be NaN. Drop or fill them: ds.dropna(...), ds.fillna(...)"
            )
        arrays[key] = jnp.asarray(values)
    return arrays


def _labelled(bound: Bound, drawn: Draws, arrays: Mapping[str, jax.Array]) -> Fit:
    """The draws with their labels, and the deterministics that belong with them."""
    values, wanted = dict(drawn.samples), _wanted(bound)
    if wanted:
        values |= _deterministics(bound, drawn, arrays, wanted)
    return assemble(bound, _posterior(bound, values, drawn.shape), drawn)


def _wanted(bound: Bound) -> tuple[str, ...]:
    """The deterministics that belong in a posterior."""
    sites = bound.sites.items()
    return tuple(n for n, s in sites if s.kind == "deterministic" and not _spans(s, bound.binding))


def _posterior(bound: Bound, values: Mapping[str, Any], shape: tuple[int, int]) -> xr.Dataset:
    chain, draw = (np.arange(n) for n in shape)
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
    cells = {d: posterior[d] for d in binding.per if d in posterior.coords}
    chains |= cells
    if drawn.status is not None:
        stats["status"] = (binding.per, drawn.status, _STATUS)
    losses = None
    if drawn.losses is not None:
        attrs = {"full_rate_steps": drawn.full_rate_steps}
        dims = ("step", *binding.per)
        losses = xr.DataArray(drawn.losses, cells, dims, name="loss", attrs=attrs)
        losses = losses.assign_coords(step=list(drawn.loss_steps)) if drawn.loss_steps else losses
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
    )


def _group(arrays: Mapping[str, xr.DataArray]) -> xr.Dataset:
    # A variable that bears a dimension's name is that dimension's coordinate already.
    return xr.Dataset({n: a for n, a in arrays.items() if n not in a.dims})


def _warn(concerns: tuple[str, ...]) -> None:
    if concerns:
        # The level of the caller of Dataset.aimz.fit.
        warnings.warn("; ".join(concerns), ConvergenceWarning, stacklevel=5)
