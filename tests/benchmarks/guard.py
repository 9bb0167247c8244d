"""What the block guard costs: seconds to judge a model that it has not seen.

    python tests/benchmarks/guard.py

Each model is judged in a process of its own, along both dims of a 40 x 6 Dataset, after it was
bound to it: everything of the guard's is cold, traces and compilations included. ``seconds``
is the wall's clock, ``cpu`` the process's, which says more on a machine that does other work;
``again`` is a second prediction of the same program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

import numpy as np


def models() -> dict:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    import xr_aimz

    def slope():
        return numpyro.sample("b", dist.Normal(0, 1))

    def linear(x, y=None):
        numpyro.sample("y", dist.Normal(slope() * x, 1.0), obs=y)

    def local(x, y=None):
        b = slope()
        with xr_aimz.plate("lat"):
            level = numpyro.sample("level", dist.Normal(b, 1))
        with xr_aimz.plate("time"), xr_aimz.plate("lat"):
            mu = numpyro.deterministic("mu", level + b * x)
            numpyro.sample("y", dist.StudentT(4.0, mu, 1.0), obs=y)

    def counts(x, k=None):
        numpyro.sample("k", dist.NegativeBinomial2(jnp.exp(slope() * x), 2.0), obs=k)

    def shares(x, p=None):
        numpyro.sample("p", dist.Beta(jnp.exp(slope() * x), 2.0), obs=p)

    def mixture(x, y=None):
        parts = dist.Normal(jnp.stack([x, slope() * x], -1), 1.0)
        weights = dist.Categorical(jnp.array([0.3, 0.7]))
        numpyro.sample("y", dist.MixtureSameFamily(weights, parts), obs=y)

    def table(x, y=None):
        hidden = jnp.tanh(x[..., None] * slope() + jnp.linspace(-1, 1, 32))
        numpyro.sample("y", dist.Normal(hidden @ jnp.linspace(-1, 1, 32), 1.0), obs=y)

    def vectors(x, v=None):
        spread = 1 + jnp.square(slope() * x)[..., None, None]
        fn = dist.MultivariateNormal(x[..., None] + jnp.arange(3.0), spread * jnp.eye(3) + 0.1)
        numpyro.sample("v", fn, obs=v)

    def steps(x, y=None):
        b = slope()

        def step(level, now):
            level = 0.5 * level + b * now[0]
            numpyro.sample("y", dist.Normal(level, 1.0), obs=now[1])
            return level, None

        scan(step, jnp.zeros(x.shape[1]), (x, y), length=x.shape[0])

    def coupling(x, y=None):
        numpyro.sample("y", dist.Normal(slope() * (x - x.mean(0)), 1.0), obs=y)

    return {
        "linear": linear,
        "local": local,
        "counts": counts,
        "shares": shares,
        "mixture": mixture,
        "table": table,
        "vectors": vectors,
        "steps": steps,
        "coupling": coupling,
    }


def one(name: str) -> None:
    import xarray as xr

    import xr_aimz
    from xr_aimz.binding import align
    from xr_aimz.kernel import CouplingProblem, KernelSpec, find_coupling

    rng = np.random.default_rng(0)
    dims, shape = ("time", "lat"), (40, 6)
    outcome = {"counts": "k", "shares": "p", "vectors": "v"}.get(name, "y")
    ds = xr.Dataset(
        {
            "x": (dims, rng.normal(size=shape)),
            "y": (dims, rng.normal(size=shape)),
            "k": (dims, rng.poisson(2, shape)),
            "v": ((*dims, "species"), rng.normal(size=(*shape, 3))),
            "p": (dims, rng.uniform(0.1, 0.9, shape)),
        },
        {"time": np.arange(40), "lat": np.arange(6)},
    )[["x", outcome]]
    posterior = {"b": rng.normal(size=(1, 9))}
    if name == "local":
        posterior["level"] = rng.normal(size=(1, 9, 6))
    fit = ds.aimz.from_posterior(models()[name], posterior)
    split = ("lat",) if name == "steps" else dims
    inputs = align(fit.binding, ds.chunk(dict.fromkeys(split, 3)), outcomes=False)
    program = KernelSpec(fit.model, fit.binding, fit.sites, inputs.dims, fit.observed)
    latents = {n: fit.posterior[n] for n in posterior}
    blocks, found = dict.fromkeys(split, 3), []
    for _ in range(2):
        start = time.perf_counter(), time.process_time()
        problem = CouplingProblem(program, inputs, latents, {}, fit.constant_data)
        verdict = find_coupling(problem, blocks)
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    assert verdict.coupled == (("time",) if name == "coupling" else ()), verdict
    assert xr_aimz.__version__
    print(json.dumps({"seconds": found[0][0], "cpu": found[0][1], "again": found[1][0]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    every = {}
    for name in models():
        command = [sys.executable, __file__, "--one", name]
        done = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(options.runs)
        ]
        every[name] = {k: median(d[k] for d in done) for k in done[0]}
        shown = ", ".join(f"{k} {v:.2f}" for k, v in every[name].items())
        print(f"{name:9} {shown}", flush=True)
    middle = {k: median(e[k] for e in every.values()) for k in ("seconds", "cpu", "again")}
    print("median    " + ", ".join(f"{k} {v:.2f}" for k, v in middle.items()))


if __name__ == "__main__":
    main()
