"""The gate, successive halving and the order of trials as one Tune scheduler.

Decides only: `gate.decide`, `halving.stop_reason` and `order.pick` hold the rules. Its state is one
JSON file beside the ledger, written before a decision takes effect, because Tune does not restore
schedulers. Why a trial was stopped is kept by trial key for the callback, since Tune drops what a
scheduler adds to a result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from forge_ray.sweep.gate import GateState, decide, note_scores, record_final
from forge_ray.sweep.halving import AshaConfig, AshaState, stop_reason, value_bounds
from forge_ray.sweep.ledger import write_json
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.order import pick


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the scheduler last decided on a trial.

    Attributes:
        pruned_by: `gate` or `asha`; empty while the trial goes on.
        reason: In words.
        would_prune: The gate's verdict, also where it let the trial through.
        is_control: Whether the gate let the trial pass without a look at its proxies.
    """

    pruned_by: str = ""
    reason: str = ""
    would_prune: bool = False
    is_control: bool = False


class GateScheduler(FIFOScheduler):
    """Answers proxy rows by the gate, training rows by successive halving; notes final rows."""

    def __init__(
        self,
        *,
        gate: GateConfig,
        asha: AshaConfig,
        metric: str,
        max_steps: int,
        path: Path,
    ) -> None:
        super().__init__()
        self._gate, self._asha = gate, asha
        self._objective = metric
        self._final_names = (metric, f"row/{metric}_se")
        self._max_steps = max_steps
        self._path = path
        self._gate_state, self._asha_state = _load(path)
        self.decisions: dict[str, Decision] = {}
        self._scores: Mapping[str, Mapping[str, Any]] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accepts any: metric and direction come from the sweep file."""
        return True

    def on_trial_result(
        self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]
    ) -> str:
        """Stops or continues; see the module docstring."""
        decision = self.judge(str(trial.config["key"]), result)
        return TrialScheduler.STOP if decision.pruned_by else TrialScheduler.CONTINUE

    def judge(self, key: str, result: Mapping[str, Any]) -> Decision:
        """Decides on one flattened result row and saves the state."""
        stage = result.get("stage")
        if stage == "proxy":
            decision = self._judge_proxies(key, _below(result, "proxy/"))
        elif stage == "gr":
            decision = self._judge_step(key, result)
        elif stage == "final":
            decision = self._record_final(key, result)
        else:
            return Decision()
        self.decisions[key] = decision
        self._save()
        return decision

    def order_by(self, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Lets these designs, scored before any trial, be next in line by their promise."""
        self._scores = scores
        note_scores(scores, state=self._gate_state, config=self._gate)

    def begin_with(self, keys: Iterable[str]) -> None:
        """Notes trials that come first because an earlier sweep found them good."""
        for key in keys:
            self._gate_state.picked.setdefault(key, "earlier")

    def next_place(self, waiting: Sequence[str]) -> int:
        """Which waiting trial is next: what was under way or began with, else the order's pick."""
        picked = self._gate_state.picked
        for place, key in enumerate(waiting):
            if key in picked:
                return place
        found = pick(
            [self._scores.get(key, {}) for key in waiting],
            turn=len(picked),
            state=self._gate_state,
            config=self._gate,
            stopped=self._bounds(),
        )
        picked[waiting[found.place]] = found.by
        self._save()
        return found.place

    def debug_string(self) -> str:
        """One line for Tune's status."""
        return (
            f"gate: {len(self._gate_state.decisions)} judged, {len(self._asha_state.rungs)} rungs"
        )

    def _judge_proxies(self, key: str, proxies: Mapping[str, Any]) -> Decision:
        answer = decide(
            key,
            proxies,
            state=self._gate_state,
            config=self._gate,
            stopped=self._bounds(),
        )
        return Decision(
            pruned_by="" if answer.go else "gate",
            reason=answer.reason,
            would_prune=answer.would_prune,
            is_control=answer.is_control,
        )

    def _bounds(self) -> dict[str, float]:
        finals = {one: value for one, (value, _) in self._gate_state.finals.items()}
        return value_bounds(self._asha_state, finals)

    def _record_final(self, key: str, result: Mapping[str, Any]) -> Decision:
        value, error = (_number(result, name) for name in self._final_names)
        record_final(key, value, error, state=self._gate_state)
        return Decision()

    def _judge_step(self, key: str, result: Mapping[str, Any]) -> Decision:
        reason = stop_reason(
            key,
            int(result["global_step"]),
            float(result[self._objective]),
            max_steps=self._max_steps,
            state=self._asha_state,
            config=self._asha,
        )
        return Decision(pruned_by="asha", reason=reason) if reason else Decision()

    def _save(self) -> None:
        # Not `asdict`, which copies all of it: this runs at every row, and a thousand trials make
        # half a megabyte.
        content = {"gate": vars(self._gate_state), "asha": vars(self._asha_state)}
        write_json(self._path, content, is_plain=True)


def _load(path: Path) -> tuple[GateState, AshaState]:
    if not path.exists():
        return GateState(), AshaState()
    content = json.loads(path.read_text(encoding="utf-8"))
    return GateState(**content["gate"]), AshaState(**content["asha"])


def _number(result: Mapping[str, Any], name: str) -> float:
    value = result.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _below(result: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    start = len(prefix)
    return {name[start:]: value for name, value in result.items() if name.startswith(prefix)}
