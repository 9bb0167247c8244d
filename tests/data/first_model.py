"""The model of ``fit-format-1.zip``. Its source is compared with the store's: never change it."""

import numpyro
import numpyro.distributions as dist

import xr_aimz


def rivers(rain, power, flow=None):
    yield_ = numpyro.sample("yield", dist.Normal(0, 10))
    with xr_aimz.plate("site"):
        base = numpyro.sample("base", dist.Normal(0, 10))
    with xr_aimz.plate("time"), xr_aimz.plate("site"):
        numpyro.sample("flow", dist.Normal(base + yield_ * rain**power, 1), obs=flow)
