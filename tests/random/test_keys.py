"""Randomness addressed by label: law 3, and the right distribution, for all of NumPyro."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from numpyro.distributions import constraints, transforms

from xr_aimz.errors import RandomnessError
from xr_aimz.random import cellwise, distributions, keys, sample
from xr_aimz.random.labels import hash_labels, hash_name

BATCH = (4, 3)
DRAWS = 1500
LAT, LON = hash_labels("lat", [-10.0, 0.0, 2.5, 45.0]), hash_labels("lon", [0, 1, 2])
ADDRESS = (LAT, LON)
KEYS = keys.fold_in(keys.seed_key(7), hash_labels("draw", None, size=DRAWS))


class Case(NamedTuple):
    make: Callable[..., dist.Distribution]
    params: dict[str, np.ndarray]


_rng = np.random.default_rng(3)


def within(low: float, high: float, *event: int) -> np.ndarray:
    return _rng.uniform(low, high, BATCH + event).astype(np.float32)


def counts(low: int, high: int, *event: int) -> np.ndarray:
    return _rng.integers(low, high, BATCH + event).astype(np.int32)


def simplex(k: int) -> np.ndarray:
    return _rng.dirichlet(np.full(k, 3.0), BATCH).astype(np.float32)


def covariance(k: int) -> np.ndarray:
    root = _rng.normal(size=(*BATCH, k, k))
    return (root @ np.swapaxes(root, -1, -2) + k * np.eye(k)).astype(np.float32) / k


def cholesky(k: int) -> np.ndarray:
    return np.linalg.cholesky(covariance(k))


def correlation(k: int) -> np.ndarray:
    cov = covariance(k)
    sd = np.sqrt(np.diagonal(cov, axis1=-2, axis2=-1))
    return cov / (sd[..., None] * sd[..., None, :])


def case(make: Callable[..., dist.Distribution], **params: Any) -> Case:
    return Case(make, params)


RING = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], np.float32)


def _walk(t, mean, scale):
    start = dist.Normal(mean[..., None], scale[..., None] * jnp.ones(2)).to_event(1)
    return dist.EulerMaruyama(t, lambda x, t: (-x, 0.5 * jnp.ones(2)), start)


def _general(probs, loc, scale, low):
    parts = [dist.Normal(loc, scale), dist.LogNormal(loc, scale), dist.Uniform(low, low + 1.0)]
    real = constraints.real
    return dist.MixtureGeneral(dist.Categorical(probs=probs), parts, support=real)


def _torus(mean, skewness):
    base = dist.Independent(dist.VonMises(mean, 3.0), 1)
    return dist.SineSkewed(base, skewness)


# One instance for each class; a parameter has the batch axes first and is sliced by them.
CASES: dict[str, Case] = {
    "AsymmetricLaplace": case(
        dist.AsymmetricLaplace,
        loc=within(-1, 1),
        scale=within(1, 2),
        asymmetry=within(0.7, 1.5),
    ),
    "AsymmetricLaplaceQuantile": case(
        dist.AsymmetricLaplaceQuantile,
        loc=within(-1, 1),
        scale=within(1, 2),
        quantile=within(0.3, 0.7),
    ),
    "BernoulliLogits": case(dist.BernoulliLogits, logits=within(-1, 1)),
    "BernoulliProbs": case(dist.BernoulliProbs, probs=within(0.2, 0.8)),
    "Beta": case(dist.Beta, concentration1=within(0.5, 4), concentration0=within(0.5, 4)),
    "BetaBinomial": case(
        dist.BetaBinomial,
        concentration1=within(1, 4),
        concentration0=within(1, 4),
        total_count=counts(3, 20),
    ),
    "BetaNegativeBinomial": case(
        dist.BetaNegativeBinomial,
        concentration1=within(6, 8),
        concentration0=within(1, 4),
        n=within(2, 6),
    ),
    "BetaProportion": case(dist.BetaProportion, mean=within(0.2, 0.8), concentration=within(1, 6)),
    "BinomialLogits": case(dist.BinomialLogits, logits=within(-1, 1), total_count=counts(3, 60)),
    "BinomialProbs": case(dist.BinomialProbs, probs=within(0.05, 0.9), total_count=counts(3, 60)),
    "CAR": case(
        lambda loc, rho, tau: dist.CAR(loc, rho, tau, RING),
        loc=within(-1, 1, 4),
        rho=within(0.1, 0.8),
        tau=within(1, 2),
    ),
    "CategoricalLogits": case(dist.CategoricalLogits, logits=within(-1, 1, 5)),
    "CategoricalProbs": case(dist.CategoricalProbs, probs=simplex(5)),
    "Cauchy": case(dist.Cauchy, loc=within(-1, 1), scale=within(1, 2)),
    "Chi2": case(dist.Chi2, df=within(2, 9)),
    "CirculantNormal": case(
        lambda loc, rfft: dist.CirculantNormal(loc, covariance_rfft=jnp.asarray(rfft)),
        loc=within(-1, 1, 6),
        rfft=within(1, 2, 4),
    ),
    "Dagum": case(
        dist.Dagum, concentration=within(1, 2), scale=within(1, 2), sharpness=within(5, 7)
    ),
    "Delta": case(dist.Delta, v=within(-1, 1)),
    "Dirichlet": case(dist.Dirichlet, concentration=within(0.5, 4, 3)),
    "DirichletMultinomial": case(
        lambda a, n: dist.DirichletMultinomial(a, n, total_count_max=9),
        a=within(1, 4, 3),
        n=counts(3, 9),
    ),
    "DiscreteUniform": case(dist.DiscreteUniform, low=counts(-5, 0), high=counts(1, 9)),
    "DoublyTruncatedPowerLaw": case(
        dist.DoublyTruncatedPowerLaw,
        alpha=within(-3, -2),
        low=within(1, 2),
        high=within(4, 9),
    ),
    "EulerMaruyama": case(
        _walk,
        t=np.cumsum(within(0.1, 0.3, 5), -1),
        mean=within(-1, 1),
        scale=within(0.5, 1),
    ),
    "ExpandedDistribution": case(
        lambda loc: dist.Gamma(2.0, 1.0 + loc[..., :1, :]).expand(jnp.shape(loc)),
        loc=np.broadcast_to(within(1, 2)[:1], BATCH),
    ),
    "Exponential": case(dist.Exponential, rate=within(1, 3)),
    "FoldedDistribution": case(
        lambda loc, scale: dist.FoldedDistribution(dist.Normal(loc, scale)),
        loc=within(-1, 1),
        scale=within(1, 2),
    ),
    "Gamma": case(dist.Gamma, concentration=within(0.3, 5), rate=within(0.5, 2)),
    "GammaPoisson": case(dist.GammaPoisson, concentration=within(2, 5), rate=within(0.5, 2)),
    "GaussianCopula": case(
        lambda rate, corr: dist.GaussianCopula(dist.Exponential(rate), corr),
        rate=within(1, 3, 3),
        corr=correlation(3),
    ),
    "GaussianCopulaBeta": case(
        dist.GaussianCopulaBeta,
        concentration1=within(1, 4, 3),
        concentration0=within(1, 4, 3),
        correlation_matrix=correlation(3),
    ),
    "GaussianRandomWalk": case(
        lambda scale: dist.GaussianRandomWalk(scale, num_steps=6), scale=within(1, 2)
    ),
    "GaussianStateSpace": case(
        lambda tril, start: dist.GaussianStateSpace(
            4, np.array([[0.5, 0.2], [-0.3, 0.4]]), scale_tril=tril, initial_value=start
        ),
        tril=cholesky(2),
        start=within(-1, 1, 2),
    ),
    "GeometricLogits": case(dist.GeometricLogits, logits=within(-1, 1)),
    "GeometricProbs": case(dist.GeometricProbs, probs=within(0.2, 0.8)),
    "Gompertz": case(dist.Gompertz, concentration=within(1, 2), rate=within(1, 2)),
    "Gumbel": case(dist.Gumbel, loc=within(-1, 1), scale=within(1, 2)),
    "HalfCauchy": case(dist.HalfCauchy, scale=within(1, 2)),
    "HalfNormal": case(dist.HalfNormal, scale=within(1, 2)),
    "HurdleGamma": case(
        dist.HurdleGamma, gate=within(0.1, 0.6), concentration=within(1, 3), rate=within(1, 2)
    ),
    "HurdleLogNormal": case(
        dist.HurdleLogNormal, gate=within(0.1, 0.6), loc=within(-1, 1), scale=within(0.3, 0.5)
    ),
    "HurdleLogits": case(
        lambda rate, gate: dist.HurdleLogits(dist.Poisson(rate), gate),
        rate=within(0.5, 3),
        gate=within(-1, 1),
    ),
    "HurdlePoisson": case(dist.HurdlePoisson, gate=within(0.1, 0.6), rate=within(0.5, 3)),
    "HurdleProbs": case(
        lambda p, gate: dist.HurdleProbs(dist.GeometricProbs(p), gate),
        p=within(0.2, 0.6),
        gate=within(0.1, 0.6),
    ),
    "Independent": case(
        lambda loc: dist.Poisson(loc).to_event(1),
        loc=within(1, 5, 4),
    ),
    "InverseGamma": case(dist.InverseGamma, concentration=within(6, 9), rate=within(1, 2)),
    "InverseWishart": case(
        lambda df, tril: dist.InverseWishart(df, scale_tril=tril),
        df=within(9, 12),
        tril=cholesky(2),
    ),
    "InverseWishartCholesky": case(
        lambda df, tril: dist.InverseWishartCholesky(df, scale_tril=tril),
        df=within(9, 12),
        tril=cholesky(2),
    ),
    "Kumaraswamy": case(
        dist.Kumaraswamy, concentration1=within(1, 4), concentration0=within(1, 4)
    ),
    "LKJ": case(lambda c: dist.LKJ(3, c), c=within(0.5, 3)),
    "LKJCholesky": case(lambda c: dist.LKJCholesky(3, c, sample_method="cvine"), c=within(0.5, 3)),
    "Laplace": case(dist.Laplace, loc=within(-1, 1), scale=within(1, 2)),
    "LeftCensoredDistribution": case(
        lambda rate, censored: dist.LeftCensoredDistribution(dist.Exponential(rate), censored),
        rate=within(1, 2),
        censored=np.ones(BATCH, bool),
    ),
    "LeftTruncatedDistribution": case(
        lambda loc, low: dist.LeftTruncatedDistribution(dist.Normal(loc, 1.0), low),
        loc=within(-1, 1),
        low=within(-1, 1),
    ),
    "LeftTruncatedGamma": case(
        lambda a, low: dist.LeftTruncatedGamma(dist.Gamma(a, 1.0), low),
        a=within(1, 4),
        low=within(0.5, 1),
    ),
    "Levy": case(dist.Levy, loc=within(-1, 1), scale=within(1, 2)),
    "LogNormal": case(dist.LogNormal, loc=within(-1, 1), scale=within(0.2, 0.5)),
    "LogUniform": case(dist.LogUniform, low=within(1, 2), high=within(3, 9)),
    "Logistic": case(dist.Logistic, loc=within(-1, 1), scale=within(1, 2)),
    "LowRankMultivariateNormal": case(
        dist.LowRankMultivariateNormal,
        loc=within(-1, 1, 4),
        cov_factor=within(-1, 1, 4, 2),
        cov_diag=within(1, 2, 4),
    ),
    "LowerTruncatedPowerLaw": case(
        dist.LowerTruncatedPowerLaw, alpha=within(-9, -7), low=within(1, 2)
    ),
    "MaskedDistribution": case(
        lambda loc, mask: dist.Gamma(loc, 1.0).mask(mask),
        loc=within(1, 4),
        mask=_rng.random(BATCH) < 0.5,
    ),
    "MatrixNormal": case(
        dist.MatrixNormal,
        loc=within(-1, 1, 3, 2),
        scale_tril_row=cholesky(3),
        scale_tril_column=cholesky(2),
    ),
    "MixtureGeneral": case(
        _general, probs=simplex(3), loc=within(-1, 1), scale=within(0.2, 0.5), low=within(3, 4)
    ),
    "MixtureSameFamily": case(
        lambda logits, a, rate: dist.MixtureSameFamily(
            dist.Categorical(logits=logits), dist.Gamma(a, rate).to_event(1)
        ),
        logits=within(-1, 1, 3),
        a=within(1, 5, 3, 2),
        rate=within(1, 2, 3, 2),
    ),
    "MultinomialLogits": case(
        lambda logits: dist.MultinomialLogits(logits, 9), logits=within(-1, 1, 3)
    ),
    "MultinomialProbs": case(
        lambda probs, n: dist.MultinomialProbs(probs, n, total_count_max=9),
        probs=simplex(3),
        n=counts(2, 9),
    ),
    "MultivariateNormal": case(
        dist.MultivariateNormal, loc=within(-1, 1, 3), covariance_matrix=covariance(3)
    ),
    "MultivariateStudentT": case(
        dist.MultivariateStudentT, df=within(9, 12), loc=within(-1, 1, 3), scale_tril=cholesky(3)
    ),
    "NegativeBinomial2": case(
        dist.NegativeBinomial2, mean=within(1, 5), concentration=within(2, 5)
    ),
    "NegativeBinomialLogits": case(
        dist.NegativeBinomialLogits, total_count=within(2, 5), logits=within(-1, 1)
    ),
    "NegativeBinomialProbs": case(
        dist.NegativeBinomialProbs, total_count=within(2, 5), probs=within(0.2, 0.6)
    ),
    "Normal": case(dist.Normal, loc=within(-1, 1), scale=within(1, 2)),
    "OrderedLogistic": case(
        dist.OrderedLogistic, predictor=within(-1, 1), cutpoints=np.cumsum(within(0.3, 1, 3), -1)
    ),
    "Pareto": case(dist.Pareto, scale=within(1, 2), alpha=within(7, 9)),
    "Poisson": case(dist.Poisson, rate=within(0.5, 30)),
    "ProjectedNormal": case(dist.ProjectedNormal, concentration=within(-1, 1, 3)),
    "RelaxedBernoulliLogits": case(
        dist.RelaxedBernoulliLogits, temperature=within(1, 2), logits=within(-1, 1)
    ),
    "RightCensoredDistribution": case(
        lambda k, censored: dist.RightCensoredDistribution(dist.Weibull(1.0, k), censored),
        k=within(1, 2),
        censored=np.ones(BATCH, bool),
    ),
    "RightTruncatedDistribution": case(
        lambda loc, high: dist.RightTruncatedDistribution(dist.Logistic(loc, 1.0), high),
        loc=within(-1, 1),
        high=within(-1, 1),
    ),
    "RightTruncatedGamma": case(
        lambda a, high: dist.RightTruncatedGamma(dist.Gamma(a, 1.0), high),
        a=within(1, 4),
        high=within(1, 3),
    ),
    "SineBivariateVonMises": case(
        lambda phi, psi, a, b, c: dist.SineBivariateVonMises(phi, psi, a, b, correlation=c),
        phi=within(-1, 1),
        psi=within(-1, 1),
        a=within(3, 5),
        b=within(3, 5),
        c=within(-1, 1),
    ),
    "SineSkewed": case(_torus, mean=within(-1, 1, 2), skewness=within(-0.4, 0.4, 2)),
    "SoftLaplace": case(dist.SoftLaplace, loc=within(-1, 1), scale=within(1, 2)),
    "StudentT": case(dist.StudentT, df=within(9, 12), loc=within(-1, 1), scale=within(1, 2)),
    "TransformedDistribution": case(
        lambda a, loc, scale: dist.TransformedDistribution(
            dist.Gamma(a, 1.0), transforms.AffineTransform(loc, scale)
        ),
        a=within(1, 4),
        loc=within(-1, 1),
        scale=within(1, 2),
    ),
    "TruncatedPolyaGamma": case(
        lambda like: dist.TruncatedPolyaGamma(jnp.shape(like)), like=np.zeros(BATCH)
    ),
    "TwoSidedTruncatedDistribution": case(
        lambda loc, low, high: dist.TwoSidedTruncatedDistribution(dist.Normal(loc, 1), low, high),
        loc=within(-1, 1),
        low=within(-2, -1),
        high=within(1, 2),
    ),
    "TwoSidedTruncatedGamma": case(
        lambda a, low, high: dist.TwoSidedTruncatedGamma(dist.Gamma(a, 1.0), low, high),
        a=within(1, 4),
        low=within(0.5, 1),
        high=within(2, 4),
    ),
    "Uniform": case(dist.Uniform, low=within(-2, -1), high=within(1, 2)),
    "Unit": case(dist.Unit, log_factor=within(-1, 1)),
    "VonMises": case(dist.VonMises, loc=within(-1, 1), concentration=within(1, 5)),
    "Weibull": case(dist.Weibull, scale=within(1, 2), concentration=within(1, 3)),
    "Wishart": case(
        lambda df, tril: dist.Wishart(df, scale_tril=tril), df=within(5, 9), tril=cholesky(2)
    ),
    "WishartCholesky": case(
        lambda df, tril: dist.WishartCholesky(df, scale_tril=tril),
        df=within(5, 9),
        tril=cholesky(2),
    ),
    "ZeroInflatedLogits": case(
        lambda rate, gate: dist.ZeroInflatedLogits(dist.Poisson(rate), gate),
        rate=within(0.5, 3),
        gate=within(-1, 1),
    ),
    "ZeroInflatedPoisson": case(
        dist.ZeroInflatedPoisson, gate=within(0.1, 0.6), rate=within(1, 3)
    ),
    "ZeroInflatedProbs": case(
        lambda p, gate: dist.ZeroInflatedProbs(dist.BinomialProbs(p, 9), gate),
        p=within(0.2, 0.6),
        gate=within(0.1, 0.6),
    ),
    "ZeroSumNormal": case(
        lambda like: dist.ZeroSumNormal(1.5, event_shape=(4,)).expand(jnp.shape(like)),
        like=np.zeros(BATCH),
    ),
}
NO_SITE = {
    "Distribution": "the abstract base of all",
    "ImproperUniform": "has no sampler",
    "IntervalCensoredDistribution": "draws one value where its event is a pair",
}
NEEDS_TFP = {"GaussianCopulaBeta"}
# Compiling is what these tests spend their time on; XLA's own passes are not under test.
QUICK = {"xla_backend_optimization_level": 0}


def pick(params: dict[str, Any], rows: Any, columns: Any) -> dict[str, Any]:
    return {k: v[np.ix_(rows, columns)] for k, v in params.items()}


def is_class(name: str) -> bool:
    found = getattr(dist, name)
    return isinstance(found, type) and issubclass(found, dist.Distribution)


def every(make: Callable[..., dist.Distribution]) -> Callable[..., jax.Array]:
    """Draws for many keys at once: ``(keys, *batch, *event)``."""

    def draw(params, many, address):
        return jax.vmap(lambda key: sample(make(**params), key, address))(many)

    return jax.jit(draw, compiler_options=QUICK)


def once(fn: dist.Distribution, address: Any = ADDRESS) -> jax.Array:
    """One draw, compiled: what JAX would compile piece by piece takes longer."""
    draw = jax.jit(lambda key, at: sample(fn, key, at), compiler_options=QUICK)
    return draw(KEYS[0], address)


def close(got: Any, want: Any) -> None:
    """Equal to the last few ulps, of the largest value where terms of a sum cancel."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    if got.dtype.kind in "iub":
        np.testing.assert_array_equal(got, want)
    else:
        scale = np.max(np.abs(want), initial=0.0, where=np.isfinite(want))
        np.testing.assert_allclose(got, want, rtol=4e-6, atol=1e-6 * min(scale, 10.0))


def test_every_distribution_of_numpyro_has_a_case_or_a_reason():
    assert {name for name in dist.__all__ if is_class(name)} == set(CASES) | set(NO_SITE)


# They compile for long. Of each way to draw the quick run has some, and test_inversion.py.
SLOW = [
    "Beta",
    "BetaBinomial",
    "BetaNegativeBinomial",
    "BetaProportion",
    "BinomialLogits",
    "BinomialProbs",
    "CAR",
    "Chi2",
    "CirculantNormal",
    "Dirichlet",
    "DirichletMultinomial",
    "EulerMaruyama",
    "ExpandedDistribution",
    "Gamma",
    "GammaPoisson",
    "GaussianCopula",
    "GaussianStateSpace",
    "Gompertz",
    "HurdleGamma",
    "HurdleLogits",
    "HurdlePoisson",
    "HurdleProbs",
    "Independent",
    "InverseGamma",
    "InverseWishart",
    "InverseWishartCholesky",
    "LKJ",
    "LKJCholesky",
    "LeftTruncatedDistribution",
    "LeftTruncatedGamma",
    "LowRankMultivariateNormal",
    "MaskedDistribution",
    "MixtureGeneral",
    "MixtureSameFamily",
    "MultivariateStudentT",
    "NegativeBinomial2",
    "NegativeBinomialLogits",
    "NegativeBinomialProbs",
    "Poisson",
    "RightTruncatedGamma",
    "SineBivariateVonMises",
    "SineSkewed",
    "StudentT",
    "TransformedDistribution",
    "TruncatedPolyaGamma",
    "TwoSidedTruncatedDistribution",
    "TwoSidedTruncatedGamma",
    "VonMises",
    "Wishart",
    "WishartCholesky",
    "ZeroInflatedLogits",
    "ZeroInflatedPoisson",
    "ZeroInflatedProbs",
]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_law_3_and_the_law_of_the_draws(name):
    """One test for both, so that each program is compiled once."""
    if name in NEEDS_TFP:
        pytest.importorskip("tensorflow_probability")
    make, params = CASES[name]
    fn = make(**{k: jnp.asarray(v) for k, v in params.items()})
    draw = every(lambda **p: make(**{k: jnp.asarray(v) for k, v in p.items()}))
    drawn = np.asarray(draw(params, KEYS, ADDRESS))
    assert drawn.shape == (DRAWS, *BATCH, *fn.event_shape)
    commutes(make, params, draw, drawn)
    if drawn.size and name != "Delta":
        has_moments(fn, drawn)
        is_unrelated(drawn)


def commutes(make, params, draw, drawn) -> None:
    some, few = KEYS[:5], drawn[:5]
    rows, columns = [3, 0, 0, 1], [2, 0, 1]
    # Of the whole's shape and keys, so that one program serves both.
    chosen = draw(pick(params, rows, columns), KEYS, (LAT[rows], LON[columns]))
    close(chosen, drawn[:, rows][:, :, columns])

    def by_row(params, some, lat, lon):
        def row(piece):
            values, word = piece
            values = {k: v[None] for k, v in values.items()}
            return jax.lax.map(lambda key: sample(make(**values), key, (word[None], lon)), some)

        return jax.lax.map(row, (params, lat))

    arrays = {k: jnp.asarray(v) for k, v in params.items()}
    rows = jax.jit(by_row, compiler_options=QUICK)(arrays, some, LAT, LON)
    close(np.moveaxis(np.asarray(rows)[:, :, 0], 0, 1), few)


def has_moments(fn: dist.Distribution, drawn: np.ndarray) -> None:
    """Mean and variance within 6 standard errors; else the same law as NumPyro's sampler."""
    # GaussianStateSpace.variance fails under a batch of more than one axis (NumPyro 0.22).
    try:
        moments = [np.broadcast_to(np.asarray(m), drawn.shape[1:]) for m in (fn.mean, fn.variance)]
    except (NotImplementedError, AttributeError, ImportError, ValueError):
        moments = [np.nan]
    if not all(np.all(np.isfinite(m)) for m in moments) or isinstance(fn, CIRCULAR):
        return like_numpyro(fn, drawn)
    mean, variance = moments
    away = drawn.astype(float) - mean
    error = np.sqrt(np.maximum(np.mean(away**2, 0), variance) / DRAWS)
    assert np.all(np.abs(away.mean(0)) <= 6 * error + 1e-5)
    spread = np.sqrt(np.mean((away**2 - variance) ** 2, 0) / DRAWS)
    assert np.all(np.abs(np.mean(away**2, 0) - variance) <= 6 * spread + 1e-5)


# Their mean and variance are those of the circle or the sphere.
CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed, dist.ProjectedNormal)


def like_numpyro(fn: dist.Distribution, drawn: np.ndarray) -> None:
    sample = jax.jit(lambda key: fn.sample(key, (DRAWS,)), compiler_options=QUICK)
    theirs = np.asarray(sample(jax.random.key(1)))
    for ours, reference in zip(projected(drawn).T, projected(theirs).T, strict=True):
        assert st.ks_2samp(ours, reference, method="asymp").pvalue > 1e-6


def projected(drawn: np.ndarray) -> np.ndarray:
    """One number for each key and cell: the event weighed at random, so all of it counts."""
    flat = drawn.reshape(DRAWS, BATCH[0] * BATCH[1], -1).astype(float)
    return flat @ np.random.default_rng(5).normal(size=flat.shape[-1])


def is_unrelated(drawn: np.ndarray) -> None:
    """No rank correlation between cells, nor between one key and the next: |z| < 6."""
    ranks = st.rankdata(projected(drawn), axis=0)
    bound = 6 / np.sqrt(DRAWS)
    cells = np.corrcoef(ranks, rowvar=False) - np.eye(ranks.shape[1])
    assert np.max(np.abs(cells)) < bound
    both = np.corrcoef(ranks[1:], ranks[:-1], rowvar=False)
    assert np.max(np.abs(both[: ranks.shape[1], ranks.shape[1] :])) < bound


@pytest.mark.parametrize("name", sorted(set(NO_SITE) - {"Distribution"}))
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: d.mask(True), lambda d: d.expand((4, 3))])
def test_what_cannot_be_drawn_is_refused(name, wrap):
    fn = {
        "ImproperUniform": dist.ImproperUniform(constraints.real, (3,), ()),
        "IntervalCensoredDistribution": dist.IntervalCensoredDistribution(
            dist.LogNormal(0.0, jnp.ones(3)), jnp.zeros(3, bool), jnp.ones(3, bool)
        ),
    }[name]
    fn = wrap(fn)
    with pytest.raises(RandomnessError, match=name):
        sample(fn, KEYS[0], ADDRESS[-len(fn.batch_shape) :])
    with pytest.raises(NotImplementedError):
        sample(dist.ImproperUniform(constraints.real, (), (2,)), KEYS[0], ())


# --- wrappers --------------------------------------------------------------------------

LOC = jnp.asarray(within(-1, 1))
NORMAL = once(dist.Normal(LOC, 1.0))


@pytest.mark.parametrize("start", [(), (3,), (1, 3), (4, 1)])
@pytest.mark.parametrize("name", ["Normal", "HalfNormal", "Gamma", "LogNormal", "BetaBinomial"])
def test_expanding_gives_every_cell_its_own_draw(name, start):
    one = {
        "Normal": lambda x: dist.Normal(x, 1.0),
        "HalfNormal": lambda x: dist.HalfNormal(x),
        "Gamma": lambda x: dist.Gamma(x, 2.0),
        "LogNormal": lambda x: dist.LogNormal(x, 1.0),
        "BetaBinomial": lambda x: dist.BetaBinomial(x, 2.0, 1000),
    }[name]
    values = jnp.linspace(1.0, 2.0, np.prod(start, dtype=int)).reshape(start)
    expanded = once(one(values).expand(BATCH))
    whole = once(one(jnp.broadcast_to(values, BATCH)))
    close(expanded, whole)
    assert len(np.unique(expanded)) > 9


COUNTED = sorted(name for name in CASES if getattr(dist, name).sample in cellwise.COUNTER_BASED)


@pytest.mark.parametrize("name", COUNTED)
def test_samplers_by_counter_broadcast_what_plates_expand(name):
    make, params = CASES[name]
    one = {k: jnp.asarray(v[:1, :1]) for k, v in params.items()}
    full = {k: jnp.broadcast_to(v, BATCH + v.shape[2:]) for k, v in one.items()}
    close(once(make(**one).expand(BATCH)), once(make(**full)))


@pytest.mark.parametrize("name", COUNTED)
def test_samplers_by_counter_take_bits_in_the_shape_they_declare(name, monkeypatch):
    """Where one no longer did, the slow way would hide it."""
    monkeypatch.setattr(distributions, "_sample_by_cell", None)
    make, params = CASES[name]
    sample(make(**{k: jnp.asarray(v) for k, v in params.items()}), KEYS[0], ADDRESS)


def test_a_sampler_that_changed_its_shape_falls_back_to_cells(monkeypatch):
    noise = dict(cellwise._NOISE)
    noise[dist.Normal.sample] = lambda fn: ((), (2,))
    monkeypatch.setattr(cellwise, "_NOISE", noise)
    got = sample(dist.Normal(LOC, 1.0), KEYS[0], ADDRESS)
    row = sample(dist.Normal(LOC[1:2], 1.0), KEYS[0], (LAT[1:2], LON))
    close(row, got[1:2])
    assert not np.array_equal(got, NORMAL)


def test_wrappers_move_no_draw():
    normal = dist.Normal(LOC, 1.0)
    for fn in (normal.mask(LOC > 0), normal.mask(False), normal.expand(BATCH)):
        close(sample(fn, KEYS[0], ADDRESS), NORMAL)
    affine = transforms.AffineTransform(LOC, 2.0)
    moved = sample(dist.TransformedDistribution(normal, affine), KEYS[0], ADDRESS)
    close(moved, LOC + 2.0 * NORMAL)


@pytest.mark.parametrize("make", [lambda x: dist.Normal(x, 1.0), lambda x: dist.Poisson(x)])
def test_events_made_of_batch_axes(make):
    rate = jnp.asarray(within(20, 30, 5, 5))
    fn = make(rate).to_event(2)
    whole = once(fn)
    assert whole.shape == (*BATCH, 5, 5)
    part = once(make(rate[2:]).to_event(2), (LAT[2:], LON))
    close(part, whole[2:])
    if whole.dtype.kind == "f":
        assert len(np.unique(whole - rate)) > 290  # an event's own axes are not symmetric
    nested = dist.Independent(dist.Independent(make(rate), 1), 1)
    moved = once(nested)
    assert len(np.unique(moved - np.swapaxes(moved, -1, -2))) > 20


def test_a_scalar_site_is_jax_own():
    key = jax.random.wrap_key_data(KEYS[0], impl="threefry2x32")
    fn = dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3))
    close(sample(fn, KEYS[0], ()), fn.sample(key))


def test_counts_that_differ_by_cell_need_no_declared_maximum():
    n, probs = counts(2, 9), simplex(3)
    whole = once(dist.Multinomial(n, probs=probs))
    np.testing.assert_array_equal(whole.sum(-1), n)
    small = np.argsort(n.max(1))[:2]  # their largest count is another
    part = once(dist.Multinomial(n[small], probs=probs[small]), (LAT[small], LON))
    close(part, whole[small])
    traced = jax.jit(lambda n: sample(dist.Multinomial(n, probs=probs), KEYS[0], ADDRESS))
    close(traced(n), whole)


# --- distributions of the user's own ---------------------------------------------------


class Skewed(dist.Distribution):
    """Draws in a shape of its own making, from a component and an event of parameters."""

    arg_constraints: ClassVar = {"loc": constraints.real, "weights": constraints.real_vector}
    support = constraints.real

    def __init__(self, loc, weights, base, *, validate_args=None):
        self.loc, self.weights, self.base = loc, weights, base
        self.power = 2
        batch = jax.lax.broadcast_shapes(jnp.shape(loc), jnp.shape(weights)[:-1], base.batch_shape)
        super().__init__(batch, (), validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        k1, k2 = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape, jnp.shape(self.weights)[-1])
        noise = jnp.sum(self.weights * jax.random.normal(k1, shape) ** self.power, -1)
        return self.loc + noise + self.base.expand(self.batch_shape).sample(k2, sample_shape)


class Quiet(dist.Normal):
    """Brings a sampler of its own, so it may not be drawn as a Normal."""

    def sample(self, key, sample_shape=()):
        return self.loc + 0.1 * jax.random.t(key, 5.0, sample_shape + self.batch_shape)


class Renamed(dist.Normal):
    """Brings nothing."""


class Opaque(dist.Distribution):
    support = constraints.real

    def __init__(self, table):
        self.table = table
        super().__init__(jnp.shape(table), ())

    def sample(self, key, sample_shape=()):
        return self.table + jax.random.normal(key, sample_shape + self.batch_shape)


class Broken(dist.Normal):
    def sample(self, key, sample_shape=()):
        return jax.random.normal(key, (2,))


@pytest.mark.parametrize("kind", [Skewed, Quiet])
def test_a_subclass_with_its_own_sampler(kind):
    weights = jnp.asarray(within(0, 1, 4))
    params = {"loc": LOC, "weights": weights, "rate": jnp.asarray(within(1, 2))}

    def make(loc, weights, rate):
        if kind is Quiet:
            return Quiet(loc, rate)
        return Skewed(loc[0], weights, dist.Gamma(rate, 1.0).mask(True))

    draw = every(make)
    whole = draw(params, KEYS, ADDRESS)
    columns = [2, 0, 0]
    chosen = pick(params, range(4), columns)
    close(draw(chosen, KEYS, (LAT, LON[columns])), np.asarray(whole)[:, :, columns])
    like_numpyro(make(**params), np.asarray(whole))
    is_unrelated(np.asarray(whole))


def test_a_subclass_without_one_is_its_parent():
    close(sample(Renamed(LOC, 1.0), KEYS[0], ADDRESS), NORMAL)


def test_a_subclass_that_cannot_be_sliced_is_refused():
    with pytest.raises(RandomnessError, match=r"Opaque.*'table'.*arg_constraints"):
        sample(Opaque(LOC), KEYS[0], ADDRESS)
    with pytest.raises(RandomnessError, match=r"Broken.*event shape"):
        sample(Broken(LOC, 1.0), KEYS[0], ADDRESS)


# --- addresses -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Normal", "Gamma", "MixtureSameFamily", "MultivariateNormal"])
def test_a_table_draws_what_its_grid_draws(name):
    make, params = CASES[name]
    arrays = {k: jnp.asarray(v) for k, v in params.items()}
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in arrays.items()}
    words = keys.combine_axes(ADDRESS)
    assert words.shape == (*BATCH, 2)
    grid = once(make(**arrays))
    table = once(make(**flat), (words.reshape(-1, 2),))
    close(table.reshape(grid.shape), grid)


def test_a_transposed_site_draws_what_it_drew():
    turned = sample(dist.Normal(LOC.T, 1.0), KEYS[0], (LON, LAT))
    close(turned.T, NORMAL)


def test_addresses_traced_and_plain_agree():
    traced = jax.jit(keys.combine_axes)(ADDRESS)
    np.testing.assert_array_equal(traced, keys.combine_axes(ADDRESS))
    np.testing.assert_array_equal(keys.combine_axes(ADDRESS), LAT[:, None] + LON)

    def step(carry, key):
        return carry, sample(dist.Normal(LOC, 1.0), key, carry)

    scanned = jax.lax.scan(step, ADDRESS, KEYS[:3])[1]
    close(scanned[0], NORMAL)


def test_an_address_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 3\).*Normal"):
        sample(dist.Normal(LOC, 1.0), KEYS[0], (LAT,))


def test_positions_are_words_of_their_own():
    axes = [keys.position_hashes(axis, 50) for axis in (1, 2, -3)]
    words = np.concatenate([*axes, hash_labels("x", None, size=50)])
    assert len(np.unique(words, axis=0)) == 200
    np.testing.assert_array_equal(keys.position_hashes(-1, 3), keys.position_hashes(1, 5)[:3])


def test_counters_of_many_cells_are_distinct():
    grid = [hash_labels(d, np.linspace(0, 1, n)) for d, n in (("a", 100), ("b", 80), ("c", 50))]
    words = np.concatenate([axis.reshape(-1) for axis in (a.T for a in grid)])
    batch = (100, 80, 50)
    high, low = cellwise._counters(jnp.asarray(words), batch, (), ())
    np.testing.assert_array_equal(np.stack([high, low], -1), keys.combine_axes(grid))
    together = (np.asarray(high, np.uint64) << np.uint64(32)) | np.asarray(low, np.uint64)
    assert len(np.unique(together)) == 400_000
    high, low = cellwise._counters(jnp.asarray(words[: 200 + 160]), (100, 80), (2,), (25,))
    together = (np.asarray(high, np.uint64) << np.uint64(32)) | np.asarray(low, np.uint64)
    assert len(np.unique(together)) == 400_000


def test_neighbouring_labels_draw_unrelated_normals():
    labels = np.float64(0.1) + np.arange(200_000) * np.spacing(0.1)
    address = (hash_labels("x", labels),)
    draw = jax.jit(lambda key: sample(dist.Normal(jnp.zeros(200_000), 1.0), key, address))
    first, second = np.asarray(draw(KEYS[0])), np.asarray(draw(KEYS[1]))
    assert st.kstest(first, "norm").pvalue > 1e-4
    bound = 5 / np.sqrt(200_000)
    for lag in (1, 2, 3, 64):
        assert abs(np.corrcoef(first[lag:], first[:-lag])[0, 1]) < bound
        assert abs(np.corrcoef(first[lag:], second[:-lag])[0, 1]) < bound
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < bound


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits_are_selected_exactly(width):
    with jax.enable_x64(True):
        spec = cellwise._generator(BATCH, (), (6,))
        whole = jax.random.bits(generator_key(spec, ADDRESS), (*BATCH, 6), f"uint{width}")
        part = cellwise._generator((2, 3), (), (6,))
        rows = jax.random.bits(generator_key(part, (LAT[:2], LON)), (2, 3, 6), f"uint{width}")
        np.testing.assert_array_equal(rows, whole[:2])
        ones = np.unpackbits(np.asarray(whole).view(np.uint8)).mean()
        assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(whole.size * width)


def generator_key(spec, address):
    data = jnp.concatenate([KEYS[0], *(jnp.asarray(axis.T.reshape(-1)) for axis in address)])
    return jax.random.wrap_key_data(data, impl=spec)


def test_double_precision():
    with jax.enable_x64(True):
        params = {"loc": jnp.asarray(LOC, jnp.float64)}
        for fn in (lambda loc: dist.Normal(loc, 1.0), lambda loc: dist.Gamma(jnp.exp(loc), 1.0)):
            whole = sample(fn(**params), KEYS[0], ADDRESS)
            assert whole.dtype == np.float64
            part = sample(fn(params["loc"][1:]), KEYS[0], (LAT[1:], LON))
            np.testing.assert_allclose(part, whole[1:], rtol=1e-14)


# --- keys ------------------------------------------------------------------------------


def test_keys_of_sites_chains_and_seeds_are_distinct():
    root = keys.seed_key(0)
    made = [keys.site_key(root, name) for name in ("a", "b", "ab", "ba", "")]
    made += [keys.fold_in(root, hash_labels(d, [0])[0]) for d in ("chain", "draw")]
    made += [keys.seed_key(seed) for seed in (0, 1, 2**32, 2**64 - 2, -1)]
    assert len(np.unique(np.stack([np.asarray(k) for k in made]), axis=0)) == len(made)
    one = sample(dist.Normal(LOC, 1.0), keys.site_key(root, "a"), ADDRESS)
    two = sample(dist.Normal(LOC, 1.0), keys.site_key(root, "b"), ADDRESS)
    assert not np.any(one == two)


def test_folding_is_threefry_and_goes_by_pairs():
    words = np.stack([hash_name("a"), hash_name("b")])
    each = [keys.fold_in(KEYS[0], w) for w in words]
    np.testing.assert_array_equal(keys.fold_in(KEYS[0], words), each)
    np.testing.assert_array_equal(jax.jit(keys.fold_in)(KEYS[0], words), each)
    key = jax.random.wrap_key_data(KEYS[0], impl="threefry2x32")
    theirs = jax.random.key_data(jax.random.split(key, 3))
    np.testing.assert_array_equal(
        keys.fold_in(KEYS[0], np.array([[0, 0], [0, 1], [0, 2]])), theirs
    )


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match=str(seed)):
        keys.seed_key(seed)


def test_draws_are_pinned():
    """Stored predictions are resumed by later versions: a change here breaks them."""
    key = keys.site_key(keys.seed_key(42), "tas")
    np.testing.assert_array_equal(key, [1189725654, 568078948])
    bits = jax.random.bits(generator_key(cellwise._generator(BATCH, (), ()), ADDRESS), BATCH)
    np.testing.assert_array_equal(bits[0], [3027537869, 3043879216, 1632242336])
