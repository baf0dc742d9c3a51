"""Published models are asked as they were trained, or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.evaluate import evaluator
from forge_ray.gr import recommend as module
from forge_ray.gr import search
from forge_ray.gr.comparison import CompareConfig, compare
from forge_ray.gr.recommend import REQUEST_FILE, RecommendConfig, recommend
from forge_ray.gr.scoring import ModelEvaluationConfig, evaluate_model
from forge_ray.gr.scripts import TaskText
from forge_ray.gr.search import search_rows
from forge_ray.gr.source import ModelSource
from forge_ray.gr.tasks import TasksConfig
from tests.gr.models.checkpoints import qwen_checkpoint
from tests.gr.searches import publish_searcher, titled_dataset, whole_titles

SMALL = {"split": "validation", "users": 8, "ks": [5], "bootstrap": 0}
ALONE = {"next_item": 0, "query_to_sid": 1, "validate": "search"}
MIXED = {"next_item": 1, "search": 1, "query_to_sid": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return ArtifactStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def queries(store: ArtifactStore) -> QuerySet:
    return whole_titles(store, titled_dataset(store))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_checkpoint(tmp_path_factory.mktemp("qwen"), is_tied=False)


@pytest.fixture
def publish(store: ArtifactStore, queries: QuerySet, checkpoint: Path):
    def made(**weights) -> ModelSource:
        tasks = TasksConfig(queries=queries.key, **weights)
        return publish_searcher(store, queries, str(checkpoint), tasks)

    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Items beside every query that a model was asked."""
    lengths: list[int] = []
    questions = TaskText.questions

    def watched(self: TaskText, histories: Ragged, texts: list[str]) -> Ragged:
        lengths.extend(histories.lengths.tolist())
        return questions(self, histories, texts)

    monkeypatch.setattr(TaskText, "questions", watched)
    return lengths


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ranks or writes fails."""
    monkeypatch.setattr(evaluator, "evaluate", None)
    monkeypatch.setattr(module, "_claim", None)
    for name in ("evaluate_bm25", "evaluate_popularity"):
        monkeypatch.setattr(search, name, None)


@pytest.mark.parametrize(("weights", "newest"), [(MIXED, 4), (ALONE, 0)])
def test_evaluation_asks_in_the_form_of_the_training(
    publish, queries, store, asked, weights, newest
):
    source = publish(**weights)
    config = ModelEvaluationConfig(**SMALL)
    found = evaluate_model(source, source.dataset, config, store=store, queries=queries)
    assert found.metrics["users"] == 8
    assert len(asked) == 8
    assert max(asked) == newest


def test_lists_are_asked_for_in_the_form_of_the_training(
    publish, queries, tmp_path, asked, monkeypatch
):
    monkeypatch.setattr(module, "_run", _write_here)
    monkeypatch.setattr(module, "_user_ids", lambda dataset, part, users: pa.nulls(len(users)))
    config = RecommendConfig(split="validation", max_users=8, top_k=5)
    for weights, newest in ((MIXED, 4), (ALONE, 0)):
        asked.clear()
        source = publish(**weights)
        out = tmp_path / str(newest)
        recommend(source, source.dataset, config, out=str(out), queries=queries)
        assert len(asked) == 8
        assert max(asked) == newest
        assert ('"asks": "query"' in (out / REQUEST_FILE).read_text()) == (newest == 0)


def _write_here(job: module._Job, parts: list) -> None:
    writer = module._PartWriter(job)
    for part in parts:
        writer._write(part)


def test_the_table_has_no_row_of_a_question_that_was_not_learned(publish, queries, store):
    alone, mixed = publish(**ALONE), publish(**MIXED)
    rows = search_rows([alone, mixed], queries, ModelEvaluationConfig(**SMALL), store=store)
    models = [name for name in rows if name.startswith("searcher")]
    assert models == [alone.name, mixed.name, f"{mixed.name} {search.WITHOUT_QUERY}"]


@pytest.mark.usefixtures("no_work")
def test_users_without_queries_are_no_match_for_a_model_of_queries(publish, store, tmp_path):
    source = publish(**ALONE)
    config = ModelEvaluationConfig(**SMALL)
    with pytest.raises(ConfigError, match="must be asked with queries"):
        evaluate_model(source, source.dataset, config, store=store)
    with pytest.raises(ConfigError, match=f"{source.name} must be asked with queries"):
        compare([source], source.dataset, CompareConfig(**SMALL), store=store)
    with pytest.raises(ConfigError, match="must be asked with queries"):
        recommend(source, source.dataset, RecommendConfig(), out=str(tmp_path / "lists"))
    assert not (tmp_path / "lists").exists()


@pytest.mark.usefixtures("no_work")
def test_queries_are_no_match_for_a_model_of_histories_and_texts(publish, queries, store, tmp_path):
    source = publish(next_item=1, item_to_sid=1)
    with pytest.raises(ConfigError, match=f"got {source.name}, which was not"):
        search_rows([source], queries, ModelEvaluationConfig(**SMALL), store=store)
    with pytest.raises(ConfigError, match="queries must go to a model"):
        recommend(source, source.dataset, RecommendConfig(), out=str(tmp_path), queries=queries)
