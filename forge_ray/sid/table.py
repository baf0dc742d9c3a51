"""The SID table: which codes every item of a catalogue got, and under which codebooks.

Knows code arrays, their mixed-radix keys, their text form and their two file forms (the artifact
and a foreign `.npz`). Knows nothing about how codes were made, about interactions or about models.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from forge_ray.errors import ConfigError, DataError
from forge_ray.threads import map_threads

if TYPE_CHECKING:
    from forge_ray.artifacts import Artifact, ArtifactWriter

CODES_FILE = "codes.npy"
TABLE_FILE = "table.json"

_INT64_MAX = 2**63 - 1
_ROWS_AT_ONCE = 1 << 17
"""Rows packed at a time: their keys stay in the cache."""


def prefix_keys(
    codes: npt.NDArray[np.integer[Any]], codebook_sizes: Sequence[int], depth: int
) -> npt.NDArray[np.int64]:
    """Pack the first `depth` codes of each row into one sortable integer.

    Args:
        codes: integer codes [..., L], each in `0..codebook_sizes[l] - 1`.
        codebook_sizes: codes per level, at least `depth` entries.
        depth: number of leading levels to pack, 0..L; depth 0 gives the empty prefix, key 0.

    Returns:
        int64 [...]: mixed-radix keys. Keys of one depth order rows lexicographically, and
        `key // codebook_sizes[depth - 1]` is the key of the parent prefix.

    Raises:
        ConfigError: when `depth` is out of range or the keys would not fit into int64.
    """
    if not 0 <= depth <= codes.shape[-1]:
        raise ConfigError(
            f"depth must be between 0 and the number of levels {codes.shape[-1]}, got {depth}."
        )
    num_keys = 1
    for size in codebook_sizes[:depth]:
        num_keys *= int(size)
    if num_keys > _INT64_MAX:
        raise ConfigError(
            f"sid.codebook_sizes must have a product below 2^63 to pack a prefix of depth {depth}, "
            f"got {list(codebook_sizes[:depth])}. Use fewer levels or smaller codebooks."
        )
    rows = codes.reshape(-1, codes.shape[-1])
    keys = np.zeros(len(rows), dtype=np.int64)

    def pack(start: int) -> None:
        part = keys[start : start + _ROWS_AT_ONCE]
        for level in range(depth):
            part *= int(codebook_sizes[level])
            column = rows[start : start + _ROWS_AT_ONCE, level]
            np.add(part, column, out=part, casting="unsafe")

    map_threads(pack, range(0, len(rows), _ROWS_AT_ONCE))
    return keys.reshape(codes.shape[:-1])


def code_dtype(codebook_sizes: Sequence[int]) -> npt.DTypeLike:
    """Return the smallest unsigned type that holds every code: uint16 up to 65,536 a level."""
    return np.uint16 if max(codebook_sizes, default=0) <= 2**16 else np.uint32


@dataclass(frozen=True, eq=False)
class SidTable:
    """Codes of every item of one catalogue, row i belonging to `item_index` i.

    Source: text form and offsets as in FORGE's AL-GR release (arXiv 2509.20904, section 3.1), with
    cumulative offsets so that levels may differ in size.
    """

    codes: npt.NDArray[np.unsignedinteger[Any]]
    """uint16 or uint32 [N, L]; memory-mapped when opened from an artifact."""
    codebook_sizes: tuple[int, ...]
    """Codes available at each level, length L."""
    resolver: str
    """Kind of the collision resolver that produced the codes; `none` for raw codes."""
    key: str = ""
    """Content key of the artifact that holds the table; empty when it has none."""
    parent: str = ""
    """Content key of the code table or quantizer that this table was derived from."""

    @classmethod
    def from_codes(
        cls,
        codes: npt.NDArray[np.integer[Any]],
        codebook_sizes: Sequence[int],
        *,
        resolver: str = "none",
        key: str = "",
        parent: str = "",
    ) -> SidTable:
        """Build a validated table from any integer codes, stored in the smallest unsigned type.

        Args:
            codes: integer codes [N, L].
            codebook_sizes: codes available at each level, length L.
            resolver: kind of the resolver that produced the codes.
            key: content key of the artifact, if any.
            parent: content key of what the codes were derived from.

        Raises:
            DataError: when a code lies outside its codebook, a size is no size of codes, or the
                shapes disagree.
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        if max(sizes, default=0) > 2**32:
            raise DataError(
                f"sid.codebook_sizes must be at most 2^32, got {list(sizes)}. Are these codes?"
            )
        _check_codes(codes, sizes)
        packed = np.ascontiguousarray(codes, dtype=code_dtype(sizes))
        return cls(packed, sizes, resolver, key=key, parent=parent)

    @property
    def num_items(self) -> int:
        """Number of items N."""
        return int(self.codes.shape[0])

    @property
    def num_levels(self) -> int:
        """Number of codes L in every SID."""
        return int(self.codes.shape[1])

    @property
    def level_offsets(self) -> npt.NDArray[np.int64]:
        """First global code of each level, int64 [L]: the sum of all earlier codebook sizes."""
        return np.concatenate(([0], np.cumsum(self.codebook_sizes[:-1]))).astype(np.int64)

    def prefix_keys(self, depth: int) -> npt.NDArray[np.int64]:
        """Pack the first `depth` levels of every item; see `prefix_keys`. int64 [N]."""
        return prefix_keys(self.codes, self.codebook_sizes, depth)

    def text(self, items: npt.ArrayLike | None = None) -> list[str]:
        """Spell SIDs as FORGE does: `C{c1}C{c2 + K1}C{c3 + K1 + K2}`.

        Args:
            items: item indices to spell, all items by default. Meant for display and export of
                chunks: one Python string per item.
        """
        rows = self.codes if items is None else self.codes[np.asarray(items, dtype=np.int64)]
        shifted = rows.astype(np.int64) + self.level_offsets
        return ["".join(f"C{code}" for code in row) for row in shifted.tolist()]

    def validate(self) -> None:
        """Check shapes and ranges.

        Raises:
            DataError: when a code lies outside its codebook or the shapes disagree.
        """
        _check_codes(self.codes, self.codebook_sizes)

    def save(self, writer: ArtifactWriter) -> None:
        """Write the table into an artifact under construction: `codes.npy` and `table.json`."""
        facts = {
            "codebook_sizes": list(self.codebook_sizes),
            "resolver": self.resolver,
            "parent": self.parent,
        }
        with writer.local_path(CODES_FILE) as path:
            np.save(path, self.codes)
        with writer.open(TABLE_FILE) as stream:
            stream.write(json.dumps(facts, indent=2).encode())

    @classmethod
    def open(cls, artifact: Artifact) -> SidTable:
        """Open the table of an artifact; the codes stay memory-mapped.

        Args:
            artifact: a published artifact that `save` wrote into.
        """
        facts = json.loads(artifact.local(TABLE_FILE).read_text())
        return cls(
            codes=np.load(artifact.local(CODES_FILE), mmap_mode="r"),
            codebook_sizes=tuple(facts["codebook_sizes"]),
            resolver=facts["resolver"],
            key=artifact.key,
            parent=facts["parent"],
        )

    @classmethod
    def from_npz(
        cls, path: str | Path, item_ids: npt.NDArray[np.generic] | None = None
    ) -> SidTable:
        """Read a SID table that another project published.

        The file holds `codes` [N, L], `item_id` [N] if rows are to be aligned, and perhaps
        `codebook_sizes` [L]; else sizes are those of `foreign_sizes`.

        Args:
            path: the `.npz` file.
            item_ids: ids [N] of the dataset in `item_index` order; rows are put in this order.

        Raises:
            DataError: when the file is unreadable, lacks an array, or holds other items than the
                dataset, or codes that do not fit its sizes.
        """
        codes, file_ids, sizes = _read_npz(Path(path))
        if item_ids is not None:
            codes = codes[_align(Path(path), file_ids, np.asarray(item_ids))]
        if codes.size and codes.min() < 0:
            raise DataError(f"{path}: codes must be >= 0, got {codes.min()}.")
        resolver = f"foreign:{Path(path).stem}"
        return cls.from_codes(codes, sizes or cls.foreign_sizes(codes), resolver=resolver)

    @staticmethod
    def foreign_sizes(codes: npt.NDArray[np.integer[Any]]) -> list[int]:
        """Codebook sizes of codes [N, L] that come without any.

        All levels get the largest code plus one, rounded up to a power of two: a level that happens
        to use few codes still owns them.
        """
        largest = int(codes.max(initial=0))
        return [max(2, 1 << largest.bit_length())] * codes.shape[1]


def _check_codes(codes: npt.NDArray[np.integer[Any]], sizes: Sequence[int]) -> None:
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not sizes:
        raise DataError(
            f"sid.codes must have shape [items, {len(sizes)} levels], got {list(codes.shape)}."
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise DataError(f"sid.codes must be integers, got {codes.dtype}.")
    for level, size in enumerate(sizes):
        column = codes[:, level]
        if column.size and (column.min() < 0 or column.max() >= size):
            raise DataError(
                f"sid.codes[:, {level}] must lie in 0..{size - 1}, "
                f"got {column.min()}..{column.max()}. The codes belong to other codebook sizes."
            )


def _read_npz(
    path: Path,
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.generic] | None, list[int]]:
    """Codes, ids and codebook sizes of a file; no ids or sizes where it has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "codes" not in arrays:
                raise DataError(f"{path} must hold an array 'codes', got {sorted(arrays.files)}.")
            sizes = arrays["codebook_sizes"] if "codebook_sizes" in arrays else np.zeros(0, int)
            if sizes.ndim != 1:
                raise DataError(
                    f"{path}: codebook_sizes must be one number per level, got {sizes.tolist()}. "
                    "Write a list, or leave the array out."
                )
            return arrays["codes"], arrays.get("item_id", None), sizes.tolist()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} must be a readable .npz file, got: {error}.") from error


def _align(
    path: Path, file_ids: npt.NDArray[np.generic] | None, item_ids: npt.NDArray[np.generic]
) -> npt.NDArray[np.int64]:
    """Row of the file for each dataset item, int64 [N]."""
    if file_ids is None:
        raise DataError(
            f"{path} must hold an array 'item_id' to be matched with a dataset, got none. "
            "Add the ids of its rows."
        )
    have, want = file_ids.astype(str), item_ids.astype(str)
    order = np.argsort(have, kind="stable")
    ranks = np.searchsorted(have, want, sorter=order)
    rows = order[np.minimum(ranks, len(have) - 1)] if len(have) else np.zeros(0, np.int64)
    found = have[rows] == want if len(have) else np.zeros(len(want), bool)
    duplicates = len(have) - len(np.unique(have))
    if not found.all() or len(have) != len(want) or duplicates:
        example = str(want[~found][0]) if not found.all() else "none"
        raise DataError(
            f"{path} must hold exactly the dataset's {len(want)} items, got {len(have)} rows, "
            f"{int((~found).sum())} of the dataset's items missing (first: {example}), "
            f"{duplicates} duplicate ids. Use the table of this dataset."
        )
    return rows.astype(np.int64)
