"""`sasrec`: the sequential baseline, with full cross-entropy and its epoch chosen on validation.

Trained once for a dataset and configuration, on the train part alone; the epoch is chosen by
ItemNDCG@10 of validation users. Scores every item of the catalogue for a block of users at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.embed.sasrec import SasRec, SasRecConfig, fit_sasrec
from forge_ray.embed.teachers.artifact import train_log
from forge_ray.embed.teachers.base import TrainLog
from forge_ray.embed.teachers.ppmi_svd import PpmiSvdConfig
from forge_ray.errors import ConfigError
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.evaluator import Evaluation
from forge_ray.evaluate.floors import BASELINE_KIND, evaluate_lists, validation_figure

logger = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_BLOCK_SCORES = 1 << 23
"""(user, item) scores held at a time: 32 MB, and as much again while they are sorted."""


@dataclass(kw_only=True)
class SasRecBaselineConfig(SasRecConfig):
    """SASRec as a row of the table; its epoch, not its shape, is chosen on validation."""

    dim: int = 128
    dropout: float = 0.5
    holdout_share: float = 0.0
    """0 chooses the epoch on the validation split; more, on that share of the train users."""
    validation_users: int = 5000
    """Validation users that choose the epoch, a fixed random sample."""
    warm_start: float = 1.0
    """Length of the PPMI-SVD vectors, counted on the train part, that item embeddings start from;
    0 starts at random.
    """
    max_users: int = 1_000_000
    """Most train users read, a random sample beyond it; 12 bytes per interaction are held."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        for name in ("validation_users", "max_users"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"sasrec.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )
        if self.warm_start < 0:
            raise ConfigError(
                f"sasrec.warm_start must be >= 0, got {self.warm_start}. Use 0 for random starts."
            )


@dataclass(frozen=True)
class SasRecRecommender:
    """A trained SASRec that lists items."""

    model: SasRec

    def recommend(
        self, histories: Ragged, k: int, *, exclude_seen: bool = True
    ) -> npt.NDArray[np.int64]:
        """List the k best items of each user.

        Args:
            histories: U rows of item indices, oldest first.
            k: length of the lists.
            exclude_seen: whether items of the history are kept out.

        Returns:
            int64 [U, k], −1 where the catalogue is exhausted.
        """
        lists = np.full((len(histories), k), -1, dtype=np.int64)
        num_items = self.model.items.num_embeddings
        step = max(1, _BLOCK_SCORES // num_items)
        for start in range(0, len(histories), step):
            rows = np.arange(start, min(start + step, len(histories)))
            block = histories.take(rows)
            scores = torch.from_numpy(self.model.score_all_items(block))
            if exclude_seen:
                scores[block.row_ids, block.values.astype(np.int64)] = -torch.inf
            best, items = scores.topk(min(k, num_items), dim=1)
            lists[rows, : items.shape[1]] = torch.where(best.isneginf(), -1, items).numpy()
        return lists


def evaluate_sasrec(
    dataset: Dataset, config: EvaluationConfig, sasrec: SasRecBaselineConfig, store: ArtifactStore
) -> Evaluation:
    """Figures of SASRec, which is trained unless the store holds it.

    Args:
        dataset: a prepared dataset.
        config: which users and how.
        sasrec: model and training.
        store: keeps the model and the result.
    """
    artifact = train_sasrec(dataset, sasrec, store, exclude_seen=config.exclude_seen)
    return evaluate_lists(
        "sasrec",
        lambda: SasRecRecommender(load_sasrec(artifact, dataset, sasrec)),
        dataset,
        config,
        store,
        identity={},
        parents=(artifact.key,),
    )


def train_sasrec(
    dataset: Dataset,
    config: SasRecBaselineConfig,
    store: ArtifactStore,
    *,
    exclude_seen: bool = True,
) -> Artifact:
    """The trained model as an artifact of kind `baseline`; its curve is among the metrics.

    Args:
        dataset: the train part is fitted, the validation part chooses the epoch.
        config: model and training.
        store: keeps the artifact.
        exclude_seen: whether the lists that choose the epoch leave items of the history out.
    """

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        started = monotonic()
        curve: list[dict[str, float]] = []

        def record(epoch: int, figures: Mapping[str, float]) -> None:
            curve.append({"epoch": epoch, **figures, "seconds": round(monotonic() - started, 1)})
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            logger.info("sasrec on %s, epoch %d: %s", dataset.name, epoch, shown)

        log = train_log(dataset, max_users=config.max_users)
        figure = validation_figure(
            dataset, users=config.validation_users, exclude_seen=exclude_seen
        )
        model = fit_sasrec(
            config,
            log.items,
            log.num_items,
            report=record,
            judge=lambda one: figure(SasRecRecommender(one)),
            start=start_vectors(log, config) if config.warm_start else None,
        )
        with writer.local_path(_WEIGHTS) as path:
            save_file({n: t.cpu().contiguous() for n, t in model.state_dict().items()}, path)
        metrics: dict[str, Any] = {"curve": curve, "seconds_fit": round(monotonic() - started, 1)}
        return ArtifactInfo(rows={"users": len(log), "items": log.num_items}, metrics=metrics)

    return store.build(
        BASELINE_KIND,
        f"{dataset.name}-sasrec",
        {
            "kind": "sasrec",
            **to_mapping(config),
            **({} if exclude_seen else {"exclude_seen": False}),
        },
        parents=(dataset.key,),
        produce=produce,
    )


def start_vectors(log: TrainLog, config: SasRecBaselineConfig) -> npt.NDArray[np.float32]:
    """PPMI-SVD vectors of the items, of the configured length; zero for items without neighbours.

    Args:
        log: train histories.
        config: width D and length are read.

    Returns:
        float32 [N, D]; columns beyond N − 1 are zero.
    """
    found = PpmiSvdConfig(dim=config.dim).fit(log).items
    rows = np.zeros((log.num_items, config.dim), dtype=np.float32)
    rows[:, : found.shape[1]] = found
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(config.warm_start * rows / np.maximum(norms, 1e-12), dtype=np.float32)


def load_sasrec(artifact: Artifact, dataset: Dataset, config: SasRecBaselineConfig) -> SasRec:
    """Read a trained model onto the CPU.

    Args:
        artifact: from `train_sasrec`.
        dataset: what it was trained on.
        config: with which settings.
    """
    model = SasRec(dataset.num_items, config)
    model.load_state_dict(load_file(artifact.local(_WEIGHTS)))
    return model.eval()
