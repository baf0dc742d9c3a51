"""Scripts against a plain reading of them, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forge_ray.data.ragged import Ragged
from forge_ray.gr.models.pretrained_decoder import PretrainedDecoderConfig
from forge_ray.gr.models.pretrained_t5 import PretrainedT5Config
from forge_ray.gr.models.prompt import PromptConfig
from forge_ray.gr.scripts import (
    ANSWER,
    START,
    ScriptBatch,
    TaskText,
    answer_sizes,
    script_tokens,
    text_entries,
)
from forge_ray.gr.tasks import TasksConfig
from forge_ray.gr.vocab import BOS, PAD, Vocab
from tests.gr.models.checkpoints import qwen_checkpoint, t5_checkpoint

SIZES = (6, 5, 4)
VOCAB = Vocab(SIZES)
CODES = np.stack(
    [np.random.default_rng(level).integers(k, size=30) for level, k in enumerate(SIZES)], 1
)
TASKS = TasksConfig(item_to_sid=1, max_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def text(folder) -> TaskText:
    return PretrainedDecoderConfig(pretrained=str(folder)).resolved().task_text(TASKS)


def plain_tokens(script: list[int]) -> list[int]:
    """What a script means, one entry after the other."""
    found: list[int] = []
    for entry in script:
        if entry >= 0:
            found += VOCAB.tokens(torch.from_numpy(CODES[entry])).tolist()
        elif entry == START:
            found.append(BOS)
        elif entry != ANSWER:
            found.append(VOCAB.size + (-3 - entry))
    return found


def random_scripts(rows: int = 40) -> Ragged:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(rows):
        question = rng.integers(-20, 30, rng.integers(1, 9))
        answer = rng.integers(-20, 30, rng.integers(1, 4))
        sides = [
            np.where((side == ANSWER) | (side == START), -7, side) for side in (question, answer)
        ]
        found.append([START, *sides[0].tolist(), ANSWER, *sides[1].tolist()])
    return Ragged.from_lists(found, dtype=np.int32)


def test_entries_become_tokens():
    scripts = random_scripts()
    tokens = script_tokens(scripts, CODES, VOCAB)
    assert [row.tolist() for row in tokens] == [plain_tokens(row.tolist()) for row in scripts]


def test_batches_part_question_and_answer():
    scripts = random_scripts()
    batch = ScriptBatch.of(scripts, CODES, VOCAB)
    sizes = answer_sizes(scripts, VOCAB.num_levels)
    assert batch.answer_lengths.tolist() == sizes.tolist()
    assert int(batch.is_target.sum()) == sizes.sum()
    for row, script in enumerate(scripts):
        mark = script.tolist().index(ANSWER)
        sides = (batch.questions, batch.question_lengths), (batch.answers, batch.answer_lengths)
        for (padded, lengths), part in zip(sides, (script[:mark], script[mark:]), strict=True):
            length = int(lengths[row])
            assert padded[row, :length].tolist() == plain_tokens(part.tolist())
            assert (padded[row, length:] == PAD).all()


def test_no_rows_are_a_row_that_counts_for_nothing():
    batch = ScriptBatch.of(Ragged.from_lists([], dtype=np.int32), CODES, VOCAB)
    assert batch.questions.tolist() == [[BOS]]
    assert not batch.is_target.any()


def read(text: TaskText, script: list[int]) -> str:
    """A script in words: items as #i, the start as ^."""
    from tokenizers import Tokenizer

    tokenizer, parts = Tokenizer.from_str(text.tokenizer), []
    for entry in script:
        special = {ANSWER: "→", START: "^"}
        if entry >= 0:
            parts.append(f"#{entry}")
        else:
            parts.append(
                special.get(entry) or tokenizer.decode([-3 - entry], skip_special_tokens=False)
            )
    return "".join(parts)


def test_tasks_in_words(text):
    histories = Ragged.from_lists([[3, 4], []], dtype=np.int32)
    asked = text.searches(histories, ["soap", "brushes"], np.array([7, 8]))
    assert [read(text, row.tolist()) for row in asked] == [
        "^#3#4 query: soap item:→#7",
        "^ query: brush item:→#8",  # five tokens of bytes
    ]
    items = np.array([2])
    assert read(text, text.item_to_sid(items, ["soap"]).row(0).tolist()) == "^text: soap item:→#2"
    written = text.sid_to_text(items, ["soap"]).row(0).tolist()
    assert read(text, written) == "^item: #2 text:→soap<|im_end|>"
    question = text.questions(histories, ["soap", "brushes"])
    assert [row.tolist() for row in question] == [row.tolist()[:-2] for row in asked]


def test_an_answer_of_codes_is_closed_where_the_end_is_a_target(folder):
    config = PretrainedDecoderConfig(
        pretrained=str(folder), targets="last", softmax="full", end_token=True
    )
    text = config.resolved().task_text(TASKS)
    script = text.item_to_sid(np.array([2]), ["soap"]).row(0).tolist()
    assert read(text, script).endswith("→#2<|im_end|>")


def test_a_chat_stands_around_questions(folder):
    prompt = PromptConfig(system="Find.", before="history: ", after=".", chat=True)
    config = PretrainedDecoderConfig(pretrained=str(folder), prompt=prompt, targets="last")
    text = config.resolved().task_text(TASKS)
    assert read(text, text.item_to_sid(np.array([2]), ["soap"]).row(0).tolist()) == (
        "<|im_start|>system\nFind.<|im_end|>\n<|im_start|>user\ntext: soap item:<|im_end|>\n"
        "<|im_start|>assistant\n→#2"
    )


def test_t5_ends_its_questions(tmp_path):
    t5_checkpoint(tmp_path)
    text = PretrainedT5Config(pretrained=str(tmp_path)).resolved().task_text(TASKS)
    script = text.item_to_sid(np.array([2]), ["soap"]).row(0).tolist()
    assert read(text, script) == "text: soap item:</s>→#2"


def test_a_published_model_needs_the_checkpoint_no_more(text):
    again = TaskText.from_json(text.to_json())
    assert again == text
    assert again.item_to_sid(np.array([2]), ["a b"]) == text.item_to_sid(np.array([2]), ["a b"])
    assert text_entries([0, 4]) == [-3, -7]
