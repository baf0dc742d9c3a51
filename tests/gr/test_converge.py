"""A change of SIDs on a small temporal log: what arms begin with, how they are measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError, TrainingError
from forge_ray.gr import converge as module
from forge_ray.gr import train
from forge_ray.gr.checkpoint import HISTORY_FILE, load_generator
from forge_ray.gr.converge import (
    ARMS,
    ConvergeConfig,
    Rollout,
    _fill,
    _whole,
    converge,
    convergence,
)
from forge_ray.gr.convergence import summarize
from forge_ray.gr.initial import initial_generator
from forge_ray.gr.stages import SidVariant
from forge_ray.gr.train import TrainResult
from tests.gr.test_stages import (
    large_variant,
    random_variant,
    require_small,
    temporal_stages,
    two_stages,
)
from tests.gr.test_train import SMALL

pytestmark = pytest.mark.usefixtures("process_group")


def settings(*overrides: str) -> ConvergeConfig:
    given = [f"train.{one}" for one in SMALL]
    more = [
        "train.in_process=true",
        "train.max_steps=10",
        "train.validation.every=5",
        "old_steps=30",
        "offline_steps=10",
        "metric=HR@10",
        "seeds=[0,1]",
    ]
    return load_config(ConvergeConfig, overrides=[*given, *more, *overrides])


class World:
    """Three stages and two SID tables of nobody's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ArtifactStore(root / "store")
        self.stages: list[Dataset] = temporal_stages(self.store, root / "raw")
        self.old, self.new = (
            random_variant(self.stages, root / f"{name}.npz", seed)
            for seed, name in enumerate(("before", "after"))
        )

    def rollout(self, config: ConvergeConfig, seed: int = 0) -> Rollout:
        runs = str(self.root / "runs")
        return Rollout(config, seed, self.stages, self.old, self.new, self.store, runs)


@pytest.fixture(scope="module")
def world(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("converge"))


def began(rollout: Rollout, arm: str, steps: int) -> dict[str, Tensor]:
    """Weights that the first training of an arm on the new SIDs begins with."""
    config = rollout._settings(rollout._start(arm), steps)
    dataset = rollout.stages[rollout.config.rollout - 1]
    generator = initial_generator(config, rollout.store, dataset, rollout.new.table)
    return {name: one.clone() for name, one in generator.state_dict().items()}


@pytest.mark.slow
@pytest.mark.ray
def test_arms_begin_with_what_they_say(world: World) -> None:
    rollout = world.rollout(settings())
    before = load_generator(rollout.before()[-1].artifact, world.old.table)
    old, tables = before.state_dict(), before.code_tables()
    cold, dense, mapped = (began(rollout, arm, 10) for arm in ("cold", "dense", "mapped"))
    # Events of the stage that the old model learned last, not of the one to come.
    counts = torch.from_numpy(world.stages[rollout.config.rollout - 2].train_counts() + 1.0)
    for name, weights in dense.items():
        if name not in tables:
            assert torch.equal(weights, old[name])
            assert torch.equal(mapped[name], old[name])
            continue
        first, last = tables[name].before, tables[name].before + tables[name].num_rows
        assert torch.equal(weights[first:last], cold[name][first:last])
        assert torch.equal(weights[:first], old[name][:first])
        codes = [
            torch.from_numpy(np.asarray(v.table.codes, np.int64)) for v in (world.new, world.old)
        ]
        rows, theirs = (tables[name].rows(one) for one in codes)
        for level in range(2):
            items = rows[:, level] == rows[7, level]
            share = counts[items] / counts[items].sum()
            mean = (old[name][theirs[items, level]].double() * share[:, None]).sum(0)
            torch.testing.assert_close(mapped[name][rows[7, level]].double(), mean)
    assert any(not torch.equal(cold[name], old[name]) for name in old if name not in tables)


@pytest.mark.slow
@pytest.mark.ray
def test_every_arm_stands_beside_the_old_model_and_comes_from_the_store_the_second_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = settings(), []

    def simulate() -> object:
        return converge(
            world.stages,
            world.old,
            world.new,
            config,
            store=world.store,
            run_dir=str(world.root / "runs"),
            tell=lambda arm, seed, summary: told.append((seed, arm)),
        )

    found = simulate()
    assert told == [(seed, arm) for seed in (0, 1) for arm in ARMS]
    for arm, curves in found.curves.items():
        assert len(curves) == 2
        for curve in curves:
            online = [(p.stage, p.steps) for p in curve if p.phase == "online"]
            offline = [(p.stage, p.steps) for p in curve if p.phase == "offline"]
            assert online == [(2, 0), (2, 5), (2, 10), (3, 15), (3, 20)]
            assert offline == ([(1, 0), (1, 5), (1, 10)] if ARMS[arm].is_pretrained else [])
            tokens = [p.tokens for p in curve if p.phase == "online"]
            assert tokens[0] == 0
            assert tokens == sorted(set(tokens))
    references = {
        tuple(p.reference for p in curves[0] if p.phase == "online")
        for curves in found.curves.values()
    }
    assert len(references) == 1
    rollout = world.rollout(config)
    rows = [row["HR@10"] for result in rollout.reference() for row in result.history]
    assert next(iter(references))[1:] == tuple(rows)
    served = {p.reference for p in found.curves["offline"][0] if p.phase == "offline"}
    assert served == {rollout.before()[-1].history[-1]["HR@10"]}
    # The first online figure of a pretrained arm is that of its offline model, on other users.
    assert found == convergence(found.curves, config)
    for arm, curve in found.mean.items():
        assert found.summaries[arm] == summarize(curve, share=1.0, hold=1)
    monkeypatch.setattr(train, "_fit", None)
    assert simulate() == found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_what_does_not_fit_is_refused_before_any_training(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit", None)

    def simulate(new: SidVariant, *overrides: str) -> None:
        converge(
            world.stages,
            world.old,
            new,
            settings(*overrides),
            store=world.store,
            run_dir=str(world.root / "none"),
        )

    with pytest.raises(ConfigError, match="old and new SIDs must differ, got before twice"):
        simulate(world.old)
    with pytest.raises(ConfigError, match="rollout must be one of the 3 stages, got 4"):
        simulate(world.new, "rollout=4")
    with pytest.raises(ConfigError, match=r"validation\.widths must be 2 integers"):
        simulate(world.new, "train.validation.widths=[10,20,30]")
    with pytest.raises(ConfigError, match=r"model\.places must be > max_history=20"):
        simulate(world.new, "train.model={kind: rq_transformer, places: 20}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms=[cold,warm]", "arms must be some of cold, dense"),
        ("arms=[cold,cold]", "once each"),
        ("seeds=[]", "seeds must be different numbers"),
        ("seeds=[1,1]", "seeds must be different numbers"),
        ("recent=2", "rollout must be > recent=2, got 2"),
        ("offline_steps=0", "offline_steps must be >= 1"),
        ("share=0", r"share must be in \(0, 1\]"),
        ("metric=HR@50", "metric must be one of HR@10"),
        ("train.stop.patience=2", r"train\.stop\.patience must be left out"),
    ],
)
def test_mistakes_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(override)


def test_trials_are_sent_no_codes(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = two_stages(store)
    old, new = (large_variant(stages, store, name) for name in ("old", "new"))
    sent = []
    monkeypatch.setattr(module, "fill_store", lambda jobs, **_: sent.append(require_small(jobs)))
    config = settings("arms=[cold]")
    rollouts = {seed: Rollout(config, seed, stages, old, new, store, "runs") for seed in (0, 1)}
    _fill(rollouts, config, folder="tune")
    assert [list(jobs) for jobs in sent] == [
        ["old-0", "old-1"],
        ["old-0", "cold-0", "old-1", "cold-1"],
    ]


def test_a_curve_without_a_point_is_no_curve(store: ArtifactStore) -> None:
    rows = [{"global_step": 10, "ItemNDCG@10": 0.1}, {"global_step": 20, "ItemNDCG@10": None}]

    def result(name: str) -> TrainResult:
        def produce(writer: ArtifactWriter) -> ArtifactInfo:
            with writer.open(HISTORY_FILE) as stream:
                stream.write(json.dumps(rows).encode())
            return ArtifactInfo()

        artifact = store.build("model", name, {"of": name}, produce=produce)
        return TrainResult(artifact, {}, rows[:1], np.zeros(0))

    assert _whole(result("whole")).history == rows[:1]
    rows[1]["validation_error"] = "OutOfMemoryError: no room"
    with pytest.raises(TrainingError, match=r"got OutOfMemoryError: no room at step 20\. Remove"):
        _whole(result("broken"))
