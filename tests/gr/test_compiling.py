"""Compiled training is eager training: same losses, same checkpoints, few pieces of code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from forge_ray.errors import ConfigError
from forge_ray.gr import compiling
from forge_ray.gr.engine import Engine, EngineConfig
from forge_ray.gr.models.base import GeneratorConfig, TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.parallel_heads import ParallelHeadsConfig
from forge_ray.gr.models.rq_transformer import RqTransformerConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.gr.vocab import Vocab

VOCAB = Vocab((8, 8))
SIZE = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
KINDS: dict[str, GeneratorConfig] = {
    "decoder": DecoderConfig(num_layers=2, **SIZE),
    "padded": DecoderConfig(num_layers=2, packing=False, **SIZE),
    "llama": DecoderConfig(num_layers=1, family="llama", **SIZE),
    "rq_transformer": RqTransformerConfig(num_layers=2, prefix_rows=64, child_size=8, **SIZE),
    "t5": T5Config(num_layers=1, **SIZE),
    "parallel_heads": ParallelHeadsConfig(num_layers=1, **SIZE),
}

pytestmark = [pytest.mark.usefixtures("process_group"), pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Code and counters of one test are not those of the next."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are captured as graphs, and these run as they are: seconds instead of minutes."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")


def make(kind: str, **changes: object) -> Engine:
    torch.manual_seed(0)
    settings = {"global_batch": 8, "warmup_steps": 2, "learning_rate": 1e-2, **changes}
    return Engine(KINDS[kind].build(VOCAB), EngineConfig(**settings), max_steps=20, seed=0)


def batches(count: int) -> list[TokenBatch]:
    """Rows of other lengths in every batch, as in a stream."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        longest = 3 + 5 * number % 7
        lengths = torch.randint(2, longest + 1, (8,), generator=draw)
        lengths[0] = longest
        found.append(TokenBatch(torch.randint(8, (8, longest, 2), generator=draw), lengths))
    return found


def train(engine: Engine, work: list[TokenBatch], first: int = 1) -> list[float]:
    return [
        engine.step(
            [batch], num_targets=engine.module.num_targets(batch.lengths), step=first + number
        ).item()
        for number, batch in enumerate(work)
    ]


def one_kind(kind: str) -> None:
    eager, compiled, work = make(kind), make(kind, compile=True), batches(20)
    first = train(compiled, work[:5])
    graphs = counters["stats"]["unique_graphs"]
    rest = train(compiled, work[5:], first=6)
    assert first + rest == pytest.approx(train(eager, work), rel=1e-4)
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs, "other lengths compile nothing anew"
    assert list(compiled.full_state()) == list(eager.full_state())


def test_losses_weights_and_amount_of_code(traced):
    one_kind("decoder")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "decoder"])
def test_losses_weights_and_amount_of_code_of_other_kinds(kind, traced):
    one_kind(kind)


def flipped(stage: int, folder: Path, *, is_compiled: bool) -> None:
    work = batches(6)
    whole = train(make("decoder", zero_stage=stage), work)
    begun = make("decoder", zero_stage=stage, compile=is_compiled)
    first = train(begun, work[:3])
    begun.save(folder)
    resumed = make("decoder", zero_stage=stage, compile=not is_compiled)
    resumed.load(folder, world_size=1)
    assert first + train(resumed, work[3:], first=4) == pytest.approx(whole, rel=1e-4)


def test_a_run_resumes_with_the_switch_flipped(traced, tmp_path):
    flipped(3, tmp_path, is_compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_of_every_stage_resumes_with_the_switch_flipped(stage, is_compiled, traced, tmp_path):
    flipped(stage, tmp_path, is_compiled=is_compiled)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_code_gives_the_losses_of_eager_blocks(kind, stage):
    """The real compiler, dropout on."""
    compiled = train(make(kind, compile=True, zero_stage=stage), batches(20))
    assert compiled == pytest.approx(train(make(kind, zero_stage=stage), batches(20)), rel=1e-3)


@pytest.mark.parametrize(("device", "kind"), [("cpu", r"C\+\+"), ("cuda", "C")])
def test_no_compiler_is_told_before_the_first_step(device, kind, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=f"engine.compile must be false .* {kind} compiler"):
        compiling.check_compiler(torch.device(device))
    monkeypatch.setenv("CXX", "a-compiler-that-is-absent")
    with pytest.raises(ConfigError, match="no a-compiler-that-is-absent"):
        make("decoder", compile=True)


def test_blocks_that_compute_twice_are_not_compiled():
    with pytest.raises(ConfigError, match=r"engine\.compile must be false with engine\.activation"):
        EngineConfig(compile=True, activation_checkpointing=True)
