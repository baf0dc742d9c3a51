from __future__ import annotations

import gc
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.gr import engine as engine_module
from forge_ray.gr.engine import TAG, Engine, EngineConfig, expected_shards, zero_config
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.vocab import Vocab

VOCAB = Vocab((8, 8))

pytestmark = pytest.mark.usefixtures("process_group")


def make(*, packing: bool = True, **changes: object) -> Engine:
    torch.manual_seed(0)
    model = DecoderConfig(
        hidden_size=32, num_layers=2, num_heads=2, intermediate_size=32, packing=packing
    )
    settings = {"global_batch": 8, "warmup_steps": 2, "learning_rate": 1e-2, **changes}
    return Engine(model.build(VOCAB), EngineConfig(**settings), max_steps=20, seed=0)


def batches(count: int) -> list[TokenBatch]:
    draw = torch.Generator().manual_seed(3)
    return [
        TokenBatch(
            torch.randint(8, (8, 5, 2), generator=draw), torch.randint(1, 6, (8,), generator=draw)
        )
        for _ in range(count)
    ]


def train(engine: Engine, work: list[TokenBatch], first: int = 1) -> list[float]:
    losses = []
    for number, batch in enumerate(work):
        targets = engine.module.num_targets(batch.lengths)
        size = len(batch.lengths) // engine.accumulation
        parts = [
            TokenBatch(batch.codes[at : at + size], batch.lengths[at : at + size])
            for at in range(0, len(batch.lengths), size)
        ]
        losses.append(engine.step(parts, num_targets=targets, step=first + number).item())
    return losses


def test_a_gpu_is_taken_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees one, and a DeepSpeed that has chosen it."""
    expected = train(make(), batches(2))
    from deepspeed.accelerator import real_accelerator  # once the engine has made it quiet
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    engine = make()
    assert engine.device == torch.device("cpu")
    assert real_accelerator.get_accelerator().device_name() == "cpu"
    assert train(engine, batches(2)) == expected


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_closed_engine_lets_its_model_go(stage: int) -> None:
    """Chains of trainings run in one process."""
    engine = make(zero_stage=stage)
    train(engine, batches(2))
    module = weakref.ref(engine.module)
    engine.close()
    del engine
    gc.collect()
    assert module() is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_saves_and_resumes_exactly(stage, precision, tmp_path):
    """Also with dropout: draws depend on the step, so a resumed run repeats them."""
    work = batches(6)
    engine = make(zero_stage=stage, precision=precision)
    train(engine, work[:3])
    engine.save(tmp_path)
    weights = engine.full_state()
    rest = train(engine, work[3:], first=4)
    written = sorted(path.name for path in (tmp_path / TAG).iterdir())
    assert set(expected_shards(stage, 1, precision)) <= set(written)
    resumed = make(zero_stage=stage, precision=precision)
    resumed.load(tmp_path, world_size=1)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.full_state().items())
    assert train(resumed, work[3:], first=4) == rest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shards_of_another_world_size_come_back_whole(stage, precision, tmp_path):
    """Told of two workers, the engine converts; that one wrote them makes the answer exact.

    `test_engine_worlds.py` does it with real processes.
    """
    work = batches(6)
    engine = make(zero_stage=stage, precision=precision)
    train(engine, work[:3])
    engine.save(tmp_path)
    weights = engine.full_state()
    rest = train(engine, work[3:], first=4)
    resumed = make(zero_stage=stage, precision=precision)
    resumed.load(tmp_path, world_size=2)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.full_state().items())
    assert train(resumed, work[3:], first=4) == rest


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 1e-5), ("bf16", 2e-4)])
def test_zero_stages_give_the_same_curve(precision, rel):
    # Much decay: a step that nobody asked for would show.
    changes = {"precision": precision, "weight_decay": 0.5, "learning_rate": 0.05}
    curves = [train(make(zero_stage=stage, **changes), batches(6)) for stage in (0, 1, 2, 3)]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=rel)


def test_activation_checkpointing_changes_nothing():
    engine = make(activation_checkpointing=True)
    layer = engine.module.blocks.layers[0]
    assert layer.gradient_checkpointing
    assert not make().module.blocks.layers[0].gradient_checkpointing
    assert train(engine, batches(3)) == pytest.approx(train(make(), batches(3)), rel=1e-6)


def test_accumulation_changes_nothing():
    """Rows per forward are a memory setting: without dropout the updates agree."""

    def curve(micro_batch: int) -> list[float]:
        engine = make(micro_batch=micro_batch)
        for module in engine.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return train(engine, batches(6))

    assert curve(2) == pytest.approx(curve(0), rel=1e-4)


GOLDEN = {
    True: ([2.08508, 2.06516, 2.08051], [1.643, 1.73264, 1.85407]),
    False: ([2.0875, 2.05717, 2.07085], [1.64217, 1.71538, 1.82488]),
}
"""First and last three losses, packed and padded; dropout draws by shape, so the two differ."""


@pytest.mark.parametrize("packing", [True, False])
def test_golden_curve(packing):
    """20 steps on the debug model; regenerate only for an intended numerical change."""
    repeated = train(make(packing=packing), batches(4) * 5)
    again = train(make(packing=packing), batches(4) * 5)
    assert repeated == again
    first, last = GOLDEN[packing]
    assert repeated[:3] == pytest.approx(first, abs=1e-4)  # ln 8 = 2.0794
    assert repeated[-3:] == pytest.approx(last, abs=1e-3)


def test_loading_nothing_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="must hold a DeepSpeed checkpoint"):
        make().load(tmp_path, world_size=1)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("file", expected_shards(1, 1, "fp32"))
def test_shards_that_hold_code_are_refused_and_do_not_run(tmp_path, file, world_size):
    engine = make()
    engine.save(tmp_path)
    shard = tmp_path / TAG / file
    state = torch.load(shard, weights_only=False)
    torch.save({**state, "evil": Evil(tmp_path / "touched")}, shard)
    with pytest.raises(ArtifactError, match="must hold tensors and numbers only"):
        make().load(tmp_path, world_size=world_size)
    assert not (tmp_path / "touched").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(shard, weights_only=False)
    assert (tmp_path / "touched").exists()  # it would have


@pytest.mark.parametrize("where", ["conversion", "load"])
def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, where):
    made = make()
    made.save(tmp_path / "saved")
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))

    def fail(*_: object, **__: object) -> None:
        assert list((tmp_path / "temp").iterdir())
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if where == "conversion":
            patch.setattr(engine_module, "_convert", fail)
        else:
            patch.setattr(made._engine, "load_checkpoint", fail)
        with pytest.raises(OSError, match="disk full"):
            made.load(tmp_path / "saved", world_size=2)
    assert not list((tmp_path / "temp").iterdir())
    assert not made._engine._config.load_universal_checkpoint
    made.load(tmp_path / "saved", world_size=1)


def test_learning_rate_schedules():
    def at(step: int, schedule: str) -> float:
        config = EngineConfig(learning_rate=1.0, warmup_steps=10, schedule=schedule)
        return config.learning_rate_at(step, 110)

    assert at(5, "cosine") == 0.5
    assert at(10, "linear") == 1.0
    assert at(60, "linear") == pytest.approx(0.5)
    assert at(60, "cosine") == pytest.approx(0.5)
    assert at(110, "cosine") == pytest.approx(0.0)
    assert at(110, "constant") == 1.0


def test_global_batch_is_constant_over_world_sizes():
    config = EngineConfig(global_batch=64, micro_batch=8)
    for world_size in (1, 2, 8):
        made = zero_config(config, world_size=world_size, num_parameters=10)
        rows = made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"]
        assert rows * world_size == 64


def test_uneven_shares_take_one_pass_more():
    config = EngineConfig(global_batch=64, micro_batch=8)
    assert config.accumulation(3) == 3  # 22 rows at most
    assert EngineConfig(global_batch=64).accumulation(3) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 4}, r"engine\.zero_stage must be 0\.\.3, got 4"),
        ({"warmup_steps": -5}, "engine.warmup_steps must be >= 0"),
        ({"weight_decay": -1.0}, "engine.weight_decay must be >= 0"),
        ({"clip_norm": -1.0}, "engine.clip_norm must be >= 0"),
        ({"beta2": 1.5}, r"engine.beta2 must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**changes)
