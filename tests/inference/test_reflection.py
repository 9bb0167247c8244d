"""Reflected pairs: the same gradient in expectation, without the noise that both draws share."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from xr_aimz.inference.reflection import OrderedOptimizer, is_normal, reflect_loss

GUIDES = (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal)
KEYS = 8000
rng = np.random.default_rng(0)
X = rng.normal(size=(40, 3)).astype(np.float32)
X[:, 2] += X[:, 1]
Y = (X @ [1.0, -0.5, 0.3] + rng.normal(size=40)).astype(np.float32)
HITS = (rng.random(40) < 1 / (1 + np.exp(-Y))).astype(np.int32)
PRECISION = X.T @ X + np.eye(3)
MEAN = np.linalg.solve(PRECISION, X.T @ Y)


def gaussian(X, y):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(X @ weights, 1), obs=y)


def skewed(X, y):
    """Several sites, of which one is positive, one a simplex, and one behind a plate."""
    scale = numpyro.sample("scale", dist.HalfNormal(1))
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("feature", 3):
        weights = numpyro.sample("weights", dist.Normal(0, scale))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=X @ (weights * shares)), obs=y)


def started(model, guide, *data):
    """The guide, its params on the unconstrained space, and a loss by key and params."""
    autoguide = guide(model)
    svi = SVI(model, autoguide, numpyro.optim.SGD(0.0), Trace_ELBO())
    state = svi.init(jax.random.key(1), *data)

    def loss(by):
        def of(key, params, *data):
            return by.loss(key, svi.constrain_fn(params), model, autoguide, *data)

        return of

    return autoguide, svi.optim.get_params(state.optim_state), loss


def gradients(loss, params, data, keys=KEYS):
    """Losses and flat gradients ``(key, param)``."""
    by_key = jax.jit(jax.vmap(jax.value_and_grad(loss, 1), (0, None, *(None for _ in data))))
    values, found = by_key(jax.random.split(jax.random.key(2), keys), params, *data)
    flat = [np.asarray(a).reshape(keys, -1) for a in jax.tree.leaves(found)]
    return np.asarray(values), np.concatenate(flat, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_loss_and_gradient_are_unbiased(guide):
    autoguide, params, loss = started(skewed, guide, X, HITS)
    plain = gradients(loss(Trace_ELBO()), params, (X, HITS))
    paired = gradients(loss(reflect_loss(Trace_ELBO(), autoguide)), params, (X, HITS))
    for one, two in zip(plain, paired, strict=True):
        error = np.sqrt((one.var(0) + two.var(0)) / len(one))
        # Some thirty figures: 4.5 standard errors are one chance in 5000.
        assert (np.abs(one.mean(0) - two.mean(0)) <= 4.5 * error + 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_the_gradient_of_a_mean_under_a_gaussian_has_no_noise(guide):
    autoguide, params, loss = started(gaussian, guide, X, Y)
    name = "weights_auto_loc" if guide is AutoNormal else "auto_loc"

    def of_mean(loc, key):
        return loss(reflect_loss(Trace_ELBO(), autoguide))(key, {**params, name: loc}, X, Y)

    keys = jax.random.split(jax.random.key(3), 50)
    found = jax.jit(jax.vmap(jax.grad(of_mean), (None, 0)))(params[name], keys)
    expected = np.broadcast_to(PRECISION @ (np.asarray(params[name]) - MEAN), found.shape)
    # Sums of 40 32-bit terms of either sign.
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoNormal])
def test_a_guide_that_is_the_posterior_has_a_gradient_of_zero(guide):
    """The density of the guide is differentiated along its draw alone."""
    design = X if guide is AutoMultivariateNormal else np.linalg.qr(X)[0] * 5
    precision = design.T @ design + np.eye(3)
    autoguide, params, _ = started(gaussian, guide, design, Y)
    mean = np.linalg.solve(precision, design.T @ Y).astype(np.float32)
    if guide is AutoNormal:
        sd = np.diag(precision) ** -0.5
        values = {"weights_auto_loc": mean, "weights_auto_scale": sd.astype(np.float32)}
    else:
        root = np.linalg.cholesky(np.linalg.inv(precision)).astype(np.float32)
        values = {"auto_loc": mean, "auto_scale_tril": root}
    assert set(values) == set(params)
    by = reflect_loss(Trace_ELBO(), autoguide)

    def of(values, key):
        return by.loss(key, values, gaussian, autoguide, design, Y)

    keys = jax.random.split(jax.random.key(4), 50)
    found = jax.jit(jax.vmap(jax.grad(of), (None, 0)))(values, keys)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_allclose(leaf, 0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_the_noise_of_a_batch_cancels_in_the_scales(guide):
    """What a pair is for: the slope of a batch is noise, to which a draw gives a random sign."""
    autoguide, params, loss = started(gaussian, guide, X, Y)
    name = {AutoNormal: "weights_auto_scale", AutoMultivariateNormal: "auto_scale_tril"}
    key = name.get(guide, "auto_scale")

    def spread(by, y):
        def of_scale(scale, number):
            return loss(by)(number, {**params, key: scale}, X, y)

        keys = jax.random.split(jax.random.key(5), 1000)
        return np.asarray(jax.jit(jax.vmap(jax.grad(of_scale), (None, 0)))(params[key], keys)).std(
            0
        )

    # By chance the outcomes of a batch are such that its slope is large.
    shifted = Y + 30 * X[:, 0]
    paired = reflect_loss(Trace_ELBO(), autoguide)
    np.testing.assert_allclose(spread(paired, shifted), spread(paired, Y), rtol=1e-2)
    assert (spread(Trace_ELBO(), shifted) > 5 * spread(paired, shifted)).all()


def test_what_is_not_known_to_be_normal_stays_as_it_is():
    class Own(AutoNormal):
        pass

    plain = Trace_ELBO()
    for guide in (AutoDelta, AutoBNAFNormal, AutoLaplaceApproximation, Own):
        assert not is_normal(guide)
        assert not is_normal(guide(gaussian))
        assert type(reflect_loss(plain, guide(gaussian))) is OrderedOptimizer
    for loss in (TraceMeanField_ELBO(), type("Own", (Trace_ELBO,), {})()):
        assert reflect_loss(loss, AutoNormal(gaussian)) is loss
    several = reflect_loss(Trace_ELBO(num_particles=3), AutoNormal(gaussian))
    assert type(several) is OrderedOptimizer
    assert several.num_particles == 3
    assert is_normal(AutoNormal)
    assert isinstance(reflect_loss(plain, AutoNormal(gaussian)), OrderedOptimizer)
