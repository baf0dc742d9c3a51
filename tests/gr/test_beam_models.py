"""Beam search over the real models equals scoring every item by the training loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from forge_ray.data.ragged import Ragged
from forge_ray.gr.beam import beam_search
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.models.base import Generator, GeneratorConfig, TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.t5 import T5Config
from forge_ray.gr.prefix_index import PrefixIndex
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable
from tests.gr.generators import random_codes

SIZE = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
CONFIGS = [
    DecoderConfig(**SIZE),
    DecoderConfig(family="llama", attention="eager", tie_embeddings=True, **SIZE),
    T5Config(**SIZE),
]


def build(config: GeneratorConfig, codebook_sizes: tuple[int, ...]) -> Generator:
    """A random model whose predictions are far from uniform, so that few scores are close."""
    torch.manual_seed(0)
    model = config.build(vocab_of(codebook_sizes)).eval()
    with torch.no_grad():
        for parameter in model.table.parameters():
            parameter.mul_(20.0)
    return model


@torch.no_grad()
def scores_by_loss(model: Generator, history: Tensor, sids: Tensor) -> Tensor:
    """Log-probability [S] of every SID after one history [H, L] by the loss: no cache, no search.

    The loss is kept per target item instead of summed; each row's last target is the SID.
    """

    def per_item(hidden_MLD: Tensor, targets_ML: Tensor) -> Tensor:
        losses = [
            functional.cross_entropy(
                model.table(hidden_MLD[:, level], level), targets_ML[:, level], reduction="none"
            )
            for level in range(model.vocab.num_levels)
        ]
        return torch.stack(losses).sum(dim=0)

    rows = torch.cat([history.expand(len(sids), -1, -1), sids.unsqueeze(1)], dim=1)
    lengths = torch.full((len(sids),), rows.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "level_loss_sum", per_item)
        losses = model.loss_sum(TokenBatch(rows, lengths))
    return -losses.reshape(len(sids), -1)[:, -1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{config.attention}")
@pytest.mark.parametrize("codebook_sizes", [(16, 16, 16), (64, 8, 8, 4), (512,)])
def test_top_20_of_500_items_equals_brute_force(
    config: GeneratorConfig, codebook_sizes: tuple[int, ...]
) -> None:
    codes = random_codes(500, codebook_sizes, seed=1)
    index = PrefixIndex.build(codes, codebook_sizes)
    model = build(config, codebook_sizes)
    rng = np.random.default_rng(2)
    histories = Ragged.from_lists([rng.integers(0, 500, n) for n in (1, 3, 8)], np.int64)
    tokens, mask = vocab_of(codebook_sizes).history_tokens(histories, codes, 20)
    widths = [level.num_prefixes for level in index.levels]
    beams = beam_search(model, tokens, mask, index, widths)
    assert beams.is_live.all()
    for user in range(len(histories)):
        history = torch.from_numpy(codes[histories.row(user)].astype(np.int64))
        scores = scores_by_loss(model, history, index.sids())
        best = scores.sort(descending=True, stable=True)
        assert beams.sid_rank[user, :20].tolist() == best.indices[:20].tolist()
        torch.testing.assert_close(beams.scores[user], best.values, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{config.attention}")
def test_padding_of_the_batch_changes_nothing(config: GeneratorConfig) -> None:
    table = SidTable.from_codes(random_codes(300, (16, 8, 8)), (16, 8, 8))
    model = build(config, table.codebook_sizes)
    rng = np.random.default_rng(0)
    histories = Ragged.from_lists([rng.integers(0, 300, n) for n in (0, 1, 5, 12, 2)], np.int64)
    options = {"widths": (16, 40, 30), "max_history": 10}
    together = SidDecoder(model, table, batch_users=5, **options).decode(histories)
    alone = SidDecoder(model, table, batch_users=1, **options).decode(histories)
    np.testing.assert_array_equal(together.sid_rank, alone.sid_rank)
    np.testing.assert_allclose(together.scores, alone.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rkmeans_native", "rqvae_native", "letter_native", "letter_zcr"])
@pytest.mark.parametrize("config", CONFIGS[::2], ids=lambda config: config.kind)
def test_nothing_invalid_on_a_real_catalogue(
    shared_data: Path, name: str, config: GeneratorConfig
) -> None:
    path = shared_data / "sid-cell-47k" / f"{name}.npz"
    table = SidTable.from_npz(path)
    model = build(config, table.codebook_sizes)
    rng = np.random.default_rng(0)
    histories = Ragged.from_lists([rng.integers(0, table.num_items, 6) for _ in range(8)], np.int64)
    decoder = SidDecoder(model, table, widths=(50, 50, 50, 100), max_history=6)
    decoded = decoder.decode(histories)
    assert decoder.index.num_sids == len(np.unique(table.codes, axis=0))
    assert decoded.num_emitted >= 8 * 50  # every kept prefix leads somewhere
    assert decoded.num_invalid == 0
    ranks = torch.from_numpy(decoded.sid_rank[decoded.sid_rank >= 0]).long()
    assert len(ranks) == decoded.num_emitted
    known = set(map(tuple, table.codes.tolist()))
    assert set(map(tuple, decoder.index.sids()[ranks].tolist())) <= known
