"""Every shipped recipe: its settings are the published ones, and it trains on a tiny checkpoint."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import load_config
from forge_ray.data.examples import segment_rows
from forge_ray.data.ragged import Ragged
from forge_ray.data.sequences import events_of
from forge_ray.data.splits import PublishedStage, published
from forge_ray.errors import ConfigError
from forge_ray.gr.checkpoint import load_generator, model_config
from forge_ray.gr.config import GrConfig
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.recipes import recipe_names, recipe_path
from forge_ray.gr.train import train_generator
from forge_ray.sid.table import SidTable
from tests.gr.chains import chain_dataset, grid_table
from tests.gr.models.checkpoints import qwen_checkpoint, t5_checkpoint

CHECKPOINTS = {"forge_t5_base": t5_checkpoint, "forge_qwen2_5_0_5b": qwen_checkpoint}
ONE_CPU = [
    "num_workers=1",
    "use_gpu=false",
    "max_steps=2",
    "engine.global_batch=64",
    "engine.micro_batch=32",
    "validation.every=2",
    "validation.users=4",
    "validation.batch_users=4",
    "validation.cpus=0",
    "validation.gpus=0",
]
"""What a machine without GPUs overrides; all else is the recipe's."""


def recipe(name: str, *overrides: str) -> GrConfig:
    return load_config(GrConfig, path=recipe_path(Path(name)), overrides=overrides)


def three_levels(num_items: int = 120) -> SidTable:
    """As many levels as FORGE has, with collisions."""
    numbers = np.arange(num_items)
    codes = np.stack([numbers % 4, numbers // 4 % 5, numbers // 20 % 6], axis=1)
    return SidTable.from_codes(codes, (4, 5, 6))


def test_every_recipe_is_tried_here():
    assert set(recipe_names()) == set(CHECKPOINTS)


@pytest.mark.parametrize(
    ("name", "learning_rate", "schedule", "max_steps"),
    [
        ("forge_t5_base", 2e-4, "constant", 500_000),
        ("forge_qwen2_5_0_5b", 5e-5, "linear", 125_000),
    ],
)
def test_published_settings(name, learning_rate, schedule, max_steps):
    config = recipe(name)
    engine = config.engine
    assert (engine.learning_rate, engine.schedule) == (learning_rate, schedule)
    assert (config.max_steps, config.num_workers, engine.micro_batch) == (max_steps, 16, 80)
    assert engine.global_batch == 1280
    assert engine.accumulation(16) == 1
    assert engine.accumulation(2) == 8
    assert engine.learning_rate_at(1, max_steps) == pytest.approx(learning_rate, rel=1e-4)
    assert config.validation.widths == [200, 400, 1200]
    assert not config.validation.exclude_seen
    assert (config.max_history, config.seed) == (100, 42)
    assert config.plan.mode == "last"
    assert (config.model.softmax, config.model.end_token) == ("full", True)


def published_rows(num: int) -> tuple[list[list[str]], pa.RecordBatch]:
    """Up to 120 items and one to three targets, each as one list and as an import has them."""
    rng = np.random.default_rng(0)
    whole = [[str(item) for item in rng.integers(0, 500, rng.integers(1, 122))] for _ in range(num)]
    starts = [max(0, len(row) - int(rng.integers(1, 4))) for row in whole]
    columns = {
        "history": [row[:start] for row, start in zip(whole, starts, strict=True)],
        "targets": [row[start:] for row, start in zip(whole, starts, strict=True)],
    }
    return whole, pa.RecordBatch.from_pydict(columns)


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_a_published_row_is_one_training_row(name):
    """So a step of 1,280 rows reads as many published rows, and steps and epochs are FORGE's."""
    written, batch = published_rows(300)
    events = events_of(batch, first_row=0, prefix="s1:", file=0)
    sizes = np.array([len(row) for row in written])
    items, times = (
        Ragged.from_lengths(events[column].cast(pa.int64()).to_numpy(), sizes)
        for column in ("item_id", "timestamp")
    )
    stage = PublishedStage(1, train=(0,), validation=(), test=(1,))
    train = published(items, times, stage=stage, is_validation=np.zeros(len(sizes), bool)).train
    config = recipe(name, "engine.global_batch=64")
    rows, batches = segment_rows(train.items, config.plan, epoch=0, segment=0)
    read = [row.tolist() for numbers in batches for row in rows.take(numbers)]
    # The last target is the answer; before it the newest hundred, other targets among them.
    expected = [[int(item) for item in row[-101:]] for row in written if len(row) > 1]
    assert len(expected) < len(written)
    assert sorted(read) == sorted(expected)


def test_the_wording_is_that_of_released_rows(shared_data):
    with (shared_data / "al-gr-sample" / "train_data.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    users = {tuple(re.split(r"(?:C\d+)+", row["user"])) for row in rows}
    for name in recipe_names():
        prompt = recipe(name).model.prompt
        assert users == {(prompt.before, prompt.after)}
        # T5 reads the user's text only.
        assert prompt.system == (rows[0]["system"] if prompt.chat else "")


def test_prompt_of_the_chat_is_the_template_s(tmp_path):
    """Text of the whole question around two items, as transformers renders it."""
    from transformers import AutoTokenizer

    folder = qwen_checkpoint(tmp_path)
    model = recipe("forge_qwen2_5_0_5b", f"model.pretrained={folder}").model.resolved()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = model.prompt
    sides = [tokenizer.decode(side) for side in (model.checkpoint.before, model.checkpoint.after)]
    assert sides == [
        f"<|im_start|>system\n{prompt.system}<|im_end|>\n<|im_start|>user\n{prompt.before}",
        f"{prompt.after}<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert tokenizer.convert_ids_to_tokens(model.checkpoint.end) == "<|im_end|>"


def test_widths_of_another_number_of_levels_are_refused_before_any_work(store, tmp_path):
    """A recipe searches three levels; the first validation comes after 10,000 steps."""
    config = recipe("forge_t5_base", "model.pretrained=never-read")
    with pytest.raises(ConfigError, match=r"must be 2 integers.*widths=\[200, 1200\]"):
        train_generator(
            config, chain_dataset(store), grid_table(), store=store, run_dir=str(tmp_path), name="a"
        )
    load_config(GrConfig).check_levels(2)  # the default fits every table


class TestNames:
    def test_a_file_wins_over_a_recipe(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("forge_t5_base").write_text("max_steps: 3", encoding="utf-8")
        assert recipe("forge_t5_base").max_steps == 3

    def test_a_path_stays_a_path(self):
        assert recipe_path(Path("no/such.yaml")) == Path("no/such.yaml")

    def test_an_unknown_name_lists_the_recipes(self):
        with pytest.raises(ConfigError, match=r"one of forge_qwen.*Did you mean 'forge_t5_base'"):
            recipe_path(Path("forge_t5"))


@pytest.mark.ray
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_two_steps_from_a_checkpoint(ray_local, tmp_path, name):
    """The published settings but for the machine; the model then decodes without the checkpoint."""
    folder = CHECKPOINTS[name](tmp_path / "checkpoint")
    store = ArtifactStore(tmp_path / "store")
    # As many rows as users: ten batches of 64.
    dataset, table = chain_dataset(store, num_users=640), three_levels()
    config = recipe(name, f"model.pretrained={folder}", *ONE_CPU)
    result = train_generator(
        config, dataset, table, store=store, run_dir=str(tmp_path / "runs"), name=name
    )
    row = result.history[-1]
    assert row["global_step"] == 2
    assert np.isfinite(row["loss"])
    assert {f"ItemHit@{k}" for k in (10, 20, 100, 500, 1000)} <= set(row)
    assert row["train_tokens"] == 2 * 64 * (table.num_levels + 1)
    for path in folder.iterdir():
        path.unlink()
    saved = model_config(result.artifact)
    assert saved.model.checkpoint.fingerprint
    assert saved.model.prompt == config.model.prompt
    generator = load_generator(result.artifact, table)
    decoder = SidDecoder(generator, table, widths=[4, 20, 30], max_history=saved.max_history)
    decoded = decoder.decode(Ragged.from_lists([[1, 2, 3], []], dtype=np.int64))
    assert (decoded.sid_rank >= 0).all()
    assert decoded.num_invalid == 0
    assert not np.array_equal(decoded.scores[0], decoded.scores[1])
