"""The untrained teacher: SVD of train co-occurrence. Deterministic, seconds at 1e5 items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from forge_ray.data.cooccurrence import window_counts
from forge_ray.data.ragged import Ragged
from forge_ray.embed.behaviour import behaviour_vectors
from forge_ray.embed.teachers.base import (
    FloatArray,
    TeacherConfig,
    TeacherReport,
    TeacherVectors,
    TrainLog,
    ignore_report,
    require_at_least,
)


@dataclass(kw_only=True)
class PpmiSvdConfig(TeacherConfig):
    """PPMI of co-occurrence, then a truncated SVD; a user is the mean of their items."""

    kind: Literal["ppmi_svd"] = "ppmi_svd"
    window: int = 3
    """Largest distance of two items in a history that counts as co-occurrence; 3 in the source."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_at_least({"window": self.window}, 1)

    def fit(self, log: TrainLog, *, report: TeacherReport = ignore_report) -> TeacherVectors:
        """Factor the co-occurrence of the log; see `embed.behaviour`.

        Args:
            log: train histories.
            report: called once, with the share of items that have a neighbour.

        Returns:
            Unit item vectors (zero without neighbours) of min(dim, N - 1) columns.
        """
        counts = window_counts([log.items], log.num_items, window=self.window)
        items = behaviour_vectors(counts, self.dim)
        metrics = {"items_with_neighbours": float((np.diff(counts.indptr) > 0).mean())}
        report(0, metrics)
        return TeacherVectors(items, mean_history(items, log.items), metrics)


def mean_history(items: FloatArray, histories: Ragged) -> FloatArray:
    """Average the vectors of each user's items.

    Args:
        items: float32 [N, t].
        histories: U rows of item indices.

    Returns:
        float32 [U, t]; zero rows for empty histories.
    """
    share = 1 / np.maximum(histories.lengths, 1).astype(np.float32)
    weights = np.repeat(share, histories.lengths)
    at = (histories.row_ids, histories.values.astype(np.int64))
    rows = sp.csr_array((weights, at), shape=(len(histories), len(items)))
    return np.asarray(rows @ items, dtype=np.float32)
