"""How fitted quantizers and SID tables lie in the store: a quantizer, its codes, a resolved table.

Three artifacts, each built once: `quantizer` (weights), `codes` (what it gives to every item) and
`sids` (after collision resolution). Knows neither fitting nor Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from forge_ray.artifacts import Artifact, ArtifactStore, ArtifactWriter
from forge_ray.config import from_mapping, to_mapping
from forge_ray.data.schema import Dataset
from forge_ray.errors import ArtifactError, ConfigError
from forge_ray.sid.columns import require_version
from forge_ray.sid.config import SidConfig
from forge_ray.sid.quantizers.base import Quantizer, QuantizerConfig
from forge_ray.sid.table import SidTable

QUANTIZER_KIND = "quantizer"
CODES_KIND = "codes"
SIDS_KIND = "sids"
_STATE = "quantizer.safetensors"
_FACTS = "quantizer.json"


@dataclass(frozen=True)
class QuantizerState:
    """A fitted quantizer as bytes: what workers on other nodes are given."""

    facts: Mapping[str, Any]
    """Configuration, input width and seed, JSON types."""
    tensors: bytes
    """safetensors."""

    @classmethod
    def of(cls, quantizer: Quantizer, config: QuantizerConfig) -> QuantizerState:
        """Capture a fitted quantizer that `config` built."""
        facts = {
            "quantizer": to_mapping(config),
            "input_dim": quantizer.input_dim,
            "seed": quantizer.seed,
        }
        return cls(facts, save_tensors(quantizer.state_dict()))

    @classmethod
    def open(cls, artifact: Artifact) -> QuantizerState:
        """Read the state of an artifact of kind `quantizer`."""
        facts = json.loads(artifact.local(_FACTS).read_text())
        return cls(facts, artifact.local(_STATE).read_bytes())

    def load(self) -> Quantizer:
        """Make the quantizer, on the CPU."""
        schema = QuantizerConfig.choices()[self.facts["quantizer"]["kind"]]
        config = cast(QuantizerConfig, from_mapping(schema, self.facts["quantizer"]))
        quantizer = config.build(self.facts["input_dim"], seed=self.facts["seed"])
        quantizer.load_state_dict(load_tensors(self.tensors))
        return quantizer

    def save(self, writer: ArtifactWriter) -> None:
        """Write the state into an artifact under construction."""
        with writer.open(_STATE) as stream:
            stream.write(self.tensors)
        with writer.open(_FACTS) as stream:
            stream.write(json.dumps(dict(self.facts), indent=2).encode())


def load_quantizer(artifact: Artifact) -> Quantizer:
    """Load a fitted quantizer from an artifact of kind `quantizer`; needs no configuration file."""
    return QuantizerState.open(artifact).load()


@dataclass(frozen=True)
class SidArtifact:
    """A resolved SID table with its lineage."""

    table: SidTable
    """Codes after collision resolution; what generators are trained on."""
    raw: SidTable
    """Codes as the quantizer gave them; what usage is measured on."""
    artifact: Artifact
    """Kind `sids`."""
    codes_artifact: Artifact
    """Kind `codes`, parent of `artifact`."""
    quantizer_artifact: Artifact
    """Kind `quantizer`, parent of `codes_artifact`."""

    @property
    def key(self) -> str:
        """Content key of the resolved table."""
        return self.artifact.key

    @property
    def dataset_key(self) -> str:
        """Content key of the dataset whose items are coded."""
        return self.artifact.manifest.parents[1]

    @property
    def config(self) -> SidConfig:
        """The configuration that the artifacts were built from."""
        return from_mapping(SidConfig, self.artifact.manifest.config)

    def load_quantizer(self) -> Quantizer:
        """Load the fitted quantizer."""
        return load_quantizer(self.quantizer_artifact)


def open_sids(store: ArtifactStore, ref: str) -> SidArtifact:
    """Open a stored SID table.

    Args:
        store: the store that holds the table and its quantizer.
        ref: directory, `sids/name-key12`, name or key prefix.

    Raises:
        ArtifactError: when `ref` names no SID table, or what it was made from is gone.
    """
    artifact = _open_kind(store, ref)
    codes = _parent(store, artifact, CODES_KIND)
    return assemble(artifact, codes, _parent(store, codes, QUANTIZER_KIND))


def table_source(store: ArtifactStore, ref: str, dataset: Dataset) -> Artifact | Path:
    """Where a SID table of a dataset's items lies; `load_table` reads it.

    Args:
        store: where stored tables are.
        ref: a stored table, fitted on the dataset or another stage of its log, or an `.npz` file.
        dataset: whose items it is to code.

    Raises:
        ArtifactError: `ref` names no SID table.
        ConfigError: a stored table codes the items of another log.
    """
    if ref.endswith(".npz"):
        return Path(ref)
    artifact, fitted_on = _open_kind(store, ref), fitted_dataset(store, ref)
    if not dataset.has_items_of(fitted_on):
        raise ConfigError(
            f"a SID table must code the items of {dataset.name}, got {ref} of {fitted_on.name} "
            f"({fitted_on.key[:12]}). Fit one on that dataset or another stage of its log: "
            f"forge-ray sid fit {dataset.key[:12]}"
        )
    return artifact


def load_table(source: Artifact | Path, dataset: Dataset) -> SidTable:
    """The SID table of a dataset's items from what `table_source` found.

    Raises:
        DataError: a file holds other items than the dataset, or SIDs of another AL-GR version.
    """
    if isinstance(source, Path):
        table = SidTable.from_npz(source, dataset.item_ids())
        require_version(source, dataset)
        return table
    return SidTable.open(source)


def fitted_dataset(store: ArtifactStore, ref: str) -> Dataset:
    """The dataset that a stored SID table was fitted on."""
    return Dataset.open(store, _open_kind(store, ref).manifest.parents[1])


def _open_kind(store: ArtifactStore, ref: str) -> Artifact:
    artifact = store.open(ref, kind=SIDS_KIND)
    if artifact.manifest.kind != SIDS_KIND:
        raise ArtifactError(
            f"{ref} must be an artifact of kind {SIDS_KIND!r}, got {artifact.manifest.kind!r}. "
            f"List them with `forge-ray artifacts ls {SIDS_KIND}`."
        )
    return artifact


def assemble(sids: Artifact, codes: Artifact, quantizer: Artifact) -> SidArtifact:
    """Open the tables of three artifacts that belong together."""
    return SidArtifact(SidTable.open(sids), SidTable.open(codes), sids, codes, quantizer)


def _parent(store: ArtifactStore, artifact: Artifact, kind: str) -> Artifact:
    key = artifact.manifest.parents[0]
    found = store.find(kind, key)
    if found is None:
        raise ArtifactError(
            f"{artifact.uri} must have its {kind} {key[:12]} in {store.uri}, got none. "
            f"Rebuild it: {artifact.manifest.command}"
        )
    return found
