"""Models of the tests of saving, in a module of their own: a fresh process imports them."""

import numpyro
import numpyro.distributions as dist
from numpyro.contrib.module import nnx_module, random_nnx_module

import xr_aimz


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)


def network(x, y=None):
    from flax import nnx

    hidden = random_nnx_module("hidden", nnx.Linear(1, 3, rngs=nnx.Rngs(0)), prior=dist.Normal())
    last = nnx_module("last", nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    with xr_aimz.plate("time"):
        numpyro.sample("y", dist.Normal(last(hidden(x[..., None]))[..., 0], 1), obs=y)


def local(x, y=None):
    with xr_aimz.plate("time"):
        level = numpyro.sample("level", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(level * x, 1), obs=y)


def guide(x, y=None):
    place = numpyro.param("place", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
    numpyro.sample("slope", dist.Normal(place, scale))
