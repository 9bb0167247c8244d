"""Settings of Hypothesis, and the fits that several modules share."""

import atexit
import os
import shutil
import tempfile

# Workers of pytest-xdist would each take three quarters of a GPU's memory for themselves.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What one worker has compiled, the other and all processes that tests start find on disk: on two
# cores compiling is two thirds of the run. A folder of the caller's own serves the next run too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xr_aimz-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
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


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_module():
    """Let go of compiled programs: a process may map 65 530 pieces of memory, and each takes some.

    With all of the suite's, a worker comes to 50 000 and more, and XLA aborts at the limit.
    """
    yield
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
