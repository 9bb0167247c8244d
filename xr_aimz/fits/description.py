"""Describe a model on a Dataset in tables of arguments, dimensions and sites.

The tables are shown as text and as HTML; nothing is computed to make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import prod
from typing import Any

import xarray as xr

from xr_aimz.binding import (
    BoundModel,
    align,
    bind,
    check_dataset,
    explain_need_of_outcome,
    shape_in_model,
    trace_without_outcomes,
)
from xr_aimz.fits.failures import explain_block_failure
from xr_aimz.fits.posterior import Fit
from xr_aimz.tracing import model_name

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Description:
    """Tables about a model and a Dataset; prints as text, shows as HTML in a notebook.

    ``tables`` maps a title to a header and rows of strings.
    """

    title: str
    tables: Mapping[str, tuple[Sequence[str], Rows]]

    def __repr__(self) -> str:
        parts = [self.title]
        for name, (header, rows) in self.tables.items():
            parts += ["", name, *_align_columns([header, *rows])]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [f"<b>{escape(self.title)}</b>"]
        for name, (header, rows) in self.tables.items():
            head = "".join(f"<th style='text-align:left'>{escape(h)}</th>" for h in header)
            body = "".join(
                "<tr>"
                + "".join(f"<td style='text-align:left'>{escape(c)}</td>" for c in row)
                + "</tr>"
                for row in rows
            )
            parts.append(
                f"<p><i>{escape(name)}</i></p>"
                f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            )
        return "<div>" + "".join(parts) + "</div>"


def describe(
    ds: xr.Dataset,
    model_or_fit: Callable | Fit,
    variables: Mapping[str, Any] | None = None,
    *,
    dim: str | tuple[str, ...] | None = None,
    core_dim: str | tuple[str, ...] | None = None,
    per: str | tuple[str, ...] | None = None,
    layout: str = "grid",
) -> Description:
    """Describe the arguments, dimensions and sites of a model on a Dataset.

    Parameters
    ----------
    ds : Dataset
    model_or_fit : callable or Fit
    variables, dim, core_dim, per, layout
        As in :func:`xr_aimz.fit`; a Fit has its own.

    Returns
    -------
    Description
        Arguments with their variables, dims, dtype and units; dimensions with size, role
        and chunks; sites with distribution, plates, dims and bytes a draw; and the calls that
        will not work, if the model needs its outcome to predict. Nothing is computed.

    Examples
    --------
    >>> import numpy as np, numpyro, numpyro.distributions as dist, xarray as xr, xr_aimz
    >>> def trend(co2, tas=None):
    ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
    ...     numpyro.sample("tas", dist.Normal(slope * co2, 0.1), obs=tas)
    >>> co2 = np.linspace(0, 1, 30)
    >>> ds = xr.Dataset({"co2": ("year", co2), "tas": ("year", 2 * co2)})
    >>> ds.aimz.describe(trend)
    trend on a Dataset with dims {'year': 30}, layout 'grid'
    <BLANKLINE>
    arguments
      argument  is       bound to  dims  dtype    units
      co2       input    co2       year  float64
      tas       outcome  tas       year  float64
    <BLANKLINE>
    dimensions
      dimension  size  role         chunks
      year       30    observation  whole
    <BLANKLINE>
    sites
      site   is           distribution  plates  dims  bytes a draw
      slope  latent       Normal                      4 B
      tas    outcome tas  Normal                year  120 B
    """
    check_dataset(ds, "describe")
    if isinstance(model_or_fit, Fit):
        fit = model_or_fit
        inputs = align(fit.binding, ds, outcomes=False)
        bound = BoundModel(fit.model, fit.binding, inputs, fit.sites)
    else:
        names: dict[str, Any] = {"dim": dim, "core_dim": core_dim, "layout": layout, "per": per}
        bound = bind(ds, model_or_fit, variables, **names)
    name = model_name(bound.model)
    tables = {
        "arguments": _tabulate_arguments(bound),
        "dimensions": _tabulate_dimensions(bound),
        "sites": _tabulate_sites(bound),
    }
    failure = trace_without_outcomes(bound.model, bound.binding, bound.inputs)
    if failure is not None:
        reason = explain_need_of_outcome(failure, bound.binding)
        if isinstance(model_or_fit, Fit):
            reason = explain_block_failure(model_or_fit, bound.inputs, bound.inputs.sizes, failure)
        tables["what will not work"] = (("call", "why"), [("predict", reason)])
    return Description(
        f"{name} on a Dataset with dims {dict(ds.sizes)!r}, layout {bound.binding.layout!r}",
        tables,
    )


def _tabulate_arguments(bound: BoundModel) -> tuple[Sequence[str], Rows]:
    header = ("argument", "is", "bound to", "dims", "dtype", "units")
    rows = []
    for argument in bound.binding.arguments:
        role = "outcome" if argument.outcome else "input"
        role = "input, its values read" if argument.name in bound.binding.concrete else role
        for source in argument.sources:
            array = bound.inputs.arrays.get(source.key)
            dtype = "" if array is None else str(array.dtype)
            dims = ", ".join(source.dims)
            rows.append((argument.name, role, source.name, dims, dtype, source.units or ""))
    for name, value in bound.binding.constants.items():
        rows.append((name, "constant", repr(value), "", type(value).__name__, ""))
    return header, rows


def _tabulate_dimensions(bound: BoundModel) -> tuple[Sequence[str], Rows]:
    header = ("dimension", "size", "role", "chunks")
    rows = []
    for dim, size in bound.inputs.sizes.items():
        role = "observation" if dim in bound.binding.dims else "event or extra"
        role = "core" if dim in bound.binding.core_dims else role
        role = "per: a fit for each label" if dim in bound.binding.per else role
        chunks = bound.inputs.chunks.get(dim)
        rows.append((dim, str(size), role, "whole" if chunks is None else repr(chunks)))
    return header, rows


def _tabulate_sites(bound: BoundModel) -> tuple[Sequence[str], Rows]:
    header = ("site", "is", "distribution", "plates", "dims", "bytes a draw")
    rows = []
    for site in bound.sites.values():
        kind = {"observed": f"outcome {site.variable}"}.get(site.kind, site.kind)
        dims = site.dataset_dims
        local = site.kind == "latent" and set(dims) & set(bound.binding.dims)
        cells = tuple(bound.inputs.sizes[d] for d in bound.binding.per)
        shape = cells + shape_in_model(site, bound.binding, bound.inputs.sizes)
        size = "" if site.dtype is None else _format_bytes(prod(shape) * site.dtype.itemsize)
        rows.append(
            (
                site.name,
                f"{kind}, local" if local else kind,
                site.distribution,
                ", ".join(p.name for p in sorted(site.plates, key=lambda p: p.dim)),
                ", ".join(dims),
                size,
            )
        )
    return header, rows


def _format_bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.4g} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def _align_columns(rows: Rows) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
