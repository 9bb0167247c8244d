"""Which inputs reach which results of a program, whatever programs it holds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xr_aimz.tracing.dataflow import dependencies

INPUTS = {name: np.float32(0.3 * i + 0.1) for i, name in enumerate("abcd")}


def found(call):
    results = dependencies(lambda array: call(**array), array=INPUTS)
    return {n: {node.name for node in nodes} for n, nodes in results.items()}


def test_what_is_computed_from_what():
    def call(a, b, c, d):
        return {"sum": a + b, "alone": jnp.sin(c), "none": jnp.ones(3), "left out": a * 1}

    assert found(call) == {"sum": {"a", "b"}, "alone": {"c"}, "none": set(), "left out": {"a"}}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, jax.custom_jvp, jax.custom_vjp])
def test_a_function_within_is_followed(wrap):
    inner = wrap(lambda a, b: (a, b * 2))
    if wrap is jax.custom_jvp:
        inner.defjvp(lambda p, t: (inner(*p), t))
    if wrap is jax.custom_vjp:
        inner.defvjp(lambda *x: (inner(*x), None), lambda _, g: g)
    got = found(lambda a, b, c, d: dict(zip("xy", inner(a + c, b), strict=True)))
    assert got == {"x": {"a", "c"}, "y": {"b"}}


def test_a_branch_passes_on_what_decides_it():
    def call(a, b, c, d):
        x, y = jax.lax.cond(a > 0, lambda b, c: (b, 1.0), lambda b, c: (c, c), b, c)
        return {"x": x, "y": y, "z": d}

    assert found(call) == {"x": {"a", "b", "c"}, "y": {"a", "c"}, "z": {"d"}}


def test_a_loop_is_followed_until_its_carry_settles():
    def call(a, b, c, d):
        def step(carry, one):
            x, y, z = carry
            return (y, z, z + one), x

        last, each = jax.lax.scan(step, (a, b, c), jnp.stack([d, d]))
        return {"x": last[0], "z": last[2], "each": each}

    # After three steps; a single pass shows "b" alone in the first.
    everything = {"a", "b", "c", "d"}
    assert found(call) == {"x": everything, "z": {"c", "d"}, "each": everything}


def test_a_condition_passes_on_to_all_that_its_loop_carries():
    def call(a, b, c, d):
        x, y = jax.lax.while_loop(lambda v: v[0] < a, lambda v: (v[0] + b, v[1] * 2), (c, d))
        return {"x": x, "y": y}

    assert found(call) == {"x": {"a", "b", "c"}, "y": {"a", "b", "c", "d"}}


def test_an_operation_that_is_not_known_passes_everything_on():
    struct = (jax.ShapeDtypeStruct((), np.float32),) * 2

    def call(a, b, c, d):
        x, y = jax.pure_callback(lambda a, b: (a, b), struct, a, b)
        return {"x": x, "y": y}

    assert found(call) == {"x": {"a", "b"}, "y": {"a", "b"}}


STEPS = {
    "add": lambda x, y: (x + y, y),
    "swap": lambda x, y: (y, x),
    "jit": lambda x, y: jax.jit(lambda p, q: (p * 2, q + p))(x, y),
    "cond": lambda x, y: jax.lax.cond(x > 0.2, lambda: (x, y), lambda: (y, x)),
    "scan": lambda x, y: jax.lax.scan(lambda c, _: ((c[1], c[0] * 0.5), None), (x, y), None, 3)[0],
    "while": lambda x, y: jax.lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 0.4, c[1] * 2), (jnp.abs(x), y)
    ),
    "forget": lambda x, y: (x, jnp.zeros_like(y)),
}


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.permutations("abcd")), max_size=6),
    st.integers(0, 10**6),
)
def test_what_moves_a_result_is_always_named(steps, seed):
    """Any result that changes with an input names it; more may be named, never less."""

    def call(**values):
        for name, (first, second, *_) in steps:
            values[first], values[second] = STEPS[name](values[first], values[second])
        return values

    names = found(lambda a, b, c, d: call(a=a, b=b, c=c, d=d))
    rng = np.random.default_rng(seed)
    before = call(**INPUTS)
    for moved, result in itertools.product(INPUTS, INPUTS):
        after = call(**{**INPUTS, moved: np.float32(rng.normal())})
        if after[result] != before[result]:
            assert moved in names[result]
