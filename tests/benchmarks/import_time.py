"""What `import xr_aimz` costs beyond `import xarray`, and what it leaves alone.

    python tests/benchmarks/import_time.py
    python tests/benchmarks/import_time.py --against ../old  # and another checkout's, in turn

Processes run in turn, with and without; the figure is the median of the differences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[2]
HEAVY = ("jax", "numpyro", "mlflow")
TIMED = "import xarray, time; s = time.perf_counter(); {}; print(time.perf_counter() - s)"


def seconds(statement: str, checkout: Path = HERE) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    if other := parser.parse_args().against:
        pairs = [(seconds("import xr_aimz"), seconds("import xr_aimz", other)) for _ in range(31)]
        ratio = median(new for new, _ in pairs) / median(old for _, old in pairs)
        print(f"import xr_aimz, time / that of {other}: ratio of medians {ratio:.3f}")
        return
    extra = [seconds("import xr_aimz") - seconds("pass") for _ in range(11)]
    print(f"import xr_aimz beyond import xarray: median {1000 * median(extra):.1f} ms")
    listing = f"import sys, xr_aimz; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    print(f"of {', '.join(HEAVY)} it imports: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
