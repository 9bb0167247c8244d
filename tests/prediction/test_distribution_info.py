"""What a site's distribution is made from, exactly, through a scan's carry too."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan

from xr_aimz.binding.layout import assign_variables
from xr_aimz.binding.spec import Binding
from xr_aimz.errors import ModelError
from xr_aimz.kernel.spec import BlockData, DrawState, KernelSpec
from xr_aimz.prediction.dependence import (
    DistributionInfo,
    check_not_informative,
    distribution_info,
)
from xr_aimz.tracing.sites import Site


def sites_of(model, *, scanned=()):
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        model()
    return {
        n: Site(
            n,
            "latent",
            jnp.shape(m["value"]),
            m["fn"].event_dim,
            jnp.result_type(m["value"]),
            scanned=n in scanned,
            dims=tuple(f"{n}_{i}" for i in range(jnp.ndim(m["value"]))),
        )
        for n, m in trace.items()
        if m["type"] == "sample"
    }


def found(model, *names, scanned=()):
    sites = sites_of(model, scanned=scanned)
    program = KernelSpec(model, Binding((), {}, ()), sites, {}, names)
    word = jax.ShapeDtypeStruct((2,), np.uint32)
    latents = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in sites.items()}
    draw = DrawState(dict.fromkeys(program.random_sites, word), latents)
    return distribution_info(program, {}, draw, BlockData({}, {}, {}))


def test_only_what_reaches_a_distribution_is_its_origin():
    def model():
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(a, 1))
        c = numpyro.sample("c", dist.HalfNormal(1))
        numpyro.sample("d", jax.jit(lambda b, c: dist.Normal(jnp.exp(b), jnp.sqrt(c)))(b, c))
        numpyro.sample("e", dist.Poisson(c))

    origin = found(model, "a", "b", "d", "e")
    assert {n: set(o.names) for n, o in origin.items()} == {
        "a": set(),
        "b": {"a"},
        "d": {"b", "c"},
        "e": {"c"},
    }
    assert [origin[n].discrete for n in "abde"] == [False, False, False, True]


@pytest.mark.parametrize("feeds", [True, False])
def test_the_carry_of_a_scan_is_followed(feeds):
    def model():
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(0, 1))

        def step(carry, _):
            older, old = carry
            state = numpyro.sample("state", dist.Normal(older, 1))
            y = numpyro.sample("y", dist.Normal(state + b, 1))
            return (old, y if feeds else state), None

        scan(step, (a, a), None, length=4)

    origin = found(model, "state", "y", scanned=("state", "y"))
    assert origin["y"].names == {"b", "state"}
    # Two steps on, which a single pass through the body does not show.
    assert origin["state"].names == {"a", "y" if feeds else "state"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fn", "joint"),
    [
        (dist.Normal(jnp.zeros((3, 2)), 1), 0),
        (dist.Normal(jnp.zeros((3, 2)), 1).to_event(2), 0),
        (dist.MultivariateNormal(jnp.zeros((3, 2)), jnp.eye(2)), 1),
        (dist.MultivariateNormal(jnp.zeros((3, 2)), jnp.eye(2)).to_event(1), 1),
        (dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)).expand([3]).mask(True), 1),
        (dist.GaussianRandomWalk(1.0, 4), 1),
        (dist.LKJCholesky(3, 1.0), 2),
    ],
)
def test_axes_that_are_drawn_as_one_are_counted(fn, joint):
    assert found(lambda: numpyro.sample("a", fn), "a")["a"].joint == joint


MASK = xr.DataArray([True, True, False, False], dims="time")
SCANNED = {"scanned": True, "dims": ("time",)}
LOCAL = {"dims": ("time",)}
ALONG = Binding((), {}, ("time", "lat"), core_dims=("time",))
LOOSE = Binding((), {}, ("time", "lat"))


def site(name, scanned=False, dims=()):
    return Site(name, "latent", (4,) * len(dims), 0, np.dtype("f4"), scanned=scanned, dims=dims)


@pytest.mark.parametrize(
    ("told", "given", "drawn", "free", "binding", "refused"),
    [
        # A scan: what is drawn at a step tells of what is given at it and after it.
        (SCANNED, MASK, SCANNED, ~MASK, ALONG, False),
        (SCANNED, ~MASK, SCANNED, MASK, ALONG, True),
        (SCANNED, MASK, SCANNED, MASK, ALONG, True),
        (SCANNED, None, SCANNED, ~MASK, ALONG, True),
        (SCANNED, MASK, SCANNED, None, ALONG, True),
        (SCANNED, None, SCANNED, MASK & False, ALONG, False),
        (SCANNED, MASK & False, SCANNED, None, ALONG, False),
        # Cells that are independent: the same label alone.
        (LOCAL, MASK, LOCAL, ~MASK, LOOSE, False),
        (LOCAL, MASK, LOCAL, MASK, LOOSE, True),
        (LOCAL, MASK, {"dims": ("lat",)}, None, LOOSE, True),
        (LOCAL, MASK, {}, None, LOOSE, True),
        (LOCAL, MASK & False, LOCAL, None, LOOSE, False),
        # A core_dim couples its labels in a way that is not known.
        (LOCAL, MASK, LOCAL, ~MASK, ALONG, True),
        (SCANNED, MASK, LOCAL, ~MASK, ALONG, True),
    ],
)
def test_a_value_tells_of_what_it_depends_on(told, given, drawn, free, binding, refused):
    sites = assign_variables({"y": site("y", **told), "a": site("a", **drawn)}, binding)
    origin = {"y": DistributionInfo(frozenset({"a"}), False, 0)}
    check = [{"y": given}, {"a": free}, origin, sites, binding]
    if refused:
        with pytest.raises(ModelError, match="condition='y': site 'a' is drawn"):
            check_not_informative(*check)
    else:
        check_not_informative(*check)
    # What does not reach it is not told of.
    check_not_informative(check[0], {"b": None}, *check[2:])
