"""How long a served fit takes to answer, over HTTP and in the process itself.

4000 draws of a model on a grid of years and sites; tables of the first rows; mean, sd and
three quantiles. The first request of a size compiles; the figures are medians of those after it.
Starts a scoring server on the loopback.

    python tests/benchmarks/serving.py
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import xarray as xr

import xr_aimz

MODEL = """
import numpyro
import numpyro.distributions as dist

import xr_aimz


def melting(warmth, forcing, melt=None):
    with xr_aimz.plate("site"):
        rate = numpyro.sample("rate", dist.HalfNormal(10))
    with xr_aimz.plate("time"), xr_aimz.plate("site"):
        numpyro.sample("melt", dist.Normal(rate * warmth + forcing, 1), obs=melt)
"""
ROWS = (1, 10, 100, 1000, 10_000)


def fitted(place):
    (place / "melt_model.py").write_text(MODEL)
    sys.path.insert(0, str(place))
    from melt_model import melting

    rng = np.random.default_rng(0)
    warmth = rng.uniform(0, 8, (900, 12))
    ds = xr.Dataset(
        {
            "warmth": (("time", "site"), warmth),
            "forcing": ("time", np.linspace(0, 1, 900)),
            "melt": (("time", "site"), 3 * warmth + rng.normal(size=warmth.shape)),
        },
        {"time": np.arange(900), "site": list("abcdefghijkl")},
    )
    fit = ds.aimz.fit(melting, method="laplace", draws=4000, progress=False)
    return fit, ds.drop_vars("melt").to_dataframe().reset_index()


def served(folder):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, start_new_session=True, **quiet)
    url = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/ping", timeout=5).close()
            return server, url
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the scoring server ended at once")


def post(url, body):
    request = urllib.request.Request(
        f"{url}/invocations", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return len(json.load(response)["predictions"])


def seconds(ask, repeats):
    start = time.perf_counter()
    ask()
    first = time.perf_counter() - start
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - start)
    return first, statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        fit, table = fitted(place)
        xr_aimz.mlflow.save_model(
            fit,
            place / "model",
            trust_import=True,
            code_paths=[str(place / "melt_model.py")],
            pip_requirements=["xr_aimz"],
        )
        import mlflow

        local = mlflow.pyfunc.load_model(str(place / "model"))
        server, url = served(place / "model")
        try:
            print("rows: first request, later ones; in the process itself")
            for rows in ROWS:
                some = table.head(rows)
                split = some.to_dict(orient="split", index=False)
                body = json.dumps({"dataframe_split": split}).encode()
                first, later = seconds(lambda body=body: post(url, body), asked.repeats)
                _, inside = seconds(lambda some=some: local.predict(some), asked.repeats)
                print(f"{rows:6d}: {first:.2f} s, {later * 1e3:.0f} ms; {inside * 1e3:.0f} ms")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


if __name__ == "__main__":
    main()
