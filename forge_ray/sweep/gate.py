"""The gate: which designs deserve a generator training, judged on proxies that cost seconds.

Decisions are pure functions of the proxies, the state and the configuration. Hard limits come first
and spare nobody. Then, by mode, a design must lie in the best share of one proxy (`quantile`), or
must not be shown to be worse than the incumbent (`calibrated`, see `calibration`), except while the
gate warms up and for a small random share that passes so that the audit can measure what the gate
throws away. The random share depends on the trial's key alone, never on timing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from forge_ray.sid.metrics.registry import METRICS, rankable
from forge_ray.sweep.calibration import Assessment, Floats, Trained, assess, controls_needed
from forge_ray.sweep.limits import GateConfig, broken_limit, is_finite

Rule = Literal[
    "limit", "quantile", "calibrated", "warm-up", "no evidence", "random share", "passed", "off"
]


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """The answer for one trial.

    Attributes:
        go: Whether the trial may train.
        rule: What decided.
        reason: For people; numbers included.
        would_prune: The rule's verdict even where warm-up or the random share overrode it.
        is_control: Whether the trial passed without a look at its proxies, limits aside: such
            trials are a fair sample of what the space holds.
    """

    go: bool
    rule: Rule
    reason: str
    would_prune: bool = False
    is_control: bool = False


@dataclass(kw_only=True)
class GateState:
    """What the gate remembers; plain JSON data.

    Attributes:
        seen: Proxies of the designs within the limits, by trial key, in order of arrival; all of
            them from the start where they were scored before anything trained.
        decisions: Past answers by trial key: a resumed trial gets the same one.
        finals: Final value and its standard error of the trials that were trained to the end.
        picked: Why a trial was next in line, `plan`, `promise` or `earlier`, by key: see `order`.
    """

    seen: dict[str, dict[str, float]] = field(default_factory=dict)
    decisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    finals: dict[str, list[float]] = field(default_factory=dict)
    picked: dict[str, str] = field(default_factory=dict)


def decide(
    key: str,
    proxies: Mapping[str, Any],
    *,
    state: GateState,
    config: GateConfig,
    stopped: Mapping[str, float] | None = None,
) -> GateDecision:
    """Answers one trial and remembers the answer in `state`.

    Args:
        key: Trial key; the same key gets the same answer again.
        proxies: Proxy values; must hold `config.required`, or `infeasible` with a reason.
        state: Updated in place.
        config: Limits and shares.
        stopped: What trials that halving stopped could have reached at most, by key.
    """
    if key in state.decisions:
        return GateDecision(**state.decisions[key])
    broken = None if config.mode == "off" else broken_limit(proxies, config)
    if config.mode == "off":
        decision = GateDecision(go=True, rule="off", reason="gate is off", is_control=True)
    elif broken is not None:
        decision = GateDecision(go=False, rule="limit", reason=broken, would_prune=True)
    else:
        if config.mode == "quantile":
            decision = _by_quantile(key, proxies, state=state, config=config)
        else:
            trained, names = trained_trials(state, [proxies], config, stopped=stopped or {})
            given = (trained, np.array(_turned(proxies, names)))
            decision = _by_calibration(key, given, state=state, config=config)
    if broken is None:
        state.seen[key] = _remembered(proxies, config)
    if state.picked.get(key, "plan") != "plan":
        decision = dataclasses.replace(decision, is_control=False)
    state.decisions[key] = vars(decision).copy()
    return decision


def late_start(config: GateConfig, *, takes_turns: bool, num_trials: int) -> str:
    """What to say of a sweep that may end before the calibrated rule can prune; else nothing.

    Args:
        config: Mode, risk and warm-up.
        takes_turns: Whether every other trial is picked for its promise: such are no controls.
        num_trials: Trials of the whole sweep.
    """
    first = max(controls_needed(config.risk) * (1 + takes_turns), config.warmup)
    if config.mode != "calibrated" or num_trials > first:
        return ""
    return (
        f"the calibrated gate can first act after about {first} trials, this sweep has "
        f"{num_trials}: until then only the hard limits prune before training. Set num_trials "
        "higher, gate.risk=0.2, order=planned or, to trust one proxy at once, gate.mode=quantile"
    )


def note_scores(
    scores: Mapping[str, Mapping[str, Any]], *, state: GateState, config: GateConfig
) -> None:
    """Notes the proxies of designs that wait for their trial: `quantile` compares with all of them.

    Args:
        scores: Proxies by trial key.
        state: Updated in place.
        config: Limits: a design beyond them compares with nobody.
    """
    for key, proxies in scores.items():
        if config.mode == "off" or broken_limit(proxies, config) is None:
            state.seen.setdefault(key, _remembered(proxies, config))


def record_final(key: str, value: float, error: float, *, state: GateState) -> None:
    """Notes a trial that was trained to the end; the calibrated rule learns from it.

    Args:
        key: Trial key.
        value: Final metric, larger is better; ignored where it is no number.
        error: Its standard error, 0 where unknown.
        state: Updated in place.
    """
    if math.isfinite(value):
        state.finals[key] = [value, error if math.isfinite(error) else 0.0]


def trained_trials(
    state: GateState,
    asked: Sequence[Mapping[str, Any]],
    config: GateConfig,
    *,
    stopped: Mapping[str, float],
) -> tuple[Trained, list[str]]:
    """The trained trials within the limits, as the calibrated rule compares them with others.

    Args:
        state: What the gate remembers.
        asked: Proxies of the trials that are to be compared with them.
        config: Names the proxies.
        stopped: What trials that halving stopped could have reached at most, by key.

    Returns:
        The trials, and the names of their proxies: those that all of them and of `asked` have.
    """
    ends = {**state.finals, **{key: [bound, 0.0] for key, bound in stopped.items()}}
    keys = [key for key in ends if key in state.seen]
    names = [
        name
        for name in config.candidates
        if all(is_finite(one.get(name)) for one in asked)
        and all(name in state.seen[key] for key in keys)
    ]
    rows = [_turned(state.seen[key], names) for key in keys]
    values = np.array([ends[key] for key in keys], dtype=np.float64).reshape(-1, 2)
    trained = Trained(
        proxies=np.array(rows, dtype=np.float64).reshape(len(keys), len(names)),
        values=values[:, 0],
        errors=values[:, 1],
        is_control=np.array([state.decisions[key]["is_control"] for key in keys], dtype=np.bool_),
    )
    return trained, names


def _turned(proxies: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    return [METRICS[name].sign * float(proxies[name]) for name in names]


def _remembered(proxies: Mapping[str, Any], config: GateConfig) -> dict[str, float]:
    names = {config.proxy, *config.candidates}
    return {name: float(proxies[name]) for name in names if is_finite(proxies.get(name))}


def _by_quantile(
    key: str, proxies: Mapping[str, Any], *, state: GateState, config: GateConfig
) -> GateDecision:
    value = float(proxies[config.proxy])
    sign = -float(rankable(config.proxy, field="gate.proxy").sign)  # smaller is better here
    others = [row[config.proxy] for other, row in state.seen.items() if other != key]
    seen = [sign * one for one in (*others, value)]
    cutoff = float(np.quantile(seen, config.keep_quantile))
    is_worse = sign * value > cutoff
    compared = ">" if sign > 0 else "<"
    if is_worse:
        reason = (
            f"{config.proxy} {value:.3f} {compared} {sign * cutoff:.3f}, "
            f"the best {config.keep_quantile:.0%} of {len(seen)}"
        )
    else:
        reason = f"{config.proxy} {value:.3f} in the best {config.keep_quantile:.0%} of {len(seen)}"
    is_warm = _num_judged(state) >= config.warmup
    return _verdict(key, "quantile", reason, is_worse=is_worse, is_active=is_warm, config=config)


def _by_calibration(
    key: str, given: tuple[Trained, Floats], *, state: GateState, config: GateConfig
) -> GateDecision:
    found = assess(*given, risk=config.risk)
    reason = describe(found, risk=config.risk)
    if found.state == "no evidence":
        # Nobody's proxies were looked at: the trial is as good a control as any.
        return GateDecision(go=True, rule="no evidence", reason=reason, is_control=True)
    is_worse = found.p_value <= config.risk
    is_active = found.state == "tested" and _num_judged(state) >= config.warmup
    return _verdict(
        key, "calibrated", reason, is_worse=is_worse, is_active=is_active, config=config
    )


def _num_judged(state: GateState) -> int:
    """Designs within the limits that had their answer."""
    return len(state.seen.keys() & state.decisions.keys())


def _verdict(
    key: str,
    rule: Literal["quantile", "calibrated"],
    reason: str,
    *,
    is_worse: bool,
    is_active: bool,
    config: GateConfig,
) -> GateDecision:
    """What a rule's finding means for a trial, warm-up and random share considered."""
    is_random = passes_at_random(key, config)
    passing: dict[str, Any] = {"would_prune": is_worse, "is_control": is_random or not is_active}
    if not is_active and (is_worse or rule == "calibrated"):
        return GateDecision(go=True, rule="warm-up", reason=f"warm-up: {reason}", **passing)
    if not is_worse:
        return GateDecision(go=True, rule="passed", reason=reason, **passing)
    if is_random:
        return GateDecision(
            go=True, rule="random share", reason=f"random share: {reason}", **passing
        )
    return GateDecision(go=False, rule=rule, reason=reason, would_prune=True)


def describe(found: Assessment, *, risk: float) -> str:
    """An assessment in words."""
    if found.state == "few":
        return f"{found.num_controls} of {found.num_needed} control trials are trained"
    shown = f"held-out Spearman {found.spearman:+.2f} over {found.num_trials} trained trials"
    if found.state == "no evidence":
        return f"no evidence that the proxies rank designs: {shown}"
    compared = "<=" if found.p_value <= risk else ">"
    return (
        f"p = {found.p_value:.3f} {compared} {risk:g} that a design of {found.lower_bound:.4f} or "
        f"more has such proxies ({shown}, {found.num_controls} controls)"
    )


def passes_at_random(key: str, config: GateConfig) -> bool:
    """Whether this trial belongs to the random share; a function of key and seed only."""
    digest = hashlib.sha256(f"{config.seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < config.random_share
