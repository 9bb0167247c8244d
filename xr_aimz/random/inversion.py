"""Draw all cells of a distribution at once, as quantiles of uniform numbers addressed by label.

Where JAX and NumPyro draw by rejection, cell after cell, a draw is here the quantile of one
number, or a function of a few. Loops are bounded: a gamma takes at most 8 steps, a von Mises 100
attempts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax

from xr_aimz.random.cells import Cells
from xr_aimz.random.coefficients import LEAST_SHAPE
from xr_aimz.random.keys import combine_axes, fold_in, part_key, threefry
from xr_aimz.random.quantiles import (
    TailMass,
    binomial_quantile,
    log_gamma_ratio,
    normal_quantile,
    poisson_quantile,
    positive_tails,
    uniform_number,
    uniform_tails,
)

_MOST_ATTEMPTS = 100  # of NumPyro's von Mises too; two in three succeed


def draw_words(key: Array, cells: Cells, number: Any = 0) -> tuple[Array, Array]:
    """Draw two uint32 words in each cell; ``number`` tells several draws of a cell apart."""
    number = jnp.asarray(number, jnp.uint32)
    key = fold_in(key, jnp.stack([number, number]))
    counters = jnp.asarray(combine_axes(cells.axes))
    high, low = threefry((key[0], key[1]), (counters[..., 0], counters[..., 1]))
    # Without the barrier, XLA would fuse the cipher into every use of its words.
    return lax.optimization_barrier((high, low))


def draw_tails(key: Array, cells: Cells) -> TailMass:
    """Draw a uniform number in each cell."""
    return uniform_tails(*draw_words(key, cells))


class GammaDraw(NamedTuple):
    """Gamma numbers of rate 1, each ``scale * exp(log_ratio)``.

    The logarithm of a number with a small shape is far below that of the least float, and that of
    one with a large shape has no digits left for the noise.
    """

    scale: Array
    log_ratio: Array

    @property
    def value(self) -> Array:
        """Return the numbers."""
        return self.scale * jnp.exp(self.log_ratio)


def draw_gamma(key: Array, cells: Cells, shape: Any) -> GammaDraw:
    """Draw a gamma number of rate 1 in each cell.

    A small shape ``a`` is raised to 8 or more: the gamma of ``a`` is that of ``a + 1`` times the
    power ``1 / a`` of a uniform number.
    """
    shape = _in_each(cells, shape)
    steps = jnp.clip(jnp.ceil(LEAST_SHAPE - shape), 0.0, LEAST_SHAPE)
    ratio = log_gamma_ratio(draw_tails(key, cells), shape + steps)

    def lower(state: tuple[Array, Array]) -> tuple[Array, Array]:
        step, ratio = state
        log_uniform = jnp.log(uniform_number(*draw_words(key, cells, step + 1)))
        return step + 1, jnp.where(step < steps, ratio + log_uniform / (shape + step), ratio)

    start = (jnp.zeros((), ratio.dtype), ratio)
    ratio = lax.while_loop(lambda state: jnp.any(state[0] < steps), lower, start)[1]
    return GammaDraw(shape + steps, jnp.where(shape >= 0, ratio, jnp.nan))


def _in_each(cells: Cells, parameter: Any) -> Array:
    """Return the parameter of each cell, as floats."""
    dtype = jnp.result_type(float)
    return jnp.broadcast_to(jnp.asarray(parameter, dtype), cells.shape)


def _sample_gamma(fn: dist.Gamma, key: Array, cells: Cells) -> Array:
    return draw_gamma(key, cells, fn.concentration).value / fn.rate


def _student_factor(df: Any, key: Array, cells: Cells) -> Array:
    """Draw the root of the degrees of freedom over their chi-square."""
    half = _in_each(cells, df) / 2
    gamma = draw_gamma(part_key(key, "gamma"), cells, half)
    return jnp.sqrt(half / gamma.scale) * jnp.exp(-0.5 * gamma.log_ratio)


def _sample_student_t(fn: dist.StudentT, key: Array, cells: Cells) -> Array:
    normal = normal_quantile(draw_tails(part_key(key, "normal"), cells))
    return fn.loc + fn.scale * normal * _student_factor(fn.df, key, cells)


def _sample_multivariate_student_t(
    fn: dist.MultivariateStudentT, key: Array, cells: Cells
) -> Array:
    inner = cells.within(tuple(fn.event_shape))
    normal = normal_quantile(draw_tails(part_key(key, "normal"), inner))
    scaled = normal * _student_factor(fn.df, key, cells)[..., None]
    return fn.loc + jnp.squeeze(jnp.matmul(fn.scale_tril, scaled[..., None]), -1)


def _sample_beta(fn: dist.Beta, key: Array, cells: Cells) -> Array:
    first = draw_gamma(part_key(key, "first"), cells, fn.concentration1)
    second = draw_gamma(part_key(key, "second"), cells, fn.concentration0)
    odds = second.scale / first.scale * jnp.exp(second.log_ratio - first.log_ratio)
    return _as_share(1.0, 1.0 + odds, jnp.maximum(first.scale, second.scale))


def _sample_dirichlet(fn: dist.Dirichlet, key: Array, cells: Cells) -> Array:
    gamma = draw_gamma(key, cells.within(tuple(fn.event_shape)), fn.concentration)
    largest = jnp.max(gamma.log_ratio, -1, keepdims=True)
    parts = gamma.scale * jnp.exp(gamma.log_ratio - largest)
    most = jnp.max(gamma.scale, -1, keepdims=True)
    return _as_share(parts, jnp.sum(parts, -1, keepdims=True), most)


def _as_share(part: Any, total: Array, largest_shape: Array) -> Array:
    """Return a part of a total, off 0 and 1 as NumPyro does, so that its density is finite."""
    info = jnp.finfo(total.dtype)
    share = jnp.clip(part / total, info.tiny, 1 - info.eps)
    return jnp.where(largest_shape == jnp.inf, jnp.nan, share)


def _sample_poisson(fn: dist.Poisson, key: Array, cells: Cells) -> Array:
    return poisson_quantile(draw_tails(key, cells), _in_each(cells, fn.rate))


def _sample_positive_poisson(fn: dist.Poisson, key: Array, cells: Cells) -> Array:
    return _draw_positive_poisson(key, cells, _in_each(cells, fn.rate))


def _draw_positive_poisson(key: Array, cells: Cells, rate: Array) -> Array:
    return _at_least_one(poisson_quantile(positive_tails(draw_tails(key, cells), -rate), rate))


def _sample_positive_binomial(fn: Any, key: Array, cells: Cells) -> Array:
    tries, p = jnp.broadcast_to(fn.total_count, cells.shape), _in_each(cells, fn.probs)
    log_none = tries * jnp.log1p(-jnp.clip(p, 0.0, 1.0))
    tails = positive_tails(draw_tails(key, cells), log_none)
    return _at_least_one(binomial_quantile(tails, tries, p))


def _sample_positive_gamma_poisson(fn: dist.GammaPoisson, key: Array, cells: Cells) -> Array:
    """Draw the first event of a Poisson process on [0, 1], and count those after it."""
    shape, rate = _in_each(cells, fn.concentration), _in_each(cells, fn.rate)
    number = uniform_number(*draw_words(part_key(key, "first"), cells))
    positive = -jnp.expm1(-shape * jnp.log1p(1.0 / rate))
    first = jnp.minimum(rate * jnp.expm1(-jnp.log1p(-number * positive) / shape), 1.0)
    later = draw_gamma(part_key(key, "rate"), cells, shape + 1.0).value / (rate + first)
    count = poisson_quantile(draw_tails(part_key(key, "count"), cells), later * (1.0 - first))
    return jnp.where(count >= 0, count + 1, count)


def _at_least_one(count: Array) -> Array:
    # The mass of all counts from 1 on may round to more than the sum of their masses.
    return jnp.where(count == 0, 1, count)


def _sample_gamma_poisson(fn: dist.GammaPoisson, key: Array, cells: Cells) -> Array:
    return _draw_gamma_poisson(key, cells, fn.concentration, fn.rate)


def _draw_gamma_poisson(key: Array, cells: Cells, concentration: Any, rate: Any) -> Array:
    gamma = draw_gamma(part_key(key, "rate"), cells, concentration).value / rate
    return poisson_quantile(draw_tails(part_key(key, "count"), cells), _in_each(cells, gamma))


def _sample_beta_negative_binomial(
    fn: dist.BetaNegativeBinomial, key: Array, cells: Cells
) -> Array:
    p = _sample_beta(fn._beta, part_key(key, "probs"), cells)
    return _draw_gamma_poisson(key, cells, fn.n, 1.0 / p - 1.0)


def _sample_binomial(fn: Any, key: Array, cells: Cells) -> Array:
    return _draw_binomial(key, cells, fn.total_count, fn.probs)


def _draw_binomial(key: Array, cells: Cells, tries: Any, probability: Any) -> Array:
    tries = jnp.broadcast_to(jnp.asarray(tries), cells.shape)
    return binomial_quantile(draw_tails(key, cells), tries, _in_each(cells, probability))


def _sample_beta_binomial(fn: dist.BetaBinomial, key: Array, cells: Cells) -> Array:
    p = _sample_beta(fn._beta, part_key(key, "probs"), cells)
    return _draw_binomial(key, cells, fn.total_count, p)


def _sample_multinomial(fn: Any, key: Array, cells: Cells) -> Array:
    return _draw_multinomial(key, cells, fn.total_count, fn.probs)


def _sample_dirichlet_multinomial(
    fn: dist.DirichletMultinomial, key: Array, cells: Cells
) -> Array:
    p = _sample_dirichlet(fn._dirichlet, part_key(key, "probs"), cells)
    return _draw_multinomial(key, cells, fn.total_count, p)


def _draw_multinomial(key: Array, cells: Cells, tries: Any, probs: Array) -> Array:
    """Draw the count of each category, given those before it: a binomial of the tries left."""
    probs = jnp.moveaxis(jnp.broadcast_to(probs, cells.shape + jnp.shape(probs)[-1:]), -1, 0)
    left_mass = jnp.cumsum(probs[::-1], 0)[::-1]
    shares = jnp.where(left_mass > 0, probs / left_mass, 1.0).at[-1].set(1.0)
    keys = fold_in(key, Cells(()).within((len(probs),)).axes[0])

    def draw(left: Array, category: tuple[Array, Array]) -> tuple[Array, Array]:
        count = _draw_binomial(category[0], cells, left, category[1])
        return left - count, count

    left = jnp.broadcast_to(jnp.asarray(tries, jnp.result_type(int)), cells.shape)
    return jnp.moveaxis(lax.scan(draw, left, (keys, shares))[1], 0, -1)


def _sample_von_mises(fn: dist.VonMises, key: Array, cells: Cells) -> Array:
    """Draw by rejection from a wrapped Cauchy (Best and Fisher 1979, Applied Statistics 28)."""
    concentration = _in_each(cells, fn.concentration)
    root = 1.0 + jnp.sqrt(1.0 + 4.0 * concentration**2)
    # As NumPyro: of a small concentration, the difference has no digits left in float32.
    is_small = concentration < (2e-2 if root.dtype == jnp.float32 else 1.2e-4)
    difference = (root - jnp.sqrt(2.0 * root)) / (2.0 * concentration)
    rho = jnp.where(is_small, concentration / 2.0, difference)
    # By half angles: the cosine of a small angle has no digits left either.
    factor, excess = (1.0 - rho) / (1.0 + rho), (1.0 - rho) ** 2 / (2.0 * rho)

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, is_done, angle = state
        u, v = (word.astype(rho.dtype) * 2.0**-32 for word in draw_words(key, cells, number))
        half = jnp.arctan(factor * jnp.tan(jnp.pi * (u - 0.5)))
        y = concentration * (excess + 2.0 * jnp.sin(half) ** 2)
        is_accepted = (y * (2.0 - y) >= v) | (jnp.log(y / v) + 1.0 >= y)
        return number + 1, is_done | is_accepted, jnp.where(is_done, angle, 2.0 * half)

    def is_unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[0] < _MOST_ATTEMPTS) & ~jnp.all(state[1])

    is_in_support = (concentration > 0) & (concentration < jnp.inf)
    no_angle = jnp.where(concentration < 0, jnp.pi, jnp.nan)
    start = (jnp.uint32(0), ~is_in_support, no_angle)
    angle = lax.while_loop(is_unfinished, attempt, start)[2] + fn.loc
    return (angle + jnp.pi) % (2.0 * jnp.pi) - jnp.pi


# By sampler, as in ``distributions``.
INVERSION_RULES = {
    dist.Gamma.sample: _sample_gamma,
    dist.StudentT.sample: _sample_student_t,
    dist.MultivariateStudentT.sample: _sample_multivariate_student_t,
    dist.Beta.sample: _sample_beta,
    dist.Dirichlet.sample: _sample_dirichlet,
    dist.Poisson.sample: _sample_poisson,
    dist.GammaPoisson.sample: _sample_gamma_poisson,
    dist.BetaNegativeBinomial.sample: _sample_beta_negative_binomial,
    dist.BinomialProbs.sample: _sample_binomial,
    dist.BinomialLogits.sample: _sample_binomial,
    dist.BetaBinomial.sample: _sample_beta_binomial,
    dist.MultinomialProbs.sample: _sample_multinomial,
    dist.MultinomialLogits.sample: _sample_multinomial,
    dist.DirichletMultinomial.sample: _sample_dirichlet_multinomial,
    dist.VonMises.sample: _sample_von_mises,
}

# The same distributions without 0, for hurdles.
POSITIVE_RULES = {
    dist.Poisson.sample: _sample_positive_poisson,
    dist.BinomialProbs.sample: _sample_positive_binomial,
    dist.BinomialLogits.sample: _sample_positive_binomial,
    dist.GammaPoisson.sample: _sample_positive_gamma_poisson,
}
