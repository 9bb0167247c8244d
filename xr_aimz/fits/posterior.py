"""Define Fit: labelled draws of a posterior, with the binding and the data they came from."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import (
    AlignedInputs,
    Binding,
    check_dataset,
    describe_kind,
    object_name,
)
from xr_aimz.errors import OptionError
from xr_aimz.fits.diagnostics import summarize
from xr_aimz.options import parse_count, parse_seed
from xr_aimz.storage import lazy_name
from xr_aimz.tracing import Site, model_name


@dataclass(frozen=True, eq=False)
class Fit:
    """A model fitted to a Dataset.

    Parameters
    ----------
    model : callable
    binding : Binding
        Variables by argument.
    sites : mapping of name to Site
    posterior : Dataset
        Draws of latent sites and of deterministics that do not span every observation
        dimension, with dims ``(chain, draw, ...)``.
    sample_stats : Dataset
        By ArviZ's names: ``diverging``, ``energy``, ``lp``, ``acceptance_rate``,
        ``n_steps``, ``tree_depth``, ``step_size``. Empty for other methods than HMC.
    losses : DataArray, optional
        The loss of each step ``(step,)`` of variational inference, that of a batch scaled to
        all of the data. Beyond 20 000 steps of a minibatch fit each is the mean over 2, 4, 8
        ... steps, labelled by the last of them.
    params : mapping of name to pytree
        Values of ``param`` sites: networks and the like, the same for all draws.
    method : str
        The inference that made the draws.
    attrs : mapping of name to dict
        The attrs of the variable of each outcome, by argument.
    observed_data, constant_data : Dataset
        The outcomes' and the inputs' arrays, as ArviZ names them.
    concerns : tuple of str, optional
        Concerns that :func:`fit` found in the diagnostics, and warned of. None for draws made
        elsewhere, which may be lazy and are not checked.
    sampler : callable, optional
        The sampler that :meth:`sample` calls for further draws.
    state : mapping of name to array
        State that ``init=fit`` continues from: parameters, the optimizer's state, the random
        key and the position in the epoch. Empty for a method that cannot be continued.
    options : mapping of name to JSON value
        Options of the fit, as given and as defaulted: method, draws, steps, seed and so on.
    versions : mapping of package to version
        Packages that the fit was made with.
    lineage : mapping of str to str
        Attrs that every result of this fit has, beside ``aimz_fit`` (the token),
        ``aimz_seed`` and ``aimz_versions``.
    data_sd : Dataset
        The standard deviation of each variable over the data of the fit, with the dims ``per``:
        rounding to 32 bits is compared with it in a prediction. For draws made elsewhere,
        without the lazy variables.
    """

    model: Callable
    binding: Binding
    sites: Mapping[str, Site]
    posterior: xr.Dataset
    sample_stats: xr.Dataset
    losses: xr.DataArray | None
    params: Mapping[str, Any]
    method: str
    attrs: Mapping[str, Mapping[str, Any]]
    observed_data: xr.Dataset
    constant_data: xr.Dataset
    concerns: tuple[str, ...] | None = None
    sampler: Callable[[int, int], Fit] | None = field(default=None, repr=False)
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    versions: Mapping[str, str] = field(default_factory=dict, repr=False)
    lineage: Mapping[str, str] = field(default_factory=dict, repr=False)
    data_sd: xr.Dataset = field(default_factory=xr.Dataset, repr=False)

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        """Pickle a Fit with its model, but without its sampler, which holds compiled code."""
        # A requirement of dask: a model is most often a function of a notebook or of a test.
        import cloudpickle

        state = {f.name: getattr(self, f.name) for f in fields(self)}
        state["sampler"] = None if self.sampler is None else NoSamplerAfterPickle(self.method)
        try:
            return _unpickled, (cloudpickle.dumps(state),)
        except Exception as error:
            # An object of the model may raise an error of any class.
            raise pickle.PicklingError(
                f"this Fit by {self.method} cannot be pickled: {type(error).__name__}: {error}. "
                "Keep it with fit.save(store), and open it with xr_aimz.load_fit(store, model)"
            ) from error

    @cached_property
    def token(self) -> str:
        """Name of the draws and params: by content, or for lazy draws by their dask graph."""
        return fit_token(self.posterior, self.params)

    def sample(self, draws: int, *, seed: int = 0) -> Fit:
        """Sample further draws from the same posterior, as a new Fit.

        Chains continue from their last state, without warmup; a guide is drawn from again. No
        optimization is run, and no data are read.

        Parameters
        ----------
        draws : int
            Draws a chain.
        seed : int
            The same seed gives the same draws again. For draws beyond these, with labels of their
            own, sample from the new Fit.

        Returns
        -------
        Fit
            With the further draws only, eager. Their labels continue those of this fit, so
            predictions from both have different noise and can be joined along ``draw``.
            Its ``concerns`` are those of the further draws; no warning is raised.

        Raises
        ------
        OptionError
            The draws were made elsewhere, or ``draws`` is no positive int.

        Examples
        --------
        >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
        >>> def centre(y=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> ds = xr.Dataset({"y": ("time", np.arange(5.0))})
        >>> fit = ds.aimz.fit(centre, method="svi", draws=400, progress=False)
        >>> more = fit.sample(100)
        >>> both = xr.concat([fit.posterior, more.posterior], "draw")
        >>> both.draw.values.tolist()[-1]
        499
        """
        draws, seed = parse_count("draws", draws), parse_seed(seed)
        if self.sampler is None:
            raise OptionError(
                f"there is nothing to draw from: this fit holds {self.method}, and neither a "
                "guide nor chains. Call sample() on what ds.aimz.fit(...) returned"
            )
        call_options = {"draws": draws, "seed": seed, "sampled_from": self.token}
        options = {**self.options, **call_options}
        result = replace(self.sampler(draws, seed), data_sd=self.data_sd)
        return replace(result, options=options, versions=self.versions, lineage=self.lineage)

    def save(self, store: Any, *, mode: str = "w-") -> None:
        """Write the fit into a Zarr store, from which :func:`xr_aimz.load_fit` restores it.

        One store: the groups of ArviZ's schema, which any reader of Zarr opens, and one JSON
        spec. Nothing is pickled; the model itself is not saved, only its import path and its
        source, as text. See the page on the format.

        Parameters
        ----------
        store : path, URL or Zarr store
            As :func:`xr_aimz.to_zarr` takes it.
        mode : {"w-", "w"}
            ``"w-"`` refuses what exists, other than a save that was cut short; ``"w"``
            replaces it.

        Raises
        ------
        StoreError
            The store exists; or something cannot be saved without code, such as a constant of
            the model that is neither number, string nor array. Nothing was written.
        WriteError
            Writing failed on the way; the store is marked as incomplete.

        Notes
        -----
        The data that the fit was made on are saved with it. Lazy arrays are computed and written
        block by block.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
        >>> def centre(y=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> ds = xr.Dataset({"y": ("time", np.arange(5.0))})
        >>> fit = ds.aimz.from_posterior(centre, {"mu": np.zeros((2, 10))})
        >>> folder = tempfile.TemporaryDirectory()
        >>> fit.save(f"{folder.name}/fit.zarr")
        >>> loaded = xr_aimz.load_fit(f"{folder.name}/fit.zarr", centre)
        >>> loaded.token == fit.token
        True
        >>> folder.cleanup()
        """
        from xr_aimz.fits.saving import save_fit as save

        save(self, store, mode=mode)

    def diagnostics(self) -> xr.Dataset:
        """Compute R-hat, bulk and tail effective sample size of each variable, and divergences.

        Returns
        -------
        Dataset
            Eager. Each variable of the posterior with a dimension ``diagnostic``;
            ``divergences``, the number of divergent draws of each chain, if the method
            has them. For a fit with ``per``, each also has those dims.
        """
        table = summarize(self.posterior)
        if "diverging" in self.sample_stats:
            table["divergences"] = self.sample_stats.diverging.sum("draw")
        return table

    def to_datatree(self, **groups: xr.Dataset) -> xr.DataTree:
        """Convert to a DataTree in ArviZ's schema; add groups such as ``posterior_predictive=``.

        Examples
        --------
        >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
        >>> def centre(y=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> ds = xr.Dataset({"y": ("time", np.arange(5.0))})
        >>> fit = ds.aimz.from_posterior(centre, {"mu": np.zeros((2, 10))})
        >>> tree = fit.to_datatree(prior=ds.aimz.prior_predictive(centre, sites="mu"))
        >>> sorted(tree.children)
        ['observed_data', 'posterior', 'prior']
        """
        fit_groups = {
            "posterior": self.posterior,
            "sample_stats": self.sample_stats,
            "observed_data": self.observed_data,
            "constant_data": self.constant_data,
        }
        return xr.DataTree.from_dict(
            {name: ds for name, ds in {**fit_groups, **groups}.items() if ds.data_vars}
        )

    def __repr__(self) -> str:
        return "\n".join(["<xr_aimz.Fit>", *(f"  {k + ':':<12}{v}" for k, v in self._facts())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{_escape(k)}</th>"
            f"<td style='text-align:left'>{_escape(v)}</td></tr>"
            for k, v in self._facts()
        )
        parts = [
            f"<details open><summary>posterior</summary>{self.posterior._repr_html_()}</details>"
        ]
        if self.sample_stats.data_vars:
            parts.append(
                "<details><summary>sample_stats</summary>"
                f"{self.sample_stats._repr_html_()}</details>"
            )
        return f"<div><b>xr_aimz.Fit</b><table>{rows}</table>{''.join(parts)}</div>"

    def _facts(self) -> list[tuple[str, str]]:
        sizes = self.posterior.sizes
        bound = [
            f"{a.name} ← {', '.join(s.name for s in a.sources)}" for a in self.binding.arguments
        ]
        outcomes = ", ".join(self.sites[n].variable for n in self.observed)
        facts = [
            ("model", model_name(self.model)),
            ("method", self.method),
            ("draws", f"{sizes.get('chain', 0)} x {sizes.get('draw', 0)} (chain x draw)"),
            ("arguments", "; ".join(bound)),
            ("outcomes", outcomes),
            ("dims", f"{self.binding.dims} in layout {self.binding.layout!r}"),
            ("latents", ", ".join(f"{n}{tuple(a.dims[2:])}" for n, a in self.posterior.items())),
        ]
        if self.binding.per:
            facts.append(("per", self._cells()))
        if self.losses is not None:
            facts.append(("last loss", f"{float(self.losses[-1].median()):.6g}"))
        unchecked = "not looked for; see .diagnostics()"
        checked = "; ".join(self.concerns or ()) or "none that the diagnostics show"
        facts.append(("concerns", unchecked if self.concerns is None else checked))
        return facts

    def _cells(self) -> str:
        status = self.sample_stats.get("status")
        count = prod(self.posterior.sizes[d] for d in self.binding.per)
        fitted = "" if status is None else f", {int((status == 0).sum())} of them fitted"
        return f"{self.binding.per}: {count} cells{fitted}"

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites."""
        return tuple(name for name, site in self.sites.items() if site.kind == "observed")


@dataclass(frozen=True)
class NoSamplerAfterPickle:
    """Sampler of an unpickled fit: raises OptionError when called."""

    method: str

    def __call__(self, draws: int, seed: int) -> Fit:
        raise OptionError(
            f"there is nothing to draw from: this fit by {self.method} was pickled, which leaves "
            "its sampler behind. Call sample() on the fit itself, or keep it with fit.save(store) "
            "and xr_aimz.load_fit(store, model), which can go on from there"
        )

    def saved_state(self) -> None:
        """Return None: there is no sampler to store."""


def _unpickled(state: bytes) -> Fit:
    return Fit(**pickle.loads(state))


def labels_at_fit(fit: Fit, dim: str) -> pd.Index | None:
    """Return the labels that a dimension of the Dataset had at the fit; None if it had none."""
    for group in (fit.observed_data, fit.constant_data, fit.posterior):
        if dim in group.indexes:
            return group.indexes[dim]
    return None


def sizes_at_fit(fit: Fit) -> dict[str, int]:
    """Return the sizes of the observation dims at the fit, by dim; of those that the fit has."""
    sizes = {**fit.posterior.sizes, **fit.constant_data.sizes, **fit.observed_data.sizes}
    return {d: sizes[d] for d in fit.binding.dims if d in sizes}


def fit_token(posterior: xr.Dataset, params: Mapping[str, Any]) -> str:
    """Compute the sha256 of draws and params; a lazy array enters by its :func:`lazy_name`."""
    digest = hashlib.sha256()
    for name, variable in sorted(posterior.variables.items(), key=lambda v: str(v[0])):
        digest.update(repr((name, variable.dims, variable.dtype, variable.shape)).encode())
        digest.update(_content_bytes(variable))
    leaves, structure = jax.tree.flatten(dict(params))
    digest.update(str(structure).encode())
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _content_bytes(variable: xr.Variable) -> bytes:
    if variable.chunks is not None:
        return lazy_name(variable.data).encode()
    values = variable.values
    return repr(values.tolist()).encode() if values.dtype.kind == "O" else values.tobytes()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def check_fit(fit: Any, verb: str) -> None:
    """
    Refuse an object that is not a Fit.

    Parameters
    ----------
    fit : object
    verb : str
        Name of the calling function, for the error.

    Raises
    ------
    OptionError
    """
    if isinstance(fit, Fit):
        return
    remedy = "a Fit comes from ds.aimz.fit(model), ds.aimz.from_posterior(...) or load_fit(...)"
    if isinstance(fit, xr.Dataset | xr.DataTree | dict):
        remedy = "make a Fit of draws: ds.aimz.from_posterior(model, draws)"
    elif callable(fit):
        remedy = (
            f"fit the model first, fit = ds.aimz.fit({object_name(fit)}), and give that; or draw "
            f"from its prior: ds.aimz.prior_predictive({object_name(fit)})"
        )
    raise OptionError(f"{verb} takes a Fit; found {describe_kind(fit)}: {remedy}")


def check_model(ds: Any, model: Any, verb: str) -> None:
    """
    Refuse an object that is not a Dataset, and a Fit in place of a model.

    Raises
    ------
    OptionError
    """
    check_dataset(ds, verb)
    if isinstance(model, Fit):
        raise OptionError(
            f"{verb} takes a model; found a Fit of {object_name(model.model)}: give its model, "
            "fit.model"
        )


def cells_with_draws(fit: Fit, inputs: AlignedInputs) -> xr.DataArray | None:
    """Mask of the inputs' cells, over ``per``, that have draws; None if all of the fit's have."""
    per = fit.binding.per
    if not per or not (fit.sample_stats.status != 0).any():
        return None
    status = fit.sample_stats.status
    labels = {d: inputs.labels[d] for d in per if d in inputs.labels}
    return (status.sel(labels) == 0).drop_vars(list(status.coords))
