"""`forge-ray gr recommend`: options and settings reach the stage, and its report is printed."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from forge_ray.cli.gr import app
from forge_ray.data.queries.query_set import QuerySet
from forge_ray.gr.recommend import RecommendReport
from forge_ray.gr.source import ModelSource

REPORT = RecommendReport(
    out="lists", users=90, parts=6, parts_resumed=1, users_per_s=3.5,
    decode_users_per_s=7.0, invalid_rate=0.0, short_rate=0.0,
)  # fmt: skip


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stage is called with; no model is opened and no Ray started."""
    source = SimpleNamespace(name="chain-model", dataset="chains")
    told: dict[str, Any] = {}

    def stage(source: Any, dataset: Any, config: Any, *, out: str, queries: Any) -> RecommendReport:
        told.update(source=source, dataset=dataset, config=config, out=out, queries=queries)
        return REPORT

    monkeypatch.setattr("forge_ray.launch.connect.connected", lambda **_: nullcontext())
    monkeypatch.setattr("forge_ray.gr.recommend.recommend", stage)
    monkeypatch.setattr(ModelSource, "open", lambda *_, **__: source)
    return told


def test_options_reach_the_stage(tmp_path: Path, told: dict[str, Any]) -> None:
    words = ["recommend", "chain-model", "top_k=5", "bucket_order=dense", "widths=[200,400,1200]"]
    options = ["--allow", "in.txt", "--deny", "out.txt", "--split", "validation", "--json"]
    done = CliRunner().invoke(app, [*words, *options, "--store", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["users_per_s"] == 3.5
    assert json.loads(done.stdout)["invalid_rate"] == 0
    config = told["config"]
    assert (config.allow, config.deny, config.split) == ("in.txt", "out.txt", "validation")
    assert (config.top_k, config.bucket_order) == (5, "dense")
    assert config.widths == [200, 400, 1200]
    assert (told["source"].name, told["dataset"]) == ("chain-model", "chains")
    assert told["out"] == "./recommendations/chain-model-validation"
    assert told["queries"] is None


def test_everybody_gets_a_list_by_default(tmp_path: Path, told: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["recommend", "chain-model", "--store", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert told["config"].split == "all"
    assert told["out"] == "./recommendations/chain-model-all"


def test_queries_of_test_get_lists_by_default(
    tmp_path: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuerySet, "open", lambda store, ref: ref)
    words = ["recommend", "chain-model", "--queries", "asked", "--store", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (told["config"].split, told["queries"]) == ("test", "asked")
    assert told["out"] == "./recommendations/chain-model-test-search"
