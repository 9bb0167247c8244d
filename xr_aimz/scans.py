"""Scans: a key for each step, handlers for those of NumPyro, and lengths of those in a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr
from numpyro.primitives import Messenger

from xr_aimz import keys
from xr_aimz.dataflow import inner_programs, open_program
from xr_aimz.errors import ModelError

__all__ = [
    "CARRY",
    "Forwards",
    "MarkedCarry",
    "recursion_length",
    "recursion_lengths",
    "step_key",
]

# The name under which the carry of a NumPyro scan is found in a traced program.
CARRY = "xr_aimz carry"
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


def step_key(site_key: keys.Words, words: Array | None, step: Array) -> Array:
    """
    Derive the key of one step of a scanned site.

    Parameters
    ----------
    site_key
        uint32 of shape ``(2,)``.
    words
        uint32 of shape ``(n, 2)``: of each label along the scan. None for a scan along no
        dimension of the Dataset, whose steps are addressed by their number.
    step
        The number of the step.

    Returns
    -------
    jax.Array
        uint32 of shape ``(2,)``.
    """
    if words is None:
        return keys.fold(site_key, jnp.stack([jnp.uint32(0), step.astype(jnp.uint32)]))
    return keys.fold(site_key, words[step])


class Forwards(Messenger):  # type: ignore[misc] # NumPyro's own has no types
    """Refuse sites in a scan that runs backwards.

    NumPyro counts the steps from where the scan starts, and keeps a site's draws in that order:
    the draw of the last label would come first.
    """

    def postprocess_message(self, message: dict[str, Any]) -> None:
        if message["type"] != "control_flow" or message["args"][4:] != (True,):
            return
        _, (trace, _) = message["value"]
        names = [n for n, m in trace.trace.items() if m["type"] == "sample"]
        if names:
            raise ModelError(
                f"sites {names!r} are in a scan with reverse=True, whose steps NumPyro counts "
                "from the last label: their draws would have each other's labels. Scan forwards, "
                "on a Dataset that is turned round: ds.isel(time=slice(None, None, -1))"
            )


class MarkedCarry(Messenger):  # type: ignore[misc] # NumPyro's own has no types
    """Name what the model carries from step to step, for who reads the traced program.

    NumPyro carries a count of steps and a random key beside it, which are no part of the model.
    """

    def process_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "control_flow":
            step, *rest = message["args"]
            message["args"] = (_marked(step), *rest)


def _marked(step: Callable) -> Callable:
    def marked(carry: Any, x: Any) -> Any:
        # One more, so that a scan that carries nothing is known for NumPyro's too.
        checkpoint_name(jnp.zeros(()), CARRY)
        return step(jax.tree.map(lambda leaf: checkpoint_name(leaf, CARRY), carry), x)

    return marked


def recursion_length(equation: Any) -> int | None:
    """Count the steps of a scan or a running sum; None for another operation."""
    if equation.primitive.name == "scan":
        return int(equation.params["length"])
    if equation.primitive.name in _CUMULATIVE:
        return int(equation.invars[0].aval.shape[equation.params["axis"]])
    return None


def recursion_lengths(program: ClosedJaxpr | Jaxpr) -> frozenset[int]:
    """Collect the lengths of all scans and running sums of a program, at any depth."""
    jaxpr, _ = open_program(program)
    lengths = {recursion_length(e) for e in jaxpr.eqns} - {None}
    inner = (recursion_lengths(one) for e in jaxpr.eqns for one in inner_programs(e))
    return frozenset(n for n in lengths if n is not None).union(*inner)
