"""Which chunks a Zarr store should have, and which of them a listing shows to be there.

A chunk that was lost reads as fill value, and no reader wonders. Where the sizes of chunks were
recorded when they were written, one that was cut short is found too, without reading it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Any

from xr_aimz.listing import Entry

__all__ = ["Damage", "array_documents", "chunk_key", "find_damage", "grid", "sizes_of"]

Index = tuple[int, ...]
Sizes = Mapping[str, Sequence[int | None]]
METADATA = "zarr.json"


@dataclass(frozen=True)
class Damage:
    """What is not in a store as it was written.

    Parameters
    ----------
    missing, cut : mapping of array to the indices of chunks
        Those that are absent, and those that have another size than was written.
    metadata : tuple of str
        Arrays whose metadata document is absent.
    """

    missing: Mapping[str, frozenset[Index]]
    cut: Mapping[str, frozenset[Index]]
    metadata: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.cut or self.metadata)

    def of(self, array: str) -> frozenset[Index]:
        """The indices of an array's chunks that have to be written anew."""
        none: frozenset[Index] = frozenset()
        return self.missing.get(array, none) | self.cut.get(array, none)

    def __str__(self) -> str:
        """Arrays, with how many chunks and the first of them."""
        parts = [*_counted(self.missing, "missing"), *_counted(self.cut, "not as long as written")]
        if self.metadata:
            parts.append(f"the metadata of {list(self.metadata[:5])!r} missing")
        return "; ".join(parts)


def _counted(chunks: Mapping[str, frozenset[Index]], what: str) -> Iterator[str]:
    for array, found in sorted(chunks.items()):
        first = ", ".join(str(list(index)) for index in sorted(found)[:3])
        more = ", ..." if len(found) > 3 else ""
        yield f"{array!r} has {len(found)} {what} (block {first}{more})"


def find_damage(
    documents: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Entry], sizes: Sizes
) -> Damage:
    """Compare the chunks that arrays should have with a listing.

    Parameters
    ----------
    documents : mapping of array to metadata document
        The arrays whose chunks have all been written.
    entries : mapping of key to Entry
        The listing.
    sizes : mapping of array to the sizes of its chunks, in the order of :func:`numpy.ndindex`
        As far as they were recorded.
    """
    missing: dict[str, frozenset[Index]] = {}
    cut: dict[str, frozenset[Index]] = {}
    for array, document in documents.items():
        absent, short = set(), set()
        told = sizes.get(array)
        for place, index in enumerate(_indices(document)):
            entry = entries.get(chunk_key(array, index))
            if entry is None:
                absent.add(index)
            elif told and None not in (told[place], entry.size) and told[place] != entry.size:
                short.add(index)
        missing |= {array: frozenset(absent)} if absent else {}
        cut |= {array: frozenset(short)} if short else {}
    lost = tuple(sorted(a for a in documents if f"{a}/{METADATA}" not in entries))
    return Damage(missing, cut, lost)


def sizes_of(
    documents: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Entry]
) -> dict[str, list[int | None]]:
    """The sizes of the chunks of arrays, for a later comparison."""
    nothing = Entry(None, None)
    return {
        array: [entries.get(chunk_key(array, i), nothing).size for i in _indices(document)]
        for array, document in documents.items()
    }


def array_documents(root: bytes) -> dict[str, Mapping[str, Any]]:
    """The metadata of all arrays by path, from a group's consolidated metadata."""
    inside = (json.loads(root).get("consolidated_metadata") or {}).get("metadata", {})
    return {path: d for path, d in inside.items() if d.get("node_type") == "array"}


def grid(document: Mapping[str, Any]) -> Index:
    """How many chunks there are along each axis; of sharded arrays how many shards."""
    lengths = document["chunk_grid"]["configuration"]["chunk_shape"]
    return tuple(ceil(n / c) for n, c in zip(document["shape"], lengths, strict=True))


def chunk_key(array: str, index: Collection[int]) -> str:
    """The key of a chunk, by the default encoding of Zarr 3."""
    return "/".join([array, "c", *map(str, index)])


def _indices(document: Mapping[str, Any]) -> Iterator[Index]:
    return product(*map(range, grid(document)))
