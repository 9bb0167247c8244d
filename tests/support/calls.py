"""Every public call once, on data of its own: what each returns must not depend on the others.

Run as a program it makes the calls that it is told, in that order, and prints a digest of each
result.
"""

import hashlib
import sys
import tempfile
import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.contrib.control_flow import scan

import xr_aimz

RNG = np.random.default_rng(0)
YEARS = np.arange(1990, 2010)
DS = xr.Dataset(
    {
        "x": ("year", np.where(YEARS > 1991, np.nan, RNG.normal(size=20))),
        "flow": ("year", RNG.normal(size=20)),
        "level": (("year", "cell"), RNG.normal(size=(20, 2))),
    },
    {"year": YEARS, "cell": [10, 20]},
)
WHOLE = DS.fillna(0.0)


def walk(x, flow=None):
    """A scan that goes over an input with missing values, of which its outcome is not made."""
    b = numpyro.sample("b", dist.Normal(0, 1))

    def step(level, now):
        push, seen = now
        numpyro.sample("flow", dist.Normal(b, 1.0), obs=seen)
        return level, b * push

    numpyro.deterministic("push", scan(step, 0.0, (x, flow), length=x.shape[0])[1])


def line(x, flow=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    numpyro.deterministic("twice", 2 * b)
    numpyro.sample("flow", dist.Normal(b * x, 1.0), obs=flow)


def constant(level=None):
    numpyro.sample("level", dist.Normal(numpyro.sample("m", dist.Normal(0, 1)), 1.0), obs=level)


def of_draws(ds=WHOLE, model=line):
    return ds.aimz.from_posterior(model, {"b": np.linspace(0, 1, 8).reshape(2, 4)})


def stored(result):
    with tempfile.TemporaryDirectory() as folder:
        return result.aimz.to_zarr(f"{folder}/result.zarr", progress=False).load()


def saved(fit):
    with tempfile.TemporaryDirectory() as folder:
        fit.save(f"{folder}/fit.zarr")
        return xr_aimz.load_fit(f"{folder}/fit.zarr", line).posterior.load()


def fit(ds, model, **options):
    return ds.aimz.fit(model, progress=False, **options).posterior


NUTS = {"draws": 50, "warmup": 50, "chains": 1}
CALLS = {
    "fit of a scan with a missing input": lambda: fit(DS, walk, **NUTS),
    "fit with a missing input": lambda: fit(DS, line, **NUTS),
    "svi": lambda: fit(WHOLE, line, method="svi", steps=200, draws=50),
    "batches": lambda: fit(WHOLE, line, method="svi", steps=200, draws=50, batch={"year": 5}),
    "laplace": lambda: fit(WHOLE, line, method="laplace", draws=50),
    "per cell": lambda: fit(DS[["level"]], constant, per="cell", method="laplace", draws=20),
    "predict": lambda: WHOLE.chunk(year=5).aimz.predict(of_draws()),
    "predict of a scan": lambda: WHOLE.aimz.predict(of_draws(model=walk)),
    "condition": lambda: WHOLE.aimz.predict(
        of_draws(model=walk), condition={"flow": WHOLE.flow[:5]}
    ),
    "summary": lambda: WHOLE.aimz.predict(of_draws(), summary=("mean", 0.5)),
    "intervene": lambda: WHOLE.chunk(year=5).aimz.intervene(of_draws(), {"x": 1.0}),
    "log_likelihood": lambda: WHOLE.chunk(year=5).aimz.log_likelihood(of_draws()),
    "prior_predictive": lambda: WHOLE.aimz.prior_predictive(line, draws=5),
    "describe": lambda: repr(WHOLE.aimz.describe(line)),
    "to_zarr": lambda: stored(WHOLE.aimz.predict(of_draws())),
    "save": lambda: saved(of_draws()),
}


def digest(result):
    if isinstance(result, xr.Dataset):
        parts = [(n, v.dims, np.asarray(v.values).tobytes()) for n, v in result.variables.items()]
        result = sorted(parts, key=lambda part: str(part[0]))
    return hashlib.sha256(repr(result).encode()).hexdigest()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        print(name, digest(CALLS[name]()), sep="\t")
