"""Score a SID table on a dataset: every cheap metric a sweep gates and ranks on, in seconds.

Calls the pure cores on what `score_inputs` has read, and names the results. `docs/metrics.md`
defines them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter, timed
from forge_ray.config import to_mapping
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import open_vectors
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.backoff import (
    BackoffBits,
    ProbeData,
    backoff_bits,
    random_codes,
    shuffled_codes,
)
from forge_ray.sid.metrics.config import ScoreConfig
from forge_ray.sid.metrics.gallery import DecodedGallery, restore
from forge_ray.sid.metrics.hitrate import HitrateReport, refit_depths
from forge_ray.sid.metrics.inputs import (
    KIND,
    HitrateRows,
    ScoreInputs,
    Scores,
    ScoreSplit,
    load_inputs,
    none_if_nan,
)
from forge_ray.sid.metrics.neighbours import ArrayGallery
from forge_ray.sid.metrics.parallel_data import ParallelData
from forge_ray.sid.metrics.quality import PrefixIds, prefix_ids, symbol_quality
from forge_ray.sid.metrics.similarity import code_cosines, explained_share, order_agreement
from forge_ray.sid.metrics.transitions import lcp_report
from forge_ray.sid.table import SidTable

if TYPE_CHECKING:
    from forge_ray.sid.quantizers.base import Quantizer
    from forge_ray.sid.storage import SidArtifact

__all__ = [
    "Control",
    "ScoreConfig",
    "ScoreInputs",
    "ScoreSplit",
    "Scores",
    "control_table",
    "load_inputs",
    "score_sids",
    "score_table",
]


Control = Literal["shuffled", "random"]
"""Tables without meaning: the rows of a table permuted, or random SIDs with its bucket sizes."""

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
    fitted: npt.NDArray[np.float32] | None = None,
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
        fitted: vectors [n, D] of the items in `inputs.sample` as the quantizer reads them, for
            reconstruction; by default those of the sample itself, if they have its width.
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
        prefixes = prefix_ids(np.asarray(table.codes))
        scores |= _backoff(table, inputs.probe, config, prefixes)
        scores |= _transitions(table, inputs, prefixes)
        del prefixes
    with timed(scores, "similarity_seconds"):
        scores |= _similarity(table, inputs, quantizer, fitted, config)
    with timed(scores, "hitrate_seconds"):
        scores |= _hitrates(table, inputs, quantizer, config)
    if inputs.parallel is not None:
        with timed(scores, "parallel_seconds"):
            scores |= _parallel(table, inputs.parallel, config)
    return {name: none_if_nan(value) for name, value in scores.items()}


def score_sids(
    sids: SidArtifact,
    dataset: Dataset,
    store: ArtifactStore,
    config: ScoreConfig | None = None,
    *,
    split: ScoreSplit = "validation",
    control: Control | None = None,
) -> Artifact:
    """Score a fitted SID artifact, computed once: an artifact of kind `scores`.

    Args:
        sids: what `fit_sids` returned.
        dataset: the dataset it was fitted on.
        store: where the scores are kept.
        config: limits and constants.
        split: `validation` for proxies; `test` is for reports after selection.
        control: score this control of the table instead.

    Returns:
        Its metrics are those of `score_table`, with `seconds`, the time that computing them took;
        `is_new` tells whether that was now.
    """
    config = ScoreConfig() if config is None else config
    if config.space is None:
        config = replace(config, space=sids.config.vectors.space)

    def produce(_: ArtifactWriter) -> ArtifactInfo:
        scores: Scores = {}
        with timed(scores, "seconds"):
            inputs = load_inputs(dataset, split=split, config=config, store=store)
            scores |= score_table(
                sids.table
                if control is None
                else control_table(sids.table, control, seed=config.seed),
                dataset,
                raw=sids.raw if control is None else None,
                quantizer=_quantizer(sids),
                fitted=_fitted(sids, dataset, store, inputs),
                config=config,
                inputs=inputs,
            )
        return ArtifactInfo(metrics=scores)

    return store.build(
        KIND,
        sids.artifact.manifest.name,
        {"score": to_mapping(config), "split": split, **({"control": control} if control else {})},
        parents=(sids.artifact.key, dataset.key),
        produce=produce,
        command=f"forge-ray sid score {sids.artifact.manifest.ref}",
    )


def control_table(table: SidTable, control: Control, *, seed: int = 0) -> SidTable:
    """Make the control of a table: the same shape and bucket sizes, no meaning.

    Args:
        table: the table to be controlled for.
        control: which one.
        seed: fixes the permutation or the draw.
    """
    codes = np.asarray(table.codes)
    if control == "shuffled":
        made = shuffled_codes(codes, seed=seed)
    else:
        made = random_codes(codes, table.codebook_sizes, seed=seed)
    return SidTable.from_codes(made, table.codebook_sizes, resolver=control, parent=table.key)


def _quantizer(sids: SidArtifact) -> Quantizer:
    from forge_ray.sid.storage import load_quantizer  # torch: only where SIDs are ours

    return load_quantizer(sids.quantizer_artifact)


def _fitted(
    sids: SidArtifact, dataset: Dataset, store: ArtifactStore, inputs: ScoreInputs
) -> npt.NDArray[np.float32] | None:
    """Vectors of the sample as the quantizer reads them; None without a sample."""
    if inputs.sample is None:
        return None
    return open_vectors(sids.config.vectors, dataset, store).take(inputs.sample.indices)


def _quality(table: SidTable, raw: SidTable) -> Scores:
    final = symbol_quality(np.asarray(table.codes), table.codebook_sizes).to_metrics()
    before = final
    if raw is not table:
        before = symbol_quality(np.asarray(raw.codes), raw.codebook_sizes).to_metrics()
    scores: Scores = {name: final[name] for name in _TABLE_FIGURES}
    for name, value in before.items():
        # Levels are those of the raw table; a resolver's extra level says nothing about training.
        scores[f"raw_{name}" if name in _TABLE_FIGURES else name] = value
    for figure in ("usage", "entropy"):
        levels = [value for name, value in before.items() if name.startswith(f"{figure}_level_")]
        scores[f"{figure}_min"] = min(levels)
    scores["num_levels"] = table.num_levels
    scores["sid_bits"] = float(np.log2(np.asarray(table.codebook_sizes, dtype=np.float64)).sum())
    return scores


def _backoff(table: SidTable, probe: ProbeData, config: ScoreConfig, prefixes: PrefixIds) -> Scores:
    codes = np.asarray(table.codes)

    def run(candidate: npt.NDArray[np.integer[Any]], known: PrefixIds | None = None) -> BackoffBits:
        return backoff_bits(
            candidate,
            probe,
            em_steps=config.probe_steps,
            tail_max_count=config.tail_max_count,
            prefixes=known,
        )

    own = run(codes, prefixes)
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


def _transitions(table: SidTable, inputs: ScoreInputs, prefixes: PrefixIds) -> Scores:
    codes = np.asarray(table.codes)
    found = lcp_report(codes, inputs.transitions, inputs.probe.train_counts, prefixes=prefixes)
    return {
        "lcp_ratio": found.ratio,
        "lcp_held_out": found.held_out,
        "lcp_held_out_se": found.standard_error,
        "lcp_random": found.random,
        "lcp_transitions": found.num_transitions,
        "code_overlap": found.overlap,
    }


def _similarity(
    table: SidTable,
    inputs: ScoreInputs,
    quantizer: Quantizer | None,
    fitted: npt.NDArray[np.float32] | None,
    config: ScoreConfig,
) -> Scores:
    sample = inputs.sample
    scores: Scores = {"reconstruction_r2": None, "order_agreement": None, "code_cosine_any": None}
    if sample is None:
        return scores
    codes = np.asarray(table.codes[sample.indices])
    order = order_agreement(codes, sample.vectors, triplets=config.order_triplets, seed=config.seed)
    cosines = code_cosines(codes, sample.vectors)
    scores["order_agreement"] = order.agreement
    scores["order_agreement_se"] = order.standard_error
    scores["code_cosine_any"] = cosines.any
    for level, value in enumerate(cosines.levels, start=1):
        scores[f"code_cosine_level_{level}"] = value
    vectors = sample.vectors if fitted is None else fitted
    if quantizer is None:
        restored = refit_depths(codes, table.codebook_sizes, vectors)
    elif vectors.shape[1] == quantizer.input_dim:
        depths = range(1, min(quantizer.num_levels, codes.shape[1]) + 1)
        restored = (restore(quantizer, codes[:, :depth]) for depth in depths)
    else:
        return scores  # fitted on vectors of another space, which the caller does not have
    for depth, part in enumerate(restored, start=1):
        scores[f"reconstruction_r2_{depth}"] = explained_share(vectors, part)
        scores["reconstruction_r2"] = scores[f"reconstruction_r2_{depth}"]
    return scores


def _hitrates(
    table: SidTable, inputs: ScoreInputs, quantizer: Quantizer | None, config: ScoreConfig
) -> Scores:
    rows = inputs.hitrate
    scores: Scores = {
        "embedding_hitrate": None,
        "embedding_hitrate_variant": "none",
        "embedding_hitrate_raw": None,
        "embedding_hitrate_gap": None,
        "embedding_hitrate_decoded": None,
        "embedding_hitrate_codes": None,
        "embedding_hitrate_refit": None,
        **inputs.ceiling,
    }
    if rows is None:
        return scores
    codes = np.asarray(table.codes[rows.items])
    if quantizer is None:
        report = _refit_hitrates(codes, table.codebook_sizes, rows, scores, config)
    else:
        depth = min(quantizer.num_levels, codes.shape[1])
        report = _decoded_hitrates(codes[:, :depth], rows, quantizer, scores, config)
    scores["embedding_hitrate"] = report.hitrate
    scores["embedding_hitrate_gap"] = scores["embedding_hitrate_raw"] - report.hitrate
    scores["embedding_hitrate_se"] = report.standard_error
    scores["embedding_hitrate_method"] = report.method
    return scores


def _refit_hitrates(
    codes: npt.NDArray[np.integer[Any]],
    sizes: Sequence[int],
    rows: HitrateRows,
    scores: Scores,
    config: ScoreConfig,
) -> HitrateReport:
    depths = list(refit_depths(codes, sizes, rows.raw_vectors()))
    reports = [rows.measure(ArrayGallery(rows.items, part), config) for part in depths]
    _add_prefixes(scores, reports[:-1])
    scores["embedding_hitrate_variant"] = "refit"
    scores["embedding_hitrate_refit"] = reports[-1].hitrate
    return reports[-1]


def _decoded_hitrates(
    codes: npt.NDArray[np.integer[Any]],
    rows: HitrateRows,
    quantizer: Quantizer,
    scores: Scores,
    config: ScoreConfig,
) -> HitrateReport:
    def gallery(depth: int, output: Literal["decoded", "codes"]) -> DecodedGallery:
        part = codes[:, :depth]
        return DecodedGallery(rows.items, part, quantizer, output, config.hitrate_shard)

    levels = codes.shape[1]
    report = rows.measure(gallery(levels, "decoded"), config)
    scores["embedding_hitrate_variant"] = "decoded"
    scores["embedding_hitrate_decoded"] = report.hitrate
    # Quantizers without an encoder sum codewords in the input space: one search serves both.
    few = codes[:1]
    decoded, summed = quantizer.decode(few), quantizer.codeword_sum(few)
    is_same = decoded.shape == summed.shape and np.array_equal(decoded, summed)
    summed_report = report if is_same else rows.measure(gallery(levels, "codes"), config)
    scores["embedding_hitrate_codes"] = summed_report.hitrate
    prefixes = [rows.measure(gallery(depth, "decoded"), config) for depth in range(1, levels)]
    _add_prefixes(scores, prefixes)
    return report


def _add_prefixes(scores: Scores, reports: Sequence[HitrateReport]) -> None:
    for depth, report in enumerate(reports, start=1):
        scores[f"embedding_hitrate_prefix_{depth}"] = report.hitrate


def _parallel(table: SidTable, data: ParallelData, config: ScoreConfig) -> Scores:
    from forge_ray.sid.metrics.parallel import parallel_probe  # torch, only where it is asked for

    found = parallel_probe(
        np.asarray(table.codes), table.codebook_sizes, data, config.parallel, seed=config.seed
    )
    return {
        "parallel_bits": found.bits,
        "parallel_item_hit": found.item_hit,
        "parallel_item_hit_se": found.item_hit_se,
        "parallel_item_ndcg": found.item_ndcg,
        "parallel_users": found.num_targets,
        "parallel_loss": found.loss,
        "parallel_k": config.parallel.k,
    }
