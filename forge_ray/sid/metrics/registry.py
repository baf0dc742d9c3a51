"""Every score of a SID table by name: which way is better, what it costs, whether it may gate.

The one list that printing, the sweep's gate and its audit read. Knows names and facts, computes
nothing. `docs/metrics.md` has the formulas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from forge_ray.errors import ConfigError

Better = Literal["higher", "lower"]
Cost = Literal["free", "seconds", "minutes"]
Group = Literal["table", "levels", "reconstruction", "neighbours", "behaviour", "probe"]

GROUPS: dict[Group, str] = {
    "table": "Table",
    "levels": "Levels, unresolved",
    "reconstruction": "Reconstruction",
    "neighbours": "Embedding hitrate",
    "behaviour": "Behaviour",
    "probe": "Trained probe",
}
"""Groups in the order of printing, with their headings."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Facts about one score."""

    name: str
    """Key in a row of scores; `*` stands for a level or a depth, counted from 1."""
    group: Group
    better: Better | None
    """None for facts, constants and controls, which rank nothing."""
    cost: Cost = "seconds"
    """free: codes alone, one sort; seconds: vectors or counts; minutes: trains something."""
    gate_safe: bool = False
    """May prune a sweep's trial: seen on train and validation only, defined for every design, and
    comparable between designs of different shapes."""
    shown: bool = False
    """Printed by `forge-ray sid score`; --json has everything."""
    doc: str
    """One line for people."""

    @property
    def sign(self) -> int:
        """+1 where higher is better, −1 where lower is, 0 for neither."""
        return {"higher": 1, "lower": -1, None: 0}[self.better]

    @property
    def per_level(self) -> bool:
        """Whether there is one value for each level or depth."""
        return "*" in self.name


_TABLE = (
    Metric(name="num_items", group="table", better=None, cost="free", doc="items N"),
    Metric(name="num_levels", group="table", better=None, cost="free", doc="codes per SID"),
    Metric(
        name="sid_bits", group="table", better=None, cost="free", shown=True,
        doc="Σ log2 K: bits that the codebooks can spell",
    ),
    Metric(
        name="num_sids", group="table", better="higher", cost="free", doc="distinct SIDs",
    ),
    Metric(
        name="uniqueness", group="table", better="higher", cost="free", gate_safe=True, shown=True,
        doc="distinct SIDs / N (ICR)",
    ),
    Metric(
        name="colliding_items", group="table", better="lower", cost="free", gate_safe=True,
        shown=True, doc="share of items that share their SID; not 1 − uniqueness",
    ),
    Metric(
        name="gini", group="table", better="lower", cost="free", gate_safe=True, shown=True,
        doc="inequality of items over occupied SIDs (FORGE)",
    ),
    Metric(
        name="coverage", group="table", better=None, cost="free", shown=True,
        doc="occupied SIDs / all SIDs that the codebooks can spell",
    ),
    Metric(
        name="max_bucket", group="table", better="lower", cost="free", gate_safe=True, shown=True,
        doc="items on the fullest SID",
    ),
    Metric(
        name="mean_bucket", group="table", better="lower", cost="free", doc="N / distinct SIDs",
    ),
    Metric(
        name="max_group", group="table", better="lower", cost="free", shown=True,
        doc="items under the fullest prefix of length L − 1: codes a last-level resolver needs",
    ),
)  # fmt: skip
_LEVELS = (
    Metric(
        name="usage_min", group="levels", better="higher", cost="free", gate_safe=True,
        doc="smallest share of codes in use over the levels",
    ),
    Metric(
        name="usage_level_*", group="levels", better="higher", cost="free", shown=True,
        doc="codes in use / K",
    ),
    Metric(name="dead_level_*", group="levels", better="lower", cost="free", doc="unused codes"),
    Metric(
        name="entropy_min", group="levels", better="higher", cost="free", gate_safe=True,
        doc="smallest normalised entropy over the levels",
    ),
    Metric(
        name="entropy_level_*", group="levels", better="higher", cost="free", shown=True,
        doc="−Σ p log p / log K",
    ),
    Metric(
        name="perplexity_level_*", group="levels", better="higher", cost="free",
        doc="exp(−Σ p log p): effective number of codes",
    ),
    Metric(
        name="prefixes_*", group="levels", better=None, cost="free", shown=True,
        doc="distinct prefixes of each depth",
    ),
)  # fmt: skip
_RECONSTRUCTION = (
    Metric(
        name="reconstruction_r2", group="reconstruction", better="higher", shown=True,
        doc="1 − Σ|x − x̂|² / Σ|x − x̄|² of the vectors that were quantized; compare at equal bits",
    ),
    Metric(
        name="reconstruction_r2_*", group="reconstruction", better="higher",
        doc="the same from the first codes only",
    ),
    Metric(
        name="order_agreement", group="reconstruction", better="higher", gate_safe=True, shown=True,
        doc="P(the item with the longer common prefix is the more similar one), 0.5 is chance",
    ),
    Metric(
        name="order_agreement_se", group="reconstruction", better=None, doc="its standard error",
    ),
    Metric(
        name="code_cosine_level_*", group="reconstruction", better="higher", shown=True,
        doc="S(l): mean cosine of two items with the same code at level l",
    ),
    Metric(
        name="code_cosine_any", group="reconstruction", better=None, shown=True,
        doc="mean cosine of any two items, the reference of S(l)",
    ),
)  # fmt: skip
_NEIGHBOURS = (
    Metric(
        name="embedding_hitrate", group="neighbours", better="higher", gate_safe=True, shown=True,
        doc="held-out item among the k nearest of a history item, by what the SID decodes to",
    ),
    Metric(
        name="embedding_hitrate_variant", group="neighbours", better=None, shown=True,
        doc="which vectors: decoded, or refit where no quantizer exists; never mix the two",
    ),
    Metric(
        name="embedding_hitrate_raw", group="neighbours", better=None, shown=True,
        doc="by the item vectors themselves: a ceiling, equal for every table",
    ),
    Metric(
        name="embedding_hitrate_gap", group="neighbours", better="lower", shown=True,
        doc="raw − own: what quantizing lost",
    ),
    Metric(
        name="embedding_hitrate_decoded", group="neighbours", better="higher",
        doc="by the decoder's output of the SID",
    ),
    Metric(
        name="embedding_hitrate_codes", group="neighbours", better="higher", shown=True,
        doc="by the sum of codewords, without the decoder",
    ),
    Metric(
        name="embedding_hitrate_refit", group="neighbours", better="higher",
        doc="by codewords refitted to the item vectors; memorises with many codes",
    ),
    Metric(
        name="embedding_hitrate_prefix_*", group="neighbours", better="higher", shown=True,
        doc="by the first codes only: along which levels neighbours are kept",
    ),
    Metric(name="embedding_hitrate_se", group="neighbours", better=None, doc="standard error"),
    Metric(name="embedding_hitrate_method", group="neighbours", better=None, doc="exact or hnsw"),
    Metric(name="embedding_hitrate_k", group="neighbours", better=None, doc="neighbours"),
    Metric(name="embedding_hitrate_rows", group="neighbours", better=None, doc="lists scored"),
    Metric(name="embedding_hitrate_gallery", group="neighbours", better=None, doc="searched items"),
)  # fmt: skip
_BEHAVIOUR = (
    Metric(
        name="backoff_bits", group="behaviour", better="lower", gate_safe=True, shown=True,
        doc="bits of the held-out item under a count model over SID prefixes",
    ),
    Metric(
        name="backoff_bits_tail", group="behaviour", better="lower", gate_safe=True, shown=True,
        doc="the same over targets with few train interactions",
    ),
    Metric(
        name="backoff_bits_head", group="behaviour", better="lower", gate_safe=True, shown=True,
        doc="the same over the other targets",
    ),
    Metric(
        name="backoff_gain", group="behaviour", better="higher", gate_safe=True, shown=True,
        doc="bits that the shuffled table costs more; no gain, no behaviour",
    ),
    Metric(
        name="backoff_bits_shuffled", group="behaviour", better=None, shown=True,
        doc="control: the same table with its rows permuted",
    ),
    Metric(
        name="backoff_bits_random", group="behaviour", better=None,
        doc="control: random SIDs with the table's bucket sizes",
    ),
    Metric(
        name="backoff_mixture_*", group="behaviour", better=None, shown=True,
        doc="weight of each depth, 0 is popularity: what carries the prediction",
    ),
    Metric(name="backoff_bits_se", group="behaviour", better=None, doc="standard error"),
    Metric(
        name="backoff_gain_se", group="behaviour", better=None, doc="standard error, paired",
    ),
    Metric(name="backoff_users", group="behaviour", better=None, doc="targets scored"),
    Metric(
        name="lcp_ratio", group="behaviour", better="higher", shown=True,
        doc="common prefix of held-out transitions / of popularity-matched random pairs",
    ),
    Metric(
        name="lcp_held_out", group="behaviour", better="higher", gate_safe=True, shown=True,
        doc="numerator: mean common prefix of held-out transitions, in codes",
    ),
    Metric(
        name="lcp_random", group="behaviour", better=None, shown=True,
        doc="denominator, exact; a tiny one inflates the ratio",
    ),
    Metric(name="lcp_held_out_se", group="behaviour", better=None, doc="standard error"),
    Metric(name="lcp_transitions", group="behaviour", better=None, doc="held-out transitions"),
    Metric(
        name="code_overlap", group="behaviour", better="higher", shown=True,
        doc="equal codes of held-out transitions at any level (LETTER): fits codes without order",
    ),
)  # fmt: skip
_PROBE = (
    Metric(
        name="parallel_bits", group="probe", better="lower", cost="minutes", shown=True,
        doc="bits of the held-out item under trained per-level heads",
    ),
    Metric(
        name="parallel_item_hit", group="probe", better="higher", cost="minutes", shown=True,
        doc="ItemHit@k of the trained per-level heads, whole catalogue ranked",
    ),
    Metric(
        name="parallel_item_ndcg", group="probe", better="higher", cost="minutes", shown=True,
        doc="ItemNDCG@k of the same ranking",
    ),
    Metric(
        name="parallel_item_hit_se", group="probe", better=None, cost="minutes",
        doc="standard error",
    ),
    Metric(name="parallel_k", group="probe", better=None, cost="minutes", doc="cutoff k"),
    Metric(name="parallel_users", group="probe", better=None, cost="minutes", doc="targets ranked"),
    Metric(
        name="parallel_loss", group="probe", better=None, cost="minutes",
        doc="train cross-entropy per level at the end, in nats",
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*_TABLE, *_LEVELS, *_RECONSTRUCTION, *_NEIGHBOURS, *_BEHAVIOUR, *_PROBE)
}
"""All scores, in the order of printing."""

LABELS = ("table", "path", "split", "control")
"""Columns of a row that name it and measure nothing."""


def find_metric(name: str) -> Metric | None:
    """The facts about a key of a row of scores; None for labels and times.

    Args:
        name: e.g. `usage_level_2`, or `raw_gini`, the figure before collision resolution.
    """
    if name in METRICS:
        return METRICS[name]
    template = re.sub(r"\d+$", "*", name)
    if template in METRICS:
        return METRICS[template]
    plain = name.removeprefix("raw_")
    return METRICS.get(plain) if plain != name and _is_of_table(plain) else None


def rankable(name: str, *, field: str) -> Metric:
    """The facts about a score that is to prune designs.

    Args:
        name: key of a row of scores.
        field: the configuration field that names it, for the message.

    Raises:
        ConfigError: when there is no such score, or it is not safe as a gate.
    """
    metric = find_metric(name)
    if metric is None or not metric.gate_safe:
        safe = sorted(one.name for one in METRICS.values() if one.gate_safe)
        why = "no score" if metric is None else f"not safe as a gate ({metric.doc})"
        raise ConfigError(f"{field} must be one of {safe}, got {name!r}: {why}. Name one of them.")
    return metric


def audited() -> tuple[Metric, ...]:
    """Scores of whole tables with a direction: what a sweep checks against trained generators."""
    return tuple(one for one in METRICS.values() if one.better and not one.per_level)


def is_better(metric: Metric, value: Any, other: Any) -> bool:
    """Whether a value beats another one under the metric's direction."""
    return bool(metric.sign * (value - other) > 0)


def _is_of_table(name: str) -> bool:
    return name in METRICS and METRICS[name].group == "table"
