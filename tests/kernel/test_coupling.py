"""Models that couple cells are found out, and no others are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import ordinary_models
import pytest
import xarray as xr
from numpyro.contrib.control_flow import scan

import xr_aimz
from xr_aimz.binding.alignment import align
from xr_aimz.binding.bound import bind
from xr_aimz.errors import DimensionError, ModelError, OptionError
from xr_aimz.kernel import coupling
from xr_aimz.kernel.spec import KernelSpec

DIMS = ("time", "lat")
SHAPE = (40, 6)
RNG = np.random.default_rng(0)
DS = xr.Dataset(
    {
        "x": (DIMS, RNG.normal(size=SHAPE)),
        "z": ("time", RNG.normal(size=40)),
        "y": (DIMS, RNG.gamma(2, 1, SHAPE)),
        "n": (DIMS, RNG.poisson(2, SHAPE)),
        "wide": ((*DIMS, "feature"), RNG.normal(1e3, 1, (*SHAPE, 500))),
    },
    {"time": np.arange(1980, 2020), "lat": np.linspace(-50, 50, 6)},
)
# All ones, and the data of some tests constant: what a probe must not be deceived by.
ONES = {"b": np.ones((1, 3))}


def slope():
    return numpyro.sample("b", dist.Normal(0, 1))


def verdict(of, split=DIMS, ds=DS, posterior=ONES, variables=None, **options):
    """The dims that are coupled, () if none is by proof, or what stood in the way of one."""
    fit = ds.aimz.from_posterior(of, posterior, variables, **options)
    inputs = align(fit.binding, ds, outcomes=False)
    program = KernelSpec(fit.model, fit.binding, fit.sites, inputs.dims, tuple(fit.sites))
    latents = {n: a for n, a in fit.posterior.items() if fit.sites[n].kind == "latent"}
    found = coupling.find_coupling(
        coupling.CouplingProblem(program, inputs, latents, {}), dict.fromkeys(split, 5)
    )
    return found.coupled if found.obstacle is None else found.coupled or str(found.obstacle)


def normal(location):
    def of(x, z, y=None):
        numpyro.sample("y", dist.Normal(location(slope(), x, z), 1.0), obs=y)

    return of


def moving_average(x):
    return jax.vmap(lambda v: jnp.convolve(v, jnp.array([0.2, 0.6, 0.2]), "same"), 1, 1)(x)


COUPLED = {
    "running sum": (lambda b, x, z: jnp.cumsum(b * x, 0), ("time",)),
    "mean along time": (lambda b, x, z: b * (x - x.mean(0)), ("time",)),
    "mean along lat": (lambda b, x, z: b * (x - x.mean(1, keepdims=True)), ("lat",)),
    "mean of all": (lambda b, x, z: b * (x - x.mean()), ("time", "lat")),
    "a thousandth of a mean": (lambda b, x, z: b * (x - 1e-3 * x.mean(0)), ("time",)),
    "scaled by the largest": (lambda b, x, z: x / jnp.abs(z).max() * b, ("time",)),
    "lag": (lambda b, x, z: jnp.concatenate([x[:1], b * x[:-1]]), ("time",)),
    "lag of a month": (lambda b, x, z: jnp.concatenate([x[:30], b * x[:-30]]), ("time",)),
    "roll": (lambda b, x, z: b * jnp.roll(x, 1, 1), ("lat",)),
    "fft": (lambda b, x, z: jnp.fft.ifft(jnp.fft.fft(x, axis=0).at[1].mul(b + 1), axis=0).real, 1),
    "convolution": (lambda b, x, z: b * moving_average(x), ("time",)),
    "position": (lambda b, x, z: x + b * jnp.arange(x.shape[0])[:, None], ("time",)),
    "day of the year": (
        lambda b, x, z: x + b * jnp.sin((jnp.arange(x.shape[0]) % 365) / 58)[:, None],
        ("time",),
    ),
    "month": (lambda b, x, z: x + b * (jnp.arange(x.shape[0]) % 12)[:, None], ("time",)),
    "weekday": (lambda b, x, z: x + b * (jnp.arange(x.shape[0]) % 7)[:, None], ("time",)),
    "size": (lambda b, x, z: b * x / x.shape[0], ("time",)),
    "rank": (lambda b, x, z: b * jnp.argsort(jnp.argsort(x, 1), 1), ("lat",)),
    "neighbours' difference": (lambda b, x, z: b * jnp.gradient(x, axis=1), ("lat",)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupling_is_found_and_its_dims_are_named(name):
    location, dims = COUPLED[name]
    expected = ("time",) if dims == 1 else dims
    assert verdict(normal(location)) == expected
    other = [d for d in DIMS if d not in expected]
    if other:
        # Along the other dim the blocks may be cut.
        assert verdict(normal(location), tuple(other)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ordinary_models.MODELS)
def test_ordinary_models_are_proven(name):
    of, split, options = ordinary_models.MODELS[name]
    if name == "equinox_network":
        pytest.importorskip("equinox")
    bound = bind(ordinary_models.DS, of, **options)
    inputs = align(bound.binding, ordinary_models.DS, outcomes=False)
    returns = tuple(n for n, s in bound.sites.items() if s.kind in ("observed", "deterministic"))
    program = KernelSpec(of, bound.binding.without_data(), bound.sites, inputs.dims, returns)
    case = coupling.CouplingProblem(program, inputs, {}, {})
    for length in (5, 1):
        found = coupling.find_coupling(case, dict.fromkeys(split, length))
        assert found.obstacle is None, found
        assert found.least <= 2


def either(decides):
    return jax.lax.cond(decides, lambda: 10.0, lambda: 1.0)


def by_turns(z):
    def step(total, one):
        return total + one, either(total > 1e9)

    return jax.lax.scan(step, z.sum(), jnp.arange(3.0))[1].sum()


@jax.custom_jvp
def told(x):
    return either(x.max() > 1e9)


told.defjvps(None)


def in_a_checkpoint(b, x, z):
    return jax.checkpoint(lambda v: v * either(v.max() > 1e9))(x)


def in_a_loop(b, x, z):
    def step(carry):
        return carry[0] + 1, carry[1] * either(z.sum() > 1e9)

    return x * jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, 1.0))[1]


def until_all_are_done(b, x, z):
    return jax.lax.while_loop(lambda v: v.max() > 1e9, lambda v: v / 2, x)


def callback(b, x, z):
    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda v: v * (1 + (v.max() > 1e9)), struct, x)


SWITCHED = {
    "any of them": (lambda b, x, z: jnp.where(jnp.any(x > 1e9), 2 * x, x), ("time", "lat")),
    "in a checkpoint": (in_a_checkpoint, ("time", "lat")),
    "in a loop": (in_a_loop, ("time",)),
    "a loop's condition": (until_all_are_done, ("time", "lat")),
    "a mean": (lambda b, x, z: x * either(x.mean() > 1e9), ("time", "lat")),
    "one dim": (lambda b, x, z: x * either(z.max() > 1e9), ("time",)),
    "the first cell": (lambda b, x, z: x * either(z[0, 0] > 1e9), ("time",)),
    "within a function": (lambda b, x, z: x * jax.jit(either)(z.sum() > 1e9), ("time",)),
    "within a rule": (lambda b, x, z: x * told(z), ("time",)),
    "within a branch": (
        lambda b, x, z: x * jax.lax.cond(b > 0, lambda: either(z.sum() > 1e9), lambda: 1.0),
        ("time",),
    ),
    "carried by a scan": (lambda b, x, z: x * by_turns(z), ("time",)),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_branch_that_cells_decide_together_is_not_proven_though_no_value_shows_it(name):
    location, dims = SWITCHED[name]
    obstacle = verdict(normal(location))
    assert re.search(rf"`\w+` .*cells along '{dims[0]}'.* \(test_coupling.py:\d+", obstacle)
    others = tuple(d for d in DIMS if d not in dims)
    assert not others or verdict(normal(location), others) == ()


def test_a_branch_that_no_cell_decides_is_no_coupling():
    assert verdict(normal(lambda b, x, z: b * x * either(b > 0))) == ()
    assert verdict(normal(lambda b, x, z: b * x * either(jnp.asarray(3) > 2))) == ()
    along_lat = verdict(normal(lambda b, x, z: x * either(z.max() > 1e9)), ("lat",))
    assert along_lat == ()


def counting_steps(b, x, z):
    def step(i, total):
        return jax.lax.cond(i < 2, lambda: total + b * x, lambda: total * x)

    return jax.lax.fori_loop(0, 4, step, jnp.zeros_like(x))


def cell_by_cell(b, x, z):
    return jax.lax.map(lambda v: jax.lax.cond(v > 0, lambda: v, lambda: b * v), x.ravel())


LOOPS = {
    "a counter": counting_steps,
    "a cell each": lambda b, x, z: cell_by_cell(b, x, z).reshape(x.shape),
    "a bessel function": lambda b, x, z: (
        b * jax.scipy.special.bessel_jn(x.ravel(), v=2)[2].reshape(x.shape)
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_branch_within_a_loop_that_its_own_step_decides_is_no_coupling(name):
    assert verdict(normal(LOOPS[name])) == ()


@pytest.mark.parametrize("x", [np.ones(SHAPE), np.zeros(SHAPE), np.full(SHAPE, 2.9e5)])
def test_a_coupling_is_found_though_the_data_do_not_show_it(x):
    ds = DS.assign(x=(DIMS, x))
    assert verdict(normal(COUPLED["mean along time"][0]), ds=ds) == ("time",)


@pytest.mark.parametrize("offset", [0.0, 273.15, 2.9e5])
def test_a_small_coupling_is_found_far_from_zero(offset):
    ds = DS.assign(x=(DS.x + offset).astype(np.float32))
    assert verdict(normal(lambda b, x, z: b * (x - 1e-4 * x.mean(0))), ds=ds) == ("time",)


def observing(fn):
    def of(x, y=None):
        numpyro.sample("y", fn(slope(), x), obs=y)

    return of


def counting(fn):
    def of(x, n=None):
        numpyro.sample("n", fn(slope(), x), obs=n)

    return of


CONTINUOUS = {
    "Normal": lambda b, x: dist.Normal(b * x, 1.0),
    "StudentT": lambda b, x: dist.StudentT(4.0, b * x, 1.0),
    "Cauchy": lambda b, x: dist.Cauchy(b * x, 1.0),
    "Gamma": lambda b, x: dist.Gamma(2.0, jnp.exp(b * x)),
    "LogNormal": lambda b, x: dist.LogNormal(b * x, 1.0),
    "Weibull": lambda b, x: dist.Weibull(jnp.exp(b * x), 2.0),
    "Beta": lambda b, x: dist.Beta(jnp.exp(b * x), 2.0),
    "Uniform": lambda b, x: dist.Uniform(b * x - 9, b * x + 9),
    "VonMises": lambda b, x: dist.VonMises(b * x, 2.0),
    "TruncatedNormal": lambda b, x: dist.TruncatedNormal(b * x, 1.0, low=0.0),
    "LeftCensored": lambda b, x: dist.LeftCensoredDistribution(dist.Normal(b * x, 1.0), x > 0),
    "Delta": lambda b, x: dist.Delta(b * x),
    "mixture": lambda b, x: dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.stack([x, b * x], -1), 1.0)
    ),
}
DISCRETE = {
    "Poisson": lambda b, x: dist.Poisson(jnp.exp(b * x)),
    "NegativeBinomial": lambda b, x: dist.NegativeBinomial2(jnp.exp(b * x), 2.0),
    "Bernoulli": lambda b, x: dist.Bernoulli(logits=b * x),
    "Binomial": lambda b, x: dist.Binomial(9, logits=b * x),
    "Categorical": lambda b, x: dist.Categorical(logits=jnp.stack([x, b * x, 0 * x], -1)),
    "OrderedLogistic": lambda b, x: dist.OrderedLogistic(b * x, jnp.array([-1.0, 0.0, 1.0])),
    "ZeroInflated": lambda b, x: dist.ZeroInflatedPoisson(0.3, jnp.exp(b * x)),
}


@pytest.mark.parametrize("name", [*CONTINUOUS, *DISCRETE])
def test_a_coupling_is_found_in_every_family_and_none_where_there_is_none(name):
    make, fn = (observing, CONTINUOUS[name]) if name in CONTINUOUS else (counting, DISCRETE[name])
    assert verdict(make(fn)) == ()
    assert verdict(make(lambda b, x: fn(b, x - x.mean(0))), ("time",)) == ("time",)


UNSHOWN = normal(lambda b, x, z: b * jnp.where(jnp.any(x > 1e9), 2 * x, x))


@pytest.mark.slow
def test_what_is_neither_proven_nor_shown_is_refused_unless_it_is_assumed():
    assert "`reduce_or` combines cells along 'time'" in verdict(UNSHOWN)
    # Logits are the same but for a constant, and that constant is of all cells.
    shifted = counting(lambda b, x: dist.Categorical(logits=jnp.stack([x, b * x], -1) - x.max()))
    assert "`reduce_max` combines cells along 'time'" in verdict(shifted)
    cut = DS.chunk(time=10)
    fit = DS.aimz.from_posterior(UNSHOWN, ONES)
    with pytest.raises(
        ModelError, match=r"not proven.*'time'.*reduce_or.*assume_independent='time'"
    ):
        cut.aimz.predict(fit)
    assumed = cut.aimz.predict(fit, assume_independent="time")
    assert "cells assumed independent along ['time']" in assumed.attrs["history"]
    assert assumed.attrs["aimz_assume_independent"] == "time"
    xr.testing.assert_equal(assumed.drop_attrs(), DS.aimz.predict(fit).compute().drop_attrs())
    scored = cut.aimz.log_likelihood(fit, assume_independent=["time"])
    xr.testing.assert_allclose(scored.y, DS.aimz.log_likelihood(fit).y)
    # What a result says of itself is not what the next one made from it says.
    again = assumed.assign(x=DS.x, z=DS.z)[["x", "z"]].aimz.predict(fit)
    assert "aimz_assume_independent" not in again.attrs
    with pytest.raises(DimensionError, match=r"assume_independent='tme'.*'time'"):
        cut.aimz.predict(fit, assume_independent="tme")


def test_a_coupling_that_values_show_cannot_be_assumed_away():
    fit = DS.aimz.from_posterior(normal(COUPLED["mean along time"][0]), ONES)
    with pytest.raises(ModelError, match="couples cells along 'time'"):
        DS.chunk(time=10).aimz.predict(fit, assume_independent="time")


def test_what_is_assumed_of_one_dim_is_not_of_another():
    of = normal(lambda b, x, z: jnp.where(jnp.any(x > 1e9, 1, keepdims=True), 2 * x, x))
    fit = DS.aimz.from_posterior(of, ONES)
    cut = DS.chunk(time=10, lat=2)
    with pytest.raises(ModelError, match=r"not proven.*'lat'"):
        cut.aimz.predict(fit, assume_independent="time")
    assert cut.aimz.predict(fit, assume_independent="lat").y.shape == (1, 3, *SHAPE)
    assert DS.chunk(time=10).aimz.predict(fit).y.shape == (1, 3, *SHAPE)


def local(x, y=None, total=0.0):
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    with xr_aimz.plate("lat"):
        level = numpyro.sample("level", dist.Normal(0, tau))
    with xr_aimz.plate("time"), xr_aimz.plate("lat"):
        shared = total * level.mean() if total else 0.0
        numpyro.sample("y", dist.Normal(level - shared + x, 1.0), obs=y)


LEVELS = {"tau": np.ones((1, 3)), "level": np.ones((1, 3, 6))}


def test_a_coupling_through_a_local_latent_is_found():
    assert verdict(local, posterior=LEVELS) == ()
    assert verdict(local, posterior=LEVELS, variables={"total": 1.0}) == ("lat",)


def test_a_scan_couples_its_own_dim_alone():
    def steps(x, y=None, total=0.0):
        b = slope()

        def step(level, now):
            level = 0.5 * level + b * now[0] - (total * now[0].mean() if total else 0.0)
            numpyro.sample("y", dist.Normal(level, 1.0), obs=now[1])
            return level, None

        scan(step, jnp.zeros(x.shape[1]), (x, y), length=x.shape[0])

    assert verdict(steps, ("lat",), core_dim="time") == ()
    assert verdict(steps, ("lat",), variables={"total": 0.1}) == ("lat",)


def regression(X, y=None, centred=False):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([X.shape[1]]).to_event(1))
    X = X - X.mean(0) if centred else X
    with numpyro.plate("data", X.shape[0]):
        numpyro.sample("y", dist.Normal(X @ w, 1.0), obs=y)


def test_a_table_is_judged_dim_by_dim():
    columns = {"X": ["x", "z"]}
    posterior = {"w": np.ones((1, 3, 2))}
    kept = {"posterior": posterior, "layout": "table"}
    assert verdict(regression, variables=columns, **kept) == ()
    assert verdict(regression, variables={**columns, "centred": True}, **kept) == DIMS


@pytest.mark.slow
def test_an_event_across_the_dim_is_a_coupling_unless_its_parts_are_independent():
    def process(z, y=None):
        slope()
        covariance = jnp.exp(-jnp.square(z[:, None] - z)) + 1e-3 * jnp.eye(z.size)
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(z.size), covariance), obs=y)

    def parts(z, y=None):
        numpyro.sample("y", dist.Normal(slope() * z, 1.0).to_event(1), obs=y)

    ds = DS.isel(lat=0)
    assert verdict(process, ("time",), ds=ds, dim="time") == ("time",)
    assert verdict(parts, ("time",), ds=ds, dim="time") == ()


def sums(X, y=None):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([500]).to_event(1))
    numpyro.sample("y", dist.Normal(X @ w, 0.01), obs=y)


def sums_in_32_bits(X, y=None):
    sums(X.astype(jnp.float32), y)


def only_in_32_bits(x, y=None):
    # A carry of 32 bits is refused where the numbers that meet it have 64.
    level, _ = jax.lax.scan(
        lambda c, _: (c + x, None), jnp.zeros(x.shape, jnp.float32), None, length=20
    )
    numpyro.sample("y", dist.Normal(slope() * level, 0.1), obs=y)


def cancelling(x, y=None):
    numpyro.sample("y", dist.Normal(slope() * (jnp.sqrt(x * x + 1) - 2.9e5), 1e-3), obs=y)


@pytest.mark.parametrize("of", [sums, sums_in_32_bits, only_in_32_bits, cancelling])
def test_rounding_is_no_coupling(of):
    w = {"w": np.random.default_rng(1).normal(size=(1, 3, 500))}
    if of in (sums, sums_in_32_bits):
        assert verdict(of, posterior=w, variables={"X": "wide"}) == ()
    else:
        assert verdict(of, ds=DS.assign(x=(DS.x + 2.9e5).astype(np.float32))) == ()


def test_a_model_of_32_bits_is_judged_in_those():
    def of(x, y=None):
        only_in_32_bits(x - 0.1 * x.mean(0), y)

    assert verdict(of) == ("time",)


def test_noise_drawn_by_hand_is_a_coupling():
    """Every block would have the same noise."""

    def of(x, y=None):
        noise = jax.random.normal(numpyro.prng_key(), x.shape)
        numpyro.sample("y", dist.Normal(slope() * x + noise, 1.0), obs=y)

    assert verdict(of, ("time",)) == ("time",)


def test_sizes_written_into_a_model_leave_it_unjudged_where_they_matter():
    def of(x, y=None):
        b = slope()
        with numpyro.plate("lat", 6, dim=-1):
            numpyro.sample("y", dist.Normal(b * x * jnp.ones(6), 1.0), obs=y)

    assert verdict(of, ("time",)) == ()
    assert "on one of its blocks it raises" in verdict(of, ("lat",))
    fit = DS.aimz.from_posterior(of, ONES)
    with pytest.raises(Exception, match=r"broadcast|shape"):
        DS.chunk(lat=2).aimz.predict(fit)


def test_a_deterministic_is_judged_by_its_value():
    def of(x, y=None):
        b = slope()
        numpyro.deterministic("anomaly", x - x.mean(0))
        numpyro.deterministic("square", b**2)
        numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    fit = DS.aimz.from_posterior(of, ONES)
    cut = DS.chunk(time=10)
    with pytest.raises(ModelError, match=r"along 'time'.*anomaly"):
        cut.aimz.predict(fit)
    # What is not asked for does no harm.
    assert cut.aimz.predict(fit, sites=["y", "square"]).y.shape == (1, 3, *SHAPE)
    assert DS.chunk(lat=2).aimz.predict(fit).anomaly.shape == (1, 3, *SHAPE)


def test_what_a_site_is_drawn_from_is_judged_with_it():
    def chain(x, y=None, n=None, reach=1.0):
        middle = numpyro.sample("middle", dist.Normal(slope() * (x - x.mean(0)), 1.0), obs=y)
        rate = jnp.exp(x if reach is None else reach * middle)
        numpyro.sample("end", dist.Poisson(rate), obs=n)

    cut = DS.chunk(time=10)
    fit = DS.aimz.from_posterior(chain, ONES)
    with pytest.raises(ModelError, match="along 'time'"):
        cut.aimz.predict(fit, sites="end")
    # Where nothing comes from it, a coupled site that is not asked for does no harm.
    fit = DS.aimz.from_posterior(chain, ONES, {"reach": None})
    assert cut.aimz.predict(fit, sites="end").n.shape == (1, 3, *SHAPE)


def test_a_refusal_says_what_to_do_and_a_whole_dim_is_none():
    of = normal(COUPLED["mean along time"][0])
    fit = DS.aimz.from_posterior(of, ONES)
    with pytest.raises(ModelError, match=r"along 'time'.*core_dim='time'.*beforehand"):
        DS.chunk(time=10).aimz.predict(fit)
    with pytest.raises(ModelError, match="along 'time'"):
        DS.chunk(time=10).aimz.log_likelihood(fit)
    with pytest.raises(ModelError, match="along 'time'"), xr_aimz.set_options(block_bytes=64):
        DS.aimz.predict(fit, summary="mean")
    whole = DS.chunk(lat=2).aimz.predict(fit).y.mean(("chain", "draw"))
    assert whole.shape == SHAPE
    kept = DS.aimz.from_posterior(of, ONES, core_dim="time")
    with xr_aimz.set_options(block_bytes=2**12):
        assert DS.aimz.predict(kept).y.chunksizes["time"] == (40,)


def test_nothing_lazy_is_computed():
    def refuse(block):
        raise AssertionError("computed")

    lazy = DS[["x", "z"]].chunk(time=10)
    lazy["x"] = lazy.x.copy(data=lazy.x.data.map_blocks(refuse, dtype=float, meta=np.empty(0)))
    for name, raises in (("mean along time", True), ("plain", False)):
        location = COUPLED[name][0] if raises else lambda b, x, z: b * x
        fit = DS.aimz.from_posterior(normal(location), ONES)
        if raises:
            with pytest.raises(ModelError, match="along 'time'"):
                lazy.aimz.predict(fit)
        else:
            assert lazy.aimz.predict(fit).y.shape == (1, 3, *SHAPE)


def test_a_coupling_is_looked_for_once(monkeypatch):
    fit = DS.aimz.from_posterior(UNSHOWN, ONES)
    DS.chunk(time=10).aimz.predict(fit, assume_independent="time")
    searched = []
    monkeypatch.setattr(coupling, "_coupled_dims", lambda *args: searched.append(args) or ())
    DS.chunk(time=10).aimz.predict(fit, assume_independent="time")
    assert not searched
    DS.chunk(time=8).aimz.predict(fit, assume_independent="time")
    assert len(searched) == 1


def long_enough(x, y=None, least=30):
    z = x - x.mean() if x.shape[0] >= least else x
    numpyro.sample("y", dist.Normal(slope() * z, 1.0), obs=y)


def always(x, y=None):
    numpyro.sample("y", dist.Normal(slope() * (x - x.mean()), 1.0), obs=y)


def by_knots(x, y=None):
    z = x
    for knot in range(0, x.shape[0] - 20, 20):
        z = z - x[knot]
    numpyro.sample("y", dist.Normal(slope() * z, 1.0), obs=y)


def of_odd_lengths(x, y=None):
    z = x - x.mean() if x.shape[0] % 2 else x
    numpyro.sample("y", dist.Normal(slope() * z, 1.0), obs=y)


@pytest.mark.parametrize("of", [long_enough, by_knots])
@pytest.mark.parametrize("length", [2, 5, 10])
def test_a_rule_on_lengths_is_a_coupling(of, length):
    for ask in on_blocks(of, length, n=48):
        with pytest.raises(ModelError, match=r"'time'.*rule on lengths"):
            ask()


def test_a_rule_on_lengths_beyond_those_that_matter_is_none():
    for ask in on_blocks(lambda x, y=None: long_enough(x, y, 10**6), 10):
        ask()
    for ask in on_blocks(of_odd_lengths, 12):
        ask()
    with pytest.raises(ModelError, match="'time'"):
        on_blocks(of_odd_lengths, 9)[0]()


LEFT, RIGHT = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 5))


@pytest.mark.parametrize("length", [3, 20])
def test_a_rule_on_lengths_that_is_one_of_speed_has_to_be_assumed(length):
    """Which product comes first depends on how many rows there are."""

    def of(f, y=None):
        mean = jnp.einsum("ni,ij,jk->nk", f, LEFT, RIGHT).sum(-1)
        numpyro.sample("y", dist.Normal(slope() * mean, 1.0), obs=y)

    ds = xr.Dataset({"f": (("n", "of"), RNG.normal(size=(200, 5))), "y": ("n", np.ones(200))})
    fit = ds.aimz.from_posterior(of, ONES)
    if length == 3:
        with pytest.raises(ModelError, match=r"not proven.*does other work|not proven.*the model"):
            ds.chunk(n=length).aimz.predict(fit)
    cut = ds.chunk(n=length).aimz.predict(fit, assume_independent="n").compute()
    xr.testing.assert_allclose(cut, ds.aimz.predict(fit).compute(), 1e-4, 1e-4)


def test_what_was_found_of_one_model_is_not_taken_for_anothers():
    """Whole they are one program; in blocks they are two, and both are refused."""
    for of in (long_enough, always, of_odd_lengths):
        with pytest.raises(ModelError, match="'time'"):
            on_blocks(of, 9, n=47)[0]()
    plain = normal(lambda b, x, z: b * x)
    assert verdict(plain, ("time",)) == ()


def test_sites_without_draws_get_values_of_their_support():
    """Before there is a posterior: what a fit in batches has to know."""

    def of(x, y=None, pooled=0.0):
        shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
        with xr_aimz.plate("time"):
            scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        with xr_aimz.plate("time"), xr_aimz.plate("lat"):
            sd = scale + pooled * scale.mean() if pooled else scale
            numpyro.sample("y", dist.Normal(shares[0] * x, sd), obs=y)

    posterior = {"shares": np.full((1, 3, 3), 1 / 3), "scale": np.ones((1, 3, 40))}
    for pooled, expected in ((0.0, ()), (0.5, ("time",))):
        fit = DS.aimz.from_posterior(of, posterior, {"pooled": pooled})
        inputs = align(fit.binding, DS, outcomes=True)
        sites = ("scale", "y")
        program = KernelSpec(fit.model, fit.binding, fit.sites, inputs.dims, sites)
        found = coupling.find_coupling(
            coupling.CouplingProblem(program, inputs, {}, {}), {"time": 5}
        )
        assert found.coupled == expected
        assert (found.obstacle is None) == (not expected)


def on_blocks(of, length, n=48):
    """What predicting and scoring say of a Dataset that is cut into blocks of a length."""
    rng = np.random.default_rng(0)
    ds = xr.Dataset({"x": ("time", rng.normal(size=n)), "y": ("time", rng.normal(size=n))})
    fit = ds.aimz.from_posterior(of, ONES)
    cut = ds.chunk(time=length)
    return lambda: cut.aimz.predict(fit), lambda: cut.aimz.log_likelihood(fit)


def monthly(x, y=None):
    months = x.reshape(-1, 12)
    numpyro.sample("y", dist.Normal(slope() * (months - months.mean(0)).ravel(), 1.0), obs=y)


def first_thirty(x, y=None):
    numpyro.sample("y", dist.Normal(slope() * x * min(30, x.shape[0]), 1.0), obs=y)


def tapered(x, y=None):
    taper = jnp.hanning(min(30, x.shape[0])).sum()
    numpyro.sample("y", dist.Normal(slope() * x * taper, 1.0), obs=y)


def masked_by_its_mean(x, y=None):
    b = slope()
    with numpyro.handlers.mask(mask=x > x.mean()):
        numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def masked_by_their_mean(x, y=None):
    fn = dist.Normal(slope() * x, 1.0).mask(x > x.mean())
    numpyro.sample("y", fn, obs=y)


COUPLED_IN_BLOCKS = [monthly, first_thirty, tapered, masked_by_its_mean, masked_by_their_mean]


@pytest.mark.slow
@pytest.mark.parametrize("of", COUPLED_IN_BLOCKS)
def test_what_only_a_block_or_a_mask_shows_is_found(of):
    for ask in on_blocks(of, 24):
        with pytest.raises(ModelError, match="'time'"):
            ask()


def test_a_mask_cell_by_cell_is_no_coupling():
    def positive(x, y=None):
        b = slope()
        with numpyro.handlers.mask(mask=x > 0):
            numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    def an_event(x, y=None):
        fn = dist.Normal(slope() * x[:, None], 1.0).mask(x[:, None] > 0).to_event(1)
        numpyro.sample("y", fn, obs=None if y is None else y[:, None])

    for of in (positive, an_event):
        for length in (24, 1):
            for ask in on_blocks(of, length):
                ask()


def test_a_coupling_of_dims_that_must_be_of_one_length_is_found():
    rng = np.random.default_rng(0)
    dims = ("a", "c")
    square = {"x": (dims, rng.normal(size=(40, 40))), "y": (dims, rng.normal(size=(40, 40)))}
    ds = xr.Dataset(square)
    for other in (jnp.transpose, lambda x: x @ x.T):

        def of(x, y=None, other=other):
            numpyro.sample("y", dist.Normal(slope() * x + other(x), 1.0), obs=y)

        assert verdict(of, dims, ds, variables={"other": other}) == dims


def in_batches(location):
    def of(x, z, y=None):
        numpyro.sample("y", dist.Normal(location(slope(), x, z), 1.0), obs=y)

    return of


def scaled_prior(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, x.std()))
    numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def weighted(x, y=None):
    b = slope()
    numpyro.factor("weight", -(b * x).sum())
    numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


BATCHED = {"method": "svi", "steps": 20, "batch": {"time": 10}, "progress": False}


# So few steps are a concern.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
@pytest.mark.parametrize(
    "of",
    [
        in_batches(COUPLED["lag"][0]),
        in_batches(lambda b, x, z: b * (x - x[:1])),
        in_batches(lambda b, x, z: b * x / jnp.abs(x).max()),
        in_batches(lambda b, x, z: b * jnp.where(jnp.any(x > 1e9), 2 * x, x)),
        scaled_prior,
        weighted,
    ],
)
def test_a_model_that_couples_cells_is_not_fitted_in_batches(of):
    with pytest.raises(ModelError, match="'time'"):
        DS.aimz.fit(of, **BATCHED)
    # Along another dimension, or whole, it may be.
    if of not in (scaled_prior, weighted):
        whole = {**BATCHED, "batch": {"time": 40}}
        assert DS.aimz.fit(of, **whole).posterior.b.shape == (1, 1000)


# So few steps are a concern.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::xr_aimz.errors.ConvergenceWarning")
def test_batches_of_a_model_without_a_proof_need_it_said():
    of = in_batches(lambda b, x, z: b * jnp.where(jnp.any(x > 1e9), 2 * x, x))
    fit = DS.aimz.fit(of, **BATCHED, assume_independent="time")
    assert fit.options["assume_independent"] == "time"
    with pytest.raises(ModelError, match="couples cells along 'time'"):
        DS.aimz.fit(
            in_batches(COUPLED["mean along time"][0]), **BATCHED, assume_independent="time"
        )
    with pytest.raises(OptionError, match=r"'assume_independent'.*go with batches"):
        DS.aimz.fit(of, method="svi", steps=20, assume_independent="time")
    with pytest.raises(DimensionError, match=r"assume_independent=\['t'\].*'time', 'lat'"):
        DS.aimz.fit(of, **BATCHED, assume_independent="t")


def test_callables_of_an_intervention_are_part_of_the_proof():
    def of(x, y=None):
        b = slope()
        with xr_aimz.plate("time"), xr_aimz.plate("lat"):
            middle = numpyro.sample("middle", dist.Normal(b * x, 1.0))
            numpyro.sample("y", dist.Normal(middle, 1.0), obs=y)

    fit = DS.aimz.from_posterior(of, {**ONES, "middle": np.ones((1, 3, *SHAPE))})
    cut = DS.chunk(time=10)
    assert cut.aimz.intervene(fit, {"middle": lambda v: 2 * v}).y.shape == (1, 3, *SHAPE)
    with pytest.raises(ModelError, match=r"do={'middle'.*'time'.*reduce_sum.*assume_independent"):
        cut.aimz.intervene(fit, {"middle": lambda v: v - v.mean(0)})
    assumed = cut.aimz.intervene(
        fit, {"middle": lambda v: jnp.where(jnp.any(v > 1e9), v, 0)}, assume_independent="time"
    )
    assert assumed.attrs["aimz_assume_independent"] == "time"
    with pytest.raises(ModelError, match=r"contrast=.*'time'.*combines cells"):
        cut.aimz.intervene(fit, {"x": 1.0}, contrast=lambda a, b: a - b.max())
    # Along what is not cut, a callable may look.
    assert cut.aimz.intervene(fit, {"middle": lambda v: v - v.mean(1, keepdims=True)}).y.ndim == 4


def test_a_dimension_that_do_gives_an_argument_is_looked_at_too():
    def of(level, x, y=None):
        numpyro.sample("y", dist.Normal(slope() * x + level - level.mean(), 1.0), obs=y)

    ds = DS.assign(level=2.0)
    fit = ds.aimz.from_posterior(of, ONES)
    cut = ds.chunk(lat=2)
    assert cut.aimz.intervene(fit, {"level": 3.0}).y.shape == (1, 3, *SHAPE)
    along_lat = xr.DataArray(np.arange(6.0), dims="lat", coords={"lat": DS.lat})
    with pytest.raises(ModelError, match=r"along 'lat'"):
        cut.aimz.intervene(fit, {"level": along_lat})
