"""Scoring ahead of the trials: inside the budget, past a short outage, and quick to end."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge_ray.sweep import prescore
from forge_ray.sweep.budget import BudgetWatch
from forge_ray.sweep.config import BudgetConfig
from forge_ray.sweep.estimate import Estimator
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.prescore import score_waiting
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.searcher import TrialSpec
from forge_ray.sweep.trial import StageReport
from tests.sweep.stubs import StubStages, stages_run

PRICES = Prices(cpu_hour=3600.0)
DESIGNS = [
    TrialSpec(number=n, key=f"k{n}", point={"n": n}, config={"kind": "a", "n": n}) for n in range(5)
]


@dataclass(frozen=True)
class Away(StubStages):
    """Its storage does not answer the first `tries` times, for design 0."""

    tries: int = 1

    def tokenize(self, config: Mapping[str, Any]) -> StageReport:
        report = super().tokenize(config)
        seen = [one for one in stages_run(Path(self.folder)) if one["config"]["n"] == 0]
        if config["n"] == 0 and len(seen) <= self.tries:
            raise OSError("AWS Error NETWORK_CONNECTION")
        return report


def score(
    ledger: Ledger, stages: StubStages, designs: list[TrialSpec], *, at_once: int = 1, **limits: Any
) -> tuple[dict[str, Any], BudgetWatch]:
    ledger.append("session")
    config = BudgetConfig(prices=PRICES, **limits)
    estimator = Estimator(stages=stages, prices=PRICES, meaning={}, max_steps=30)
    watch = BudgetWatch(ledger=ledger, config=config, estimator=estimator)
    watch._beaten -= 61.0
    scores = score_waiting(
        designs, stages=stages, ledger=ledger, known={}, max_concurrent=at_once, watch=watch
    )
    return scores, watch


def test_no_design_is_begun_beyond_the_budget(tmp_path: Path, caplog) -> None:
    stages = StubStages(str(tmp_path), fit_s=10.0)
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        scores, watch = score(Ledger(tmp_path), stages, DESIGNS, max_cost=25.0)
    assert [*scores] == ["k0", "k1", "k2"]
    assert len(stages_run(tmp_path)) == 3
    assert watch.state().spent_usd == 30.0
    assert "30 of 25 USD are spent; 2 designs stay unscored" in caplog.text
    # The ledger hears of the time that passes, as it does while trials run.
    events = [json.loads(line) for line in Ledger(tmp_path).path.read_text().splitlines()]
    assert [one["event"] for one in events].count("alive") == 1


def test_a_short_outage_is_outlasted(tmp_path: Path, monkeypatch, caplog) -> None:
    patient = functools.partial(prescore.outlast, pauses_s=(0.01, 0.01))
    monkeypatch.setattr(prescore, "outlast", patient)
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        scores, _ = score(Ledger(tmp_path), Away(str(tmp_path)), DESIGNS[:2], at_once=2)
    assert {*scores} == {"k0", "k1"}
    assert "scoring n=0: storage does not answer" in caplog.text


def test_waiting_for_storage_does_not_hold_up_the_end(tmp_path: Path, monkeypatch) -> None:
    ledger = Ledger(tmp_path)
    append = ledger.append

    def interrupted(event: str, **fields: Any) -> None:
        append(event, **fields)
        if event == "scored":
            raise KeyboardInterrupt

    monkeypatch.setattr(ledger, "append", interrupted)
    monkeypatch.setattr(prescore, "outlast", functools.partial(prescore.outlast, pauses_s=(600.0,)))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score(ledger, Away(str(tmp_path), tries=9), DESIGNS[:2], at_once=2)
    assert time.monotonic() - began < 60
