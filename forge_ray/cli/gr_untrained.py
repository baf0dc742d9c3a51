"""`forge-ray gr untrained`: a tokenizer of a catalogue's texts and a small configuration."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from forge_ray.cli.console import (
    DEFAULT_STORE,
    AsJson,
    ConfigFile,
    Overrides,
    StoreUri,
    emit,
    open_store,
    stderr,
)
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset


def untrained(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset.")],
    folder: Annotated[str, typer.Argument(help="Folder to write; new or empty.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint without weights, for small models that read text.

    Settings: columns, prompts, vocab_size, family (qwen2, t5), hidden_size, num_layers, num_heads,
    intermediate_size. Train it with model.pretrained=FOLDER model.fresh=true.
    """
    from forge_ray.gr.untrained import UntrainedConfig, write_untrained

    settings = load_config(UntrainedConfig, path=config, overrides=overrides or ())
    written = write_untrained(Dataset.open(open_store(store), dataset), folder, settings)
    emit(asdict(written), title=f"Untrained {settings.family}", as_json=as_json)
    kind = "pretrained_decoder" if settings.family == "qwen2" else "pretrained_t5"
    stderr.print(
        f"Next: forge-ray gr train SIDS model.kind={kind} model.pretrained={folder} "
        "model.fresh=true",
        highlight=False,
        soft_wrap=True,
    )
