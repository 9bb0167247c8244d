"""Optimizers that record their iterates: the average, or the spread.

Near the optimum the gradient of a batch is noise, and the params walk about it. The average of
the walk lies nearer to the optimum than its last step. Our own optimizer lowers its rate to where
the walk is short, and averages from there on; an optimizer of the caller's is followed as it is,
and the spread of its last iterates says how far off the last one may be.

The record is part of the optimizer's state, so that checkpoints hold it. Of params with an entry
for each label it has one too, which changes only in the steps that train the label.

References
----------
Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging, SIAM Journal
on Control and Optimization 30 (4).
Shamir and Zhang (2013), Stochastic gradient descent for non-smooth optimization: convergence
results and optimal averaging schemes, ICML 30.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from numpyro.optim import _NumPyroOptim

from xr_aimz.infer.svi import FULL_RATE

__all__ = ["Average", "AverageOptimizer", "Spread", "SpreadOptimizer", "adam"]

# After the steps at the full rate it falls to LAST_RATE of itself, and stays there for the last
# AVERAGED of all steps. Measured: docs/decisions/minibatch.md.
AVERAGED, LAST_RATE = 0.25, 0.1
# An iterate of a caller's optimizer weighs as much as the number of steps before it to this power:
# the last twentieth of all steps counts most, however many there will be (Shamir and Zhang 2013).
# Of 8000 steps whose rate falls to their end, 8 reported means 0.5 sds off that were 0.01 off.
_POWER = 16


class Average(NamedTuple):
    """Of one param, entry by entry, over the averaged steps.

    ``lag`` is the mean of the iterates less the last one, ``slope`` and ``square`` the sums of
    gradients and of their squares, ``count`` the number of steps.
    """

    lag: Any
    slope: Any
    square: Any
    count: Any


class Spread(NamedTuple):
    """Of one param, entry by entry.

    ``lag`` is the mean of the last iterates less the very last one, ``variance`` theirs, and
    ``count`` the number of all iterates.
    """

    lag: Any
    variance: Any
    count: Any


class _RecordOptimizer(_NumPyroOptim):  # type: ignore[misc] # NumPyro is untyped
    """An optimizer whose state is that of another, with a record for each param beside it."""

    def __init__(self, inner: _NumPyroOptim) -> None:
        self._inner = inner

    def init(self, params: Any) -> Any:
        step, inner = self._inner.init(params)
        return step, (inner, jax.tree.map(self._blank, params))

    def get_params(self, state: Any) -> Any:
        return self._inner.get_params(_inner_state(state))

    def _blank(self, param: Any) -> Any:
        raise NotImplementedError


class AverageOptimizer(_RecordOptimizer):
    """Adam whose iterates are averaged from a step on.

    Parameters
    ----------
    inner : numpyro.optim.Adam
    start : int
        The first step that is averaged.
    """

    def __init__(self, inner: _NumPyroOptim, start: int) -> None:
        super().__init__(inner)
        self.start = start

    def _blank(self, param: Any) -> Average:
        zero = jnp.zeros_like(param)
        return Average(zero, zero, zero, zero)

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> Any:
        step, (_, records) = state
        before = self.get_params(state)
        output, gradient = jax.value_and_grad(fn, has_aux=True)(before)
        new = self._inner.update(gradient, _inner_state(state), value=output[0])
        on = step >= self.start

        def record(x: Any, y: Any, g: Any, old: Average) -> Average:
            g, count = jnp.where(on, g, 0), old.count + on
            # The mean less the last iterate: small numbers, and no sum that outgrows them.
            lag = jnp.where(on, old.count / jnp.maximum(count, 1) * (old.lag - (y - x)), 0)
            return Average(lag, old.slope + g, old.square + g**2, count)

        params = self._inner.get_params(new)
        return output, (new[0], (new[1], _map(record, before, params, gradient, records)))

    def result(self, state: Any) -> Any:
        """The mean of the iterates; of an entry that no averaged step trained, the last one."""
        _, (_, records) = state
        return _map(lambda x, record: x + record.lag, self.get_params(state), records)

    def restarted(self, state: Any) -> Any:
        """The state with blank records where no step of this optimizer was averaged yet."""
        step, (inner, records) = state
        if int(step) >= self.start:
            return state
        return step, (inner, jax.tree.map(jnp.zeros_like, records))


class SpreadOptimizer(_RecordOptimizer):
    """An optimizer of the caller's, and the spread of its last iterates."""

    def result(self, state: Any) -> Any:
        """The last iterate."""
        return self.get_params(state)

    def _blank(self, param: Any) -> Spread:
        zero = jnp.zeros_like(param)
        return Spread(zero, zero, zero)

    def eval_and_update(
        self, fn: Callable, state: Any, forward_mode_differentiation: bool = False
    ) -> Any:
        _, (_, records) = state
        before = self.get_params(state)
        output, new = self._inner.eval_and_update(
            fn, _inner_state(state), forward_mode_differentiation=forward_mode_differentiation
        )

        def record(x: Any, y: Any, old: Spread) -> Spread:
            # An entry that a step does not train stays, and is no iterate of it.
            count = old.count + 1
            share = (_POWER + 1) / (count + _POWER)
            away = old.lag - (y - x)
            variance = (1 - share) * (old.variance + share * away**2)
            return Spread((1 - share) * away, variance, count)

        params = self._inner.get_params(new)
        return output, (new[0], (new[1], _map(record, before, params, records)))


def adam(rate: float, steps: int) -> AverageOptimizer:
    """Adam for so many steps of batches, the last quarter of them averaged."""
    full, start = int(FULL_RATE * steps), steps - max(1, int(AVERAGED * steps))

    def schedule(step: Any) -> Any:
        descent = jnp.clip((step - full) / max(start - full, 1), 0, 1)
        return rate * LAST_RATE**descent

    return AverageOptimizer(numpyro.optim.Adam(schedule), start)


def _inner_state(state: Any) -> Any:
    step, (inner, _) = state
    return step, inner


def _map(fn: Callable, params: Any, *others: Any) -> Any:
    """Map ``fn`` over the params and over what the other trees have in the place of each."""
    structure: Any
    leaves, structure = jax.tree.flatten(params)
    rows = zip(leaves, *(structure.flatten_up_to(o) for o in others), strict=True)
    return jax.tree.unflatten(structure, [fn(*row) for row in rows])
