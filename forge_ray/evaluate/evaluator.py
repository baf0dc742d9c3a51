"""The one evaluator: any ranker on the users of a split, part by part, here or on Ray.

A ranker says where targets stand; boards add up what it says. Boards are merged in the order of
parts wherever they were made, so one process and a cluster add the same numbers in the same order;
what may differ is the rounding of a ranker that computes with other threads or on another device.
No process holds more than one part of users.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayError

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter, timed
from forge_ray.data.parts import Part, plan_parts, read_part
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Split, Users
from forge_ray.data.tasks import unwrapped
from forge_ray.evaluate.board import Board, Ranked
from forge_ray.evaluate.config import EvaluationConfig
from forge_ray.evaluate.ranking import distinct_items
from forge_ray.placement import label_selector
from forge_ray.threads import set_threads

logger = logging.getLogger(__name__)

KIND = "evaluation"
_REPLICATES = "replicates.npz"


class Ranker(Protocol):
    """Ranks the catalogue for users."""

    def rank(
        self, histories: Ragged, targets: Ragged, queries: Sequence[str] | None = None
    ) -> Ranked:
        """Say where targets stand.

        Args:
            histories: U rows of item indices, oldest first.
            targets: U rows of distinct held-out items, at least one each.
            queries: U texts, what each user asks for; None where nobody asks.
        """


OpenRanker: TypeAlias = Callable[[], Ranker]
"""Makes a ranker in the process that ranks; picklable."""


@dataclass(frozen=True)
class Ready:
    """Opens a ranker that is complete wherever it arrives."""

    ranker: Ranker

    def __call__(self) -> Ranker:
        """The ranker."""
        return self.ranker


@dataclass(frozen=True)
class Evaluation:
    """Figures of one ranker on one split.

    Attributes:
        metrics: see `Board.summary`.
        replicates: by metric, float64 [B] bootstrap means; empty without bootstrap. Those of two
            evaluations of the same users are paired.
    """

    metrics: dict[str, float]
    replicates: Mapping[str, npt.NDArray[np.float64]]


def evaluate(
    open_ranker: OpenRanker,
    users: Users,
    config: EvaluationConfig,
    *,
    gpus_per_worker: float = 0.0,
) -> Board:
    """Score a ranker on the users of a split.

    Args:
        open_ranker: makes the ranker; called once in each process that ranks, but for every part
            in tasks with GPUs: Ray ends their processes, so that the memory of the device is free.
        users: a prepared dataset, or a query set.
        config: which users and how. With more than one worker Ray must be up.
        gpus_per_worker: GPUs that one Ray task asks for.

    Returns:
        The board of all users.
    """
    split = cast(Split, config.split)
    parts = list(plan_parts(users, split, rows_per_part=config.users_per_part, limit=config.users))
    board = _board(users.train_counts(), config)
    if config.num_workers == 1:
        boards = _here(open_ranker, users, config, parts)
    else:
        boards = _on_ray(open_ranker, users, config, parts, gpus=gpus_per_worker)
    done = 0
    for part, one in zip(parts, boards, strict=True):
        board.merge(one)
        done += part.rows
        logger.info("evaluated %d users of %s", done, config.split)
    return board


def evaluated(
    name: str,
    prepare: Callable[[], OpenRanker],
    users: Users,
    config: EvaluationConfig,
    *,
    identity: Mapping[str, Any],
    parents: Sequence[str],
    store: ArtifactStore,
    gpus_per_worker: float = 0.0,
) -> Evaluation:
    """`evaluate`, from the store when it was computed before.

    Args:
        name: of the ranker, for people.
        prepare: called once, here, where the figures are new; what it returns travels to workers.
        users: a prepared dataset, or a query set.
        config: which users and how.
        identity: what decides the figures beside `config.common()`, JSON types.
        parents: keys of the artifacts that the ranker was made from.
        store: keeps an artifact of kind `evaluation`.
        gpus_per_worker: GPUs that one Ray task asks for.
    """

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        metrics: dict[str, Any] = {}
        with timed(metrics, "seconds"):
            board = evaluate(prepare(), users, config, gpus_per_worker=gpus_per_worker)
        if board.replicates is not None:
            with writer.open(_REPLICATES) as stream:
                means = board.replicates.means()
                np.savez(stream, **dict(zip(board.replicates.names, means, strict=True)))
        found = board.summary()
        return ArtifactInfo(rows={"users": int(found["users"])}, metrics=found | metrics)

    artifact = store.build(
        KIND,
        f"{name}-{config.split}",
        {**config.common(), **identity},
        parents=(*parents, users.key),
        produce=produce,
        schema_version=2,  # 2: slices by target, bootstrap
    )
    replicates: dict[str, npt.NDArray[np.float64]] = {}
    if artifact.exists(_REPLICATES):
        with np.load(artifact.local(_REPLICATES)) as arrays:
            replicates = {metric: arrays[metric] for metric in arrays.files}
    return Evaluation(dict(artifact.manifest.metrics), replicates)


def score_part(
    ranker: Ranker,
    users: Users,
    part: Part,
    config: EvaluationConfig,
    train_counts: npt.NDArray[np.int64],
) -> Board:
    """The board of one part.

    Args:
        ranker: ranks.
        users: a prepared dataset, or a query set.
        part: of a held-out split.
        config: how lists are scored.
        train_counts: int64 [N].
    """
    rows = read_part(users, part)
    assert rows.targets is not None  # held-out splits always have targets
    wanted = distinct_items(rows.targets, len(train_counts))
    board = _board(train_counts, config)
    ranked = ranker.rank(rows.items, wanted, rows.queries)
    board.add(rows.user_index, wanted, ranked, train_counts)
    return board


def _board(train_counts: npt.NDArray[np.int64], config: EvaluationConfig) -> Board:
    return Board(
        train_counts,
        config.ks,
        tail_max_count=config.tail_max_count,
        bootstrap=config.bootstrap,
    )


def _here(
    open_ranker: OpenRanker, users: Users, config: EvaluationConfig, parts: Sequence[Part]
) -> Iterator[Board]:
    ranker, counts = open_ranker(), users.train_counts()
    for part in parts:
        yield score_part(ranker, users, part, config, counts)


def _on_ray(
    open_ranker: OpenRanker,
    users: Users,
    config: EvaluationConfig,
    parts: Sequence[Part],
    *,
    gpus: float,
) -> Iterator[Board]:
    """Boards in the order of parts; few more are held than there are tasks at a time."""
    opener = ray.put(open_ranker)
    task = ray.remote(_task).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=gpus,
        scheduling_strategy="SPREAD",
        label_selector=label_selector(),
        max_retries=2,
    )
    pending: list[ray.ObjectRef[Board]] = []
    for part in parts:
        if len(pending) == config.num_workers:
            yield _got(pending.pop(0))
        pending.append(task.remote([opener], users, config, part))
    while pending:
        yield _got(pending.pop(0))


def _got(board: ray.ObjectRef[Board]) -> Board:
    try:
        return ray.get(board)
    except RayError as error:
        raise unwrapped(error) from None


def _task(
    opener: list[ray.ObjectRef[OpenRanker]],
    users: Users,
    config: EvaluationConfig,
    part: Part,
) -> Board:
    set_threads(config.cpus_per_worker)
    key = opener[0].hex()
    if key not in _OPENED:
        _OPENED.clear()  # first, so that two rankers are never held
        _OPENED[key] = ray.get(opener[0])(), users.train_counts()
    ranker, counts = _OPENED[key]
    return score_part(ranker, users, part, config, counts)


_OPENED: dict[str, tuple[Ranker, npt.NDArray[np.int64]]] = {}
"""In a worker process: the ranker of the evaluation at hand and the train counts, by the object
that opens it. Kept until the process ends or serves another evaluation."""
