"""From vectors to a SID table, in two cached artifacts: the quantizer, and the resolved table.

The only module of `sid` that knows Ray beside `score`: fitting runs where it is called, encoding
runs as a Ray Data map over the vector shards. A Ray must be up when the catalogue is larger than
`encode.local_items`.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import from_mapping, to_mapping, to_overrides
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import VectorsConfig, VectorSet, open_vectors
from forge_ray.errors import ArtifactError, ConfigError, DataError
from forge_ray.sid.quantizers.base import (
    Int64Array,
    Quantizer,
    QuantizerConfig,
    Report,
    TrainingPairs,
    TrainingSet,
    ignore_report,
)
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.resolvers.base import BucketConfig, ResolverConfig, resolve
from forge_ray.sid.table import SidTable, code_dtype
from forge_ray.threads import set_threads

logger = logging.getLogger(__name__)

QUANTIZER_KIND = "quantizer"
SIDS_KIND = "sids"
_STATE = "quantizer.safetensors"
_FACTS = "quantizer.json"


@dataclass(kw_only=True)
class EncodeConfig:
    """How encoding is spread over the cluster; none of it changes a code."""

    local_items: int = 50_000
    """Catalogues up to this size are encoded in the calling process: actors take longer to start.
    """
    max_actors: int = 64
    """Most encoder actors; the cluster's free CPUs bound it as well."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    batch_rows: int = 16_384
    """Vectors an actor reads and encodes at once."""


@dataclass(kw_only=True)
class SidConfig:
    """Everything that decides a SID table, and how to spread the work."""

    quantizer: QuantizerConfig = field(default_factory=RqKmeansConfig)
    resolver: ResolverConfig = field(default_factory=BucketConfig)
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    seed: int = 0
    """The only seed of fitting: initial weights, k-means starts, samples and batches."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)

    def __post_init__(self) -> None:
        """Check the seed."""
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}. Use another seed.")


@dataclass(frozen=True)
class SidArtifact:
    """A resolved SID table with its lineage."""

    table: SidTable
    """Codes after collision resolution; what generators are trained on."""
    raw: SidTable
    """Codes as the quantizer gave them; what usage is measured on."""
    artifact: Artifact
    """Kind `sids`."""
    quantizer_artifact: Artifact
    """Kind `quantizer`."""

    @property
    def key(self) -> str:
        """Content key of the resolved table."""
        return self.artifact.key

    @property
    def config(self) -> SidConfig:
        """The configuration that both artifacts were built from."""
        return from_mapping(SidConfig, self.artifact.manifest.config)

    def load_quantizer(self) -> Quantizer:
        """Load the fitted quantizer."""
        return load_quantizer(self.quantizer_artifact)


def fit_sids(
    config: SidConfig, dataset: Dataset, store: ArtifactStore, *, report: Report = ignore_report
) -> SidArtifact:
    """Fit, encode and resolve; whatever exists already is opened instead.

    Args:
        config: quantizer, vectors, resolver and seed.
        dataset: the prepared dataset.
        store: where both artifacts go.
        report: called while the quantizer trains; not called when it is already there.

    Raises:
        ConfigError: when codebooks are larger than the training set.
        DataError: when the dataset lacks vectors or pairs that the configuration needs.
        TrainingError: when training diverges.
    """
    identity = _identity(config)
    source = open_vectors(config.vectors, dataset, store)
    command = _command(dataset, config)
    quantizer_artifact = store.build(
        QUANTIZER_KIND,
        _quantizer_name(config.quantizer),
        {name: identity[name] for name in ("quantizer", "vectors", "seed")},
        parents=tuple(dict.fromkeys((dataset.key, source.key))),
        produce=lambda writer: _produce_quantizer(config, dataset, source, writer, report),
        command=command,
    )
    artifact = store.build(
        SIDS_KIND,
        f"{_quantizer_name(config.quantizer)}-{config.resolver.kind}",
        identity,
        parents=(quantizer_artifact.key, dataset.key),
        produce=lambda writer: _produce_sids(config, dataset, source, quantizer_artifact, writer),
        command=command,
    )
    return _opened(artifact, quantizer_artifact)


def open_sids(store: ArtifactStore, ref: str) -> SidArtifact:
    """Open a stored SID table.

    Args:
        store: the store that holds the table and its quantizer.
        ref: directory, `sids/name-key12`, name or key prefix.

    Raises:
        ArtifactError: when `ref` names no SID table, or its quantizer is gone.
    """
    artifact = store.open(ref, kind=SIDS_KIND)
    if artifact.manifest.kind != SIDS_KIND:
        raise ArtifactError(
            f"{ref} must be an artifact of kind {SIDS_KIND!r}, got {artifact.manifest.kind!r}. "
            f"List them with `forge-ray artifacts ls {SIDS_KIND}`."
        )
    parent = artifact.manifest.parents[0]
    quantizer = store.find(QUANTIZER_KIND, parent)
    if quantizer is None:
        raise ArtifactError(
            f"{artifact.uri} must have its quantizer {parent[:12]} in {store.uri}, got none. "
            f"Rebuild it: {artifact.manifest.command}"
        )
    return _opened(artifact, quantizer)


def load_quantizer(artifact: Artifact) -> Quantizer:
    """Load a fitted quantizer from an artifact of kind `quantizer`; needs no configuration file."""
    facts = json.loads(artifact.local(_FACTS).read_text())
    return _restore(facts, artifact.local(_STATE).read_bytes())


def _restore(facts: Mapping[str, Any], state: bytes) -> Quantizer:
    schema = QuantizerConfig.choices()[facts["quantizer"]["kind"]]
    config = cast(QuantizerConfig, from_mapping(schema, facts["quantizer"]))
    quantizer = config.build(facts["input_dim"], seed=facts["seed"])
    quantizer.load_state_dict(load_tensors(state))
    return quantizer


def _opened(artifact: Artifact, quantizer_artifact: Artifact) -> SidArtifact:
    return SidArtifact(
        SidTable.open(artifact), SidTable.open(quantizer_artifact), artifact, quantizer_artifact
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
    fitted = time.monotonic()
    state = save_tensors(quantizer.state_dict())
    facts = {
        "quantizer": to_mapping(config.quantizer),
        "input_dim": source.dim,
        "seed": config.seed,
    }
    codes = _encode(_restore(facts, state), facts, state, source, config.encode)
    encoded = time.monotonic()
    table = SidTable.from_codes(codes, quantizer.codebook_sizes, parent=source.key)
    table.save(writer)
    with writer.open(_STATE) as stream:
        stream.write(state)
    with writer.open(_FACTS) as stream:
        stream.write(json.dumps(facts, indent=2).encode())
    metrics = {
        "seconds_fit": round(fitted - started, 3),
        "seconds_encode": round(encoded - fitted, 3),
        "loss_curve": curve,
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
    writer: ArtifactWriter,
) -> ArtifactInfo:
    started = time.monotonic()
    raw = SidTable.open(quantizer_artifact)
    quantizer = load_quantizer(quantizer_artifact)
    wanted = int(getattr(config.resolver, "candidates", 0)) + 1

    def candidates(rows: Int64Array) -> Int64Array:
        return quantizer.last_level_candidates(source.take(rows), wanted)

    resolution = resolve(
        config.resolver,
        raw.codes.astype(np.int64),
        raw.codebook_sizes,
        item_ids=dataset.item_ids(),
        candidates=candidates,
    )
    table = SidTable.from_codes(
        resolution.codes,
        resolution.codebook_sizes,
        resolver=config.resolver.kind,
        parent=quantizer_artifact.key,
    )
    table.save(writer)
    metrics = {**resolution.report, "seconds_resolve": round(time.monotonic() - started, 3)}
    return ArtifactInfo(rows={"items": table.num_items}, metrics=metrics)


def _encode(
    quantizer: Quantizer,
    facts: Mapping[str, Any],
    state: bytes,
    source: VectorSet,
    config: EncodeConfig,
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Codes of every item [N, L], complete and in index order."""
    shape = (source.num_items, quantizer.num_levels)
    codes = np.zeros(shape, dtype=code_dtype(quantizer.codebook_sizes))
    seen = np.zeros(source.num_items, dtype=bool)
    is_local = source.num_items <= config.local_items
    batches = (
        ((batch.indices, quantizer.encode(batch.vectors)) for batch in source.batches())
        if is_local
        else _encode_on_ray(facts, state, source, config)
    )
    rows = 0
    for indices, batch_codes in batches:
        codes[indices] = batch_codes
        seen[indices] = True
        rows += len(indices)
    if rows != source.num_items or not seen.all():
        raise DataError(
            f"vectors must hold each of {source.num_items} items once, got {rows} rows and "
            f"{int((~seen).sum())} items without any. Run `forge-ray data validate`."
        )
    return codes


class _Encoder:
    """A Ray Data actor that reads vector shards and yields their codes."""

    quantizer: Quantizer

    def __init__(
        self, facts: Mapping[str, Any], state: bytes, source: VectorSet, config: EncodeConfig
    ) -> None:
        set_threads(config.cpus_per_actor)
        self.source = source
        self.batch_rows = config.batch_rows
        self.quantizer = _restore(facts, state)
        if torch.cuda.is_available():
            self.quantizer.to("cuda")

    def __call__(self, shard: dict[str, npt.NDArray[Any]]) -> Iterator[dict[str, Any]]:
        part = replace(self.source, files=tuple(str(path) for path in shard["path"]))
        for batch in part.batches(self.batch_rows):
            yield {"item_index": batch.indices, "codes": self.quantizer.encode(batch.vectors)}


def _encode_on_ray(
    facts: Mapping[str, Any], state: bytes, source: VectorSet, config: EncodeConfig
) -> Iterator[tuple[Int64Array, Int64Array]]:
    import ray.data

    # Actors read the shards themselves: with a reading step before them, one free CPU would hold
    # either the reader or the encoder, and each would wait for the other.
    # Ray Data schedules with SPREAD, which keeps its actors out of the placement group of a trial
    # that calls this: there, a one-CPU actor would wait for ever for the CPU the trial holds.
    shards = ray.data.from_items([{"path": path} for path in source.files])
    encoded = shards.map_batches(
        _Encoder,
        fn_constructor_args=(dict(facts), state, source, config),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(config.max_actors, len(source.files))
        ),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor or None,
    )
    for batch in encoded.iter_batches(batch_size=None, batch_format="numpy"):
        yield batch["item_index"], batch["codes"]
