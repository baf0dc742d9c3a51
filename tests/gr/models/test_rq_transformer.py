"""RQ-Transformer beyond the contract: every field counts, wrong values are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.models.rq_transformer import ItemReader, RqTransformer, RqTransformerConfig
from forge_ray.gr.vocab import vocab_of

SIZES = (7, 5, 6)
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 48}


def make(**changes: Any) -> RqTransformer:
    """A model whose weights say more than fresh ones do."""
    torch.manual_seed(0)
    model = RqTransformerConfig(**{**SMALL, "dropout": 0.0, **changes}).build(vocab_of(SIZES))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.dim() == 2 else 1.0)
    return model


def loss(model: RqTransformer) -> float:
    """Training loss on fixed rows, with dropout drawn from a fixed seed."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randint(size, (6, 5), generator=draw) for size in SIZES], dim=2)
    torch.manual_seed(2)
    return model.train().loss(TokenBatch(codes, torch.tensor([5, 2, 3, 5, 4, 2]))).item()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_layers": 2},
        {"num_heads": 4},
        {"intermediate_size": 64},
        {"dropout": 0.5},
        {"places": 2},
        {"prefix_rows": 0},
        {"prefix_rows": 13},
        {"child_size": 0},
        {"child_size": 5},
        {"tie_embeddings": False},
        {"temperature": 0.2},
        {"softmax": "full"},
        {"label_smoothing": 0.3},
    ],
    ids=lambda change: "=".join(map(str, next(iter(change.items())))),
)
def test_every_field_changes_the_loss(change: dict[str, Any]) -> None:
    assert abs(loss(make(**change)) - loss(make())) > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100, "num_heads": 3}, r"model\.hidden_size must be a multiple"),
        ({"num_layers": 0}, r"model\.num_layers must be >= 1, got 0"),
        ({"places": 0}, r"model\.places must be >= 1, got 0"),
        ({"prefix_rows": -1}, r"model\.prefix_rows must be >= 0, got -1"),
        ({"child_size": -1}, r"model\.child_size must be >= 0, got -1"),
        ({"temperature": 0.0}, r"model\.temperature must be > 0, got 0"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RqTransformerConfig(**change)


def test_a_history_longer_than_the_places_is_refused() -> None:
    config = RqTransformerConfig(places=21)
    config.check_history(20)
    with pytest.raises(ConfigError, match=r"places must be > max_history=21.*got 21.*places=22"):
        config.check_history(21)


@pytest.mark.parametrize(("places", "is_told"), [(4, False), (5, True)])
def test_items_have_a_place_each_where_there_are_more_than_items(
    places: int, is_told: bool
) -> None:
    """Whether the third and the fourth item of a history are read at places of their own."""
    torch.manual_seed(0)
    reader = ItemReader(RqTransformerConfig(places=places, num_layers=1)).eval()
    items = torch.randn(1, 5, 128)  # the start and four items
    reader.blocks = nn.ModuleList()  # what an item is read as, before anything is attended to
    swapped = items[:, [0, 1, 2, 4, 3]]
    same = torch.allclose(reader(items)[:, [0, 1, 2, 4, 3]], reader(swapped))
    assert same is not is_told


@pytest.mark.parametrize("sizes", [(7,), (7, 5), (7, 5, 6)])
def test_every_weight_learns_at_any_number_of_levels(sizes: tuple[int, ...]) -> None:
    model = RqTransformerConfig(**SMALL).build(vocab_of(sizes)).train()
    draw = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randint(size, (6, 5), generator=draw) for size in sizes], dim=2)
    model.loss(TokenBatch(codes, torch.full((6,), 5))).backward()  # type: ignore[no-untyped-call]
    used = [name for name, weight in model.named_parameters() if weight.grad is not None]
    # With one level no code is chosen after another.
    idle = {"chosen.weight"} if len(sizes) == 1 else set()
    assert {name for name, _ in model.named_parameters()} - set(used) == idle


def test_training_finds_the_kind() -> None:
    config = load_config(GrConfig, overrides=["model.kind=rq_transformer", "model.num_layers=3"])
    assert isinstance(config.model, RqTransformerConfig)
    assert config.model.num_layers == 3
    assert config.plan.mode == "window"
