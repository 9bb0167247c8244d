"""A posterior larger than memory: finished blocks of cells in a Zarr store.

The store has the groups of ArviZ's schema, ``posterior`` and ``sample_stats``, a Zarr
chunk for each block of cells, and a record of finished blocks. A block is recorded after
all its chunks are there, with a digest of the data that it was made from, so a run that
was cut short goes on where it stopped and nothing half-written is taken for whole. Until
the last block the store says in its attrs that it is incomplete; then it gets a record of the
sizes of all chunks. A block of which a chunk was lost or cut since is fitted anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.storage import LocalStore

from xr_aimz.completeness import Damage, find_damage, sizes_of
from xr_aimz.errors import StoreError
from xr_aimz.listing import list_entries
from xr_aimz.per_cell import Arrays, Place, Plan
from xr_aimz.template import CHECKED, missing_value

__all__ = ["Stored"]

INCOMPLETE = "xr_aimz_incomplete"
_IDENTITY, _BLOCK, _RECORD = "xr_aimz_fit", "xr_aimz_block", "xr_aimz_finished"
# Within the array of the record, where no reader of Zarr looks for a group or an array.
_SIZES = f"{_RECORD}/chunks.json"


class Stored:
    """A shelf in a Zarr store, new or one that an earlier run of this fit has begun.

    Parameters
    ----------
    plan : Plan
    store : path

    Raises
    ------
    StoreError
        The path holds something else than a part of this fit.
    """

    def __init__(self, plan: Plan, store: str | Path) -> None:
        self._plan, self._path = plan, Path(store)
        if self._path.exists():
            self._root = self._opened()
        else:
            self._root = zarr.create_group(self._path, zarr_format=3, attributes=self._attrs())
        self.block = tuple(json.loads(str(self._root.attrs[_BLOCK])))
        if _RECORD not in self._root:
            self._lay_out()

    def holds(self, place: Place, data: str) -> bool:
        """Whether a block is there already; it must be from the same data."""
        found = int(self._record[place.numbers])
        if found and found != _number(data):
            raise StoreError(
                f"store={str(self._path)!r} has a fit of other data: the values of block "
                f"{place.numbers!r} have changed. Choose another path, or remove the store"
            )
        return bool(found) and place.numbers not in self._damaged

    def put(self, place: Place, data: str, arrays: Arrays) -> None:
        """Write a block, and record it once it is there."""
        leads = {name: lead for name, (lead, _, _) in self._plan.arrays().items()}
        # A chunk that is absent is a chunk that was lost; an array keeps what was set when it
        # was opened.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, values in arrays.items():
                at = (slice(None),) * leads[name] + place.slices
                self._array(name)[at] = values
        self._record[place.numbers] = _number(data)

    def arrays(self) -> dict[str, Any]:
        """The whole arrays, lazily."""
        documents = self._documents()
        found = {"sizes": sizes_of(documents, list_entries(LocalStore(self._path)))}
        if found != self._recorded():
            (self._path / _SIZES).write_text(json.dumps(found, separators=(",", ":")))
        if INCOMPLETE in self._root.attrs:
            del self._root.attrs[INCOMPLETE]
        opened = {
            group: xr.open_zarr(self._path, group=group, consolidated=False, decode_cf=False)
            for group in ("posterior", "sample_stats")
        }
        found = {}
        for name in self._plan.arrays():
            group, variable = _place_of(name)
            found[name] = opened[group][variable].data
        return found

    @property
    def _record(self) -> Any:
        return self._root[_RECORD]

    @cached_property
    def _damaged(self) -> frozenset[tuple[int, ...]]:
        """The blocks of which a chunk was lost or cut since, by one listing."""
        # An earlier version, which wrote no checksums, did not always write an empty chunk.
        documents = {n: d for n, d in self._documents().items() if _has_checksum(d)}
        sizes = self._recorded().get("sizes", {})
        damage = find_damage(documents, list_entries(LocalStore(self._path)), sizes)
        return frozenset(number for name in documents for number in self._blocks_in(name, damage))

    def _blocks_in(self, path: str, damage: Damage) -> set[tuple[int, ...]]:
        leads = {"/".join(_place_of(n)): lead for n, (lead, _, _) in self._plan.arrays().items()}
        cells = slice(leads[path], leads[path] + len(self.block))
        return {index[cells] for index in damage.of(path)}

    def _documents(self) -> dict[str, Mapping[str, Any]]:
        """The metadata of the arrays of draws and statistics."""
        arrays = {"/".join(_place_of(n)): self._array(n) for n in self._plan.arrays()}
        return {path: array.metadata.to_dict() for path, array in arrays.items()}

    def _recorded(self) -> dict[str, Any]:
        path = self._path / _SIZES
        return json.loads(path.read_text()) if path.exists() else {}

    def _array(self, name: str) -> Any:
        return self._root["/".join(_place_of(name))]

    def _attrs(self) -> dict[str, Any]:
        return {
            INCOMPLETE: "this fit was not run to its end; the same call goes on with it",
            _IDENTITY: self._plan.identity(),
            _BLOCK: json.dumps(self._plan.block),
        }

    def _opened(self) -> zarr.Group:
        try:
            root = zarr.open_group(self._path, mode="r+")
            there = dict(root.attrs[_IDENTITY])  # type: ignore[arg-type] # JSON, as it was written
        except (FileNotFoundError, KeyError, json.JSONDecodeError):
            raise StoreError(
                f"store={str(self._path)!r} exists and is not a fit of cells; choose another path"
            ) from None
        here = self._plan.identity()
        differ = [k for k in here if there.get(k) != here[k]]
        if differ:
            raise StoreError(
                f"store={str(self._path)!r} has another fit: it differs in {differ!r}. Choose "
                "another path, remove the store, or repeat the call that began it"
            )
        return root

    def _lay_out(self) -> None:
        """Empty arrays and their labels; the record last, so that a part is done again."""
        binding = self._plan.bound.binding
        coords = _storable(self._plan.bound.inputs.coords, binding.per)
        chains, draws = self._plan.method.shape
        numbered = coords.assign_coords(chain=np.arange(chains), draw=np.arange(draws))
        for group in ("posterior", "sample_stats"):
            numbered.to_zarr(self._path, group=group, mode="w", consolidated=False, zarr_format=3)
        for name, (lead, shape, dtype) in self._plan.arrays().items():
            cells = slice(lead, lead + len(self.block))
            chunks = (*shape[:lead], *self.block, *shape[cells.stop :])
            self._root.create_array(
                "/".join(_place_of(name)),
                shape=shape,
                dtype=dtype,
                chunks=tuple(min(c, max(n, 1)) for c, n in zip(chunks, shape, strict=True)),
                compressors=CHECKED,
                fill_value=missing_value(dtype),
                dimension_names=self._dims(name, lead, len(shape)),
                overwrite=True,
                config={"write_empty_chunks": True},
            )
        counts = [-(-n // b) for n, b in zip(self._plan.sizes, self.block, strict=True)]
        self._root.create_array(
            _RECORD,
            shape=tuple(counts),
            dtype="uint64",
            chunks=(1,) * len(counts),
            fill_value=0,
            dimension_names=[f"{d}_block" for d in binding.per],
        )

    def _dims(self, name: str, lead: int, ndim: int) -> tuple[str, ...]:
        binding = self._plan.bound.binding
        first = (("chain", "draw") if lead == 2 else ("step",))[:lead]
        rest = ndim - lead - len(binding.per)
        return (*first, *binding.per, *(f"{_place_of(name)[1]}_dim_{i}" for i in range(rest)))


def _has_checksum(document: Mapping[str, Any]) -> bool:
    return any(codec["name"] == "crc32c" for codec in document["codecs"])


def _place_of(name: str) -> tuple[str, str]:
    """The group and the variable of an array; a slash would separate groups."""
    group, _, variable = name.partition(" ")
    if not variable:
        return "sample_stats", {"losses": "loss"}.get(group, group)
    return group, variable.replace("/", ".")


def _number(digest: str) -> int:
    """A digest as 64 bits that are not all zero, which says that there is none."""
    return int(digest[:16], 16) | 1


def _storable(coords: xr.Dataset, per: tuple[str, ...]) -> xr.Dataset:
    """The coordinates of the cells, as Zarr can hold them."""
    kept = coords.drop_vars([n for n, c in coords.variables.items() if set(c.dims) - set(per)])
    stacked = [d for d in per if d in kept.indexes and kept.indexes[d].nlevels > 1]
    kept = kept.reset_index(stacked).load()
    # A string of fixed length has no place in the v3 specification; one of any length has.
    strings = {
        n: v.astype(np.dtypes.StringDType())
        for n, v in kept.variables.items()
        if v.dtype.kind == "U"
    }
    kept = kept.assign_coords(strings)
    for variable in kept.variables.values():
        variable.encoding = {"compressors": CHECKED}
    return kept
