"""Configuration of a generator training: what decides the model, and what only runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forge_ray.config import to_mapping
from forge_ray.data.examples import BatchPlan
from forge_ray.data.stream import StreamConfig
from forge_ray.errors import ConfigError
from forge_ray.gr.engine import EngineConfig
from forge_ray.gr.health import StopConfig
from forge_ray.gr.models.base import GeneratorConfig
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.parallel_heads import ParallelHeadsConfig
from forge_ray.gr.models.pretrained_decoder import PretrainedDecoderConfig
from forge_ray.gr.models.pretrained_t5 import PretrainedT5Config
from forge_ray.gr.models.rq_transformer import RqTransformerConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.gr.tasks import ITEM_TASK, TASKS, TasksConfig

ARCHITECTURES = (
    DecoderConfig,
    T5Config,
    PretrainedDecoderConfig,
    PretrainedT5Config,
    ParallelHeadsConfig,
    RqTransformerConfig,
)
"""Imported here so that every kind is registered wherever a configuration is read."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Decoding of validation users during training."""

    every: int = 250
    """Steps between validations; each one writes a checkpoint."""
    users: int = 1000
    """Validation users decoded, the same ones every time."""
    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Cut-offs of ItemHit@k and ItemNDCG@k; must hold 10, which picks the best checkpoint."""
    widths: list[int] = field(default_factory=list)
    """Beams kept after each level; empty takes as many as the largest of `ks` and at least 50, and
    twice as many at the last level."""
    exclude_seen: bool = True
    """Whether items of the history are kept out of the lists, so that a target among them is a
    miss. False where users come back to items, and where that is how the model will be judged."""
    batch_users: int = 32
    """Users per search."""
    aside: bool = True
    """Whether a process of its own decodes while training goes on; otherwise rank 0 does and the
    others wait. Training waits at the next validation point at the latest."""
    cpus: float = 0.0
    """CPUs reserved for that process, and its thread count. 0 reserves nothing and shares a core;
    a reservation that the cluster cannot give leaves the decoding to rank 0."""
    gpus: float = 0.0
    """GPUs reserved for that process; 0 decodes on the CPU."""

    def __post_init__(self) -> None:
        """Checks the counts."""
        if min(self.cpus, self.gpus) < 0:
            raise ConfigError(
                f"validation.cpus and validation.gpus must be >= 0, got {self.cpus} and "
                f"{self.gpus}. Use 0 to reserve nothing."
            )
        for name in ("users", "batch_users"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"validation.{name} must be >= 1, got {getattr(self, name)}. Raise it."
                )


INITIAL_CODES = ("keep", "fresh", "mapped")


@dataclass(kw_only=True)
class InitialConfig:
    """The model that a training begins with; see `forge_ray.gr.initial`."""

    model: str = ""
    """A published model of the same `model.*`, as `forge-ray gr evaluate` takes it; empty begins
    with fresh weights."""
    codes: str = "keep"
    """What becomes of the vectors of codes: `keep` on the model's own SID table, on another one
    `fresh` or `mapped`."""
    sids: str = ""
    """The model's own SID table where the store does not hold it: an artifact or `.npz` file."""

    def __post_init__(self) -> None:
        """Checks the choice."""
        if self.codes not in INITIAL_CODES:
            raise ConfigError(
                f"initial.codes must be one of {', '.join(INITIAL_CODES)}, got {self.codes!r}. "
                "Pick one."
            )


@dataclass(kw_only=True)
class GrConfig:
    """A training run. `identity` tells which fields decide the model."""

    model: GeneratorConfig = field(default_factory=DecoderConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: StreamConfig = field(default_factory=StreamConfig)
    initial: InitialConfig = field(default_factory=InitialConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    max_steps: int = 1000
    """Optimiser steps."""
    max_history: int = 20
    """Newest items of a history that the model reads."""
    seed: int = 0
    """Of weights, dropout and the order of batches."""
    num_workers: int = 1
    """Ray Train workers; the global batch stays the same."""
    max_workers: int = 0
    """More than `num_workers` lets the run grow and shrink between the two with the cluster, each
    time from the last checkpoint; 0 keeps `num_workers`. Not for sweeps."""
    in_process: bool = False
    """Train, read and validate in the calling process, without Ray Train, whose processes take ten
    seconds and more to start: for many short trainings of small models. The losses are the same."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker, and its thread count; may be a fraction."""
    use_gpu: bool = False
    """One GPU per worker, and NCCL instead of gloo; without it nothing trains on a GPU, whatever a
    process sees."""
    worker_resources: dict[str, float] = field(default_factory=dict)
    """What else each worker asks of its node, by Ray's names, e.g. `memory: 8.0e+9` (bytes) or
    `accelerator_type:A100: 0.001`."""
    worker_labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that workers may run on, e.g. `ray.io/market-type: spot`; a value may be
    negated (`!spot`) or a choice (`in(a, b)`). Empty allows every node."""
    max_failures: int = 2
    """Restarts from the last checkpoint after a worker died."""
    published: Literal["best", "last"] = "best"
    """Which weights become the model: those of the highest ItemNDCG@10 on validation users, or the
    last ones, as an online model has no future users to choose by."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; a damaged one falls back to the one before. The best weights are
    kept apart."""

    def __post_init__(self) -> None:
        """Checks the rules across fields."""
        for name in ("max_steps", "max_history", "num_workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        self._check_workers()
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must be in [0, 2^31), got {self.seed}. Use another seed.")
        if self.max_failures < 0:
            raise ConfigError(
                f"max_failures must be >= 0, got {self.max_failures}. Use 0 for none."
            )
        if self.keep_checkpoints < 2:
            raise ConfigError(
                f"keep_checkpoints must be >= 2, got {self.keep_checkpoints}. A damaged checkpoint "
                "needs one before it."
            )
        if self.tasks.text_tasks and not self.model.reads_text:
            raise ConfigError(
                f"tasks must be next_item alone for model.kind={self.model.kind}, which reads no "
                f"text, got {', '.join(self.tasks.text_tasks)}. Set model.kind=pretrained_decoder "
                "or pretrained_t5."
            )
        if min(self.validation.ks, default=1) < 1:
            raise ConfigError(
                f"validation.ks must be >= 1, got {self.validation.ks}. Leave out what is below."
            )
        if self.validation.every < 1 or 10 not in self.validation.ks:
            raise ConfigError(
                "validation.every must be >= 1 and validation.ks must contain 10, got "
                f"{self.validation.every} and {self.validation.ks}. The best checkpoint is the one "
                "with the highest ItemNDCG@10."
            )

    def _check_workers(self) -> None:
        if self.cpus_per_worker <= 0:
            raise ConfigError(
                f"cpus_per_worker must be > 0, got {self.cpus_per_worker}. Use e.g. 0.5."
            )
        own = {"CPU", "GPU"} & set(self.worker_resources)
        if own or min(self.worker_resources.values(), default=1) <= 0:
            raise ConfigError(
                "worker_resources must be > 0 and not CPU or GPU, got "
                f"{self.worker_resources}. Those are cpus_per_worker and use_gpu."
            )
        if self.max_workers and self.max_workers < self.num_workers:
            raise ConfigError(
                f"max_workers must be 0 or >= num_workers={self.num_workers}, got "
                f"{self.max_workers}. Leave it out for a fixed number."
            )
        if self.in_process and (self.num_workers > 1 or self.max_workers or self.use_gpu):
            raise ConfigError(
                "in_process must be false with several workers or GPUs, got num_workers="
                f"{self.num_workers}, max_workers={self.max_workers}, use_gpu={self.use_gpu}. "
                "Leave it out."
            )

    def check_targets(self) -> None:
        """Refuses one answer a row where the model learns every item of it.

        No rule of the configuration itself: other models may stand in the place of `model`.

        Raises:
            ConfigError: the model and `data.targets` do not go together.
        """
        if self.data.targets == "last" and self.model.examples == "window":
            raise ConfigError(
                f"data.targets must be all for model.kind={self.model.kind}, which learns every "
                "item of a row, got last. Leave it out; one answer a row have t5, pretrained_t5 "
                "and, with model.targets=last, decoder and pretrained_decoder."
            )

    @property
    def own_cpus(self) -> float:
        """CPUs that the calling process needs while it trains; otherwise its workers have them."""
        return self.cpus_per_worker if self.in_process else 0.0

    @property
    def plan(self) -> BatchPlan:
        """How the stream forms batches: a context of `max_history` items, then its target."""
        return BatchPlan(
            batch_rows=self.shares[ITEM_TASK],
            max_items=self.max_history + 1,
            mode="last" if self.data.targets == "last" else self.model.examples,
            window_batches=self.data.window_batches or (1 if self.model.packs else _SORTED_BATCHES),
            seed=self.seed,
        )

    @property
    def shares(self) -> dict[str, int]:
        """Rows of each task of the mixture in a global batch."""
        return self.tasks.shares(self.engine.global_batch)

    def script_plan(self, task: str) -> BatchPlan:
        """How the stream of a task with text forms batches; rows come as they are."""
        return BatchPlan(
            batch_rows=self.shares[task],
            max_items=0,
            mode="whole",
            window_batches=self.data.window_batches or _SORTED_BATCHES,
            # Streams over the same shards must not pair their rows.
            seed=self.seed + _STRIDE * TASKS.index(task),
        )

    def check_levels(self, num_levels: int) -> None:
        """Refuses widths that do not fit a SID table, before hours of training and not after.

        Args:
            num_levels: of the table.
        """
        widths = self.validation.widths
        if widths and len(widths) != num_levels:
            raise ConfigError(
                f"validation.widths must be {num_levels} integers, one per level of the SID table, "
                f"got {widths}. Leave it out for the default, or set "
                f"validation.widths={[widths[0]] * (num_levels - 1) + [widths[-1]]}."
            )
        if widths and (min(widths) < 1 or widths[-1] < max(self.validation.ks)):
            raise ConfigError(
                "validation.widths must be >= 1 and end in at least max(validation.ks)="
                f"{max(self.validation.ks)} beams, got {widths}. Widen the last level."
            )

    def doubts(self) -> list[str]:
        """What works, but hardly as it was meant; to be said before training begins."""
        validation = self.validation
        if not self.use_gpu or not validation.aside or validation.gpus:
            return []
        return [
            "validation.gpus should be > 0 with use_gpu=true, got 0: the process that validates "
            "decodes on a CPU, and training waits for it. Set validation.gpus=1, or "
            "validation.aside=false to decode on the GPU of rank 0."
        ]

    def identity(self) -> dict[str, Any]:
        """The fields that decide the model; the others may change when a run resumes."""
        return without_execution(to_mapping(self))


def without_execution(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A `GrConfig` as mapping, or some of it, less the fields that only say how it runs."""
    kept = {name: value for name, value in mapping.items() if name not in _RUNNING}
    if not kept.get("initial", {}).get("model"):
        kept.pop("initial", None)  # says nothing, as before there was such a section
    if not any(kept.get("tasks", {}).get(name) for name in TASKS if name != ITEM_TASK):
        kept.pop("tasks", None)  # likewise
    if kept.get("published") == "best":
        kept.pop("published")  # likewise
    for part, late, default in _LATE:
        if kept.get(part, {}).get(late) == default:
            kept[part] = {name: one for name, one in kept[part].items() if name != late}
    for part, running in _RUNNING_PARTS.items():
        if part in kept:
            given = kept[part].items()
            kept[part] = {name: value for name, value in given if name not in running}
    return kept


_SORTED_BATCHES = 64
"""Global batches among which padded rows are sorted: on amazon-beauty 5 % of them is padding."""

_STRIDE = 1_000_003

_RUNNING = (
    "num_workers",
    "max_workers",
    "in_process",
    "cpus_per_worker",
    "use_gpu",
    "worker_resources",
    "worker_labels",
    "max_failures",
    "keep_checkpoints",
)
_LATE = (("data", "targets", "all"), ("validation", "exclude_seen", True))
"""Fields that say nothing at their default, as before there were such fields."""
_RUNNING_PARTS = {
    "initial": ("sids",),
    "engine": ("micro_batch", "activation_checkpointing", "compile"),
    "data": ("segments_per_execution", "prefetch_batches", "read_tasks", "read_cpus"),
    "validation": ("batch_users", "aside", "cpus", "gpus"),
}
