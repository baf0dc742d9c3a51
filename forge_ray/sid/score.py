"""Score a SID table on a dataset: every cheap metric a sweep gates and ranks on, in seconds.

Reads what the metrics need from a dataset (bounded samples, stated in `ScoreConfig`), calls the
pure cores and names the results. As a sweep's proxy nothing here sees test events: transitions and
popularity come from the train part, embedding hitrate uses validation targets, and the probe's
mixture is fitted on one half of the validation users and scored on the other. The test form
(mixture on all validation users, scores on test) exists to compare with published tables only.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter, timed
from forge_ray.config import to_mapping
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import DEFAULT_SPACE, Dataset, SequenceBatch, VectorBatch
from forge_ray.errors import ConfigError
from forge_ray.sid.backoff import (
    BackoffBits,
    ProbeData,
    ProbeRows,
    backoff_bits,
    count_transitions,
    merge_transitions,
    probe_rows,
    random_codes,
    shuffled_codes,
)
from forge_ray.sid.hitrate import HitrateReport, embedding_hitrate, refit_vectors
from forge_ray.sid.quality import PrefixIds, prefix_ids, symbol_quality
from forge_ray.sid.table import SidTable

if TYPE_CHECKING:
    from forge_ray.sid.fit import SidArtifact
    from forge_ray.sid.quantizer import Quantizer

logger = logging.getLogger(__name__)

KIND = "scores"
ScoreSplit = Literal["validation", "test"]
Scores = dict[str, Any]
"""Metric name → number, or text where a number needs its variant named; None where undefined."""

_TABLE_FIGURES = (
    "num_items",
    "num_sids",
    "uniqueness",
    "gini",
    "colliding_items",
    "max_bucket",
    "mean_bucket",
    "max_group",
)


@dataclass(kw_only=True)
class ScoreConfig:
    """How much is read and how the behavioural metrics are computed."""

    space: str | None = None
    """Vector space of the dataset for embedding hitrate; by default the one the SIDs were fitted
    on, and `default` for tables made elsewhere."""
    max_users: int = 50_000
    """Held-out users read for the probe; their standard error is about 0.01 bits at 20,000."""
    max_train_users: int = 200_000
    """Train users whose transitions are counted; about 120 bytes for each of their interactions."""
    hitrate_users: int = 5_000
    """Held-out users read for embedding hitrate, about as many as FORGE's lists."""
    hitrate_k: int = 30
    """Neighbours of each history item, as published."""
    hitrate_history: int = 50
    """Newest history items that search."""
    hitrate_gallery: int = 200_000
    """Most items searched; of larger catalogues the items of the scored lists and a seeded sample
    of the rest (FORGE: about 500,000). Memory 4 bytes for each of D numbers."""
    hitrate_exact_limit: int = 200_000
    """Distinct vectors up to which the search is exact, HNSW beyond."""
    probe_history: int = 5
    """Newest history items the probe conditions on."""
    probe_window: int = 3
    """Largest distance of a counted transition."""
    probe_decay: float = 0.6
    """Weight of one more step, of distance in transitions and of age in histories."""
    probe_steps: int = 60
    """EM steps for the probe's mixture."""
    tail_max_count: int = 5
    """Train interactions up to which a target belongs to the tail."""
    seed: int = 0
    """Fixes the gallery sample, the halves of the validation users and the shuffled control."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in (
            "max_users",
            "max_train_users",
            "hitrate_users",
            "hitrate_k",
            "hitrate_history",
            "hitrate_gallery",
            "probe_history",
            "probe_window",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"score.{name} must be >= 1, got {value}. Raise it.")


@dataclass(frozen=True, eq=False)
class HitrateRows:
    """Held-out lists for embedding hitrate, one row per target."""

    histories: Ragged
    targets: npt.NDArray[np.int64]
    row_weight: npt.NDArray[np.float64]
    gallery: VectorBatch


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """What all tables of a dataset are scored on; load once, score many."""

    split: ScoreSplit
    probe: ProbeData
    hitrate: HitrateRows | None
    """None for a dataset without the vector space."""
    ceiling: Scores
    """Embedding hitrate of the raw vectors, the same for every table."""


def load_inputs(
    dataset: Dataset,
    *,
    split: ScoreSplit = "validation",
    config: ScoreConfig | None = None,
    store: ArtifactStore | None = None,
) -> ScoreInputs:
    """Read transitions, held-out users and the gallery, within the limits of the configuration.

    Args:
        dataset: a prepared dataset.
        split: `validation` for proxies, `test` for comparing with published tables.
        config: limits and constants.
        store: keeps the raw vectors' hitrate, which is the same for every table; recomputed
            without one.
    """
    config = ScoreConfig() if config is None else config
    if split not in ("validation", "test"):
        raise ConfigError(f"split must be validation or test, got {split!r}. Name one of them.")
    held_out = _read_users(dataset, split, max(config.max_users, config.hitrate_users))
    hitrate = _hitrate_rows(dataset, held_out, config)
    return ScoreInputs(
        split=split,
        probe=_probe_data(dataset, held_out, split, config),
        hitrate=hitrate,
        ceiling={} if hitrate is None else _ceiling(dataset, hitrate, split, config, store),
    )


def score_table(
    table: SidTable,
    dataset: Dataset,
    *,
    split: ScoreSplit = "validation",
    raw: SidTable | None = None,
    quantizer: Quantizer | None = None,
    config: ScoreConfig | None = None,
    inputs: ScoreInputs | None = None,
) -> Scores:
    """Compute every score of one table.

    Args:
        table: the table as it would be used.
        dataset: the dataset whose items it codes.
        split: `validation` for proxies, `test` for comparing with published tables.
        raw: the table before collision resolution; per-level usage and prefixes are measured on
            it, because a resolver can hide a dead level. Default: `table`.
        quantizer: decodes SIDs for embedding hitrate. Without one the codewords are refitted on
            the dataset's vectors, and `embedding_hitrate_variant` says so.
        config: limits and constants.
        inputs: `load_inputs(...)` when several tables are scored.

    Returns:
        See `docs/metrics.md`. `embedding_hitrate` is that of `embedding_hitrate_variant`
        (`decoded` or `refit`), None without vectors.
    """
    config = ScoreConfig() if config is None else config
    if inputs is None:
        inputs = load_inputs(dataset, split=split, config=config)
    if table.num_items != dataset.num_items:
        raise ConfigError(
            f"table must code the dataset's {dataset.num_items} items, got {table.num_items}. "
            "Score the table on the dataset it was fitted on."
        )
    codes = np.asarray(table.codes)
    scores: Scores = {"split": inputs.split}
    with timed(scores, "quality_seconds"):
        scores |= _quality(table, table if raw is None else raw, prefix_ids(codes))
    with timed(scores, "backoff_seconds"):
        scores |= _backoff(table, inputs.probe, config)
    with timed(scores, "hitrate_seconds"):
        scores |= _hitrates(table, inputs, quantizer, config)
    return {name: _plain(value) for name, value in scores.items()}


def score_sids(
    sids: SidArtifact,
    dataset: Dataset,
    store: ArtifactStore,
    config: ScoreConfig | None = None,
    *,
    split: ScoreSplit = "validation",
) -> Scores:
    """Score a fitted SID artifact, computed once: cached as an artifact of kind `scores`.

    Args:
        sids: what `fit_sids` returned.
        dataset: the dataset it was fitted on.
        store: where the scores are kept.
        config: limits and constants.
        split: `validation` for proxies; `test` is for reports after selection.

    Returns:
        As `score_table`, with `seconds`, the time that computing them took.
    """
    config = ScoreConfig() if config is None else config
    if config.space is None:
        config = replace(config, space=sids.config.vectors.space)

    def produce(_: ArtifactWriter) -> ArtifactInfo:
        scores: Scores = {}
        with timed(scores, "seconds"):
            scores |= score_table(
                sids.table,
                dataset,
                raw=sids.raw,
                quantizer=_quantizer(sids),
                config=config,
                inputs=load_inputs(dataset, split=split, config=config, store=store),
            )
        return ArtifactInfo(metrics=scores)

    artifact = store.build(
        KIND,
        sids.artifact.manifest.name,
        {"score": to_mapping(config), "split": split},
        parents=(sids.artifact.key, dataset.key),
        produce=produce,
        command=f"forge-ray sid score {sids.artifact.manifest.ref}",
    )
    return dict(artifact.manifest.metrics)


def _quantizer(sids: SidArtifact) -> Quantizer:
    from forge_ray.sid.fit import load_quantizer  # Ray and torch: only where SIDs are ours

    return load_quantizer(sids.quantizer_artifact)


# ---- reading ----


def _read_users(dataset: Dataset, split: ScoreSplit, limit: int) -> SequenceBatch:
    parts = list(dataset.sequence_batches(split, limit=limit))
    if not parts:
        raise ConfigError(
            f"dataset must have {split} users to be scored, got none in {dataset.name!r}. "
            "Prepare it with a split that holds users out."
        )
    return SequenceBatch(
        np.concatenate([part.user_index for part in parts]),
        Ragged.concatenate([part.items for part in parts]),
        Ragged.concatenate([part.targets for part in parts if part.targets is not None]),
    )


def _probe_data(
    dataset: Dataset, held_out: SequenceBatch, split: ScoreSplit, config: ScoreConfig
) -> ProbeData:
    parts = [
        count_transitions(
            batch.items, dataset.num_items, window=config.probe_window, decay=config.probe_decay
        )
        for batch in dataset.sequence_batches("train", limit=config.max_train_users)
    ]
    rows = _probe_rows(held_out, config)
    if split == "test":
        validation = _read_users(dataset, "validation", config.max_users)
        fit, score = _probe_rows(validation, config), rows
    else:
        is_fit = _first_half(held_out, config)
        fit, score = rows.take(is_fit), rows.take(~is_fit)
    return ProbeData(
        transitions=merge_transitions(parts, dataset.num_items),
        train_counts=dataset.train_counts(),
        fit=fit,
        score=score,
    )


def _probe_rows(users: SequenceBatch, config: ScoreConfig) -> ProbeRows:
    users = _first_users(users, config.max_users)
    assert users.targets is not None
    return probe_rows(
        users.items, users.targets, length=config.probe_history, decay=config.probe_decay
    )


def _first_users(users: SequenceBatch, limit: int) -> SequenceBatch:
    if len(users) <= limit:
        return users
    assert users.targets is not None
    kept = np.arange(limit)
    return SequenceBatch(users.user_index[kept], users.items.take(kept), users.targets.take(kept))


def _first_half(users: SequenceBatch, config: ScoreConfig) -> npt.NDArray[np.bool_]:
    """Targets whose user falls into the half that fits the mixture; a user is never in both."""
    users = _first_users(users, config.max_users)
    assert users.targets is not None
    shuffled = np.random.default_rng(config.seed).permutation(len(users))
    is_fit = np.zeros(len(users), dtype=bool)
    is_fit[shuffled[: (len(users) + 1) // 2]] = True
    return is_fit[users.targets.row_ids]


def _hitrate_rows(
    dataset: Dataset, users: SequenceBatch, config: ScoreConfig
) -> HitrateRows | None:
    space = config.space or DEFAULT_SPACE
    if space not in dataset.spaces:
        logger.warning(
            "dataset %s has no vector space %r: embedding hitrate is not computed",
            dataset.name,
            space,
        )
        return None
    users = _first_users(users, config.hitrate_users)
    assert users.targets is not None
    targets = users.targets
    histories = users.items.tail(config.hitrate_history)
    listed = np.union1d(histories.values, targets.values)
    return HitrateRows(
        histories=histories.take(targets.row_ids),
        targets=targets.values.astype(np.int64),
        row_weight=1.0 / np.repeat(targets.lengths, targets.lengths),
        gallery=_gallery(dataset, listed, space, config),
    )


def _gallery(
    dataset: Dataset, listed: npt.NDArray[np.integer[Any]], space: str, config: ScoreConfig
) -> VectorBatch:
    """Vectors of the searched items, in index order; 9 bytes per catalogue item beside them.

    A uniform sample of a large catalogue would miss nearly every target, so the listed items come
    first and the sample fills the rest.
    """
    rng = np.random.default_rng(config.seed)
    limit = min(config.hitrate_gallery, dataset.num_items)
    is_chosen = np.zeros(dataset.num_items, dtype=bool)
    is_chosen[_draw(listed, limit, rng)] = True
    is_chosen[_draw(np.flatnonzero(~is_chosen), limit - int(is_chosen.sum()), rng)] = True
    indices = np.flatnonzero(is_chosen)
    vectors = np.empty((limit, dataset.vector_dim(space)), dtype=np.float32)
    for batch in dataset.vector_batches(space=space):
        kept = is_chosen[batch.indices]
        vectors[np.searchsorted(indices, batch.indices[kept])] = batch.vectors[kept]
    return VectorBatch(indices, vectors)


def _draw(
    items: npt.NDArray[np.integer[Any]], limit: int, rng: np.random.Generator
) -> npt.NDArray[np.integer[Any]]:
    if len(items) <= limit:
        return items
    return items[rng.choice(len(items), size=limit, replace=False, shuffle=False)]


def _ceiling(
    dataset: Dataset,
    rows: HitrateRows,
    split: ScoreSplit,
    config: ScoreConfig,
    store: ArtifactStore | None,
) -> Scores:
    def measure() -> Scores:
        report = _measure(rows.gallery.vectors, rows, config)
        return {
            "embedding_hitrate_raw": _plain(report.hitrate),
            "embedding_hitrate_k": config.hitrate_k,
            "embedding_hitrate_rows": report.num_rows,
            "embedding_hitrate_gallery": report.gallery_size,
        }

    if store is None:
        return measure()
    parts = {
        name: value
        for name, value in to_mapping(config).items()
        if name.startswith("hitrate_") or name in ("space", "seed")
    }
    artifact = store.build(
        KIND,
        f"{dataset.name}-ceiling",
        {"ceiling": parts, "split": split},
        parents=(dataset.key,),
        produce=lambda _: ArtifactInfo(metrics=measure()),
    )
    return dict(artifact.manifest.metrics)


# ---- metrics ----


def _quality(table: SidTable, raw: SidTable, prefixes: PrefixIds) -> Scores:
    final = symbol_quality(table.codes, table.codebook_sizes, prefixes=prefixes).to_metrics()
    before = final
    if raw is not table:
        before = symbol_quality(np.asarray(raw.codes), raw.codebook_sizes).to_metrics()
    scores: Scores = {name: final[name] for name in _TABLE_FIGURES}
    for name, value in before.items():
        # Levels are those of the raw table; a resolver's extra level says nothing about training.
        scores[f"raw_{name}" if name in _TABLE_FIGURES else name] = value
    usages = [value for name, value in before.items() if name.startswith("usage_level_")]
    scores["usage_min"] = min(usages)
    scores["num_levels"] = table.num_levels
    scores["sid_bits"] = float(np.log2(np.asarray(table.codebook_sizes, dtype=np.float64)).sum())
    return scores


def _backoff(table: SidTable, probe: ProbeData, config: ScoreConfig) -> Scores:
    codes = np.asarray(table.codes)

    def run(candidate: npt.NDArray[np.integer[Any]]) -> BackoffBits:
        return backoff_bits(
            candidate, probe, em_steps=config.probe_steps, tail_max_count=config.tail_max_count
        )

    own = run(codes)
    shuffled = run(shuffled_codes(codes, seed=config.seed))
    drawn = run(random_codes(codes, table.codebook_sizes, seed=config.seed))
    paired = own.per_target - shuffled.per_target
    mixture = {f"backoff_mixture_{depth}": value for depth, value in enumerate(own.mixture)}
    return {
        "backoff_bits": own.bits,
        "backoff_bits_se": own.standard_error,
        "backoff_bits_tail": own.tail,
        "backoff_bits_head": own.head,
        "backoff_bits_shuffled": shuffled.bits,
        "backoff_bits_random": drawn.bits,
        "backoff_gain": shuffled.bits - own.bits,
        "backoff_gain_se": float(paired.std() / math.sqrt(max(len(paired), 1))),
        "backoff_users": len(paired),
        **mixture,
    }


def _hitrates(
    table: SidTable, inputs: ScoreInputs, quantizer: Quantizer | None, config: ScoreConfig
) -> Scores:
    rows = inputs.hitrate
    scores: Scores = {
        "embedding_hitrate": None,
        "embedding_hitrate_variant": "none",
        "embedding_hitrate_raw": None,
        "embedding_hitrate_decoded": None,
        "embedding_hitrate_codes": None,
        "embedding_hitrate_refit": None,
        **inputs.ceiling,
    }
    if rows is None:
        return scores
    codes = np.asarray(table.codes[rows.gallery.indices])
    if quantizer is None:
        refit = refit_vectors(codes, table.codebook_sizes, rows.gallery.vectors)
        report = _measure(refit, rows, config)
        scores["embedding_hitrate_variant"] = "refit"
        scores["embedding_hitrate_refit"] = report.hitrate
    else:
        report = _decoded(codes[:, : quantizer.num_levels], rows, quantizer, scores, config)
        scores["embedding_hitrate_variant"] = "decoded"
    scores["embedding_hitrate"] = report.hitrate
    scores["embedding_hitrate_se"] = report.standard_error
    scores["embedding_hitrate_method"] = report.method
    return scores


def _decoded(
    codes: npt.NDArray[np.integer[Any]],
    rows: HitrateRows,
    quantizer: Quantizer,
    scores: Scores,
    config: ScoreConfig,
) -> HitrateReport:
    """Hitrate of decoded vectors and of codeword sums; each distinct SID is decoded once."""
    sid = prefix_ids(codes).ids[-1]
    _, first = np.unique(sid, return_index=True)
    decoded = quantizer.decode(codes[first])
    summed = quantizer.codeword_sum(codes[first])
    report = _measure(decoded[sid], rows, config)
    scores["embedding_hitrate_decoded"] = report.hitrate
    # Quantizers without an encoder sum codewords in the input space: one search serves both.
    is_same = decoded.shape == summed.shape and np.array_equal(decoded, summed)
    codes_report = report if is_same else _measure(summed[sid], rows, config)
    scores["embedding_hitrate_codes"] = codes_report.hitrate
    return report


def _measure(
    vectors: npt.NDArray[np.floating[Any]], rows: HitrateRows, config: ScoreConfig
) -> HitrateReport:
    return embedding_hitrate(
        vectors,
        rows.histories,
        rows.targets,
        items=rows.gallery.indices,
        k=config.hitrate_k,
        exact_limit=config.hitrate_exact_limit,
        row_weight=rows.row_weight,
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN: an undefined metric is None."""
    return None if isinstance(value, float) and math.isnan(value) else value
