"""The arrows of a model, and what lies below a node."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.contrib.control_flow import scan

from xr_aimz.kernel.spec import KernelSpec
from xr_aimz.prediction.dependence import descendants, site_parents
from xr_aimz.tracing.dataflow import Node


def arrows(model, draws, **options):
    ds = xr.Dataset({n: ("time", np.ones(4)) for n in ("x", "z", "y")})
    fit = ds.aimz.from_posterior(model, draws, **options)
    structs = {n: jax.ShapeDtypeStruct((4,), jnp.result_type(float)) for n in ("x", "z")}
    dims = dict.fromkeys(structs, ("time",))
    program = KernelSpec(fit.model, fit.binding, fit.sites, dims, ())
    return site_parents(program, structs, {}, {"time": 4})


def test_parents_are_one_step_away():
    def model(x, z, y=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(a, 1))
        m = numpyro.sample("m", dist.Normal(b * x, 1).mask(False))
        numpyro.deterministic("shown", m + z)
        numpyro.sample("y", dist.Normal(m, 1), obs=y)

    draws = {"a": np.ones((1, 1)), "b": np.ones((1, 1)), "m": np.ones((1, 1, 4))}
    found = arrows(model, draws)
    assert found == {
        Node("site", "a"): frozenset(),
        Node("site", "b"): {Node("site", "a")},
        Node("site", "m"): {Node("site", "b"), Node("array", "x")},
        Node("site", "shown"): {Node("site", "m"), Node("array", "z")},
        Node("site", "y"): {Node("site", "m")},
    }
    assert descendants(found, {Node("site", "a")}) == {
        Node("site", "b"),
        Node("site", "m"),
        Node("site", "shown"),
        Node("site", "y"),
    }
    assert descendants(found, {Node("site", "a")}, {Node("site", "m")}) == {Node("site", "b")}
    assert descendants(found, {Node("site", "y")}) == set()


def test_steps_of_a_scan_are_told_apart():
    def model(x, z, y=None):
        drift = numpyro.sample("drift", dist.Normal(0, 1))

        def step(level, now):
            x, z = now
            level = numpyro.sample("level", dist.Normal(level + drift * z, 1))
            return level, level + x

        _, mean = scan(step, 0.0, (x, z))
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)

    draws = {"drift": np.ones((1, 1)), "level": np.ones((1, 1, 4))}
    found = arrows(model, draws, core_dim="time")
    assert found[Node("site", "level")] == {Node("site", "drift"), Node("array", "z")}
    assert found[Node("site", "y")] == {Node("site", "level"), Node("array", "x")}
