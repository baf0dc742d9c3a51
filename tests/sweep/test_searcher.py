from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from forge_ray.errors import ConfigError
from forge_ray.sweep import searcher
from forge_ray.sweep.ledger import Ledger, TrialRecord
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.searcher import (
    PrunedAwareOptunaSearch,
    TrialSource,
    outcome_of,
)
from forge_ray.sweep.space import parse_space
from forge_ray.sweep.study import (
    KEY,
    close_unfinished,
    copy_finished,
    make_sampler,
    open_storage,
    study_name,
)
from tests.sweep.stubs import stub_resolve

METRIC = "ItemNDCG@10"
DEFINITION = {"kind": {"choice": ["a", "b"]}, "quality": {"float": [0, 1]}}
SPACE = parse_space(DEFINITION)


def make(
    folder: Path,
    *,
    planned=(),
    admits=lambda spec: True,
    records=None,
    num_trials=None,
    objectives=(METRIC,),
    space=SPACE,
) -> PrunedAwareOptunaSearch:
    source = TrialSource(
        records=records or {},
        planned=planned,
        num_trials=num_trials,
        resolve=stub_resolve,
        space=space,
    )
    return PrunedAwareOptunaSearch(
        space=space,
        source=source,
        ledger=Ledger(folder),
        objectives=list(objectives),
        sampler=make_sampler("tpe", seed=0),
        study_name=study_name("s", DEFINITION),
        storage=open_storage("", folder),
        next_place=lambda waiting: 0,
        prices=Prices(cpu_hour=3600.0),
        admits=admits,
    )


def record_of(point, *, state: str = "complete", number: int = 0, **fields) -> TrialRecord:
    resolved = stub_resolve(point)
    return TrialRecord(
        number=number,
        key=resolved.key,
        point=point,
        config=resolved.config,
        state=state,  # type: ignore[arg-type]
        **fields,
    )


def test_private_names_of_the_base_class_exist() -> None:
    search = OptunaSearch(space=lambda trial: {}, metric="m", mode="max")
    assert {"_ot_trials", "_ot_study", "_completed_trials", "_study_name"} <= set(vars(search))


def test_planned_points_come_in_order_with_their_parameters(tmp_path: Path) -> None:
    points = [{"kind": "random"}, {"kind": "a", "quality": 0.25}, {"kind": "b", "quality": 0.5}]
    search = make(tmp_path, planned=points)
    suggested = [search.suggest(f"t{index}") for index in range(3)]
    assert [one["config"] for one in suggested] == points
    assert [one["number"] for one in suggested] == [0, 1, 2]
    assert search.suggest("t3") == Searcher.FINISHED
    trials = search.study.get_trials()
    # The control lies outside the space: no parameter that TPE could learn from.
    assert [trial.params for trial in trials] == [{}, points[1], points[2]]
    assert trials[0].user_attrs["point"] == {"kind": "random"}
    assert trials[1].user_attrs["ray_trial_id"] == "t1"


def test_outcomes_reach_optuna_as_they_are(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": index / 8} for index in range(6)]
    search = make(tmp_path, planned=points)
    for index in range(6):
        search.suggest(f"t{index}")
    row = {"stage": "gr", "global_step": 10, METRIC: 0.1}
    search.on_trial_complete(
        "t0", {"stage": "proxy", "decision/pruned_by": "gate", "decision/reason": "dead codes"}
    )
    search.on_trial_complete("t1", {**row, "decision/pruned_by": "asha", "decision/reason": "low"})
    search.on_trial_result("t2", row)
    search.on_trial_complete("t2", {"stage": "final", "global_step": 20, METRIC: 0.3})
    search.on_trial_complete("t3", {"stage": "final", "global_step": 20, METRIC: float("nan")})
    search.on_trial_complete("t4", error=True)
    search.on_trial_complete("t5", row)  # stopped at the budget
    trials = search.study.get_trials()
    assert [trial.state for trial in trials] == [
        TrialState.PRUNED,
        TrialState.PRUNED,
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.FAIL,
    ]
    assert trials[0].user_attrs["pruned_by"] == "gate"
    assert trials[0].user_attrs["reason"] == "dead codes"
    assert trials[1].intermediate_values == {10: 0.1}
    assert trials[2].intermediate_values == {10: 0.1}
    assert trials[2].value == 0.3
    Ledger(tmp_path).append("start", key="x", number=9, point={}, config={})
    finished = [
        event["state"] for event in Ledger(tmp_path)._events() if event["event"] == "finish"
    ]
    # The interrupted one has no end: the next run continues it.
    assert finished == ["pruned", "pruned", "complete", "failed", "failed"]


def test_optuna_learns_what_a_trial_cost(tmp_path: Path) -> None:
    search = make(tmp_path, planned=[{"kind": "a", "quality": 0.5}])
    key = search.suggest("t0")["key"]
    row = {"key": key, "stage": "final", "metrics": {}, "seconds": {"fit": 2.0, "train": 5.0}}
    ledger = search._ledger
    ledger.append("start", key=key, number=0, point={}, config={}, cpus={"fit": 0.5, "train": 2})
    ledger.append("row", **row)
    search.on_trial_complete("t0", {"stage": "final", "global_step": 20, METRIC: 0.3})
    assert search.study.get_trials()[0].user_attrs["cost_usd"] == 11.0


def test_proxies_become_attributes_also_of_a_trial_that_the_gate_stops(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": 0.25}, {"kind": "b", "quality": 0.5}]
    search = make(tmp_path, planned=points)
    scores = {"proxy/backoff_bits": 11.5, "proxy/gini": float("nan"), "proxy/infeasible": "x"}
    row = {"stage": "proxy", "global_step": 0, **scores}
    for index in range(2):
        search.suggest(f"t{index}")
    search.on_trial_result("t0", row)
    search.on_trial_complete("t1", {**row, "decision/pruned_by": "gate"})
    for trial in search.study.get_trials():
        attributes = {name for name in trial.user_attrs if name.startswith("proxy:")}
        assert attributes == {"proxy:backoff_bits"}
        assert trial.user_attrs["proxy:backoff_bits"] == 11.5


AIMS = [METRIC, f"{METRIC}/tail", "sid_bits"]


def test_several_objectives_reach_optuna_and_the_ledger(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": index / 8} for index in range(4)]
    search = make(tmp_path, planned=points, objectives=AIMS)
    ledger = Ledger(tmp_path)
    for index in range(4):
        params = search.suggest(f"t{index}")
        names = ("number", "key", "config", "facts")
        ledger.append("start", point=points[index], **{name: params[name] for name in names})
        metrics = {METRIC: 0.3, "global_step": 20}
        if index:
            metrics[f"{METRIC}/tail"] = 0.1
        if index < 2:
            ledger.append("row", key=params["key"], stage="final", metrics=metrics)
    row = {"stage": "gr", "global_step": 10, METRIC: 0.1}
    for index in range(4):
        search.on_trial_result(f"t{index}", row)
    final = {"stage": "final", "global_step": 20, METRIC: 0.3}
    search.on_trial_complete("t0", final)
    search.on_trial_complete("t1", final)
    search.on_trial_complete("t2", {**row, "decision/pruned_by": "asha", "decision/reason": "low"})
    search.on_trial_complete("t3", error=True)
    lacking, complete, pruned, failed = search.study.get_trials()
    assert lacking.state == TrialState.FAIL
    assert lacking.user_attrs["reason"] == f"{METRIC}/tail was not measured"
    assert (complete.state, complete.values) == (TrialState.COMPLETE, [0.3, 0.1, 24.0])
    directions = [one.name for one in search.study.directions]
    assert directions == ["MAXIMIZE", "MAXIMIZE", "MINIMIZE"]
    # Optuna prunes under one objective only.
    assert (pruned.state, pruned.user_attrs["pruned_by"]) == (TrialState.FAIL, "asha")
    assert failed.state == TrialState.FAIL
    records = list(ledger.read().trials.values())
    assert [one.state for one in records] == ["failed", "complete", "pruned", "failed"]
    assert records[1].objectives == dict(zip(AIMS, [0.3, 0.1, 24.0], strict=True))
    # A study of the grown space takes over what has all objectives.
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"])
    assert copy_finished(study, SPACE, records, objectives=AIMS, prices=Prices()) == 1
    assert study.get_trials()[0].values == [0.3, 0.1, 24.0]


def test_a_dead_driver_s_complete_trial_of_several_objectives(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": index / 8} for index in range(3)]
    search = make(tmp_path, planned=points, objectives=AIMS)
    keys = [search.suggest(f"t{index}")["key"] for index in range(3)]
    values = dict(zip(AIMS, [0.3, 0.1, 24.0], strict=True))
    ends = [
        {"state": "complete", "value": 0.3, "objectives": values},
        {"state": "pruned"},
        {"state": "running"},
    ]
    records = [record_of(point, **end) for point, end in zip(points, ends, strict=True)]
    known = dict(zip(keys, records, strict=True))
    assert close_unfinished(open_storage("", tmp_path), "s", known) == 3
    trials = search.study.get_trials()
    assert [one.state.name for one in trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert trials[0].values == [0.3, 0.1, 24.0]


def test_studies_differ_by_their_objectives() -> None:
    alone = study_name("s", DEFINITION)
    assert study_name("s", DEFINITION, [METRIC]) == alone
    assert study_name("s", DEFINITION, AIMS) != alone


def test_rejected_draws_cost_no_trial(tmp_path: Path) -> None:
    space = parse_space({"levels": {"int": [1, 2]}, "quality": {"float": [0, 1]}})
    search = make(tmp_path, num_trials=8, space=space)
    points = [search.suggest(f"t{index}") for index in range(8)]
    assert all(one["config"]["levels"] == 2 for one in points)
    assert [one["number"] for one in points] == list(range(8))
    told = [one for one in search.study.get_trials() if one.state != TrialState.RUNNING]
    assert len(told) == search._source.rejections["capacity"] > 0
    for trial in told:
        assert trial.state == TrialState.PRUNED
        assert trial.constraints == {"capacity": 1.0}
        assert trial.user_attrs["reason"] == "capacity too small; not fitted"
    assert search.suggest("t8") == Searcher.FINISHED


def test_a_space_without_a_feasible_draw_ends(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(searcher, "_MAX_REJECTED", 5)
    space = parse_space({"levels": {"value": 1}, "quality": {"float": [0, 1]}})
    search = make(tmp_path, num_trials=8, space=space, objectives=AIMS)
    assert search.suggest("t0") == Searcher.FINISHED
    assert [one.state for one in search.study.get_trials()] == [TrialState.FAIL] * 5


def test_a_trial_that_may_not_start_waits_while_others_run(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": index / 8} for index in range(3)]
    fitting = [points[0]]
    search = make(tmp_path, planned=points, admits=lambda spec: spec.point in fitting)
    assert search.suggest("t0")["config"] == points[0]
    assert search.suggest("t1") is None
    # The running one ended early, so there is something left: not for the next, but for another.
    fitting.append(points[2])
    assert search.suggest("t1")["config"] == points[2]
    search.on_trial_complete("t0", {"stage": "proxy", "decision/pruned_by": "gate"})
    assert search.suggest("t2") is None
    search.on_trial_complete("t1", {"stage": "final", "global_step": 20, METRIC: 0.3})
    assert search.suggest("t2") == Searcher.FINISHED
    assert [one.point for one in search._source.queue] == points[1:2]


def test_late_results_are_ignored(tmp_path: Path) -> None:
    search = make(tmp_path, planned=[{"kind": "a", "quality": 0.5}])
    search.suggest("t0")
    final = {"stage": "final", "global_step": 20, METRIC: 0.3}
    search.on_trial_complete("t0", final)
    search.on_trial_result("t0", {"stage": "gr", "global_step": 30, METRIC: 0.9})
    search.on_trial_complete("t0", error=True)
    search.on_trial_complete("unknown", error=True)
    assert search.study.get_trials()[0].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    ("result", "error", "state"),
    [
        (None, False, "interrupted"),
        (None, True, "failed"),
        ({"stage": "final", METRIC: None}, False, "failed"),
        ({"stage": "final", METRIC: 0.5}, False, "complete"),
        ({"stage": "gr", METRIC: 0.5}, False, "interrupted"),
        ({"stage": "gr", METRIC: 0.5, "decision/pruned_by": "asha"}, False, "pruned"),
    ],
)
def test_outcome_rules(result, error: bool, state: str) -> None:
    assert outcome_of(result, metric=METRIC, error=error).state == state


def test_finished_trials_are_never_handed_out_again(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": 0.1}, {"kind": "b", "quality": 0.2}]
    done = record_of(points[0])
    search = make(tmp_path, planned=points, records={done.key: done})
    suggested = search.suggest("t0")
    assert suggested["config"] == points[1]
    assert suggested["number"] == 1
    assert search.suggest("t1") == Searcher.FINISHED


def test_failed_and_interrupted_trials_are_tried_again(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": 0.1}, {"kind": "b", "quality": 0.2}]
    records = {
        one.key: one
        for one in (
            record_of(points[0], state="failed"),
            record_of(points[1], state="running", number=1),
        )
    }
    search = make(tmp_path, records=records, num_trials=2)
    assert [search.suggest(f"t{i}")["config"] for i in range(2)] == points
    assert search.suggest("t2") == Searcher.FINISHED


def test_what_failed_outside_the_space_does_not_come_back(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": 0.1}, {"kind": "b", "quality": 0.2}]
    records = {
        one.key: one
        for one in (record_of(point, state="failed", number=n) for n, point in enumerate(points))
    }
    narrowed = parse_space({**DEFINITION, "kind": {"choice": ["b"]}})
    search = make(tmp_path, records=records, num_trials=2, space=narrowed)
    assert search.suggest("t0")["config"] == points[1]
    assert search.suggest("t1") == Searcher.FINISHED


def test_tpe_draws_distinct_trials_up_to_the_budget(tmp_path: Path) -> None:
    search = make(tmp_path, num_trials=5)
    keys = {search.suggest(f"t{index}")["key"] for index in range(5)}
    assert len(keys) == 5
    assert search.suggest("t5") == Searcher.FINISHED


def test_a_space_that_runs_dry_ends_the_sweep(tmp_path: Path) -> None:
    search = make(tmp_path, num_trials=4)
    search._parameters = parse_space({"kind": {"choice": ["a", "b"]}})
    assert len({search.suggest(f"t{index}")["key"] for index in range(2)}) == 2
    assert search.suggest("t2") == Searcher.FINISHED
    assert not search._source.may_draw


def test_a_trial_of_an_earlier_space_is_not_wanted() -> None:
    old = record_of({"kind": "gone"}, state="running")
    source = TrialSource(
        records={old.key: old},
        planned=[{"kind": "a"}],
        num_trials=None,
        resolve=stub_resolve,
        space=SPACE,
    )
    assert source.wants(stub_resolve({"kind": "a"}).key)
    assert not source.wants(old.key)


def test_zombies_are_closed_with_what_the_ledger_knows(tmp_path: Path) -> None:
    points = [{"kind": "a", "quality": 0.1 * index} for index in range(3)]
    search = make(tmp_path, planned=points)
    for index in range(3):
        search.suggest(f"t{index}")
    search.study.enqueue_trial({"kind": "a", "quality": 0.9})
    records = [
        record_of(points[0], value=0.7),
        record_of(points[1], state="pruned", reason="low", number=1),
        record_of(points[2], state="running", number=2),
    ]
    storage = open_storage("", tmp_path)
    assert close_unfinished(storage, "s", {one.key: one for one in records}) == 4
    assert close_unfinished(storage, "s", {}) == 0
    study = optuna.load_study(study_name=study_name("s", DEFINITION), storage=storage)
    assert [trial.state for trial in study.get_trials()] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
    ]
    assert study.best_value == 0.7


def test_other_sweeps_in_a_shared_storage_are_left_alone(tmp_path: Path) -> None:
    make(tmp_path, planned=[{"kind": "a", "quality": 0.1}]).suggest("t0")
    storage = open_storage("", tmp_path)
    other = optuna.create_study(study_name="s-two-00000000", storage=storage)
    other.ask()
    close_unfinished(storage, "s", {})
    assert other.get_trials()[0].state == TrialState.RUNNING


def test_finished_trials_move_to_the_study_of_a_grown_space(tmp_path: Path) -> None:
    grown = {"kind": {"choice": ["a", "b", "c"]}, "quality": {"float": [0, 1]}}
    # A loss that ran away is null in the ledger, and no value for Optuna.
    history = [{"global_step": 10, METRIC: 0.1}, {"global_step": 20, METRIC: None}]
    records = [
        record_of({"kind": "a", "quality": 0.1}, value=0.7, history=history),
        record_of({"kind": "b", "quality": 0.2}, state="pruned", number=1, history=history),
        record_of({"kind": "random"}, state="pruned", number=2),
        record_of({"kind": "b", "quality": 0.3}, state="failed", number=3),
    ]
    study = optuna.create_study(
        study_name=study_name("s", grown), storage=open_storage("", tmp_path), direction="maximize"
    )
    prices = Prices(cpu_hour=3600.0)
    for added in (2, 0):
        copied = copy_finished(
            study, parse_space(grown), records, objectives=[METRIC], prices=prices
        )
        assert copied == added
    first, second = study.get_trials()
    assert (first.value, first.params) == (0.7, {"kind": "a", "quality": 0.1})
    assert (second.state, second.intermediate_values) == (TrialState.PRUNED, {10: 0.1})
    assert first.user_attrs[KEY] == records[0].key


def test_journal_storage_and_bad_urls(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "study.journal"), tmp_path)
    optuna.create_study(storage=storage, study_name="x").ask()
    with pytest.raises(ConfigError, match="database URL"):
        open_storage("somewhere", tmp_path)


def test_no_pickles_are_kept_or_read(tmp_path: Path) -> None:
    search = make(tmp_path, planned=[{"kind": "a", "quality": 0.1}])
    search.save(str(tmp_path / "state.json"))
    assert (tmp_path / "state.json").read_text().startswith("{")
    with pytest.raises(NotImplementedError):
        search.restore(str(tmp_path / "state.json"))


def test_a_resumed_plan_has_the_numbers_that_it_had() -> None:
    """The most promising design starts first, whatever its place."""
    points = [{"kind": "a", "quality": place / 8} for place in range(3)]
    started = record_of(points[2], state="failed", number=2)
    for records in ({}, {started.key: started}):
        source = TrialSource(
            records=records, planned=points, num_trials=None, resolve=stub_resolve, space=SPACE
        )
        assert [spec.number for spec in source.queue] == [0, 1, 2]
