"""Hands trials to Tune and their outcomes to Optuna and the ledger.

`TrialSource` knows which trials are left: those a killed driver left behind, the planned ones, or
what Optuna proposes. `PrunedAwareOptunaSearch` is Ray's `OptunaSearch` with the outcomes told as
they are: PRUNED with intermediate values, FAIL on errors and NaN. The bare class reports stopped
trials as complete. Uses its private `_ot_trials`, `_ot_study` and `_completed_trials`; a test pins
them. A study of several objectives knows neither intermediate values nor PRUNED: trials that gate
or halving ended are FAIL there, with the reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from forge_ray.config import canonical_json
from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import Ledger, TrialRecord
from forge_ray.sweep.objectives import direction, objective_values
from forge_ray.sweep.prices import Prices, trial_cost
from forge_ray.sweep.space import Point, Space
from forge_ray.sweep.study import KEY, begin_trial, proxy_attributes

logger = logging.getLogger(__name__)

_MAX_REPEATS, _MAX_REJECTED = 64, 512
_LOOKED_AT = 16
"""Waiting trials that are asked for one that fits; Tune asks again and again."""


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial to run.

    Attributes:
        number: Its place in the sweep.
        key: Hash of what it computes.
        point: Searched values.
        config: Resolved configuration, JSON types.
        infeasible: Why this design cannot work, known before any work; empty when it may.
        facts: What is known of the design before any work, e.g. `sid_bits`.
    """

    number: int
    key: str
    point: Point
    config: dict[str, Any]
    infeasible: str = ""
    facts: dict[str, float] = field(default_factory=dict)

    def params(self) -> dict[str, Any]:
        """What Tune passes to the trial function."""
        return {**vars(self), "point": json.dumps(self.point)}


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why a searched design is no trial: known before any work, it costs nothing.

    Attributes:
        rule: Short name to count by, e.g. `capacity`.
        reason: In words, numbers included.
    """

    rule: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A point applied to the sweep's settings; fields as in `TrialSpec`.

    Attributes:
        rejected: Why the search passes over it; a fixed point becomes a trial all the same.
    """

    key: str
    config: dict[str, Any]
    infeasible: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    rejected: Rejection | None = None


Resolve = Callable[[Point], Resolved]

NextPlace = Callable[[Sequence[str]], int]
"""Which of the waiting trials is next, by their keys."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: `interrupted` means neither: it resumes with the next run.
        reason: In words.
        pruned_by: `gate` or `asha`.
        value: Metric of a complete trial.
        objectives: All objectives of a complete trial, where the sweep has several.
    """

    state: Literal["complete", "pruned", "failed", "interrupted"]
    reason: str = ""
    pruned_by: str = ""
    value: float | None = None
    objectives: dict[str, float] = field(default_factory=dict)


def outcome_of(result: Mapping[str, Any] | None, *, metric: str, error: bool) -> Outcome:
    """Reads the outcome from a trial's last flattened result; pure."""
    result = result or {}
    pruned_by = str(result.get("decision/pruned_by") or "")
    if pruned_by:
        reason = str(result.get("decision/reason", ""))
        return Outcome(state="pruned", reason=reason, pruned_by=pruned_by)
    if error:
        return Outcome(state="failed", reason="error")
    if result.get("stage") != "final":
        return Outcome(state="interrupted", reason="stopped before its end")
    value = result.get(metric)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return Outcome(state="failed", reason=f"{metric} is {value}")
    return Outcome(state="complete", value=float(value))


class TrialSource:
    """The trials that are left to run, each handed out once.

    Args:
        records: Trials of earlier sessions by key.
        planned: Points to run in order, before anything is drawn.
        num_trials: Trials in all, when further points may be drawn; None draws none.
        resolve: Turns a point into a configuration and its key.
        space: What an earlier session left unfinished outside of it is not run.
    """

    def __init__(
        self,
        *,
        records: Mapping[str, TrialRecord],
        planned: Iterable[Point],
        num_trials: int | None,
        resolve: Resolve,
        space: Space,
    ) -> None:
        self._resolve = resolve
        self._known = {key: one.number for key, one in records.items()}
        # Those of the plan as in the session before, whichever of them started then.
        self._numbers = itertools.filterfalse(
            frozenset(self._known.values()).__contains__, itertools.count()
        )
        self._num_trials = num_trials
        self._is_dry = False
        self.rejections: Counter[str] = Counter()
        # A sampler that draws does not propose the same point again: what a killed driver left
        # behind is run before anything new. A plan holds those points anyway.
        left = [
            one.point
            for one in records.values()
            if not one.is_finished and space.contains(one.point)
        ]
        self.queue: deque[TrialSpec] = deque()
        self._wanted: set[str] = set()
        self._handed: dict[str, TrialSpec] = {}
        queued: set[str] = {key for key, one in records.items() if one.is_finished}
        for point in (*planned, *(left if num_trials is not None else ())):
            resolved = resolve(point)
            if resolved.key not in queued:
                queued.add(resolved.key)
                self.queue.append(self._spec(point, resolved))

    def put_back(self, spec: TrialSpec) -> None:
        """Returns a trial that was taken out and may not start yet."""
        self._handed.pop(spec.key, None)
        self.queue.appendleft(spec)

    def unstarted(self, started: Collection[str]) -> list[TrialSpec]:
        """Trials that wait: those handed out that the ledger never saw start come first."""
        handed = [one for key, one in self._handed.items() if key not in started]
        return [*handed, *self.queue]

    @property
    def remaining(self) -> int:
        """How many trials are left, at most."""
        drawn = 0 if self._num_trials is None else max(0, self._num_trials - len(self._known))
        return len(self.queue) + drawn

    @property
    def total(self) -> int:
        """Trials of the whole sweep, finished ones included, at most."""
        return max(len(self._known), self._num_trials or 0)

    @property
    def may_draw(self) -> bool:
        """Whether the sampler may propose one more trial."""
        is_short = self._num_trials is not None and len(self._known) < self._num_trials
        return is_short and not self._is_dry

    def wants(self, key: str) -> bool:
        """Whether this session runs or ran the trial; others belong to an earlier space."""
        return key in self._wanted

    def end_drawing(self) -> None:
        """Notes that the sampler has nothing new: the sweep ends with fewer trials."""
        self._is_dry = True

    def admit(self, point: Point) -> TrialSpec | Rejection | None:
        """A drawn point as a trial, why it is none, or None where it is a repeat.

        Raises:
            ConfigError: The point is not a valid configuration.
        """
        resolved = self._resolve(point)
        if resolved.rejected is not None:
            self.rejections[resolved.rejected.rule] += 1
            return resolved.rejected
        if resolved.key in self._known:
            return None
        spec = self._handed[resolved.key] = self._spec(point, resolved)
        return spec

    def next_planned(self, next_place: NextPlace) -> TrialSpec:
        """Takes one waiting trial out of the queue."""
        return self.take(next_place([one.key for one in self.queue]))

    def take(self, place: int) -> TrialSpec:
        """Takes the waiting trial at a place out of the queue."""
        spec = self.queue[place]
        del self.queue[place]
        self._handed[spec.key] = spec
        return spec

    def _spec(self, point: Point, resolved: Resolved) -> TrialSpec:
        if resolved.key not in self._known:
            self._known[resolved.key] = next(self._numbers)
        self._wanted.add(resolved.key)
        number = self._known[resolved.key]
        known = {name: value for name, value in vars(resolved).items() if name != "rejected"}
        return TrialSpec(number=number, point=point, **known)


class PrunedAwareOptunaSearch(OptunaSearch):
    """`OptunaSearch` over a `Space`; see the module docstring."""

    def __init__(
        self,
        *,
        space: Space,
        source: TrialSource,
        ledger: Ledger,
        objectives: Sequence[str],
        sampler: BaseSampler,
        study_name: str,
        storage: BaseStorage,
        next_place: NextPlace,
        prices: Prices,
        admits: Callable[[TrialSpec], bool],
    ) -> None:
        modes = ["max" if direction(name) > 0 else "min" for name in objectives]
        is_one = len(objectives) == 1
        super().__init__(
            space=space.suggest,
            metric=objectives[0] if is_one else list(objectives),
            mode=modes[0] if is_one else modes,
            sampler=sampler,
            study_name=study_name,
            storage=storage,
        )
        self._parameters = space
        self._objectives = tuple(objectives)
        self._source = source
        self._ledger = ledger
        self._next_place = next_place
        self._prices = prices
        self._admits = admits
        self._specs: dict[str, TrialSpec] = {}
        self._reported: set[tuple[int, int]] = set()
        self.failure: Exception | None = None

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return self._ot_study

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's parameters, or `FINISHED`."""
        is_planned = bool(self._source.queue)
        spec = self._ask_planned(trial_id) if is_planned else self._ask_drawn(trial_id)
        if spec is None:
            # The end of a running trial may leave something of the budget after all.
            may_come = self._source.queue and self._completed_trials < set(self._specs)
            return None if may_come else str(Searcher.FINISHED)
        self._specs[trial_id] = spec
        return spec.params()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Gives Optuna proxies as attributes, and the metric at its optimizer step."""
        if trial_id in self._ot_trials and trial_id not in self._completed_trials:
            self.on_row(self._ot_trials[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Records the outcome in the ledger, then in Optuna."""
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        try:
            self._record_end(trial_id, trial, result, error=error)
        except (OSError, StorageInternalError) as failure:
            # Tune logs it as the trial's and goes on; the callback ends the session.
            self.failure = failure
            raise

    def _record_end(
        self, trial_id: str, trial: Trial, result: dict[str, Any] | None, *, error: bool
    ) -> None:
        outcome = outcome_of(result, metric=self._objectives[0], error=error)
        if outcome.state == "complete" and len(self._objectives) > 1:
            outcome = self._with_objectives(outcome, self._specs[trial_id].key)
        # Ledger first: a driver killed in between finds the outcome there and tells Optuna later.
        if outcome.state != "interrupted":
            self._ledger.append("finish", key=self._specs[trial_id].key, **vars(outcome))
        if outcome.state == "pruned" and result is not None:
            # Tune skips `on_trial_result` for the row that stops a trial.
            self.on_row(trial, result)
        self._tell(trial, outcome, dict(result or {}))

    def on_row(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Gives Optuna what one flattened row holds, also of the row that stops a trial."""
        if result.get("stage") == "proxy":
            start = len("proxy/")
            scores = {key[start:]: one for key, one in result.items() if key.startswith("proxy/")}
            for name, score in proxy_attributes(scores).items():
                trial.set_user_attr(name, score)
        # Optuna knows no intermediate values of several objectives.
        value = result.get(self._objectives[0])
        is_row = result.get("stage") == "gr" and len(self._objectives) == 1
        if is_row and value is not None and math.isfinite(value):
            self._report(trial, float(value), step=int(result["global_step"]))

    def _report(self, trial: Trial, value: float, *, step: int) -> None:
        # A training that resumed tells its past again, which Optuna would warn of.
        if (trial.number, step) not in self._reported:
            self._reported.add((trial.number, step))
            trial.report(value, step=step)

    def save(self, checkpoint_path: str) -> None:
        """Writes nothing of value: ledger and Optuna storage are the state, not pickles."""
        Path(checkpoint_path).write_text(json.dumps({"study": self._study_name}))

    def restore(self, checkpoint_path: str) -> None:
        """Refuses: a sweep continues by running the same command."""
        raise NotImplementedError("run the same `forge-ray sweep run` again; it continues")

    def _with_objectives(self, outcome: Outcome, key: str) -> Outcome:
        """Adds the other objectives; a trial that lacks one (no user in a slice) has failed."""
        record = self._ledger.follow().trials[key]
        ended = dataclasses.replace(record, state="complete")
        values = objective_values(ended, self._objectives, self._prices)
        if values is None:
            lacking = [
                name
                for name in self._objectives
                if objective_values(ended, [name], self._prices) is None
            ]
            return Outcome(state="failed", reason=f"{', '.join(lacking)} was not measured")
        return dataclasses.replace(outcome, objectives=values)

    def _ask_planned(self, trial_id: str) -> TrialSpec | None:
        spec = self._first_admitted()
        if spec is None:
            return None
        attributes = _attributes(spec, trial_id)
        trial = begin_trial(self._ot_study, self._parameters, spec.point, attributes)
        self._ot_trials[trial_id] = trial
        return spec

    def _first_admitted(self) -> TrialSpec | None:
        """The next trial in line, or one behind it where that does not fit into the budget."""
        spec = self._source.next_planned(self._next_place)
        if self._admits(spec):
            return spec
        self._source.put_back(spec)
        others = range(1, min(len(self._source.queue), _LOOKED_AT))
        # Asked last, the next in line is what the session's end will name.
        for place in (*others, 0) if others else ():
            if self._admits(self._source.queue[place]):
                return self._source.take(place)
        return None

    def _ask_drawn(self, trial_id: str) -> TrialSpec | None:
        repeats = rejected = 0
        while self._source.may_draw and repeats < _MAX_REPEATS and rejected < _MAX_REJECTED:
            trial = self._ot_study.ask()
            point = self._parameters.suggest(trial)
            try:
                found = self._source.admit(point)
            except ConfigError as error:
                logger.warning("skipped %s: %s", point, error)
                found = Rejection(rule="invalid", reason=str(error))
                self._source.rejections[found.rule] += 1
            if isinstance(found, TrialSpec) and not self._admits(found):
                # Drawn already: it waits like a planned one.
                trial.set_user_attr("reason", "waits for the budget")
                self._ot_study.tell(trial, state=TrialState.FAIL)
                self._source.put_back(found)
                return None
            if isinstance(found, TrialSpec):
                for name, value in _attributes(found, trial_id).items():
                    trial.set_user_attr(name, value)
                self._ot_trials[trial_id] = trial
                return found
            if found is None:
                repeats += 1
                self._ot_study.tell(trial, state=TrialState.FAIL)
            else:
                rejected += 1
                self._tell_rejected(trial, found)
        if self._source.may_draw:
            self._source.end_drawing()
            logger.warning(
                "the sampler has nothing new: %d draws repeated known designs, %d were rejected",
                repeats,
                rejected,
            )
        return None

    def _tell_rejected(self, trial: Trial, rejection: Rejection) -> None:
        """A broken constraint, from which TPE learns; Optuna prunes under one objective only."""
        trial.set_user_attr("reason", rejection.reason)
        trial.set_user_attr("rejected_by", rejection.rule)
        trial.set_constraint(rejection.rule, 1.0)
        is_one = len(self._objectives) == 1
        self._ot_study.tell(trial, state=TrialState.PRUNED if is_one else TrialState.FAIL)

    def _tell(self, trial: Trial, outcome: Outcome, result: Mapping[str, Any]) -> None:
        if outcome.reason:
            trial.set_user_attr("reason", outcome.reason)
        if outcome.pruned_by:
            trial.set_user_attr("pruned_by", outcome.pruned_by)
        seconds = {
            name.split("/", 1)[1]: value
            for name, value in result.items()
            if name.startswith("seconds/")
        }
        trial.set_user_attr("seconds", seconds)
        record = self._ledger.follow().trials.get(trial.user_attrs[KEY])
        if record is not None:
            trial.set_user_attr("cost_usd", round(trial_cost(record, self._prices), 6))
        is_one = len(self._objectives) == 1
        if outcome.state == "complete":
            values = [outcome.value] if is_one else list(outcome.objectives.values())
            self._ot_study.tell(trial, values)
        else:
            # Under several objectives Optuna prunes nothing: its samplers learn from the rest.
            is_pruned = outcome.state == "pruned" and is_one
            self._ot_study.tell(trial, state=TrialState.PRUNED if is_pruned else TrialState.FAIL)


def _attributes(spec: TrialSpec, trial_id: str) -> dict[str, Any]:
    return {
        KEY: spec.key,
        "ray_trial_id": trial_id,
        "number": spec.number,
        "point": spec.point,
        "config": canonical_json(spec.config),
    }
