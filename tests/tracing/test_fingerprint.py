"""Programs are named by what they compute, constants at any depth included."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import xr_aimz  # noqa: F401 -- the accessor
from xr_aimz.tracing.fingerprint import LRUCache, program_fingerprint, traced_fingerprint

X, Y = np.float32(2), np.float32(3)


def one(x, y):
    a, b = jnp.sin(x), jnp.cos(y)
    return a + b


def other_order(x, y):
    b = jnp.cos(y)
    a = jnp.sin(x)
    return a + b


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["bare", "nested"])
def test_the_order_of_independent_steps_is_no_difference(wrap):
    assert traced_fingerprint(wrap(one), X, Y) == traced_fingerprint(wrap(other_order), X, Y)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: jnp.sin(y) + jnp.cos(x),
        lambda x, y: jnp.cos(y) + jnp.sin(x),
        lambda x, y: jnp.sin(x) - jnp.cos(y),
        lambda x, y: jnp.sin(x) + jnp.cos(y) + 1,
        lambda x, y: jnp.sin(x) + jnp.cos(y) + np.arange(2.0),
        lambda x, y: (jnp.sin(x) + jnp.cos(y)).astype(int),
    ],
)
def test_what_is_computed_is_a_difference(other):
    assert traced_fingerprint(one, X, Y) != traced_fingerprint(other, X, Y)


def in_custom_jvp(step):
    rule = jax.custom_jvp(step)
    rule.defjvps(lambda t, _, x: t)
    return rule


def in_custom_vjp(step):
    rule = jax.custom_vjp(step)
    rule.defvjp(lambda x: (step(x), None), lambda _, g: (g,))
    return rule


def in_callback(step):
    struct = jax.ShapeDtypeStruct((3,), np.float32)
    held = step(np.ones(3, np.float32))
    return lambda x: jax.pure_callback(lambda v: v + np.asarray(held), struct, x)


# Each takes a function of three floats, and puts it one level deeper.
LEVELS = {
    "jit": jax.jit,
    "scan": lambda step: lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, jnp.ones(2))[0],
    "cond": lambda step: lambda x: jax.lax.cond(x[0] > 0, step, jnp.cos, x),
    "while": lambda step: (
        lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, step(c[1])), (0, x))[
            1
        ]
    ),
    "custom_jvp": in_custom_jvp,
    "custom_vjp": in_custom_vjp,
    "checkpoint": jax.checkpoint,
    "vmap": lambda step: lambda x: jax.vmap(step)(jnp.stack([x, x]))[0],
    "map": lambda step: lambda x: jax.lax.map(step, jnp.stack([x, x]))[0],
}
numbers = st.floats(-1e6, 1e6, width=32)


def plus(table):
    """A function that holds an array: an operand of its trace, or a constant within it."""
    return lambda x: jnp.tanh(x) * jnp.asarray(table)


def nested(levels, table):
    call = plus(table)
    for level in levels:
        call = LEVELS[level](call)
    return call


@given(
    st.lists(st.sampled_from(sorted(LEVELS)), max_size=4),
    st.lists(numbers, min_size=3, max_size=3),
    st.integers(0, 2),
)
def test_a_constant_at_any_depth_that_moves_by_one_ulp_is_another_program(levels, values, at):
    table = np.array(values, np.float32)
    moved = table.copy()
    moved[at] = np.nextafter(moved[at], np.float32(np.inf))
    x = np.ones(3, np.float32)
    first, again, other = (traced_fingerprint(nested(levels, t), x) for t in (table, table, moved))
    assert first == again
    assert first != other


def test_a_callback_is_named_by_what_it_does_and_holds():
    x = np.ones(3, np.float32)

    def named(table):
        return traced_fingerprint(in_callback(plus(np.float32(table))), x)

    assert named(1.0) == named(1.0)
    assert named(1.0) != named(1.5)


def test_random_keys_are_constants_too():
    def drawn(seed):
        key = jax.random.key(seed)
        return traced_fingerprint(lambda x: x + jax.random.normal(key), X)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_zero_and_its_negative_and_dtypes_of_one_width_are_two():
    def times(value):
        return traced_fingerprint(lambda x: x * value, X)

    assert times(0.0) != times(-0.0)
    assert times(np.float32(1)) != times(np.int32(1065353216))


@dataclass
class Held:
    """What a callback may hold: its text has eight digits, and not all of a long array."""

    table: object


@pytest.mark.parametrize("make", [np.asarray, pd.Series, lambda t: {"table": pd.Index(t)}])
@pytest.mark.parametrize("length", [3, 3000])
def test_an_object_of_a_callback_goes_by_all_of_its_values(make, length):
    struct = jax.ShapeDtypeStruct((), np.float32)

    def name(values):
        held = Held(make(values))
        return traced_fingerprint(
            lambda x: jax.pure_callback(lambda v: v + len(vars(held)), struct, x), np.float32(1)
        )

    table = np.linspace(0, 1, length)
    moved = table.copy()
    moved[length // 2] = np.nextafter(moved[length // 2], 2)
    assert name(table) == name(table.copy())
    assert name(table) != name(moved)


IN_A_PROCESS = """
import jax, jax.numpy as jnp, numpy as np
from xr_aimz.tracing.fingerprint import traced_fingerprint
class Held:
    def __init__(self, names):
        self.names = names
    def __repr__(self):
        return f"Held({self.names})"
names = {"b", "a", "some", "others", "x"}
table = {name: float(len(name)) for name in sorted(names)}
call = lambda x: jax.lax.cond(x > 0, lambda: x + table["some"], lambda: -x)
struct = jax.ShapeDtypeStruct((), np.float32)
held = lambda x: jax.pure_callback(lambda v: v + table["b"] + (v in names), struct, x)
kept = Held({*names, "y", "z"})
other = lambda x: jax.pure_callback(lambda v: v + len(kept.names), struct, x)
print(*(traced_fingerprint(f, np.float32(2)) for f in (call, held, other)))
"""


@pytest.mark.slow
def test_a_name_is_the_same_in_every_process():
    found = {
        subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def looked_up(table):
    table = jnp.asarray(table)

    @jax.jit
    def of_group(group):
        return table[group]

    def model(group, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b + of_group(group), 0.01), obs=y)

    return model


def test_two_models_with_other_tables_in_a_jitted_function_predict_their_own():
    ds = xr.Dataset({"group": ("row", np.arange(8) % 2)})
    means = {}
    for low in (0.0, 5.0):
        fit = ds.aimz.from_posterior(
            looked_up([low, low + 1]), {"b": np.zeros((1, 20))}, dim="row"
        )
        means[low] = ds.chunk(row=4).aimz.predict(fit)
    names = [pred.y.data.name for pred in means.values()]
    assert len(set(names)) == 2
    for low, pred in means.items():
        np.testing.assert_allclose(
            pred.y.mean(("chain", "draw")), low + np.arange(8) % 2, atol=0.05
        )


@pytest.mark.slow
def test_two_models_with_other_tables_are_fitted_cell_by_cell_to_their_own():
    rng = np.random.default_rng(0)
    ds = xr.Dataset(
        {"group": ("row", np.arange(40) % 2), "y": (("row", "cell"), rng.normal(size=(40, 3)))}
    )
    for low in (0.0, 5.0):
        fit = ds.aimz.fit(looked_up([low, low]), per="cell", method="laplace", draws=20)
        # A prior of N(0, 1) against forty observations with sd 0.01.
        np.testing.assert_allclose(
            fit.posterior.b.mean(("chain", "draw")), ds.y.mean("row") - low, atol=0.02
        )


def test_what_was_used_longest_ago_is_let_go_of_first():
    kept = LRUCache[int](2)
    for name in "ab":
        kept.put(name, ord(name))
    assert kept.get("a") == ord("a")
    kept.put("c", ord("c"))
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (ord("a"), None, ord("c"))
    assert len(kept) == 2


@pytest.mark.slow
def test_compiled_programs_are_bounded(monkeypatch):
    from xr_aimz.kernel import compile as device

    monkeypatch.setattr(device, "_compiled", LRUCache(3))
    ds = xr.Dataset({"group": ("row", np.arange(8) % 2)})
    predictions = []
    for low in range(5):
        fit = ds.aimz.from_posterior(looked_up([low, 1.0]), {"b": np.zeros((1, 2))}, dim="row")
        predictions.append(ds.aimz.predict(fit))
        predictions[-1].compute()
    assert len(device._compiled) == 3
    # What was let go of is compiled again, to the same draws.
    xr.testing.assert_equal(predictions[0].compute(), predictions[0].compute())


def test_a_partial_is_named_by_what_it_binds():
    def call(by, x):
        struct = jax.ShapeDtypeStruct((), np.float32)
        return jax.pure_callback(partial(np.multiply, np.float32(by)), struct, x)

    first, again, other = (traced_fingerprint(partial(call, by), X) for by in (2, 2, 3))
    assert first == again != other
    assert program_fingerprint(jax.make_jaxpr(partial(call, 2))(X)) == first


def test_the_order_in_which_a_scan_stacks_names_nothing():
    # NumPyro collects the sites of a step in a set.
    def stacked(take, *parts):
        def call(x):
            step = lambda c, _: (c + 1, tuple(part(c) for part in parts))  # noqa: E731
            return jax.lax.scan(step, x, None, length=3)[1][take]

        return traced_fingerprint(call, np.float32(1))

    def twice(c):
        return 2 * c

    def thrice(c):
        return 3 * c

    assert stacked(0, twice, thrice) == stacked(1, thrice, twice)
    assert stacked(0, twice, thrice) != stacked(1, twice, thrice)
