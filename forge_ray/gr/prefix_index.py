"""Which codes may follow which SID prefix: the trie of a catalogue as sorted integer arrays.

Knows the distinct SIDs of a code table and how prefixes extend, level by level, on any torch
device. Knows nothing about items, scores, models or files: rows of the index are *distinct SIDs* in
lexicographic order, and mapping them to items is :mod:`forge_ray.gr.buckets`.

The distinct prefixes of depth ``l + 1`` are the rows of level ``l``. A prefix is stored as one
int64 key, *row of its parent x codebook size + code*; keys are sorted, so rows are in lexicographic
order, children of one parent are contiguous (CSR), and membership is one ``searchsorted``. Because
the parent enters by its row and not by its own key, no depth or codebook size can overflow int64.

Source: STATIC (arXiv 2602.22647) for the CSR form; we keep one sparse layout for all levels instead
of dense masks for the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from forge_ray.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Children:
    """The one-code extensions of some prefixes, padded to the widest of the level.

    Attributes:
        rows: int64 [..., M], row of the extended prefix at the next level; 0 where ``valid`` is
            False.
        codes: int64 [..., M], the code that extends; 0 where ``valid`` is False.
        valid: bool [..., M].
    """

    rows: Tensor
    codes: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class PrefixLevel:
    """All distinct prefixes of one depth.

    Attributes:
        codebook_size: number of codes of this level.
        keys: int64 [P], ascending, ``parent row * codebook_size + code``.
        offsets: int64 [P_parent + 1], children of parent row r are ``keys[offsets[r]:offsets[r +
            1]]``.
        max_children: the widest of those ranges.
    """

    codebook_size: int
    keys: Tensor
    offsets: Tensor
    max_children: int

    @property
    def num_prefixes(self) -> int:
        """Distinct prefixes of this depth."""
        return int(self.keys.numel())


@dataclass(frozen=True, slots=True)
class PrefixIndex:
    """Sorted prefixes of every level of a set of SIDs.

    Attributes:
        levels: one :class:`PrefixLevel` per SID level, all on one device.
    """

    levels: tuple[PrefixLevel, ...]

    @classmethod
    def build(
        cls,
        codes: NDArray[np.integer],
        codebook_sizes: Sequence[int],
        *,
        device: torch.device | str = "cpu",
    ) -> PrefixIndex:
        """Index the distinct SIDs of a code table with one lexicographic sort.

        To decode inside a part of the catalogue only (an attribute filter), pass that part's rows.

        Args:
            codes: integer [N, L], ``0 <= codes[:, l] < codebook_sizes[l]``; duplicates are fine.
            codebook_sizes: number of codes of each of the L levels.
            device: where the tensors live.

        Raises:
            DataError: on an empty table, a wrong shape or a code outside its codebook.
        """
        codes = _checked(codes, codebook_sizes)
        sids = codes[np.lexsort(codes.T[::-1])]
        levels: list[PrefixLevel] = []
        parents = np.zeros(len(sids), np.int64)
        is_new = np.zeros(len(sids), bool)
        is_new[0] = True
        num_parents = 1
        for level, size in enumerate(codebook_sizes):
            # A prefix starts where any of its codes differs from the SID before it.
            is_new[1:] |= sids[1:, level] != sids[:-1, level]
            keys = parents[is_new] * size + sids[is_new, level].astype(np.int64)
            levels.append(_level(keys, size=size, num_parents=num_parents, device=device))
            parents = np.cumsum(is_new) - 1
            num_parents = len(keys)
        return cls(tuple(levels))

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.levels)

    @property
    def num_sids(self) -> int:
        """Distinct SIDs."""
        return self.levels[-1].num_prefixes

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(level.codebook_size for level in self.levels)

    @property
    def device(self) -> torch.device:
        """Where the index lives."""
        return self.levels[0].keys.device

    def to(self, device: torch.device | str) -> PrefixIndex:
        """The same index on another device."""
        moved = (
            PrefixLevel(
                item.codebook_size, item.keys.to(device), item.offsets.to(device), item.max_children
            )
            for item in self.levels
        )
        return PrefixIndex(tuple(moved))

    def children(self, level: int, parent_rows: Tensor) -> Children:
        """Every code that may follow the given prefixes, gathered from the CSR arrays.

        Args:
            level: which code is being chosen, 0-based.
            parent_rows: int64 [...], rows of level - 1 (for level 0 the only parent is row 0); -1
                has no children.

        Returns:
            Children with M = the widest branching of the level, codes ascending.
        """
        table = self.levels[level]
        known = parent_rows.clamp_min(0)
        start = table.offsets[known]
        count = (table.offsets[known + 1] - start).masked_fill(parent_rows < 0, 0)
        slot = torch.arange(table.max_children, device=parent_rows.device)
        valid = slot < count.unsqueeze(-1)
        rows = (start.unsqueeze(-1) + slot) * valid
        codes = (table.keys[rows] - known.unsqueeze(-1) * table.codebook_size) * valid
        return Children(rows, codes, valid)

    def allowed(self, level: int, parent_rows: Tensor) -> Tensor:
        """The same as :meth:`children` as a mask over the codebook.

        Returns:
            bool [..., codebook_size].
        """
        kids = self.children(level, parent_rows)
        shape = (*parent_rows.shape, self.levels[level].codebook_size)
        mask = torch.zeros(shape, dtype=torch.int8, device=parent_rows.device)
        # amax, because padded slots all write to code 0 and must not clear it.
        return mask.scatter_reduce_(-1, kids.codes, kids.valid.to(torch.int8), "amax").bool()

    def lookup(self, level: int, parent_rows: Tensor, codes: Tensor) -> Tensor:
        """Row of each extended prefix, -1 where no SID starts so.

        Args:
            level: level of ``codes``.
            parent_rows: int64 [...], rows of level - 1, or -1.
            codes: int64, same shape; codes outside the codebook are unknown, not an error.
        """
        table = self.levels[level]
        key = parent_rows * table.codebook_size + codes
        row = torch.searchsorted(table.keys, key).clamp_max(table.num_prefixes - 1)
        inside = (parent_rows >= 0) & (codes >= 0) & (codes < table.codebook_size)
        return torch.where(inside & (table.keys[row] == key), row, -1)

    def find(self, codes: Tensor) -> Tensor:
        """Rank of each SID among the sorted distinct SIDs, -1 where no item owns it.

        Args:
            codes: int64 [..., L].

        Returns:
            int64 [...].
        """
        rows = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device)
        for level in range(self.num_levels):
            rows = self.lookup(level, rows, codes[..., level].contiguous())
        return rows

    def sids(self, rows: Tensor | None = None) -> Tensor:
        """The sorted distinct SIDs themselves.

        Args:
            rows: int64 [...], ranks of SIDs; None is all of them in order.

        Returns:
            int64 [..., L].
        """
        if rows is None:
            rows = torch.arange(self.num_sids, device=self.device)
        columns: list[Tensor] = []
        for table in reversed(self.levels):
            keys = table.keys[rows]
            columns.append(keys % table.codebook_size)
            rows = keys // table.codebook_size
        return torch.stack(columns[::-1], dim=-1)


def _level(
    keys: NDArray[np.int64], *, size: int, num_parents: int, device: torch.device | str
) -> PrefixLevel:
    counts = np.bincount(keys // size, minlength=num_parents)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return PrefixLevel(
        codebook_size=size,
        keys=torch.from_numpy(keys).to(device),
        offsets=torch.from_numpy(offsets).to(device),
        max_children=int(counts.max()),
    )


def _checked(codes: NDArray[np.integer], codebook_sizes: Sequence[int]) -> NDArray[np.integer]:
    if codes.ndim != 2 or codes.shape[0] == 0 or codes.shape[1] != len(codebook_sizes):
        raise DataError(
            f"codes must have shape [N >= 1, L = {len(codebook_sizes)}], got {list(codes.shape)}. "
            "Pass one row of codes per item and one codebook size per level."
        )
    for level, size in enumerate(codebook_sizes):
        low, high = int(codes[:, level].min()), int(codes[:, level].max())
        if low < 0 or high >= size:
            raise DataError(
                f"codes[:, {level}] must be in [0, {size}), got {low}..{high}. "
                "Pass the codebook sizes of this SID table."
            )
    return codes
