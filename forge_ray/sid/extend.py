"""Extending a published SID table to a grown catalogue: nothing that is known changes its name.

The quantizer stays as it was fitted, and published items keep their codes, matched by item id. New
items are encoded and resolved around them, so generators and logs that know the old table stay
valid. An item that left the catalogue has no row in the new table; a new item may get its SID.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import VectorsConfig, VectorSet, open_vectors
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.config import EncodeConfig, SidConfig
from forge_ray.sid.fit import build_codes, build_table
from forge_ray.sid.resolve import Published
from forge_ray.sid.storage import SidArtifact, assemble


def extend_sids(
    sids: SidArtifact,
    dataset: Dataset,
    store: ArtifactStore,
    *,
    encode: EncodeConfig,
    space: str | None = None,
) -> SidArtifact:
    """Give the new items of a grown dataset their SIDs; whatever exists already is opened instead.

    Args:
        sids: the published table.
        dataset: prepared dataset that holds the published items and new ones.
        store: where the published table's dataset lies, and where the new table goes.
        encode: how to spread the work.
        space: vector space of `dataset`; None takes the name of the published one.

    Returns:
        A table of `dataset`'s items. Its third parent is the published table.

    Raises:
        ConfigError: when the published vectors were fitted on the old dataset's behaviour.
        DataError: when the old dataset is gone, none of its items is in the new one, or the new
            vectors have another width.
    """
    config = _frozen(sids.config, encode, space)
    source = open_vectors(config.vectors, dataset, store)
    _check_width(sids, source, config)
    published = Published(published_codes(sids, dataset, store), sids.key)
    words = ["forge-ray", "sid", "extend", sids.artifact.uri, dataset.artifact.uri]
    command = shlex.join([*words, *(["--space", space] if space else [])])
    quantizer = sids.quantizer_artifact
    codes = build_codes(config, dataset, source, quantizer, store, command=command)
    table = build_table(
        config, dataset, source, quantizer, codes, store, command=command, published=published
    )
    return assemble(table, codes, quantizer)


def published_codes(
    sids: SidArtifact, dataset: Dataset, store: ArtifactStore
) -> npt.NDArray[np.int64]:
    """Put the codes of a published table in the order of another dataset.

    Args:
        sids: the published table.
        dataset: another dataset.
        store: where the published table's dataset lies.

    Returns:
        int64 [N, L']: codes by item id, -1 in the rows of unknown items.

    Raises:
        DataError: when the old dataset is gone or shares no item with the new one.
    """
    artifact = store.find("dataset", sids.dataset_key)
    if artifact is None:
        raise DataError(
            f"{store.uri} must hold dataset {sids.dataset_key[:12]} of {sids.artifact.uri}, got "
            "none. Prepare it again: item ids are matched with it."
        )
    old, new = (one.items(["item_id"])["item_id"] for one in (Dataset(artifact), dataset))
    row = pc.fill_null(pc.index_in(new, value_set=old), -1).to_numpy().astype(np.int64)
    known = row >= 0
    if not known.any():
        raise DataError(
            f"{dataset.artifact.uri} must hold items of {artifact.uri}, got none of its "
            f"{len(old)}. Extend a table by a dataset with the same item ids."
        )
    codes = np.full((len(row), sids.table.num_levels), -1, dtype=np.int64)
    codes[known] = sids.table.codes[row[known]]
    return codes


def _frozen(config: SidConfig, encode: EncodeConfig, space: str | None) -> SidConfig:
    """The published configuration for vectors that mean the same in another dataset."""
    own_space = VectorsConfig(space=config.vectors.space)
    if config.vectors.canonical() != own_space.canonical():
        raise ConfigError(
            "vectors must be a space of the dataset for a table that is to be extended, got "
            "vectors that were fitted on its behaviour: fitted again, they would mean something "
            "else to the quantizer. Fit a new table with `forge-ray sid fit`."
        )
    return replace(config, encode=encode, vectors=VectorsConfig(space=space or own_space.space))


def _check_width(sids: SidArtifact, source: VectorSet, config: SidConfig) -> None:
    width = sids.load_quantizer().input_dim
    if source.dim != width:
        raise DataError(
            f"vectors.{config.vectors.space} must have {width} numbers, as the quantizer was "
            f"fitted with, got {source.dim}. Use vectors of the same encoder."
        )
