"""Activation checkpointing: blocks run twice, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import Generator, GeneratorConfig, TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.rq_transformer import RqTransformerConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.gr.vocab import Vocab

SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "packed": DecoderConfig(**SMALL),
    "padded": DecoderConfig(packing=False, **SMALL),
    "t5": T5Config(**SMALL),
}


def gradients(model: Generator) -> list[Tensor]:
    """After one pass with dropout."""
    draw = torch.Generator().manual_seed(1)
    rows = TokenBatch(torch.randint(5, (6, 4, 2), generator=draw), torch.tensor([4, 2, 3, 4, 1, 2]))
    torch.manual_seed(2)
    model.train().loss(rows).backward()
    return [one.grad for one in model.parameters()]


def built(config: GeneratorConfig) -> tuple[Generator, list[int]]:
    """A model, and a list that grows with every pass through its first feed-forward block."""
    torch.manual_seed(0)
    model = config.build(Vocab((5, 5)))
    passes: list[int] = []
    names = ("mlp", "DenseReluDense")
    inner = next(one for name, one in model.named_modules() if name.endswith(names))
    # Not a hook behind the pass: the second one stops as soon as nothing more is needed.
    inner.register_forward_pre_hook(lambda *_: passes.append(1))
    return model, passes


@pytest.mark.parametrize("name", list(CONFIGS))
def test_blocks_run_twice_and_gradients_are_equal(name):
    model, passes = built(CONFIGS[name])
    kept = gradients(model)
    assert len(passes) == 1
    model, passes = built(CONFIGS[name])
    model.recompute_activations()
    recomputed = gradients(model)
    assert len(passes) == 2
    assert all(torch.equal(one, other) for one, other in zip(kept, recomputed, strict=True))


def test_models_without_such_blocks_refuse():
    model = RqTransformerConfig().build(Vocab((5, 5)))
    with pytest.raises(ConfigError, match="must be false for RqTransformer"):
        model.recompute_activations()
