"""One table: models, baselines and floors on the same users through the same evaluator.

Decides which rows a comparison has and how two rows differ. Every row is an artifact of its own, so
a second table computes only what is new.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import to_mapping
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.evaluate.bootstrap import Interval, interval
from forge_ray.evaluate.evaluator import Evaluation, Ready, evaluated
from forge_ray.evaluate.floors import (
    evaluate_item_knn,
    evaluate_popularity,
    tuned_item_knn,
)
from forge_ray.evaluate.item_knn import ItemKnnConfig
from forge_ray.evaluate.sasrec import SasRecBaselineConfig, evaluate_sasrec
from forge_ray.gr.checkpoint import table_key
from forge_ray.gr.evaluation import SidRanker
from forge_ray.gr.markov import MarkovConfig, fit_markov
from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
from forge_ray.gr.source import ModelSource
from forge_ray.sid.storage import load_table, table_source
from forge_ray.sid.table import SidTable

logger = logging.getLogger(__name__)

BASELINES = ("popularity", "item_knn", "item_knn_tuned", "markov_backoff", "sasrec")
FULL_KS = (5, 10, 20, 100, 500, 1000)


@dataclass(kw_only=True)
class CompareConfig(ModelEvaluationConfig):
    """What stands in a table and how it is measured."""

    ks: list[int] = field(default_factory=lambda: list(FULL_KS))
    """Cut-offs; models decode as many beams as the largest."""
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    """Rows beside the models: popularity and item_knn are floors, the others see validation."""
    item_knn: ItemKnnConfig = field(default_factory=ItemKnnConfig)
    """Constants of the item_knn row; those of item_knn_tuned are searched."""
    markov_backoff: MarkovConfig = field(default_factory=MarkovConfig)
    """The probe as a recommender; one row for each SID table of the comparison."""
    sasrec: SasRecBaselineConfig = field(default_factory=SasRecBaselineConfig)
    """The sequential baseline; minutes of training the first time."""

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise ConfigError(
                f"baselines must be among {', '.join(BASELINES)}, got {', '.join(unknown)}. "
                "Leave it out for all of them."
            )


@dataclass(frozen=True)
class NamedTable:
    """A SID table and what rows call it."""

    name: str
    key: str
    """Content key; part of the identity of rows made from it."""
    load: Callable[[], SidTable]


def model_table(model: ModelSource) -> NamedTable:
    """The SID table that a model speaks."""
    name = model.table.stem if isinstance(model.table, Path) else model.table.manifest.name
    return NamedTable(name, model.artifact.manifest.parents[1], model.load_table)


def named_table(ref: str, dataset: Dataset, store: ArtifactStore) -> NamedTable:
    """A SID table by reference.

    Args:
        ref: a stored table, or an `.npz` file.
        dataset: whose items the table codes.
        store: where stored tables are.

    Raises:
        ConfigError: the table codes the items of another log.
    """
    source = table_source(store, ref, dataset)
    if isinstance(source, Path):
        table = load_table(source, dataset)
        return NamedTable(source.stem, table_key(table), lambda: table)
    return NamedTable(source.manifest.name, source.key, partial(load_table, source, dataset))


@dataclass(frozen=True)
class Comparison:
    """Rows of a table, in order.

    Attributes:
        rows: figures by the name of the row.
    """

    rows: Mapping[str, Evaluation]

    def difference(self, row: str, against: str, metric: str) -> Interval:
        """95 % interval of one row's metric less another's, users paired.

        Raises:
            ConfigError: a row is unknown, or there is no bootstrap of this metric.
        """
        pair = [self._replicates(name, metric) for name in (row, against)]
        return interval(pair[0] - pair[1])

    def _replicates(self, row: str, metric: str) -> npt.NDArray[np.float64]:
        _check_row(row, list(self.rows))
        found = self.rows[row].replicates
        if metric not in found:
            raise ConfigError(
                f"bootstrap must be > 0 and hold {metric} for paired differences, got neither for "
                f"{row}. Set bootstrap=1000."
            )
        return found[metric]


def compare(
    models: Sequence[ModelSource],
    dataset: Dataset,
    config: CompareConfig,
    *,
    store: ArtifactStore,
    tables: Sequence[NamedTable] = (),
    against: str | None = None,
) -> Comparison:
    """Measure every row that the store does not hold yet.

    Args:
        models: of one dataset; the first rows.
        dataset: what is compared on.
        config: rows and settings; with more than one worker Ray must be up.
        store: keeps a row each, as artifacts of kind `evaluation`.
        tables: SID tables of the markov_backoff rows.
        against: row that the others will be compared with, user by user.

    Raises:
        ConfigError: a model belongs to another dataset or answers queries alone, two rows are of
            one name, markov_backoff has no table, or there is no such row or no bootstrap to
            compare with.
    """
    for model in models:
        if model.dataset.key != dataset.key:
            raise ConfigError(
                f"models must belong to dataset {dataset.name} ({dataset.key[:12]}), got "
                f"{model.name} of {model.dataset.name} ({model.dataset.key[:12]}). "
                "Compare it apart."
            )
        model.prompts.check(has_queries=False, model=model.name)
    plan = _plan(models, dataset, config, store, tables)
    if against is not None:
        _check_against(against, [name for name, _ in plan], config)
    rows: dict[str, Evaluation] = {}
    for name, measure in plan:
        logger.info("ranking by %s", name)
        rows[name] = measure()
    return Comparison(rows)


def _check_row(row: str, rows: Sequence[str]) -> None:
    if row not in rows:
        raise ConfigError(f"--against must name a row, got {row!r}. Rows: {', '.join(rows)}.")


def _check_against(against: str, rows: Sequence[str], config: CompareConfig) -> None:
    _check_row(against, rows)
    if not config.bootstrap:
        raise ConfigError(
            "bootstrap must be > 0 for differences to another row, got 0. Set bootstrap=1000."
        )


def _plan(
    models: Sequence[ModelSource],
    dataset: Dataset,
    config: CompareConfig,
    store: ArtifactStore,
    tables: Sequence[NamedTable],
) -> list[tuple[str, Callable[[], Evaluation]]]:
    """Every row and what measures it; checked as a whole before any work."""
    plan: list[tuple[str, Callable[[], Evaluation]]] = [
        (one.name, partial(evaluate_model, one, dataset, config, store=store, name=one.name))
        for one in models
    ]
    for name in config.baselines:
        if name == "markov_backoff":
            named = _markov_rows(tables)
            plan += [
                (row, partial(evaluate_markov, one, dataset, config, store)) for row, one in named
            ]
        else:
            plan.append((name, partial(_baseline, name, dataset, config, store)))
    times = Counter(name for name, _ in plan)
    repeated = [name for name in times if times[name] > 1]
    if repeated:
        raise ConfigError(
            f"rows must be named once each, got {', '.join(repeated)} again. Leave one out."
        )
    return plan


def _markov_rows(tables: Sequence[NamedTable]) -> list[tuple[str, NamedTable]]:
    if not tables:
        raise ConfigError(
            "markov_backoff must have a SID table, got none. Name a model, add --sids with a "
            "table, or leave markov_backoff out of baselines."
        )
    if len(tables) == 1:
        return [("markov_backoff", tables[0])]
    times = Counter(table.name for table in tables)
    return [
        (f"markov_backoff {table.name}" + f"-{table.key[:12]}" * (times[table.name] > 1), table)
        for table in tables
    ]


def _baseline(
    name: str, dataset: Dataset, config: CompareConfig, store: ArtifactStore
) -> Evaluation:
    if name == "popularity":
        return evaluate_popularity(dataset, config, store)
    if name == "item_knn":
        return evaluate_item_knn(dataset, config, config.item_knn, store)
    if name == "item_knn_tuned":
        tuned = tuned_item_knn(dataset, store, exclude_seen=config.exclude_seen)
        return evaluate_item_knn(dataset, config, tuned, store)
    assert name == "sasrec"  # the configuration checked the names
    return evaluate_sasrec(dataset, config, config.sasrec, store)


def evaluate_markov(
    table: NamedTable, dataset: Dataset, config: CompareConfig, store: ArtifactStore
) -> Evaluation:
    """Figures of `markov_backoff` on a SID table.

    Args:
        table: SIDs of all items.
        dataset: the dataset of the table.
        config: which users and how.
        store: keeps the result.
    """

    def prepare() -> Ready:
        search = fit_markov(dataset, table.load(), config.markov_backoff, top_k=max(config.ks))
        return Ready(
            SidRanker(
                search,
                train_counts=dataset.train_counts(),
                ks=config.ks,
                exclude_seen=config.exclude_seen,
            )
        )

    return evaluated(
        "markov_backoff",
        prepare,
        dataset,
        config,
        identity={"baseline": "markov_backoff", **to_mapping(config.markov_backoff)},
        parents=(table.key,),
        store=store,
    )
