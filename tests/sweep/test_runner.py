"""The whole machinery on stub stages: Tune, gate, halving, bridge, Optuna, ledger, continuation."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
from optuna.trial import TrialState

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sweep import runner
from forge_ray.sweep.budget import budget_state
from forge_ray.sweep.config import BudgetConfig, SamplerConfig, SweepConfig
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.ledger import SweepRecords, write_json
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.objectives import pareto_front
from forge_ray.sweep.plan import Sieve, make_plan
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.runner import SweepJob, check_identity, run_trials
from forge_ray.sweep.space import parse_space
from forge_ray.sweep.study import open_storage
from forge_ray.sweep.trackers.config import MlflowConfig, TensorboardConfig, TrackersConfig
from tests.sweep import stubs
from tests.sweep.stubs import StubStages, stages_run, stub_resolve

ray.cloudpickle.register_pickle_by_value(stubs)

QUALITIES = [0.9, 0.5, 0.2]
CONFIG = SweepConfig(
    name="stub",
    space={"kind": {"choice": ["a"]}, "quality": {"choice": QUALITIES}},
    points=[{"kind": "random"}],
    sampler=SamplerConfig(kind="grid"),
    num_trials=None,
    max_concurrent=1,
    order="planned",
    gate=GateConfig(mode="quantile", warmup=2, random_share=0.0, keep_quantile=0.6),
    asha=AshaConfig(grace_steps=10, min_earlier=1),
)


def run(folder: Path, config: SweepConfig = CONFIG, *, dataset_key: str = "d") -> SweepRecords:
    job = SweepJob(
        config=config,
        folder=folder,
        dataset_key=dataset_key,
        stages=StubStages(str(folder)),
        resolve=stub_resolve,
        max_steps=30,
    )
    return run_trials(job).records


def states(records: SweepRecords) -> list[tuple[str, str]]:
    return [(one.state, one.pruned_by) for one in records.trials.values()]


@pytest.mark.ray
def test_sweep_prunes_continues_and_grows(ray_local, tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.environment["ray"]
    assert first.environment["cluster"]["CPU"] > 0
    assert states(first) == [
        ("pruned", "gate"),  # random codes: no gain
        ("complete", ""),
        ("pruned", "asha"),  # warm-up let it through
        ("pruned", "gate"),  # quantile
    ]
    records = list(first.trials.values())
    assert records[0].reason == "backoff_gain 0 < 0.05"
    assert records[1].value == 0.9
    assert records[1].final["ItemHit@10"] == 1.8
    assert [row["global_step"] for row in records[1].history] == [10, 20, 30]
    assert records[2].would_prune
    assert records[2].reason.startswith("asha: ")
    assert set(records[1].seconds) >= {"fit", "train"}
    # Also of a training that was stopped.
    assert records[2].gpus == {"train": 1.0}
    assert records[2].cpus == {"fit": 1.0, "train": 2.0}
    assert records[2].places[0]["train"]["zone"] == "here"
    assert stages_of(tmp_path, "train") == [0.9, 0.5]
    # Tune's pickles would hold the password of a store's URI.
    assert not list(tmp_path.rglob("*.pkl"))

    # The same command again has nothing to do.
    before = len(stages_run(tmp_path))
    again = run(tmp_path)
    assert states(again) == states(first)
    assert len(stages_run(tmp_path)) == before

    # One new value in the space: only that runs.
    space = {**CONFIG.space, "quality": {"choice": [*QUALITIES, 0.95]}}
    grown = run(tmp_path, dataclasses.replace(CONFIG, space=space))
    new = stages_run(tmp_path)[before:]
    assert {line["config"]["quality"] for line in new} == {0.95}
    assert grown.winner() is not None
    assert grown.winner().value == 0.95  # type: ignore[union-attr]
    assert len(grown.trials) == 5

    # Optuna: nothing runs, outcomes are as they were, old trials moved into the new study.
    storage = open_storage("", tmp_path)
    told = [
        [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]
        for name in optuna.get_all_study_names(storage)
    ]
    assert all(TrialState.RUNNING not in study for study in told)
    assert sorted(len(study) for study in told) == [4, 4]

    # Another meaning under the same name is refused, with the difference.
    with pytest.raises(ConfigError, match=r"asha.grace_steps: 10 -> 20"):
        run(tmp_path, dataclasses.replace(CONFIG, asha=AshaConfig(grace_steps=20, min_earlier=1)))
    with pytest.raises(ConfigError, match="dataset"):
        run(tmp_path, dataset_key="other")


@pytest.mark.ray
def test_promising_designs_are_scored_together_and_train_first(ray_local, tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        order="promising",
        space={"kind": {"choice": ["a", "broken"]}, "quality": {"choice": [0.2, 0.5, 0.9]}},
        gate=GateConfig(mode="off"),
        asha=AshaConfig(enabled=False),
    )
    found = run(tmp_path, config)
    ran = stages_run(tmp_path)
    # All seven are scored before the first trains; what cannot be scored fails as a trial.
    assert [line["stage"] for line in ran[:7]] == ["tokenize"] * 7
    assert {one.state for one in found.trials.values() if one.point["kind"] == "broken"} == {
        "failed"
    }
    # Even turns follow the bits (the best quality, then the next), odd ones the plan.
    trained = [line["config"] for line in ran if line["stage"] == "train"]
    assert trained[0]["quality"] == 0.9
    assert {one["kind"] for one in trained} == {"a", "random"}
    # What scoring took is part of the trial's price, once.
    first = next(one for one in found.trials.values() if one.value == 0.9)
    assert first.prior["fit"] == 0.01
    assert first.cached == []
    assert first.cpus["fit"] == 1.0
    state = json.loads((tmp_path / "scheduler.json").read_text())["gate"]
    assert sorted(set(state["picked"].values())) == ["plan", "promise"]
    assert not state["decisions"][first.key]["is_control"]

    # A later run scores nothing again; the failed ones are tried again.
    run(tmp_path, config)
    again = stages_run(tmp_path)[len(ran) :]
    assert {line["config"]["kind"] for line in again} == {"broken"}


def stages_of(folder: Path, stage: str) -> list[float]:
    return [line["config"].get("quality") for line in stages_run(folder) if line["stage"] == stage]


@pytest.mark.ray
def test_failures_and_nan_are_recorded_and_tried_again(ray_local, tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG,
        space={"kind": {"choice": ["broken", "nan", "a"]}},
        points=[],
        gate=GateConfig(mode="off"),
    )
    records = list(run(tmp_path, config).trials.values())
    assert [one.state for one in records] == ["failed", "failed", "complete"]
    assert "kind must work, got broken" in records[0].reason
    assert "nan" in records[1].reason
    run(tmp_path, config)
    kinds = [x["config"]["kind"] for x in stages_run(tmp_path) if x["stage"] == "tokenize"]
    assert kinds == ["broken", "nan", "a", "broken", "nan"]


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A sweep's folder without neighbours: those of other tests would lend it their times."""
    folder = tmp_path / "sweeps" / "alone"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.ray
def test_hours_that_are_over_interrupt_trials(ray_local, alone: Path) -> None:
    job = SweepJob(
        config=dataclasses.replace(CONFIG, points=[], budget=BudgetConfig(max_hours=6 / 3600)),
        folder=alone,
        dataset_key="d",
        stages=StubStages(str(alone), step_s=5.0),
        resolve=stub_resolve,
        max_steps=30,
    )
    outcome = run_trials(job)
    assert not outcome.is_complete
    assert not outcome.records.finished()
    assert outcome.records.stopped is not None
    assert outcome.records.stopped["reason"].startswith("budget.max_hours: ")
    assert outcome.records.stopped["left"] == 3
    study = optuna.load_study(
        study_name=optuna.get_all_study_names(open_storage("", alone))[0],
        storage=open_storage("", alone),
    )
    assert TrialState.RUNNING not in [trial.state for trial in study.trials]
    config = dataclasses.replace(CONFIG, points=[])
    finished = run_trials(dataclasses.replace(job, config=config, stages=StubStages(str(alone))))
    assert finished.is_complete
    assert finished.records.stopped is None
    assert len(finished.records.finished()) == 3


DEPTHS = {"kind": {"choice": ["a"]}, "levels": {"int": [1, 2]}, "quality": {"float": [0.1, 0.9]}}


@pytest.mark.ray
def test_rejected_designs_use_up_no_trial_and_the_pareto_front_is_known(
    ray_local, tmp_path: Path, caplog
) -> None:
    config = dataclasses.replace(
        CONFIG,
        space=DEPTHS,
        points=[{"kind": "a", "levels": 1}],
        sampler=SamplerConfig(kind="nsga2"),
        objectives=["ItemNDCG@10", "ItemHit@10", "sid_bits"],
        num_trials=4,
        asha=AshaConfig(enabled=False),
        gate=GateConfig(mode="quantile", warmup=4),
    )
    with caplog.at_level("INFO"):
        first, *drawn = run(tmp_path, config).trials.values()
    # A fixed point is a trial, whatever is known of it.
    assert (first.state, first.reason) == ("pruned", "capacity too small; not fitted")
    assert [one.state for one in drawn] == ["complete"] * 3
    for one in drawn:
        value = one.point["quality"]
        assert one.objectives == {"ItemNDCG@10": value, "ItemHit@10": 2 * value, "sid_bits": 16.0}
    best = max(drawn, key=lambda one: one.value or 0.0)
    assert pareto_front(drawn, config.objectives, config.budget.prices) == [best]
    assert "capacity); they were no trials" in caplog.text


def rejecting(folder: Path, config: SweepConfig) -> None:
    with pytest.raises(ConfigError, match=r"got none: \d+ designs rejected \(\d+ capacity\)"):
        run(folder, config)
    assert not (folder / "ledger.jsonl").exists()


@pytest.mark.parametrize("kind", ["grid", "quasi_random", "tpe"])
def test_a_space_of_rejected_designs_ends_before_any_work(kind: str, tmp_path: Path) -> None:
    space = {"levels": {"value": 1}, "quality": {"float": [0, 1], "num": 3}}
    sampler = SamplerConfig(kind=kind)
    config = dataclasses.replace(CONFIG, space=space, sampler=sampler, num_trials=5)
    rejecting(tmp_path, config)


def test_planned_designs_are_replaced_where_rejected(tmp_path: Path) -> None:
    sampler = SamplerConfig(kind="quasi_random")
    config = dataclasses.replace(CONFIG, space=DEPTHS, points=[], sampler=sampler, num_trials=6)
    sieve = Sieve(stub_resolve)
    plan = make_plan(config, parse_space(DEPTHS), tmp_path, sieve)
    assert [point["levels"] for point in plan] == [2] * 6
    assert sieve.rejections["capacity"] > 0


def test_a_smaller_number_of_trials_leaves_out_what_did_not_begin(tmp_path: Path, caplog) -> None:
    space = {"kind": {"choice": ["a"]}, "quality": {"float": [0, 1]}}
    fixed = {"kind": "a", "quality": 0.5}
    config = dataclasses.replace(
        CONFIG,
        space=space,
        points=[fixed],
        sampler=SamplerConfig(kind="quasi_random"),
        num_trials=7,
    )

    def plan(num_trials: int, *began: int) -> list[dict[str, Any]]:
        found = make_plan(
            dataclasses.replace(config, num_trials=num_trials),
            parse_space(space),
            tmp_path,
            Sieve(stub_resolve),
            started=[fixed, *(first[place] for place in began)],
        )
        write_json(tmp_path / "plan.json", {"space": space, "points": found})
        return found

    first: list[dict[str, Any]] = []
    first = plan(7)
    assert len(first) == 6
    with caplog.at_level("INFO"):
        assert plan(4, 5) == [first[0], first[1], first[5]]
    assert "num_trials=4 leaves out 3 planned designs" in caplog.text
    assert {one["quality"] for one in plan(7, 5)} == {one["quality"] for one in first}


@pytest.mark.ray
def test_a_cost_budget_stops_between_trials_and_a_larger_one_goes_on(
    ray_local, alone: Path
) -> None:
    budget = BudgetConfig(max_cost=2.5, prices=Prices(cpu_hour=36.0))
    job = SweepJob(
        config=dataclasses.replace(CONFIG, gate=GateConfig(mode="off"), budget=budget),
        folder=alone,
        dataset_key="d",
        stages=StubStages(str(alone), fit_s=100.0, cpus=(("fit", 1.0),)),
        resolve=stub_resolve,
        max_steps=30,
    )
    # Each trial costs 1 USD: the third would end above the budget and does not start.
    outcome = run_trials(job)
    assert not outcome.is_complete
    state = budget_state(outcome.records, budget)
    assert state.spent_usd == pytest.approx(2.0)
    assert state.stopped is not None
    assert "next trial is expected to cost 1" in state.stopped["reason"]
    assert state.stopped["left"] == 2
    ahead = state.stopped["next"]
    assert [row["trial"] for row in ahead] == [3, 4]
    assert ahead[0]["cost_usd"] == pytest.approx(1.0)
    assert len(stages_of(alone, "tokenize")) == 2

    too_small = dataclasses.replace(job.config, budget=dataclasses.replace(budget, max_cost=0.5))
    with pytest.raises(ConfigError, match=r"max_cost must pay for a trial, got 0\.5"):
        run_trials(dataclasses.replace(job, config=too_small))

    larger = dataclasses.replace(job.config, budget=dataclasses.replace(budget, max_cost=10.0))
    finished = run_trials(dataclasses.replace(job, config=larger))
    assert finished.is_complete
    assert len(finished.records.finished()) == 4
    assert len(stages_of(alone, "tokenize")) == 4
    assert budget_state(finished.records, larger.budget).spent_usd == pytest.approx(4.0)


@pytest.mark.ray
def test_nothing_stays_reserved(ray_local, tmp_path: Path) -> None:
    run(tmp_path)
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}


def test_bad_points_fail_before_any_work(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, points=[{"kind": "invalid"}])
    with pytest.raises(ConfigError, match=r"point \{invalid\}"):
        run(tmp_path, config)
    assert not stages_run(tmp_path)


def test_a_mistake_does_not_become_the_identity(tmp_path: Path, monkeypatch) -> None:
    wrong = {"kind": {"choice": ["invalid"]}}
    with pytest.raises(ConfigError, match=r"point \{invalid\}"):
        run(tmp_path, dataclasses.replace(CONFIG, metric="typo", space=wrong))
    assert not (tmp_path / "identity.json").exists()
    assert not (tmp_path / "plan.json").exists()
    monkeypatch.setattr(runner, "_fit", lambda *_, **__: None)
    run(tmp_path)
    assert json.loads((tmp_path / "identity.json").read_text())["metric"] == CONFIG.metric
    assert len(json.loads((tmp_path / "plan.json").read_text())["points"]) == len(QUALITIES)


def test_another_identity_is_refused(tmp_path: Path) -> None:
    check_identity(tmp_path, {"a": {"b": 1}}, name="x")
    (tmp_path / "identity.json").write_text('{"a": {"b": 1}}')
    check_identity(tmp_path, {"a": {"b": 1}}, name="x")
    with pytest.raises(ConfigError, match=r"\(only space, .*budget.* may change\).* a\.b: 1 -> 2"):
        check_identity(tmp_path, {"a": {"b": 2}}, name="x")


@pytest.mark.ray
def test_a_second_sweep_of_one_name_on_one_storage_is_refused(
    ray_local, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(runner, "_fit", lambda *_, **__: None)
    shared = dataclasses.replace(CONFIG, storage=f"sqlite:///{tmp_path / 'shared.db'}")
    first = run(tmp_path / "first", shared)
    with pytest.raises(ConfigError, match=r"name must be the only 'stub' of its storage"):
        run(tmp_path / "second", shared)
    assert not list(tmp_path.glob("second/*"))
    # Its own it knows again, also from another place.
    (tmp_path / "first").rename(tmp_path / "moved")
    assert run(tmp_path / "moved", shared).id == first.id


@pytest.mark.ray
def test_trackers_hear_of_a_sweep_and_a_dead_one_does_not_end_it(
    ray_local, tmp_path: Path, monkeypatch, caplog
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trackers = TrackersConfig(
        tensorboard=TensorboardConfig(), mlflow=MlflowConfig(tracking_uri="http://127.0.0.1:9")
    )
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        records = run(tmp_path, dataclasses.replace(CONFIG, trackers=trackers))
    assert len(records.finished()) == 4
    assert caplog.text.count("trackers.mlflow: cannot write to http://127.0.0.1:9") == 1
    folders = sorted(one.name for one in (tmp_path / "tensorboard").iterdir())
    assert folders == sorted(one.name for one in records.trials.values())
    sent = json.loads(next((tmp_path / "trackers").glob("tensorboard-*.json")).read_text())
    assert {one["state"] for one in sent.values()} == {"complete", "pruned"}
    # The sweep file is kept for whoever looks at the folder later.
    assert load_config(SweepConfig, path=tmp_path / "sweep.yaml").trackers == trackers
    study = optuna.load_study(study_name=None, storage=open_storage("", tmp_path))
    assert all("proxy:backoff_bits" in trial.user_attrs for trial in study.trials)
