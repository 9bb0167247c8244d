"""The same program in every process: what a fit taken up in another one stands on.

NumPyro adds up the terms of a loss in the order of a set of names, which changes from one
process to the next, and the last bits of a sum with it. Here they are added in the order
of the names; and a program is named by what is computed from what, not by the order in
which it was written down.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from numpyro.infer import Trace_ELBO

__all__ = ["ordered", "program_digest"]


def ordered(loss: Any) -> Any:
    """A loss like it whose terms are added in order; others than ``Trace_ELBO`` as they are."""
    if type(loss) is not Trace_ELBO or not loss.sum_sites:
        return loss
    return _Ordered(
        num_particles=loss.num_particles,
        vectorize_particles=loss.vectorize_particles,
        multi_sample_guide=loss.multi_sample_guide,
        sum_sites=False,
    )


class _Ordered(Trace_ELBO):  # type: ignore[misc] # NumPyro is untyped
    def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super().loss_with_mutable_state(*args, **kwargs)
        terms = found["loss"]
        return {**found, "loss": sum(terms[name] for name in sorted(terms))}


def program_digest(call: Callable, *args: Any) -> str:
    """A name for what a function computes from arrays like these."""
    closed = jax.make_jaxpr(call)(*args)
    return _digest(closed.jaxpr, closed.consts)


def _digest(jaxpr: Any, consts: Any) -> str:
    """Of the results, each named by its operation and the names of what goes into it."""
    names: dict[Any, str] = {}
    for number, var in enumerate(jaxpr.invars):
        names[var] = _hash("argument", number, var.aval)
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        names[var] = _hash("constant", np.asarray(value).tobytes(), var.aval)
    for equation in jaxpr.eqns:
        given = [_name(names, var) for var in equation.invars]
        # The name of a nested program is that of some function, whatever it computes.
        settings = {key: value for key, value in equation.params.items() if key != "name"}
        how = [(key, _setting(settings[key])) for key in sorted(settings)]
        for number, var in enumerate(equation.outvars):
            names[var] = _hash(equation.primitive.name, number, given, how)
    return _hash([_name(names, var) for var in jaxpr.outvars])


def _name(names: dict[Any, str], var: Any) -> str:
    return _hash(var.val, var.aval) if isinstance(var, Literal) else names[var]


def _setting(value: Any) -> str:
    if isinstance(value, ClosedJaxpr):
        return _digest(value.jaxpr, value.consts)
    if isinstance(value, Jaxpr):
        return _digest(value, [0] * len(value.constvars))
    if isinstance(value, (tuple, list)):
        return _hash([_setting(v) for v in value])
    # Functions print their address, which says nothing.
    return re.sub(r"0x[0-9a-f]+", "", repr(value))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
