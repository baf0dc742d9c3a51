"""SIDs that came with the items: columns of codes in a dataset's catalogue as a foreign table.

FORGE publishes its SIDs so (`codebook_lv1`, `codebook_lv2`, …). Knows the items table and the
`.npz` layout that every command takes for a SID table. Memory: 8 bytes for each code of every item,
and the ids of all items as Python strings and as text of fixed width, 4 bytes a letter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from forge_ray.data.schema import Dataset
from forge_ray.errors import DataError
from forge_ray.sid.table import SidTable

_LEVEL = re.compile(r"lv(\d+)$")


def code_columns(dataset: Dataset) -> list[str]:
    """Names of the columns of codes, first level first: those that end in `lv` and a number.

    Raises:
        DataError: there are none, or two of one level.
    """
    names = dataset.item_columns()
    levels = {name: int(found[1]) for name in names if (found := _LEVEL.search(name))}
    if not levels or sorted(levels.values()) != list(range(1, len(levels) + 1)):
        raise DataError(
            f"items of {dataset.name} must have one column of codes per level (…lv1, …lv2, …), got "
            f"{names}. Name the columns with --column, first level first."
        )
    return sorted(levels, key=lambda name: levels[name])


def table_of_columns(
    dataset: Dataset, columns: Sequence[str], codebook_sizes: Sequence[int] = ()
) -> SidTable:
    """Read codes out of the items.

    Args:
        dataset: with the columns in its catalogue.
        columns: one per level, first level first.
        codebook_sizes: codes available at each level; by default as in `SidTable.from_npz`.

    Raises:
        DataError: a column is missing or no whole number, an item lacks a code, or a code does not
            fit its codebook.
    """
    missing = [name for name in columns if name not in dataset.item_columns()]
    if missing:
        raise DataError(
            f"items of {dataset.name} must have columns {list(columns)}, got no {missing} among "
            f"{dataset.item_columns()}. Correct --column."
        )
    codes = np.stack([_codes_in(dataset, name) for name in columns], axis=1)
    sizes = codebook_sizes or SidTable.foreign_sizes(np.maximum(codes, 0))
    return SidTable.from_codes(codes, sizes, resolver="foreign:columns")


def write_npz(path: Path, table: SidTable, dataset: Dataset) -> None:
    """Write a table of a dataset's items as `codes` [N, L], `item_id` [N] and `codebook_sizes` [L].

    The version of an AL-GR dataset comes along as `al_gr_version`, and `require_version` reads it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "codes": table.codes,
        "item_id": dataset.item_ids().astype(str),
        "codebook_sizes": np.array(table.codebook_sizes, dtype=np.int64),
    }
    if dataset.al_gr_version:
        arrays["al_gr_version"] = np.array(dataset.al_gr_version)
    partial = path.with_name(f"{path.name}.new")
    with partial.open("wb") as stream:
        np.savez(stream, **arrays)
    os.replace(partial, path)


def require_version(path: Path, dataset: Dataset) -> None:
    """Check that a readable `.npz` table is of the dataset's version of AL-GR, where both have one.

    Raises:
        DataError: it is of the other version.
    """
    with np.load(path, allow_pickle=False) as arrays:
        version = str(arrays["al_gr_version"]) if "al_gr_version" in arrays else ""
    if version and dataset.al_gr_version and version != dataset.al_gr_version:
        raise DataError(
            f"{path} must be of AL-GR's version {dataset.al_gr_version} as {dataset.name}, got "
            f"{version}. SIDs of one version mean nothing to the rows of the other: take the table "
            "of this dataset."
        )


def _codes_in(dataset: Dataset, name: str) -> npt.NDArray[np.int64]:
    column = dataset.items([name])[name].combine_chunks()
    try:
        codes = column.cast(pa.int64())
    except pa.ArrowException as error:
        raise DataError(
            f"column {name} of {dataset.name}'s items must hold whole numbers, got "
            f"{' '.join(str(error).split())[:120]}. Name the columns of codes with --column."
        ) from error
    if codes.null_count:
        first = dataset.items(["item_id"])["item_id"].filter(pc.is_null(codes))[0].as_py()
        raise DataError(
            f"column {name} of {dataset.name}'s items must hold a code of every item, got none of "
            f"{first!r} ({codes.null_count} such items). Prepare the data with "
            f"'items.required=[{name}]' 'skip=[missing_attribute]' to leave such items out."
        )
    return np.asarray(codes.to_numpy())
