"""The gate: which designs deserve a generator training, judged on proxies that cost seconds.

Decisions are pure functions of the proxies, the state and the configuration. Hard limits come first
and spare nobody. Then a design must lie in the best share of the proxies seen so far, except while
the gate warms up and for a small random share that passes so that the audit can measure what the
gate throws away. The random share depends on the trial's key alone, never on timing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.registry import is_better, rankable

Rule = Literal["limit", "quantile", "warm-up", "random share", "passed", "off"]


@dataclass(kw_only=True)
class GateConfig:
    """When a trial is pruned before training."""

    enabled: bool = True
    """False lets every trial train: for audits and tiny sweeps."""
    min_capacity: float = 1.0
    """Product of the codebook sizes over the number of items; checked before any work."""
    min_uniqueness: float | None = 0.3
    """Distinct SIDs over items, after collision resolution."""
    min_usage: float | None = 0.5
    """Smallest share of codes in use over the levels, before resolution (dead codes)."""
    min_gain: float | None = 0.05
    """Prefix-backoff bits gained over the shuffled table. Differences below .05 bits are noise, so
    random codes cannot pass."""
    max_bucket: int | None = None
    """Most items that may share one SID, after resolution."""
    proxy: str = "backoff_bits"
    """Proxy of the quantile rule: a score that is safe as a gate; which way is better is the
    score's own business (`forge_ray.sid.metrics.registry`)."""
    keep_quantile: float = 0.6
    """Share of the proxies seen that passes."""
    warmup: int = 4
    """Trials within the limits that pass before the quantile rule starts."""
    random_share: float = 0.1
    """Share of the trials that pass the quantile rule regardless, for the audit."""
    seed: int = 0
    """Seed of the random share."""

    def __post_init__(self) -> None:
        for name in ("keep_quantile", "random_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"gate.{name} must be in [0, 1], got {value}. Set a share.")
        rankable(self.proxy, field="gate.proxy")
        if self.warmup < 0:
            raise ConfigError(f"gate.warmup must be >= 0, got {self.warmup}. Count trials.")

    @property
    def required(self) -> tuple[str, ...]:
        """Proxies that a trial must report for this gate to judge it."""
        if not self.enabled:
            return ()
        return (*self.limits, self.proxy)

    @property
    def limits(self) -> dict[str, float]:
        """Hard limits by proxy; the proxy's direction says on which side a design must lie."""
        limits = {
            "uniqueness": self.min_uniqueness,
            "usage_min": self.min_usage,
            "backoff_gain": self.min_gain,
            "max_bucket": self.max_bucket,
        }
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """The answer for one trial.

    Attributes:
        go: Whether the trial may train.
        rule: What decided.
        reason: For people; numbers included.
        would_prune: The quantile rule's verdict even where warm-up or the random share overrode it.
    """

    go: bool
    rule: Rule
    reason: str
    would_prune: bool = False


@dataclass(kw_only=True)
class GateState:
    """What the gate remembers; plain JSON data.

    Attributes:
        seen: Proxy values of the trials within the limits, by trial key, in order of arrival.
        decisions: Past answers by trial key: a resumed trial gets the same one.
    """

    seen: dict[str, float] = field(default_factory=dict)
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)


def decide(
    key: str, proxies: Mapping[str, Any], *, state: GateState, config: GateConfig
) -> GateDecision:
    """Answers one trial and remembers the answer in `state`.

    Args:
        key: Trial key; the same key gets the same answer again.
        proxies: Proxy values; must hold `config.required`, or `infeasible` with a reason.
        state: Updated in place.
        config: Limits and shares.
    """
    if key in state.decisions:
        return GateDecision(**state.decisions[key])
    broken = broken_limit(proxies, config) if config.enabled else None
    if not config.enabled:
        decision = GateDecision(go=True, rule="off", reason="gate is off")
    elif broken is not None:
        decision = GateDecision(go=False, rule="limit", reason=broken, would_prune=True)
    else:
        decision = _by_quantile(key, float(proxies[config.proxy]), state=state, config=config)
        state.seen[key] = float(proxies[config.proxy])
    state.decisions[key] = vars(decision).copy()
    return decision


def broken_limit(proxies: Mapping[str, Any], config: GateConfig) -> str | None:
    """The first hard limit that the proxies break, in words, or None."""
    if proxies.get("infeasible"):
        return str(proxies["infeasible"])
    for name in config.required:
        if not _is_finite(proxies.get(name)):
            return f"{name} is {proxies.get(name)}"
    for name, limit in config.limits.items():
        metric = rankable(name, field="gate limit")
        if is_better(metric, limit, proxies[name]):
            compared = "<" if metric.sign > 0 else ">"
            return f"{name} {_figure(proxies[name])} {compared} {limit:g}"
    return None


def _figure(value: float) -> str:
    return f"{value:g}" if isinstance(value, int) else f"{value:.3g}"


def missing_proxies(proxies: Mapping[str, Any], config: GateConfig) -> list[str]:
    """Names the gate needs and the row lacks: a typo must not switch pruning off."""
    if proxies.get("infeasible"):
        return []
    return [name for name in config.required if name not in proxies]


def infeasible_reason(
    codebook_sizes: tuple[int, ...], num_items: int, config: GateConfig
) -> str | None:
    """Why codebooks of these sizes cannot tell the items apart, or None."""
    capacity = math.prod(codebook_sizes)
    if capacity >= config.min_capacity * num_items:
        return None
    sizes = " x ".join(str(size) for size in codebook_sizes)
    return (
        f"capacity {sizes} = {capacity:,} SIDs < {config.min_capacity:g} x {num_items:,} items; "
        "not fitted"
    )


def _by_quantile(key: str, value: float, *, state: GateState, config: GateConfig) -> GateDecision:
    sign = -float(rankable(config.proxy, field="gate.proxy").sign)  # smaller is better here
    seen = [sign * one for one in (*state.seen.values(), value)]
    cutoff = float(np.quantile(seen, config.keep_quantile))
    is_worse = sign * value > cutoff
    compared = ">" if sign > 0 else "<"
    verdict = (
        f"{config.proxy} {value:.3f} {compared} {sign * cutoff:.3f}, "
        f"the best {config.keep_quantile:.0%} of {len(seen)}"
    )
    if not is_worse:
        reason = f"{config.proxy} {value:.3f} in the best {config.keep_quantile:.0%} of {len(seen)}"
        return GateDecision(go=True, rule="passed", reason=reason)
    if len(state.seen) < config.warmup:
        return GateDecision(go=True, rule="warm-up", reason=f"warm-up: {verdict}", would_prune=True)
    if passes_at_random(key, config):
        reason = f"random share: {verdict}"
        return GateDecision(go=True, rule="random share", reason=reason, would_prune=True)
    return GateDecision(go=False, rule="quantile", reason=verdict, would_prune=True)


def passes_at_random(key: str, config: GateConfig) -> bool:
    """Whether this trial belongs to the random share; a function of key and seed only."""
    digest = hashlib.sha256(f"{config.seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < config.random_share


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
