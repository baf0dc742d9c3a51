"""Search in one table: models with and without the query, BM25, and floors that read no query.

All rows rank for the same rows of a query set through the one evaluator. Decides which rows there
are; knows nothing about how they rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.schema import Dataset
from forge_ray.evaluate.bm25 import evaluate_bm25
from forge_ray.evaluate.evaluator import Evaluation
from forge_ray.evaluate.floors import evaluate_item_knn, evaluate_popularity
from forge_ray.evaluate.item_knn import ItemKnnConfig
from forge_ray.gr.checkpoint import model_config
from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
from forge_ray.gr.source import ModelSource

logger = logging.getLogger(__name__)

WITHOUT_QUERY = "without query"


def search_rows(
    models: Sequence[ModelSource],
    queries: QuerySet,
    config: ModelEvaluationConfig,
    *,
    store: ArtifactStore,
) -> dict[str, Evaluation]:
    """Figures by row of the table, in order.

    Args:
        models: trained with `tasks.search` or `tasks.query_to_sid`; one without `tasks.next_item`
            has no row without the query.
        queries: of the models' dataset.
        config: which rows of it and how; with more than one worker Ray must be up.
        store: keeps the results.

    Raises:
        ConfigError: a model learned no queries.
    """
    for model in models:
        model.prompts.check(has_queries=True, model=model.name)
    column = model_config(models[0].artifact).tasks.column
    dataset, knn = queries.dataset, ItemKnnConfig()
    # First: what it lacks must not show after an hour of decoding.
    bm25 = evaluate_bm25(queries, config, store, column=column) if _has(dataset, column) else None
    found: dict[str, Evaluation] = {}
    for model in models:
        rows = {model.name: True}
        if model.prompts.histories:
            rows[f"{model.name} {WITHOUT_QUERY}"] = False
        for name, reads_queries in rows.items():
            found[name] = evaluate_model(
                model,
                model.dataset,
                config,
                store=store,
                name=name.replace(" ", "-"),
                queries=queries,
                reads_queries=reads_queries,
            )
    if bm25 is not None:
        found["bm25"] = bm25
    found["popularity"] = evaluate_popularity(dataset, config, store, users=queries)
    found["item_knn"] = evaluate_item_knn(dataset, config, knn, store, users=queries)
    return found


def _has(dataset: Dataset, column: str) -> bool:
    if column in dataset.item_columns():
        return True
    logger.warning(
        "no row of bm25: items of %s have no column %r (tasks.column of the model)",
        dataset.name,
        column,
    )
    return False


def title_of(queries: QuerySet) -> str:
    """What a table of these queries is called; says where nobody asked them."""
    return f"{queries.name} (synthetic queries)" if queries.is_synthetic else queries.name
