"""What a sweep would do: nothing is written, no Ray is started."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from typer.testing import CliRunner, Result

from forge_ray.artifacts import ArtifactInfo, ArtifactStore
from forge_ray.cli.sweep import app
from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import shared_parts
from forge_ray.sweep.config import SweepConfig, identity
from forge_ray.sweep.ledger import Ledger, write_json
from forge_ray.sweep.resolve import resolve_point

FILE = """
name: demo
synthetic: {num_items: 1000, num_users: 300}
space:
  sid.quantizer.levels: {choice: [1, 2, 3]}
  sid.resolver.kind: {choice: [bucket, extra_token]}
points: [{sid.quantizer.levels: 1, sid.resolver.kind: bucket}]
sampler: {kind: grid}
num_trials: null
sid: {quantizer: {kind: rq_kmeans, codebook_size: 64}}
gr: {max_steps: 50}
budget: {max_cost: 5, prices: {cpu_hour: 3600}}
"""
DATASET = SimpleNamespace(key="d" * 64, num_items=1000)


@pytest.fixture
def sweep(tmp_path: Path) -> list[str]:
    (tmp_path / "s.yaml").write_text(FILE)
    return [str(tmp_path / "s.yaml"), "--store", str(tmp_path / "store")]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store" / "sweeps" / "demo"
    (folder / "data").mkdir(parents=True)
    monkeypatch.setattr("forge_ray.sweep.dry_run.find_prepared", lambda *_: DATASET)
    return folder


def run(sweep: list[str], *options: str) -> Result:
    before = ray.is_initialized()  # other tests of this process may share a running Ray
    result = CliRunner().invoke(app, ["run", *sweep, "--dry-run", *options])
    assert ray.is_initialized() == before
    return result


def finish(folder: Path, point: dict[str, Any]) -> None:
    """One complete trial of 10 s, 1 s, 0.2 s a step, 2 s."""
    config = from_mapping(SweepConfig, yaml.safe_load(FILE))
    write_json(folder / "identity.json", identity(config, dataset_key=DATASET.key))
    resolved = resolve_point(config, point, dataset=DATASET)
    ledger = Ledger(folder)
    held = {"cpus": {"fit": 0.5, "train": 1.0}, "gpus": {}}
    key = resolved.key
    ledger.append("start", key=key, number=0, point=point, config=resolved.config, **held)
    ledger.append("row", key=key, stage="proxy", metrics={"gini": 0.1})
    ledger.append("row", key=key, stage="gr", metrics={"global_step": 50})
    seconds = {"fit": 10.0, "score": 1.0, "train": 10.0, "evaluate": 2.0}
    metrics = {"ItemNDCG@10": 0.1}
    ledger.append("row", key=key, stage="final", metrics=metrics, seconds=seconds)
    ledger.append("finish", key=key, state="complete", value=0.1)


def test_data_that_is_not_prepared_stays_so(sweep: list[str], tmp_path: Path) -> None:
    result = run(sweep)
    assert result.exit_code == 0
    assert "the data is not prepared" in result.output
    assert result.output.count("levels=") == 6
    assert "unknown" in result.output
    assert "budget: 0 of 5 USD are spent" in result.output
    assert "can first act after about 18 trials, this sweep has 6" in result.output
    assert not (tmp_path / "store").exists()


def test_the_matrix_the_shared_stages_and_what_they_take(sweep: list[str], prepared: Path) -> None:
    point = {"sid.quantizer.levels": 2, "sid.resolver.kind": "bucket"}
    finish(prepared, point)
    before = sorted(prepared.rglob("*"))
    # No price per stage but for CPUs: 3600 USD an hour is one a second.
    options = ["--json"]
    content = json.loads(run([*sweep[:1], "budget.max_cost=500", *sweep[1:]], *options).stdout)
    rows = {row["design"]: row for row in content["trials"]}
    assert rows["levels=2 bucket"]["state"] == "complete"
    assert rows["levels=1 bucket"]["state"] == "infeasible"
    assert "64" in rows["levels=1 bucket"]["reason"]
    assert content["rejected"] == {"capacity": 2}
    # Two resolvers on one quantizer: it is fitted for the first of them.
    assert rows["levels=3 bucket"]["seconds"] == 23.0
    assert rows["levels=3 extra_token"]["seconds"] == 13.0
    shared = {row["artifact"]: row for row in content["shared"]}
    assert (shared["quantizer"]["for trials"], shared["quantizer"]["different"]) == (3, 2)
    assert shared["sids"]["different"] == 3
    stages = {row["stage"]: row for row in content["stages"]}
    assert (stages["fit"]["trials"], stages["fit"]["seconds"]) == (2, 20.0)
    assert stages["train"]["source"] == "this sweep"
    assert content["budget"]["spent_usd"] == 15.0
    assert sorted(prepared.rglob("*")) == before


def test_the_hours_of_the_cluster_are_in_the_sum(sweep: list[str], prepared: Path) -> None:
    finish(prepared, {"sid.quantizer.levels": 2, "sid.resolver.kind": "bucket"})
    hourly = ["budget.max_cost=500", "budget.prices.cluster_hour=36"]
    content = json.loads(run([*sweep[:1], *hourly, *sweep[1:]], "--json").stdout)
    stages = {row["stage"]: row for row in content["stages"]}
    whole, cluster = stages.pop("in all"), stages.pop("cluster")
    assert cluster["seconds"] == whole["seconds"] == sum(one["seconds"] for one in stages.values())
    assert cluster["cost_usd"] == pytest.approx(whole["seconds"] / 100)
    others = sum(one["cost_usd"] for one in stages.values())
    assert whole["cost_usd"] == pytest.approx(others + cluster["cost_usd"])


def test_artifacts_of_the_store_are_not_built_again(sweep: list[str], prepared: Path) -> None:
    finish(prepared, {"sid.quantizer.levels": 2, "sid.resolver.kind": "bucket"})
    store = ArtifactStore(sweep[2])
    sid = from_mapping(
        SidConfig, {"quantizer": {"kind": "rq_kmeans", "codebook_size": 64, "levels": 3}}
    )
    part = shared_parts(sid)["quantizer"]
    store.build(
        "quantizer", "q", part, parents=(DATASET.key,), produce=lambda writer: ArtifactInfo()
    )
    content = json.loads(run([*sweep[:1], "budget.max_cost=500", *sweep[1:]], "--json").stdout)
    shared = {row["artifact"]: row for row in content["shared"]}
    assert (shared["quantizer"]["in the store"], shared["quantizer"]["to build"]) == (1, 1)
    rows = {row["design"]: row for row in content["trials"]}
    assert rows["levels=3 bucket"]["seconds"] == 13.0


def test_a_sampler_that_draws_plans_fixed_points_alone(sweep: list[str]) -> None:
    drawing = [*sweep[:1], "sampler.kind=tpe", "num_trials=7", *sweep[1:]]
    content = json.loads(run(drawing, "--json").stdout)
    assert [row["design"] for row in content["trials"]] == ["levels=1 bucket"]  # the fixed point
    assert content["drawn"] == 6


def test_what_a_run_would_refuse_is_refused(sweep: list[str], prepared: Path) -> None:
    finish(prepared, {"sid.quantizer.levels": 2, "sid.resolver.kind": "bucket"})
    result = run(sweep)
    assert isinstance(result.exception, ConfigError)
    assert "budget.max_cost must pay for a trial, got 5 USD" in str(result.exception)
