"""The contract of every generator: losses, masking, and cached decoding equal to a full pass."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from forge_ray.config import load_config
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.gr.batches import micro_batches
from forge_ray.gr.initial import Speaker, transplant
from forge_ray.gr.models.base import Generator, GeneratorConfig, TokenBatch
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.parallel_heads import ParallelHeadsConfig
from forge_ray.gr.models.rq_transformer import RqTransformerConfig, prefix_hashes
from forge_ray.gr.models.t5 import T5Config
from forge_ray.gr.vocab import Vocab

SIZES = (7, 5, 6)
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}


class GeneratorContract:
    """Inherit, and return the config to test."""

    def config(self) -> GeneratorConfig:
        raise NotImplementedError

    def model(self, config: GeneratorConfig | None = None) -> Generator:
        torch.manual_seed(0)
        return self.prepared((config or self.config()).build(Vocab(SIZES)).eval())

    def prepared(self, model: Generator) -> Generator:
        """Change weights that start at 0 and would hide mistakes."""
        return model

    def batch(self, rows: int = 6, items: int = 5) -> TokenBatch:
        draw = torch.Generator().manual_seed(1)
        codes = torch.stack([torch.randint(k, (rows, items), generator=draw) for k in SIZES], dim=2)
        return TokenBatch(codes, torch.randint(2, items + 1, (rows,), generator=draw))

    def histories(self) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        codes = np.stack([np.random.default_rng(2).integers(k, size=20) for k in SIZES], axis=1)
        items = Ragged.from_lists([[1, 2, 3], [4], [], [5, 6, 7, 8, 9]], dtype=np.int64)
        tokens, mask = Vocab(SIZES).history_tokens(items, codes, max_items=4)
        return tokens, mask, codes

    def test_untrained_loss_is_the_log_of_the_codebook_sizes(self):
        expected = sum(math.log(k) for k in SIZES) / len(SIZES)
        assert abs(self.model().loss(self.batch()).item() - expected) < 0.1

    def test_padding_changes_nothing(self):
        model, batch = self.model(), self.batch()
        wider = torch.cat([batch.codes, torch.zeros_like(batch.codes)], dim=1)
        padded = TokenBatch(wider, batch.lengths)
        assert torch.allclose(model.loss(padded), model.loss(batch), atol=1e-5)

    def test_rows_of_length_zero_count_for_nothing(self):
        model, batch = self.model(), self.batch()
        lengths = torch.cat([batch.lengths, torch.zeros(2, dtype=torch.int64)])
        more = TokenBatch(torch.cat([batch.codes, batch.codes[:2]]), lengths)
        assert torch.allclose(model.loss_sum(more), model.loss_sum(batch), atol=1e-4)
        nothing = model.loss_sum(TokenBatch(batch.codes, torch.zeros_like(batch.lengths)))
        nothing.backward()
        assert nothing.item() == 0.0

    def test_a_pass_without_rows_is_nothing(self):
        """A rank that gets no row of the last batch still takes part in the step."""
        nothing = Ragged.from_lists([], dtype=np.int64)
        (batch,) = micro_batches(nothing, np.zeros((1, len(SIZES)), np.int64), 1, is_packed=False)
        loss = self.model().loss_sum(batch)
        loss.backward()
        assert loss.item() == 0.0

    def test_gradient_reaches_every_parameter(self):
        model = self.model().train()
        model.loss(self.batch()).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == []

    def test_left_padding_does_not_change_the_first_level(self):
        model = self.model()
        tokens, mask, _ = self.histories()
        together, _ = model.prefill(tokens, mask)
        for row in range(len(tokens)):
            alone, _ = model.prefill(
                tokens[row : row + 1, mask[row]], mask[row : row + 1, mask[row]]
            )
            assert torch.allclose(together[row], alone[0], atol=1e-5)

    def test_code_tables_name_what_depends_on_the_sids(self):
        model, other = self.model(), self.config().build(Vocab((9, 4, 8)))
        shapes = {name: one.shape for name, one in other.state_dict().items()}
        codes = torch.cartesian_prod(*[torch.arange(k) for k in SIZES])
        tables = model.code_tables()
        given = model.state_dict()
        assert {name for name, one in given.items() if one.shape != shapes[name]} <= set(tables)
        for name, table in tables.items():
            rows = table.rows(codes)
            assert rows.shape == (len(codes), len(table.levels))
            assert rows.min() >= table.before
            assert rows.max() < table.before + table.num_rows <= len(given[name])

    def test_vectors_mapped_to_the_same_sids_are_the_same_model(self):
        codes = torch.cartesian_prod(*[torch.arange(k) for k in SIZES]).numpy()
        old = Speaker(self.model(), codes)
        torch.manual_seed(1)
        new = Speaker(self.config().build(Vocab(SIZES)).eval(), codes)
        weights = np.arange(1.0, len(codes) + 1)
        found = transplant(old, new, is_mapped=True, weights=weights)
        new.generator.load_state_dict(found)
        batch = self.batch()
        assert torch.allclose(old.generator.loss(batch), new.generator.loss(batch), atol=1e-5)

    def test_cached_beams_equal_feeding_the_codes_one_beam_at_a_time(self):
        """Forked and reordered beams score as if each were decoded alone, from scratch."""
        model = self.model()
        tokens, mask, _ = self.histories()
        rows = len(tokens)
        _, state = model.prefill(tokens, mask)
        first = torch.tensor([[0, 3, 6]]).expand(rows, 3)
        logits_1, state = model.step(state, torch.zeros_like(first), first, 1)
        parents = torch.tensor([[2, 0, 0, 1]]).expand(rows, 4)
        second = torch.tensor([[4, 1, 2, 0]]).expand(rows, 4)
        logits_2, _ = model.step(state, parents, second, 2)
        assert logits_1.shape == (rows, 3, SIZES[1])
        assert logits_2.shape == (rows, 4, SIZES[2])
        for beam in range(4):
            chosen = first.gather(1, parents[:, beam : beam + 1])
            _, alone = model.prefill(tokens, mask)
            step_1, alone = model.step(alone, torch.zeros_like(chosen), chosen, 1)
            step_2, _ = model.step(alone, torch.zeros_like(chosen), second[:, beam : beam + 1], 2)
            assert torch.allclose(
                step_1[:, 0], logits_1[torch.arange(rows), parents[:, beam]], atol=1e-5
            )
            assert torch.allclose(step_2[:, 0], logits_2[:, beam], atol=1e-5)

    def test_decoding_agrees_with_the_training_loss(self):
        """The log-probability of a next item is what the loss charges for it."""
        model = self.model()
        codes = self.batch(rows=4).codes
        charged = self.charge_last_item(model, codes)
        items = codes.shape[1] - 1
        history = model.vocab.tokens(codes[:, :items]).reshape(len(codes), -1)
        tokens = torch.cat([torch.ones_like(history[:, :1]), history], dim=1)
        logits, state = model.prefill(tokens, torch.ones_like(tokens, dtype=torch.bool))
        total = -logits.log_softmax(-1).gather(1, codes[:, items, :1]).sum()
        for level in (1, 2):
            chosen = codes[:, items, level - 1 : level]
            logits, state = model.step(state, torch.zeros_like(chosen), chosen, level)
            target = codes[:, items, level].reshape(-1, 1, 1)
            total = total - logits.log_softmax(-1).gather(2, target).sum()
        assert torch.allclose(total, charged, atol=1e-3)

    def charge_last_item(self, model: Generator, codes: torch.Tensor) -> torch.Tensor:
        full = torch.full((len(codes),), codes.shape[1])
        return model.loss_sum(TokenBatch(codes, full)) - model.loss_sum(TokenBatch(codes, full - 1))

    def test_eager_attention_equals_sdpa(self):
        config = self.config()
        config.attention = "eager"
        eager = self.model(config)
        model, batch = self.model(), self.batch()
        assert torch.allclose(eager.loss(batch), model.loss(batch), atol=1e-5)
        tokens, mask, _ = self.histories()
        assert torch.allclose(
            eager.prefill(tokens, mask)[0], model.prefill(tokens, mask)[0], atol=1e-5
        )

    def test_overfits_a_few_sequences(self):
        model = self.model().train()
        batch = self.batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        first = model.loss(batch).item()
        for _ in range(40):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
        assert model.loss(batch).item() < 0.5 * first


class TestQwen2(GeneratorContract):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(dropout=0.0, **SMALL)


class TestLlama(GeneratorContract):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(family="llama", dropout=0.0, **SMALL)


class TestTiedQwen2(GeneratorContract):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(tie_embeddings=True, dropout=0.0, **SMALL)


class LastTarget(GeneratorContract):
    """The last item of a row is its only target."""

    def charge_last_item(self, model: Generator, codes: torch.Tensor) -> torch.Tensor:
        return model.loss_sum(TokenBatch(codes, torch.full((len(codes),), codes.shape[1])))


class PlaceEmbeddings(LastTarget):
    """Level and recency vectors start at 0; here they are drawn, and the logits are scaled."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "temperature": 0.8,
        "level_embeddings": True,
        "recency_embeddings": 3,
    }

    def prepared(self, model: Generator) -> Generator:
        for weight in (model.table.levels, model.table.recent):
            assert weight is not None
            nn.init.normal_(weight, std=0.2)
        return model


class TestLastTarget(LastTarget):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(targets="last", dropout=0.0, **SMALL)


class TestPlaceEmbeddings(PlaceEmbeddings):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(targets="last", dropout=0.0, **self.OPTIONS, **SMALL)


class TestPlaceEmbeddingsOfT5(PlaceEmbeddings):
    def config(self) -> GeneratorConfig:
        return T5Config(dropout=0.0, **self.OPTIONS, **SMALL)


class WithDiscRec(GeneratorContract):
    """The gates start at 0, equal weights; here they are drawn."""

    def prepared(self, model: Generator) -> Generator:
        for module in (model.inputs, getattr(model, "fed_inputs", None)):
            if module is not None:
                nn.init.normal_(module.gates)
        return model


class TestDiscRec(WithDiscRec):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(discrec=True, dropout=0.0, **SMALL)


class TestPaddedDiscRec(WithDiscRec):
    def config(self) -> GeneratorConfig:
        return DecoderConfig(discrec=True, packing=False, dropout=0.0, **SMALL)


class TestDiscRecOfT5(WithDiscRec, LastTarget):
    def config(self) -> GeneratorConfig:
        return T5Config(discrec=True, dropout=0.0, **SMALL)


class TestT5(LastTarget):
    def config(self) -> GeneratorConfig:
        return T5Config(dropout=0.0, **SMALL)


class TestTiedT5(TestT5):
    def config(self) -> GeneratorConfig:
        return T5Config(tie_embeddings=True, dropout=0.0, **SMALL)


class TestParallelHeads(GeneratorContract):
    def config(self) -> GeneratorConfig:
        return ParallelHeadsConfig(dropout=0.0, temperature=0.3, **SMALL)

    def prepared(self, model: Generator) -> Generator:
        for head in model.heads:
            nn.init.normal_(head.outer.weight, std=0.2)
        return model

    def test_untrained_loss_is_the_log_of_the_codebook_sizes(self):
        """Where it is hot; cosines over a low temperature start off uniform."""
        expected = sum(math.log(k) for k in SIZES) / len(SIZES)
        hot = self.model(ParallelHeadsConfig(dropout=0.0, temperature=20.0, **SMALL))
        assert abs(hot.loss(self.batch()).item() - expected) < 0.01
        assert self.model().loss(self.batch()).item() < expected + 1.0 / 0.3

    def test_one_pass_knows_all_levels(self):
        model = self.model()
        tokens, mask, _ = self.histories()
        logits = model.level_logits(tokens, mask)
        _, state = model.prefill(tokens, mask)
        for level in (1, 2):
            stepped, state = model.step(state, None, torch.zeros(4, 3, dtype=torch.int64), level)
            assert torch.equal(stepped, logits[level].unsqueeze(1).expand(-1, 3, -1))

    def test_the_temperature_divides_the_logits(self):
        cold = self.model(ParallelHeadsConfig(dropout=0.0, temperature=0.15, **SMALL))
        tokens, mask, _ = self.histories()
        logits = self.model().level_logits(tokens, mask)
        for one, other in zip(cold.level_logits(tokens, mask), logits, strict=True):
            assert torch.allclose(one, 2 * other, atol=1e-5)

    def test_all_codes_compete_on_request(self):
        config = self.config()
        config.softmax = "full"
        model, batch = self.model(config), self.batch()
        assert model.loss(batch) > self.model().loss(batch)


class TestRqTransformer(GeneratorContract):
    OPTIONS: ClassVar[dict[str, Any]] = {}

    def config(self) -> GeneratorConfig:
        return RqTransformerConfig(dropout=0.0, prefix_rows=97, places=4, **self.OPTIONS, **SMALL)

    def test_eager_attention_equals_sdpa(self):
        with pytest.raises(ConfigError, match=r"model\.attention must be sdpa"):
            RqTransformerConfig(attention="eager")

    def test_another_code_in_the_history_is_another_user(self):
        model = self.model()
        tokens, mask, _ = self.histories()
        changed = tokens.clone()
        code = tokens[3, 1] - 3  # the first code of the oldest item of the one full row
        changed[3, 1] = 3 + (code + 1) % SIZES[0]
        same, other = model.prefill(tokens, mask)[0], model.prefill(changed, mask)[0]
        assert torch.allclose(same[:3], other[:3])
        assert not torch.allclose(same[3], other[3], atol=1e-4)


class TestUntiedRqTransformer(TestRqTransformer):
    OPTIONS: ClassVar[dict[str, Any]] = {"tie_embeddings": False, "temperature": 0.7}


class TestRqTransformerWithoutPrefixes(TestRqTransformer):
    def config(self) -> GeneratorConfig:
        return RqTransformerConfig(dropout=0.0, prefix_rows=0, **SMALL)


def test_prefix_hashes_tell_prefixes_apart():
    codes = torch.cartesian_prod(torch.arange(40), torch.arange(30), torch.arange(20))
    hashes = prefix_hashes(codes)
    assert hashes.min() >= 0
    assert [len(hashes[:, depth].unique()) for depth in range(3)] == [40, 1200, 24000]


def test_config_switches_by_kind():
    config = load_config(DecoderConfig, overrides=["hidden_size=64", "family=llama"])
    assert (config.hidden_size, config.family) == (64, "llama")


def test_width_must_fit_the_heads():
    with pytest.raises(ConfigError, match=r"model\.hidden_size must be an even multiple"):
        DecoderConfig(hidden_size=100, num_heads=3)
