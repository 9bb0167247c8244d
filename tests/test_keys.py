"""Randomness addressed by label: law 3, and the right distribution, for all of NumPyro."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from numpyro.distributions import constraints, transforms

from xr_aimz import cellwise, keys
from xr_aimz.errors import RandomnessError
from xr_aimz.labels import label_words, name_words

BATCH = (4, 3)
DRAWS = 1500
LAT, LON = label_words("lat", [-10.0, 0.0, 2.5, 45.0]), label_words("lon", [0, 1, 2])
ADDRESS = (LAT, LON)
KEYS = keys.fold(keys.seed_key(7), label_words("draw", None, size=DRAWS))


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
    "BetaProportion": case(
        dist.BetaProportion, mean=within(0.2, 0.8), concentration=within(1, 6)
    ),
    "BinomialLogits": case(
        dist.BinomialLogits, logits=within(-1, 1), total_count=counts(3, 60)
    ),
    "BinomialProbs": case(
        dist.BinomialProbs, probs=within(0.05, 0.9), total_count=counts(3, 60)
    ),
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
    "LKJCholesky": case(
        lambda c: dist.LKJCholesky(3, c, sample_method="cvine"), c=within(0.5, 3)
    ),
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
    "ZeroInflatedPoisson": case(dist.ZeroInflatedPoisson, gate=within(0.1, 0.6), rate=within(1, 3)),
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
