"""Average a loss over a draw of the guide and its reflection, an antithetic pair.

The terms of a loss are added in the order of their names, so that optimizations repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.infer import Trace_ELBO
from numpyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.primitives import Messenger


def order_leaves(loss: Any) -> Any:
    """Replace ``Trace_ELBO`` by one with its terms added in order; return other losses as is."""
    if type(loss) is not Trace_ELBO or not loss.sum_sites:
        return loss
    return OrderedOptimizer(
        num_particles=loss.num_particles,
        vectorize_particles=loss.vectorize_particles,
        multi_sample_guide=loss.multi_sample_guide,
        sum_sites=False,
    )


class OrderedOptimizer(Trace_ELBO):  # type: ignore[misc] # NumPyro is untyped
    """Loss ``Trace_ELBO`` with its terms added in the order of their names."""

    def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> Any:
        result = super().loss_with_mutable_state(*args, **kwargs)
        terms = result["loss"]
        return {**result, "loss": sum(terms[name] for name in sorted(terms))}


# Exactly these classes: a subclass may draw in another way.
_NORMAL_GUIDES = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
)
_NORMAL_DISTRIBUTIONS = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)


def is_normal(guide: Any) -> bool:
    """Return whether a guide, or a class of guides, is normal on the unconstrained space."""
    return guide in _NORMAL_GUIDES or type(guide) in _NORMAL_GUIDES


def reflect_loss(loss: Any, guide: Any) -> Any:
    """Return the loss for batches: by reflected pairs for normal guides and plain ``Trace_ELBO``.

    The expected loss is the same. For a loss of another class or with other settings, and for
    any other guide, only the order of terms changes.
    """
    loss = order_leaves(loss)
    is_plain = (
        type(loss) is OrderedOptimizer and loss.num_particles == 1 and not loss.multi_sample_guide
    )
    return _Reflected(sum_sites=False) if is_plain and is_normal(guide) else loss


class _Reflected(OrderedOptimizer):
    def loss_with_mutable_state(
        self, rng_key: Any, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        estimate, model_key = super().loss_with_mutable_state, _derive_site_key(rng_key, -1)

        def estimate_signed(sign: Any) -> Any:
            reflected = _reflect(guide, rng_key, sign)
            return estimate(model_key, param_map, model, reflected, *args, **kwargs)

        # Mapped, so that each operation of the model runs once on two draws: at the size of
        # a batch the cost is that of the call, not of the arithmetic.
        pair = jax.vmap(estimate_signed)(jnp.array([1.0, -1.0]))
        # Mutable state, such as the running means of a network, is taken from the first draw.
        state = jax.tree.map(lambda values: values[0], pair["mutable_state"])
        return {"loss": pair["loss"].mean(), "mutable_state": state}


def _reflect(guide: Callable, key: Any, sign: Any) -> Callable:
    """Wrap the guide to draw its normal sites by ``key``, and reflect them if ``sign`` is -1."""

    def reflected(*args: Any, **kwargs: Any) -> Any:
        with _Reflection(key, sign):
            return guide(*args, **kwargs)

    return reflected


class _Reflection(Messenger):  # type: ignore[misc] # NumPyro is untyped
    def __init__(self, key: Any, sign: Any) -> None:
        self._key, self._sign, self._sites = key, sign, 0
        super().__init__(None)

    def process_message(self, msg: dict[str, Any]) -> None:
        if (
            msg["type"] != "sample"
            or msg["value"] is not None
            or not _is_normal_distribution(msg["fn"])
        ):
            return
        key = _derive_site_key(self._key, self._sites)
        self._sites += 1
        msg["value"], msg["intermediates"], msg["fn"] = _reflect_site(msg["fn"], key, self._sign)


def _derive_site_key(key: Any, number: int) -> Any:
    """Return the key of a guide's site by number; -1 for all other draws.

    The first site has the key of the step, since a split takes as long as the draws. The other
    keys are words from the far end of its counter, which no draw reaches.
    """
    return key if number == 0 else jax.random.fold_in(key, jnp.uint32((-2 - number) % 2**32))


def _is_normal_distribution(fn: Any) -> bool:
    while isinstance(fn, (dist.TransformedDistribution, dist.Independent)):
        fn = fn.base_dist
    return isinstance(fn, _NORMAL_DISTRIBUTIONS)


def _reflect_site(fn: Any, key: Any, sign: Any) -> tuple[Any, list[Any], Any]:
    """Draw a site or its reflection: the value, intermediates of its transforms, its density."""
    if isinstance(fn, dist.Independent):
        value, intermediates, density = _reflect_site(fn.base_dist, key, sign)
        return value, intermediates, density.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.TransformedDistribution):
        value, intermediates, density = _reflect_site(fn.base_dist, key, sign)
        for transform in fn.transforms:
            before = value
            value, intermediate = transform.call_with_intermediates(before)
            intermediates = [*intermediates, [before, intermediate]]
        return value, intermediates, dist.TransformedDistribution(density, fn.transforms)
    deviation = fn.sample(key) - fn.mean
    # A draw and its reflection have the same density, and its derivatives by the mean cancel: it
    # does not depend on the sign, and so is computed once.
    fixed = jax.tree.map(jax.lax.stop_gradient, fn)
    density = _Density(fn, fixed.log_prob(fixed.mean + deviation))
    return fn.mean + sign * deviation, [], density


class _Density(dist.Distribution):  # type: ignore[misc] # NumPyro is untyped
    """Distribution that holds only the log density of one draw."""

    def __init__(self, fn: Any, log_density: Any) -> None:
        self._log_density = log_density
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return self._log_density
