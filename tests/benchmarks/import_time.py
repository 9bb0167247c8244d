"""What `import xr_aimz` costs beyond `import xarray`, and what it leaves alone.

    python tests/benchmarks/import_time.py

Processes run in turn, with and without; the figure is the median of the differences.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

HEAVY = ("jax", "numpyro", "mlflow")
TIMED = "import xarray, time; s = time.perf_counter(); {}; print(time.perf_counter() - s)"


def seconds(statement: str) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    extra = [seconds("import xr_aimz") - seconds("pass") for _ in range(11)]
    print(f"import xr_aimz beyond import xarray: median {1000 * median(extra):.1f} ms")
    listing = f"import sys, xr_aimz; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    print(f"of {', '.join(HEAVY)} it imports: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
