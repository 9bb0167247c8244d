"""Bytes and seconds for every codec and precision, on predictive draws of a linear model.

    python tests/benchmarks/codecs.py
    python tests/benchmarks/codecs.py --checksum

Draws are computed once, into memory, and written from there: the seconds are those of
rounding, encoding and writing. Medians of interleaved runs, printed as the table of
docs/store.md. With ``--checksum`` what a checksum of each chunk would cost: medians of the ratios
of neighbouring runs with and without it, of writing such draws from memory, of predicting and
writing them, and of reading them; of the time on the clock, and of that of all processors.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import predict_linear
import xarray as xr
from zarr.codecs import BloscCodec

import xr_aimz  # noqa: F401
from xr_aimz.storage import blocks

OBSERVATIONS, DRAWS, RUNS = 100_000, 400, 5
CODECS = {
    "none": (),
    "lz4, bitshuffle": (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),),
    "lz4, shuffle": (BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),),
    "zstd-1, bitshuffle": (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),),
    "zstd-1, shuffle": (BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),),
    "zstd-3, shuffle": (BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),),
}
PRECISIONS = (None, 14, 10, 7)


def prediction() -> xr.Dataset:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(OBSERVATIONS, predict_linear.FEATURES)).astype("f4")
    ds = xr.Dataset({"X": (("obs", "feature"), rows)}).chunk(obs=predict_linear.CHUNK)
    values = {n: v[None, :DRAWS] for n, v in predict_linear.posterior().items()}
    fit = ds.aimz.from_posterior(predict_linear.model, values, dim="obs")
    return ds.aimz.predict(fit)


def draws() -> xr.Dataset:
    pred = prediction()
    return pred.load().chunk({d: c[0] for d, c in pred.chunks.items()})


def write(ds: xr.Dataset, codec: tuple, precision: int | None, folder: Path) -> tuple[float, int]:
    blocks.CODECS = codec
    path = folder / "out.zarr"
    start = time.perf_counter()
    ds.aimz.to_zarr(path, precision=precision, progress=False)
    seconds = time.perf_counter() - start
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    shutil.rmtree(path)
    return seconds, size


def read(path: Path) -> None:
    xr.open_zarr(path).load()


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds on the clock, and of all processors."""
    start, work = time.perf_counter(), time.process_time()
    call(*arguments)
    return time.perf_counter() - start, time.process_time() - work


def checksum(runs: int) -> None:
    """The cost of the last codec, as ratios of neighbouring runs."""
    lazy = prediction()
    ds = draws()
    kinds: dict[str, tuple] = {"with": blocks.CHECKED, "without": blocks.CODECS}
    found: dict[str, list[dict[str, tuple[float, float]]]] = {
        "write": [],
        "predict and write": [],
        "read": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, codec in kinds.items():
            blocks.CODECS = codec
            ds.aimz.to_zarr(Path(folder) / name, progress=False)
            write(lazy, codec, None, Path(folder))
        for number in range(runs):
            # Each goes first as often as the other.
            order = sorted(kinds, reverse=number % 2 == 0)
            for what, pairs in found.items():
                source = lazy if what == "predict and write" else ds
                pairs.append(
                    {
                        name: timed(read, Path(folder) / name)
                        if what == "read"
                        else timed(write, source, kinds[name], None, Path(folder))
                        for name in order
                    }
                )
    for what, pairs in found.items():
        for which, clock in enumerate(("clock", "processors")):
            ratios = sorted(pair["with"][which] / pair["without"][which] for pair in pairs)
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            quartiles = f"quartiles {low:.3f} to {high:.3f}"
            print(f"{what}, {clock}: {median(ratios):.3f} ({quartiles}), {runs} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--checksum", action="store_true")
    arguments = parser.parse_args()
    if arguments.checksum:
        return checksum(arguments.runs)
    runs = arguments.runs
    ds = draws()
    found: dict[tuple[str, int | None], list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(runs):
            for name, codec in CODECS.items():
                for precision in PRECISIONS:
                    done = write(ds, codec, precision, Path(folder))
                    found.setdefault((name, precision), []).append(done)
    print("| codec | " + " | ".join(f"{p or 'all'} bits" for p in PRECISIONS) + " |")
    print("|---" * (len(PRECISIONS) + 1) + "|")
    for name in CODECS:
        cells = []
        for precision in PRECISIONS:
            times = [seconds for seconds, _ in found[name, precision]]
            size = found[name, precision][0][1]
            cells.append(f"{size / ds.nbytes:.0%}, {ds.nbytes / median(times) / 1e9:.2f} GB/s")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
