"""FORGE's stages: train on some days, evaluate on the next, continue on the days that follow.

For every SID table and backbone, a chain of models over the stages of a temporal split, and beside
each stage a model that began afresh and took as many steps. All of it comes from the store when it
was computed before, so the same call continues after an interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from forge_ray.artifacts import Artifact, ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import config_hash, table_key
from forge_ray.gr.config import GrConfig, InitialConfig, ValidationConfig
from forge_ray.gr.models.base import GeneratorConfig
from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
from forge_ray.gr.source import ModelSource
from forge_ray.gr.train import TrainResult, train_generator
from forge_ray.gr.trials import fill_store
from forge_ray.sid.storage import load_table
from forge_ray.sid.table import SidTable

logger = logging.getLogger(__name__)

FORGE_KS = (20, 100, 500, 1000)


def _forge_evaluation() -> ModelEvaluationConfig:
    # FORGE leaves seen items in the lists; each day's users are its test.
    return ModelEvaluationConfig(split="test", ks=list(FORGE_KS), exclude_seen=False, bootstrap=0)


def _stage_training() -> GrConfig:
    # Weights are chosen by the rule of the evaluation above.
    return GrConfig(validation=ValidationConfig(exclude_seen=False))


@dataclass(kw_only=True)
class StagesConfig:
    """How the models of a chain are trained and measured."""

    train: GrConfig = field(default_factory=_stage_training)
    """Every training: of a stage that continues, and of one that begins afresh. By default its
    validation leaves seen items in the lists, as `evaluate` does."""
    backbones: dict[str, GeneratorConfig] = field(default_factory=dict)
    """Models to compare, by name, in the place of `train.model`; empty takes that alone."""
    evaluate: ModelEvaluationConfig = field(default_factory=_forge_evaluation)
    """Users of the days after each stage; by default those of FORGE's table, HR@20 to HR@1000."""
    scratch: bool = True
    """Also train every stage after the first from scratch, at equal steps."""
    parallel: int = 1
    """Chains and models from scratch that train at a time, as Ray Tune trials; 1 goes through them
    one after another."""

    def __post_init__(self) -> None:
        """Checks the range."""
        if self.parallel < 1:
            raise ConfigError(f"parallel must be >= 1, got {self.parallel}. Use 1 for no trials.")
        if self.train.initial != InitialConfig():
            raise ConfigError(
                f"train.initial must be left out, got {to_mapping(self.train.initial)}. The first "
                "stage and those from scratch begin afresh, the others with the stage before."
            )
        if self.backbones and self.train.model not in (GrConfig().model, *self.backbones.values()):
            raise ConfigError(
                f"train.model must be left out beside backbones, got {to_mapping(self.train.model)}"
                f" and {', '.join(self.backbones)}. Write it among backbones."
            )
        check_tasks(self.train)
        for model in self.models().values():
            # What a backbone cannot train on is refused before the first one is trained.
            replace(self.train, model=model).check_targets()

    def models(self) -> dict[str, GeneratorConfig]:
        """The backbones by name."""
        return dict(self.backbones) or {self.train.model.kind: self.train.model}


@dataclass(frozen=True)
class SidVariant:
    """A SID table that a chain is trained on; small when pickled, as trials and workers need it.

    Attributes:
        name: for people, and in names of runs.
        source: a stored table, or the absolute path of an `.npz` file that all nodes share.
        dataset: a stage of the log whose items it codes.
    """

    name: str
    source: Artifact | Path
    dataset: Dataset

    @cached_property
    def table(self) -> SidTable:
        """SIDs of the items that all stages share; each process opens its own."""
        return load_table(self.source, self.dataset)

    def __getstate__(self) -> dict[str, Any]:
        # Without the table once it is open: Ray refuses trials of 95 MiB, a catalogue of millions.
        return {one.name: getattr(self, one.name) for one in fields(self)}


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
        ConfigError: the datasets or tables speak of other items than the first stage, widths do not
            fit a table, or two chains have one name.
    """
    check_stages(stages, variants)
    _note_other_rule(config)
    for model in config.models().values():
        model.check_history(config.train.max_history)
    for variant in variants:
        config.train.check_levels(variant.table.num_levels)
        config.evaluate.check_levels(variant.table.num_levels, variant.table.num_items)
    chains = [
        _Chain(config, variant, backbone, model, stages, store, run_dir)
        for variant in variants
        for backbone, model in config.models().items()
    ]
    jobs = _all_jobs(chains)
    if config.parallel > 1:
        fill_store(
            jobs,
            parallel=config.parallel,
            cpus=config.train.own_cpus,
            folder=f"{run_dir}/tune",
        )
    rows: list[StageRow] = []
    for chain in chains:
        for row in chain.rows():
            rows.append(row)
            tell(row)
    return rows


def _note_other_rule(config: StagesConfig) -> None:
    trained, measured = config.train.validation.exclude_seen, config.evaluate.exclude_seen
    if trained != measured:
        logger.warning(
            "train.validation.exclude_seen should be evaluate.exclude_seen=%s, got %s: best "
            "checkpoints and train.stop.patience follow other figures than the table's. Set both.",
            *(str(one).lower() for one in (measured, trained)),
        )


def check_stages(stages: Sequence[Dataset], variants: Sequence[SidVariant]) -> None:
    """Refuses stages or tables of other items than those of the first stage.

    Raises:
        ConfigError: they do not fit together.
    """
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


def check_tasks(train: GrConfig) -> None:
    """Refuses trainings with a query set, which belongs to one stage, or on texts alone.

    Raises:
        ConfigError: a task of the mixture reads queries, or none asks for the next item.
    """
    if train.tasks.needs_queries:
        raise ConfigError(
            f"train.tasks must read no queries, got tasks.queries={train.tasks.queries!r}: a query "
            "set belongs to one stage. Train stage by stage with `forge-ray gr train`, "
            "initial.model and the stage's own queries."
        )
    train.tasks.check_validation()


def train_stage(
    config: GrConfig,
    dataset: Dataset,
    variant: SidVariant,
    *,
    store: ArtifactStore,
    run_dir: str,
    name: str,
) -> TrainResult:
    """Trains on one stage, or finds the model; other settings are other runs, in other folders.

    Args:
        config: of the training, with the model that it begins with.
        dataset: the stage.
        variant: SIDs of its items.
        store: keeps the model.
        run_dir: where checkpoints go.
        name: of the run, for people.
    """
    content = {
        "gr": config.identity(),
        "table": table_key(variant.table),
        "dataset": dataset.key,
    }
    run = f"{name}-{config_hash(content)[:8]}"
    logger.info("training %s", run)
    return train_generator(config, dataset, variant.table, store=store, run_dir=run_dir, name=run)


def _all_jobs(chains: Sequence[_Chain]) -> dict[str, Callable[[], object]]:
    """What the chains have to do, by name; refuses two of one name, in the table as in trials."""
    jobs: dict[str, Callable[[], object]] = {}
    for chain in chains:
        for name, job in chain.jobs().items():
            if name in jobs:
                raise ConfigError(
                    f"SID tables and backbones must have names of their own, got {name} twice. "
                    "Rename a file of --sids or a backbone."
                )
            jobs[name] = job
    return jobs


@dataclass(frozen=True)
class _Chain:
    """One SID table and one backbone through the stages."""

    config: StagesConfig
    variant: SidVariant
    backbone: str
    model: GeneratorConfig
    stages: Sequence[Dataset]
    store: ArtifactStore
    run_dir: str

    def rows(self) -> Iterator[StageRow]:
        """The lines of all stages, each continued one beside its fresh one."""
        for number, row in enumerate(self.continued(), start=1):
            yield row
            if self.config.scratch and number > 1:
                yield self.afresh(number)

    def jobs(self) -> dict[str, Callable[[], object]]:
        """What depends on nothing else, by name."""
        name = f"{self.variant.name}-{self.backbone}"
        found: dict[str, Callable[[], object]] = {name: self.follow}
        if self.config.scratch:
            for number in range(2, len(self.stages) + 1):
                found[f"{name}-s{number}-scratch"] = partial(self.afresh, number)
        return found

    def follow(self) -> None:
        """Trains and measures the continued models."""
        for _ in self.continued():
            pass

    def continued(self) -> Iterator[StageRow]:
        """Every stage from the model of the one before."""
        before: Artifact | None = None
        for number in range(1, len(self.stages) + 1):
            before = self._train(number, before)
            yield self._row(number, before, "continued")

    def afresh(self, number: int) -> StageRow:
        """A stage from scratch."""
        return self._row(number, self._train(number, None), "scratch")

    def _train(self, number: int, before: Artifact | None) -> Artifact:
        config = replace(self.config.train, model=self.model)
        if before is not None:
            config = replace(config, initial=InitialConfig(model=before.key))
        return train_stage(
            config,
            self.stages[number - 1],
            self.variant,
            store=self.store,
            run_dir=self.run_dir,
            name=f"{self.variant.name}-{self.backbone}-s{number}",
        ).artifact

    def _row(self, number: int, model: Artifact, training: str) -> StageRow:
        """The figures of a model on the days after a stage."""
        dataset = self.stages[number - 1]
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
