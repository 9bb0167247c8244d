"""The cells of an input from which a site is drawn, through all ways that are open."""

from dataclasses import replace
from itertools import product

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from xr_aimz.binding.alignment import align
from xr_aimz.errors import MissingValueError
from xr_aimz.kernel.spec import condition_key, known_key
from xr_aimz.prediction.missing_inputs import FreeSite, SampledSites, is_empty_mask, spread_cells
from xr_aimz.tracing.dataflow import Node


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


# --- masks, against the paths from cell to cell ----------------------------------------------

SOURCE, AXES = Node("array", "x"), {"a": 2, "b": 2}
CELLS = [dict(zip(AXES, at, strict=True)) for at in product(*map(range, AXES.values()))]


@st.composite
def graphs(draw):
    """Sites of some of two dims, some of which couple them, made from each other in any way."""
    nodes = [Node("site", name) for name in "rstu"[: draw(st.integers(1, 4))]]
    parents = {n: frozenset(draw(st.sets(st.sampled_from([SOURCE, *nodes])))) - {n} for n in nodes}
    sites, coupled = {}, {}
    for node in nodes:
        dims = sorted(draw(st.sets(st.sampled_from("ab"))))
        coupled[node] = frozenset(draw(st.sets(st.sampled_from(dims)))) if dims else frozenset()
        cells = st.lists(st.booleans(), min_size=2 ** len(dims), max_size=2 ** len(dims))
        mask = xr.Variable(dims, np.reshape(draw(cells), (2,) * len(dims)))
        if not is_empty_mask(mask):
            sites[node] = FreeSite(frozenset(dims) - coupled[node], mask)
    return draw(st.sets(st.sampled_from("ab"))), parents, sites


def cells_with_paths(dims, parents, sites):
    """For each site the cells of the input with a path to it from cell to cell."""
    states = [(n, i) for n, s in sites.items() for i, c in enumerate(CELLS) if s.mask[at(s, c)]]

    def follows(before, after, apart):
        return all(CELLS[before][d] == CELLS[after][d] for d in apart)

    result = {node: set() for node in sites}
    for start, _ in enumerate(CELLS):
        reached, front = set(), {(SOURCE, start)}
        while front:
            front = {
                (node, i)
                for node, i in states
                for parent, j in front
                if parent in parents[node]
                # Cells of one label are one cell of a site that lacks the dim.
                and follows(j, i, apart_of(parent, dims, sites) & sites[node].dims)
            } - reached
            reached |= front
        for node, _ in reached:
            result[node].add(start)
    return result


def at(site, cell):
    return tuple(cell[d] for d in site.mask.dims)


def apart_of(node, dims, sites):
    return frozenset(dims) if node == SOURCE else sites[node].dims


@given(graphs())
def test_a_mask_has_every_cell_with_a_path_to_the_site(graph):
    dims, parents, sites = graph
    masks = spread_cells(SOURCE, dims, parents, sites)
    for node, starts in cells_with_paths(dims, parents, sites).items():
        mask = masks.get(node, xr.Variable((), False))
        assert not starts or node in masks
        in_mask = {i for i, c in enumerate(CELLS) if mask[tuple(c[d] for d in mask.dims)]}
        assert starts <= in_mask
        if all(site.dims == frozenset(dims) == {*site.mask.dims} for site in sites.values()):
            assert starts == in_mask


def test_sites_of_a_scan_that_are_made_in_a_ring():
    """Dims and masks have to go round it more than once."""
    s1, s2, s3 = (Node("site", f"s{i}") for i in (1, 2, 3))
    graph = {s1: frozenset({s2}), s2: frozenset({s3}), s3: frozenset({SOURCE, s1})}
    partly = xr.Variable("b", [True, False])
    everywhere = xr.Variable((), True)
    sites = {
        s1: FreeSite(frozenset("ab"), everywhere),
        s2: FreeSite(frozenset("a"), everywhere),
        s3: FreeSite(frozenset("b"), partly),
    }
    masks = spread_cells(SOURCE, "ab", graph, sites)
    for node, starts in cells_with_paths("ab", graph, sites).items():
        mask = masks[node]
        assert starts <= {i for i, c in enumerate(CELLS) if mask[tuple(c[d] for d in mask.dims)]}


def test_a_parent_that_lacks_a_dim_leaves_the_others_sharp():
    """What a site takes directly it takes from its own cell, whatever else it takes."""
    u, n = Node("site", "u"), Node("site", "n")
    graph = {u: frozenset({SOURCE}), n: frozenset({SOURCE, u})}
    u_free = xr.Variable("b", [False, True])
    n_free = xr.Variable(("a", "b"), [[True, True], [False, True]])
    sites = {u: FreeSite(frozenset("b"), u_free), n: FreeSite(frozenset("ab"), n_free)}
    mask = spread_cells(SOURCE, "ab", graph, sites)[n].transpose("a", "b")
    assert mask.values.tolist() == [[True, True], [False, True]]


def counted(x, z=None, n=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    if z is not None:
        numpyro.sample("z", dist.Normal(slope * x, 1), obs=z)
    numpyro.sample("n", dist.Poisson(1.0 + x), obs=n)


def test_a_site_that_is_there_with_its_outcome_only(ds):
    data = ds.rename(a="z")[["x", "z", "n"]]
    fit = data.aimz.from_posterior(counted, {"slope": np.ones((1, 3))})
    assert "z" in fit.sites
    new = data[["x"]]
    whole = new.chunk(time=-1).aimz.predict(fit, sites="n").n.compute()
    np.testing.assert_array_equal(whole, new.aimz.predict(fit, sites="n").n)
    with pytest.raises(MissingValueError, match="site 'n'"):
        new.where(new.time > 0).aimz.predict(fit, sites="n")
