"""The sequential teacher: item vectors of a SASRec that saw the train part only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from forge_ray.embed.sasrec import SasRecConfig, fit_sasrec
from forge_ray.embed.teachers.base import (
    TeacherConfig,
    TeacherReport,
    TeacherVectors,
    TrainLog,
    ignore_report,
    unseen_to_zero,
)


@dataclass(kw_only=True)
class SasRecTeacherConfig(SasRecConfig, TeacherConfig):
    """SASRec's item embeddings, and its state after a user's train history.

    Source: the teacher of LETTER (arXiv 2405.07314), 32-d there.
    """

    kind: Literal["sasrec"] = "sasrec"

    def __post_init__(self) -> None:
        """Check ranges."""
        TeacherConfig.__post_init__(self)
        SasRecConfig.__post_init__(self)

    def fit(self, log: TrainLog, *, report: TeacherReport = ignore_report) -> TeacherVectors:
        """Train on the log; the epoch is chosen on users of the same log that are set aside.

        Args:
            log: train histories.
            report: called after every epoch.
        """
        epochs: list[Mapping[str, float]] = []

        def record(epoch: int, figures: Mapping[str, float]) -> None:
            epochs.append(figures)
            report(epoch, figures)

        model = fit_sasrec(self, log.items, log.num_items, report=record)
        items = model.items.weight.detach().cpu().numpy()
        best = max((row["mrr"] for row in epochs if "mrr" in row), default=float("nan"))
        return TeacherVectors(
            items=unseen_to_zero(items, log.item_counts()),
            users=model.user_vectors(log.items),
            metrics={"epochs": len(epochs), **({} if best != best else {"mrr": best})},
        )
