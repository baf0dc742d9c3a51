"""What a sweep takes over from earlier ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray

from forge_ray.errors import ConfigError
from forge_ray.sweep.config import IDENTITY, SamplerConfig, SweepConfig, WarmStartConfig, identity
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.ledger import Ledger, write_json
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.runner import SweepJob, run_trials
from forge_ray.sweep.space import parse_space
from forge_ray.sweep.study import KEY, open_storage
from forge_ray.sweep.warm_start import WarmStart, read_earlier
from tests.sweep import stubs
from tests.sweep.stubs import StubStages, stages_run, stub_resolve

ray.cloudpickle.register_pickle_by_value(stubs)

METRIC = "ItemNDCG@10"
SPACE = {"kind": {"choice": ["a"]}, "quality": {"float": [0, 1]}}
CONFIG = SweepConfig(
    name="new",
    space=SPACE,
    sampler=SamplerConfig(kind="tpe"),
    num_trials=4,
    max_concurrent=1,
    order="planned",
    gate=GateConfig(mode="off"),
    asha=AshaConfig(enabled=False),
)


def write_sweep(folder: Path, qualities: dict[float, float | None], **changed: Any) -> None:
    """A sweep of complete trials by quality and value; None is pruned."""
    config = dataclasses.replace(CONFIG, name=folder.name, **changed)
    write_json(folder / IDENTITY, identity(config, dataset_key="d"))
    ledger = Ledger(folder)
    ledger.append("session", space={}, remaining=len(qualities))
    for number, (quality, value) in enumerate(qualities.items()):
        point = {"kind": "a", "quality": quality}
        key = stub_resolve(point).key
        ledger.append("start", key=key, number=number, point=point, config=point)
        if value is None:
            ledger.append("finish", key=key, state="pruned", pruned_by="gate", reason="poor")
            continue
        row = {"global_step": 30, METRIC: value}
        ledger.append("row", key=key, stage="gr", metrics=row)
        ledger.append("row", key=key, stage="final", metrics={METRIC: value})
        ledger.append("finish", key=key, state="complete", value=value)


def read(tmp_path: Path, *sweeps: str, best: int = 1, **changed: Any) -> WarmStart:
    config = dataclasses.replace(CONFIG, **changed)
    return read_earlier(
        sweeps,
        best=best,
        folder=tmp_path / "new",
        space=parse_space(config.space),
        meaning=identity(config, dataset_key="d"),
        resolve=stub_resolve,
    )


def qualities(points: list[dict[str, Any]]) -> list[float]:
    return [one["quality"] for one in points]


def test_the_best_come_first_and_the_others_teach(tmp_path: Path) -> None:
    write_sweep(tmp_path / "old", {0.2: 0.2, 0.9: 0.9, 0.5: 0.5, 0.1: None, 7.0: 0.99})
    found = read(tmp_path, "old", best=2)
    # 7.0 lies outside the space, however good.
    assert qualities(found.first) == [0.9, 0.5]
    assert qualities([one.point for one in found.taught]) == [0.2, 0.1]
    assert "4 finished trials lie in the space, 2 of the best run first" in found.lines[0]


def test_two_sweeps_add_up_without_repeats(tmp_path: Path) -> None:
    write_sweep(tmp_path / "old", {0.2: 0.2, 0.9: 0.9})
    write_sweep(tmp_path / "older", {0.9: 0.9, 0.3: 0.3})
    found = read(tmp_path, "old", str(tmp_path / "older"))
    assert qualities(found.first) == [0.9, 0.3]
    assert qualities([one.point for one in found.taught]) == [0.2]


def test_values_of_other_settings_teach_nothing(tmp_path: Path) -> None:
    """A trial of another dataset or training has another key; another judge the same key."""
    judged = dataclasses.replace(CONFIG.evaluation, users=100)
    write_sweep(tmp_path / "old", {0.2: 0.2, 0.9: 0.9}, evaluation=judged)
    found = read(tmp_path, "old")
    assert (qualities(found.first), found.taught) == ([0.9], [])
    assert "none computes what a trial of this sweep would" in found.lines[0]


def test_a_sweep_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for name in ("gone", "new"):
        with pytest.raises(ConfigError, match=r"warm_start\.sweeps must name other sweeps"):
            read(tmp_path, name)


@pytest.mark.ray
def test_a_sweep_runs_the_best_first_and_its_sampler_knows_the_rest(
    ray_local, tmp_path: Path
) -> None:
    old = {0.1 * place: 0.1 * place for place in range(10)}
    write_sweep(tmp_path / "old", old)
    job = SweepJob(
        config=dataclasses.replace(CONFIG, warm_start=WarmStartConfig(sweeps=["old"], best=2)),
        folder=tmp_path / "new",
        dataset_key="d",
        stages=StubStages(str(tmp_path)),
        resolve=stub_resolve,
        max_steps=30,
    )
    records = run_trials(job).records
    ran = [one["config"]["quality"] for one in stages_run(tmp_path) if one["stage"] == "train"]
    assert ran[:2] == [0.1 * 9, 0.1 * 8]
    assert len(records.trials) == 4
    (name,) = optuna.get_all_study_names(open_storage("", job.folder))
    study = optuna.load_study(study_name=name, storage=open_storage("", job.folder))
    keys = [one.user_attrs[KEY] for one in study.trials]
    assert len(keys) == len(set(keys)) == 8 + 4
    # None of the best is a control of the gate.
    assert [one.is_control for one in records.trials.values()][:2] == [False, False]
