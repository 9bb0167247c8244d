"""Write lazy Datasets to Zarr, and name data alike in every process. Imports no JAX.

A Dataset with dask arrays comes in and is written block by block. A store that is complete, or
lists the blocks it lacks, comes out and is reopened lazily.
"""

from xr_aimz.storage.blocks import CHECKED, json_attrs, missing_value
from xr_aimz.storage.bundle import ArrayBundle, write_bundle
from xr_aimz.storage.completeness import Damage, chunk_sizes, find_damage
from xr_aimz.storage.identity import identify, lazy_name, name_by_content, saved_name
from xr_aimz.storage.listing import list_entries
from xr_aimz.storage.results import open_zarr, to_zarr
from xr_aimz.storage.verified import VerifiedStore

__all__ = [
    "CHECKED", "ArrayBundle", "Damage", "VerifiedStore", "chunk_sizes", "find_damage",
    "identify", "json_attrs", "lazy_name", "list_entries", "missing_value", "name_by_content",
    "open_zarr", "saved_name", "to_zarr", "write_bundle",
]  # fmt: skip
