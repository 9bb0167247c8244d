"""Bytes and seconds for every codec and precision, on predictive draws of a linear model.

    python tests/benchmarks/codecs.py

Draws are computed once, into memory, and written from there: the seconds are those of
rounding, encoding and writing. Medians of interleaved runs, printed as the table of
docs/store.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import predict_linear
import xarray as xr
from zarr.codecs import BloscCodec

import xr_aimz  # noqa: F401
from xr_aimz import template

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


def draws() -> xr.Dataset:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(OBSERVATIONS, predict_linear.FEATURES)).astype("f4")
    ds = xr.Dataset({"X": (("obs", "feature"), rows)}).chunk(obs=predict_linear.CHUNK)
    values = {n: v[None, :DRAWS] for n, v in predict_linear.posterior().items()}
    fit = ds.aimz.from_posterior(predict_linear.model, values, dim="obs")
    pred = ds.aimz.predict(fit)
    return pred.load().chunk({d: c[0] for d, c in pred.chunks.items()})


def write(ds: xr.Dataset, codec: tuple, precision: int | None, folder: Path) -> tuple[float, int]:
    template._CODECS = codec
    path = folder / "out.zarr"
    start = time.perf_counter()
    ds.aimz.to_zarr(path, precision=precision, progress=False)
    seconds = time.perf_counter() - start
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    shutil.rmtree(path)
    return seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    runs = parser.parse_args().runs
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
