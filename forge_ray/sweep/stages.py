"""The stages of a trial on the real library: SIDs, scores, training, evaluation.

Heavy work runs in Ray tasks that ask for their own CPUs and GPUs. Their scheduling is named,
because a task that names none would wait for ever inside the placement group of the trial that
calls it; Ray's default, once named, leaves nodes with GPUs to work that needs them. Torch is
imported where it is used: a trial that the gate ends never is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import ray
import ray.train

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import canonical_json, from_mapping, to_mapping
from forge_ray.data.schema import Dataset, Split
from forge_ray.placement import stay_on
from forge_ray.sweep.capacity import Demand
from forge_ray.sweep.config import EvaluationConfig, ResourceConfig
from forge_ray.sweep.trial import StageReport
from forge_ray.threads import set_threads

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ForgeStages:
    """See `forge_ray.sweep.trial.Stages`.

    Attributes:
        store_uri: Where artifacts are.
        dataset_key: Key of the dataset.
        run_dir: Where trainings keep their checkpoints; absolute, shared by all nodes.
        score: Settings of the proxies.
        asked: What tasks ask for.
        evaluation: How the trained generator is judged.
        sweep: Name that the trainings' counters carry.
    """

    store_uri: str
    dataset_key: str
    run_dir: str
    score: Mapping[str, Any]
    asked: ResourceConfig
    evaluation: EvaluationConfig
    sweep: str

    def tokenize(self, config: Mapping[str, Any]) -> StageReport:
        """Fits and scores in one task."""
        cpus, gpus = self.asked.sid_cpus, self.asked.sid_gpus
        task = partial(
            fit_and_score,
            self.store_uri,
            self.dataset_key,
            sid=config["sid"],
            score=dict(self.score),
            cpus=cpus,
        )
        return self._run(task, cpus=cpus, gpus=gpus)

    def resources(self, config: Mapping[str, Any]) -> StageReport:
        """What the tasks and the workers of the Train job ask for."""
        from forge_ray.gr.config import GrConfig

        typed, asked = from_mapping(GrConfig, config["gr"]), self.asked
        return StageReport(
            cpus={
                "fit": asked.sid_cpus,
                "score": asked.sid_cpus,
                "train": typed.num_workers * typed.cpus_per_worker,
                "evaluate": asked.evaluate_cpus,
            },
            gpus={
                "fit": asked.sid_gpus,
                "score": asked.sid_gpus,
                "train": float(typed.num_workers * typed.use_gpu),
                "evaluate": asked.evaluate_gpus,
            },
        )

    def demands(self, configs: Iterable[Mapping[str, Any]]) -> list[tuple[Demand, ...]]:
        """From what the tasks and workers ask for, and what the tasks start beside themselves."""
        from forge_ray.sid.metrics.config import ScoreConfig
        from forge_ray.sweep.demands import placing_fields, trial_demands

        num_items = Dataset.open(ArtifactStore(self.store_uri), self.dataset_key).num_items
        score = from_mapping(ScoreConfig, dict(self.score))
        # Reading a configuration takes milliseconds, and most trials differ in other fields.
        kinds = {canonical_json(placing_fields(one)): one for one in configs}.values()
        return [trial_demands(one, self.asked, score, num_items=num_items) for one in kinds]

    def train(
        self,
        config: Mapping[str, Any],
        sids: str,
        *,
        name: str,
        callbacks: Sequence[ray.train.UserCallback],
    ) -> StageReport:
        """Runs a nested Ray Train job from the trial's process."""
        from forge_ray.gr.config import GrConfig
        from forge_ray.gr.train import train_generator
        from forge_ray.sid.storage import open_sids

        set_threads(1)
        typed = from_mapping(GrConfig, config["gr"])
        store = ArtifactStore(self.store_uri)
        result = train_generator(
            typed,
            Dataset.open(store, self.dataset_key),
            open_sids(store, sids).table,
            store=store,
            run_dir=self.run_dir,
            name=name,
            callbacks=callbacks,
            group=self.sweep,
        )
        return StageReport(
            metrics={**result.metrics, "global_step": result.history[-1]["global_step"]},
            artifacts={"model": result.artifact.manifest.ref},
            cached=() if result.artifact.is_new else ("train",),
            history=tuple(result.history),
        )

    def evaluate(self, config: Mapping[str, Any], *, model: str) -> StageReport:
        """Validation metrics in one task."""
        return self.evaluate_split("validation", model=model)

    def evaluate_split(self, split: Split, *, model: str) -> StageReport:
        """Metrics of one split in one task; the test split is always whole."""
        cpus, gpus = self.asked.evaluate_cpus, self.asked.evaluate_gpus
        users = self.evaluation.users if split == "validation" else 0
        task = partial(
            evaluate_model,
            self.store_uri,
            model,
            split=split,
            users=users,
            evaluation=to_mapping(self.evaluation),
            cpus=cpus,
        )
        return self._run(task, cpus=cpus, gpus=gpus)

    def _run(self, task: partial[T], *, cpus: float, gpus: float) -> T:
        labels = dict(self.asked.stage_labels)
        remote = ray.remote(_on_nodes).options(
            name=task.func.__name__,
            num_cpus=cpus,
            num_gpus=gpus,
            scheduling_strategy="DEFAULT",
            label_selector=labels,
            max_retries=2,
        )
        return cast(T, ray.get(remote.remote(labels, task)))


def fit_and_score(
    store_uri: str,
    dataset_key: str,
    *,
    sid: Mapping[str, Any],
    score: Mapping[str, Any],
    cpus: float,
) -> StageReport:
    """Fits SIDs and computes their proxies; a Ray task."""
    from forge_ray.sid.config import SidConfig
    from forge_ray.sid.fit import fit_sids
    from forge_ray.sid.score import ScoreConfig, score_sids

    set_threads(cpus)
    store = ArtifactStore(store_uri)
    dataset = Dataset.open(store, dataset_key)
    began = time.perf_counter()
    sids = fit_sids(from_mapping(SidConfig, sid), dataset, store)
    fitted = time.perf_counter()
    scores = score_sids(sids, dataset, store, from_mapping(ScoreConfig, score))
    scored = time.perf_counter()
    built = {"fit": sids.quantizer_artifact.is_new, "score": scores.is_new}
    return StageReport(
        metrics=dict(scores.manifest.metrics),
        seconds={"fit": fitted - began, "score": scored - fitted},
        artifacts={
            "sids": sids.artifact.manifest.ref,
            "quantizer": sids.quantizer_artifact.manifest.ref,
        },
        cached=tuple(stage for stage, is_new in built.items() if not is_new),
        places=dict.fromkeys(built, _place()),
    )


def evaluate_model(
    store_uri: str,
    model: str,
    *,
    split: Split,
    users: int,
    evaluation: Mapping[str, Any],
    cpus: float,
) -> StageReport:
    """Item-level metrics of a trained generator on a split; a Ray task.

    Args:
        store_uri: Where the artifacts are.
        model: Reference of the model, which knows its table and dataset.
        split: `validation` or `test`.
        users: How many users, 0 for all.
        evaluation: An `EvaluationConfig` as mapping.
        cpus: CPUs held; sets the threads.
    """
    import torch

    from forge_ray.gr import scoring
    from forge_ray.gr.source import ModelSource

    set_threads(cpus)
    began = time.perf_counter()
    settings = from_mapping(EvaluationConfig, evaluation)
    store = ArtifactStore(store_uri)
    source = ModelSource.open(store, model)
    found = scoring.evaluate_model(
        source,
        source.dataset,
        scoring.ModelEvaluationConfig(
            split=split,
            ks=list(settings.ks),
            users=users or None,
            batch_users=settings.batch_users,
            device="cuda" if torch.cuda.is_available() else "cpu",
        ),
        store=store,
        name=source.name,
    )
    return StageReport(
        metrics=found.metrics,
        seconds={"evaluate": time.perf_counter() - began},
        places={"evaluate": _place()},
    )


def _on_nodes(labels: Mapping[str, str], task: partial[T]) -> T:
    # Ray reuses processes: the selector of an earlier task must not stay.
    stay_on(labels)
    return task()


def _place() -> dict[str, str]:
    return dict(ray.get_runtime_context().get_node_labels())
