"""Hypothesis strategies: Datasets, chunks, selections, and models with posteriors.

Models are few and at module level, sizes are small, and draws are made by hand, so that
an example costs a trace and a compilation and no inference.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import cftime
import dask
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import xarray as xr
from hypothesis import strategies as st

import xr_aimz

DIMS = ("time", "lat", "lon")
KINDS = ("float", "int", "string", "datetime64", "cftime")
SPECIES = ("oak", "ash", "elm")
NOISE = 0.7
CHAINS, DRAWS = 2, 3


# Models. `ndim` says how many of DIMS the Dataset has: a constant is static in a model.


def _plates(dims):
    stack = ExitStack()
    for dim in dims:
        stack.enter_context(xr_aimz.plate(dim))
    return stack


def grid(x, z, ndim, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    numpyro.deterministic("half", b / 2)
    with _plates(DIMS[:ndim]):
        mu = numpyro.deterministic("mu", a + b * x + z)
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def local(x, ndim, which, y=None):
    """A latent of its own for every label of some of the dims: the bits of ``which``."""
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    with _plates([d for i, d in enumerate(DIMS[:ndim]) if which >> i & 1]):
        level = numpyro.sample("level", dist.Normal(0, tau))
        numpyro.deterministic("twice", 2 * level)
    with _plates(DIMS[:ndim]):
        numpyro.sample("y", dist.Gamma(2.0, jnp.exp(level + x)), obs=y)


def broadcast(x, z, y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.StudentT(4.0, a + b * x + z, 1.0), obs=y)


def features(X, y=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([X.shape[-1]]).to_event(1))
    numpyro.sample("y", dist.Laplace(jnp.sum(X * w, -1), 1.0), obs=y)


def regression(X, y=None):
    """The model that everybody has: rows by columns."""
    w = numpyro.sample(
        "w", dist.Normal(0, 2).expand([X.shape[1]]).to_event(1), infer={"event_dims": ["feature"]}
    )
    with numpyro.plate("data", X.shape[0]):
        numpyro.sample("y", dist.Normal(X @ w, NOISE), obs=y)


def counts(x, y=None, hit=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("n", dist.Poisson(jnp.exp(a + x)), obs=y)
    numpyro.sample("any", dist.Bernoulli(logits=a - x), obs=hit)


def multivariate(x, ndim, y=None):
    offset = numpyro.sample(
        "offset", dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["species"]}
    )
    scale = jnp.array([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.5, 0.2, 1.0]])
    with _plates(DIMS[:ndim]):
        fn = dist.MultivariateNormal(x[..., None] + offset, scale_tril=scale)
        numpyro.sample("y", fn, obs=y)


# Datasets.

# Compiling is most of what an example costs. Sizes, dtypes and chunks from a small pool let
# examples share programs; the thorough profile takes any.
FROM_POOL = os.environ.get("XR_AIMZ_HYPOTHESIS") != "thorough"
SIZES = {1: ((5,),), 2: ((4, 3), (1, 3)), 3: ((3, 2, 2),)}


def sizes_of(dims, most):
    """Strategy: a size for each dim."""
    if FROM_POOL and most >= 5:
        pool = st.sampled_from(SIZES[len(dims)])
    else:
        pool = st.tuples(*(st.integers(1, most) for _ in dims))
    return pool.map(lambda sizes: dict(zip(dims, sizes, strict=True)))


def orders_of(dims):
    """Strategy: the dims in some order."""
    return st.sampled_from([dims, dims[::-1]]) if FROM_POOL else st.permutations(dims).map(tuple)


def parts_of(dims):
    """Strategy: some of the dims."""
    if FROM_POOL:
        return st.sampled_from([dims, dims[:1], ()])
    return st.tuples(*(st.booleans() for _ in dims)).map(
        lambda chosen: tuple(d for d, is_in in zip(dims, chosen, strict=True) if is_in)
    )


@st.composite
def labels(draw, kind, size):
    """Distinct labels of one kind, in any order."""
    if kind == "none":
        return None
    if kind == "float":
        numbers = st.floats(-1e6, 1e6)
    elif kind == "string":
        numbers = st.text("abcäz /.", min_size=1, max_size=4)
    else:
        numbers = st.integers(-(10**5), 10**5)
    found = draw(st.lists(numbers, min_size=size, max_size=size, unique=True))
    if kind == "datetime64":
        return pd.DatetimeIndex(np.array(found, "M8[h]").astype("M8[ns]"))
    if kind == "cftime":
        return cftime.num2date(found, "hours since 2000-01-01", calendar="360_day")
    return np.array(found)


@st.composite
def datasets(draw, ndims=(1, 2, 3), kinds=(*KINDS, "none"), most=5):
    """Inputs ``x`` and ``z``, outcomes ``y``, ``hit`` and ``many``, and coordinates galore."""
    ndim = draw(st.sampled_from(ndims))
    sizes = draw(sizes_of(DIMS[:ndim], most))
    dims = draw(orders_of(tuple(sizes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    coords = {d: draw(labels(draw(st.sampled_from(kinds)), n)) for d, n in sizes.items()}
    coords = {d: (d, v, {"axis_of": d}) for d, v in coords.items() if v is not None}

    def values(over):
        return rng.uniform(-1, 1, [sizes[d] for d in over])

    x_dims, z_dims = draw(st.permutations(dims)), draw(parts_of(dims))
    x = values(x_dims).astype(draw(st.sampled_from(["f8", "f4", "i8", "bool"])))
    shape = [sizes[d] for d in dims]
    ds = xr.Dataset(
        {
            "x": (x_dims, x, {"units": "K"}),
            "z": (z_dims, values(z_dims), {"units": "1"}),
            "y": (dims, rng.gamma(2, 1, shape), {"units": "K", "long_name": "temperature"}),
            "n": (dims, rng.poisson(2, shape), {"long_name": "number"}),
            "hit": (dims, rng.integers(0, 2, shape)),
            "many": ((*dims, "species"), rng.normal(size=[*shape, 3]), {"units": "m"}),
        },
        coords | {"species": list(SPECIES)},
        draw(st.sampled_from([{}, {"title": "a Dataset", "history": "made"}])),
    )
    if draw(st.booleans()):
        ds = ds.assign_coords(height=2.0, run="r1", age=(dims[:1], values(dims[:1])))
        ds["age"].attrs["units"] = "a"
    if draw(st.booleans()):
        ds = ds.assign_coords(area=(dims[::-1][:2], values(dims[::-1][:2])))
    return ds


@st.composite
def chunkings(draw, ds):
    """Chunks along every dim of DIMS; or none, for a numpy-backed Dataset."""
    if draw(st.sampled_from([False, True, True])):
        return {d: draw(cuts(n)) for d, n in ds.sizes.items() if d in DIMS}
    return None


@st.composite
def cuts(draw, size):
    if FROM_POOL:
        return draw(st.sampled_from([(size,), _halves(size), (1,) * size]))
    edges = [i for i in range(1, size) if draw(st.booleans())]
    return tuple(np.diff([0, *edges, size]).tolist())


def _halves(size):
    return (size,) if size == 1 else (size - size // 2, size // 2)


def chunked(ds, chunks):
    return ds if chunks is None else ds.chunk(chunks)


@st.composite
def selections(draw, ds):
    """Indexers for ``isel`` on labelled dims: scalars, slices, subsets in any order."""
    found = {}
    for dim in (d for d in DIMS if d in ds.indexes):
        size = ds.sizes[dim]
        indexer = draw(
            st.one_of(
                st.none(),
                st.integers(-size, size - 1),
                st.slices(size),
                st.lists(st.integers(0, size - 1), min_size=1, unique=True),
                st.permutations(range(size)).map(np.array),
            )
        )
        empty = isinstance(indexer, slice) and not range(*indexer.indices(size))
        if indexer is not None and not empty:
            found[dim] = indexer
    return found


# Models with their Dataset and their draws.


@dataclass(frozen=True)
class Case:
    """A model bound to a Dataset, with a posterior made by hand."""

    model: Any
    ds: xr.Dataset
    posterior: dict[str, np.ndarray]
    variables: dict[str, Any] = field(default_factory=dict)
    layout: str = "grid"
    outcomes: tuple[str, ...] = ("y",)
    event: tuple[str, ...] = ()

    @property
    def dims(self):
        return tuple(d for d in self.ds[self.outcomes[0]].dims if d in DIMS)

    def fit(self, ds=None, posterior=None):
        ds = self.ds if ds is None else ds
        posterior = self.posterior if posterior is None else posterior
        return ds.aimz.from_posterior(self.model, posterior, self.variables, layout=self.layout)


FAMILIES = ("grid", "local", "broadcast", "features", "table", "counts", "multivariate")


@st.composite
def cases(draw, families=FAMILIES, **options):
    family = draw(st.sampled_from(families))
    ds = draw(datasets(**options))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ndim = sum(d in DIMS for d in ds.dims)

    def normal(*shape):
        return rng.normal(size=(CHAINS, DRAWS, *shape))

    if family == "local":
        which = draw(st.integers(1, 2**ndim - 1))
        own = [DIMS.index(d) for d in ds.y.dims]
        shape = [ds.sizes[DIMS[i]] for i in own if which >> i & 1]
        posterior = {"tau": np.exp(normal()), "level": normal(*shape)}
        return Case(local, ds, posterior, {"ndim": ndim, "which": which})
    if family == "features":
        names = draw(st.permutations(["x", "z"]))
        return Case(features, ds, {"w": normal(2)}, {"X": names})
    if family == "table":
        return Case(regression, ds, {"w": normal(2)}, {"X": ["x", "z"]}, layout="table")
    if family == "counts":
        return Case(counts, ds, {"a": normal()}, {"y": "n"}, outcomes=("n", "hit"))
    if family == "multivariate":
        variables = {"ndim": ndim, "y": "many"}
        return Case(
            multivariate,
            ds,
            {"offset": normal(3)},
            variables,
            outcomes=("many",),
            event=("species",),
        )
    posterior = {"a": normal(), "b": normal()}
    variables = {"z": draw(st.sampled_from(["z", 0.5] + ["age"] * ("age" in ds.coords)))}
    if family == "broadcast":
        return Case(broadcast, ds, posterior, variables)
    return Case(grid, ds, posterior | {"sigma": np.exp(normal())}, variables | {"ndim": ndim})


# What it is for two results to be the same.


def assert_same(actual, expected):
    """Coordinates, attrs, dims, dtypes and ints exactly; floats to the last few ulp."""
    actual, expected = dask.compute(actual, expected, scheduler="synchronous")
    xr.testing.assert_identical(
        actual.coords.to_dataset().drop_attrs(deep=False),
        expected.coords.to_dataset().drop_attrs(deep=False),
    )
    assert _undated(actual) == _undated(expected)
    assert list(actual.data_vars) == list(expected.data_vars)
    for name, found in actual.data_vars.items():
        wanted = expected[name]
        assert (found.dims, found.dtype, found.attrs) == (wanted.dims, wanted.dtype, wanted.attrs)
        assert_close(found.values, wanted.values)


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    if found.dtype.kind != "f":
        np.testing.assert_array_equal(found, wanted)
        return
    assert np.isfinite(wanted).all()
    # Where terms cancel, the ulp that counts is that of the terms, which are of order 1.
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def _undated(ds):
    own = ("history", "aimz_fit", "aimz_seed", "aimz_versions")
    return {name: value for name, value in ds.attrs.items() if name not in own}
