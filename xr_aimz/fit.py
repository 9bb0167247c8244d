"""A Dataset and a model become a Fit.

Binding, loading, inference and labels, in that order; what could be wrong is found
before the first array is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
from xr_aimz.device import run, to_device_dtype, traced
from xr_aimz.errors import ConvergenceWarning
from xr_aimz.gaps import sample_with_gaps
from xr_aimz.infer.methods import inference
from xr_aimz.infer.problem import Draws, Problem
from xr_aimz.infer.retarget import on_model
from xr_aimz.inputs import Inputs
from xr_aimz.kernel import Program, predictive
from xr_aimz.labelling import label
from xr_aimz.labels import label_words
from xr_aimz.memory import check_fits
from xr_aimz.missing import masked, prepare
from xr_aimz.model import Site
from xr_aimz.options import shows_progress
from xr_aimz.posterior import Fit

__all__ = ["assemble", "fit"]


def fit(
    ds: xr.Dataset,
    model: Callable,
    variables: Mapping[str, Any] | None = None,
    *,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
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
        Observation dimensions that the model couples (a lag, a scan): never split.
    layout : {"grid", "table"}
        ``"grid"`` hands over arrays that broadcast against the outcome; ``"table"``
        flattens the observation dims to one leading axis.
    method : optional
        ``"nuts"`` (default), ``"svi"``, or NumPyro's own: a kernel such as
        ``NUTS(model, target_accept_prob=0.95)``, an ``MCMC``, an ``SVI``, a ``SteinVI``, an
        autoguide class or instance. With missing values a copy of such an object is run, for
        a model that leaves them out; a guide written by hand is handed them as they are.
        ``SteinVI`` and ``ASVGD`` give posteriors that are too narrow; ``SVGD`` does not.
    draws : int, default 1000
        Draws a chain (MCMC), or of the guide (SVI), which come as one chain.
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
        once. Deterministics are left to :func:`xr_aimz.predict`.
    epochs : float, optional
        With ``batch``, in place of ``steps``: passes over the data.
    optimizer : optional
        For SVI: an optimizer of NumPyro or optax, or a learning rate for Adam (0.05), which
        shrinks to a thousandth over the last three tenths of the steps, in batches to a
        ten-thousandth.
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
    progress : bool, optional
        By default as :class:`xr_aimz.set_options` says.

    Returns
    -------
    Fit

    Warns
    -----
    ConvergenceWarning
        R-hat above 1.01, an effective sample size below 100 a chain, divergences, a loss
        that is not finite or still falling.

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
        A checkpoint that cannot be written or read.

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
    given |= {"draws": draws, "init": init, "batch": batch, "epochs": epochs}
    given |= {"patience": patience, "checkpoint": checkpoint}
    asked = {name: value for name, value in given.items() if value is not None}
    infer = inference(model, method, asked, seed, shows_progress(progress))
    bound = bind(ds, model, variables, dim=dim, core_dim=core_dim, layout=layout)
    # In batches nothing is loaded here but what shows how the model takes missing values.
    looked_at = bound.inputs if batch is None else sample_with_gaps(bound.binding, bound.inputs)
    check_fits(bound.binding, looked_at.arrays)
    arrays = _load(bound.binding, looked_at)
    block = block_of(bound.binding, looked_at.sizes)
    arguments = arrange(bound.binding, arrays, looked_at.dims, block)
    fitted_model = prepare(model, bound.binding, bound.sites, arguments, block)
    if fitted_model is not model:
        wrap = partial(masked, binding=bound.binding, sites=bound.sites)
        method = on_model(method, model, fitted_model, wrap)
        infer = inference(fitted_model, method, asked, seed, shows_progress(progress))
    if batch is not None:
        arrays, block = {}, block_of(bound.binding, bound.inputs.sizes)
        arguments = arrange(bound.binding, arrays, bound.inputs.dims, block)
    problem = Problem(fitted_model, arguments, block, bound.sites, bound.binding, bound.inputs)
    drawn = infer(problem)
    fitted = _labelled(bound, drawn, arrays)
    found = diagnostics.concerns(fitted.posterior, fitted.sample_stats, fitted.losses)
    _warn(tuple(found))
    return replace(fitted, concerns=tuple(found))


def _load(binding: Binding, inputs: Inputs) -> dict[str, jax.Array]:
    # One Dataset, so that dask reads what variables share only once.
    numbered = {f"array {i}": a.variable for i, a in enumerate(inputs.arrays.values())}
    loaded = xr.Dataset(numbered).compute()
    names = {s.key: s.name for a in binding.arguments for s in a.sources}
    arrays = {}
    for key, number in zip(inputs.arrays, numbered, strict=True):
        arrays[key] = jnp.asarray(to_device_dtype(names[key], loaded[number].values))
    return arrays


def _labelled(bound: Bound, drawn: Draws, arrays: Mapping[str, jax.Array], first: int = 0) -> Fit:
    """The draws with their labels, and the deterministics that belong with them."""
    values = dict(drawn.samples)
    wanted = [
        name
        for name, s in bound.sites.items()
        if s.kind == "deterministic" and not _spans(s, bound.binding)
    ]
    if wanted and arrays:
        values |= _deterministics(bound, drawn, arrays, tuple(wanted))
    chain, draw = np.arange(drawn.shape[0]), first + np.arange(drawn.shape[1])
    posterior = label(values, bound.sites, bound.binding, bound.inputs, chain, draw)
    fitted = assemble(bound, posterior, drawn)
    if drawn.more is None:
        return fitted
    return replace(fitted, more=partial(_further, bound, drawn, arrays, first + drawn.shape[1]))


def _further(
    bound: Bound,
    drawn: Draws,
    arrays: Mapping[str, jax.Array],
    first: int,
    draws: int,
    seed: int,
) -> Fit:
    """Further draws, numbered from ``first`` on."""
    assert drawn.more is not None
    # With the number: the same seed twice in a row must not give the same draws twice.
    own = int(np.random.SeedSequence([seed % 2**64, first]).generate_state(1)[0])
    found = drawn.more(draws, own)
    if not isinstance(found, Draws):
        found = replace(drawn, samples=found, shape=(drawn.shape[0], draws), stats={})
    fitted = _labelled(bound, found, arrays, first)
    seen = diagnostics.concerns(fitted.posterior, fitted.sample_stats, fitted.losses)
    return replace(fitted, concerns=tuple(seen))


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
    stats = {name: (("chain", "draw"), value) for name, value in drawn.stats.items()}
    losses = None
    if drawn.losses is not None:
        losses = _losses(drawn)
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
        state=drawn.state,
    )


def _losses(drawn: Draws) -> xr.DataArray:
    attrs = {"full_rate_steps": drawn.full_rate_steps, "epoch_steps": drawn.epoch_steps}
    losses = xr.DataArray(drawn.losses, dims="step", name="loss", attrs=attrs)
    if drawn.loss_every == 1:
        return losses
    # The last step behind each mean.
    return losses.assign_coords(step=np.arange(1, losses.size + 1) * drawn.loss_every - 1)


def _group(arrays: Mapping[str, xr.DataArray]) -> xr.Dataset:
    # A variable that bears a dimension's name is that dimension's coordinate already.
    return xr.Dataset({n: a for n, a in arrays.items() if n not in a.dims})


def _warn(concerns: tuple[str, ...]) -> None:
    if concerns:
        # The level of the caller of Dataset.aimz.fit.
        warnings.warn("; ".join(concerns), ConvergenceWarning, stacklevel=4)
