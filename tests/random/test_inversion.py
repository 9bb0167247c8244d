"""Draws by inversion against the exact laws, over the range of their parameters.

A test at level 1e-6 for each parameter, with a fixed seed: a wrong law of a relative 1e-2 fails.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st
from scipy import special

from xr_aimz.random import fold_in, hash_labels, quantiles, sample, seed_key
from xr_aimz.random.cells import Cells
from xr_aimz.random.inversion import draw_gamma

COUNT = 60_000
LEVEL = 1e-6
WORDS = hash_labels("cell", None, size=COUNT)
KEYS = fold_in(seed_key(7), hash_labels("draw", None, size=200))


def draws(make, *parameters, seed=11) -> np.ndarray:
    """Draws ``(parameter, cell, *event)`` of a distribution for each row of its parameters."""
    rows = [np.asarray(p, np.float32)[:, None] for p in parameters]
    address = (hash_labels("row", None, size=len(rows[0])), WORDS)
    fn = jax.eval_shape(lambda *r: make(*r), *rows)
    expand = (len(rows[0]), COUNT)

    def draw(*r):
        return sample(make(*r).expand(expand), seed_key(seed), address)

    assert fn.batch_shape == (len(rows[0]), 1)
    return np.asarray(jax.jit(draw)(*rows))


def check_continuous(drawn, laws) -> None:
    for values, law in zip(drawn.astype(float), laws, strict=True):
        assert st.kstest(values, law.cdf).pvalue > LEVEL


def check_counts(drawn, laws) -> None:
    """Chi-square on bins of at least 20 expected counts."""
    for values, law in zip(drawn, laws, strict=True):
        edges = np.unique(law.ppf(np.linspace(5e-4, 1 - 5e-4, 120)).astype(int))
        expected = COUNT * np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]]))
        observed = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
        keep = expected >= 20
        rest, rare = expected[~keep].sum(), observed[~keep].sum()
        assert st.poisson.sf(rare - 1, max(rest, 1e-12)) > LEVEL
        if keep.sum() > 1:
            scaled = expected[keep] * observed[keep].sum() / expected[keep].sum()
            assert st.chisquare(observed[keep], scaled).pvalue > LEVEL


SHAPES = np.float32([1e-3, 0.05, 0.5, 1.0, 2.5, 7.99, 8.0, 40.0, 1e3, 1e6])


def test_gamma_of_any_shape():
    cells = Cells((hash_labels("row", None, size=len(SHAPES)), WORDS))
    drawn = jax.jit(lambda key: draw_gamma(key, cells, SHAPES[:, None]))(seed_key(3))
    log_x = np.log(np.asarray(drawn.scale, float)) + np.asarray(drawn.log_ratio, float)
    for logs, a in zip(log_x, SHAPES.astype(float), strict=True):
        # Below the least float, the distribution function is its first term.
        first_term = np.exp(np.minimum(a * logs - special.gammaln(a + 1), 0))
        whole = special.gammainc(a, np.exp(np.maximum(logs, -30)))
        uniform = np.where(logs < -30, first_term, whole)
        assert st.kstest(uniform, "uniform").pvalue > LEVEL


def test_what_stands_on_gammas():
    rates = np.float32([1e-3, 1.0, 50.0] * 2)
    shapes = np.float32([0.5, 2.0, 9.0, 30.0, 1e4, 1.0])
    gammas = [st.gamma(a, scale=1 / b) for a, b in zip(shapes, rates, strict=True)]
    check_continuous(draws(dist.Gamma, shapes, rates), gammas)
    check_continuous(draws(dist.Chi2, shapes), [st.chi2(a) for a in shapes])
    inverse = [st.invgamma(a, scale=b) for a, b in zip(shapes, rates, strict=True)]
    check_continuous(draws(dist.InverseGamma, shapes, rates), inverse)
    ts = [st.t(a, b, 2.0) for a, b in zip(shapes, rates, strict=True)]
    check_continuous(draws(lambda a, b: dist.StudentT(a, b, 2.0), shapes, rates), ts)


def test_beta():
    a = np.float32([0.05, 0.5, 1.0, 8.0, 300.0, 0.5, 1e4])
    b = np.float32([0.1, 0.5, 3.0, 40.0, 2.0, 1e3, 1e4])
    drawn = draws(dist.Beta, a, b)
    # Near 1 and 0, float32 holds a share in steps that a small shape makes likely.
    laws = [st.beta(x, y) for x, y in zip(a.astype(float), b.astype(float), strict=True)]
    check_continuous(drawn[1:], laws[1:])
    for q in (1e-6, 1e-3, 0.3, 0.9, 0.999):
        p = laws[0].cdf(q)
        assert abs((drawn[0] <= q).mean() - p) < 5 * np.sqrt(p * (1 - p) / COUNT)


def test_dirichlet():
    shapes = np.float32([[0.2, 1.0, 5.0], [9.0, 20.0, 0.7]])
    words = hash_labels("row", None, size=2), WORDS
    fn = dist.Dirichlet(jnp.asarray(shapes)[:, None]).expand((2, COUNT))
    drawn = np.asarray(sample(fn, seed_key(4), words))
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-5)
    for k in range(3):
        laws = [st.beta(a[k], a.sum() - a[k]) for a in shapes.astype(float)]
        check_continuous(drawn[..., k], laws)


RATES = np.float32([1e-6, 1e-3, 0.05, 0.7, 3.0, 7.99, 8.01, 30.0, 1e3, 1e7])


def test_poisson():
    check_counts(draws(dist.Poisson, RATES), [st.poisson(r) for r in RATES.astype(float)])


def test_negative_binomial():
    means = np.float32([1e-3, 0.5, 3.0, 20.0, 1e4, 100.0])
    sizes = np.float32([0.3, 0.05, 2.0, 9.0, 1.0, 1e4])
    laws = [
        st.nbinom(r, r / (r + m))
        for m, r in zip(means.astype(float), sizes.astype(float), strict=True)
    ]
    check_counts(draws(dist.NegativeBinomial2, means, sizes), laws)
    probs = means / (sizes + means)
    check_counts(draws(dist.NegativeBinomialProbs, sizes, probs), laws)


@pytest.mark.parametrize("tries", [1, 7, 45, 1000, 100_000])
def test_binomial(tries):
    p = np.float32([1e-6, 1e-3, 0.2, 0.5, 0.61, 0.97, 1.0])
    laws = [st.binom(tries, x) for x in p.astype(float)]
    check_counts(draws(lambda p: dist.Binomial(tries, p), p), laws)


def test_beta_binomial():
    a, b = np.float32([0.5, 2.0, 40.0]), np.float32([0.5, 9.0, 3.0])
    laws = [st.betabinom(60, x, y) for x, y in zip(a.astype(float), b.astype(float), strict=True)]
    check_counts(draws(lambda a, b: dist.BetaBinomial(a, b, 60), a, b), laws)


def test_multinomial_has_binomial_counts_and_their_covariance():
    probs = np.float32([[0.1, 0.2, 0.0, 0.7], [0.25, 0.25, 0.25, 0.25]])
    words = hash_labels("row", None, size=2), WORDS
    fn = dist.Multinomial(40, jnp.asarray(probs)[:, None]).expand((2, COUNT))
    drawn = np.asarray(sample(fn, seed_key(5), words))
    assert drawn.dtype == np.int32
    assert (drawn.sum(-1) == 40).all()
    assert (drawn[0, :, 2] == 0).all()
    for k in (0, 1, 3):
        check_counts(drawn[..., k], [st.binom(40, p[k]) for p in probs.astype(float)])
    for counts, p in zip(drawn.astype(float), probs.astype(float), strict=True):
        exact = 40 * (np.diag(p) - np.outer(p, p))
        assert np.abs(np.cov(counts.T) - exact).max() < 6 * 40 / np.sqrt(COUNT)


def test_zero_inflated_and_hurdle_counts():
    rates = np.float32([1e-6, 0.3, 5.0, 200.0])
    inflated = draws(lambda r: dist.ZeroInflatedPoisson(0.3, r), rates)
    hurdle = draws(lambda r: dist.HurdlePoisson(0.3, r), rates)
    for rate, some, others in zip(rates.astype(float), inflated, hurdle, strict=True):
        for values, p in ((some, 0.3 + 0.7 * np.exp(-rate)), (others, 0.3)):
            sd = np.sqrt(p * (1 - p) / COUNT)
            assert abs((values == 0).mean() - p) <= 5 * sd + 1 / COUNT
        nonzero = others[others > 0]
        # A uniform number, given its count: exact for a discrete law.
        law = st.poisson(rate)
        below, upto = ((law.cdf(nonzero - i) - law.pmf(0)) / -np.expm1(-rate) for i in (1, 0))
        spread = np.random.default_rng(0).random(nonzero.size)
        if rate > 1e-3:
            assert st.kstest(below + spread * (upto - below), "uniform").pvalue > LEVEL
        else:
            assert (nonzero == 1).all()


def test_hurdles_of_other_counts():
    means = np.float32([1e-5, 0.3, 5.0, 1e3])
    for size in (0.4, 9.0):
        drawn = draws(lambda m, r=size: dist.HurdleProbs(dist.NegativeBinomial2(m, r), 0.0), means)
        check_positive(drawn, [st.nbinom(size, size / (size + m)) for m in means.astype(float)])
    p = np.float32([1e-6, 0.02, 0.5, 0.99])
    drawn = draws(lambda p: dist.HurdleProbs(dist.Binomial(30, p), 0.0), p)
    check_positive(drawn, [st.binom(30, x) for x in p.astype(float)])


def check_positive(drawn, laws) -> None:
    """A uniform number between the distribution function below a count and up to it is uniform."""
    for values, law in zip(drawn, laws, strict=True):
        assert values.min() >= 1
        none, some = law.pmf(0), law.sf(0)
        below, upto = ((law.cdf(values - i) - none) / some for i in (1, 0))
        spread = np.random.default_rng(0).random(values.size)
        if some > 1e-3:
            assert st.kstest(below + spread * (upto - below), "uniform").pvalue > LEVEL
        else:  # its distribution function has no digits left
            expected = law.pmf(1) / some
            assert abs((values == 1).mean() - expected) < 5 * (1 / COUNT) ** 0.5


def test_a_hurdle_of_a_large_rate_is_a_count_whatever_the_number():
    words = jnp.asarray([[2**32 - 1, 2**32 - 1], [0, 0], [2**31, 0]], jnp.uint32)
    edges = quantiles.uniform_tails(words[:, 0], words[:, 1])
    for rate in (0.0, 1e-37, 1e-6, 0.7, 7.9, 30.0, 1e6):
        rates = jnp.full(3, rate)
        drawn = quantiles.poisson_quantile(quantiles.positive_tails(edges, -rates), rates)
        assert (np.asarray(drawn) >= 0).all()


def test_counts_of_very_many_tries_keep_their_number():
    n = np.array([2**24 + 3, 2**28 + 7, 2**31 - 1])
    sure = sample(dist.Binomial(n, jnp.ones(3)), seed_key(0), (WORDS[:3],))
    np.testing.assert_array_equal(sure, n)
    fn = dist.Multinomial(n, jnp.asarray([0.2, 0.5, 0.3]), total_count_max=9)
    counts = np.asarray(sample(fn, seed_key(0), (WORDS[:3],))).astype(int)
    np.testing.assert_array_equal(counts.sum(-1), n)
    assert (np.abs(counts - np.outer(n, [0.2, 0.5, 0.3])) < 40 * np.sqrt(n)[:, None]).all()


def test_law_14_holds_for_a_site_of_one_cell():
    for wrap in (lambda d: d, lambda d: dist.ZeroInflatedDistribution(d, gate=0.2)):
        lower, higher = (
            jax.vmap(lambda key, r=r: sample(wrap(dist.Poisson(r)), key, ()))(KEYS)  # noqa: B023
            for r in (9.9, 10.5)
        )
        assert lower.shape == (len(KEYS),)
        assert (np.asarray(lower) <= np.asarray(higher)).all()
        assert (np.asarray(lower) < np.asarray(higher)).any()


def test_a_count_that_is_never_more_than_zero_ends():
    base = dist.BetaBinomial(jnp.full(3, 1e-9), 1.0, 10)
    drawn = sample(dist.HurdleProbs(base, 0.0), seed_key(0), (WORDS[:3],))
    np.testing.assert_array_equal(drawn, [-1, -1, -1])


def test_von_mises():
    concentrations = np.float32([1e-3, 1e-2, 0.5, 2.0, 30.0, 1e4, 1e6])
    drawn = draws(lambda k: dist.VonMises(0.7, k), concentrations)
    centered = (drawn.astype(float) - 0.7 + np.pi) % (2 * np.pi) - np.pi
    check_continuous(centered, [st.vonmises(k) for k in concentrations.astype(float)])


def test_multivariate_student_t_has_student_t_margins():
    scale_tril = jnp.asarray([[1.0, 0.0], [0.5, 2.0]])
    fn = dist.MultivariateStudentT(5.0, jnp.asarray([1.0, -1.0]), scale_tril).expand((COUNT,))
    drawn = np.asarray(sample(fn, seed_key(6), (WORDS,)))
    for values, loc, scale in zip(drawn.T, (1.0, -1.0), (1.0, np.sqrt(4.25)), strict=True):
        assert st.kstest(values, st.t(5, loc, scale).cdf).pvalue > LEVEL


NAN, INF = np.nan, np.inf
OUT_OF_SUPPORT = {
    "Gamma": (lambda x: dist.Gamma(x, 1.0), [-1.0, 0.0, NAN, INF, 1e-3, 1e30]),
    "Gamma of a rate": (lambda x: dist.Gamma(2.0, x), [0.0, NAN, INF]),
    "Chi2": (dist.Chi2, [-9.0, 0.0, NAN, INF]),
    "InverseGamma": (lambda x: dist.InverseGamma(x, 1.0), [-1.0, 0.0, NAN, INF]),
    "Beta": (lambda x: dist.Beta(x, 1.0), [-1.0, 0.0, NAN, INF]),
    "Beta, second": (lambda x: dist.Beta(1.0, x), [-1.0, 0.0, NAN, INF]),
    "Beta, both": (lambda x: dist.Beta(x, x), [-1.0, 0.0, NAN, INF]),
    "StudentT": (lambda x: dist.StudentT(x, 0.0, 1.0), [-1.0, 0.0, NAN, INF]),
    "Dirichlet": (
        lambda x: dist.Dirichlet(jnp.stack([jnp.ones_like(x), x], -1)), [-1.0, 0.0, NAN, INF],
    ),
    "Poisson": (dist.Poisson, [-1.0, NAN, 0.0, -0.0, INF, 1e12]),
    "GammaPoisson": (lambda x: dist.GammaPoisson(x, 1.0), [-1.0, 0.0, NAN]),
    "NegativeBinomial2": (lambda x: dist.NegativeBinomial2(x, 2.0), [-1.0, 0.0, NAN]),
    "Binomial": (lambda x: dist.Binomial(10, x), [-1.0, 0.0, NAN, INF, 1.0, 2.0]),
    "Multinomial": (
        lambda x: dist.Multinomial(5, jnp.stack([x, jnp.zeros_like(x)], -1)), [0.0, 1.0, 2.0, NAN],
    ),
    "VonMises": (lambda x: dist.VonMises(0.0, x), [-1.0, 0.0, NAN, INF]),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_SUPPORT)
def test_parameters_out_of_support_give_what_numpyro_gives(name):
    make, values = OUT_OF_SUPPORT[name]
    with dist.distribution.validation_enabled(False):
        fn = make(jnp.asarray(values, jnp.float32))
        theirs = np.asarray(fn.sample(jax.random.key(0)))
        ours = np.asarray(sample(fn, seed_key(0), (WORDS[: len(values)],)))
    special_value = ~np.isfinite(theirs) | np.isin(
        theirs, (-1, 0, 1, 5, 10, 2**31 - 1, np.float32(-np.pi))
    )
    np.testing.assert_allclose(ours[special_value], theirs[special_value], rtol=1e-6)
    assert np.isfinite(ours[~special_value]).all()


def test_a_large_rate_is_an_integer_near_it():
    drawn = sample(dist.Poisson(jnp.full(100, 1e9)), seed_key(0), (WORDS[:100],))
    assert np.abs(np.asarray(drawn) - 1e9).max() < 6 * np.sqrt(1e9)
