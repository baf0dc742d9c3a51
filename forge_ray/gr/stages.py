"""FORGE's stages: train on some days, evaluate on the next, continue on the days that follow.

For every SID table and backbone, a chain of models over the stages of a temporal split, and beside
each stage a model that began afresh and took as many steps. All of it comes from the store when it
was computed before, so the same call continues after an interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from forge_ray.artifacts import Artifact, ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import config_hash, table_key
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.base import GeneratorConfig
from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
from forge_ray.gr.source import ModelSource
from forge_ray.gr.train import train_generator
from forge_ray.sid.table import SidTable

logger = logging.getLogger(__name__)

FORGE_KS = (20, 100, 500, 1000)


def _forge_evaluation() -> ModelEvaluationConfig:
    # FORGE leaves seen items in the lists; each day's users are its test.
    return ModelEvaluationConfig(split="test", ks=list(FORGE_KS), exclude_seen=False, bootstrap=0)


@dataclass(kw_only=True)
class StagesConfig:
    """How the models of a chain are trained and measured."""

    train: GrConfig = field(default_factory=GrConfig)
    """Every training: of a stage that continues, and of one that begins afresh."""
    backbones: dict[str, GeneratorConfig] = field(default_factory=dict)
    """Models to compare, by name; empty takes `train.model` alone."""
    evaluate: ModelEvaluationConfig = field(default_factory=_forge_evaluation)
    """Users of the days after each stage; by default those of FORGE's table, HR@20 to HR@1000."""
    scratch: bool = True
    """Also train every stage after the first from scratch, at equal steps."""

    def models(self) -> dict[str, GeneratorConfig]:
        """The backbones by name."""
        return dict(self.backbones) or {self.train.model.kind: self.train.model}


@dataclass(frozen=True)
class SidVariant:
    """A SID table that a chain is trained on.

    Attributes:
        name: for people.
        table: SIDs of the items that all stages share.
        source: where a process that decodes reads it from.
    """

    name: str
    table: SidTable
    source: Artifact | Path


@dataclass(frozen=True)
class StageRow:
    """A line of the table.

    Attributes:
        stage: number from 1.
        sids: name of the SID table.
        backbone: name of the model's kind.
        training: `continued` from the stage before, or from `scratch`; a first stage is both.
        steps: optimiser steps on this stage.
        metrics: figures on the days after the stage.
        model: address of the model.
    """

    stage: int
    sids: str
    backbone: str
    training: str
    steps: int
    metrics: Mapping[str, float]
    model: str


def run_stages(
    stages: Sequence[Dataset],
    variants: Sequence[SidVariant],
    config: StagesConfig,
    *,
    store: ArtifactStore,
    run_dir: str,
    tell: Callable[[StageRow], None] = lambda row: None,
) -> list[StageRow]:
    """Train and evaluate every chain; Ray must be running.

    Args:
        stages: of one log, oldest first.
        variants: SID tables of its items.
        config: trainings and evaluation.
        store: keeps models and figures.
        run_dir: where checkpoints go; all nodes share it.
        tell: called with each line as it is known.

    Raises:
        ConfigError: the datasets or tables speak of other items than the first stage.
    """
    _check(stages, variants)
    rows: list[StageRow] = []
    for variant in variants:
        for backbone, model in config.models().items():
            chain = _Chain(config, variant, backbone, model, store, run_dir)
            before: Artifact | None = None
            for number, dataset in enumerate(stages, start=1):
                following = chain.train(number, dataset, before)
                rows.append(chain.row(number, dataset, following, "continued"))
                tell(rows[-1])
                if config.scratch and before is not None:
                    afresh = chain.train(number, dataset, None)
                    rows.append(chain.row(number, dataset, afresh, "scratch"))
                    tell(rows[-1])
                before = following
    return rows


def _check(stages: Sequence[Dataset], variants: Sequence[SidVariant]) -> None:
    for dataset in stages[1:]:
        if not dataset.has_items_of(stages[0]):
            raise ConfigError(
                f"stages must be cut from one log, got {stages[0].name} and {dataset.name}. "
                "Prepare them in one call with split.num_stages."
            )
    for variant in variants:
        if variant.table.num_items != stages[0].num_items:
            raise ConfigError(
                f"SID table {variant.name} must cover the {stages[0].num_items} items of "
                f"{stages[0].name}, got {variant.table.num_items}. Fit it on one of the stages."
            )


@dataclass(frozen=True)
class _Chain:
    """One SID table and one backbone through the stages."""

    config: StagesConfig
    variant: SidVariant
    backbone: str
    model: GeneratorConfig
    store: ArtifactStore
    run_dir: str

    def train(self, number: int, dataset: Dataset, before: Artifact | None) -> Artifact:
        """The model of a stage, from the one before or from scratch."""
        config = replace(self.config.train, model=self.model)
        if before is not None:
            config = replace(config, initial=replace(config.initial, model=before.key))
        name = f"{self.variant.name}-{self.backbone}-s{number}-{self._digest(config, dataset)}"
        logger.info("stage %d: training %s", number, name)
        result = train_generator(
            config,
            dataset,
            self.variant.table,
            store=self.store,
            run_dir=self.run_dir,
            name=name,
        )
        return result.artifact

    def _digest(self, config: GrConfig, dataset: Dataset) -> str:
        # Other settings are other runs, in folders of their own.
        content = {"gr": config.identity(), "table": table_key(self.variant.table)}
        return config_hash({**content, "dataset": dataset.key})[:8]

    def row(self, number: int, dataset: Dataset, model: Artifact, training: str) -> StageRow:
        """The figures of a model on the days after a stage."""
        source = ModelSource(model, self.variant.source, dataset)
        found = evaluate_model(
            source, dataset, self.config.evaluate, store=self.store, name=self.backbone
        )
        return StageRow(
            stage=number,
            sids=self.variant.name,
            backbone=self.backbone,
            training=training,
            steps=model.manifest.rows["steps"],
            metrics=found.metrics,
            model=model.manifest.ref,
        )
