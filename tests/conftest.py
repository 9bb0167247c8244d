"""Settings of Hypothesis, and the fits that several modules share."""

import atexit
import itertools
import os
import shutil
import tempfile
from pathlib import Path

# Workers of pytest-xdist would each take three quarters of a GPU's memory for themselves.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What one worker has compiled, the other and all processes that tests start find on disk: on two
# cores compiling is two thirds of the run. A folder of the caller's own serves the next run too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xr_aimz-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest
import strategies
import xarray as xr
from hypothesis import HealthCheck, Phase, settings
from tracking_server import TrackingServer

import xr_aimz
from xr_aimz import device, tiles

# A first example of a shape compiles for a second, which Hypothesis would take for a fault.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# Shrinking recompiles for every smaller example: for a person who looks at a failure.
_ROUGH = [Phase.explicit, Phase.generate]
settings.register_profile(
    "ci", max_examples=8, derandomize=True, database=None, phases=_ROUGH, **_COMMON
)
settings.register_profile("thorough", max_examples=80, **_COMMON)
settings.load_profile(os.environ.get("XR_AIMZ_HYPOTHESIS", "ci"))


# A process may map 65 530 pieces of memory, and XLA aborts at the limit. A compiled program takes
# 55 to 625 of them, and all of the suite's would come to 50 000 and more in one worker.
_MAPPINGS = 30_000
_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _programs_end_when_there_are_many():
    """Let go of compiled programs, where they are many; else the next test finds them."""
    yield
    # Counting takes some 20 ms.
    if next(_finished) % 20 == 0 and Path("/proc/self/maps").exists():
        with open("/proc/self/maps", "rb") as mappings:
            many = sum(1 for _ in mappings) > _MAPPINGS
        if many:
            device._compiled.clear()
            tiles._compiled.clear()
            jax.clear_caches()


@pytest.fixture(scope="session")
def line():
    """A regression with known noise, whose posterior has a closed form: (Dataset, Fit)."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 40))
    y = 0.5 * x - 1.5 * z + strategies.NOISE * rng.normal(size=40)
    ds = xr.Dataset({"x": ("row", x), "z": ("row", z), "y": ("row", y)})
    fit = ds.aimz.fit(
        strategies.regression,
        {"X": ["x", "z"]},
        warmup=500,
        draws=2000,
        chains=2,
        progress=False,
    )
    assert isinstance(fit, xr_aimz.Fit)
    return ds, fit


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """A real MLflow server on loopback, which no test may kill."""
    server = TrackingServer(tmp_path_factory.mktemp("mlflow"))
    try:
        yield server.start()
    finally:
        server.kill()
