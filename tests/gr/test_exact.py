"""Exact search over all SIDs against brute force, and as the decoder of parallel heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forge_ray.data.ragged import Ragged
from forge_ray.errors import TrainingError
from forge_ray.gr import exact
from forge_ray.gr.beam import beam_search
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.exact import ParallelGenerator, exact_search
from forge_ray.gr.models.base import TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.parallel_heads import ParallelHeads, ParallelHeadsConfig
from forge_ray.gr.prefix_index import PrefixIndex
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable
from tests.gr.generators import random_codes, random_histories

SIZES = (9, 4, 6)


class Tables:
    """Given logits, whatever the history."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits

    def level_logits(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        return [level[: len(tokens)] for level in self.logits]


def tables(users: int = 5, seed: int = 0) -> Tables:
    draw = torch.Generator().manual_seed(seed)
    return Tables([torch.randn(users, size, generator=draw) for size in SIZES])


@pytest.mark.parametrize("block", [1, 7, 1 << 14])
@pytest.mark.parametrize("width", [1, 20, 500])
def test_equals_sorting_all_sids(block: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_SIDS", block)
    index = PrefixIndex.build(random_codes(120, SIZES), SIZES)
    generator = tables()
    beams = exact_search(generator, *random_histories(5, 3), index, width)
    sids = index.sids()
    probs = [level.log_softmax(1) for level in generator.logits]
    scores = probs[0][:, sids[:, 0]] + probs[1][:, sids[:, 1]] + probs[2][:, sids[:, 2]]
    order = scores.sort(dim=1, descending=True, stable=True)
    kept = min(width, index.num_sids)
    assert beams.scores.shape == (5, width)
    assert torch.equal(beams.sid_rank[:, :kept], order.indices[:, :kept])
    torch.testing.assert_close(beams.scores[:, :kept], order.values[:, :kept])
    assert torch.equal(beams.codes[:, :kept], sids[order.indices[:, :kept]])
    assert not beams.is_live[:, kept:].any()
    assert (beams.sid_rank[:, kept:] == -1).all()
    assert (beams.codes[:, kept:] == -1).all()


def test_equal_scores_are_ordered_by_sid() -> None:
    index = PrefixIndex.build(random_codes(120, SIZES), SIZES)
    flat = Tables([torch.zeros(2, size) for size in SIZES])
    beams = exact_search(flat, *random_histories(2, 3), index, 30)
    assert beams.sid_rank.tolist() == [list(range(30))] * 2


def test_nan_is_an_error() -> None:
    index = PrefixIndex.build(random_codes(20, SIZES), SIZES)
    broken = tables()
    broken.logits[1][:] = torch.nan
    with pytest.raises(TrainingError, match="logits of level 1 must be finite"):
        exact_search(broken, *random_histories(2, 3), index, 5)


def make(sizes: tuple[int, ...]) -> ParallelHeads:
    torch.manual_seed(0)
    return ParallelHeadsConfig(hidden_size=32, num_heads=2).build(vocab_of(sizes)).eval()


def test_only_models_without_steps_are_searched_exactly() -> None:
    assert isinstance(make(SIZES), ParallelGenerator)
    decoder = DecoderConfig(hidden_size=32, num_heads=2).build(vocab_of(SIZES))
    assert not isinstance(decoder, ParallelGenerator)


def test_the_decoder_loses_nothing_that_narrow_beams_lose() -> None:
    """Scores are those of a beam search at full width, in spite of narrow widths."""
    table = SidTable.from_codes(random_codes(150, SIZES), SIZES)
    model = make(SIZES)
    rng = np.random.default_rng(0)
    histories = Ragged.from_lists([rng.integers(0, 150, n) for n in (0, 1, 5, 12)], np.int64)
    narrow = SidDecoder(model, table, widths=(1, 1, 40), max_history=10).decode(histories)
    index = PrefixIndex.build(table.codes, SIZES)
    tokens, mask = vocab_of(SIZES).history_tokens(histories, table.codes, 10)
    wide = [level.num_prefixes for level in index.levels]
    beams = beam_search(model, tokens, mask, index, wide)
    np.testing.assert_array_equal(narrow.sid_rank, beams.sid_rank[:, :40].numpy())
    np.testing.assert_allclose(narrow.scores, beams.scores[:, :40].numpy(), rtol=1e-5, atol=1e-5)
    assert narrow.num_emitted == 4 * 40
    assert narrow.num_invalid == 0


def test_parallel_heads_learn_a_chain() -> None:
    """Item 3 i + 1 mod 40 follows item i; the model ranks it first."""
    sizes = (8, 5)
    codes = np.stack([np.arange(40) // 5, np.arange(40) % 5], axis=1)
    table = SidTable.from_codes(codes, sizes)
    torch.manual_seed(0)
    model = ParallelHeadsConfig(hidden_size=32, num_heads=2, dropout=0.0).build(vocab_of(sizes))
    rows = np.arange(40)[:, None]
    for _ in range(3):
        rows = np.concatenate([rows, (3 * rows[:, -1:] + 1) % 40], axis=1)
    batch = TokenBatch(torch.from_numpy(codes[rows]), torch.full((40,), 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    histories = Ragged.from_lists(list(rows[:, :3]), np.int64)
    decoded = SidDecoder(model, table, widths=(1, 5), max_history=5).decode(histories)
    assert (decoded.sid_rank[:, 0] == rows[:, 3]).mean() > 0.9


def test_nothing_invalid_on_a_real_catalogue(shared_data: Path) -> None:
    table = SidTable.from_npz(shared_data / "sid-cell-47k" / "rkmeans_native.npz")
    model = make(table.codebook_sizes)
    rng = np.random.default_rng(0)
    histories = Ragged.from_lists([rng.integers(0, table.num_items, 6) for _ in range(8)], np.int64)
    decoder = SidDecoder(model, table, widths=(1, 1, 1, 100), max_history=6)
    decoded = decoder.decode(histories)
    assert decoded.num_emitted == 8 * 100
    assert decoded.num_invalid == 0
    assert (np.diff(decoded.scores, axis=1) <= 0).all()
