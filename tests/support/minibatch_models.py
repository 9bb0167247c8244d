"""Models of the fits in batches, with exact posteriors."""

from __future__ import annotations

import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr

import xr_aimz
from xr_aimz.errors import ConvergenceWarning


def regression(X, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 10).expand([X.shape[-1]]).to_event(1))
    numpyro.deterministic("double", 2 * weights)
    with numpyro.plate("data", X.shape[0]):
        numpyro.sample("y", dist.Normal(X @ weights, 1.0), obs=y)


def effects(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    level = numpyro.sample("level", dist.Normal(0, 10))
    with xr_aimz.plate("group"):
        effect = numpyro.sample("effect", dist.Normal(level, SPREAD))
    with xr_aimz.plate("group"), xr_aimz.plate("rep"):
        numpyro.sample("y", dist.Normal(effect + slope * x, NOISE), obs=y)


def quiet(ds, model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ds.aimz.fit(model, method=options.pop("method", "svi"), progress=False, **options)


def best_factorized(groups):
    """The factorized Gaussian that is nearest: the posterior's mean, and sds given the rest."""
    count, reps = groups.y.shape
    x = groups.x.values
    precision = np.zeros((count + 2, count + 2))
    # slope, level, effects
    precision[0, 0] = 1 + (x**2).sum() / NOISE**2
    precision[1, 1] = 1 / 100 + count / SPREAD**2
    precision[1, 2:] = precision[2:, 1] = -1 / SPREAD**2
    precision[0, 2:] = precision[2:, 0] = x.sum(1) / NOISE**2
    precision[2:, 2:] = np.eye(count) * (1 / SPREAD**2 + reps / NOISE**2)
    y = groups.y.values
    right = np.concatenate([[(x * y).sum(), 0.0], y.sum(1)]) / NOISE**2
    mean, sd = np.linalg.solve(precision, right), np.diag(precision) ** -0.5

    def named(values):
        return xr.Dataset(
            {"slope": values[0], "level": values[1], "effect": ("group", values[2:])},
            {"group": groups.group},
        )

    return named(mean), named(sd)


NOISE, SPREAD = 0.5, 1.0
