"""The `.npz` files of SID training as a stream of typed batches.

Arrays are read a slice of rows at a time. The one exception is the dictionary from ids to rows,
which is a pickle: it is loaded whole, and only when the caller allows it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from forge_ray.data.al_gr.layouts import Layout, encoding_name
from forge_ray.data.al_gr.npz import CHUNK_BYTES, Header, header, read_header, slices
from forge_ray.data.al_gr.text_files import REJECTS_SCHEMA, Batch
from forge_ray.errors import ConfigError, DataError

_NO_REJECTS = REJECTS_SCHEMA.empty_table()


def read_archive(
    source: Any, layout: Layout, *, space: str, skip: int = 0, allow_pickle: bool = False
) -> Iterator[Batch]:
    """Stream an archive: vectors with their ids, then pairs and the dictionary where it has them.

    Args:
        source: the open file.
        layout: `pairs_npz` or `vectors_npz`.
        space: name of the vector space its vectors go to.
        skip: batches to pass over, as taken before.
        allow_pickle: whether the dictionary of a pairs file may be read.

    Raises:
        ConfigError: the file has a dictionary and that is not allowed.
        DataError: an array has another shape or type than the layout's.
    """
    with zipfile.ZipFile(source) as archive:
        batches = _batches(archive, layout, space, allow_pickle)
        for number, batch in enumerate(batches):
            if number >= skip:
                yield batch


def _batches(
    archive: zipfile.ZipFile, layout: Layout, space: str, allow_pickle: bool
) -> Iterator[Batch]:
    vectors = header(archive, "embeds")
    if len(vectors.shape) != 2 or vectors.dtype not in (np.float16, np.float32):
        raise _wrong(archive, "embeds", "float16 or float32 [N, D]", vectors)
    layout = replace(layout, dim=vectors.shape[1])
    if layout.kind == "vectors_npz":
        ids = header(archive, "ids")
        if ids.shape != vectors.shape[:1]:
            raise _wrong(archive, "ids", f"one id for each of {vectors.shape[0]} vectors", ids)
        yield from _vectors(archive, layout, space, slices(archive, "ids", vectors.rows_at_once))
        return
    encoding = _encoding(archive, layout, allow_pickle)
    rows = encoding["row"].to_numpy()
    if rows.max(initial=-1) >= vectors.shape[0] or rows.min(initial=0) < 0:
        raise _wrong(archive, "embeds", "a row for every id", vectors)
    yield from _vectors(archive, layout, space, _ids_by_row(encoding, vectors))
    for pairs in slices(archive, "pairs", CHUNK_BYTES // 16):
        if pairs.min(initial=0) < 0 or pairs.max(initial=-1) >= vectors.shape[0]:
            raise DataError(
                f"pairs must be rows of embeds, 0 to {vectors.shape[0] - 1}, got {pairs.min()} to "
                f"{pairs.max()}. Check the file."
            )
        table = pa.table({"anchor_row": pairs[:, 0], "positive_row": pairs[:, 1]})
        yield Batch(layout, f"pairs/{space}", table, _NO_REJECTS)
    yield Batch(layout, f"encoding/{space}", encoding, _NO_REJECTS)


def _vectors(
    archive: zipfile.ZipFile, layout: Layout, space: str, ids: Iterator[Any]
) -> Iterator[Batch]:
    rows = header(archive, "embeds").rows_at_once
    for vectors, some in zip(slices(archive, "embeds", rows), ids, strict=True):
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = pa.table({"item_id": some, "embedding": lists})
        yield Batch(layout, f"vectors/{space}", table, _NO_REJECTS)


def _encoding(archive: zipfile.ZipFile, layout: Layout, allow_pickle: bool) -> pa.Table:
    name = encoding_name(layout)
    if not allow_pickle:
        raise ConfigError(
            f"allow_pickle must be true to read {name} of {archive.filename or 'the file'}: it is "
            "a pickled dict. Set allow_pickle=true for files that you trust."
        )
    with archive.open(f"{name}.npy") as member:
        read_header(member)
        mapping = _Plain(member).load()
    if isinstance(mapping, np.ndarray):
        mapping = mapping.item()
    if not isinstance(mapping, dict):
        raise DataError(f"{name} must be a dict of id to row, got {type(mapping).__name__}.")
    ids = pa.array(list(mapping))
    rows = pa.array(np.fromiter(mapping.values(), dtype=np.int64, count=len(mapping)))
    return pa.table({"item_id": ids, "row": rows})


class _Plain(pickle.Unpickler):
    """Reads numbers, strings, dicts and arrays of them; refuses every other class."""

    _ALLOWED = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs")

    def find_class(self, module: str, name: str) -> Any:
        if module in self._ALLOWED and name in {
            "ndarray",
            "dtype",
            "_reconstruct",
            "scalar",
            "encode",
        }:
            return super().find_class(module, name)
        raise DataError(
            f"the pickled dict must hold ids and row numbers only, got {module}.{name}. "
            "Do not load this file."
        )


def _ids_by_row(encoding: pa.Table, vectors: Header) -> Iterator[pa.Array]:
    """The id of every row, a slice at a time; null for rows that no id names."""
    rows = encoding["row"].to_numpy()
    place = np.full(vectors.shape[0], -1, dtype=np.int64)
    place[rows[::-1]] = np.arange(len(rows) - 1, -1, -1)
    ids = encoding["item_id"].combine_chunks()
    for start in range(0, vectors.shape[0], vectors.rows_at_once):
        some = place[start : start + vectors.rows_at_once]
        yield ids.take(pa.array(some, mask=some < 0))


def _wrong(archive: zipfile.ZipFile, name: str, rule: str, found: Header) -> DataError:
    return DataError(
        f"{archive.filename or 'the archive'}: {name} must be {rule}, got {found.dtype} "
        f"{list(found.shape)}. Check the file."
    )
