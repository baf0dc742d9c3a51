"""What a training checkpoint and a published model hold, and the checks before either is used.

A checkpoint is the merged folder of all workers: DeepSpeed's shards below `engine/`, and from rank
0 the manifest and the consolidated weights. A model artifact is the weights, its configuration in
the manifest, and the key of the SID table it speaks: codes of another table would mean other items,
so loading against one is refused.

Knows files and keys. Knows nothing about Ray or DeepSpeed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from forge_ray.artifacts import Artifact
from forge_ray.config import canonical_json, from_mapping
from forge_ray.data.stream import Cursor
from forge_ray.errors import ArtifactError
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.base import Generator, GeneratorConfig
from forge_ray.gr.vocab import Vocab
from forge_ray.sid.table import SidTable

MODEL_KIND = "model"
WEIGHTS_FILE = "model.safetensors"
HISTORY_FILE = "history.json"
LOSSES_FILE = "losses.npy"
"""Loss of every step so far, float64 [steps], mean over the target tokens of the global batch."""
TASK_TEXT_FILE = "task_text.json"
"""What turns texts into questions (`forge_ray.gr.scripts.TaskText`), in models that read text."""
MANIFEST_FILE = "checkpoint.json"


class DamagedCheckpointError(ArtifactError):
    """A file of a checkpoint is missing, unreadable or of another size than it was written with."""


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint must agree on with the run that loads it.

    Attributes:
        config_hash: of everything that decides the weights.
        table_key: of the SID table.
        dataset_key: of the training data.
        zero_stage: how state is sharded.
        precision: of the weights.
    """

    config_hash: str
    table_key: str
    dataset_key: str
    zero_stage: int
    precision: str


@dataclass(frozen=True)
class Progress:
    """Where a run stands; independent of the world size.

    Attributes:
        step: optimiser steps done.
        cursor: next batch of the stream of histories.
        cursors: next batch of the streams of a mixture's other tasks, by task.
        tokens: target tokens trained on.
        history: one row of metrics per validation so far.
        pending: the row of the newest validation point, while its metrics are still computed.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0
    history: tuple[dict[str, Any], ...] = ()
    pending: dict[str, Any] | None = None
    cursors: dict[str, Cursor] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointManifest:
    """Description of a checkpoint.

    Attributes:
        identity: of the run.
        progress: of the run.
        world_size: workers that wrote the shards.
        files: bytes of each file, by path relative to the checkpoint's folder.
    """

    identity: RunIdentity
    progress: Progress
    world_size: int
    files: dict[str, int]

    def to_json(self) -> str:
        """The text of the manifest file."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def parse_manifest(text: str, path: str, expected: RunIdentity) -> CheckpointManifest:
    """Reads a manifest after checking that this run may continue from its checkpoint.

    Args:
        text: content of the manifest file.
        path: of the file, for messages.
        expected: identity of this run.

    Raises:
        DamagedCheckpointError: The text is no manifest.
        ArtifactError: The checkpoint belongs to another configuration, SID table, dataset or
            sharding.
    """
    try:
        raw = json.loads(text)
        found, progress = RunIdentity(**raw["identity"]), raw["progress"]
        manifest = CheckpointManifest(
            found,
            Progress(
                progress["step"],
                Cursor(**progress["cursor"]),
                progress["tokens"],
                tuple(progress["history"]),
                progress["pending"],
                # Checkpoints from before there were mixtures have none.
                {task: Cursor(**one) for task, one in progress.get("cursors", {}).items()},
            ),
            raw["world_size"],
            raw["files"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(
            f"{path} must be a checkpoint's manifest, got: {error!r}."
        ) from error
    _check_identity(path, found, expected)
    return manifest


def _check_identity(path: str, found: RunIdentity, expected: RunIdentity) -> None:
    for name, value in dataclasses.asdict(found).items():
        wanted = getattr(expected, name)
        if value == wanted:
            continue
        advice = {
            "table_key": "Models do not move between SID tables; train under another name.",
        }.get(name, "Train under another name, or restore the old configuration.")
        raise ArtifactError(
            f"{path}: {name} must be {_short(wanted)}, got {_short(value)}. {advice}"
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def config_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, 64 hex digits."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def table_key(table: SidTable) -> str:
    """The table's artifact key; a table without one gets the hash of its codes."""
    if table.key:
        return table.key
    digest = hashlib.sha256(json.dumps(table.codebook_sizes).encode())
    digest.update(np.ascontiguousarray(table.codes).data)
    return digest.hexdigest()


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes consolidated weights."""
    save_file({name: value.contiguous() for name, value in weights.items()}, str(path))


def build_generator(config: GeneratorConfig, table: SidTable) -> Generator:
    """A generator with fresh weights for a table's vocabulary."""
    return config.build(Vocab(table.codebook_sizes))


def model_config(artifact: Artifact) -> GrConfig:
    """The configuration that a published model was trained with."""
    return from_mapping(GrConfig, artifact.manifest.config["gr"])


def load_generator(artifact: Artifact, table: SidTable) -> Generator:
    """A published model, ready to decode (evaluation mode, CPU, float32).

    Args:
        artifact: of kind `model`.
        table: the SID table it was trained with.

    Raises:
        ArtifactError: The artifact is no model, or was trained with another table.
    """
    manifest = artifact.manifest
    if manifest.kind != MODEL_KIND:
        raise ArtifactError(
            f"{artifact.uri} must be of kind {MODEL_KIND!r}, got {manifest.kind!r}. Give a model."
        )
    trained_with = manifest.config["table_key"]
    if trained_with != table_key(table):
        raise ArtifactError(
            f"{artifact.uri} must be used with SID table {_short(trained_with)}, got "
            f"{_short(table_key(table))}. Give the table that the model was trained with."
        )
    generator = build_generator(model_config(artifact).model, table)
    generator.load_state_dict(load_file(str(artifact.local(WEIGHTS_FILE))))
    return generator.eval()
