"""Score a SID table on a dataset: every cheap metric a sweep gates and ranks on, in seconds.

Calls the pure cores on what `score_inputs` has read, and names the results. `docs/metrics.md`
defines them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter, timed
from forge_ray.config import to_mapping
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.backoff import (
    BackoffBits,
    ProbeData,
    backoff_bits,
    random_codes,
    shuffled_codes,
)
from forge_ray.sid.metrics.hitrate import HitrateReport, refit_vectors
from forge_ray.sid.metrics.inputs import (
    KIND,
    HitrateRows,
    ScoreConfig,
    ScoreInputs,
    Scores,
    ScoreSplit,
    load_inputs,
    none_if_nan,
)
from forge_ray.sid.metrics.quality import prefix_ids, symbol_quality
from forge_ray.sid.table import SidTable

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.base import Quantizer
    from forge_ray.sid.storage import SidArtifact

__all__ = [
    "ScoreConfig",
    "ScoreInputs",
    "ScoreSplit",
    "Scores",
    "load_inputs",
    "score_sids",
    "score_table",
]


_TABLE_FIGURES = (
    "num_items",
    "num_sids",
    "uniqueness",
    "coverage",
    "gini",
    "colliding_items",
    "max_bucket",
    "mean_bucket",
    "max_group",
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
    scores: Scores = {"split": inputs.split}
    with timed(scores, "quality_seconds"):
        scores |= _quality(table, table if raw is None else raw)
    with timed(scores, "backoff_seconds"):
        scores |= _backoff(table, inputs.probe, config)
    with timed(scores, "hitrate_seconds"):
        scores |= _hitrates(table, inputs, quantizer, config)
    return {name: none_if_nan(value) for name, value in scores.items()}


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
    from forge_ray.sid.storage import load_quantizer  # torch: only where SIDs are ours

    return load_quantizer(sids.quantizer_artifact)


def _quality(table: SidTable, raw: SidTable) -> Scores:
    final = symbol_quality(np.asarray(table.codes), table.codebook_sizes).to_metrics()
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
        report = rows.measure(refit, config)
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
    report = rows.measure(decoded[sid], config)
    scores["embedding_hitrate_decoded"] = report.hitrate
    # Quantizers without an encoder sum codewords in the input space: one search serves both.
    is_same = decoded.shape == summed.shape and np.array_equal(decoded, summed)
    codes_report = report if is_same else rows.measure(summed[sid], config)
    scores["embedding_hitrate_codes"] = codes_report.hitrate
    return report
