"""A change of SIDs under an online model: how soon is a model on the new ones as good as the old?

The stages of a temporal split are the days. An old model trains stage after stage on old SIDs. From
the stage `rollout` on new SIDs take their place, and every way to start on them (an `Arm`) trains
stage after stage on the same days as the old model, which continues as the reference. Every model
is measured on the users of the days that follow the stage it trains on. Source of the problem and
of offline pretraining: FORGE (arXiv 2509.20904); the mapped start is ours.

Models and measurements come from the store when they were computed before, so the same call
continues after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, TrainingError
from forge_ray.evaluate.evaluator import KIND as EVALUATION_KIND
from forge_ray.gr.checkpoint import HISTORY_FILE, table_key
from forge_ray.gr.config import GrConfig, InitialConfig
from forge_ray.gr.convergence import Point, Summary, mean_curve, summarize
from forge_ray.gr.evaluation import MAKES_ROOM, evaluate_generator
from forge_ray.gr.health import VALIDATION_ERROR, is_measured
from forge_ray.gr.initial import initial_generator
from forge_ray.gr.stages import SidVariant, check_stages, check_tasks, train_stage
from forge_ray.gr.train import TrainResult
from forge_ray.gr.trials import fill_store
from forge_ray.gr.validation import validation_sample

REFERENCE = "old"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to start on new SIDs.

    Attributes:
        codes: `initial.codes` of the start from the old model; empty starts without it.
        is_pretrained: whether training offline on recent days comes first.
        says: in words.
    """

    codes: str
    is_pretrained: bool
    says: str


ARMS = {
    "cold": Arm(codes="", is_pretrained=False, says="fresh weights"),
    "dense": Arm(codes="fresh", is_pretrained=False, says="the old weights, fresh codes"),
    "offline": Arm(codes="fresh", is_pretrained=True, says="dense, then recent days offline"),
    "mapped": Arm(codes="mapped", is_pretrained=False, says="the old weights, codes mapped"),
    "mapped_offline": Arm(codes="mapped", is_pretrained=True, says="mapped, then offline"),
}


@dataclass(kw_only=True)
class ConvergeConfig:
    """When SIDs change, which starts are compared, and how they train."""

    rollout: int = 2
    """Stage, counted from 1, with the first days that are trained on the new SIDs; the old model
    begins on those before it."""
    recent: int = 1
    """Stages before `rollout` that offline pretraining reads: FORGE's last n days."""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """Starts to compare: cold, dense, offline, mapped, mapped_offline."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of weights and batches; the old model is trained once for each."""
    train: GrConfig = field(default_factory=GrConfig)
    """Training on one online stage; `train.validation` says how often and by whom it is measured.
    The last weights go on to the next stage, whatever `train.published` says."""
    old_steps: int = 1000
    """Steps of the old model on each stage before `rollout`."""
    offline_steps: int = 500
    """Steps of offline pretraining on each recent stage."""
    metric: str = "HR@20"
    """What has to be reached: a metric of `train.validation` at item level."""
    share: float = 1.0
    """Share of the old model's figure that counts as reaching it."""
    hold: int = 1
    """Measurements in a row that must be there; more tell noise from arrival."""
    parallel: int = 1
    """Seeds and starts that train at a time, as Ray Tune trials; 1 goes through them one after
    another."""

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError(
                f"arms must be some of {', '.join(ARMS)}, once each, got {self.arms}. Leave it out "
                "for all of them."
            )
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds must be different numbers >= 0, got {self.seeds}. Use e.g. [0, 1, 2]."
            )
        for name in ("recent", "old_steps", "offline_steps", "hold", "parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        if self.rollout <= self.recent:
            raise ConfigError(
                f"rollout must be > recent={self.recent}, got {self.rollout}. The recent stages "
                "are those before it."
            )
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1], got {self.share}. Use 1 for all of it.")
        self._check_train()

    def _check_train(self) -> None:
        ks = self.train.validation.ks
        known = [f"{name}@{k}" for name in ("HR", "ItemHit", "ItemNDCG") for k in ks]
        if self.metric not in known:
            raise ConfigError(
                f"metric must be one of {', '.join(known)}, got {self.metric!r}. Add its cut-off "
                "to train.validation.ks."
            )
        if self.train.initial.model or self.train.stop.patience:
            raise ConfigError(
                "train.initial.model and train.stop.patience must be left out, got "
                f"{self.train.initial.model!r} and {self.train.stop.patience}. The arms say how "
                "training begins, and all of them take the same steps."
            )
        check_tasks(self.train)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """What a simulation found.

    Attributes:
        curves: points by arm, then one list for each seed.
        by_seed: figures of those.
        mean: points of the mean over seeds.
        summaries: figures of the mean curve.
    """

    curves: Mapping[str, Sequence[Sequence[Point]]]
    by_seed: Mapping[str, Sequence[Summary]]
    mean: Mapping[str, Sequence[Point]]
    summaries: Mapping[str, Summary]


def converge(
    stages: Sequence[Dataset],
    old: SidVariant,
    new: SidVariant,
    config: ConvergeConfig,
    *,
    store: ArtifactStore,
    run_dir: str,
    tell: Callable[[str, int, Summary], None] = lambda arm, seed, summary: None,
) -> Convergence:
    """Trains and measures the old model and every arm; Ray must be running.

    Args:
        stages: of one log, oldest first.
        old: SIDs before the change.
        new: SIDs after it.
        config: the simulation.
        store: keeps models and measurements.
        run_dir: where checkpoints go; all nodes share it.
        tell: called with each arm and seed as its figures are known.

    Raises:
        ConfigError: stages, tables and configuration do not fit together; nothing was trained.
    """
    _check(stages, old, new, config)
    rollouts = {
        seed: Rollout(config, seed, stages, old, new, store, run_dir) for seed in config.seeds
    }
    if config.parallel > 1:
        _fill(rollouts, config, folder=f"{run_dir}/tune")
    curves: dict[str, list[list[Point]]] = {}
    for seed, rollout in rollouts.items():
        for arm in config.arms:
            curves.setdefault(arm, []).append(rollout.curve(arm))
            tell(arm, seed, summarize(curves[arm][-1], share=config.share, hold=config.hold))
    return convergence(curves, config)


def convergence(
    curves: Mapping[str, Sequence[Sequence[Point]]], config: ConvergeConfig
) -> Convergence:
    """The figures of measured curves."""
    figures = partial(summarize, share=config.share, hold=config.hold)
    mean = {arm: mean_curve(found) for arm, found in curves.items()}
    return Convergence(
        curves=curves,
        by_seed={arm: [figures(one) for one in found] for arm, found in curves.items()},
        mean=mean,
        summaries={arm: figures(one) for arm, one in mean.items()},
    )


def _check(
    stages: Sequence[Dataset], old: SidVariant, new: SidVariant, config: ConvergeConfig
) -> None:
    check_stages(stages, [old, new])
    if config.rollout > len(stages):
        raise ConfigError(
            f"rollout must be one of the {len(stages)} stages, got {config.rollout}. Prepare the "
            "data with more of them (split.num_stages), or lower it."
        )
    if table_key(old.table) == table_key(new.table):
        raise ConfigError(f"old and new SIDs must differ, got {old.name} twice. Fit another table.")
    config.train.model.check_history(config.train.max_history)
    config.train.check_targets()
    for variant in (old, new):
        config.train.check_levels(variant.table.num_levels)


def _fill(rollouts: Mapping[int, Rollout], config: ConvergeConfig, *, folder: str) -> None:
    """Trains as trials: first what the arms begin with, then all that is left."""
    fill = partial(fill_store, parallel=config.parallel, cpus=config.train.own_cpus, folder=folder)
    begin = {f"{REFERENCE}-{seed}": one.before for seed, one in rollouts.items()}
    fill(begin)
    rest: dict[str, Callable[[], object]] = {}
    for seed, one in rollouts.items():
        rest[f"{REFERENCE}-{seed}"] = one.reference
        for arm in config.arms:
            rest[f"{arm}-{seed}"] = partial(one.trained, arm)
    fill(rest)


@dataclass(frozen=True)
class Trained:
    """The models of an arm.

    Attributes:
        offline: of the recent stages, oldest first; none where it is not pretrained.
        online: of the stages from the roll-out on.
    """

    offline: Sequence[TrainResult]
    online: Sequence[TrainResult]


@dataclass(frozen=True)
class Rollout:
    """The change of SIDs with one seed."""

    config: ConvergeConfig
    seed: int
    stages: Sequence[Dataset]
    old: SidVariant
    new: SidVariant
    store: ArtifactStore
    run_dir: str

    def curve(self, arm: str) -> list[Point]:
        """All measurements of an arm, offline ones first, beside the old model's."""
        config, trained, start = self.config, self.trained(arm), self._start(arm)
        points: list[Point] = []
        if trained.offline:
            # On recent days the old model is what it was at their end: it serves while this trains.
            served = [float(one.history[-1][config.metric]) for one in self.before()]
            points = self._points(
                _Phase("offline", self._recent[0], start, config.offline_steps),
                trained.offline,
                lambda number, step: served[number - 1],
            )
            start = InitialConfig(model=trained.offline[-1].artifact.key)
        return points + self._points(
            _Phase("online", config.rollout, start, config.train.max_steps),
            trained.online,
            self._old_figures(),
        )

    def trained(self, arm: str) -> Trained:
        """The models of an arm; those of the old model are trained first where they are needed."""
        config, start = self.config, self._start(arm)
        offline: list[TrainResult] = []
        if ARMS[arm].is_pretrained:
            steps = config.offline_steps
            offline = self._chain(f"{arm}-recent", self.new, self._recent, steps, start)
            start = InitialConfig(model=offline[-1].artifact.key)
        steps = config.train.max_steps
        return Trained(offline, self._chain(arm, self.new, self._online, steps, start))

    def before(self) -> list[TrainResult]:
        """The old model on the stages before the roll-out."""
        numbers, steps = range(1, self.config.rollout), self.config.old_steps
        return self._chain(f"{REFERENCE}-before", self.old, numbers, steps, InitialConfig())

    def reference(self) -> list[TrainResult]:
        """The old model, which goes on over the days of the arms."""
        start = InitialConfig(model=self.before()[-1].artifact.key)
        return self._chain(REFERENCE, self.old, self._online, self.config.train.max_steps, start)

    @property
    def _recent(self) -> range:
        return range(self.config.rollout - self.config.recent, self.config.rollout)

    @property
    def _online(self) -> range:
        return range(self.config.rollout, len(self.stages) + 1)

    def _start(self, arm: str) -> InitialConfig:
        """What an arm's first training begins with."""
        if not ARMS[arm].codes:
            return InitialConfig()
        return InitialConfig(
            model=self.before()[-1].artifact.key,
            codes=ARMS[arm].codes,
            sids=str(self.old.source) if isinstance(self.old.source, Path) else "",
        )

    def _chain(
        self,
        name: str,
        variant: SidVariant,
        numbers: Sequence[int],
        steps: int,
        start: InitialConfig,
    ) -> list[TrainResult]:
        """Trains stage after stage, each from the last weights of the one before."""
        results: list[TrainResult] = []
        for number in numbers:
            if results:
                start = InitialConfig(model=results[-1].artifact.key)
            result = train_stage(
                self._settings(start, steps),
                self.stages[number - 1],
                variant,
                store=self.store,
                run_dir=self.run_dir,
                name=f"{name}-s{number}-seed{self.seed}",
            )
            results.append(_whole(result))
        return results

    def _settings(self, start: InitialConfig, steps: int) -> GrConfig:
        return replace(
            self.config.train, initial=start, max_steps=steps, seed=self.seed, published="last"
        )

    def _old_figures(self) -> Callable[[int, int], float]:
        """The old model's figure on a stage after so many steps there."""
        config, results = self.config, self.reference()
        start = InitialConfig(model=self.before()[-1].artifact.key)
        found = {
            (number, row["global_step"]): float(row[config.metric])
            for number, result in zip(self._online, results, strict=True)
            for row in result.history
        }
        phase = _Phase("online", config.rollout, start, config.train.max_steps)
        found[config.rollout, 0] = self._begun(phase, self.old)
        return lambda number, step: found[number, step]

    def _points(
        self,
        phase: _Phase,
        results: Sequence[TrainResult],
        reference: Callable[[int, int], float],
    ) -> list[Point]:
        """The start of a phase and every validation in it, steps and tokens added up."""
        last = Point(
            phase=phase.name,
            stage=phase.first,
            steps=0,
            tokens=0,
            value=self._begun(phase, self.new),
            reference=reference(phase.first, 0),
        )
        points = [last]
        for number, result in enumerate(results, start=phase.first):
            points.extend(
                Point(
                    phase=phase.name,
                    stage=number,
                    steps=last.steps + row["global_step"],
                    tokens=last.tokens + row["train_tokens"],
                    value=float(row[self.config.metric]),
                    reference=reference(number, row["global_step"]),
                )
                for row in result.history
            )
            last = points[-1]
        return points

    def _begun(self, phase: _Phase, variant: SidVariant) -> float:
        """The figure of the weights that a phase begins with, before any step."""
        settings = self._settings(phase.start, phase.steps)
        settings = replace(settings, model=settings.model.resolved())
        dataset, table = self.stages[phase.first - 1], variant.table

        def produce(writer: ArtifactWriter) -> ArtifactInfo:
            generator = initial_generator(settings, self.store, dataset, table).eval()
            sample = validation_sample(dataset, settings.validation.users)
            found = evaluate_generator(
                generator,
                table,
                sample.histories,
                sample.targets,
                train_counts=dataset.train_counts(),
                max_history=settings.max_history,
                ks=settings.validation.ks,
                widths=settings.validation.widths or None,
                exclude_seen=settings.validation.exclude_seen,
                batch_users=settings.validation.batch_users,
            )
            return ArtifactInfo(rows={"users": int(found["users"])}, metrics=found)

        room = {} if settings.validation.widths else {"makes_room": MAKES_ROOM}
        begun: Artifact = self.store.build(
            EVALUATION_KIND,
            f"{phase.name}-begin",
            {"begun": settings.identity()} | room,
            parents=[one for one in (dataset.key, table_key(table), phase.start.model) if one],
            produce=produce,
        )
        return float(begun.manifest.metrics[self.config.metric])


def _whole(result: TrainResult) -> TrainResult:
    """A training, once it is sure that each of its validations came to its end.

    Raises:
        TrainingError: one failed; curves of several seeds need every point.
    """
    ref = result.artifact.manifest.ref
    for row in json.loads(result.artifact.local(HISTORY_FILE).read_text(encoding="utf-8")):
        if not is_measured(row):
            raise TrainingError(
                f"every validation of {ref} must have figures to be part of a curve, got "
                f"{row[VALIDATION_ERROR]} at step {row['global_step']}. Remove the model "
                f"(forge-ray artifacts rm {ref}) and the folder of its run, and repeat the command."
            )
    return result


@dataclass(frozen=True)
class _Phase:
    """A chain of trainings: its name, first stage, start, and steps on each stage."""

    name: str
    first: int
    start: InitialConfig
    steps: int
