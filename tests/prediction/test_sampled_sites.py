"""The cells of an input from which a site is drawn, through all ways that are open."""

from dataclasses import replace

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from xr_aimz.binding.alignment import align
from xr_aimz.kernel.spec import condition_key, known_key
from xr_aimz.prediction.missing_inputs import SampledSites, is_empty_mask


def two_ways(x, a=None, b=None, n=None):
    """``x`` reaches the count through ``a`` and through ``b``."""
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    left = numpyro.sample("a", dist.Normal(slope * x, 1), obs=a)
    right = numpyro.sample("b", dist.Normal(slope * x, 1), obs=b)
    numpyro.sample("n", dist.Bernoulli(logits=left + right), obs=n)


@pytest.fixture(scope="module")
def ds():
    values = {name: ("time", np.arange(4.0)) for name in ("x", "a", "b")}
    return xr.Dataset({**values, "n": ("time", [0, 1, 1, 0])}, {"time": range(4)})


@pytest.fixture(scope="module", params=[(), ("time",)], ids=["apart", "coupled"])
def fit(ds, request):
    return ds.aimz.from_posterior(two_ways, {"slope": np.ones((1, 3))}, core_dim=request.param)


def found(ds, fit, **given):
    """The mask, as long as the input, with given cells of some sites."""
    inputs = align(fit.binding, ds, outcomes=False)
    for name, mask in given.items():
        value = xr.DataArray(np.zeros(4), dims="time")
        known = xr.DataArray(np.array(mask, bool), dims="time")
        more = {condition_key(name): value, known_key(name): known}
        inputs = replace(inputs, arrays={**inputs.arrays, **more})
    drawing = SampledSites(fit, inputs, ("a", "b", "n"))
    (argument,) = fit.binding.inputs
    cells = drawing.cells(argument, argument.sources[0], "n")
    assert drawing.feeds("n", {"n"})
    return np.broadcast_to(cells.values, 4).astype(int).tolist()


def test_one_open_way_is_enough(ds, fit):
    assert found(ds, fit) == [1, 1, 1, 1]
    assert found(ds, fit, a=[1, 1, 1, 1]) == [1, 1, 1, 1]


def test_a_cell_is_closed_where_all_ways_are(ds, fit):
    closed = found(ds, fit, a=[1, 1, 0, 0], b=[1, 1, 1, 0])
    assert closed == ([1, 1, 1, 1] if fit.binding.core_dims else [0, 0, 1, 1])
    assert found(ds, fit, a=[1] * 4, b=[1] * 4) == [0, 0, 0, 0]


def test_the_sites_between_are_named(ds, fit):
    inputs = align(fit.binding, ds, outcomes=False)
    drawing = SampledSites(fit, inputs, ("a", "b", "n"))
    (argument,) = fit.binding.inputs
    assert drawing.between(argument, argument.sources[0], "n") == ("a", "b")
    assert drawing.between(argument, argument.sources[0], "a") == ()
    # What the posterior knows is not drawn.
    assert not drawing.feeds("slope", {"slope", "n"})


def test_a_mask_without_cells_is_nowhere():
    assert is_empty_mask(xr.Variable("time", [False, False]))
    assert not is_empty_mask(xr.Variable((), True))
    assert not is_empty_mask(xr.Variable("time", [False]).chunk())
