"""Arrays in `.npz` archives as streams of row slices: NumPy alone would load each of them whole.

Knows NumPy's file format and nothing of what the arrays mean.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge_ray.errors import DataError

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and type of an array in an archive."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def rows_at_once(self) -> int:
        """Rows of some megabytes."""
        width = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        return max(1, CHUNK_BYTES // max(width, 1))


def header(archive: zipfile.ZipFile, name: str) -> Header:
    """Read the shape and type of one array."""
    with archive.open(f"{name}.npy") as member:
        return read_header(member)


def read_header(member: Any) -> Header:
    """Read the shape and type at the beginning of an open member."""
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, in_columns, dtype = read(member)
    if in_columns and len(shape) > 1:
        raise DataError("arrays of an .npz must lie row by row, got Fortran order. Save a copy.")
    return Header(shape, dtype)


def slices(archive: zipfile.ZipFile, name: str, rows_at_once: int) -> Iterator[NDArray[Any]]:
    """Stream the rows of one array."""
    with archive.open(f"{name}.npy") as member:
        found = read_header(member)
        width = int(np.prod(found.shape[1:])) * found.dtype.itemsize
        for start in range(0, found.shape[0], rows_at_once):
            rows = min(rows_at_once, found.shape[0] - start)
            raw = member.read(rows * width)
            yield np.frombuffer(raw, found.dtype).reshape(rows, *found.shape[1:])


def write_archive(stream: Any, arrays: Mapping[str, tuple[Header, Iterator[Any]]]) -> None:
    """Write an archive whose arrays come in slices.

    Args:
        stream: the open file.
        arrays: shape, type and slices by name, in the order of the file.
    """
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (shape, slices) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                for raw in _spelled(shape, slices):
                    member.write(raw)


def _spelled(shape: Header, slices: Iterator[Any]) -> Iterator[bytes]:
    if shape.dtype == object:
        buffer = io.BytesIO()
        whole = np.empty((), dtype=object)
        whole[()] = next(iter(slices))
        np.lib.format.write_array(buffer, whole, allow_pickle=True)
        yield buffer.getvalue()
        return
    start = io.BytesIO()
    described = np.lib.format.dtype_to_descr(shape.dtype)
    facts = {"descr": described, "fortran_order": False, "shape": shape.shape}
    np.lib.format.write_array_header_1_0(start, facts)
    yield start.getvalue()
    for rows in slices:
        yield np.ascontiguousarray(rows, dtype=shape.dtype).tobytes()
