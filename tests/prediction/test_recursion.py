"""How far back sites look, read off a trace: exact for scans, and never too short."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan

from xr_aimz.binding.alignment import align
from xr_aimz.kernel.program import predictive
from xr_aimz.prediction.recursion import Dependence, collect_ancestors
from xr_aimz.prediction.spec import Prediction

INF = float("inf")
SIZES = {"time": 6, "lat": 2}


def ar(order):
    def model(x, y=None):
        phi = numpyro.sample("phi", dist.Normal(0, 1))

        def step(before, now):
            mean = phi * sum(before)
            value = numpyro.sample("y", dist.Normal(mean, 1), obs=now)
            return (value, *before[:-1]), None

        scan(step, (jnp.zeros(x.shape[1]),) * order, y, length=x.shape[0])

    return model


def level(x, y=None):
    def step(before, now):
        with numpyro.plate("lat", x.shape[1]):
            state = numpyro.sample("state", dist.Normal(before, 1))
            numpyro.sample("y", dist.Normal(state, 1), obs=now)
        return state, None

    scan(step, jnp.zeros(x.shape[1]), y, length=x.shape[0])


def change(x, y=None):
    """The outcome looks at the state before, too."""

    def step(before, now):
        with numpyro.plate("lat", x.shape[1]):
            state = numpyro.sample("state", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(state - before, 1), obs=now)
        return state, None

    scan(step, jnp.zeros(x.shape[1]), y, length=x.shape[0])


def counted(x, y=None):
    def step(count, now):
        numpyro.sample("y", dist.Normal(jnp.ones(x.shape[1]) * count, 1), obs=now)
        return count + 1, None

    scan(step, 0.0, y, length=x.shape[0])


def carried_along(x, y=None):
    """A carry that never changes, and one that nothing looks at."""

    def step(carry, now):
        mean, count = carry
        numpyro.sample("y", dist.Normal(mean, 1), obs=now)
        return (mean, count + 1), None

    scan(step, (jnp.ones(x.shape[1]), 0.0), y, length=x.shape[0])


def nothing_carried(x, y=None):
    def step(_, now):
        numpyro.sample("y", dist.Normal(now[0], 1), obs=now[1])
        return None, None

    scan(step, None, (x, y))


def smoothed(x, wrap=lambda f: f, reverse=False):
    def smooth(x):
        def step(s, now):
            s = 0.5 * s + now
            return s, s

        return jax.lax.scan(step, jnp.zeros(x.shape[1:]), x, reverse=reverse)[1]

    return wrap(smooth)(x)


def inputs_made(make):
    def model(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        mean = numpyro.deterministic("mean", make(x))
        numpyro.sample("y", dist.Normal(b * mean, 1), obs=y)

    return model


def through_a_cond(x):
    return jax.lax.cond(x.mean() > 0, smoothed, lambda x: x, x)


def through_a_loop(x):
    return jax.lax.fori_loop(0, 3, lambda _, x: smoothed(x), x)


def along_lat(x):
    return jnp.cumsum(x, 1)


def other_loops(x):
    """Of as many steps as the Dataset has labels, but along none of its dims."""
    return jax.lax.scan(lambda c, _: (jnp.cos(c), None), x, None, length=6)[0]


DS = xr.Dataset(
    {n: (tuple(SIZES), np.ones(tuple(SIZES.values()))) for n in "xy"},
    {"time": range(6), "lat": [50, 60]},
)
DRAWS = {"phi": (), "b": (), "state": (6, 2)}


def reach(model, dim="time", **options):
    """(past, future) of each site that is no latent."""
    known = {n: np.ones((1, 2, *shape)) for n, shape in DRAWS.items()}
    fit = DS.aimz.from_posterior(model, known, **options)
    sites = tuple(n for n, s in fit.sites.items() if s.kind != "latent")
    inputs = align(fit.binding, DS, outcomes=False)
    wanted = Prediction(fit, inputs, fit.posterior, predictive, sites, 0)
    return {name: (r.past, r.future) for name, r in wanted.dependences(dim).items()}


@pytest.mark.parametrize(
    ("model", "past"),
    [
        (ar(1), 1),
        (ar(3), 3),
        (level, 0),
        (change, 1),
        (counted, INF),
        (carried_along, 0),
        (nothing_carried, 0),
    ],
)
def test_a_scan_looks_back_as_far_as_its_carry_goes(model, past):
    assert reach(model)["y"] == (past, 0)
    # Nothing of it is along the other dim.
    assert reach(model, "lat")["y"] == (0, 0)


@pytest.mark.parametrize(
    ("make", "past", "future"),
    [
        (lambda x: x - 1, 0, 0),
        (smoothed, INF, 0),
        (partial(smoothed, reverse=True), 0, INF),
        (partial(smoothed, wrap=jax.jit), INF, 0),
        (partial(smoothed, wrap=jax.checkpoint), INF, 0),
        (partial(smoothed, wrap=lambda f: jax.vmap(f, in_axes=1, out_axes=1)), INF, 0),
        (through_a_cond, INF, 0),
        (lambda x: jnp.cumsum(x, 0), INF, 0),
        (lambda x: jax.lax.cummax(x, 0, reverse=True), 0, INF),
        (lambda x: smoothed(smoothed(x, reverse=True)), INF, INF),
        (along_lat, 0, 0),
        (other_loops, 0, 0),
    ],
)
def test_a_recursion_over_inputs_is_found_wherever_it_is(make, past, future):
    found = reach(inputs_made(make))
    assert found == {"mean": (past, future), "y": (past, future)}


def test_what_is_not_known_looks_both_ways():
    @jax.custom_jvp
    def inner(x):
        return smoothed(x)

    inner.defjvp(lambda primals, tangents: (inner(*primals), *tangents))
    assert reach(inputs_made(inner))["y"] == (INF, 0)
    looped = inputs_made(
        lambda x: jax.lax.while_loop(lambda c: c.mean() < 0, lambda c: smoothed(c), x)
    )
    assert reach(looped)["y"] == (INF, INF)


def test_a_table_runs_along_all_of_its_dims():
    def model(x, y=None):
        def step(before, now):
            value = numpyro.sample("y", dist.Normal(0.5 * before, 1), obs=now)
            return value, None

        scan(step, 0.0, y, length=x.shape[0])

    for dim in SIZES:
        assert reach(model, dim, layout="table")["y"] == (1, 0)


def test_a_model_with_sizes_written_into_it_is_read_on_its_own():
    def model(x, y=None):
        offset = jnp.zeros((6, 2))
        numpyro.sample("y", dist.Normal(jnp.cumsum(x + offset, 0), 1), obs=y)

    assert reach(model)["y"] == (INF, 0)


def test_what_a_site_is_made_from_is_followed_to_its_sources():
    dependences = {
        "y": Dependence(frozenset({"state"})),
        "state": Dependence(frozenset({"q", "state"}), 1),
    }
    assert collect_ancestors(["y"], dependences) == {"y", "state", "q"}
    assert collect_ancestors(["q"], dependences) == {"q"}
