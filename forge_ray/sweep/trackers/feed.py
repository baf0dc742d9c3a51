"""Carries the ledger to trackers, beside the sweep: slow or dead trackers cost it nothing.

A tracker hears of a trial only what stands in the ledger, and the feed notes what it has taken.
What did not arrive, because a server was down or the driver was killed, is sent later: in this
session, or by the next one. Ray's own logger callbacks do not do: they log under
`training_iteration`, begin a new run for a trial that continues, and end the sweep when they fail.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ray.tune import Callback
from ray.tune.experiment import Trial

from forge_ray.sweep.ledger import write_json
from forge_ray.sweep.tail import LedgerTail
from forge_ray.sweep.trackers.news import News, Sent, after, news_of

logger = logging.getLogger(__name__)

_POLL_S = 5.0
_RETRY_S, _MAX_RETRY_S = 30.0, 600.0
_CLOSE_S = 60.0


class Tracker(Protocol):
    """A place that trials are reported to; used by one thread."""

    name: str
    """Its name in the sweep file."""
    place: str
    """Where it keeps runs; another place knows nothing of what this one holds."""

    def send(self, news: News) -> str:
        """Takes what is new of a trial; returns the name of its run there."""

    def close(self) -> None:
        """Ends what is open; runs of unfinished trials stay to be continued."""


class TrackerFeed:
    """One tracker, its thread, and what it still has to hear.

    Args:
        tracker: Where to send.
        folder: The sweep's folder.
    """

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        digest = hashlib.sha256(tracker.place.encode()).hexdigest()
        self._tracker = tracker
        self._path = folder / "trackers" / f"{tracker.name}-{digest[:8]}.json"
        self._tail = LedgerTail(folder)
        self._sent = _load(self._path)
        self._pending: set[str] = set()
        self._failures = 0
        self._retry_at = 0.0
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"tracker-{tracker.name}", daemon=True
        )

    def start(self) -> None:
        """Begins to send."""
        self._thread.start()

    def wake(self) -> None:
        """Says that the ledger grew."""
        self._wake.set()

    def close(self, *, timeout_s: float = _CLOSE_S) -> None:
        """Sends what is left and ends; says what did not arrive in time."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if self._pending or self._thread.is_alive():
            logger.warning(
                "trackers.%s: %d trials have not arrived; the next `sweep run` sends them",
                self._tracker.name,
                len(self._pending),
            )

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.is_set()
            self._poll()
            if self._pending and (is_last or time.monotonic() >= self._retry_at):
                self._try(self._send_pending)
            if not is_last:
                self._wake.wait(_POLL_S)
                self._wake.clear()
        self._try(self._tracker.close)

    def _poll(self) -> None:
        try:
            self._pending |= self._tail.poll()
        except OSError as error:
            # A disk that stays away ends the sweep itself, which says so.
            logger.debug("trackers: the ledger cannot be read now", exc_info=error)

    def _send_pending(self) -> None:
        trials = self._tail.records.trials
        try:
            for key in sorted(self._pending, key=lambda key: trials[key].number):
                sent = self._sent.get(key, Sent())
                news = news_of(trials[key], sent)
                if news is not None:
                    self._sent[key] = after(news, self._tracker.send(news), sent)
                self._pending.discard(key)
        finally:
            content = {key: asdict(sent) for key, sent in self._sent.items()}
            write_json(self._path, content, is_plain=True)

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a client raises, the sweep goes on
            self._note_failure(error)
        else:
            if self._failures and not self._pending:
                logger.info("trackers.%s: works again, all has arrived", self._tracker.name)
                self._failures = 0

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        pause = min(_RETRY_S * 2 ** (self._failures - 1), _MAX_RETRY_S)
        self._retry_at = time.monotonic() + pause
        logger.debug("trackers.%s failed", self._tracker.name, exc_info=error)
        if self._failures == 1:
            text = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning(
                "trackers.%s: cannot write to %s: %s. The sweep goes on and keeps everything; what "
                "is missing there is sent once it works.",
                self._tracker.name,
                self._tracker.place,
                text[0],
            )


class TrackerCallback(Callback):
    """Tune callback that tells the feeds when something happened."""

    def __init__(self, feeds: Sequence[TrackerFeed]) -> None:
        self._feeds = feeds

    def __getstate__(self) -> dict[str, Any]:
        """Without the threads: Tune pickles callbacks, and a sweep never restores its pickles."""
        return {"_feeds": []}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial began."""
        self._wake()

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """A row arrived; the ledger's own callback comes before this one."""
        self._wake()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial ended."""
        self._wake()

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial failed."""
        self._wake()

    def _wake(self) -> None:
        for feed in self._feeds:
            feed.wake()


@contextmanager
def feeding(trackers: Sequence[Tracker], folder: Path) -> Iterator[list[Callback]]:
    """Feeds trackers for the length of a block, also with what earlier sessions could not send.

    Yields:
        Callbacks for the Tuner; none where there is no tracker.
    """
    feeds = [TrackerFeed(one, folder) for one in trackers]
    for feed in feeds:
        feed.start()
    try:
        yield [TrackerCallback(feeds)] if feeds else []
    finally:
        for feed in feeds:
            feed.close()


def _load(path: Path) -> dict[str, Sent]:
    if not path.exists():
        return {}
    return {key: Sent(**sent) for key, sent in json.loads(path.read_text()).items()}
