"""What a gate is set to, and its hard limits.

Apart from `gate`, whose rules load SciPy: the process of every trial needs this much and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.registry import METRICS, is_better, rankable

MODES = ("off", "quantile", "calibrated")


@dataclass(kw_only=True)
class GateConfig:
    """When a trial is pruned before training."""

    mode: str = "calibrated"
    """`off` lets every trial train; `quantile` trusts one proxy; `calibrated` prunes what finished
    trials show to be worse than the incumbent, and nothing before they show it. Hard limits hold
    in both."""
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
    """Proxy of `quantile`: a score that is safe as a gate; which way is better is the score's own
    business (`forge_ray.sid.metrics.registry`)."""
    keep_quantile: float = 0.6
    """Share of the proxies seen that passes `quantile`."""
    proxies: list[str] = field(default_factory=list)
    """Proxies that `calibrated` may learn from; empty takes every score that is safe as a gate."""
    risk: float = 0.1
    """Chance that `calibrated` may prune the best design. It needs 1 / risk - 1 finished trials
    that passed without a look at their proxies (9 at .1) before it prunes anything."""
    warmup: int = 4
    """Trials within the limits that pass before either rule starts."""
    random_share: float = 0.1
    """Share of the trials that pass either rule regardless: they calibrate and audit it."""
    seed: int = 0
    """Seed of the random share."""

    def __post_init__(self) -> None:
        for name in ("keep_quantile", "random_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"gate.{name} must be in [0, 1], got {value}. Set a share.")
        if self.mode not in MODES:
            raise ConfigError(
                f"gate.mode must be one of {', '.join(MODES)}, got {self.mode!r}. Pick one."
            )
        if not 0 < self.risk < 1:
            raise ConfigError(f"gate.risk must be in (0, 1), got {self.risk}. Set .1 or .2.")
        rankable(self.proxy, field="gate.proxy")
        for name in self.proxies:
            rankable(name, field="gate.proxies")
        if self.warmup < 0:
            raise ConfigError(f"gate.warmup must be >= 0, got {self.warmup}. Count trials.")

    @property
    def required(self) -> tuple[str, ...]:
        """Proxies that a trial must report for this gate to judge it."""
        if self.mode == "off":
            return ()
        return (*self.limits, *([self.proxy] if self.mode == "quantile" else self.proxies))

    @property
    def candidates(self) -> tuple[str, ...]:
        """Proxies that the calibrated rule may learn from."""
        return tuple(self.proxies) or tuple(one.name for one in METRICS.values() if one.gate_safe)

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


def broken_limit(proxies: Mapping[str, Any], config: GateConfig) -> str | None:
    """The first hard limit that the proxies break, in words, or None."""
    if proxies.get("infeasible"):
        return str(proxies["infeasible"])
    for name in config.required:
        if not is_finite(proxies.get(name)):
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


def is_finite(value: Any) -> bool:
    """Whether a proxy has a value that can be compared."""
    return isinstance(value, (int, float)) and math.isfinite(value)
