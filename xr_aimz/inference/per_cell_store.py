"""Store draws of finished blocks of cells in Zarr, for a posterior larger than memory.

The store has the groups ``posterior`` and ``sample_stats``, and an array with one entry a block
that records which blocks are finished; a fit that was interrupted continues from it.
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

from xr_aimz.errors import StoreError
from xr_aimz.inference.per_cell import Arrays, CellBlock, CellPlan
from xr_aimz.storage import CHECKED, Damage, chunk_sizes, find_damage, list_entries, missing_value

INCOMPLETE = "xr_aimz_incomplete"
_IDENTITY, _BLOCK, _RECORD = "xr_aimz_fit", "xr_aimz_block", "xr_aimz_finished"
# Inside the directory of the record array, where Zarr looks for no group or array.
_SIZES = f"{_RECORD}/chunks.json"


class ZarrCells:
    """Store of draws on disk, in Zarr: new, or begun by an earlier run of the same fit.

    Parameters
    ----------
    plan : CellPlan
    store : path

    Raises
    ------
    StoreError
        The path has something other than a part of this fit.
    """

    def __init__(self, plan: CellPlan, store: str | Path) -> None:
        self._plan, self._path = plan, Path(store)
        if self._path.exists():
            self._root = self._opened()
        else:
            self._root = zarr.create_group(self._path, zarr_format=3, attributes=self._attrs())
        self.block = tuple(json.loads(str(self._root.attrs[_BLOCK])))
        if _RECORD not in self._root:
            self._lay_out()

    def holds(self, place: CellBlock, data: str) -> bool:
        """Return whether a block is stored already; raise StoreError if its data differed."""
        result = int(self._record[place.numbers])
        if result and result != _digest_number(data):
            raise StoreError(
                f"store={str(self._path)!r} has a fit of other data: the values of block "
                f"{place.numbers!r} have changed. Choose another path, or remove the store"
            )
        return bool(result) and place.numbers not in self._damaged

    def put(self, place: CellBlock, data: str, arrays: Arrays) -> None:
        """Write the arrays of a block, and then record the block as finished."""
        leads = {name: lead for name, (lead, _, _) in self._plan.arrays().items()}
        # Empty chunks are written too, so that an absent chunk is a lost one; an array keeps the
        # config with which it was opened.
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, values in arrays.items():
                region = (slice(None),) * leads[name] + place.slices
                self._array(name)[region] = values
        self._record[place.numbers] = _digest_number(data)

    def arrays(self) -> dict[str, Any]:
        """Return the complete arrays, as lazy dask arrays, and mark the store as complete."""
        documents = self._documents()
        result = {"sizes": chunk_sizes(documents, list_entries(LocalStore(self._path)))}
        if result != self._recorded():
            (self._path / _SIZES).write_text(json.dumps(result, separators=(",", ":")))
        if INCOMPLETE in self._root.attrs:
            del self._root.attrs[INCOMPLETE]
        opened = {
            group: xr.open_zarr(self._path, group=group, consolidated=False, decode_cf=False)
            for group in ("posterior", "sample_stats")
        }
        result = {}
        for name in self._plan.arrays():
            group, variable = _variable_path(name)
            result[name] = opened[group][variable].data
        return result

    @property
    def _record(self) -> Any:
        return self._root[_RECORD]

    @cached_property
    def _damaged(self) -> frozenset[tuple[int, ...]]:
        """Numbers of blocks that have since lost a chunk or part of one, from one listing."""
        # An earlier version, which wrote no checksums, did not write every empty chunk.
        documents = {n: d for n, d in self._documents().items() if _has_checksum(d)}
        sizes = self._recorded().get("sizes", {})
        damage = find_damage(documents, list_entries(LocalStore(self._path)), sizes)
        return frozenset(number for name in documents for number in self._blocks_in(name, damage))

    def _blocks_in(self, path: str, damage: Damage) -> set[tuple[int, ...]]:
        leads = {
            "/".join(_variable_path(n)): lead for n, (lead, _, _) in self._plan.arrays().items()
        }
        cells = slice(leads[path], leads[path] + len(self.block))
        return {index[cells] for index in damage.of(path)}

    def _documents(self) -> dict[str, Mapping[str, Any]]:
        """Return the metadata of the arrays of draws and statistics, by path."""
        arrays = {"/".join(_variable_path(n)): self._array(n) for n in self._plan.arrays()}
        return {path: array.metadata.to_dict() for path, array in arrays.items()}

    def _recorded(self) -> dict[str, Any]:
        path = self._path / _SIZES
        return json.loads(path.read_text()) if path.exists() else {}

    def _array(self, name: str) -> Any:
        return self._root["/".join(_variable_path(name))]

    def _attrs(self) -> dict[str, Any]:
        return {
            INCOMPLETE: "this fit was not run to its end; the same call goes on with it",
            _IDENTITY: self._plan.identity(),
            _BLOCK: json.dumps(self._plan.block),
        }

    def _opened(self) -> zarr.Group:
        try:
            root = zarr.open_group(self._path, mode="r+")
            saved = dict(root.attrs[_IDENTITY])  # type: ignore[arg-type] # JSON, as it was written
        except (FileNotFoundError, KeyError, json.JSONDecodeError):
            raise StoreError(
                f"store={str(self._path)!r} exists and is not a fit of cells; choose another path"
            ) from None
        identity = self._plan.identity()
        differ = [k for k in identity if saved.get(k) != identity[k]]
        if differ:
            raise StoreError(
                f"store={str(self._path)!r} has another fit: it differs in {differ!r}. Choose "
                "another path, remove the store, or repeat the call that began it"
            )
        return root

    def _lay_out(self) -> None:
        """Create empty arrays and their labels; the record is created last.

        Without the record the layout is created anew, so that a partial one is replaced.
        """
        binding = self._plan.bound.binding
        coords = _storable_coords(self._plan.bound.inputs.coords, binding.per)
        chains, draws = self._plan.method.shape
        numbered = coords.assign_coords(chain=np.arange(chains), draw=np.arange(draws))
        for group in ("posterior", "sample_stats"):
            numbered.to_zarr(self._path, group=group, mode="w", consolidated=False, zarr_format=3)
        for name, (lead, shape, dtype) in self._plan.arrays().items():
            cells = slice(lead, lead + len(self.block))
            chunks = (*shape[:lead], *self.block, *shape[cells.stop :])
            self._root.create_array(
                "/".join(_variable_path(name)),
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
        return (*first, *binding.per, *(f"{_variable_path(name)[1]}_dim_{i}" for i in range(rest)))


def _has_checksum(document: Mapping[str, Any]) -> bool:
    return any(codec["name"] == "crc32c" for codec in document["codecs"])


def _variable_path(name: str) -> tuple[str, str]:
    """Return the group and the variable of an array; slashes, which nest groups, are replaced."""
    group, _, variable = name.partition(" ")
    if not variable:
        return "sample_stats", {"losses": "loss"}.get(group, group)
    return group, variable.replace("/", ".")


def _digest_number(digest: str) -> int:
    """Return 64 bits of a digest, with the lowest set: 0 stands for a missing block."""
    return int(digest[:16], 16) | 1


def _storable_coords(coords: xr.Dataset, per: tuple[str, ...]) -> xr.Dataset:
    """Return the coordinates of the cells in a form that Zarr can store."""
    cell_coords = coords.drop_vars(
        [n for n, c in coords.variables.items() if set(c.dims) - set(per)]
    )
    stacked = [d for d in per if d in cell_coords.indexes and cell_coords.indexes[d].nlevels > 1]
    cell_coords = cell_coords.reset_index(stacked).load()
    # The v3 specification has strings of variable length, none of fixed length.
    strings = {
        n: v.astype(np.dtypes.StringDType())
        for n, v in cell_coords.variables.items()
        if v.dtype.kind == "U"
    }
    cell_coords = cell_coords.assign_coords(strings)
    for variable in cell_coords.variables.values():
        variable.encoding = {"compressors": CHECKED}
    return cell_coords
