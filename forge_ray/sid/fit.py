"""From vectors to a SID table, in three cached artifacts: quantizer, codes, resolved table.

Fitting runs where it is called, encoding as Ray Data actors over the vector shards. A Ray must be
up when the catalogue is larger than `encode.local_items`.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping, to_overrides
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import VectorSet, open_vectors
from forge_ray.sid.config import EncodeConfig, SidConfig
from forge_ray.sid.encode import encode_catalogue
from forge_ray.sid.quantizers.base import (
    Int64Array,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingPairs,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.resolve import Published, resolve_catalogue
from forge_ray.sid.storage import (
    CODES_KIND,
    QUANTIZER_KIND,
    SIDS_KIND,
    QuantizerState,
    SidArtifact,
    assemble,
)
from forge_ray.sid.table import SidTable

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
        produce=lambda writer: _produce_quantizer(config, dataset, source, writer, report),
        command=command,
    )
    codes = build_codes(config, dataset, source, quantizer, store, command=command)
    sids = build_table(config, dataset, source, quantizer, codes, store, command=command)
    return assemble(sids, codes, quantizer)


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
        parents=(quantizer.key, dataset.key),
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
    del identity["encode"]
    return identity


def _quantizer_name(config: QuantizerConfig) -> str:
    sizes = config.codebook_sizes
    shape = f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else "x".join(map(str, sizes))
    return f"{config.kind}-{shape}"


def _command(dataset: Dataset, config: SidConfig) -> str:
    deciding = replace(config, vectors=config.vectors.canonical(), encode=EncodeConfig())
    words = ["forge-ray", "sid", "fit", dataset.artifact.uri, *to_overrides(deciding)]
    return shlex.join(words)


def _produce_quantizer(
    config: SidConfig,
    dataset: Dataset,
    source: VectorSet,
    writer: ArtifactWriter,
    report: Report,
) -> ArtifactInfo:
    started = time.monotonic()
    curve: list[dict[str, float]] = []

    def record(step: int, metrics: Mapping[str, float]) -> None:
        curve.append({"step": step, **metrics})
        report(step, metrics)

    quantizer = _fit(config, dataset, source, record)
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


def _fit(config: SidConfig, dataset: Dataset, source: VectorSet, report: Report) -> Quantizer:
    logger.info("fitting %s on %s", _quantizer_name(config.quantizer), dataset.name)
    all_pairs = None
    if config.quantizer.pair_sources and dataset.artifact.exists("pairs"):
        pairs = dataset.pairs()
        all_pairs = TrainingPairs(pairs.anchor.astype(np.int64), pairs.positive.astype(np.int64))
    items = training_items(
        source.num_items, config.quantizer.max_train_vectors, all_pairs, seed=config.seed
    )
    vectors = source.take(items)
    quantizer = config.quantizer.build(source.dim, seed=config.seed)
    if torch.cuda.is_available():
        quantizer.to("cuda")
    rows = None if all_pairs is None else _pairs_within(all_pairs, items, source.num_items)
    named = {} if rows is None else {"co_occurrence": rows}
    quantizer.fit(TrainingSet(vectors, pairs=named), report=report)
    return quantizer.to("cpu")


def training_items(
    num_items: int, limit: int, pairs: TrainingPairs | None, *, seed: int
) -> Int64Array:
    """Choose the items to fit on: all, or a sample in which pairs keep both ends.

    Args:
        num_items: catalogue size N.
        limit: most items to choose.
        pairs: pairs of item indices, or None for a uniform sample.
        seed: fixes the draw.

    Returns:
        int64 [min(N, limit)] sorted item indices. With pairs, at most half of them are chosen as
        ends of random pairs, the rest uniformly.
    """
    if num_items <= limit:
        return np.arange(num_items, dtype=np.int64)
    rng = np.random.default_rng(seed)
    chosen = np.zeros(num_items, dtype=bool)
    if pairs is not None and len(pairs):
        # Each pair brings at most two items, so this many cannot exceed half of the limit.
        drawn = rng.choice(len(pairs), size=min(len(pairs), limit // 4), replace=False)
        chosen[pairs.anchor[drawn]] = True
        chosen[pairs.positive[drawn]] = True
    others = np.flatnonzero(~chosen)
    missing = limit - int(chosen.sum())
    chosen[rng.choice(others, size=missing, replace=False)] = True
    return np.flatnonzero(chosen)


def _pairs_within(pairs: TrainingPairs, items: Int64Array, num_items: int) -> TrainingPairs:
    """Pairs whose two ends are among the items, as rows of the sample."""
    row = np.full(num_items, -1, dtype=np.int64)
    row[items] = np.arange(len(items))
    anchor, positive = row[pairs.anchor], row[pairs.positive]
    kept = (anchor >= 0) & (positive >= 0)
    return TrainingPairs(anchor[kept], positive[kept])


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
