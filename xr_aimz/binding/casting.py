"""Cast arrays to JAX's dtypes, and check that a cast keeps the differences between values.

A rounding error is compared with the standard deviation of the variable, at the fit and, where
there is none, within a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise, product

import jax
import numpy as np
import pandas as pd
import xarray as xr

from xr_aimz.binding.alignment import AlignedInputs
from xr_aimz.binding.requirements import BlockValues, describe_variables, part_block
from xr_aimz.binding.spec import Binding
from xr_aimz.errors import DtypeError

# The largest rounding error that is accepted, in standard deviations of the variable.
_MAX_ERROR = 1e-3
# A standard deviation below this share of the largest value is noise of arithmetic in 64 bits:
# the variable is constant.
_NOISE_SHARE = 2.0**-40


def as_jax_arrays(binding: Binding, loaded: Mapping[str, xr.Variable]) -> dict[str, np.ndarray]:
    """Convert loaded arrays to dtypes of JAX, as :func:`as_jax_array` does."""
    names = binding.variables
    return {key: as_jax_array(names[key], a.values) for key, a in loaded.items()}


@dataclass(frozen=True, eq=False)
class Precision:
    """Requirement that rounding to JAX's float dtype is small against the spread of an array.

    It applies to floats that are cast, and to integers that the model converts to floats.

    Parameters
    ----------
    key : str
        Key of the array.
    what : str
        Description of the array: its variable and argument.
    sd : DataArray, optional
        The standard deviation at the fit, for each label of ``per``. Where there is none, or it
        is 0, that of the values of the block is used.
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
        """Return the requirement itself: it applies to blocks of any sizes."""
        return self

    def check(self, values: BlockValues) -> None:
        """Compare the rounding error of each value with the standard deviation of the variable.

        Raises
        ------
        DtypeError
        """
        array, dims = values.arrays[self.key], values.dims[self.key]
        error = _rounding_error(array)
        sd = _fit_sd(self.sd, dims, values)
        if sd.all() and error.max(initial=0.0) <= _MAX_ERROR * sd.min():
            return
        sd = np.where(sd > 0, sd, _block_sd(array, dims, self.per))
        lossy_mask = (error > _MAX_ERROR * sd) & (sd > 0)
        if lossy_mask.any():
            first = np.unravel_index(int(lossy_mask.argmax()), lossy_mask.shape)
            where = values.place(dims, map(int, first))
            sd_first = float(np.broadcast_to(sd, lossy_mask.shape)[first])
            raise _cast_error(self.what, array[first], where, float(error[first]), sd_first)


def _cast_error(what: str, value: np.generic, where: str, error: float, sd: float) -> DtypeError:
    dtype = jax_float()
    with np.errstate(over="ignore"):
        rounded = float(value.astype(dtype))
    return DtypeError(
        f"{what} loses its precision in {dtype}, the dtype in which JAX computes: "
        f"{value.item()!r}{where} becomes {rounded!r}, a rounding error of {error:.3g}, more than "
        f"a thousandth of the variable's standard deviation, {sd:.3g}. Subtract an offset, such "
        f"as {value.item()!r}, or set JAX_ENABLE_X64=1; where the rounding does not matter, cast "
        f"it: .astype({dtype.name!r})"
    )


def _rounding_error(array: np.ndarray) -> np.ndarray:
    """Return each value's rounding error in JAX's float dtype; 0 for NaN and infinite values."""
    exact = array if array.dtype.kind == "f" else array.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(exact - exact.astype(jax_float()))
    # A value beyond the range of 32 bits becomes infinite, and so does its error.
    return np.where(np.isnan(error), 0.0, error)


def _block_sd(array: np.ndarray, dims: tuple[str, ...], per: Iterable[str]) -> np.ndarray:
    """Compute standard deviations over all dims but ``per``; reduced axes have length 1.

    The standard deviation of a constant is 0.
    """
    axes = tuple(i for i, d in enumerate(dims) if d not in tuple(per))
    finite_mask = np.isfinite(array)
    count = np.maximum(finite_mask.sum(axes, keepdims=True), 1)
    finite = np.where(finite_mask, array, 0.0)
    mean = finite.sum(axes, keepdims=True) / count
    squares = np.where(finite_mask, (finite - mean) ** 2, 0.0)
    sd = np.sqrt(squares.sum(axes, keepdims=True) / count)
    return _zero_noise(sd, np.abs(finite).max(axes, keepdims=True, initial=0.0))


def _zero_noise(sd: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return np.where(sd > _NOISE_SHARE * largest, sd, 0.0)


def _fit_sd(sd: xr.DataArray | None, dims: tuple[str, ...], values: BlockValues) -> np.ndarray:
    """Return the standard deviations at the fit, on the axes of an array; 0 where absent."""
    if sd is None:
        return np.zeros((1,) * len(dims))
    positive = sd.where(sd > 0)
    # An array without a dim of ``per`` is the same in all cells along it, so the smallest of
    # their standard deviations applies.
    aligned = positive.min([d for d in sd.dims if d not in dims])
    for dim in map(str, aligned.dims):
        index, labels = sd.indexes.get(dim), values.labels[dim]
        positions = np.asarray(labels) if index is None else index.get_indexer(pd.Index(labels))
        aligned = aligned.isel({dim: positions})
    aligned = aligned.transpose(*(d for d in dims if d in aligned.dims))
    lengths = dict(zip(map(str, aligned.dims), aligned.shape, strict=True))
    return np.nan_to_num(aligned.values).reshape([lengths.get(d, 1) for d in dims])


def measure_sd(
    binding: Binding,
    inputs: AlignedInputs,
    arrays: Mapping[str, xr.Variable],
    converted: Callable[[], Collection[str]],
) -> xr.Dataset:
    """Compute the standard deviation of each variable over the data of a fit, and check rounding.

    Parameters
    ----------
    binding : Binding
    inputs : AlignedInputs
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
        A variable loses its precision in JAX's float dtype.
    """
    # In one call of compute, so that lazy arrays are read once.
    moments = xr.Dataset(reduce_moments(arrays, binding.per)).compute()
    return check_moments(binding, inputs, moments, arrays, converted)


def reduce_moments(
    arrays: Mapping[str, xr.Variable], per: tuple[str, ...]
) -> dict[str, xr.Variable]:
    """Reduce arrays over all dims but ``per`` to the moments for :func:`check_moments`.

    The moments of a lazy array are lazy.
    """
    moments = {}
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu":
            continue
        over = [d for d in array.dims if d not in per]
        exact = array.astype(np.float64)
        if array.dtype.kind == "f":
            finite: xr.Variable = abs(exact) < np.inf
            # A cell without data becomes zeros, whose mean exists and raises no warning.
            exact = exact.where(finite).where(finite.any(over), 0.0)
        moments[f"sd {key}"] = exact.std(over)
        moments[f"largest {key}"] = abs(exact).max(over)
        if loses_bits(array.dtype) or is_wide(array.dtype):
            # The error is infinite beyond the range of 32 bits, and NaN for NaN.
            moments[f"error {key}"] = abs(exact - exact.astype(jax_float())).max(over)
    return moments


def check_moments(
    binding: Binding,
    inputs: AlignedInputs,
    known_moments: xr.Dataset,
    arrays: Mapping[str, xr.Variable],
    converted: Callable[[], Collection[str]],
) -> xr.Dataset:
    """Return the standard deviations of arrays, after a check of their rounding errors.

    ``known_moments`` holds the moments of :func:`reduce_moments`.

    Raises
    ------
    DtypeError
    """
    sd_by_variable = {}
    for argument in binding.arguments:
        for source in argument.sources:
            key = source.key
            if f"sd {key}" not in known_moments:
                continue
            raw_sd = known_moments[f"sd {key}"].variable
            sd = _zero_noise(np.nan_to_num(raw_sd.values), known_moments[f"largest {key}"].values)
            labels = {d: inputs.labels[d] for d in map(str, raw_sd.dims) if d in inputs.labels}
            sd_by_variable[source.name] = xr.DataArray(sd, labels, raw_sd.dims)
            error = known_moments.get(f"error {key}")
            is_lossy = error is not None and ((error.values > _MAX_ERROR * sd) & (sd > 0)).any()
            if is_lossy and (arrays[key].dtype.kind == "f" or key in converted()):
                what = describe_variables(binding)[key]
                precision = Precision(key, what, sd_by_variable[source.name], binding.per)
                _raise_at_first(precision, inputs, arrays[key])
    return xr.Dataset(sd_by_variable)


def _raise_at_first(precision: Precision, inputs: AlignedInputs, array: xr.Variable) -> None:
    """Check an array block by block, to raise the error of its first lossy value."""
    chunks = [array.chunksizes.get(d, (n,)) for d, n in array.sizes.items()]
    edges = [[0, *accumulate(c)] for c in chunks]
    for block in product(*map(pairwise, edges)):
        part = dict(zip(map(str, array.dims), (slice(*b) for b in block), strict=True))
        precision.check(part_block(inputs, {precision.key: array.isel(part).values}, part))


def as_jax_array(name: str, values: np.ndarray) -> np.ndarray:
    """Cast host values to JAX's dtype for them: the default float; ints and bools stay."""
    dtype = jax_dtype(values.dtype)
    if values.dtype.kind in "iu" and dtype.itemsize < values.dtype.itemsize and values.size:
        limits = np.iinfo(dtype)
        low, high = values.min(), values.max()
        if low < limits.min or high > limits.max:
            raise DtypeError(
                f"variable {name!r} has {values.dtype} values from {low!r} to {high!r}, and JAX "
                f"uses {dtype}; subtract an offset, make it a float, or set JAX_ENABLE_X64=1"
            )
    # A value beyond the range of 32 bits becomes infinite, and :class:`Precision` refuses it.
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype)


def align_memory(values: np.ndarray) -> np.ndarray:
    """Return an array, read-only, that JAX reads in place: itself if it is one, or a copy."""
    # JAX copies an argument that does not start at a multiple of 64 bytes, on every call. The
    # draws of a network's weights were in memory five times (docs/performance.md).
    if values.flags.c_contiguous and values.ctypes.data % 64 == 0 and _is_frozen(values):
        return values
    memory = np.empty(values.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    aligned[...] = values
    for array in (memory, aligned):
        array.flags.writeable = False
    return aligned


def _is_frozen(values: np.ndarray) -> bool:
    """Return whether no array writes to the memory of this one: a view of it may be read-only."""
    base: object = values
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return True


def jax_dtype(dtype: np.dtype) -> np.dtype:
    """Return JAX's dtype for a NumPy dtype."""
    if dtype.kind == "f":
        return jax_float()
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def loses_bits(dtype: np.dtype) -> bool:
    """Return whether JAX stores floats of this dtype in fewer bits."""
    return dtype.kind == "f" and jax_float().itemsize < dtype.itemsize


def is_wide(dtype: np.dtype) -> bool:
    """Return whether integers of this dtype may have more digits than JAX's floats."""
    return dtype.kind in "iu" and dtype.itemsize >= jax_float().itemsize


def jax_float() -> np.dtype:
    """Return JAX's default float dtype: float32, or float64 where it is so configured."""
    return np.dtype(jax.dtypes.canonicalize_dtype(float))
