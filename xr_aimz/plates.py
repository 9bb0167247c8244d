"""Plates for dimensions of the Dataset, sized and placed for the block that is traced."""

from __future__ import annotations

import numpyro

from xr_aimz.errors import DimensionError
from xr_aimz.model import Block, current_block
from xr_aimz.spelling import list_names

__all__ = ["FEATURE", "plate"]

# The last axis of an argument that is a stack of variables.
FEATURE = "feature"


def plate(dim: str) -> numpyro.plate:
    """A plate for a dimension of the Dataset: sized and placed for the current block.

    A prediction runs the model on one block of the Dataset at a time, so a size written
    into the model is right for one block only. This plate asks the block.

    Parameters
    ----------
    dim : str
        A dimension of the Dataset, or ``"feature"``, the axis of an argument that is a stack
        of variables. An observation dimension gets the batch axis that it has in the arrays
        of ``layout="grid"``; any other dimension the first free axis.

    Returns
    -------
    numpyro.plate
        Named after the dimension.

    Raises
    ------
    DimensionError
        Outside of a fit or a prediction, for a dimension that the Dataset does not
        have or that is in ``per``, for an observation dimension that ``layout="table"`` has
        flattened, or for ``"feature"`` where stacks have different numbers of variables.

    Examples
    --------
    >>> import numpyro, numpyro.distributions as dist, xr_aimz
    >>> def trend(year, tas=None):
    ...     with xr_aimz.plate("lat"), xr_aimz.plate("lon"):
    ...         slope = numpyro.sample("slope", dist.Normal(0, 1))
    ...     with xr_aimz.plate("time"), xr_aimz.plate("lat"), xr_aimz.plate("lon"):
    ...         numpyro.sample("tas", dist.Normal(slope * year, 1), obs=tas)
    """
    block = current_block()
    if block is None:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}) has a size only while xr_aimz runs the model; "
            "call the model through ds.aimz, or use numpyro.plate here"
        )
    if block.table and dim in block.places:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}): layout='table' flattens {sorted(block.places)!r} to one "
            "axis; use numpyro.plate('data', X.shape[0]), or layout='grid'"
        )
    return numpyro.plate(dim, _size(dim, block), dim=block.places.get(dim))


def _size(dim: str, block: Block) -> int:
    lengths = set(block.stacked.values()) if dim == FEATURE else set()
    if dim in block.sizes and not lengths - {block.sizes[dim]}:
        return block.sizes[dim]
    if dim in block.sizes:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}) may mean the dimension of the Dataset, of size "
            f"{block.sizes[dim]}, or the axis of the stacked arguments {dict(block.stacked)!r}; "
            "rename the dimension, or use numpyro.plate"
        )
    if len(lengths) == 1:
        return lengths.pop()
    if lengths:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}): the stacked arguments have different numbers of variables, "
            f"{dict(block.stacked)!r}; use numpyro.plate with a name of its own for each, "
            f"numpyro.plate({next(iter(block.stacked))!r}, X.shape[-1])"
        )
    if dim in block.per:
        raise DimensionError(
            f"xr_aimz.plate({dim!r}): {dim!r} is in per={block.per!r}, so the model is fitted for "
            "each of its labels alone and its arrays have no such dimension; leave the plate out, "
            f"or {dim!r} out of per="
        )
    stacks = [FEATURE] if block.stacked else []
    raise DimensionError(
        f"xr_aimz.plate({dim!r}): no dimension {dim!r} in the Dataset; "
        f"it has {list_names(sorted([*block.sizes, *stacks]), dim)}"
    )
