"""A guide that does not match its model is refused before the first step."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from numpyro.infer import SVI, Trace_ELBO

from xr_aimz.errors import ModelError


def model(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def too_little(x, y=None):
    numpyro.sample("slope", dist.Normal(numpyro.param("mean", 0.0), 1))


def too_much(x, y=None):
    numpyro.sample("slope", dist.Normal(numpyro.param("mean", 0.0), 1))
    numpyro.sample("noise", dist.HalfNormal(1))
    numpyro.sample("nose", dist.HalfNormal(1))


def helped(x, y=None):
    base = numpyro.sample("base", dist.Normal(0, 1), infer={"is_auxiliary": True})
    numpyro.sample("slope", dist.Delta(numpyro.param("mean", 0.0) + base))
    numpyro.sample("noise", dist.HalfNormal(numpyro.param("sd", 1.0)))


@pytest.fixture(scope="module")
def ds():
    x = np.linspace(-1, 1, 20)
    return xr.Dataset({"x": ("time", x), "y": ("time", x)})


@pytest.mark.parametrize(
    ("guide", "parts"),
    [
        (too_little, ["too_little", "does not cover", "['noise']", "['slope']"]),
        (too_much, ["too_much", "['nose']", "['slope', 'noise']", "is_auxiliary"]),
    ],
)
def test_a_guide_of_another_model(ds, guide, parts):
    # so many steps would take hours
    options = {"steps": 10**10, "progress": False}
    with pytest.raises(ModelError) as refused:
        ds.aimz.fit(model, method=SVI(model, guide, optax.adam(0.1), Trace_ELBO()), **options)
    assert all(part in str(refused.value) for part in parts)


# Of so few steps the loss is still noise.
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
def test_what_only_helps_a_guide_is_none_of_the_models(ds):
    made = SVI(model, helped, optax.adam(0.01), Trace_ELBO())
    fitted = ds.aimz.fit(model, method=made, steps=500, draws=20, progress=False)
    assert set(fitted.posterior) == {"slope", "noise"}
