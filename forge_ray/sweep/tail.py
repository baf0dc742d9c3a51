"""Follows a ledger while another process writes it: each look reads only what is new."""

from __future__ import annotations

import json
from pathlib import Path

from forge_ray.sweep.ledger import Fold, Ledger, SweepRecords


class LedgerTail:
    """The records of a sweep, kept up to date by `poll`.

    Args:
        folder: The sweep's folder; its ledger may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._path = Ledger(folder).path
        self._offset = 0
        self._fold = Fold()

    @property
    def records(self) -> SweepRecords:
        """What the last `poll` knew."""
        return self._fold.records()

    def poll(self) -> set[str]:
        """Reads the events that were added; returns the keys of the trials they touch."""
        touched = set()
        for line in self._new_lines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut by a kill; whoever folds the whole ledger says so
            self._fold.add(event)
            touched.add(str(event.get("key", "")))
        return touched & set(self._fold.trials)

    def _new_lines(self) -> list[str]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._offset:  # removed and begun anew
            self._offset, self._fold = 0, Fold()
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            # The last line may be under way: only what a newline ends is there.
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [line for line in whole.decode(errors="replace").split("\n") if line.strip()]
