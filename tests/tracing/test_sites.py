"""What one abstract trace tells of a model."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import flax_module

import xr_aimz
from xr_aimz.errors import DimensionError, ModelError
from xr_aimz.tracing.sites import Block, model_parameters, observed_inputs, trace_lock, trace_sites

BLOCK = Block({"time": 5, "lat": 2, "band": 4}, {"time": -2, "lat": -1})


def sites_of(model, block=BLOCK, **shapes):
    structs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    return {site.name: site for site in trace_sites(model, dict, structs, block)}


def reaching(model, **shapes):
    structs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    return observed_inputs(model, dict, structs, BLOCK)


def test_parameters_are_those_of_the_signature():
    def model(x, n=3, y=None, *, z, **rest):
        pass

    found = [(p.name, p.required, p.default) for p in model_parameters(model)]
    assert found == [("x", True, None), ("n", False, 3), ("y", False, None), ("z", True, None)]


@pytest.mark.parametrize("source", ["lambda *args: 0", "lambda x, /: 0"])
def test_arguments_that_have_no_name_are_refused(source):
    with pytest.raises(ModelError, match="cannot be passed by name"):
        model_parameters(eval(source))


def test_a_model_is_a_callable():
    with pytest.raises(ModelError, match="found 3"):
        model_parameters(3)


def test_sites_have_kind_shape_dtype_and_distribution():
    def model(x, y=None):
        a = numpyro.sample("a", dist.Normal(0, 1))
        n = numpyro.sample("n", dist.Poisson(3.0))
        w = numpyro.sample("w", dist.Dirichlet(jnp.ones(3)))
        numpyro.deterministic("mu", a * x + n + w.sum())
        numpyro.sample("y", dist.Normal(a * x, 1).to_event(1), obs=y)

    found = sites_of(model, x=(5, 2), y=(5, 2))
    facts = {n: (s.kind, s.shape, s.event_ndim, s.distribution) for n, s in found.items()}
    assert facts == {
        "a": ("latent", (), 0, "Normal"),
        "n": ("latent", (), 0, "Poisson"),
        "w": ("latent", (3,), 1, "Dirichlet"),
        "mu": ("deterministic", (5, 2), 0, ""),
        "y": ("observed", (5, 2), 1, "Normal"),
    }
    assert found["n"].dtype == jnp.int32
    assert found["a"].dtype == jnp.float32
    assert found["y"].obs_argument == "y"
    assert found["y"].batch_ndim == 1


def test_a_trace_computes_nothing():
    def model(x, y=None):
        jax.debug.callback(lambda: pytest.fail("computed"))
        numpyro.sample("y", dist.Normal(x, 1), obs=y)

    # An array this size would not fit the machine.
    assert sites_of(model, x=(10**6, 10**6), y=(10**6, 10**6))["y"].shape == (10**6, 10**6)


def test_plates_around_a_site():
    def model(x):
        with numpyro.plate("time", 5, dim=-2), numpyro.plate("lat", 2, dim=-1):
            numpyro.sample("a", dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)))

    site = sites_of(model, x=())["a"]
    assert site.shape == (5, 2, 3)
    assert {(p.name, p.dim, p.size) for p in site.plates} == {("time", -2, 5), ("lat", -1, 2)}


def test_event_dims_are_read():
    def model(x):
        prior = dist.Normal(jnp.zeros(3), 1).to_event(1)
        numpyro.sample("a", prior, infer={"event_dims": ["band"]})

    assert sites_of(model, x=())["a"].event_dims == ("band",)


def test_priors_that_cannot_be_sampled_are_traced():
    def model(x, y=None):
        flat = dist.ImproperUniform(dist.constraints.real, (), (3,))
        a = numpyro.sample("a", flat)
        with numpyro.plate("lat", 2):
            numpyro.sample("b", dist.ImproperUniform(dist.constraints.positive, (), ()))
        numpyro.sample("y", dist.Normal(a.sum() * x, 1), obs=y)

    found = sites_of(model, x=(5,), y=(5,))
    assert found["a"].shape == (3,)
    assert found["b"].shape == (2,)
    assert found["b"].kind == "latent"


def test_params_are_sites_trained_where_they_have_values():
    def model(x):
        numpyro.param("loc", jnp.zeros(2))
        flax_module("net", flax.linen.Dense(3), input_shape=(4,))
        numpyro.sample("a", dist.Normal(0, 1))

    found = sites_of(model, x=())
    kinds = {name: s.kind for name, s in found.items()}
    assert kinds == {"loc": "param", "net$params": "param", "a": "latent"}
    assert found["loc"].has_initial_value
    assert found["net$params"].has_initial_value


def test_sites_of_a_scan():
    def model(y=None):
        def step(state, observed):
            state = numpyro.sample("state", dist.Normal(state, 1))
            numpyro.sample("y", dist.Normal(state, 1), obs=observed)
            return state, None

        scan(step, 0.0, y, length=5)

    found = sites_of(model, y=(5,))
    assert found["state"].shape == (5,)
    assert found["state"].kind == "latent"
    assert found["y"].kind == "observed"
    assert found["state"].scanned
    assert found["y"].scanned


def test_auxiliary_and_subsample_sites_are_no_sites():
    def model(y=None):
        with numpyro.plate("time", 5):
            numpyro.sample("y", dist.Normal(0, 1), obs=y)

    assert list(sites_of(model, y=(5,))) == ["y"]


def test_which_arguments_reach_what_is_observed():
    def model(x, exposure=None, y=None, z=None):
        numpyro.sample("y", dist.Normal(x * exposure, 1), obs=jnp.log(y))
        numpyro.sample("z", dist.Normal(x, 1), obs=z - x)

    found = reaching(model, x=(5,), exposure=(5,), y=(5,), z=(5,))
    assert found == {"y": frozenset({"y"}), "z": frozenset({"z", "x"})}


def test_an_outcome_that_is_transformed_is_not_the_argument():
    def model(y=None):
        numpyro.sample("y", dist.Normal(0, 1), obs=jnp.log(y))

    assert sites_of(model, y=(5,))["y"].obs_argument is None


def test_the_error_of_a_model_gets_a_note():
    def model(x):
        numpyro.sample("first", dist.Normal(0, 1))
        numpyro.sample("second", dist.Normal(0, 1))
        raise LookupError("mine")

    with pytest.raises(LookupError) as caught:
        sites_of(model, x=(5, 1))
    (note,) = [n for n in caught.value.__notes__ if n.startswith("xr_aimz")]
    assert "'second'" in note
    assert "{'x': (5, 1)}" in note


def test_an_error_before_the_first_site_gets_a_note():
    def model(x):
        raise LookupError("mine")

    with pytest.raises(LookupError) as caught:
        sites_of(model, x=())
    assert "before its first site" in "".join(caught.value.__notes__)


def test_a_plate_outside_of_a_block_is_refused():
    with pytest.raises(DimensionError, match=r"plate\('lat'\).*numpyro\.plate"):
        xr_aimz.plate("lat")


def test_the_block_is_gone_after_a_trace_and_after_an_error():
    def fail():
        with trace_lock(BLOCK):
            assert xr_aimz.plate("lat").size == 2
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    with pytest.raises(DimensionError):
        xr_aimz.plate("lat")


def test_a_plate_asks_the_block():
    def model():
        with xr_aimz.plate("time"), xr_aimz.plate("lat"):
            numpyro.sample("a", dist.Normal(0, 1))
        with xr_aimz.plate("lat"):
            numpyro.sample("b", dist.Normal(0, 1))
        with xr_aimz.plate("band"):
            numpyro.sample("c", dist.Normal(0, 1))

    found = sites_of(model)
    assert [found[n].shape for n in "abc"] == [(5, 2), (2,), (4,)]
    assert [(p.name, p.dim) for p in found["c"].plates] == [("band", -1)]


def test_a_plate_for_no_dimension_is_refused_with_those_there_are():
    with pytest.raises(DimensionError, match=r"'lon'.*'lat'"):
        sites_of(lambda: xr_aimz.plate("lon"))


def test_a_plate_for_a_flattened_dimension_is_refused():
    table = Block({"time": 5, "lat": 2}, {"time": -1, "lat": -1}, table=True)
    with pytest.raises(DimensionError, match=r"'lat'.*layout='table'.*layout='grid'"):
        sites_of(lambda: xr_aimz.plate("lat"), table)


def test_traces_in_threads_do_not_mix():
    # NumPyro's handler stack is one list for all threads.
    from concurrent.futures import ThreadPoolExecutor

    def model_of(n):
        def model():
            for i in range(n):
                numpyro.sample(f"site{n}_{i}", dist.Normal(jnp.zeros(n), 1))

        return model

    with ThreadPoolExecutor(4) as pool:
        counts = np.tile(np.arange(1, 7), 3)
        found = list(pool.map(lambda n: sites_of(model_of(n)), counts))
    for n, sites in zip(counts, found, strict=True):
        assert list(sites) == [f"site{n}_{i}" for i in range(n)]
