"""Vectors as base64 of little-endian float32, read and written many rows at a time.

Knows bytes only. A text is valid only if encoding its vector gives the same text back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_ALPHABET = np.frombuffer(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", np.uint8
)
_INVALID = 255
_VALUES = np.full(256, _INVALID, dtype=np.uint8)
_VALUES[_ALPHABET] = np.arange(64, dtype=np.uint8)
_PAD = ord("=")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Vectors of n texts.

    Attributes:
        vectors: ``[m, D]`` float32 of the valid texts.
        has_length: ``[n]`` texts as long as D numbers are.
        is_base64: ``[n]`` texts of that length that are canonical base64.
    """

    vectors: NDArray[np.float32]
    has_length: NDArray[np.bool_]
    is_base64: NDArray[np.bool_]


def text_length(dim: int) -> int:
    """Characters of a vector of ``dim`` numbers."""
    return -(-4 * dim // 3) * 4


def usual_dim(texts: pa.Array) -> int:
    """The width D of most texts; 0 if no length fits whole numbers."""
    lengths, counts = np.unique(pc.binary_length(texts).to_numpy(), return_counts=True)
    length = int(lengths[np.argmax(counts)]) if len(lengths) else 0
    dim = length // 4 * 3 // 4
    return dim if dim and text_length(dim) == length else 0


def decode_vectors(texts: pa.Array, dim: int) -> Decoded:
    """Read n texts without nulls as vectors of ``dim`` numbers."""
    has_length = pc.binary_length(texts).to_numpy() == text_length(dim)
    sized = texts.filter(pa.array(has_length))
    letters = _letters(sized, text_length(dim))
    padding = text_length(dim) * 3 // 4 - 4 * dim
    sextets = _VALUES[letters]
    if padding:
        sextets[:, -padding:] = np.where(letters[:, -padding:] == _PAD, 0, _INVALID)
    is_letter = (sextets != _INVALID).all(axis=1)
    four = sextets.reshape(len(sextets), text_length(dim) // 4, 4)
    octets = np.empty((*four.shape[:2], 3), dtype=np.uint8)
    octets[..., 0] = (four[..., 0] << 2) | (four[..., 1] >> 4)
    octets[..., 1] = (four[..., 1] << 4) | (four[..., 2] >> 2)
    octets[..., 2] = (four[..., 2] << 6) | four[..., 3]
    flat = octets.reshape(len(four), four.shape[1] * 3)
    # Bits beyond the last number would be lost; no encoder sets them.
    good = is_letter & ~flat[:, 4 * dim :].any(axis=1)
    is_base64 = np.zeros(len(texts), dtype=bool)
    is_base64[np.flatnonzero(has_length)[good]] = True
    vectors = np.ascontiguousarray(flat[good, : 4 * dim]).view("<f4").astype(np.float32, copy=False)
    return Decoded(vectors.reshape(-1, dim), has_length, is_base64)


def encode_vectors(vectors: NDArray[np.float32]) -> pa.Array:
    """Write vectors ``[n, D]`` as texts; the inverse of `decode_vectors`."""
    count, dim = vectors.shape
    raw = np.ascontiguousarray(vectors, dtype="<f4").view(np.uint8).reshape(count, 4 * dim)
    padding = -raw.shape[1] % 3
    three = np.pad(raw, ((0, 0), (0, padding))).reshape(count, (4 * dim + padding) // 3, 3)
    four = np.empty((*three.shape[:2], 4), dtype=np.uint8)
    four[..., 0] = three[..., 0] >> 2
    four[..., 1] = ((three[..., 0] & 3) << 4) | (three[..., 1] >> 4)
    four[..., 2] = ((three[..., 1] & 15) << 2) | (three[..., 2] >> 6)
    four[..., 3] = three[..., 2] & 63
    letters = _ALPHABET[four.reshape(count, four.shape[1] * 4)]
    if padding:
        letters[:, -padding:] = _PAD
    return _texts(letters)


def _letters(texts: pa.Array, length: int) -> NDArray[np.uint8]:
    """The bytes ``[n, length]`` of texts of one length."""
    _, offsets, data = texts.buffers()
    if not len(texts) or data is None:
        return np.empty((0, length), np.uint8)
    first = int(np.frombuffer(offsets, np.int32)[texts.offset])
    flat = np.frombuffer(data, np.uint8)[first : first + len(texts) * length]
    return flat.reshape(len(texts), length)


def _texts(letters: NDArray[np.uint8]) -> pa.Array:
    offsets = np.arange(len(letters) + 1, dtype=np.int32) * letters.shape[1]
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(letters))]
    return pa.StringArray.from_buffers(len(letters), buffers[1], buffers[2])
