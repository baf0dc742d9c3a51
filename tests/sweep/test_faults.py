from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import optuna
import pytest
import ray
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from ray.tune import TuneError

from forge_ray.errors import StorageError
from forge_ray.sweep.config import SweepConfig
from forge_ray.sweep.faults import explain, explaining, is_full
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.runner import RunOutcome, SweepJob, run_trials
from forge_ray.sweep.study import open_storage
from tests.sweep import stubs
from tests.sweep.stubs import StubStages, stages_run, stub_resolve

ray.cloudpickle.register_pickle_by_value(stubs)


def run(folder: Path, *kinds: str) -> RunOutcome:
    config = SweepConfig(
        name="stub",
        points=[{"kind": kind, "quality": 0.5} for kind in kinds],
        num_trials=len(kinds),
        max_concurrent=1,
        order="planned",
        gate=GateConfig(mode="off"),
    )
    job = SweepJob(
        config=config,
        folder=folder,
        dataset_key="d",
        stages=StubStages(str(folder)),
        resolve=stub_resolve,
        max_steps=30,
    )
    return run_trials(job)


@pytest.mark.ray
def test_a_lost_trial_starts_again_in_the_same_run_and_a_failed_one_does_not(
    ray_local, tmp_path: Path, caplog
) -> None:
    caplog.set_level("INFO", logger="forge_ray")
    records = run(tmp_path, "lost", "broken", "unreachable").records
    lost, broken, away = records.trials.values()
    assert (lost.state, broken.state, away.state) == ("complete", "failed", "complete")
    assert [len(one.attempts) for one in (lost, broken, away)] == [2, 1, 1]
    # The second attempt tells the first row again; the ledger knows it.
    assert [row["global_step"] for row in lost.history] == [10, 20, 30]
    lines = Ledger(tmp_path).path.read_text().splitlines()
    rows = [line for line in lines if lost.key in line and '"stage": "gr"' in line]
    assert len(rows) == 3
    kinds = [one["config"]["kind"] for one in stages_run(tmp_path) if one["stage"] == "train"]
    assert kinds == ["lost", "lost", "unreachable", "unreachable"]
    said = "\n".join(caplog.messages)
    assert "it starts again" in said
    assert "storage does not answer, again in 1 s: AWS Error NETWORK_CONNECTION" in said
    # Optuna knows each of them once, and none of them still runs.
    storage = open_storage("", tmp_path)
    (name,) = optuna.get_all_study_names(storage)
    told = [one.state for one in optuna.load_study(study_name=name, storage=storage).trials]
    assert told == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}


@pytest.mark.ray
def test_a_full_disk_of_a_trial_ends_the_session_and_the_next_one_finishes(
    ray_local, tmp_path: Path, monkeypatch
) -> None:
    marker = tmp_path / "full"
    marker.touch()
    job = SweepJob(
        config=SweepConfig(
            name="stub",
            points=[{"kind": kind} for kind in "abc"],
            num_trials=3,
            max_concurrent=1,
            order="planned",
            gate=GateConfig(mode="off"),
        ),
        folder=tmp_path / "sweep",
        dataset_key="d",
        stages=_FullDisk(str(tmp_path)),
        resolve=stub_resolve,
        max_steps=30,
    )
    with pytest.raises(StorageError, match=r"must have free space.*No space left on device"):
        run_trials(job)
    before = job.ledger.read()
    assert [one.state for one in before.trials.values()] == ["failed"]
    marker.unlink()
    after = run_trials(job).records
    assert [one.state for one in after.trials.values()] == ["complete"] * 3


@dataclasses.dataclass(frozen=True)
class _FullDisk(StubStages):
    def note(self, stage, config) -> None:
        if Path(self.folder, "full").exists() and stage == "train":
            raise OSError(errno.ENOSPC, "No space left on device", "/disk/model.safetensors")
        super().note(stage, config)


@pytest.mark.ray
def test_a_full_disk_of_the_driver_is_named_and_nothing_half_written_counts(
    ray_local, tmp_path: Path, monkeypatch
) -> None:
    kept = Ledger.append

    def full(self: Ledger, event: str, **fields: object) -> None:
        if event == "finish":
            with self.path.open("ab") as stream:
                stream.write(b'{"event": "fini')
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        kept(self, event, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", full)
        with pytest.raises(StorageError, match=r"ledger.jsonl must have free space"):
            run(tmp_path, "a", "b")
    records = run(tmp_path, "a", "b").records
    assert [one.state for one in records.trials.values()] == ["complete", "complete"]
    storage = open_storage("", tmp_path)
    (name,) = optuna.get_all_study_names(storage)
    told = [one.state for one in optuna.load_study(study_name=name, storage=storage).trials]
    assert TrialState.RUNNING not in told


def test_the_cause_is_found_below_what_tune_makes_of_it(tmp_path: Path) -> None:
    try:
        try:
            raise OSError(errno.EIO, "Input/output error", "/disk/ledger.jsonl")
        except OSError:
            raise TuneError("Traceback …") from None
    except TuneError as error:
        found = explain(error, folder=tmp_path, storage="x")
    assert str(found).startswith("/disk/ledger.jsonl must be writable while the sweep runs, got In")
    for other in (TuneError("a bug"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")):
        assert explain(other, folder=tmp_path, storage="x") is None
    stale = explain(OSError(errno.ESTALE, "Stale file handle"), folder=tmp_path, storage="x")
    assert str(stale).startswith(f"{tmp_path} must be writable while the sweep runs, got Stale")
    with (
        pytest.raises(StorageError, match=r"storage sqlite:///x must take .* database is locked"),
        explaining(folder=tmp_path, storage="sqlite:///x"),
    ):
        raise StorageInternalError("commit") from ValueError("database is locked")
    assert is_full("OSError: [Errno 28] Error writing bytes. Detail: No space left on device")
