"""Training that survives a kill, here and under Ray, and keeps the model that measures best."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError, TrainingError
from forge_ray.sid.config import TrainConfig
from forge_ray.sid.quantizers.base import TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVae, RqVaeConfig
from forge_ray.sid.train import STATE_FILE, train_rq_vae
from tests.contracts.quantizer_contract import clustered_vectors, neighbour_pairs

SMALL: dict[str, Any] = {
    "levels": 2,
    "codebook_size": 8,
    "hidden": [16],
    "latent_dim": 8,
    "batch_size": 64,
    "pair_batch_size": 32,
    "pair_share": 0.5,
    "max_steps": 60,
    "restart_every": 5,
    "kmeans_init": False,
    "random_depth": 0.5,
    "lr": 1e-3,
}
"""Everything that has a state or draws at random is on."""


def small(**changes: Any) -> RqVaeConfig:
    return from_mapping(RqVaeConfig, {**SMALL, **changes})


def data() -> TrainingSet:
    rng = np.random.default_rng(5)
    pairs = neighbour_pairs()
    users = {name: rng.integers(0, 50, len(pairs)) for name in ("user", "user_positive")}
    return TrainingSet(
        clustered_vectors(),
        pairs={
            "co_occurrence": pairs,
            "interactions": TrainingPairs(pairs.anchor, pairs.positive, **users),
        },
        teachers={"teacher": rng.normal(size=(400, 8)).astype(np.float32)},
        users=rng.normal(size=(50, 12)).astype(np.float32),
        user_teachers={"teacher": rng.normal(size=(50, 8)).astype(np.float32)},
    )


def trained(folder: Path, config: RqVaeConfig | None = None, **options: Any) -> RqVae:
    spread = options.pop("spread", TrainConfig(checkpoint_every=7))
    return train_rq_vae(
        config or small(),
        data(),
        seed=0,
        spread=spread,
        filesystem=LocalFileSystem(),
        folder=str(folder),
        **options,
    )


def assert_equal(first: RqVae, second: RqVae, *, exactly: bool) -> None:
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        if exactly:
            assert np.array_equal(value, other[name]), name
        else:
            np.testing.assert_allclose(value, other[name], rtol=1e-4, atol=2e-5, err_msg=name)


class Recorder:
    """A report that keeps its rows, and may wait or fail on the way."""

    def __init__(self, *, fail_at: int = 0) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.fail_at = fail_at

    def __call__(self, step: int, metrics: Any) -> None:
        if self.fail_at and step >= self.fail_at:
            raise KeyboardInterrupt
        self.rows.append((step, dict(metrics)))


def test_a_killed_training_continues_bit_by_bit(tmp_path: Path) -> None:
    whole = Recorder()
    reference = trained(tmp_path / "whole", report=whole)
    folder = tmp_path / "killed"
    script = (
        "import sys, time; from pathlib import Path; from tests.sid.test_train import trained\n"
        "trained(Path(sys.argv[1]), report=lambda step, row: time.sleep(0.1 if step > 20 else 0))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=root)
    deadline = time.monotonic() + 120
    while not (folder / STATE_FILE).exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "the training ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = Recorder()
    again = trained(folder, report=resumed)
    assert_equal(reference, again, exactly=True)
    assert resumed.rows == whole.rows


def test_stopping_at_any_save_changes_nothing(tmp_path: Path) -> None:
    config = small(
        alignment={"kind": "das", "users": {"latent_dim": 8, "codebook_size": 8}},
        diversity={"weight": 0.1, "every": 9, "groups": 3},
        ema=False,
        max_steps=30,
    )
    reference = trained(tmp_path / "whole", config)
    for stop in (8, 16, 29):
        folder = tmp_path / f"stop-{stop}"
        with pytest.raises(KeyboardInterrupt):
            trained(folder, config, report=Recorder(fail_at=stop))
        assert (folder / STATE_FILE).exists()
        assert_equal(reference, trained(folder, config), exactly=True)


class Scores:
    """A measurement that prefers the model at one step."""

    def __init__(self, best: int) -> None:
        self.best = best
        self.calls = 0

    def __call__(self, model: RqVae) -> dict[str, float]:
        self.calls += 1
        assert model.encode(clustered_vectors(5)).shape == (5, 2)
        return {"backoff_bits": float(abs(self.calls - self.best))}


def test_the_best_model_is_kept(tmp_path: Path) -> None:
    kept = {}
    for best in (2, 4):
        scores = Scores(best)
        kept[best] = trained(tmp_path / str(best), select=scores)
        assert scores.calls == 4
        assert kept[best].facts() == {
            "kept_step": 15 * best,
            "kept_metrics": {"backoff_bits": 0.0},
        }
    last = trained(tmp_path / "unmeasured")
    assert last.facts()["kept_step"] == 60
    assert_equal(kept[4], last, exactly=True)
    with pytest.raises(AssertionError):
        assert_equal(kept[2], last, exactly=True)
    more = Scores(1)
    trained(tmp_path / "more", small(selection={"checks": 7}), select=more)
    assert more.calls == 7
    none = Scores(1)
    trained(tmp_path / "none", small(selection={"checks": 0}), select=none)
    assert none.calls == 0


def test_the_kept_model_survives_a_stop(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, select=Scores(1), report=Recorder(fail_at=50))
    worse = Scores(-10)
    assert trained(tmp_path, select=worse).facts()["kept_step"] == 15
    assert worse.calls < 4


class DiesOnce:
    """Kills its own process at the first measurement; a marker file remembers it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __call__(self, model: RqVae) -> dict[str, float]:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"backoff_bits": -float(model.codebooks[0].square().mean())}


@pytest.mark.ray
class TestOnRay:
    def test_two_workers_with_a_killed_one_give_what_one_process_gives(
        self, ray_local: None, tmp_path: Path
    ) -> None:
        config = small(alignment={"kind": "rlmrec"}, mixing="masked")
        spread = TrainConfig(workers=2, checkpoint_every=7, max_failures=1)
        rows = Recorder()
        two = trained(
            tmp_path / "two",
            config,
            spread=spread,
            select=DiesOnce(tmp_path / "killed"),
            report=rows,
        )
        assert (tmp_path / "killed").exists()
        one_rows = Recorder()
        (tmp_path / "killed").touch()
        one = trained(
            tmp_path / "one", config, select=DiesOnce(tmp_path / "killed"), report=one_rows
        )
        assert_equal(one, two, exactly=False)
        assert two.facts()["kept_step"] == one.facts()["kept_step"]
        assert [step for step, _ in rows.rows] == [step for step, _ in one_rows.rows]
        assert np.array_equal(one.encode(clustered_vectors()), two.encode(clustered_vectors()))

    def test_users_and_teachers_arrive_through_ray_data(
        self, ray_local: None, tmp_path: Path
    ) -> None:
        config = small(
            alignment={"kind": "das", "users": {"latent_dim": 8, "codebook_size": 8}}, max_steps=12
        )
        one = trained(tmp_path / "one", config)
        ray_one = trained(tmp_path / "ray", config, spread=TrainConfig(workers=1))
        assert_equal(one, ray_one, exactly=False)

    def test_errors_of_workers_are_our_own(self, ray_local: None, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"train\.workers must divide the 63"):
            trained(tmp_path / "a", small(batch_size=63), spread=TrainConfig(workers=2))
        diverging = small(lr=1e30, alignment={"kind": "none"}, kmeans_init=True)
        with pytest.raises(TrainingError, match="must stay finite"):
            trained(tmp_path / "b", diverging, spread=TrainConfig(workers=1, max_failures=0))
