"""The sweep's memory: an append-only log of events, folded into one record per trial.

`ledger.jsonl` is the truth: each line is written whole and synced, so a killed driver loses nothing
it acted on, and at most the last line is cut. `trials/<number>-<key12>.json` repeats each finished
record for people. One driver writes at a time (`SweepLock`); anyone may read.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Literal

from forge_ray.errors import ConfigError

logger = logging.getLogger(__name__)

State = Literal["running", "complete", "pruned", "failed"]
Resource = Literal["CPU", "GPU"]
FINISHED: tuple[State, ...] = ("complete", "pruned")
"""States that are never run again. A failed trial is tried again by the next `sweep run`."""

_LOCK_TRIES, _LOCK_PAUSE_S = 10, 0.1


@dataclass(kw_only=True)
class TrialRecord:
    """All that is known of one trial.

    Attributes:
        number: Order of first start, from 0.
        key: Hash of the resolved configuration and the dataset.
        point: Searched values by dotted name.
        config: Resolved configuration (`sid`, `gr`); re-runnable as it is.
        state: `running` also stands for a trial whose driver was killed.
        pruned_by: `gate` or `asha` for a pruned trial.
        reason: Why it was pruned or failed, or why the gate let it pass.
        would_prune: The gate's verdict, also where the trial was let through.
        is_control: Whether the gate let it pass without a look at its proxies.
        proxies: Scores of the SID table.
        history: One row per validation: `global_step`, `loss`, metrics.
        final: Metrics of the final validation row.
        value: Metric of a complete trial.
        facts: What is known of the design before any work: `sid_bits`, `tokens_per_item`.
        objectives: Value of every objective of a complete trial, the metric first; empty where the
            sweep has but one.
        artifacts: References by stage.
        cached: Stages that the store answered at every start: what an earlier start or the scoring
            before it had worked for is none.
        prior: Seconds by stage before the first start, when all designs were scored.
        prior_places: Labels of the node by stage, for those seconds.
        attempts: Seconds by stage, one mapping per start.
        places: Labels of the node by stage, where known, one mapping per start.
        cpus: CPUs by stage, to turn seconds into CPU seconds.
        gpus: GPUs by stage.
        started: Time of the first start, ISO 8601.
        ended: Time of the end, ISO 8601.
    """

    number: int
    key: str
    point: dict[str, Any]
    config: dict[str, Any]
    state: State = "running"
    pruned_by: str = ""
    reason: str = ""
    gate: str = ""
    would_prune: bool = False
    is_control: bool = False
    proxies: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    facts: dict[str, float] = field(default_factory=dict)
    objectives: dict[str, float] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    prior: dict[str, float] = field(default_factory=dict)
    prior_places: dict[str, dict[str, str]] = field(default_factory=dict)
    attempts: list[dict[str, float]] = field(default_factory=list)
    places: list[dict[str, dict[str, str]]] = field(default_factory=list)
    cpus: dict[str, float] = field(default_factory=dict)
    gpus: dict[str, float] = field(default_factory=dict)
    started: str = ""
    ended: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether the trial needs no further work."""
        return self.state in FINISHED

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage over all attempts and before them."""
        total: dict[str, float] = {}
        for attempt in (self.prior, *self.attempts):
            for stage, value in attempt.items():
                total[stage] = total.get(stage, 0.0) + value
        return total

    def place(self, stage: str) -> dict[str, str]:
        """Labels of the node where a stage ran last; empty where none is known."""
        known = (one.get(stage) for one in (*reversed(self.places), self.prior_places))
        return next((labels for labels in known if labels), {})

    def held(self, resource: Resource) -> dict[str, float]:
        """CPU or GPU seconds by stage, over all attempts and before them."""
        units = self.cpus if resource == "CPU" else self.gpus
        return {stage: value * units.get(stage, 0.0) for stage, value in self.seconds.items()}

    @property
    def name(self) -> str:
        """Short name for files and lines: `003-1f2e3d4c5b6a`."""
        return f"{self.number:03d}-{self.key[:12]}"


@dataclass(frozen=True, kw_only=True)
class FinalizeRecord:
    """One use of the test split: the winner and the floors."""

    time: str
    key: str
    number: int
    winner: dict[str, Any]
    floors: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ScoredDesign:
    """A design that was scored ahead of its trial; fields as in `TrialRecord`."""

    key: str
    proxies: dict[str, Any]
    seconds: dict[str, float]
    cpus: dict[str, float]
    gpus: dict[str, float]
    places: dict[str, dict[str, str]] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    time: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepRecords:
    """A ledger folded: trials by key in order of first start, finalizations, the latest plan."""

    trials: dict[str, TrialRecord]
    finalized: list[FinalizeRecord]
    floors: dict[str, dict[str, Any]]
    """Validation metrics of the floors."""
    sessions: int
    scored: dict[str, ScoredDesign] = field(default_factory=dict)
    """Designs that were scored before any trial, by trial key."""
    spans: list[tuple[str, str]] = field(default_factory=list)
    """Times of the first and the last event of each session."""
    planned: int = 0
    """Trials of the whole sweep as the latest session saw it, at most."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions, revision and cluster resources of the latest session."""
    command: tuple[str, ...] = ()
    """Words of the command that started the latest session; empty where none is known."""
    stopped: dict[str, Any] | None = None
    """How the latest session ended at its budget; see `forge_ray.sweep.budget.BudgetState`."""
    dashboard: str = ""
    """Where the Ray of the latest session serves its dashboard; empty where it serves none."""
    id: str = ""
    """Random name of the sweep, by which its studies in a shared storage are known to be its own;
    empty before its first session."""

    def finished(self) -> list[TrialRecord]:
        """Trials that need no further work."""
        return [one for one in self.trials.values() if one.is_finished]

    def unstarted(self) -> list[TrialRecord]:
        """Designs that were scored and have not begun, as trials of no number that used just that.

        Beside `trials`, whatever the sweep has used.
        """
        return [
            TrialRecord(
                number=-1,
                key=key,
                point={},
                config={},
                proxies=one.proxies,
                cached=list(one.cached),
                prior=one.seconds,
                prior_places=one.places,
                cpus=one.cpus,
                gpus=one.gpus,
                started=one.time,
            )
            for key, one in self.scored.items()
            if key not in self.trials
        ]

    def winner(self) -> TrialRecord | None:
        """The complete trial with the best objective; the earlier one where two tie."""
        complete = [one for one in self.trials.values() if one.value is not None]
        done = [one for one in complete if one.state == "complete"]
        return max(done, key=lambda one: (one.value or 0.0, -one.number), default=None)


class Ledger:
    """Appends events to `<folder>/ledger.jsonl` and folds them into records."""

    folder: Path
    _followed: Fold | None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._followed = None

    @property
    def path(self) -> Path:
        """The log file."""
        return self.folder / "ledger.jsonl"

    def append(self, event: str, **fields: Any) -> None:
        """Writes one event; it is on disk when this returns."""
        row = json_ready({"event": event, "time": now(), **fields})
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            # A cut last line (the writer was killed) must not swallow this one.
            if stream.tell() and not _ends_line(self.path):
                stream.write(b"\n")
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        if self._followed is not None:
            self._followed.add(row)

    def read(self) -> SweepRecords:
        """All records so far; an empty ledger gives none."""
        return fold(self._events())

    def follow(self) -> SweepRecords:
        """All records, kept up to date by what this object appends: a driver reads once."""
        if self._followed is None:
            self._followed = Fold()
            for event in self._events():
                self._followed.add(event)
        return self._followed.records()

    def write_trial(self, record: TrialRecord) -> None:
        """Writes one record for people, atomically."""
        content = {**dataclasses.asdict(record), "seconds": record.seconds}
        write_json(self.folder / "trials" / f"{record.name}.json", content)

    def _events(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        # A cut line may end inside a character; only "\n" ends a line (JSON keeps U+2028 as it is).
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                logger.warning(
                    "%s:%d is cut and skipped (the writer was killed)", self.path, number
                )


def fold(events: Iterable[Mapping[str, Any]]) -> SweepRecords:
    """Replays events into records; pure."""
    folding = Fold()
    for event in events:
        folding.add(event)
    return folding.records()


class Fold:
    """Records that grow with each event; `records` shows them as they are at that moment."""

    def __init__(self) -> None:
        self.trials: dict[str, TrialRecord] = {}
        self._finalized: list[FinalizeRecord] = []
        self._floors: dict[str, dict[str, Any]] = {}
        self._scored: dict[str, ScoredDesign] = {}
        self._spans: list[tuple[str, str]] = []
        self._planned = 0
        self._dashboard = ""
        self._environment: dict[str, Any] = {}
        self._command: tuple[str, ...] = ()
        self._stopped: dict[str, Any] | None = None
        self._id = ""

    def add(self, event: Mapping[str, Any]) -> None:
        """Applies one event."""
        kind = event["event"]
        self._note_time(kind, str(event.get("time", "")))
        if kind == "session":
            done = sum(one.is_finished for one in self.trials.values())
            self._planned = done + int(event.get("remaining") or 0)
            self._dashboard = str(event.get("dashboard") or "")
            self._environment = dict(event.get("environment") or {})
            self._command = tuple(event.get("command") or ())
            self._stopped = None
            self._id = str(event.get("id") or self._id)
        elif kind == "budget":
            self._stopped = {name: event[name] for name in ("reason", "next", "left")}
        elif kind == "alive":
            self._add_held(event["held"], event.get("places") or {})
        elif kind == "finalize":
            self._finalized.append(_only(FinalizeRecord, event))
        elif kind == "floors":
            self._floors = dict(event["floors"])
        elif kind == "scored":
            self._scored[event["key"]] = _only(ScoredDesign, event)
        elif kind == "start":
            _fold_start(self.trials, event, self._scored.get(event["key"]))
        elif kind in _FOLDS and event["key"] in self.trials:
            _FOLDS[kind](self.trials[event["key"]], event)

    def _note_time(self, kind: str, at: str) -> None:
        if kind == "session":
            self._spans.append((at, at))
        elif self._spans and kind != "finalize":  # which may come days later
            self._spans[-1] = (self._spans[-1][0], at)

    def _add_held(
        self, held: Mapping[str, Mapping[str, float]], places: Mapping[str, Mapping[str, Any]]
    ) -> None:
        # Of a stage under way; its own row will say it better.
        for key in held.keys() & self.trials.keys():
            self.trials[key].attempts[-1].update(held[key])
            self.trials[key].places[-1].update(places.get(key, {}))

    def records(self) -> SweepRecords:
        """All trials so far; they are shared with this object, which keeps changing them."""
        return SweepRecords(
            trials=self.trials,
            finalized=self._finalized,
            floors=self._floors,
            sessions=len(self._spans),
            scored=self._scored,
            spans=list(self._spans),
            planned=max(self._planned, len(self.trials)),
            environment=self._environment,
            command=self._command,
            dashboard=self._dashboard,
            stopped=self._stopped,
            id=self._id,
        )


def _fold_start(
    trials: dict[str, TrialRecord], event: Mapping[str, Any], scored: ScoredDesign | None
) -> None:
    record = trials.setdefault(event["key"], _only(TrialRecord, event))
    if scored is not None and not record.attempts:
        record.cached = list(scored.cached)
    if scored is not None:
        record.prior, record.prior_places = dict(scored.seconds), dict(scored.places)
        record.cpus.update(scored.cpus)
        record.gpus.update(scored.gpus)
    record.state, record.reason, record.ended = "running", "", ""
    record.started = record.started or event["time"]
    record.attempts.append({})
    record.places.append({})
    # With the start: a training that never reported held them too.
    record.cpus.update(event.get("cpus", {}))
    record.gpus.update(event.get("gpus", {}))


def _fold_row(record: TrialRecord, event: Mapping[str, Any]) -> None:
    stage, metrics = event["stage"], dict(event["metrics"])
    if stage == "proxy":
        record.proxies = metrics
        record.gate = event.get("gate", "")
        record.would_prune = bool(event.get("would_prune", False))
        record.is_control = bool(event.get("is_control", False))
    elif stage == "final":
        record.final = metrics
    else:
        # A resumed training may report a step again: the later row stands.
        kept = [row for row in record.history if row["global_step"] < metrics["global_step"]]
        record.history = [*kept, metrics]
    if record.attempts:
        record.attempts[-1].update(event.get("seconds", {}))
        record.places[-1].update(event.get("places", {}))
    record.cpus.update(event.get("cpus", {}))
    record.gpus.update(event.get("gpus", {}))
    record.artifacts.update(event.get("artifacts", {}))
    if "cached" in event:
        earlier = (record.prior, *record.attempts[:-1])
        record.cached = [
            stage
            for stage in event["cached"]
            if stage in record.cached or not any(stage in one for one in earlier)
        ]


def _fold_finish(record: TrialRecord, event: Mapping[str, Any]) -> None:
    record.state = event["state"]
    record.reason = event.get("reason", "")
    record.pruned_by = event.get("pruned_by", "")
    record.value = event.get("value")
    record.objectives = dict(event.get("objectives") or {})
    record.ended = event["time"]


def _fold_error(record: TrialRecord, event: Mapping[str, Any]) -> None:
    record.reason = event["text"]


_FOLDS = {"row": _fold_row, "finish": _fold_finish, "error": _fold_error}


class SweepLock:
    """Holds a sweep for one driver; the kernel frees it when the driver dies."""

    path: Path

    def __init__(self, folder: Path) -> None:
        self.path = folder / "driver.lock"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock for the block.

        Raises:
            ConfigError: Another driver holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+") as stream:
            if not _acquire(stream):
                raise ConfigError(
                    f"{self.path} must be free, got a driver that is running this sweep. "
                    "Wait for it, or set another name."
                )
            yield

    def is_held(self) -> bool:
        """Whether a driver is alive; needs no right to write."""
        try:
            with self.path.open() as stream:
                # Shared: those who look do not take each other for a driver.
                return not _try_lock(stream, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False


def _acquire(stream: IO[str]) -> bool:
    # Whoever looks holds the lock for an instant (`is_held`); a driver holds it for good.
    for _ in range(_LOCK_TRIES):
        if _try_lock(stream, fcntl.LOCK_EX):
            return True
        time.sleep(_LOCK_PAUSE_S)
    return False


def _try_lock(stream: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def now() -> str:
    """The time, ISO 8601 with time zone."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def json_ready(value: Any) -> Any:
    """A value with JSON types only: arrays and numpy scalars converted, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def write_json(path: Path, content: Any, *, is_plain: bool = False) -> None:
    """Writes a JSON file atomically.

    Args:
        path: Target file.
        content: What to write.
        is_plain: Whether it holds JSON types and finite numbers only, and nobody reads it by eye:
            neither copied nor indented then, which is many times faster.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    if is_plain:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    else:
        text = json.dumps(json_ready(content), indent=2, ensure_ascii=False)
    try:
        partial.write_text(text + "\n")
    except OSError:
        # What a full disk took of it would stay for ever, under a name that nobody asks for again.
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def _only(cls: type[Any], event: Mapping[str, Any]) -> Any:
    names = {one.name for one in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in event.items() if name in names})


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
