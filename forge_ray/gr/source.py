"""A published model with everything decoding needs: its SID table, its dataset, its history length.

Knows artifacts and their keys; knows nothing about search, metrics or Ray. A source is a small
picklable handle, and weights are read where `load` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from forge_ray.artifacts import Artifact, ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.errors import ArtifactError
from forge_ray.gr.beam import StepwiseGenerator
from forge_ray.gr.checkpoint import (
    MODEL_KIND,
    TASK_TEXT_FILE,
    load_generator,
    model_config,
    table_key,
)
from forge_ray.gr.scripts import TaskText
from forge_ray.gr.tasks import HISTORIES, Prompts
from forge_ray.sid.storage import load_table
from forge_ray.sid.table import SidTable


@dataclass(frozen=True)
class LoadedGenerator:
    """A model ready to decode, with the SIDs that it was trained on.

    Attributes:
        generator: the model.
        table: its SIDs.
        max_history: newest items of a history that it reads.
        text: turns queries into questions; None for a model that reads no text.
        prompts: what it learned to be asked with.
    """

    generator: StepwiseGenerator
    table: SidTable
    max_history: int
    text: TaskText | None = None
    prompts: Prompts = HISTORIES


class GeneratorSource(Protocol):
    """Where a process gets a model from; picklable."""

    @property
    def key(self) -> str:
        """Identity of the model; results of another model are never mixed in."""

    @property
    def num_levels(self) -> int:
        """Levels of its SID table."""

    @property
    def prompts(self) -> Prompts:
        """What it learned to be asked with, known before it is loaded."""

    def load(self, device: str) -> LoadedGenerator:
        """Open the model on a device."""


@dataclass(frozen=True)
class ModelSource:
    """A model artifact and the SID table that it speaks.

    Attributes:
        artifact: of kind `model`.
        table: a SID table artifact, or the `.npz` file of a foreign table.
        dataset: what the model was trained on.
    """

    artifact: Artifact
    table: Artifact | Path
    dataset: Dataset

    @classmethod
    def open(cls, store: ArtifactStore, ref: str, *, sids: str | None = None) -> ModelSource:
        """Find a model and, by the keys in its manifest, what it was made from.

        Args:
            store: holds the model, its SID table and its dataset.
            ref: the model, as a path, `model/name-key`, key prefix or name.
            sids: the SID table, where the store does not hold it: an artifact or an `.npz` file.

        Raises:
            ArtifactError: ``ref`` is no model, its table or dataset is not in the store, or
                ``sids`` is another table.
        """
        artifact = store.open(ref, kind=MODEL_KIND)
        manifest = artifact.manifest
        if manifest.kind != MODEL_KIND:
            raise ArtifactError(
                f"{ref} must be an artifact of kind {MODEL_KIND!r}, got {manifest.kind!r}. "
                "List models with `forge-ray artifacts ls model`."
            )
        dataset = Dataset.open(store, manifest.parents[0])
        return cls(artifact, _find_table(store, sids, manifest.parents[1], dataset), dataset)

    @property
    def key(self) -> str:
        """The model's content key; the SID table's key is part of it."""
        return self.artifact.key

    @property
    def name(self) -> str:
        """The model's name and short key."""
        return self.artifact.manifest.ref.split("/", 1)[1]

    @property
    def num_levels(self) -> int:
        """Levels of its SID table."""
        return self.load_table().num_levels

    @property
    def prompts(self) -> Prompts:
        """What it learned to be asked with: the mixture that it was trained on says so."""
        return model_config(self.artifact).tasks.prompts

    def load_table(self) -> SidTable:
        """Read the codes, whatever table it is."""
        return load_table(self.table, self.dataset)

    def load(self, device: str = "cpu") -> LoadedGenerator:
        """Read weights and codes; a table other than the model's own is refused."""
        table = self.load_table()
        generator = load_generator(self.artifact, table).to(device)
        config = model_config(self.artifact)
        return LoadedGenerator(
            generator, table, config.max_history, self._text(), config.tasks.prompts
        )

    def _text(self) -> TaskText | None:
        if not self.artifact.exists(TASK_TEXT_FILE):
            return None
        content = self.artifact.local(TASK_TEXT_FILE).read_text(encoding="utf-8")
        return TaskText.from_json(content)


def own_table(store: ArtifactStore, ref: str, among: Sequence[str]) -> str | None:
    """The `.npz` file that a model was trained with; None where no file of these is.

    Args:
        store: holds the model and its dataset.
        ref: the model.
        among: references of SID tables; artifacts are passed over, models find those themselves.
    """
    manifest = store.open(ref, kind=MODEL_KIND).manifest
    files = [one for one in among if one.endswith(".npz")]
    if not files:
        return None
    ids = Dataset.open(store, manifest.parents[0]).item_ids()
    return next((one for one in files if _key_of(one, ids) == manifest.parents[1]), None)


def _key_of(path: str, item_ids: NDArray[Any]) -> str:
    return table_key(SidTable.from_npz(path, item_ids))


def _find_table(
    store: ArtifactStore, sids: str | None, key: str, dataset: Dataset
) -> Artifact | Path:
    if sids is not None:
        is_file = sids.endswith(".npz")
        given = _key_of(sids, dataset.item_ids()) if is_file else store.open(sids).key
        if given != key:
            raise ArtifactError(
                f"--sids must be the SID table {key[:12]} that the model was trained with, got "
                f"{sids} of {given[:12]}. Leave it out where the store holds that table."
            )
        return Path(sids) if is_file else store.open(sids)
    if not any(manifest.key == key for manifest in store.manifests()):
        raise ArtifactError(
            f"the model's SID table {key[:12]} must be in {store.uri}, got none of that key. "
            "Pass --sids with the table (an artifact or .npz file) that the model was trained with."
        )
    return store.open(key)
