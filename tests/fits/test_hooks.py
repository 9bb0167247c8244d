from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from xr_aimz.errors import OptionError
from xr_aimz.fits import fitting


def level(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


@pytest.fixture
def ds():
    return xr.Dataset({"y": ("t", np.array([0.5, 1.0, 1.5]))})


@pytest.fixture
def seen():
    """What a watcher was told, of every fit of a test."""
    told = []

    @contextmanager
    def looks_on():
        told.append("begins")

        def take(fit):
            told.append(fit)
            return replace(fit, lineage={**fit.lineage, "seen": "yes"})

        try:
            yield take
        except Exception as error:
            told.append(error)
            raise

    fitting.add_fit_hook("test", looks_on)
    yield told
    del fitting._registered_hooks["test"]


@pytest.mark.slow
def test_a_watcher_is_told_of_a_fit_and_what_it_returns_is_the_fit(ds, seen):
    fit = ds.aimz.fit(level, method="laplace", draws=200)
    assert seen[0] == "begins"
    assert seen[1].lineage == {}
    # As it is returned otherwise: options and concerns are there already.
    assert seen[1].options["method"] == "laplace"
    assert seen[1].concerns == ()
    assert fit.lineage == {"seen": "yes"}
    assert fit.token == seen[1].token
    assert ds.aimz.predict(fit).attrs["seen"] == "yes"


def test_a_watcher_is_told_of_a_fit_that_fails(ds, seen):
    with pytest.raises(OptionError, match="chains") as caught:
        ds.aimz.fit(level, method="laplace", chains=2)
    assert seen == ["begins", caught.value]


def test_fits_that_nobody_looks_at_are_as_before(ds):
    assert ds.aimz.fit(level, method="laplace", draws=200).lineage == {}
