"""What a target is charged: competing codes, smoothing, temperature, which items are targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.gr.models.base import Generator, TokenBatch, items_back
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.gr.vocab import Vocab

VOCAB = Vocab((7, 5, 6))
SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}


def make(
    kind: type[DecoderConfig] | type[T5Config] = DecoderConfig, **changes: object
) -> Generator:
    torch.manual_seed(0)
    return kind(dropout=0.0, **SMALL, **changes).build(VOCAB).eval()


def batch() -> TokenBatch:
    draw = torch.Generator().manual_seed(1)
    sizes = VOCAB.codebook_sizes
    codes = torch.stack([torch.randint(k, (6, 5), generator=draw) for k in sizes], dim=2)
    return TokenBatch(codes, torch.tensor([5, 2, 3, 5, 4, 2]))


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """States and codes of 40 targets."""
    draw = torch.Generator().manual_seed(2)
    codes = [torch.randint(k, (40,), generator=draw) for k in VOCAB.codebook_sizes]
    return 3 * torch.randn(40, 3, 32, generator=draw), torch.stack(codes, dim=1)


def test_level_softmax_with_smoothing_and_temperature_equals_the_formula():
    smoothing, temperature = 0.2, 0.5
    model = make(label_smoothing=smoothing, temperature=temperature)
    hidden, targets = drawn()
    expected = torch.zeros(())
    for level, (start, size) in enumerate(zip(VOCAB.level_offsets, (7, 5, 6), strict=True)):
        scores = hidden[:, level] @ model.table.head[start : start + size].T / temperature
        log_probs = scores - torch.logsumexp(scores, dim=1, keepdim=True)
        wanted = torch.full_like(log_probs, smoothing / size)
        wanted[torch.arange(40), targets[:, level]] += 1 - smoothing
        expected = expected - (wanted * log_probs).sum()
    assert torch.allclose(model.level_loss_sum(hidden, targets), expected, rtol=1e-5)


def test_full_softmax_lets_all_codes_compete():
    model = make(softmax="full")
    hidden, targets = drawn()
    codes = targets + torch.tensor(VOCAB.level_offsets)
    expected = functional.cross_entropy(
        (hidden @ model.table.head.T).flatten(0, 1), codes.flatten(), reduction="sum"
    )
    assert torch.allclose(model.level_loss_sum(hidden, targets), expected, rtol=1e-5)
    assert abs(model.loss(batch()).item() - math.log(7 + 5 + 6)) < 0.1


def test_last_target_is_the_last_share_of_all_targets():
    """Same weights: charging all items less charging all but the last is charging the last."""
    every, last, rows = make(), make(targets="last"), batch()
    shorter = TokenBatch(rows.codes, rows.lengths - 1)
    difference = every.loss_sum(rows) - every.loss_sum(shorter)
    assert torch.allclose(last.loss_sum(rows), difference, rtol=1e-4)
    assert last.num_targets(rows.lengths) == 6 * 3
    assert every.num_targets(rows.lengths) == int(rows.lengths.sum()) * 3


def test_targets_decide_how_sequences_are_cut():
    assert DecoderConfig().examples == "window"
    assert DecoderConfig(targets="last").examples == "prefix"
    assert T5Config().examples == "prefix"


@pytest.mark.parametrize(
    "change",
    ["label_smoothing=0.1", "temperature=0.5", "softmax=full", "targets=last", "discrec=true"],
)
def test_every_option_changes_the_loss(change):
    changed = load_config(DecoderConfig, overrides=[change])
    options = {change.partition("=")[0]: getattr(changed, change.partition("=")[0])}
    assert make(**options).loss(batch()).item() != pytest.approx(make().loss(batch()).item())


@pytest.mark.parametrize("kind", [DecoderConfig, T5Config])
def test_recency_vectors_reach_the_loss(kind):
    """The vector of the second newest item reaches the loss."""
    targets = {"targets": "last"} if kind is DecoderConfig else {}
    model = make(kind, recency_embeddings=4, **targets)
    before = model.loss(batch()).item()
    with torch.no_grad():
        model.table.recent[2] += 1.0
    assert model.loss(batch()).item() != pytest.approx(before)


def test_items_back_counts_from_the_target():
    back = items_back(torch.tensor([3, 1]), 6, 2)
    assert back.tolist() == [[3, 2, 2, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    # The same history read for decoding: its newest item is 1, its BOS one more than its oldest.
    assert Vocab((4, 4)).history_recency(5).tolist() == [3, 2, 2, 1, 1]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"label_smoothing": 1.0}, r"model\.label_smoothing must be in \[0, 1\)"),
        ({"temperature": 0.0}, r"model\.temperature must be > 0"),
        ({"recency_embeddings": -1}, r"model\.recency_embeddings must be >= 0"),
        ({"recency_embeddings": 5}, r"must be 0 with model\.targets=all"),
    ],
)
def test_impossible_options_are_refused(change, rule):
    with pytest.raises(ConfigError, match=rule):
        DecoderConfig(**change)
