"""Rows of text in models: what is charged, padding, and that decoding asks what training taught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from forge_ray.config import load_config
from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.gr.beam import beam_search
from forge_ray.gr.config import GrConfig
from forge_ray.gr.decoding import SidDecoder, _Answering
from forge_ray.gr.models.base import Generator, TokenBatch
from forge_ray.gr.models.pretrained import PretrainedConfig
from forge_ray.gr.models.pretrained_decoder import PretrainedDecoderConfig
from forge_ray.gr.models.pretrained_t5 import PretrainedT5Config
from forge_ray.gr.prefix_index import PrefixIndex
from forge_ray.gr.scripts import ScriptBatch, TaskText, script_tokens
from forge_ray.gr.tasks import Prompts, TasksConfig
from forge_ray.gr.vocab import PAD, Vocab
from forge_ray.sid.table import SidTable
from tests.gr.models.checkpoints import qwen_checkpoint, t5_checkpoint

SIZES = (6, 5, 4)
VOCAB = Vocab(SIZES)
GRID = np.stack(np.meshgrid(*(np.arange(k) for k in SIZES), indexing="ij"), -1).reshape(-1, 3)
HISTORIES = Ragged.from_lists([[3, 50, 9], [], [7]], dtype=np.int32)
QUERIES = ["red soap", "brush", "a"]
WANTED = np.array([11, 70, 3])
BOTH = Prompts(queries=True, beside=True)


class Asked:
    """A model, and what turns texts into its scripts."""

    def __init__(self, config: PretrainedConfig) -> None:
        torch.manual_seed(0)
        self.config = config.resolved()
        self.model = self.config.start(VOCAB).eval()
        with torch.no_grad():
            for one in self.model.table.parameters():  # codes begin all alike
                one.normal_(std=0.5)
        self.text: TaskText = self.config.task_text(TasksConfig(item_to_sid=1))

    def batch(self, scripts: Ragged) -> ScriptBatch:
        return ScriptBatch.of(scripts, GRID, VOCAB)

    @property
    def searches(self) -> Ragged:
        return self.text.searches(HISTORIES, QUERIES, WANTED)

    @property
    def all_scripts(self) -> Ragged:
        items = np.array([5, 6])
        return Ragged.concatenate(
            [
                self.searches,
                self.text.item_to_sid(items, ["soap", "a long brush"]),
                self.text.sid_to_text(items, ["soap", "a long brush"]),
            ]
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {
        "decoder": qwen_checkpoint(tmp_path_factory.mktemp("qwen"), is_tied=False),
        "t5": t5_checkpoint(tmp_path_factory.mktemp("t5")),
    }


@pytest.fixture(params=["decoder", "t5"])
def kind(request) -> str:
    return request.param


def make(folders, kind: str, **options) -> Asked:
    folder = str(folders[kind])
    if kind == "decoder":
        last = {"targets": "last"} if "end_token" in options else {}
        return Asked(PretrainedDecoderConfig(pretrained=folder, **last, **options))
    return Asked(PretrainedT5Config(pretrained=folder, dropout=0.0, **options))


def states_of(model: Generator, kind: str, question: list[int], answer: list[int]) -> torch.Tensor:
    """States that predict an answer's tokens, of one row without padding."""
    if kind == "decoder":
        tokens = torch.tensor([question + answer])
        found = model.blocks(inputs_embeds=model.table(tokens), use_cache=False).last_hidden_state
        return found[0, len(question) - 1 : -1]
    asked, fed = torch.tensor([question]), torch.tensor([[1, *answer[:-1]]])
    return model.decoder(
        inputs_embeds=model.table(fed),
        encoder_hidden_states=model.encoder(inputs_embeds=model.table(asked)).last_hidden_state,
        use_cache=False,
    ).last_hidden_state[0]


def plain_loss(asked: Asked, kind: str, scripts: Ragged, *, is_full: bool) -> float:
    """Token by token, row by row."""
    table, total = asked.model.table, 0.0
    batch = asked.batch(scripts)
    for row in range(len(scripts)):
        question = batch.questions[row, : batch.question_lengths[row]].tolist()
        answer = batch.answers[row, : batch.answer_lengths[row]].tolist()
        for state, token in zip(
            states_of(asked.model, kind, question, answer), answer, strict=True
        ):
            logits = table(state, 0, competitors="full")
            lowest, behind = 0, len(logits)
            if not is_full:
                starts = [*VOCAB.level_offsets, VOCAB.size - VOCAB.num_special, len(logits)]
                level = next(n for n in range(4) if token - VOCAB.num_special < starts[n + 1])
                lowest, behind = starts[level], starts[level + 1]
            target = torch.tensor(token - VOCAB.num_special - lowest)
            total += float(functional.cross_entropy(logits[lowest:behind], target))
    return total


@torch.no_grad()
@pytest.mark.parametrize("is_full", [False, True])
def test_answers_are_charged_and_nothing_else(folders, kind, is_full):
    options = {"softmax": "full", "end_token": True} if is_full else {}
    asked = make(folders, kind, **options)
    scripts = asked.all_scripts
    expected = plain_loss(asked, kind, scripts, is_full=is_full)
    charged = asked.model.script_loss_sum(asked.batch(scripts))
    assert charged == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_rows_do_not_see_each_other(folders, kind):
    """Alone, a row is padded to its own length."""
    asked = make(folders, kind)
    scripts = asked.all_scripts
    together = asked.model.script_loss_sum(asked.batch(scripts))
    alone = [asked.model.script_loss_sum(asked.batch(scripts.take([row]))) for row in range(7)]
    assert together == pytest.approx(float(sum(alone)), rel=1e-4)


def test_a_mixture_is_the_sum_and_reaches_every_weight(folders, kind):
    asked = make(folders, kind)
    codes = torch.from_numpy(GRID[[3, 50, 9, 11]]).unsqueeze(0)
    items = TokenBatch(codes, torch.tensor([4]))
    scripts = asked.batch(asked.all_scripts)
    both = asked.model(replace(items, scripts=scripts))
    apart = asked.model.loss_sum(items) + asked.model.script_loss_sum(scripts)
    assert both.item() == pytest.approx(apart.item(), rel=1e-6)
    nothing = asked.batch(asked.searches.take([]))
    empty = TokenBatch(torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    loss = asked.model(replace(empty, scripts=nothing))
    loss.backward()
    assert loss.item() == 0
    assert all(one.grad is not None for one in asked.model.parameters())


def check_charged(asked, decoder, decoded, histories):
    """Scores of the wanted items are what training on these histories charges for them."""
    learned = asked.text.searches(histories, QUERIES, WANTED)
    ranks = decoder.item_rank()[WANTED]
    for row in range(3):
        charged = asked.model.script_loss_sum(asked.batch(learned.take([row])))
        slot = decoded.sid_rank[row].tolist().index(int(ranks[row]))
        assert decoded.scores[row, slot] == pytest.approx(-float(charged), abs=1e-3)


@torch.no_grad()
def test_decoding_scores_what_training_charged(folders, kind):
    """The log-probabilities of all SIDs, of which training charged one."""
    asked = make(folders, kind)
    table = SidTable.from_codes(GRID, SIZES)
    decoder = SidDecoder(
        asked.model, table, widths=(6, 30, 120), max_history=2, text=asked.text, prompts=BOTH,
        batch_users=2,
    )  # fmt: skip
    decoded = decoder.decode(HISTORIES, QUERIES)
    check_charged(asked, decoder, decoded, HISTORIES.tail(2))
    assert np.exp(decoded.scores).sum(1) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_the_query_and_the_history_are_read(folders, kind):
    asked = make(folders, kind)
    decoder = SidDecoder(
        asked.model, SidTable.from_codes(GRID, SIZES), widths=(6, 30, 120), max_history=5,
        text=asked.text, prompts=BOTH,
    )  # fmt: skip
    base = decoder.decode(HISTORIES, QUERIES).scores
    other = decoder.decode(HISTORIES, ["blue soap", "brush", "a"]).scores
    shorter = decoder.decode(HISTORIES.tail(1), QUERIES).scores
    none = decoder.decode(HISTORIES).scores
    assert not np.allclose(base[0], other[0], atol=1e-4)
    assert np.allclose(base[1:], other[1:], atol=1e-4)
    assert not np.allclose(base[0], shorter[0], atol=1e-4)
    assert not np.allclose(base, none, atol=1e-4)


@torch.no_grad()
def test_a_model_of_queries_alone_is_asked_without_the_history(folders, kind):
    asked = make(folders, kind)
    table = SidTable.from_codes(GRID, SIZES)
    decoder = SidDecoder(
        asked.model, table, widths=(6, 30, 120), max_history=5, text=asked.text,
        prompts=Prompts(histories=False, queries=True),
    )  # fmt: skip
    decoded = decoder.decode(HISTORIES, QUERIES)
    # As `QueryScripts` writes the rows of `query_to_sid`.
    check_charged(asked, decoder, decoded, HISTORIES.tail(0))
    with pytest.raises(ConfigError, match="must be asked with queries"):
        decoder.decode(HISTORIES)


@torch.no_grad()
def test_padding_before_a_question_changes_nothing(folders, kind):
    asked = make(folders, kind)
    index = PrefixIndex.build(GRID, SIZES)
    rows = script_tokens(asked.text.questions(HISTORIES, QUERIES), GRID, VOCAB)
    scores = []
    for width in (int(rows.lengths.max()), 60):
        tokens = torch.from_numpy(rows.padded(width, side="left", fill=PAD))
        mask = torch.arange(width) >= width - torch.from_numpy(rows.lengths).unsqueeze(1)
        found = beam_search(_Answering(asked.model), tokens, mask, index, (6, 30, 120))
        scores.append(found.scores)
    assert torch.allclose(*scores, atol=1e-3)


def test_a_model_that_was_never_asked_refuses_queries(folders, kind):
    asked = make(folders, kind)
    decoder = SidDecoder(
        asked.model, SidTable.from_codes(GRID, SIZES), widths=(5, 5, 5), max_history=5
    )
    with pytest.raises(ConfigError, match=r"tasks\.search"):
        decoder.decode(HISTORIES, QUERIES)


def test_a_model_without_text_refuses_scripts(folders):
    scripts = make(folders, "decoder")
    plain = load_config(GrConfig, overrides=["model.kind=decoder"]).model.build(VOCAB)
    with pytest.raises(ConfigError, match="reads no text"):
        plain.script_loss_sum(scripts.batch(scripts.searches))
