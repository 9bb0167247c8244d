"""Writes to Zarr that stop after some blocks."""

from __future__ import annotations

import dask
import pytest
from dask.callbacks import Callback


class Writes(Callback):
    """Counts the blocks that are written, and stops after so many of them."""

    def __init__(self, most=None):
        self.done, self.most = 0, most

    def _posttask(self, key, value, dsk, state, worker):
        # A writing task may have been fused with what it writes.
        self.done += "aimz-write" in str(key)
        if self.done == self.most:
            raise KeyboardInterrupt


def interrupted(ds, store, most=1, **options):
    with dask.config.set(scheduler="sync"), Writes(most), pytest.raises(KeyboardInterrupt):
        ds.aimz.to_zarr(store, progress=False, **options)
