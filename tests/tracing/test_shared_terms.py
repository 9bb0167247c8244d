"""What is left out of a difference is in both of its terms, and nothing else is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import xr_aimz
from xr_aimz.tracing.shared_terms import is_difference, without_shared_terms

CELLS = 6
rng = np.random.default_rng(0)
SHARED = [jnp.asarray(rng.normal(size=CELLS), jnp.float32) for _ in range(3)]
FLAGS = jnp.asarray([True, False, True, True, False, False])

NOISE = jax.random.key(0)
leaves = st.sampled_from(["own", "other", "noise", *SHARED, jnp.nan, 2.0])
# Each of one or two terms: what a program may do between a location and its outcome.
UNARY = {
    "neg": lambda a: -a,
    "tanh": jnp.tanh,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "over": lambda a: 1.0 / (jnp.asarray(a, jnp.float32) - a),
    "bits": lambda a: jnp.asarray(a, jnp.float32).view(jnp.int32).view(jnp.float32),
    "grid": lambda a: jnp.broadcast_to(a, (CELLS,)).reshape(2, 3).T.T.reshape(CELLS),
    "whole": lambda a: jnp.nan_to_num(jnp.round(a)).astype(int).astype(jnp.float32),
    "half": lambda a: jnp.asarray(a, jnp.float32).astype(jnp.float16).astype(jnp.float32),
    "called": jax.jit(lambda a: a + SHARED[0]),
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": jnp.maximum,
    "where": lambda a, b: jnp.where(FLAGS, a, b),
    "gap": lambda a, b: jnp.where(jnp.asarray(a) > 0.5, jnp.nan, b),
    "case": lambda a, b: jnp.where(jnp.asarray(a) > 0.5, a, b),
}
programs = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), inner),
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
    ),
    max_leaves=12,
)


# A location and a term, each any program: what an outcome most often is.
outcomes = st.one_of(programs, st.tuples(st.just("add"), programs, programs))


def value(program, world):
    if program == "noise":
        return jax.random.normal(NOISE, (CELLS,))
    if isinstance(program, str):
        return world[program]
    if not isinstance(program, tuple):
        return program
    name, *terms = program
    return {**UNARY, **BINARY}[name](*(value(term, world) for term in terms))


@pytest.mark.slow
@given(program=outcomes, seed=st.integers(0, 100))
def test_results_differ_by_what_they_did(program, seed):
    def one(world):
        return jnp.broadcast_to(jnp.asarray(value(program, world), jnp.float32), (CELLS,))

    own, moved, other = np.random.default_rng(seed).normal(size=(3, CELLS)).astype("f4")
    before, after = {"own": own, "other": other}, {"own": moved, "other": other}
    less = without_shared_terms(one, before, lambda struct: True)
    wanted, found = one(after) - one(before), less(after) - less(before)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    # Half precision keeps 11 bits of what is kept or left out.
    halves = "half" in str(program)
    worlds = np.stack([one(before), one(after)])
    largest = np.abs(worlds[np.isfinite(worlds)]).max(initial=1.0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=(5e-3 if halves else 1e-5) * largest)
    same = np.asarray(less(before) - less(before))
    assert set(same[~np.isnan(same)].tolist()) <= {0.0}


def steps(one, world):
    less = without_shared_terms(one, world, lambda struct: True)
    return [e.primitive.name for e in jax.make_jaxpr(less)(world).jaxpr.eqns]


def test_noise_of_a_scale_that_stays_is_not_computed():
    def one(x):
        return jnp.where(jnp.isnan(x), jnp.nan, 2 * x + SHARED[0] * jax.random.normal(NOISE, (6,)))

    assert "erf_inv" in str(jax.make_jaxpr(one)(SHARED[1]))
    assert "erf_inv" not in steps(one, SHARED[1])


def test_a_scale_that_moves_keeps_its_noise():
    assert "erf_inv" in steps(lambda x: x + x * jax.random.normal(NOISE, (6,)), SHARED[1])


def test_noise_that_may_be_missing_stays():
    def one(x):
        return x + jnp.log(SHARED[0] + jax.random.normal(NOISE, (6,)))

    assert "erf_inv" in steps(one, SHARED[1])
    assert "erf_inv" in steps(lambda x: x + jnp.log(jax.random.normal(NOISE, (6,))), SHARED[1])


@jax.jit
def _normal(key):
    return jnp.log(jax.random.normal(key, (6,)))


def test_a_sampler_is_known_by_what_it_does_and_not_by_its_name():
    assert "erf_inv" in steps(lambda x: x + _normal(NOISE), SHARED[1])
    for sampler in (jax.random.laplace, jax.random.gumbel, jax.random.logistic):
        left = steps(lambda x, of=sampler: x + 2 * of(NOISE, (6,)), SHARED[1])
        assert "random_bits" not in left


def test_programs_may_be_deep_and_share_terms():
    def one(x):
        scale = SHARED[0]
        for _ in range(100):
            scale = scale + scale * 0.01
        for _ in range(1500):
            x = x + scale
        return x + scale * jax.random.normal(NOISE, (6,))

    assert "erf_inv" not in steps(one, SHARED[1])


def test_what_is_not_subtracted_is_whole():
    def one(x):
        return {"kept": x + SHARED[0], "less": x + SHARED[0][:3].sum()}

    less = without_shared_terms(one, SHARED[1], lambda struct: False)
    np.testing.assert_array_equal(less(SHARED[1])["kept"], one(SHARED[1])["kept"])


def test_what_a_model_tells_it_still_tells(capfd):
    def one(x):
        jax.debug.print("seen {}", SHARED[0][0])
        return x + SHARED[0]

    without_shared_terms(one, SHARED[1], lambda struct: True)(SHARED[1])
    jax.effects_barrier()
    assert capfd.readouterr().out.startswith("seen")


@pytest.mark.parametrize(
    ("contrast", "expected"),
    [
        (lambda a, b: a - b, True),
        (jnp.subtract, True),
        (lambda a, b: b - a, False),
        (lambda a, b: a / b, False),
        (lambda a, b: a, False),
        (lambda a, b: 2 * (a - b), False),
        (lambda a, b: a - a, False),
    ],
)
def test_a_difference_is_told_by_what_it_does(contrast, expected):
    assert is_difference(contrast, SHARED[0]) is expected


# --- of models -------------------------------------------------------------------------------


def cases(x):
    missing = jnp.full(x.shape, jnp.nan).astype(int)
    return jnp.where(x > 0.2, missing, (10 * x).astype(int) + (3 * SHARED[0]).astype(int))


def test_an_integer_is_not_missing():
    before, after = SHARED[1], SHARED[2]
    less = without_shared_terms(cases, before, lambda struct: True)
    np.testing.assert_array_equal(less(after) - less(before), cases(after) - cases(before))


def normal(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(b * x, s), obs=y)


def student(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.StudentT(4.0, b * x, s), obs=y)


def skewed(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.LogNormal(b * x, s), obs=y)


def counted(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Poisson(jnp.exp(b * x) * s), obs=y)


def below(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    m = numpyro.sample("m", dist.Normal(b * x, s))
    numpyro.sample("y", dist.Normal(2 * m, s), obs=y)


def laplace(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.sample("y", dist.Laplace(b * x, s), obs=y)


MODELS = [normal, student, laplace, skewed, counted, below]


@pytest.fixture(scope="module")
def ds():
    x, s = np.linspace(-1, 1, 8), np.linspace(0.5, 2, 8)
    x[3] = s[5] = np.nan
    return xr.Dataset({"x": ("time", x), "s": ("time", s)}, {"time": np.arange(8)})


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("do", [{"x": 0.5}, {"s": 3.0}, {"x": 0.5, "s": 3.0}, {"b": 0.0}])
def test_an_effect_is_the_difference_of_two_predictions(ds, model, do):
    filled = ds.fillna(1.0) if model is counted else ds
    draws = {"b": np.linspace(-1, 1, 20).reshape(2, 10)}
    if model is below:
        draws["m"] = np.zeros((2, 10, 8))
    fit = filled.assign(y=filled.x).aimz.from_posterior(model, draws, dim="time")
    effect = filled.aimz.intervene(fit, do, sites="y", contrast="difference").y.compute()
    both = filled.aimz.intervene(fit, do, sites="y", contrast=None).y.compute()
    base, other = both.isel(scenario=0, drop=True), both.isel(scenario=1, drop=True)
    wanted = other - base
    np.testing.assert_array_equal(np.isnan(effect), np.isnan(wanted))
    largest = float(np.abs(both).max())
    np.testing.assert_allclose(effect, wanted, rtol=0, atol=4 * np.finfo("f4").eps * largest)
    own = filled.aimz.intervene(fit, do, sites="y", contrast=lambda a, b: a - b).y
    if effect.dtype.kind == "f":
        np.testing.assert_array_equal(own, effect)


def logged(x, s, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    e = numpyro.sample("y", dist.Normal(0, 1).expand(x.shape), obs=y)
    numpyro.deterministic("d", b * x + jnp.log(e))


def test_what_a_model_makes_missing_of_noise_is_missing(ds):
    ds = ds.fillna(1.0)
    draws = {"b": np.linspace(-1, 1, 40).reshape(2, 20)}
    fit = ds.assign(y=ds.x).aimz.from_posterior(logged, draws, dim="time")
    effect, both = (
        ds.aimz.intervene(fit, {"x": 0.5}, sites="d", contrast=contrast).d.compute()
        for contrast in ("difference", None)
    )
    gaps = np.isnan(both.isel(scenario=0))
    assert 0.3 < gaps.mean() < 0.7
    np.testing.assert_array_equal(np.isnan(effect), gaps)


def test_noise_that_is_in_both_worlds_is_not_drawn(ds, monkeypatch):
    """The effect of a location is there to the last bit, however wide the noise around it."""
    ds = ds.fillna(1.0)
    draws = {"b": np.linspace(-1, 1, 20).reshape(2, 10)}
    fit = ds.assign(y=ds.x).aimz.from_posterior(normal, draws, dim="time")
    wide = ds.assign(s=1e6 + 0 * ds.s)
    near, far = (d.aimz.intervene(fit, {"x": lambda x: x + 1}).y.compute() for d in (ds, wide))
    np.testing.assert_array_equal(near, far)
    np.testing.assert_allclose(far, fit.posterior.b.broadcast_like(far), rtol=0, atol=3e-7)
    with xr_aimz.set_options(block_bytes=2**20):
        percent = wide.aimz.intervene(fit, {"x": 2.0}, contrast="ratio").y.compute()
    assert float(percent.std()) > 0
