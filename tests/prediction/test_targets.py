"""Names in ``do``: what each stands for, and that none is guessed at."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from xr_aimz.errors import InterventionError
from xr_aimz.prediction.interventions import Target, resolve_target


def model(a, b, c, y=None):
    level = numpyro.sample("level", dist.Normal(0, 1))
    numpyro.sample("seen", dist.Normal(level + a + b + c, 1), obs=y)


@pytest.fixture(scope="module")
def fit():
    ds = xr.Dataset({n: ("row", np.ones(3)) for n in ("co2", "c", "rain")})
    variables = {"a": "co2", "b": "co2", "y": "rain"}
    return ds.aimz.from_posterior(model, {"level": np.ones((1, 2))}, variables)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("a", [("array", "a")]),
        ("co2", [("array", "a"), ("array", "b")]),
        ("c", [("array", "c")]),
        ("level", [("site", "level")]),
        ("seen", [("site", "seen")]),
        ("rain", [("site", "seen")]),
        ("y", [("site", "seen")]),
    ],
)
def test_what_a_name_stands_for(fit, name, targets):
    assert resolve_target(name, fit.binding, fit.sites) == tuple(Target(*t) for t in targets)


def test_a_name_of_two_things_is_refused():
    ds = xr.Dataset({n: ("row", np.ones(3)) for n in ("x", "q", "z", "y")})

    def crossed(x, z, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b * x + z, 1), obs=y)

    fit = ds.aimz.from_posterior(crossed, {"b": np.ones((1, 2))}, {"x": "q", "z": "x"})
    with pytest.raises(InterventionError, match=r"may mean array 'x' or array 'z'"):
        resolve_target("x", fit.binding, fit.sites)
    assert resolve_target("q", fit.binding, fit.sites) == (Target("array", "x"),)


def test_two_names_of_one_thing_are_refused(fit):
    ds = xr.Dataset({n: ("row", np.ones(3)) for n in ("co2", "c")})
    with pytest.raises(InterventionError, match="another name"):
        ds.aimz.intervene(fit, {"a": 1.0, "co2": 2.0})
