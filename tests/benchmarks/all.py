"""Every workload for xr_aimz and each peer that is installed, in turn; the table of a page.

    python tests/benchmarks/all.py                        # print the table
    python tests/benchmarks/all.py --write                # and put it into docs/performance.md
    python tests/benchmarks/all.py --only Poisson --runs 5

Each run is a process of its own. Runners and limits of a workload take turns, so that what else
the machine does disturbs all alike; figures are medians, ratios those of the pairs. Time is that
of the calls until the result is in the store or in memory, compilation included; memory is the
process's peak RSS. A limit is a part of the work done alone: a raw write of as many numbers to
Zarr by xr_aimz's codec, JAX's own normal numbers, a matrix product.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

from workloads import WORKLOADS, Workload

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
Run = dict[str, float]


def measure(workload: str, runner: str) -> Run:
    """Run one runner of a workload in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--one", workload, runner, folder]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{runner} of {workload} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def one(name: str, runner: str, folder: Path) -> None:
    import dask
    from dask.base import get_scheduler

    workload = next(w for w in WORKLOADS if w.name == name)
    # Where distributed is installed, dask imports it to look for a cluster, in 0.2 s.
    get_scheduler()
    with dask.config.set(scheduler="threads"):
        seconds, number = {**workload.runners, **workload.limits}[runner](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "number": number, "peak": peak / 1e9}))


def is_installed(runner: str) -> bool:
    return runner != "aimz" or importlib.util.find_spec("aimz") is not None


def run_all(workload: Workload, runs: int) -> dict[str, list[Run]]:
    who = [r for r in [*workload.runners, *workload.limits] if is_installed(r)]
    found: dict[str, list[Run]] = {name: [] for name in who}
    for _ in range(runs):
        for name in who:
            found[name].append(measure(workload.name, name))
    return found


def row_of(workload: Workload, found: dict[str, list[Run]]) -> list[str]:
    """Return the cells of a row: each runner, the ratio to the best peer, the share of a limit."""
    ours = found["xr_aimz"]
    seconds = {n: median(r["seconds"] for r in found[n]) for n in found}
    peaks = {n: median(r["peak"] for r in found[n]) for n in found}
    peers = [n for n in workload.runners if n in found and n != "xr_aimz"]
    cells = [
        workload.name,
        f"{seconds['xr_aimz']:.2f} s, {peaks['xr_aimz']:.2f} GB",
        "; ".join(f"{n} {seconds[n]:.2f} s, {peaks[n]:.2f} GB" for n in peers) or "none",
    ]
    best = min(peers, key=seconds.__getitem__, default=None)
    times = [
        f"{median(b['seconds'] / a['seconds'] for a, b in zip(ours, found[n], strict=True)):.2f}"
        + (" (best)" if n == best and len(peers) > 1 else "")
        for n in peers
    ]
    limits = [
        f"{median(b['seconds'] / a['seconds'] for a, b in zip(ours, found[n], strict=True)):.2f} "
        f"({n})"
        for n in workload.limits
        if n in found
    ]
    return [*cells, "; ".join(times) or "none", "; ".join(limits) or "none"]


def table_of(rows: list[list[str]], runs: int) -> str:
    packages = ", ".join(
        f"{p} {version(p)}" for p in ("jax", "numpyro", "aimz") if importlib.util.find_spec(p)
    )
    head = ["workload", "xr_aimz", "peers", "times as fast as each peer", "share of a limit"]
    lines = [
        f"{date.today().isoformat()}, {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {packages}; medians of {runs} interleaved runs.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


def write(table: str) -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="words in names of workloads")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    parser.add_argument("--one", nargs=3, metavar=("WORKLOAD", "RUNNER", "FOLDER"))
    options = parser.parse_args()
    if options.one:
        name, runner, folder = options.one
        one(name, runner, Path(folder))
        return
    if options.write and options.only != [""]:
        parser.error("--write replaces the whole table: leave out --only")
    rows = []
    for workload in WORKLOADS:
        if any(word in workload.name for word in options.only):
            found = run_all(workload, options.runs)
            numbers = {n: round(found[n][0]["number"], 4) for n in workload.runners if n in found}
            rows.append(row_of(workload, found))
            print("; ".join(rows[-1]), numbers, flush=True)
    table = table_of(rows, options.runs)
    print(table)
    if options.write:
        write(table)


if __name__ == "__main__":
    main()
