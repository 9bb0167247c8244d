"""Of a program that is run in many worlds and then subtracted: what differs between them.

A term that is added alike in every world is not in a difference. The noise of an outcome is
such a term wherever it has a location and no world moves its scale: paired draws do not need
it, and a prediction spends most of its time on it. So a result that ends in such a sum is read
without it, where JAX's own samplers drew it. Whatever it was multiplied with stays, times zero:
what that makes NaN is NaN. A world held against its like still is exactly the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xr_aimz.written import Call, Step, Written, write_down

__all__ = ["differing", "subtracts"]

# What lays out its first operand and computes nothing.
_LAYOUT = ("broadcast_in_dim", "copy", "reshape", "squeeze", "transpose")
_CONVERT = "convert_element_type"
_SUMS = ("add", "mul", "sub")
# Functions of jax.random by the names that they have in a trace; from a key alone they draw
# finite numbers. Under any other name noise is only drawn in vain.
_SAMPLERS = {
    "_gumbel": jax.random.gumbel,
    "_laplace": jax.random.laplace,
    "_logistic": jax.random.logistic,
    "_normal": jax.random.normal,
}


def subtracts(contrast: Callable, like: Any) -> bool:
    """Whether a contrast of two arrays like that is the first less the second."""
    closed = jax.make_jaxpr(contrast)(like, like)
    return [(e.primitive.name, e.invars, e.outvars) for e in closed.jaxpr.eqns] == [
        ("sub", closed.jaxpr.invars, closed.jaxpr.outvars)
    ]


def differing(
    one: Callable[[Any], Any], world: Any, subtracted: Callable[[Any], bool]
) -> Callable[[Any], Any]:
    """
    A program less the terms that it adds alike in every world.

    Parameters
    ----------
    one : callable
        From what is set in a world to a pytree of arrays. What else it reads is no world's.
    world : pytree of arrays or structs
        Like what ``one`` is called with.
    subtracted : callable
        Of the struct of a result: whether its worlds are subtracted. Others stay whole.

    Returns
    -------
    callable
        Whose results that are subtracted differ in two worlds by what those of ``one`` do.
    """
    closed, results = jax.make_jaxpr(one, return_shape=True)(world)
    written, arguments, found = write_down(closed)
    parts = _Parts(written, set(arguments))
    structs, structure = jax.tree.flatten(results)
    wanted = [
        parts.of(at) if subtracted(struct) else at
        for at, struct in zip(found, structs, strict=True)
    ]

    def without(world: Any) -> Any:
        given = dict(zip(arguments, jax.tree.leaves(world), strict=True))
        return jax.tree.unflatten(structure, written.run(given, wanted))

    return without


@dataclass(eq=False)
class _Parts:
    """Of the values of a program, by number: what becomes of each in a difference of worlds.

    Those ``moving`` differ between worlds. ``noise`` and known numbers are ``finite``: they make
    nothing NaN by being added or multiplied.
    """

    written: Written
    moving: set[int]
    noise: set[int] = field(default_factory=set)
    finite: set[int] = field(default_factory=set)
    less: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known, calls = self.written.known.items(), self.written.calls.items()
        self.noise.update(at for at, call in calls if self._is_drawn(at, call))
        self.finite.update(at for at, v in known if _is_finite(v, self.written.avals[at]))
        # A copy, for parts are written after what they are made of.
        for step in tuple(self.written.steps):
            self._look(step)
            if len(step.made) == 1 and step.made[0] in self.moving:
                self.less[step.made[0]] = self._part(step, step.made[0])

    def of(self, at: int) -> int:
        """The number of a value less what is added to it alike in all worlds."""
        return self.less.get(at, at)

    def _look(self, step: Step) -> None:
        if not self.moving.isdisjoint(step.read):
            self.moving.update(step.made)
        if self._lays_out(step):
            for kind in (self.noise, self.finite):
                kind.update(step.made if step.read[0] in kind else ())

    def _is_drawn(self, at: int, call: Call) -> bool:
        """Whether a call draws noise: it is a sampler of JAX's own, of a key and nothing else."""
        aval, read = self.written.avals[at], [self.written.avals[i] for i in call.read]
        single = len(read) == 1 and not read[0].shape
        if call.name not in _SAMPLERS or not single:
            return False
        if not jnp.issubdtype(read[0].dtype, jax.dtypes.prng_key):
            return False
        sampler = partial(_SAMPLERS[call.name], shape=aval.shape, dtype=aval.dtype)
        own = jax.make_jaxpr(sampler)(read[0])
        # By what it does: anybody may call a function so.
        found = [e.params["jaxpr"] for e in own.jaxpr.eqns if e.params.get("name") == call.name]
        return str(call.does) in map(str, found)

    def _part(self, step: Step, at: int) -> int:
        read = step.read
        if step.name in ("add", "sub"):
            return self._of_sum(at, step.name, *read)
        if self._lays_out(step):
            return self._of_parts(step, (self.of(read[0]), *read[1:]))
        if step.name == "select_n":
            # Each cell takes the same case in all worlds, or in one of them what makes any
            # difference NaN.
            cases = [case for case in read[1:] if not self._missing(case)]
            if read[0] not in self.moving or len(cases) == 1:
                return self._of_parts(step, (read[0], *map(self.of, read[1:])))
        return at

    def _of_sum(self, at: int, name: str, first: int, second: int) -> int:
        if second not in self.moving:
            kept, left = first, second
        elif first not in self.moving and name == "add":
            kept, left = second, first
        else:
            return at
        noisy, deciding = self._apart(left)
        aval = self.written.avals[at]
        # A scalar may be added to an array as it is.
        if not noisy or self.written.avals[kept].shape != aval.shape:
            return at
        if not deciding:
            return self.of(kept)
        return self.written.write("zeros", _with_zeros, (self.of(kept), *deciding), [aval])[0]

    def _apart(self, at: int) -> tuple[bool, list[int]]:
        """Whether a value is made with noise, and the values by which alone it can be NaN."""
        noisy, deciding, seen, todo = False, [], {at}, [at]
        while todo:
            here = todo.pop()
            step = self.written.maker.get(here)
            if here in self.noise:
                noisy = True
            elif step is not None and step.name in _SUMS:
                todo.extend(i for i in step.read if i not in seen)
                seen.update(step.read)
            elif here not in self.finite:
                deciding.append(here)
        return noisy, deciding

    def _missing(self, at: int) -> bool:
        """Whether a value is NaN, everywhere and in all worlds."""
        step = self.written.maker.get(at)
        while step and self._lays_out(step):
            at = step.read[0]
            step = self.written.maker.get(at)
        value = self.written.known.get(at)
        # A constant may be a value of the trace around this one.
        held = isinstance(value, (float, np.ndarray, np.generic))
        return held and bool(np.isnan(np.asarray(value, float)).all())

    def _lays_out(self, step: Step) -> bool:
        """Whether a step leaves every number what it is, or nearly: floats stay floats."""
        if step.name != _CONVERT:
            return step.name in _LAYOUT
        both = (self.written.avals[at].dtype for at in (step.read[0], step.made[0]))
        return all(jnp.issubdtype(dtype, jnp.floating) for dtype in both)

    def _of_parts(self, step: Step, read: Sequence[int]) -> int:
        if tuple(read) == step.read:
            return step.made[0]
        aval = self.written.avals[step.made[0]]
        return self.written.write(step.name, step.operate, read, [aval])[0]


def _is_finite(value: Any, aval: Any) -> bool:
    """Whether a constant is a number that is known here, and none of the trace around."""
    number = not aval.shape and jnp.issubdtype(aval.dtype, jnp.floating)
    return number and not isinstance(value, jax.core.Tracer) and bool(np.isfinite(value))


def _with_zeros(kept: jax.Array, *others: jax.Array) -> tuple[jax.Array]:
    return (sum((0 * other for other in others), start=kept),)
