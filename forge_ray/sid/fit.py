"""From vectors to a SID table, in three cached artifacts: quantizer, codes, resolved table.

Fitting runs where it is called, or on `train.workers` of Ray Train; encoding as Ray Data actors
over the vector shards. A Ray must be up for workers, and when the catalogue is larger than
`encode.local_items`.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import LocalFileSystem

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping, to_overrides
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import VectorSet, open_vectors
from forge_ray.sid.config import EncodeConfig, SidConfig, TrainConfig
from forge_ray.sid.encode import encode_catalogue
from forge_ray.sid.quantizers.base import (
    Quantizer,
    QuantizerConfig,
    Report,
    ignore_report,
)
from forge_ray.sid.quantizers.rq_vae import RqVaeConfig
from forge_ray.sid.resolve import Published, resolve_catalogue
from forge_ray.sid.selection import ProxySelector
from forge_ray.sid.storage import (
    CODES_KIND,
    QUANTIZER_KIND,
    SIDS_KIND,
    QuantizerState,
    SidArtifact,
    assemble,
)
from forge_ray.sid.table import SidTable
from forge_ray.sid.train import train_rq_vae
from forge_ray.sid.training_set import load_training_set, trained_part

logger = logging.getLogger(__name__)


def fit_sids(
    config: SidConfig, dataset: Dataset, store: ArtifactStore, *, report: Report = ignore_report
) -> SidArtifact:
    """Fit, encode and resolve; whatever exists already is opened instead.

    Args:
        config: quantizer, vectors, resolver and seed.
        dataset: the prepared dataset.
        store: where the artifacts go.
        report: called while the quantizer trains; not called when it is already there.

    Raises:
        ConfigError: when codebooks are larger than the training set.
        DataError: when the dataset lacks vectors or pairs that the configuration needs.
        TrainingError: when training diverges.
    """
    identity = _identity(config)
    source = open_vectors(config.vectors, dataset, store)
    command = _command(dataset, config)
    quantizer = store.build(
        QUANTIZER_KIND,
        _quantizer_name(config.quantizer),
        {part: identity[part] for part in ("quantizer", "vectors", "seed")},
        parents=tuple(dict.fromkeys((dataset.key, source.key))),
        produce=lambda writer: _produce_quantizer(config, dataset, source, store, writer, report),
        command=command,
    )
    codes = build_codes(config, dataset, source, quantizer, store, command=command)
    sids = build_table(config, dataset, source, quantizer, codes, store, command=command)
    return assemble(sids, codes, quantizer)


def shared_parts(config: SidConfig) -> dict[str, dict[str, Any]]:
    """By kind of artifact what decides it, for a given dataset: equal parts are built once."""
    identity = _identity(config)
    fitted = {part: identity[part] for part in ("quantizer", "vectors", "seed")}
    return {QUANTIZER_KIND: fitted, SIDS_KIND: identity}


def build_codes(
    config: SidConfig,
    dataset: Dataset,
    source: VectorSet,
    quantizer: Artifact,
    store: ArtifactStore,
    *,
    command: str,
) -> Artifact:
    """Encode a catalogue with a fitted quantizer, or find that it was done.

    Args:
        config: what the quantizer was fitted with; its `encode` section says how to work.
        dataset: whose items are coded.
        source: their vectors.
        quantizer: artifact of kind `quantizer`.
        store: where the codes go, as an artifact of kind `codes`.
        command: shell command that rebuilds them.
    """
    identity = _identity(config)
    return store.build(
        CODES_KIND,
        _quantizer_name(config.quantizer),
        {part: identity[part] for part in ("quantizer", "vectors", "seed")},
        # The source as well: a frozen quantizer may read another space of the same name.
        parents=tuple(dict.fromkeys((quantizer.key, dataset.key, source.key))),
        produce=lambda writer: _produce_codes(config, source, quantizer, writer),
        command=command,
    )


def build_table(
    config: SidConfig,
    dataset: Dataset,
    source: VectorSet,
    quantizer: Artifact,
    codes: Artifact,
    store: ArtifactStore,
    *,
    command: str,
    published: Published | None = None,
) -> Artifact:
    """Resolve the codes of a catalogue, or find that it was done.

    Args:
        config: its resolver decides.
        dataset: whose items are coded.
        source: their vectors.
        quantizer: artifact of kind `quantizer`.
        codes: artifact of kind `codes`.
        store: where the table goes, as an artifact of kind `sids`.
        command: shell command that rebuilds it.
        published: codes that must stay, and the key of their table.
    """
    extends = () if published is None else (published.key,)
    return store.build(
        SIDS_KIND,
        f"{_quantizer_name(config.quantizer)}-{config.resolver.kind}",
        _identity(config),
        parents=(codes.key, dataset.key, *extends),
        produce=lambda writer: _produce_sids(
            config, dataset, source, quantizer, codes, published, writer
        ),
        command=command,
    )


def _identity(config: SidConfig) -> dict[str, Any]:
    """The part of the configuration that decides the codes; itself a valid `SidConfig`."""
    identity = to_mapping(config)
    identity["vectors"] = to_mapping(config.vectors.canonical())
    del identity["encode"], identity["train"]
    return identity


def _quantizer_name(config: QuantizerConfig) -> str:
    sizes = config.codebook_sizes
    shape = f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else "x".join(map(str, sizes))
    return f"{config.kind}-{shape}"


def _command(dataset: Dataset, config: SidConfig) -> str:
    deciding = replace(
        config, vectors=config.vectors.canonical(), encode=EncodeConfig(), train=TrainConfig()
    )
    words = ["forge-ray", "sid", "fit", dataset.artifact.uri, *to_overrides(deciding)]
    return shlex.join(words)


def _produce_quantizer(
    config: SidConfig,
    dataset: Dataset,
    source: VectorSet,
    store: ArtifactStore,
    writer: ArtifactWriter,
    report: Report,
) -> ArtifactInfo:
    started = time.monotonic()
    curve: list[dict[str, float]] = []

    def record(step: int, metrics: Mapping[str, float]) -> None:
        curve.append({"step": step, **metrics})
        report(step, metrics)

    quantizer = _fit(config, dataset, source, store, writer, record)
    QuantizerState.of(quantizer, config.quantizer).save(writer)
    metrics = {
        "seconds_fit": round(time.monotonic() - started, 3),
        "loss_curve": curve,
        **quantizer.facts(),
    }
    return ArtifactInfo(rows={"items": source.num_items}, metrics=metrics)


def _produce_codes(
    config: SidConfig, source: VectorSet, quantizer: Artifact, writer: ArtifactWriter
) -> ArtifactInfo:
    started = time.monotonic()
    state = QuantizerState.open(quantizer)
    encoding = encode_catalogue(state, source, config.encode, writer)
    sizes = state.load().codebook_sizes
    SidTable.from_codes(encoding.codes, sizes, parent=quantizer.key).save(writer)
    metrics = {
        "seconds_encode": round(time.monotonic() - started, 3),
        "shards": encoding.shards,
        "shards_resumed": encoding.shards_resumed,
    }
    return ArtifactInfo(rows={"items": source.num_items}, metrics=metrics)


def _fit(
    config: SidConfig,
    dataset: Dataset,
    source: VectorSet,
    store: ArtifactStore,
    writer: ArtifactWriter,
    report: Report,
) -> Quantizer:
    logger.info("fitting %s on %s", _quantizer_name(config.quantizer), dataset.name)
    folder = writer.scratch
    is_mapped = bool(config.train.workers) and isinstance(writer.filesystem, LocalFileSystem)
    data = load_training_set(
        config.quantizer,
        dataset,
        source,
        store,
        seed=config.seed,
        vector_file=Path(folder, "data", "vectors.npy") if is_mapped else None,
    )
    quantizer = config.quantizer.build(source.dim, seed=config.seed)
    inner = trained_part(config.quantizer)
    if inner is None:
        if torch.cuda.is_available():
            quantizer.to("cuda")
        quantizer.fit(data, report=report)
        return quantizer.to("cpu")
    model = train_rq_vae(
        inner,
        data,
        seed=config.seed,
        spread=config.train,
        filesystem=writer.filesystem,
        folder=folder,
        select=_selector(inner, dataset, source, seed=config.seed),
        report=report,
    )
    if inner is config.quantizer:
        return model
    quantizer.load_state_dict(model.state_dict())
    return quantizer


def _selector(
    config: RqVaeConfig, dataset: Dataset, source: VectorSet, *, seed: int
) -> ProxySelector | None:
    if not config.selection.checks:
        return None
    return ProxySelector(config.selection, dataset, source, seed=seed)


def _produce_sids(
    config: SidConfig,
    dataset: Dataset,
    source: VectorSet,
    quantizer_artifact: Artifact,
    codes_artifact: Artifact,
    published: Published | None,
    writer: ArtifactWriter,
) -> ArtifactInfo:
    started = time.monotonic()
    raw = SidTable.open(codes_artifact)
    resolution = resolve_catalogue(
        config.resolver,
        raw,
        dataset=dataset,
        source=source,
        state=QuantizerState.open(quantizer_artifact),
        local_items=config.encode.local_items,
        published=None if published is None else published.codes,
    )
    table = SidTable.from_codes(
        resolution.codes,
        resolution.codebook_sizes,
        resolver=config.resolver.kind,
        parent=codes_artifact.key,
    )
    table.save(writer)
    metrics = {**resolution.report, "seconds_resolve": round(time.monotonic() - started, 3)}
    return ArtifactInfo(rows={"items": table.num_items}, metrics=metrics)
