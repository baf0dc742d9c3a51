"""Tiny models in Hugging Face's layout, and catalogues to encode: built here, no network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.schema import Dataset

WORDS = ("red", "green", "blue", "soap", "brush", "cream", "for", "hair")


def text_model(folder: Path, *, pooling: str | None = "mean", seed: int = 0) -> str:
    """A BERT of 16 numbers over a vocabulary of words, with its `pooling` if any."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    if pooling is not None:
        modes = {f"pooling_mode_{one}": False for one in ("mean_tokens", "cls_token", "lasttoken")}
        asked = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}[pooling]
        write_json(folder / "1_Pooling" / "config.json", {**modes, f"pooling_mode_{asked}": True})
        names = ("Transformer", "Pooling", "Normalize")
        modules = [{"type": f"sentence_transformers.models.{name}"} for name in names]
        write_json(folder / "modules.json", modules)
    return str(folder)


def vision_model(folder: Path) -> str:
    """A vision transformer of 16 numbers for pictures of 32 by 32."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", processor)
    return str(folder)


def clip_model(folder: Path) -> str:
    """A CLIP whose two towers end in 8 numbers; its tokenizer is that of `text_model`."""
    from transformers import CLIPConfig, CLIPModel

    text_model(folder, pooling=None)
    vision_model(folder)
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "projection_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={
            **sizes, **ids, "vocab_size": 4 + len(WORDS), "max_position_embeddings": 12
        },
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def titles(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 9))) for _ in range(count)]


def catalogue(
    store: ArtifactStore, columns: dict[str, Any], *, files: int = 2, group_rows: int = 25
) -> Dataset:
    """A dataset of items alone, their rows shuffled over some files and row groups."""
    count = len(next(iter(columns.values())))
    order = np.random.default_rng(1).permutation(count)
    table = pa.table(
        {
            "item_index": pa.array(np.arange(count), pa.int32()),
            "item_id": [f"i{number:03d}" for number in range(count)],
            "train_count": np.ones(count, dtype=np.int64),
            **columns,
        }
    ).take(order)

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        cuts = np.linspace(0, count, files + 1).astype(int)
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            with writer.open("items", f"part-{number:05d}.parquet") as stream:
                pq.write_table(table.slice(start, stop - start), stream, row_group_size=group_rows)
        return ArtifactInfo(rows={"items": count, "users": 0})

    content = {name: str(values) for name, values in columns.items()}
    return Dataset(store.build("dataset", "shop", content, produce=produce))
