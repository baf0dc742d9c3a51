"""A published model on a split of its dataset, computed once.

What `gr eval` and the end of a sweep call. The users are streamed by the one evaluator of all
rankers; a process holds the SID codes, the model and one part of users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.evaluator import Evaluation, evaluated
from forge_ray.gr.beam import default_widths
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.evaluation import MAKES_ROOM, SidRanker
from forge_ray.gr.source import GeneratorSource


@dataclass(kw_only=True)
class ModelEvaluationConfig(EvaluationConfig):
    """How a model decodes the users of an evaluation."""

    widths: list[int] | None = None
    """Beams to keep after each level; by default wide enough for the largest cut-off, with room at
    the last level for the seen items of long histories.
    """
    constrained: bool = True
    """Whether the prefix index is on; off shows how many invalid SIDs the model would emit."""
    batch_users: int = 32
    """Users per search; raise it on a GPU."""
    device: str = "cpu"
    """torch device that decodes, e.g. `cuda`."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.batch_users < 1:
            raise ConfigError(f"batch_users must be >= 1, got {self.batch_users}. Raise it.")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(
                f"device must be one of torch's, got {self.device!r}. Use cpu or cuda."
            ) from error

    def check_levels(self, num_levels: int, num_items: int) -> None:
        """Refuses widths that do not fit a SID table, before anything is trained or decoded.

        Args:
            num_levels: of the table.
            num_items: of the table, which need no more beams.

        Raises:
            ConfigError: another number of levels, or a last one narrower than the lists.
        """
        widths, most = self.widths, min(max(self.ks), num_items)
        if widths and (len(widths) != num_levels or min(widths) < 1 or widths[-1] < most):
            raise ConfigError(
                f"widths must be {num_levels} integers >= 1, one per level of the SID table, and "
                f"end in at least max(ks)={max(self.ks)} or {num_items} items, got {widths}. "
                "Leave it out for the default."
            )

    def identity(self) -> dict[str, Any]:
        """The fields beside `common` that decide a model's figures."""
        given = to_mapping(self)
        kept = {name: given[name] for name in ("widths", "constrained")}
        return {**kept, "makes_room": MAKES_ROOM if self.makes_room else False}

    @property
    def makes_room(self) -> bool:
        """Whether rankings grow with the seen items that are taken out of them."""
        return self.exclude_seen and self.constrained and not self.widths


@dataclass(frozen=True)
class OpenModel:
    """Opens a model as a ranker, in the process that decodes."""

    source: GeneratorSource
    dataset: Dataset
    config: ModelEvaluationConfig
    reads_queries: bool = True

    def __call__(self) -> SidRanker:
        """Read the weights and index the table."""
        config = self.config
        if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device must be one that this machine has, got {config.device!r}. Use cpu."
            )
        loaded = self.source.load(config.device)
        widths = config.widths or default_widths(loaded.table.num_levels, max_k=max(config.ks))
        decoder = SidDecoder(
            loaded.generator,
            loaded.table,
            widths=widths,
            max_history=loaded.max_history,
            batch_users=config.batch_users,
            fills=max(config.ks) if config.makes_room else 0,
            constrained=config.constrained,
            text=loaded.text,
            prompts=loaded.prompts,
            device=config.device,
        )
        return SidRanker(
            decoder,
            train_counts=self.dataset.train_counts(),
            ks=config.ks,
            exclude_seen=config.exclude_seen,
            reads_queries=self.reads_queries,
        )


def evaluate_model(
    source: GeneratorSource,
    dataset: Dataset,
    config: ModelEvaluationConfig,
    *,
    store: ArtifactStore,
    name: str = "model",
    queries: QuerySet | None = None,
    reads_queries: bool = True,
) -> Evaluation:
    """Item-level figures of a model, from the store when they were computed before.

    Args:
        source: the model.
        dataset: the dataset that its SID table belongs to.
        config: which users and how; with more than one worker Ray must be up.
        store: where the result is kept, as an artifact of kind `evaluation`.
        name: of the artifact.
        queries: a query set of the dataset, to rank for its rows instead of the users.
        reads_queries: False ranks for those rows by their histories alone.

    Raises:
        ConfigError: the queries belong to another dataset, or the model did not learn to be asked
            so.
    """
    is_asked = queries is not None and reads_queries
    source.prompts.check(has_queries=is_asked)
    identity = config.identity() | source.prompts.identity(has_queries=is_asked)
    if queries is not None:
        queries.check_dataset(dataset)
        identity |= {"reads_queries": reads_queries}
    return evaluated(
        name,
        lambda: OpenModel(source, dataset, config, reads_queries),
        queries or dataset,
        config,
        identity=identity,
        parents=(source.key,),
        store=store,
        gpus_per_worker=1.0 if config.device.startswith("cuda") else 0.0,
    )
