"""A loss estimated from a draw of a normal guide and its reflection in the guide's mean.

The gradient of a guide's log scale is the slope of the model's log density at the draw, times
the draw's distance from the mean. On a batch that slope is mostly noise of the batch, and the
distance gives it a random sign. Both draws of a pair ``loc + e`` and ``loc - e`` see the same
batch, so the noise that they share cancels; in the means' gradient, that of the draws. The
guide's log density is differentiated along its draw alone: its derivative by the parameters has
mean zero, and without it the gradient of a guide that equals the posterior has no noise at all.

References
----------
Roeder, Wu and Duvenaud (2017), Sticking the landing: simple, lower-variance gradient estimators
for variational inference, NeurIPS 30.
Wu, Goodman and Ermon (2019), Differentiable antithetic sampling for variance reduction in
stochastic variational inference, AISTATS 22.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.primitives import Messenger

from xr_aimz.infer.repeatable import Ordered, ordered

__all__ = ["is_normal", "reflected"]

# As their own classes draw: of a subclass nothing is known.
_GUIDES = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
)
_NORMAL = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)


def is_normal(guide: Any) -> bool:
    """Whether a guide, or the class of one, is normal on the unconstrained space."""
    return guide in _GUIDES or type(guide) in _GUIDES


def reflected(loss: Any, guide: Any) -> Any:
    """The loss for batches: by reflected pairs for a normal guide and a plain ``Trace_ELBO``.

    The expected loss is the same. A loss of another class or with settings of its own, and any
    other guide, stay as they are but for the order of terms.
    """
    loss = ordered(loss)
    plain = type(loss) is Ordered and loss.num_particles == 1 and not loss.multi_sample_guide
    return _Reflected(sum_sites=False) if plain and is_normal(guide) else loss


class _Reflected(Ordered):
    def loss_with_mutable_state(
        self, rng_key: Any, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        estimate, rest = super().loss_with_mutable_state, _site_key(rng_key, -1)

        def one(sign: Any) -> Any:
            mirrored = _reflect(guide, rng_key, sign)
            return estimate(rest, param_map, model, mirrored, *args, **kwargs)

        # Mapped, so that each operation of the model runs once on two draws: at the size of
        # a batch it costs its call, not its arithmetic.
        pair = jax.vmap(one)(jnp.array([1.0, -1.0]))
        # Running means of a network are those of one draw.
        state = jax.tree.map(lambda both: both[0], pair["mutable_state"])
        return {"loss": pair["loss"].mean(), "mutable_state": state}


def _reflect(guide: Callable, key: Any, sign: Any) -> Callable:
    """The guide with its normal sites drawn by ``key``, and reflected if ``sign`` is -1."""

    def mirrored(*args: Any, **kwargs: Any) -> Any:
        with _Reflection(key, sign):
            return guide(*args, **kwargs)

    return mirrored


class _Reflection(Messenger):  # type: ignore[misc] # NumPyro is untyped
    def __init__(self, key: Any, sign: Any) -> None:
        self._key, self._sign, self._sites = key, sign, 0
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["value"] is not None or not _is_normal(msg["fn"]):
            return
        key = _site_key(self._key, self._sites)
        self._sites += 1
        msg["value"], msg["intermediates"], msg["fn"] = _reflect_site(msg["fn"], key, self._sign)


def _site_key(key: Any, number: int) -> Any:
    """The key of a guide's site; -1 for what else is drawn.

    The first has the step's own, as a split takes as long as the draws. The others are words
    from the far end of its counter, where no draw comes.
    """
    return key if number == 0 else jax.random.fold_in(key, jnp.uint32((-2 - number) % 2**32))


def _is_normal(fn: Any) -> bool:
    while isinstance(fn, (dist.TransformedDistribution, dist.Independent)):
        fn = fn.base_dist
    return isinstance(fn, _NORMAL)


def _reflect_site(fn: Any, key: Any, sign: Any) -> tuple[Any, list[Any], Any]:
    """A draw or its reflection, the intermediate values of its transforms, and its density."""
    if isinstance(fn, dist.Independent):
        value, between, density = _reflect_site(fn.base_dist, key, sign)
        return value, between, density.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.TransformedDistribution):
        value, between, density = _reflect_site(fn.base_dist, key, sign)
        for transform in fn.transforms:
            before = value
            value, other = transform.call_with_intermediates(before)
            between = [*between, [before, other]]
        return value, between, dist.TransformedDistribution(density, fn.transforms)
    away = fn.sample(key) - fn.mean
    # Both draws have it, and by the mean its derivatives cancel: it needs no sign, and so is
    # computed once.
    fixed = jax.tree.map(jax.lax.stop_gradient, fn)
    density = _Density(fn, fixed.log_prob(fixed.mean + away))
    return fn.mean + sign * away, [], density


class _Density(dist.Distribution):  # type: ignore[misc] # NumPyro is untyped
    """A distribution of which only the log density of the one draw is left."""

    def __init__(self, fn: Any, log_density: Any) -> None:
        self._log_density = log_density
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return self._log_density
