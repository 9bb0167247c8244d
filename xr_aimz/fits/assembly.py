"""Assemble a Fit from posterior draws: those of an inference, or draws made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import xarray as xr

from xr_aimz.binding import (
    Binding,
    BoundModel,
    align_memory,
    bind,
    block_of,
    extra_labels,
    is_in_memory,
    label_arrays,
    measure_sd,
    reorder_like,
)
from xr_aimz.errors import LabelError, ModelError
from xr_aimz.fits.configuration import fit_options, method_reference
from xr_aimz.fits.diagnostics import cell_concerns, concerns
from xr_aimz.fits.posterior import Fit, check_model
from xr_aimz.inference import FLAGS, PosteriorDraws, SavedSampler
from xr_aimz.kernel import (
    BlockData,
    DrawState,
    KernelSpec,
    find_integers_cast,
    predictive,
    run_draws,
    trace_outputs,
)
from xr_aimz.provenance import package_versions
from xr_aimz.random import hash_labels
from xr_aimz.tracing import Site

_STATUS_ATTRS = {
    "long_name": "how the fit of a cell went",
    "flag_values": np.arange(len(FLAGS), dtype=np.int8),
    "flag_meanings": " ".join(FLAGS),
}


def label_posterior(
    bound: BoundModel, result: PosteriorDraws, arrays: Mapping[str, jax.Array], first: int = 0
) -> Fit:
    """Label the draws ``(chain, draw, *dims)`` of an inference, and add the deterministics."""
    values, deterministics = dict(result.samples), select_deterministics(bound)
    if deterministics and arrays:
        values |= _compute_deterministics(bound, result, arrays, deterministics)
    fitted = assemble(bound, label_draws(bound, values, result.shape, first), result)
    if result.continue_ is None:
        return fitted
    return replace(fitted, sampler=LiveSampler(bound, result, arrays, first + result.shape[1]))


@dataclass(frozen=True, eq=False)
class LiveSampler:
    """Sampler of a fit, called as ``fit.sampler``: samples draws numbered from ``first`` on."""

    bound: BoundModel
    draws: PosteriorDraws
    arrays: Mapping[str, jax.Array]
    first: int

    def __call__(self, draws: int, seed: int) -> Fit:
        sampled = self.draws
        assert sampled.continue_ is not None
        # With the number of the first draw: one seed twice in a row must not give the same draws.
        call_seed = int(np.random.SeedSequence([seed % 2**64, self.first]).generate_state(1)[0])
        result = sampled.continue_(draws, call_seed)
        if not isinstance(result, PosteriorDraws):
            result = replace(sampled, samples=result, shape=(sampled.shape[0], draws), stats={})
        fitted = label_posterior(self.bound, result, self.arrays, self.first)
        return replace(fitted, concerns=collect_concerns(fitted))

    def saved_state(self) -> SavedSampler | None:
        """Return the sampler's state for a store; None for a method whose state is not stored."""
        origin = self.draws.origin
        if origin is None:
            return None
        return SavedSampler(
            replace(origin, by=method_reference(origin.by)), self.bound.inputs, self.first
        )


def select_deterministics(bound: BoundModel) -> tuple[str, ...]:
    """Select the deterministics of a posterior: those that do not span every observation dim."""
    sites = bound.sites.items()
    return tuple(n for n, s in sites if s.kind == "deterministic" and not _spans(s, bound.binding))


def label_draws(
    bound: BoundModel, values: Mapping[str, Any], shape: tuple[int, int], first: int = 0
) -> xr.Dataset:
    """Label arrays ``(chain, draw, *dims)`` by site; the draws are numbered from ``first`` on."""
    chain, draw = np.arange(shape[0]), first + np.arange(shape[1])
    return label_arrays(values, bound.sites, bound.binding, bound.inputs, chain, draw)


def _spans(site: Site, binding: Binding) -> bool:
    return bool(binding.dims) and set(binding.dims) <= set(site.dataset_dims)


def _compute_deterministics(
    bound: BoundModel,
    result: PosteriorDraws,
    arrays: Mapping[str, jax.Array],
    names: tuple[str, ...],
) -> dict[str, np.ndarray]:
    binding, inputs = bound.binding.without_data(), bound.inputs
    program = KernelSpec(bound.model, binding, bound.sites, inputs.dims, names)
    chains, draws = result.shape
    latents = {n: v.reshape(chains * draws, *v.shape[2:]) for n, v in result.samples.items()}
    # Every latent site has a value, so no key is used.
    unused_keys = np.zeros((chains * draws, 2), np.uint32)
    draw_state = DrawState(dict.fromkeys(program.random_sites, unused_keys), latents)
    block_data = BlockData(
        # With the outcomes: a deterministic may be computed from observed values.
        arrays={key: np.asarray(a) for key, a in arrays.items()},
        params=dict(result.params),
        words={
            d: hash_labels(d, inputs.labels.get(d), size=inputs.sizes[d]) for d in binding.dims
        },
    )
    block = block_of(binding, inputs.sizes)
    kernel = predictive(program, inputs.sizes)
    draw_structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), draw_state)
    _, name = trace_outputs(kernel, block, draw_structs, block_data)
    values = run_draws(name, lambda: kernel, block, draw_state, block_data)
    return {n: _reshape_to_site(bound, n, v, (chains, draws)) for n, v in values.items()}


def _reshape_to_site(
    bound: BoundModel, name: str, value: np.ndarray, sample_shape: tuple[int, int]
) -> np.ndarray:
    return value.reshape(*sample_shape, *bound.sites[name].shape)


def assemble_prior(bound: BoundModel, draws: int) -> Fit:
    """Assemble a Fit without a posterior: one chain of ``draws`` draws without any site."""
    labels = {"chain": np.arange(1), "draw": np.arange(draws)}
    empty = xr.Dataset(coords={d: (d, n) for d, n in labels.items()})
    method = getattr(bound.model, "__name__", "a model")
    return assemble(bound, empty, PosteriorDraws({}, (1, draws), method))


def assemble(bound: BoundModel, posterior: xr.Dataset, result: PosteriorDraws) -> Fit:
    """Assemble a Fit from a labelled posterior and the other results of the inference."""
    binding, inputs = bound.binding, bound.inputs
    arrays = inputs.arrays
    observed = {s.name: arrays[s.key] for a in binding.outcomes for s in a.sources}
    constant = {s.name: arrays[s.key] for a in binding.inputs for s in a.sources}
    chains = {d: posterior[d] for d in ("chain", "draw") if d in posterior.coords}
    stats: dict[str, Any] = {
        name: (("chain", "draw", *binding.per), v) for name, v in result.stats.items()
    }
    if result.max_tree_depth is not None:
        stats["n_steps"] = (*stats["n_steps"], {"max_tree_depth": result.max_tree_depth})
    cells = {d: posterior[d] for d in binding.per if d in posterior.coords}
    chains |= cells
    if result.status is not None:
        stats["status"] = (binding.per, result.status, _STATUS_ATTRS)
    losses = None
    if result.losses is not None:
        losses = _label_losses(result, binding.per, cells)
    return Fit(
        model=bound.model,
        binding=binding,
        sites=bound.sites,
        posterior=posterior.assign_attrs(inference_library="numpyro", method=result.method),
        sample_stats=xr.Dataset(stats, coords=chains if stats else None),
        losses=losses,
        params=result.params,
        method=result.method,
        attrs={a.name: dict(arrays[a.sources[0].key].attrs) for a in binding.outcomes},
        observed_data=_make_dataset(observed),
        constant_data=_make_dataset(constant),
        concerns=result.concerns or None,
        state=result.state,
    )


def _label_losses(
    result: PosteriorDraws, per: tuple[str, ...], coords: Mapping[str, Any]
) -> xr.DataArray:
    attrs = {"full_rate_steps": result.full_rate_steps, "epoch_steps": result.epoch_steps}
    losses = xr.DataArray(result.losses, coords, ("step", *per), name="loss", attrs=attrs)
    if result.loss_steps:
        return losses.assign_coords(step=list(result.loss_steps))
    if result.loss_every == 1:
        return losses
    # Each loss is a mean over `loss_every` steps, labelled by the last of them.
    return losses.assign_coords(step=np.arange(1, losses.size + 1) * result.loss_every - 1)


def _make_dataset(arrays: Mapping[str, xr.DataArray]) -> xr.Dataset:
    # A variable with a dimension's name is that dimension's coordinate.
    coords = {n: a for n, a in arrays.items() if n in a.dims}
    return xr.Dataset({n: a for n, a in arrays.items() if n not in coords}, coords)


def collect_concerns(fitted: Fit) -> tuple[str, ...]:
    """Collect the concerns about a fit: sentences with figures; empty if there are none."""
    results = (fitted.posterior, fitted.sample_stats, fitted.losses)
    per = fitted.binding.per
    messages = cell_concerns(*results, per) if per else concerns(*results)
    return (*(fitted.concerns or ()), *messages)


def from_posterior(
    ds: xr.Dataset,
    model: Callable,
    posterior: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
    layout: str = "grid",
    params: Mapping[str, Any] | None = None,
) -> Fit:
    """Make a Fit from draws made elsewhere; no inference is run.

    Parameters
    ----------
    ds : Dataset
        Contains the variables of the model's arguments; the outcome may be absent.
    model : callable
    posterior : mapping, Dataset or DataTree
        Draws by site name: arrays ``(chain, draw, ...)``; a Dataset with those dims; or
        an ArviZ DataTree with a group ``posterior``.
    variables, dim, core_dim, layout
        As in :func:`fit`.
    params : mapping, optional
        Values of ``param`` sites.

    Raises
    ------
    ModelError
        A latent site has no draws.
    """
    check_model(ds, model, "from_posterior")
    group = _ensure_draw_dims(_as_dataset(posterior))
    bound = bind(
        ds,
        model,
        variables,
        dim=dim,
        core_dim=core_dim,
        layout=layout,
        data_sites=_site_names(group),
    )
    untrained = [
        n for n, s in bound.sites.items() if s.has_initial_value and n not in (params or {})
    ]
    if untrained:
        raise ModelError(
            f"param sites {untrained!r} would be left at their initial values; give their trained "
            "values: params={...}"
        )
    draws = _collect_latents(group, bound)
    shape = (draws.sizes.get("chain", 1), draws.sizes.get("draw", 1))
    result = PosteriorDraws({}, shape, "draws made elsewhere", params=dict(params or {}))
    counts = {"chains": shape[0], "draws": shape[1]}
    options = fit_options(bound.binding, result.method, counts, seed=None)
    fitted = assemble(bound, draws, result)
    sd = _measure_sd_in_memory(bound, result.params)
    return replace(fitted, options=options, versions=package_versions(), data_sd=sd)


def _collect_latents(posterior: xr.Dataset, bound: BoundModel) -> xr.Dataset:
    """Collect the draws of the latent sites, on the labels of the bound Dataset."""
    latent = [name for name, s in bound.sites.items() if s.kind == "latent"]
    site_draws = {name: _find_draws(posterior, name) for name in latent}
    arrays = [_relabel(site_draws[name], name, bound).to_dataset() for name in latent]
    draws = xr.merge(arrays, join="exact") if arrays else xr.Dataset()
    # A copy: what becomes of the user's arrays is no business of the fit.
    draws = draws.map(_copy_draws)
    # Noise is addressed by the labels of draws too: without labels, a selection of the draws
    # would be numbered from 0 and get other noise.
    return draws.assign_coords({d: draws[d] for d in ("chain", "draw") if d in draws.dims})


def _copy_draws(array: xr.DataArray) -> xr.DataArray:
    if array.dtype.kind not in "biuf":
        raise ModelError(
            f"draws of {str(array.name)!r} have dtype {str(array.dtype)!r}; give numbers"
        )
    return array.copy(data=align_memory(array.values)) if is_in_memory(array) else array


def _measure_sd_in_memory(bound: BoundModel, params: Mapping[str, Any]) -> xr.Dataset:
    """Measure the standard deviations of the variables in memory; lazy ones are not read."""
    arrays = {k: a.variable for k, a in bound.inputs.arrays.items() if a.variable._in_memory}
    program = KernelSpec(bound.model, bound.binding, bound.sites, bound.inputs.dims, ())
    find_cast = partial(find_integers_cast, program, bound.inputs, params)
    return measure_sd(bound.binding, bound.inputs, arrays, find_cast)


def _as_dataset(posterior: Any) -> xr.Dataset:
    if isinstance(posterior, xr.DataTree):
        return posterior["posterior"].to_dataset()
    if isinstance(posterior, xr.Dataset):
        return posterior
    if isinstance(posterior, Mapping):
        arrays = {str(n): np.asarray(v) for n, v in posterior.items()}
        flat = [n for n, v in arrays.items() if v.ndim < 2]
        if flat:
            raise ModelError(f"draws of {flat!r} must have dims (chain, draw, ...)")
        return xr.Dataset(
            {
                n: (("chain", "draw", *(f"{n}_dim_{i}" for i in range(v.ndim - 2))), v)
                for n, v in arrays.items()
            }
        )
    # arviz < 1 returns an InferenceData: its groups are attributes.
    if hasattr(posterior, "posterior"):
        return posterior.posterior
    raise ModelError(
        f"posterior={type(posterior).__name__}: give a mapping of arrays (chain, draw, ...), a "
        "Dataset or a DataTree"
    )


def _ensure_draw_dims(posterior: xr.Dataset) -> xr.Dataset:
    """Add dims ``chain`` and ``draw`` where absent, and refuse duplicate labels of them."""
    posterior = posterior.expand_dims([d for d in ("chain", "draw") if d not in posterior.dims])
    for d in ("chain", "draw"):
        index = posterior.indexes.get(d)
        if index is not None and not index.is_unique:
            raise LabelError(
                f"the posterior has duplicate labels of {d!r}, "
                f"{list(index[index.duplicated()][:3])!r} among them, and their draws would share "
                "their noise; number them anew"
            )
    return posterior


def _site_names(draws: xr.Dataset) -> set[str]:
    return {str(n) for n in draws.data_vars} | {str(n).replace(".", "/") for n in draws.data_vars}


def _find_draws(posterior: xr.Dataset, site: str) -> xr.DataArray:
    for name in (site, site.replace("/", ".")):
        if name in posterior.data_vars:
            return posterior[name]
    raise AssertionError(site)  # bind() has refused a latent site without draws


def _relabel(array: xr.DataArray, name: str, bound: BoundModel) -> xr.DataArray:
    """Return draws ``(chain, draw, *dims)`` with the array's labels if any, else the Dataset's."""
    site = bound.sites[name]
    dims = ("chain", "draw", *site.dataset_dims)
    variable = site.variable
    if set(array.dims) == set(dims):
        return _reorder_labels(array.transpose(*dims).rename(variable), bound)
    values = array.transpose("chain", "draw", ...).values
    shape = tuple(n for d, n in zip(site.dims, site.shape, strict=True) if d is not None)
    if values.shape[2:] not in (shape, site.shape):
        raise ModelError(
            f"draws of {name!r} have dims {array.dims!r} and shape {array.shape!r}; the model's "
            f"site has dims {dims!r} and shape {site.shape!r}"
        )
    values = values.reshape(values.shape[:2] + site.shape)
    coords = {d: array.coords[d].values for d in ("chain", "draw") if d in array.coords}
    return label_arrays({name: values}, bound.sites, bound.binding, bound.inputs, **coords)[
        variable
    ]


def _reorder_labels(array: xr.DataArray, bound: BoundModel) -> xr.DataArray:
    """Reorder labels of dims other than observation dims to the order of the binding."""
    for d, index in extra_labels(bound.binding).items():
        if d not in bound.binding.dims:
            what = f"the posterior of {array.name!r}"
            array = reorder_like(
                array, d, index, what, f"give all labels of {d!r} that the model has"
            )
    return array
