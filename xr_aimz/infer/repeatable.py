"""The same loss in every process: what a fit taken up in another one stands on.

NumPyro adds up the terms of a loss in the order of a set of names, which changes from one
process to the next, and the last bits of a sum with it. Here they are added in the order
of the names.
"""

from __future__ import annotations

from typing import Any

from numpyro.infer import Trace_ELBO

__all__ = ["Ordered", "ordered"]


def ordered(loss: Any) -> Any:
    """A loss like it whose terms are added in order; others than ``Trace_ELBO`` as they are."""
    if type(loss) is not Trace_ELBO or not loss.sum_sites:
        return loss
    return Ordered(
        num_particles=loss.num_particles,
        vectorize_particles=loss.vectorize_particles,
        multi_sample_guide=loss.multi_sample_guide,
        sum_sites=False,
    )


class Ordered(Trace_ELBO):  # type: ignore[misc] # NumPyro is untyped
    """``Trace_ELBO`` whose terms are added in the order of their names."""

    def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super().loss_with_mutable_state(*args, **kwargs)
        terms = found["loss"]
        return {**found, "loss": sum(terms[name] for name in sorted(terms))}
