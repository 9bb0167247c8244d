"""Which tests run and how they are compiled, settings of Hypothesis, fits that modules share.

By default the tests that are marked ``slow`` are left out, and the last line says so.
"""

import atexit
import gc
import itertools
import os
import shutil
import tempfile
import time
from importlib.metadata import version
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

# XLA's optimizations are most of the time of a test, and none of what it tests: a program that
# runs for 0.1 s would compile for a second. The laws run with them on other Pythons, see .ci/run.
if "XR_AIMZ_OPTIMIZE" not in os.environ and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        # Halves the time once more; jaxlib 0.12 has no such flag, and aborts.
        + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else "")
    )
# Processes that tests start find the modules that tests share, as pytest itself does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import jax
import numpy as np
import pytest
import strategies
import xarray as xr
from hypothesis import HealthCheck, Phase, settings
from tracking_server import TrackingServer

import xr_aimz
from xr_aimz.inference import per_cell_program
from xr_aimz.kernel import compile as kernel_programs

# A collection goes over all that JAX keeps, which grows with every test.
gc.set_threshold(100_000, 50, 100)
# A first example of a shape compiles for a second, which Hypothesis would take for a fault.
_COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# Shrinking recompiles for every smaller example: for a person who looks at a failure.
_ROUGH = [Phase.explicit, Phase.generate]
for name, examples in (("quick", 5), ("ci", 10)):
    settings.register_profile(
        name, max_examples=examples, derandomize=True, database=None, phases=_ROUGH, **_COMMON
    )
settings.register_profile("thorough", max_examples=80, **_COMMON)
settings.load_profile(os.environ.get("XR_AIMZ_HYPOTHESIS", "quick"))


# A process may map 65 530 pieces of memory, and XLA aborts at the limit. A compiled program takes
# 55 to 625 of them, and all of the suite's would come to 50 000 and more in one worker.
_MAPPINGS = 20_000
_finished = itertools.count(1)
_LEFT_OUT = pytest.StashKey[int]()


# Seconds of processor time that a test may take which is not marked slow; CI sets it.
_LONGEST = float(os.environ.get("XR_AIMZ_LONGEST", "inf"))


def pytest_collection_modifyitems(config, items):
    """Leave out what is slow, unless it is named or chosen by ``-m``."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    config.stash[_LEFT_OUT] = len(slow)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left out"] = len(slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Take from a worker how many tests it left out; each collects all of them."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[_LEFT_OUT] = output.get("left out", node.config.stash.get(_LEFT_OUT, 0))


def pytest_unconfigure(config):
    """Say in the last line what was left out."""
    count = config.stash.get(_LEFT_OUT, 0)
    if count and not hasattr(config, "workeroutput"):
        print(f"{count} slow tests were left out; this runs them: python -m pytest -n 2 -m slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail what takes too long in a quick run: by processor time, which no neighbour adds to."""
    start = time.process_time()
    result = yield
    seconds = time.process_time() - start
    if seconds > _LONGEST and not item.get_closest_marker("slow"):
        pytest.fail(f"{seconds:.1f} s of processor time: make it quick, or mark it slow")
    return result


@pytest.fixture(autouse=True)
def _programs_end_when_there_are_many():
    """Let go of compiled programs, where they are many; else the next test finds them."""
    yield
    # Counting takes some 20 ms.
    if next(_finished) % 20 == 0 and Path("/proc/self/maps").exists():
        with open("/proc/self/maps", "rb") as mappings:
            many = sum(1 for _ in mappings) > _MAPPINGS
        if many:
            kernel_programs._compiled.clear()
            per_cell_program._compiled.clear()
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
