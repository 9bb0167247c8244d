"""Ordinary models, as NumPyro's examples and textbooks have them: none may need an assertion.

Each is of the Dataset ``DS``, along whose dims ``time`` and ``lat`` it has no coupling, unless it
says so.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.contrib.control_flow import scan
from numpyro.infer.reparam import LocScaleReparam

import xr_aimz

TIMES, LATS, K = 24, 6, 3
GRID = ("time", "lat")
RNG = np.random.default_rng(0)
DS = xr.Dataset(
    {
        "x": (GRID, RNG.normal(size=(TIMES, LATS))),
        "y": (GRID, RNG.normal(size=(TIMES, LATS))),
        "pos": (GRID, RNG.gamma(2, 1, (TIMES, LATS))),
        "unit": (GRID, RNG.uniform(0.1, 0.9, (TIMES, LATS))),
        "n": (GRID, RNG.poisson(2, (TIMES, LATS))),
        "c": (GRID, RNG.integers(0, K, (TIMES, LATS))),
        "trials": (GRID, np.full((TIMES, LATS), 9)),
        "g": ("lat", np.arange(LATS) % K),
        "t": ("time", np.linspace(0, 1, TIMES)),
        "X": ((*GRID, "f"), RNG.normal(size=(TIMES, LATS, 4))),
        "v": ((*GRID, "s"), RNG.normal(size=(TIMES, LATS, K))),
        "mn": ((*GRID, "s"), RNG.multinomial(5, [0.2, 0.3, 0.5], (TIMES, LATS))),
    },
    {"time": np.arange(TIMES), "lat": np.arange(LATS)},
)
# Of each model: the function, the dims along which it may be cut, and how it is bound.
MODELS = {}
N = dist.Normal


def model(split=GRID, **options):
    def note(function):
        MODELS[function.__name__] = function, split, options
        return function

    return note


def latent(name, fn=N(0, 1)):  # noqa: B008 -- a distribution is not changed
    return numpyro.sample(name, fn)


@model()
def baseball(trials, n=None):
    mu = latent("mu", dist.Beta(2, 2))
    k = latent("k", dist.Pareto(1, 1.5))
    with xr_aimz.plate("lat"):
        phi = latent("phi", dist.Beta(mu * k, (1 - mu) * k))
    numpyro.sample("n", dist.Binomial(trials, phi), obs=n)


@model()
def ucb(g, trials, n=None):
    a = latent("a", N(0, 1).expand([K]).to_event(1))
    numpyro.sample("n", dist.Binomial(trials, logits=a[g]), obs=n)


@model()
def groups(g, x, y=None):
    with numpyro.plate("group", K):
        a = latent("a")
        b = latent("b")
    numpyro.sample("y", N(a[g] + b[g] * x, 1), obs=y)


@model()
def bnn(X, y=None):
    w1 = latent("w1", N(jnp.zeros((4, 8)), 1).to_event(2))
    w2 = latent("w2", N(jnp.zeros((8, 1)), 1).to_event(2))
    numpyro.sample("y", N((jnp.tanh(X @ w1) @ w2)[..., 0], 1), obs=y)


@model()
def horseshoe(X, y=None):
    local = latent("l", dist.HalfCauchy(jnp.ones(4)).to_event(1))
    tau = latent("tau", dist.HalfCauchy(1))
    b = latent("b", N(0, 1).expand([4]).to_event(1))
    numpyro.sample("y", N(jnp.einsum("tlf,f->tl", X, b * local * tau), 1), obs=y)


@model(("lat",), core_dim="time")
def ar2(x, y=None):
    a = latent("a")
    b = latent("b")

    def step(c, now):
        p, q = c
        mu = a * p + b * q + now[0]
        now_y = numpyro.sample("y", N(mu, 1), obs=now[1])
        return ((now_y, p), None)

    scan(step, (jnp.zeros(x.shape[1]), jnp.zeros(x.shape[1])), (x, y), length=x.shape[0])


@model(("lat",), core_dim="time")
def local_level(x, y=None):
    sd = latent("sd", dist.HalfNormal(1))

    def step(c, now):
        c = numpyro.sample("level", N(c, sd))
        numpyro.sample("y", N(c + now[0], 1), obs=now[1])
        return (c, None)

    scan(step, jnp.zeros(x.shape[1]), (x, y), length=x.shape[0])


@model(("lat",), core_dim="time")
def gp_core(t, y=None):
    ls = latent("ls", dist.LogNormal(0, 1))
    tt = t[:, 0]
    k = jnp.exp(-0.5 * ((tt[:, None] - tt) / ls) ** 2) + 0.01 * jnp.eye(tt.size)
    f = jnp.linalg.cholesky(k) @ latent("z", N(0, 1).expand([tt.size]).to_event(1))
    numpyro.sample("y", N(f[:, None], 1), obs=y)


@model(("lat",), core_dim="time")
def gp_local(t, y=None):
    times = t[:, 0]
    k = jnp.exp(-0.5 * (times[:, None] - times) ** 2) + 0.01 * jnp.eye(times.size)
    with xr_aimz.plate("lat"):
        z = latent("z", N(0, 1).expand([times.size]).to_event(1))
    numpyro.sample("y", N(jnp.linalg.cholesky(k) @ z.T, 1), obs=y)


@model()
def hsgp(x, y=None):
    from numpyro.contrib.hsgp.approximation import hsgp_squared_exponential

    f = hsgp_squared_exponential(
        x.reshape(-1, 1),
        alpha=latent("alpha", dist.HalfNormal(1)),
        length=latent("len", dist.LogNormal(0, 1)),
        ell=5.0,
        m=10,
    )
    numpyro.sample("y", N(f.reshape(x.shape), 1), obs=y)


@model()
def ordinary_differential_equation(x, y=None):
    from jax.experimental.ode import odeint

    r = latent("r", dist.HalfNormal(1))
    f = jax.vmap(lambda u: odeint(lambda z, t: -r * z, u, jnp.array([0.0, 1.0]))[1])(
        x.ravel()
    ).reshape(x.shape)
    numpyro.sample("y", N(f, 1), obs=y)


@model()
def newton(pos, y=None):
    a = latent("a", dist.HalfNormal(1))
    r = jax.vmap(
        lambda p: jax.lax.while_loop(
            lambda z: jnp.abs(z * z - p) > 0.001, lambda z: 0.5 * (z + p / z), p
        )
    )(pos.ravel()).reshape(pos.shape)
    numpyro.sample("y", N(a * r, 1), obs=y)


@model()
def mixture(x, y=None):
    w = latent("w", dist.Dirichlet(jnp.ones(2)))
    mu = latent("mu", N(0, 1).expand([2]).to_event(1))
    numpyro.sample(
        "y", dist.MixtureSameFamily(dist.Categorical(w), N(mu + x[..., None], 1)), obs=y
    )


@model()
def mixture_general(x, y=None):
    w = latent("w", dist.Dirichlet(jnp.ones(2)))
    numpyro.sample(
        "y", dist.MixtureGeneral(dist.Categorical(w), [N(x, 1), dist.Laplace(x, 1)]), obs=y
    )


@model()
def zero_inflated(x, n=None):
    numpyro.sample(
        "n",
        dist.ZeroInflatedPoisson(latent("p", dist.Beta(1, 1)), jnp.exp(latent("b") * x)),
        obs=n,
    )


@model()
def ordered(x, c=None):
    cut = latent(
        "cut",
        dist.TransformedDistribution(N(0, 1).expand([K - 1]), dist.transforms.OrderedTransform()),
    )
    numpyro.sample("c", dist.OrderedLogistic(latent("b") * x, cut), obs=c)


@model()
def softmax(X, c=None):
    w = latent("w", N(jnp.zeros((4, K)), 1).to_event(2))
    numpyro.sample("c", dist.Categorical(logits=X @ w), obs=c)


@model()
def multinomial(x, mn=None):
    w = latent("w", N(0, 1).expand([K]).to_event(1))
    numpyro.sample("mn", dist.Multinomial(5, jax.nn.softmax(x[..., None] * w, -1)), obs=mn)


@model()
def mvn_lkj(x, v=None):
    c = latent("c", dist.LKJCholesky(K, 1.0))
    sd = latent("sd", dist.HalfNormal(1).expand([K]).to_event(1))
    numpyro.sample(
        "v", dist.MultivariateNormal(x[..., None] * jnp.ones(K), scale_tril=sd[:, None] * c), obs=v
    )


@model()
def mvn_cell(x, v=None):
    cov = jnp.eye(K) + 0.1 * jnp.exp(x)[..., None, None] * jnp.ones((K, K))
    numpyro.sample("v", dist.MultivariateNormal(latent("m") * x[..., None], cov), obs=v)


@model()
def effects_mvn(g, x, y=None):
    c = latent("c", dist.LKJCholesky(2, 1.0))
    with numpyro.plate("group", K):
        ab = latent("ab", dist.MultivariateNormal(jnp.zeros(2), scale_tril=c))
    numpyro.sample("y", N(ab[g, 0] + ab[g, 1] * x, 1), obs=y)


@model()
def fourier(t, y=None):
    w = latent("w", N(0, 1).expand([6]).to_event(1))
    f = jnp.stack([g(2 * jnp.pi * k * t) for k in (1, 2, 3) for g in (jnp.sin, jnp.cos)], -1)
    numpyro.sample("y", N(f @ w, 1), obs=y)


@model()
def spline(t, y=None):
    k = jnp.linspace(0, 1, 5)
    b = jnp.maximum(0, t[..., None] - k) ** 3
    numpyro.sample("y", N(b @ latent("w", N(0, 1).expand([5]).to_event(1)), 1), obs=y)


@model()
def truncated(x, pos=None):
    numpyro.sample("pos", dist.TruncatedNormal(latent("b") * x, 1.0, low=0.0), obs=pos)


@model()
def censored(x, y=None):
    numpyro.sample("y", dist.LeftCensoredDistribution(N(latent("b") * x, 1), x > 0), obs=y)


@model()
def reparam(g, x, y=None):
    mu = latent("mu")
    tau = latent("tau", dist.HalfNormal(1))
    with numpyro.handlers.reparam(config={"a": LocScaleReparam(0)}), numpyro.plate("group", K):
        a = latent("a", N(mu, tau))
    numpyro.sample("y", N(a[g] + x, 1), obs=y)


@model()
def interp(x, y=None):
    numpyro.sample(
        "y",
        N(jnp.interp(x, jnp.linspace(-3, 3, 7), latent("w", N(0, 1).expand([7]).to_event(1))), 1),
        obs=y,
    )


@model()
def solve2(x, y=None):
    a = jnp.stack([jnp.stack([2 + x**2, x], -1), jnp.stack([x, 2 + x**2], -1)], -2)
    numpyro.sample(
        "y", N(jnp.linalg.solve(a, jnp.ones((*x.shape, 2, 1)))[..., 0, 0] * latent("b"), 1), obs=y
    )


@model()
def linen_network(X, y=None):
    import flax.linen as nn
    from numpyro.contrib.module import random_flax_module

    net = random_flax_module(
        "net",
        nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)]),
        prior=N(0, 1),
        input_shape=(1, 4),
    )
    numpyro.sample("y", N(net(X)[..., 0], 1), obs=y)


@model()
def equinox_network(X, y=None):
    import equinox
    from numpyro.contrib.module import random_eqx_module

    net = equinox.nn.MLP(4, "scalar", 8, 1, key=jax.random.key(0))
    n = random_eqx_module("net", net, prior=N(0, 1))
    numpyro.sample("y", N(jax.vmap(jax.vmap(n))(X), 1), obs=y)


@model()
def special(pos, unit, y=None):
    f = (
        jax.scipy.special.gammaln(pos)
        + jax.scipy.special.betainc(pos, 1.0 + pos, unit)
        + jax.scipy.special.i0e(pos)
        + jax.scipy.special.gammainc(pos, pos)
    )
    numpyro.sample("y", N(f * latent("b"), 1), obs=y)


@model()
def beta(unit=None, x=None):
    numpyro.sample("unit", dist.Beta(jnp.exp(latent("b") * x), 2.0), obs=unit)


@model(("lat",), core_dim="time")
def cumulative(x, y=None):
    numpyro.deterministic("total", jnp.cumsum(x, 0))
    numpyro.sample("y", N(latent("b") * jnp.cumsum(x, 0), 1), obs=y)


@model(("lat",), core_dim="time")
def convolve(x, y=None):
    numpyro.sample(
        "y",
        N(
            jax.vmap(lambda v: jnp.convolve(v, jnp.array([0.2, 0.6, 0.2]), "same"), 1, 1)(x)
            * latent("b"),
            1,
        ),
        obs=y,
    )


@model(("lat",), core_dim="time")
def rw_local(x, y=None):
    with xr_aimz.plate("lat"):
        w = latent("w", dist.GaussianRandomWalk(1.0, x.shape[0]))
    numpyro.sample("y", N(w.T + x, 1), obs=y)


@model(("lat",), core_dim="time")
def lag(x, y=None):
    numpyro.sample(
        "y", N(latent("b") * jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]), 1), obs=y
    )


@model(("lat",), core_dim="time")
def seasonal_mean(x, y=None):
    an = x.reshape(-1, 12, x.shape[1])
    an = (an - an.mean(0)).reshape(x.shape)
    numpyro.sample("y", N(latent("b") * an, 1), obs=y)


@model()
def studentt(x, y=None):
    numpyro.sample("y", dist.StudentT(latent("nu", dist.Gamma(2, 0.1)), latent("b") * x, 1), obs=y)


@model()
def tensordot(X, y=None):
    w = latent("w", N(0, 1).expand([4]).to_event(1))
    numpyro.sample("y", N(jnp.tensordot(X, w, 1), 1), obs=y)


def count_through_latent(x, a=None, n=None):
    slope = numpyro.sample("s", dist.Normal(0, 1))
    a = numpyro.sample("a", dist.Normal(slope * x, 1), obs=a)
    numpyro.sample("n", dist.Poisson(jnp.exp(a)), obs=n)


def names_of_checked():
    """Names of the graphs of predictions that check lazy inputs."""
    t = np.arange(6.0)
    values = {"x": ("time", t / 6), "a": ("time", t / 6), "n": ("time", np.arange(6))}
    ds = xr.Dataset(values, {"time": range(6)})
    fit = ds.aimz.from_posterior(count_through_latent, {"s": np.ones((1, 3))})
    past = ds.a.where(ds.time < 3)
    return [
        ds[["x"]].chunk(time=3).aimz.predict(fit, sites="n", **options).n.data.name
        for options in (
            {"condition": {"a": past.chunk(time=3)}},
            {"condition": {"a": past}},
            {},
            {"do": {"x": ds.x.where(ds.time < 2)}},
        )
    ]
