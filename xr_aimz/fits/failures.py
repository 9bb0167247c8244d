"""Explain the errors that a model raises on a Dataset other than that of its fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from xr_aimz.binding import AlignedInputs, explain_need_of_outcome, trace_without_outcomes
from xr_aimz.errors import AimzError, ModelError
from xr_aimz.fits.posterior import Fit, sizes_at_fit


def integers_as_floats(fit: Fit, inputs: AlignedInputs) -> dict[str, str]:
    """Map keys of inputs that were ints at the fit, and are floats now, to names of variables."""
    return {
        source.key: source.name
        for argument in fit.binding.inputs
        for source in argument.sources
        if source.name in fit.constant_data
        and fit.constant_data[source.name].dtype.kind in "iu"
        and inputs.arrays[source.key].dtype.kind == "f"
    }


@contextmanager
def explain_failure(fit: Fit, inputs: AlignedInputs, sizes: Mapping[str, int]) -> Iterator[None]:
    """Explain an error of the model by what differs from its fit, and the remedy.

    Parameters
    ----------
    fit : Fit
    inputs : AlignedInputs
    sizes : mapping of dim to int
        Of the block on which the model is run.

    Raises
    ------
    ModelError
        The model needs its outcomes, or sizes that are not those of the block.
    TypeError
        The model's error with a note, if inputs that were ints have become floats.
    """
    try:
        yield
    except AimzError:
        raise
    except Exception as error:
        names = sorted(set(integers_as_floats(fit, inputs).values()))
        if names and isinstance(error, TypeError):
            filled = dict.fromkeys(names, 0)
            error.add_note(
                f"variables {names!r} were ints at the fit and are floats now, as ints with "
                f"missing values (NaN) are: fill them, ds.fillna({filled!r}), make them ints by "
                ".astype(int), and mask the result"
            )
            raise
        raise ModelError(explain_block_failure(fit, inputs, sizes, error)) from error


def _inputs_at_fit(fit: Fit, inputs: AlignedInputs) -> AlignedInputs:
    """Return the inputs with the sizes and dtypes of the fit, where the fit has its data."""
    data = fit.constant_data
    sources = [s for a in fit.binding.inputs for s in a.sources if s.name in data]
    arrays = {**inputs.arrays, **{s.key: data[s.name] for s in sources}}
    sizes = {**inputs.sizes, **{str(d): n for d, n in data.sizes.items()}, **sizes_at_fit(fit)}
    return replace(inputs, arrays=arrays, sizes=sizes)


def explain_block_failure(
    fit: Fit, inputs: AlignedInputs, sizes: Mapping[str, int], error: Exception
) -> str:
    """Explain why a model fails on blocks of these sizes, and what would work."""
    binding, fit_sizes = fit.binding, sizes_at_fit(fit)
    outcomes = {s.key for a in binding.outcomes for s in a.sources} & set(inputs.arrays)
    if not outcomes:
        failure = trace_without_outcomes(fit.model, binding, _inputs_at_fit(fit, inputs))
        if failure is not None:
            return (
                f"{explain_need_of_outcome(failure, binding)}. The draws of this fit serve the "
                "changed model too: ds.aimz.from_posterior(model, fit.posterior)"
            )
    block = {d: sizes[d] for d in binding.dims}
    notes = [n.removeprefix("xr_aimz: ") for n in getattr(error, "__notes__", ())]
    location = "".join(
        f" ({n})" for n in notes if n.startswith(("after site", "before its first"))
    )
    cause = f"it raised {type(error).__name__}: {error}{location}"
    if all(fit_sizes.get(d, n) == n for d, n in block.items()):
        return f"the model, which ran at the fit, does not run on this Dataset: {cause}"
    dim = next(d for d, n in block.items() if fit_sizes.get(d, n) != n)
    return (
        f"the model does not run on a block of {block!r}, where the fit had {fit_sizes!r}: "
        f"{cause}. Take sizes from the arguments, x.shape[0], or from xr_aimz.plate, not from "
        f"numbers or arrays of the model's own; a dimension that the model couples stays whole "
        f"with core_dim={dim!r} at the fit"
    )
