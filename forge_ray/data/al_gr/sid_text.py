"""SIDs as AL-GR spells them, `C{c1}C{c2 + K1}C{c3 + K1 + K2}`, read and written a column at a time.

Knows tokens, offsets and levels. Knows nothing of prompts, files or items. A text is valid only if
spelling its codes gives the same text back, so nothing is lost on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError

# FORGE's vocabulary is C0..C65535.
MAX_TOKENS = 65536
_DIGITS = 5
_ZERO, _NINE, _C = ord("0"), ord("9"), ord("C")


@dataclass(frozen=True, slots=True)
class ParsedSids:
    """SIDs read from n texts.

    Attributes:
        codes: n rows of codes (int32), each level counted from 0, L per SID; empty where invalid.
        is_valid: ``[n]`` texts that are whole SIDs and nothing else; the empty text is valid.
    """

    codes: Ragged
    is_valid: NDArray[np.bool_]


@dataclass(frozen=True)
class SidFormat:
    """How codes are numbered as tokens.

    Source: AL-GR (arXiv 2509.20904), where every level has 8192 codes; other sizes get cumulative
    offsets, as the same company's later code has it.
    """

    sizes: tuple[int, ...]
    """Codes of each level, length L."""
    stride: int = 0
    """Tokens from one level to the next; 0: the size of the level before."""

    def __post_init__(self) -> None:
        """Check that the tokens exist in FORGE's vocabulary."""
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(
                f"codebook_sizes must be numbers >= 1, got {list(self.sizes)}. "
                "AL-GR has [8192,8192,8192]."
            )
        if self.stride and self.stride < max(self.sizes):
            raise ConfigError(
                f"level_stride must be >= the largest codebook {max(self.sizes)}, got "
                f"{self.stride}. Use 0 for offsets that fit the sizes."
            )
        if self.num_tokens > MAX_TOKENS:
            raise ConfigError(
                f"codebook_sizes must need at most {MAX_TOKENS} tokens, got {self.num_tokens} for "
                f"{list(self.sizes)}. FORGE's vocabulary ends there: use smaller codebooks."
            )

    @property
    def offsets(self) -> NDArray[np.int64]:
        """First token of each level, int64 ``[L]``."""
        if self.stride:
            return np.arange(len(self.sizes), dtype=np.int64) * self.stride
        return np.concatenate(([0], np.cumsum(self.sizes[:-1]))).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens in use: the last one plus one."""
        return int(self.offsets[-1]) + self.sizes[-1]

    def parse(self, texts: pa.Array) -> ParsedSids:
        """Read the SIDs of n texts without nulls."""
        data, bounds = _bytes_of(texts)
        starts = np.flatnonzero(data == _C)
        firsts = np.searchsorted(starts, bounds)
        counts = np.diff(firsts)
        row = np.repeat(np.arange(len(texts)), counts)
        ends = np.minimum(np.append(starts[1:], len(data)), bounds[1:][row])
        tokens, is_number = _numbers(data, starts + 1, ends)
        level = (np.arange(len(starts)) - firsts[:-1][row]) % len(self.sizes)
        codes = tokens - self.offsets[level]
        is_code = is_number & (codes >= 0) & (codes < np.array(self.sizes)[level])
        is_valid = (counts % len(self.sizes) == 0) & _begin_with_c(data, bounds)
        is_valid[row[~is_code]] = False
        stray = np.flatnonzero((data != _C) & ((data < _ZERO) | (data > _NINE)))
        is_valid[np.searchsorted(bounds, stray, side="right") - 1] = False
        kept = Ragged.from_lengths(
            codes[is_valid[row]].astype(np.int32), np.where(is_valid, counts, 0)
        )
        return ParsedSids(kept, is_valid)

    def spell(self, codes: Ragged) -> pa.Array:
        """Write n rows of codes as n texts; the inverse of `parse`."""
        level = np.arange(len(codes.values)) % len(self.sizes)
        tokens = pa.array(codes.values.astype(np.int64) + self.offsets[level]).cast(pa.string())
        words = pc.binary_join_element_wise("C", tokens, "")
        return pc.binary_join(pa.ListArray.from_arrays(_int32(codes.offsets), words), "")


def _bytes_of(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All bytes of a string column, and where each text begins and ends, ``[n + 1]``."""
    _, offsets, data = texts.cast(pa.string()).buffers()
    if not len(texts) or data is None:
        return np.empty(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    found = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    return found, (bounds - bounds[0]).astype(np.int64)


def _begin_with_c(data: NDArray[np.uint8], bounds: NDArray[np.int64]) -> NDArray[np.bool_]:
    is_empty = np.diff(bounds) == 0
    first = np.minimum(bounds[:-1], max(len(data) - 1, 0))
    return is_empty | (data[first] == _C if len(data) else is_empty)


def _numbers(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The numbers between two places, and whether each is spelled as we would spell it."""
    lengths = ends - starts
    values = np.zeros(len(starts), dtype=np.int64)
    for place in range(_DIGITS):
        inside = place < lengths
        digits = data[np.minimum(starts + place, len(data) - 1)].astype(np.int64) - _ZERO
        values = np.where(inside, values * 10 + digits, values)
    leading_zero = (lengths > 1) & (data[np.minimum(starts, len(data) - 1)] == _ZERO)
    return values, (lengths >= 1) & (lengths <= _DIGITS) & ~leading_zero


def _int32(offsets: NDArray[np.int64]) -> pa.Array:
    return pa.array(offsets.astype(np.int32))


def split_ids(texts: pa.Array, separator: str) -> pa.ListArray:
    """Split n texts without nulls into lists of ids; the empty text has none."""
    pieces = pc.split_pattern(texts, separator)
    counts = pc.list_value_length(pieces).to_numpy()
    lengths = np.where(pc.binary_length(texts).to_numpy() == 0, 0, counts)
    values = pieces.flatten().filter(pa.array(np.repeat(lengths > 0, counts)))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return pa.ListArray.from_arrays(_int32(offsets), values)


def join_ids(ids: pa.ListArray, separator: str) -> pa.Array:
    """Write lists of ids as texts; the inverse of `split_ids`."""
    return pc.binary_join(ids, separator)


def level_names(header: Sequence[str]) -> list[str]:
    """The columns of a header that hold codes, `…lv1`, `…lv2`, …, when they are all but the id."""
    numbers = range(1, len(header))
    found = [name for level in numbers for name in header if name.lower().endswith(f"lv{level}")]
    return found if found and found == list(header[1:]) else []
