"""A fit: labelled draws, and the binding they came from.

A Fit is one object with an identity and no state: everything that a prediction needs,
and everything that a person wants to see of an inference.
"""

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

from xr_aimz import diagnostics
from xr_aimz.binding import Binding
from xr_aimz.errors import OptionError
from xr_aimz.identity import lazy_name
from xr_aimz.labelling import result_name
from xr_aimz.model import Site
from xr_aimz.whole_numbers import parse_count, parse_seed

__all__ = ["Fit", "NotPickled", "labels_at_fit", "sizes_at_fit", "token_of"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A model fitted to a Dataset.

    Parameters
    ----------
    model : callable
    binding : Binding
        Which variable is which argument.
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
        How the draws were made.
    attrs : mapping of name to dict
        The attrs of the variable of each outcome, by argument.
    observed_data, constant_data : Dataset
        The outcomes' and the inputs' arrays, as ArviZ names them.
    concerns : tuple of str, optional
        What :func:`fit` found to speak against the draws, and warned of. None for draws
        made elsewhere, which may be lazy: nobody has looked.
    more : callable, optional
        What :meth:`sample` takes further draws from.
    state : mapping of name to array
        What ``init=fit`` goes on from: parameters, the optimizer's state, the random key and
        the place in the epoch. Empty where a method cannot go on.
    options : mapping of name to what JSON can hold
        How the fit was made, as given and as defaulted: method, draws, steps, seed and so on.
    versions : mapping of package to version
        What the fit was made with.
    lineage : mapping of str to str
        What every result of this fit carries in its attrs, beside ``aimz_fit`` (the token),
        ``aimz_seed`` and ``aimz_versions``.
    data_sd : Dataset
        The standard deviation of each variable over the data of the fit, with the dims ``per``:
        what rounding to 32 bits is compared with in a prediction. Without the variables of draws
        made elsewhere for a lazy Dataset.
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
    more: Callable[[int, int], Fit] | None = field(default=None, repr=False)
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    versions: Mapping[str, str] = field(default_factory=dict, repr=False)
    lineage: Mapping[str, str] = field(default_factory=dict, repr=False)
    data_sd: xr.Dataset = field(default_factory=xr.Dataset, repr=False)

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        """Pickle a Fit with its model; not with what draws further, which holds compiled code."""
        # dask's own requirement: a model is most often a function of a notebook or of a test.
        import cloudpickle

        state = {f.name: getattr(self, f.name) for f in fields(self)}
        state["more"] = None if self.more is None else NotPickled(self.method)
        try:
            return _unpickled, (cloudpickle.dumps(state),)
        except Exception as error:
            # Whatever an object of the model's raises, of any class.
            raise pickle.PicklingError(
                f"this Fit by {self.method} cannot be pickled: {type(error).__name__}: {error}. "
                "Keep it with fit.save(store), and open it with xr_aimz.load_fit(store, model)"
            ) from error

    @cached_property
    def token(self) -> str:
        """A name for the draws and params: by content, or by what lazy draws are made from."""
        return token_of(self.posterior, self.params)

    def sample(self, draws: int, *, seed: int = 0) -> Fit:
        """Further draws from the same posterior, as a Fit of their own.

        Chains go on from their last state, without warmup; a guide is drawn from again. No
        optimization is run, and no data are read.

        Parameters
        ----------
        draws : int
            Draws a chain.
        seed : int
            The same seed gives the same draws again. Other draws bear other labels: for still
            more of them sample from the new Fit.

        Returns
        -------
        Fit
            With the further draws only, eager. Their labels go on from the last of this fit,
            so predictions from both have noise of their own and can be joined along ``draw``.
            Its ``concerns`` are those of the further draws; nothing is warned of.

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
        if self.more is None:
            raise OptionError(
                f"there is nothing to draw from: this fit holds {self.method}, and neither a "
                "guide nor chains. Call sample() on what ds.aimz.fit(...) returned"
            )
        further = {"draws": draws, "seed": seed, "sampled_from": self.token}
        options = {**self.options, **further}
        found = replace(self.more(draws, seed), data_sd=self.data_sd)
        return replace(found, options=options, versions=self.versions, lineage=self.lineage)

    def save(self, store: Any, *, mode: str = "w-") -> None:
        """Write the fit into a Zarr store, from which :func:`xr_aimz.load_fit` makes it again.

        One store: the groups of ArviZ's schema, which any reader of Zarr opens, and one JSON
        spec. Nothing is pickled; the model itself is not kept, only where it comes from and
        its source, as text. See the page on the format.

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
            The store exists; or something cannot be kept without code, such as a constant of
            the model that is neither number, string nor array. Nothing was written.
        WriteError
            Writing failed on the way; what is there is not taken for whole.

        Notes
        -----
        The data that the fit was made on are kept with it. What is lazy is computed and
        written block by block.

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
        from xr_aimz.saving import save

        save(self, store, mode=mode)

    def diagnostics(self) -> xr.Dataset:
        """R-hat, bulk and tail effective sample size of each variable, and divergences.

        Returns
        -------
        Dataset
            Eager. Each variable of the posterior with a dimension ``diagnostic``;
            ``divergences``, the number of divergent draws of each chain, where the
            method has them. Of a fit with ``per``, each is a map over those dims.
        """
        table = diagnostics.summarize(self.posterior)
        if "diverging" in self.sample_stats:
            table["divergences"] = self.sample_stats.diverging.sum("draw")
        return table

    def to_datatree(self, **groups: xr.Dataset) -> xr.DataTree:
        """The fit in ArviZ's schema, with any further groups (``posterior_predictive=``...).

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
        own = {
            "posterior": self.posterior,
            "sample_stats": self.sample_stats,
            "observed_data": self.observed_data,
            "constant_data": self.constant_data,
        }
        return xr.DataTree.from_dict(
            {name: ds for name, ds in {**own, **groups}.items() if ds.data_vars}
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
        outcomes = ", ".join(result_name(self.binding, self.sites[n]) for n in self.observed)
        facts = [
            ("model", getattr(self.model, "__name__", repr(self.model))),
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
        unseen = "not looked for; see .diagnostics()"
        seen = "; ".join(self.concerns or ()) or "none that the diagnostics show"
        facts.append(("concerns", unseen if self.concerns is None else seen))
        return facts

    def _cells(self) -> str:
        status = self.sample_stats.get("status")
        count = prod(self.posterior.sizes[d] for d in self.binding.per)
        fitted = "" if status is None else f", {int((status == 0).sum())} of them fitted"
        return f"{self.binding.per}: {count} cells{fitted}"

    @property
    def observed(self) -> tuple[str, ...]:
        """The names of the observed sites."""
        return tuple(name for name, site in self.sites.items() if site.kind == "observed")


@dataclass(frozen=True)
class NotPickled:
    """Refuse further draws of a fit that came through pickle."""

    method: str

    def __call__(self, draws: int, seed: int) -> Fit:
        raise OptionError(
            f"there is nothing to draw from: this fit by {self.method} was pickled, which leaves "
            "its sampler behind. Call sample() on the fit itself, or keep it with fit.save(store) "
            "and xr_aimz.load_fit(store, model), which can go on from there"
        )

    def kept(self) -> None:
        """Nothing for a store to keep."""


def _unpickled(state: bytes) -> Fit:
    return Fit(**pickle.loads(state))


def labels_at_fit(fit: Fit, dim: str) -> pd.Index | None:
    """The labels that a dimension of the Dataset had at the fit; None if it had none."""
    for group in (fit.observed_data, fit.constant_data, fit.posterior):
        if dim in group.indexes:
            return group.indexes[dim]
    return None


def sizes_at_fit(fit: Fit) -> dict[str, int]:
    """The sizes that the observation dimensions had at the fit, where they are known."""
    sizes = {**fit.posterior.sizes, **fit.constant_data.sizes, **fit.observed_data.sizes}
    return {d: sizes[d] for d in fit.binding.dims if d in sizes}


def token_of(posterior: xr.Dataset, params: Mapping[str, Any]) -> str:
    """What a fit with those draws and params is known by."""
    digest = hashlib.sha256()
    for name, variable in sorted(posterior.variables.items(), key=lambda v: str(v[0])):
        digest.update(repr((name, variable.dims, variable.dtype, variable.shape)).encode())
        digest.update(_content(variable))
    leaves, structure = jax.tree.flatten(dict(params))
    digest.update(str(structure).encode())
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _content(variable: xr.Variable) -> bytes:
    if variable.chunks is not None:
        return lazy_name(variable.data).encode()
    values = variable.values
    return repr(values.tolist()).encode() if values.dtype.kind == "O" else values.tobytes()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
