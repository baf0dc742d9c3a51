"""Item-level side information: small categorical columns of the items table, as codes.

Knows Arrow columns; it knows nothing about how the codes are embedded (`adapter.py`).

Source: FORGE (arXiv 2509.20904) feeds learned embeddings of a few categorical item fields to its
multimodal encoder. Where we differ: ours are added to the item's vector, since the encoder is not
part of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, DataError

MAX_VALUES = 65_536
"""Distinct values a side column may have: each becomes a vector of the items' width."""

_CATEGORICAL = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_boolean,
)


@dataclass(frozen=True, eq=False)
class SideColumn:
    """The values of one column for every item."""

    name: str
    codes: Ragged
    """N rows of int64 codes 0..num_values-1: one for a plain column, none where the value is
    missing, several where the column holds lists."""
    num_values: int


def read_side(dataset: Dataset, columns: Sequence[str]) -> list[SideColumn]:
    """Load side columns; 16 bytes per item and column beside the column itself.

    Raises:
        ConfigError: when a column does not exist or has too many values.
        DataError: when a column holds no categories.
    """
    files = dataset.artifact.files("items/")
    known = pq.read_schema(files[0], filesystem=dataset.filesystem).names
    missing = [name for name in columns if name not in known or name == "item_index"]
    if missing:
        choices = [name for name in known if name not in ("item_index", "item_id")]
        raise ConfigError(
            f"vectors.side must name columns of the items ({', '.join(choices) or 'none'}), "
            f"got {missing[0]!r}. Add the column to the items and prepare again."
        )
    table = dataset.items(columns)
    return [encode_column(name, table[name]) for name in columns]


def encode_column(name: str, column: pa.ChunkedArray) -> SideColumn:
    """Number the distinct values of a column in sorted order.

    Args:
        name: for messages.
        column: N strings, integers or booleans, or lists of them; null means no value.
    """
    array = column.combine_chunks()
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    values = array.flatten() if is_list else array
    if not any(check(values.type) for check in _CATEGORICAL):
        raise DataError(
            f"vectors.side column {name!r} must hold strings, integers or booleans (or lists of "
            f"them), got {array.type}. Bin the values before `forge-ray data prepare`."
        )
    distinct = values.unique().drop_null()
    distinct = distinct.take(pc.array_sort_indices(distinct))
    if len(distinct) > MAX_VALUES:
        raise ConfigError(
            f"vectors.side column {name!r} must have at most {MAX_VALUES} distinct values, got "
            f"{len(distinct)}. Use a coarser column."
        )
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy() if is_list else None
    rows = np.ones(len(array), np.int64) if lengths is None else lengths.astype(np.int64)
    codes = pc.index_in(values.drop_null(), distinct).to_numpy().astype(np.int64)
    everything = np.zeros(len(values), dtype=np.int64)
    present = values.is_valid().to_numpy(zero_copy_only=False)
    everything[present] = codes
    return SideColumn(name, Ragged.from_lengths(everything, rows).filter(present), len(distinct))
