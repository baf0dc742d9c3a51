"""A published model on a split of its dataset, computed once.

What `gr eval` and the end of a sweep call. Streams the held-out users; holds the SID codes, one
batch of users and running sums.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping
from forge_ray.data.schema import SPLITS, Dataset
from forge_ray.errors import ConfigError
from forge_ray.gr.beam import default_widths
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.evaluation import DEFAULT_KS, Evaluator
from forge_ray.gr.source import GeneratorSource

logger = logging.getLogger(__name__)

KIND = "evaluation"
_STREAM_ROWS = 2048


@dataclass(kw_only=True)
class EvaluationConfig:
    """Which users are decoded and how their lists are scored."""

    split: str = "validation"
    """`validation`, or `test` once a design is final."""
    ks: list[int] = field(default_factory=lambda: list(DEFAULT_KS))
    """Cut-offs."""
    widths: list[int] | None = None
    """Beams to keep after each level; by default wide enough for the largest cut-off."""
    users: int | None = None
    """Decode this many users, a fixed random sample; by default all."""
    exclude_seen: bool = True
    """Whether items of the history are kept out of the lists."""
    constrained: bool = True
    """Whether the prefix index is on; off shows how many invalid SIDs the model would emit."""
    batch_users: int = 32
    """Users per search; raise it on a GPU."""
    device: str = "cpu"
    """torch device that decodes, e.g. `cuda`."""

    def __post_init__(self) -> None:
        """Check the values."""
        if self.split not in SPLITS[1:]:
            raise ConfigError(
                f"split must be validation or test, got {self.split!r}. Name one of them."
            )
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"ks must be cut-offs >= 1, got {self.ks}. Use e.g. [5, 10, 20].")
        if self.users is not None and self.users < 1:
            raise ConfigError(f"users must be >= 1, got {self.users}. Leave it out for all users.")


def evaluate_model(
    source: GeneratorSource,
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    store: ArtifactStore,
    name: str = "model",
) -> dict[str, float]:
    """Item-level metrics of a model, from the store when they were computed before.

    Args:
        source: the model.
        dataset: the dataset that its SID table belongs to.
        config: which users and how.
        store: where the result is kept, as an artifact of kind `evaluation`.
        name: of the artifact.

    Returns:
        See `Evaluator.summary`.
    """

    def produce(_: ArtifactWriter) -> ArtifactInfo:
        metrics = measure(source, dataset, config)
        return ArtifactInfo(rows={"users": int(metrics["users"])}, metrics=metrics)

    given = to_mapping(config)
    decisive = {key: given[key] for key in given if key not in ("batch_users", "device")}
    parents = (source.key, dataset.key)
    artifact = store.build(
        KIND, f"{name}-{config.split}", decisive, parents=parents, produce=produce
    )
    return dict(artifact.manifest.metrics)


def measure(
    source: GeneratorSource, dataset: Dataset, config: EvaluationConfig
) -> dict[str, float]:
    """Compute what `evaluate_model` caches."""
    loaded = source.load(config.device)
    widths = config.widths or default_widths(loaded.table.num_levels, max_k=max(config.ks))
    decoder = SidDecoder(
        loaded.generator,
        loaded.table,
        widths=widths,
        max_history=loaded.max_history,
        batch_users=config.batch_users,
        constrained=config.constrained,
        device=config.device,
    )
    evaluator = Evaluator(
        decoder,
        train_counts=dataset.train_counts(),
        ks=config.ks,
        exclude_seen=config.exclude_seen,
    )
    split: Any = config.split
    done = 0
    for batch in dataset.sequence_batches(split, batch_rows=_STREAM_ROWS, limit=config.users):
        assert batch.targets is not None  # held-out splits always have targets
        evaluator.add(batch.items, batch.targets)
        done += len(batch)
        logger.info("evaluated %d users of %s", done, config.split)
    return evaluator.summary()
