"""What is in a prepared dataset: counts, lengths, popularity, cold items, tied times.

Streams the shards in this process, keeping histograms only; Ray is not needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Description:
    """Statistics of one dataset; histories and counts are those of the train part.

    Attributes:
        dataset: where it is.
        counts: rows by part, and rows skipped by cause.
        vector_dims: width by vector space.
        history_length: quantiles of the train items per user.
        item_count: quantiles of the train interactions per item.
        cold_share: share of items without a train interaction.
        top_percent_share: share of train interactions that go to the most popular 1 % of items.
        same_timestamp_share: share of consecutive train interactions at the very same time; their
            order carries no information.
        same_day_share: likewise on the same day.
        first_timestamp: earliest train time, in the log's own unit.
        last_timestamp: latest train time.
        items_per_pair_anchor: mean partners per item with pairs.
    """

    dataset: str
    counts: dict[str, int]
    vector_dims: dict[str, int]
    history_length: dict[str, float]
    item_count: dict[str, float]
    cold_share: float
    top_percent_share: float
    same_timestamp_share: float
    same_day_share: float
    first_timestamp: int
    last_timestamp: int
    items_per_pair_anchor: float

    def to_rows(self) -> list[dict[str, Any]]:
        """Flat records `statistic`, `value`, for a table."""
        rows = []
        for name, value in asdict(self).items():
            group = value if isinstance(value, dict) else {"": value}
            rows += [
                {"statistic": f"{name}.{key}" if key else name, "value": one}
                for key, one in group.items()
            ]
        return rows


@dataclass(slots=True)
class _Times:
    """Running counts over the train shards."""

    lengths: NDArray[np.int64]
    steps: int = 0
    same_time: int = 0
    same_day: int = 0
    first: int = np.iinfo(np.int64).max
    last: int = np.iinfo(np.int64).min

    def add(self, times: Ragged, ticks_per_day: int) -> None:
        """Count one batch of users."""
        found = np.bincount(times.lengths)
        self.lengths = np.bincount(
            np.concatenate([np.arange(len(self.lengths)), np.arange(len(found))]),
            weights=np.concatenate([self.lengths, found]),
        ).astype(np.int64)
        if not len(times.values):
            return
        inside = np.diff(times.row_ids) == 0
        days = times.values // ticks_per_day
        self.steps += int(inside.sum())
        self.same_time += int((inside & (np.diff(times.values) == 0)).sum())
        self.same_day += int((inside & (np.diff(days) == 0)).sum())
        self.first = min(self.first, int(times.values.min()))
        self.last = max(self.last, int(times.values.max()))


def describe(dataset: Dataset) -> Description:
    """Compute the statistics of a dataset in one pass over its train shards."""
    times = _Times(np.zeros(1, dtype=np.int64))
    ticks_per_day = int(dataset.artifact.manifest.metrics["ticks_per_day"])
    for path in dataset.sequence_files("train"):
        with dataset.filesystem.open_input_file(path) as source:
            for batch in pq.ParquetFile(source).iter_batches(columns=["timestamps"]):
                times.add(Ragged.from_arrow(batch.column("timestamps")), ticks_per_day)
    counts = np.sort(dataset.train_counts())
    top = counts[-max(1, len(counts) // 100) :]
    anchors = len(np.unique(dataset.pairs().anchor))
    return Description(
        dataset=dataset.artifact.uri,
        counts=dataset.rows,
        vector_dims={space: dataset.vector_dim(space) for space in dataset.spaces},
        history_length=_histogram_quantiles(times.lengths),
        item_count=_quantiles(counts),
        cold_share=float((counts == 0).mean()),
        top_percent_share=float(top.sum() / max(counts.sum(), 1)),
        same_timestamp_share=times.same_time / max(times.steps, 1),
        same_day_share=times.same_day / max(times.steps, 1),
        first_timestamp=times.first,
        last_timestamp=times.last,
        items_per_pair_anchor=dataset.rows["pairs"] / max(anchors, 1),
    )


def _quantiles(values: NDArray[np.int64]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES, method="lower")
    return _named(found) | {"mean": float(values.mean())}


def _histogram_quantiles(histogram: NDArray[np.int64]) -> dict[str, float]:
    """Quantiles of values given as counts of 0, 1, 2, …; the same rule as `_quantiles`."""
    total = int(histogram.sum())
    places = np.floor(np.array(QUANTILES) * (total - 1)).astype(np.int64)
    found = np.searchsorted(np.cumsum(histogram), places, side="right")
    mean = float((histogram * np.arange(len(histogram))).sum() / max(total, 1))
    return _named(found) | {"mean": mean}


def _named(found: NDArray[Any]) -> dict[str, float]:
    return {f"p{100 * q:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)}
