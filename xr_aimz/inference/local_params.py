"""Find the guide parameters that have an entry per label, and what a batch needs to train them.

A latent site along a batched dim has entries for each label, of which a batch trains its own.
Checks of the guide, the initial values and the model for a fit in batches are here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.handlers import scale
from numpyro.infer import autoguide
from numpyro.primitives import Messenger

from xr_aimz.binding import TABLE, Binding, arrange, block_of, jax_dtype, shape_in_model
from xr_aimz.errors import AimzError, ModelError, OptionError
from xr_aimz.inference.minibatch_data import WindowSizes
from xr_aimz.inference.problem import InferenceProblem
from xr_aimz.tracing import Site, location_note, trace_sites


@dataclass(frozen=True)
class LabelAxes:
    """Axes of an array that lie along dims of the data, and the batched dims among them.

    Parameters
    ----------
    axes : tuple of tuple of str
        The dims of each axis: none for most axes, several for the axis of a table.
    batched : tuple of str
        The batched dims among them.
    """

    axes: tuple[tuple[str, ...], ...]
    batched: tuple[str, ...]

    @property
    def _moved(self) -> tuple[list[int], list[int]]:
        flat_dims = [d for dims in self.axes for d in (dims or (None,))]
        return [flat_dims.index(d) for d in self.batched], list(range(len(self.batched)))

    def rows(self, array: Any, sizes: Mapping[str, int]) -> Any:
        """Move the batched dims of an array to its leading axes."""
        shape: list[int] = []
        for n, dims in zip(array.shape, self.axes, strict=True):
            shape += [sizes[d] for d in dims] or [n]
        source, target = self._moved
        return jnp.moveaxis(jnp.reshape(array, shape), source, target)

    def folded(self, rows: Any) -> Any:
        """Restore the axes of an array from rows, the inverse of :meth:`rows`."""
        source, target = self._moved
        unfolded = jnp.moveaxis(rows, target, source)
        shape, lengths = [], list(unfolded.shape)
        for dims in self.axes:
            count = len(dims) or 1
            shape.append(prod(lengths[:count]))
            lengths = lengths[count:]
        return jnp.reshape(unfolded, shape)

    def repeated(self, rows: Any, sizes: Mapping[str, int]) -> Any:
        """Repeat the rows of a batch to the full size of each batched dim."""
        for axis, d in enumerate(self.batched):
            rows = jnp.take(rows, jnp.arange(sizes[d]) % rows.shape[axis], axis=axis)
        return rows

    def gather(self, rows: Any, positions: Mapping[str, Any]) -> Any:
        """Select the rows at positions along each batched dim."""
        for axis, d in enumerate(self.batched):
            rows = jnp.take(rows, positions[d], axis=axis, mode="clip")
        return rows

    def scatter(self, rows: Any, part: Any, positions: Mapping[str, Any]) -> Any:
        """Replace the rows at positions by ``part``; positions past the end are ignored."""
        grid = jnp.ix_(*(positions[d] for d in self.batched))
        return rows.at[grid].set(part, mode="drop", unique_indices=True)

    def cut(self, rows: Any, starts: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
        """Slice the rows of a batch, which begins at ``starts`` and has ``sizes``."""
        for axis, d in enumerate(self.batched):
            rows = jax.lax.dynamic_slice_in_dim(rows, starts[d], sizes[d], axis)
        return rows

    def paste(self, rows: Any, part: Any, starts: Mapping[str, Any]) -> Any:
        """Replace the rows of a batch, which begins at ``starts``, by ``part``."""
        offsets = [starts[d] for d in self.batched]
        zeros = [jnp.zeros_like(offsets[0])] * (rows.ndim - len(offsets))
        return jax.lax.dynamic_update_slice(rows, part, (*offsets, *zeros))


def find_label_axes(
    leaves: Sequence[Any],
    grown: Mapping[str, Sequence[Any]],
    binding: Binding,
    sizes: Mapping[str, int],
) -> list[LabelAxes | None]:
    """Find the axes of each leaf of a state that have an entry per label; None for other leaves.

    Parameters
    ----------
    leaves : sequence of struct
        The leaves for a batch of ``sizes``.
    grown : mapping of dim to sequence of struct
        The leaves for a batch that is longer along that dim.
    """
    label_axes: list[LabelAxes | None] = []
    for number, leaf in enumerate(leaves):
        axes: list[tuple[str, ...]] = [()] * len(leaf.shape)
        for d, grown_leaves in grown.items():
            grown_shape = grown_leaves[number].shape
            if len(grown_shape) != len(leaf.shape):
                raise _make_axis_error(d)
            for axis, (n, m) in enumerate(zip(leaf.shape, grown_shape, strict=True)):
                if n != m:
                    axes[axis] = binding.dims if binding.layout == "table" else (*axes[axis], d)
        for n, dims in zip(leaf.shape, axes, strict=True):
            if dims and prod(sizes[d] for d in dims) != n:
                raise _make_axis_error(dims)
        batched = tuple(d for d in grown if any(d in dims for dims in axes))
        label_axes.append(LabelAxes(tuple(axes), batched) if batched else None)
    return label_axes


def _make_axis_error(dims: Any) -> ModelError:
    return ModelError(
        f"the guide has a parameter whose size depends on the batch along {dims!r}, but not as "
        "one entry per label: the entries of a batch cannot be trained alone. Use method='svi' "
        "(AutoNormal) or AutoDelta"
    )


def find_site_axes(site: Site, binding: Binding, sizes: Mapping[str, int]) -> LabelAxes:
    """Find the axes of a site's draws, ``(draw, *site axes)``; ``sizes`` has the batched dims."""
    axes: list[tuple[str, ...]] = [()]
    for d in site.dims:
        axes.append(binding.dims if d == TABLE else (d,) if d in binding.dims and d else ())
    return LabelAxes(tuple(axes), tuple(d for d in sizes if any(d in dims for dims in axes)))


def batched_dims(site: Site, binding: Binding, batched: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the batched dims along which a site has an entry for each label."""
    table_dims = binding.dims if TABLE in site.dims else ()
    return tuple(d for d in batched if d in (*site.dims, *table_dims))


def likelihood_scales(
    sites: Mapping[str, Site], binding: Binding, sizes: WindowSizes
) -> dict[str, float]:
    """Compute by how much a batch scales the log density of each site with an entry per label."""
    scales = {}
    for name, site in sites.items():
        dims = batched_dims(site, binding, sizes.sizes)
        if site.kind in ("latent", "observed") and dims:
            scales[name] = prod(sizes.lengths[d] / sizes.sizes[d] for d in dims)
    return scales


def scale_likelihood(fn: Callable, by: Mapping[str, float]) -> Callable:
    """Wrap a model or a guide so that the log densities of sites are scaled ``by`` factors."""

    def scaled(*args: Any, **kwargs: Any) -> Any:
        with _Scaled(by):
            return fn(*args, **kwargs)

    return scaled


class _Scaled(Messenger):  # type: ignore[misc] # NumPyro is untyped
    def __init__(self, by: Mapping[str, float]) -> None:
        self._by = by
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self._by:
            scale(scale=self._by[msg["name"]]).process_message(msg)


def local_sites(problem: InferenceProblem, batched: Mapping[str, Any]) -> list[str]:
    """List the latent sites with an entry for each label of a batched dim."""
    binding = problem.binding
    assert binding is not None
    latent = problem.named("latent")
    return [n for n in latent if batched_dims(problem.sites[n], binding, batched)]


def check_batch_guide(problem: InferenceProblem, guide: Any, batched: Mapping[str, Any]) -> None:
    """Check that batches can train a guide.

    Raises
    ------
    OptionError
        The guide needs all of the data at once; or there are local latents, and its
        parameters are not one entry per label.
    """
    name = type(guide).__name__
    if isinstance(guide, _FULL_DATA_GUIDES):
        raise OptionError(f"{name} needs all of the data at once: leave batch= out")
    local = local_sites(problem, batched)
    if local and type(guide) not in _LOCAL_GUIDES:
        raise OptionError(
            f"latent sites {local!r} have entries along the batched dims {list(batched)!r}, which "
            f"{name} does not train label by label; use method='svi' (AutoNormal) or AutoDelta, "
            "or batch along another dimension"
        )


def check_batch_start(
    problem: InferenceProblem, started: tuple[str, ...], batched: Mapping[str, Any]
) -> None:
    """Check that initial values are only for sites that all batches share.

    Raises
    ------
    OptionError
        A site has entries along the batched dims, which are initialised automatically.
    """
    local = sorted({*local_sites(problem, batched)} & {*started})
    if local:
        raise OptionError(
            f"init= has values of {local!r}, which have entries along the batched dims "
            f"{list(batched)!r}: those are initialised automatically. Leave them out"
        )


def check_batch_model(problem: InferenceProblem, sizes: Mapping[str, int]) -> None:
    """Check that a model runs on a batch, and that its sites are as long as the batch.

    Raises
    ------
    ModelError
        A site has another shape, or the model does not run on a batch.
    """
    binding, inputs = problem.binding, problem.inputs
    assert inputs is not None
    assert binding is not None
    batch_sizes = {**inputs.sizes, **sizes}
    structs = {
        k: jax.ShapeDtypeStruct(tuple(batch_sizes[str(d)] for d in a.dims), jax_dtype(a.dtype))
        for k, a in inputs.arrays.items()
    }
    block = block_of(binding, batch_sizes)
    arrange_block = partial(arrange, binding, dims=inputs.dims, block=block)
    try:
        batch_sites = trace_sites(problem.model, arrange_block, structs, block)
    except AimzError:
        raise
    except Exception as error:
        # Any error that a model raises on sizes other than those of the data.
        data_sizes = {d: inputs.sizes[d] for d in sizes}
        raise ModelError(
            f"the model does not run on a batch of {dict(sizes)!r}, where the data have "
            f"{data_sizes!r}: it raised {type(error).__name__}: {error} ({location_note(error)}). "
            "Take sizes from the arguments, x.shape[0], or from xr_aimz.plate, or leave batch= out"
        ) from error
    for site in batch_sites:
        fitted = problem.sites.get(site.name)
        if site.kind == "param" or fitted is None:
            continue
        expected = shape_in_model(fitted, binding, batch_sizes)
        if site.shape != expected:
            raise ModelError(
                f"site {site.name!r} has shape {site.shape!r} for a batch of {dict(sizes)!r}, and "
                f"{expected!r} was expected; take sizes from the arguments or from xr_aimz.plate, "
                "not from the model"
            )


# These guides use the density of all the data, and a step has only a batch.
_FULL_DATA_GUIDES = (
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoDAIS,
    autoguide.AutoSemiDAIS,
    autoguide.AutoSurrogateLikelihoodDAIS,
)


_LOCAL_GUIDES = (autoguide.AutoNormal, autoguide.AutoDelta)
