"""Cast host values to JAX's dtypes, and find casts that lose what tells values apart.

JAX computes in 32 bits unless ``JAX_ENABLE_X64`` is set. A float64 variable far from zero, such
as seconds since 1970, has steps that 32 bits cannot hold. The rounding error of every value is
compared with the standard deviation of its variable over the data of the fit, so that a verdict
depends neither on the chunks of a Dataset nor on how much of it is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import jax
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding import Binding
from xr_aimz.errors import DtypeError
from xr_aimz.inputs import Inputs
from xr_aimz.requirements import BlockValues, describe_variables, label_part

__all__ = [
    "Precision",
    "check_moments",
    "device_dtype",
    "is_wide",
    "loses_bits",
    "measure_sd",
    "reduce_moments",
    "to_device_dtype",
]

# The largest rounding error that a model may meet, in standard deviations of the variable.
_SHARE = 1e-3
# A spread below this share of the largest value is noise of arithmetic in 64 bits: a constant.
_CONSTANT = 2.0**-40


def to_device_dtype(name: str, values: np.ndarray) -> np.ndarray:
    """Host values in the dtype that JAX has for them: its own float; ints and bools kept."""
    dtype = device_dtype(values.dtype)
    if values.dtype.kind in "iu" and dtype.itemsize < values.dtype.itemsize and values.size:
        limits = np.iinfo(dtype)
        low, high = values.min(), values.max()
        if low < limits.min or high > limits.max:
            raise DtypeError(
                f"variable {name!r} has {values.dtype} values from {low!r} to {high!r}, and JAX "
                f"holds {dtype}; subtract an offset, make it a float, or set JAX_ENABLE_X64=1"
            )
    # A value beyond the range of 32 bits is infinite there, and :class:`Precision` refuses it.
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype)


def device_dtype(dtype: np.dtype) -> np.dtype:
    """JAX's dtype for a dtype of the host."""
    if dtype.kind == "f":
        return _float()
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def loses_bits(dtype: np.dtype) -> bool:
    """Whether JAX holds floats of this dtype in fewer bits."""
    return dtype.kind == "f" and _float().itemsize < dtype.itemsize


def is_wide(dtype: np.dtype) -> bool:
    """Whether integers of this dtype may have more digits than JAX's floats."""
    return dtype.kind in "iu" and dtype.itemsize >= _float().itemsize


def _float() -> np.dtype:
    return np.dtype(jax.dtypes.canonicalize_dtype(float))


@dataclass(frozen=True, eq=False)
class Precision:
    """A requirement: an array keeps, in JAX's float dtype, what tells its values apart.

    Of floats that are cast, or of integers that the model converts.

    Parameters
    ----------
    key : str
        Of the array.
    what : str
        The array in words: its variable and argument.
    sd : DataArray, optional
        The standard deviation at the fit, for each label of ``per``. Where there is none, or it
        is 0, the values of a block are compared with their own.
    per : tuple of str
        The dims over which a model was fitted independently.
    """

    key: str
    what: str
    sd: xr.DataArray | None = None
    per: tuple[str, ...] = ()

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({self.key})

    def at(self, sizes: Mapping[str, int]) -> Precision:
        """Itself: it holds for blocks of any sizes."""
        return self

    def check(self, values: BlockValues) -> None:
        """Compare every rounding error with the standard deviation of its variable.

        Raises
        ------
        DtypeError
        """
        array, dims = values.arrays[self.key], values.dims[self.key]
        error = _rounding_error(array)
        sd = _known_sd(self.sd, dims, values)
        if sd.all() and error.max(initial=0.0) <= _SHARE * sd.min():
            return
        sd = np.where(sd > 0, sd, _own_sd(array, dims, self.per))
        bad = (error > _SHARE * sd) & (sd > 0)
        if bad.any():
            first = np.unravel_index(int(bad.argmax()), bad.shape)
            place = values.place(dims, map(int, first))
            own = float(np.broadcast_to(sd, bad.shape)[first])
            raise _too_coarse(self.what, array[first], place, float(error[first]), own)


def _too_coarse(what: str, value: np.generic, place: str, error: float, sd: float) -> DtypeError:
    dtype = _float()
    with np.errstate(over="ignore"):
        rounded = float(value.astype(dtype))
    return DtypeError(
        f"{what} loses in {dtype}, in which JAX computes, what tells its values apart: "
        f"{value.item()!r}{place} becomes {rounded!r}, a rounding error of {error:.3g}, more than "
        f"a thousandth of the variable's standard deviation, {sd:.3g}. Subtract an offset, such "
        f"as {value.item()!r}, or set JAX_ENABLE_X64=1; where the rounding does not matter, say "
        f"so: .astype({dtype.name!r})"
    )


def _rounding_error(array: np.ndarray) -> np.ndarray:
    """What each value loses in JAX's float dtype; 0 where it is no number."""
    exact = array if array.dtype.kind == "f" else array.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(exact - exact.astype(_float()))
    # Beyond the range of 32 bits a value is lost altogether, and its error is infinite.
    return np.where(np.isnan(error), 0.0, error)


def _own_sd(array: np.ndarray, dims: tuple[str, ...], per: Iterable[str]) -> np.ndarray:
    """Standard deviations over all dims but ``per``, kept as axes of length 1; 0 of a constant."""
    axes = tuple(i for i, d in enumerate(dims) if d not in tuple(per))
    there = np.isfinite(array)
    count = np.maximum(there.sum(axes, keepdims=True), 1)
    known = np.where(there, array, 0.0)
    mean = known.sum(axes, keepdims=True) / count
    squares = np.where(there, (known - mean) ** 2, 0.0)
    sd = np.sqrt(squares.sum(axes, keepdims=True) / count)
    return _without_noise(sd, np.abs(known).max(axes, keepdims=True, initial=0.0))


def _without_noise(sd: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return np.where(sd > _CONSTANT * largest, sd, 0.0)


def _known_sd(sd: xr.DataArray | None, dims: tuple[str, ...], values: BlockValues) -> np.ndarray:
    """The standard deviations at the fit, on the axes of an array; 0 where there is none."""
    if sd is None:
        return np.zeros((1,) * len(dims))
    positive = sd.where(sd > 0)
    # An array that has lost a dim is the same in all cells along it: the least of theirs holds.
    found = positive.min([d for d in sd.dims if d not in dims])
    for dim in map(str, found.dims):
        index, labels = sd.indexes.get(dim), values.labels[dim]
        place = np.asarray(labels) if index is None else index.get_indexer(pd.Index(labels))
        found = found.isel({dim: place})
    found = found.transpose(*(d for d in dims if d in found.dims))
    lengths = dict(zip(map(str, found.dims), found.shape, strict=True))
    return np.nan_to_num(found.values).reshape([lengths.get(d, 1) for d in dims])


def measure_sd(
    binding: Binding,
    inputs: Inputs,
    arrays: Mapping[str, xr.Variable],
    converted: Callable[[], Collection[str]],
) -> xr.Dataset:
    """The standard deviation of each variable over the data of a fit.

    Parameters
    ----------
    binding : Binding
    inputs : Inputs
    arrays : mapping of source key to Variable
    converted : callable
        The keys of the integers that the model converts to floats. Called only where some have
        more digits than floats.

    Returns
    -------
    Dataset
        By variable, with the dims ``per``; 0 for a constant.

    Raises
    ------
    DtypeError
        A variable loses in JAX's float dtype what tells its values apart.
    """
    # At once, so that lazy arrays are read once.
    moments = xr.Dataset(reduce_moments(arrays, binding.per)).compute()
    return check_moments(binding, inputs, moments, arrays, converted)


def reduce_moments(
    arrays: Mapping[str, xr.Variable], per: tuple[str, ...]
) -> dict[str, xr.Variable]:
    """Reduce arrays to what :func:`check_moments` takes, over all dims but ``per``.

    Lazy where an array is.
    """
    found = {}
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu":
            continue
        over = [d for d in array.dims if d not in per]
        exact = array.astype(np.float64)
        if array.dtype.kind == "f":
            finite: xr.Variable = abs(exact) < np.inf
            # Of a cell without data zeros, of which there is a mean and no warning.
            exact = exact.where(finite).where(finite.any(over), 0.0)
        found[f"sd {key}"] = exact.std(over)
        found[f"largest {key}"] = abs(exact).max(over)
        if loses_bits(array.dtype) or is_wide(array.dtype):
            # Beyond the range of 32 bits the error is infinite, of what is no number NaN.
            found[f"error {key}"] = abs(exact - exact.astype(_float())).max(over)
    return found


def check_moments(
    binding: Binding,
    inputs: Inputs,
    known: xr.Dataset,
    arrays: Mapping[str, xr.Variable],
    converted: Callable[[], Collection[str]],
) -> xr.Dataset:
    """The standard deviations of the arrays whose :func:`reduce_moments` are ``known``, checked.

    Raises
    ------
    DtypeError
    """
    found = {}
    for argument in binding.arguments:
        for source in argument.sources:
            key = source.key
            if f"sd {key}" not in known:
                continue
            spread = known[f"sd {key}"].variable
            sd = _without_noise(np.nan_to_num(spread.values), known[f"largest {key}"].values)
            labels = {d: inputs.labels[d] for d in map(str, spread.dims) if d in inputs.labels}
            found[source.name] = xr.DataArray(sd, labels, spread.dims)
            error = known.get(f"error {key}")
            lossy = error is not None and ((error.values > _SHARE * sd) & (sd > 0)).any()
            if lossy and (arrays[key].dtype.kind == "f" or key in converted()):
                what = describe_variables(binding)[key]
                precision = Precision(key, what, found[source.name], binding.per)
                _raise_at_first(precision, inputs, arrays[key])
    return xr.Dataset(found)


def _raise_at_first(precision: Precision, inputs: Inputs, array: xr.Variable) -> None:
    """Read an array block by block until one is refused."""
    chunks = [array.chunksizes.get(d, (n,)) for d, n in array.sizes.items()]
    edges = [[0, *accumulate(c)] for c in chunks]
    for block in product(*map(pairwise, edges)):
        part = dict(zip(map(str, array.dims), (slice(*b) for b in block), strict=True))
        precision.check(label_part(inputs, {precision.key: array.isel(part).values}, part))
