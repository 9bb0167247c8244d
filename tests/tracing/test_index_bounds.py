"""Positions that programs compute from their inputs, and the axes that they lie on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xr_aimz.tracing.index_bounds import find_positions, has_positions, positions_of

TABLE = np.arange(3.0, dtype=np.float32)
GROUP = np.array([0, 2, 1, -1, 5], np.int32)


def trace(fn, *arguments):
    return jax.make_jaxpr(fn)(*arguments)


def compute(fn, table=TABLE, group=GROUP):
    closed = trace(fn, table, group)
    positions = find_positions(closed, [None, "group"])
    values = positions_of(closed, [None, "group"])({"group": group})
    return positions, [np.asarray(v) for v in values]


def scanned(table, group):
    return jax.lax.scan(lambda c, g: (c + table[g], c), 0.0, group)[1]


def looped(table, group):
    return jax.lax.fori_loop(0, 2, lambda i, c: c + table[group], jnp.zeros(5))


SAME = {
    "brackets": lambda table, group: table[group],
    "take": lambda table, group: jnp.take(table, group),
    "jit": lambda table, group: jax.jit(lambda t: t[group])(table),
    "checkpoint": lambda table, group: jax.checkpoint(lambda t, g: t[g])(table, group),
    "column": lambda table, group: table[group[:, None]][:, 0],
    "vmap": lambda table, group: jax.vmap(lambda g: table[g])(group),
    "scan": scanned,
    "while": looped,
    "64 bits": lambda table, group: table[group.astype(int)],
    "clip": lambda table, group: table.at[group].get(mode="clip"),
    "at": lambda table, group: table.at[group].add(1.0),
}


@pytest.mark.parametrize("name", SAME)
def test_an_input_that_is_a_position_is_found_as_it_is(name):
    positions, values = compute(SAME[name])
    assert [(p.sources, p.highest, p.indexed) for p in positions] == [({"group"}, 2, (0, 0))]
    assert positions[0].is_input
    np.testing.assert_array_equal(np.ravel(values[0]), GROUP)


COMPUTED = {
    "shifted": (lambda table, group: table[group + 1], GROUP + 1),
    "half": (lambda table, group: table[group // 2], GROUP // 2),
    "clipped": (lambda table, group: table[jnp.clip(group, 0, 2)], np.clip(GROUP, 0, 2)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_position_that_is_computed_from_inputs_can_be_computed(name):
    fn, expected = COMPUTED[name]
    positions, values = compute(fn)
    assert [(p.sources, p.highest, p.is_input) for p in positions] == [({"group"}, 2, False)]
    np.testing.assert_array_equal(np.ravel(values[0]), expected)


@pytest.mark.slow
def test_a_position_in_a_branch_counts_where_the_branch_is_taken():
    def branching(table, group):
        return jax.lax.cond(group[0] > 0, lambda: table[group], lambda: table[:1] + group)

    positions, (values,) = compute(branching, group=np.array([0, 9], np.int32))
    assert not positions[0].is_input
    assert values.max() <= 2
    _, (values,) = compute(branching, group=np.array([1, 9], np.int32))
    assert values.max() == 9


def test_each_axis_of_several_has_its_own_positions():
    table = np.zeros((3, 4), np.float32)
    positions, values = compute(lambda table, group: table[group, group + 1], table)
    assert [(p.highest, p.indexed[1], p.is_input) for p in positions] == [
        (2, 0, True),
        (3, 1, False),
    ]
    np.testing.assert_array_equal(np.ravel(values[1]), GROUP + 1)


NONE = {
    "a slice": lambda table, group: table[1:] + group[:2],
    "positions of its own": lambda table, group: table[jnp.arange(3)] + group[:3],
    "of a draw": lambda table, group: table[jnp.argmax(table)] + group,
}


@pytest.mark.parametrize("name", NONE)
def test_what_no_input_decides_is_no_position(name):
    assert compute(NONE[name])[0] == ()


def test_programs_without_entries_by_position_are_known_by_it():
    assert not has_positions(trace(lambda table, group: table.sum() * group, TABLE, GROUP))
    assert has_positions(trace(SAME["scan"], TABLE, GROUP))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_positions_are_those_that_numpy_refuses(data):
    """Any chain of integer arithmetic: computed positions are what NumPy would index with."""
    length = data.draw(st.integers(2, 5))
    group = np.array(data.draw(st.lists(st.integers(-4, 8), min_size=1, max_size=6)), np.int32)
    steps = data.draw(
        st.lists(st.sampled_from(["+", "*", "//", "max", "where", "reshape"]), max_size=4)
    )
    number = data.draw(st.integers(1, 3))

    def position(g, xp):
        for step in steps:
            if step == "+":
                g = g + number
            elif step == "*":
                g = g * number
            elif step == "//":
                g = g // number
            elif step == "max":
                g = xp.maximum(g, -number)
            elif step == "where":
                g = xp.where(g > number, g - number, g)
            else:
                g = xp.reshape(g, (-1, 1))[:, 0]
        return g

    table = np.arange(length, dtype=np.float32)
    positions, values = compute(lambda t, g: t[position(g, jnp)], table, group)
    assert len(positions) == 1
    np.testing.assert_array_equal(np.ravel(values[0]), position(group, np))
