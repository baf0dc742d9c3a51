from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.sweep import trial
from forge_ray.sweep.limits import GateConfig
from forge_ray.sweep.trial import StageReport, TrialRules

METRIC = "ItemNDCG@10"
PARAMS = {"key": "k" * 64, "config": {}}
RULES = TrialRules(gate=GateConfig(), metric=METRIC)


def test_a_training_tried_again_after_an_outage_keeps_its_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trial, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(trial, "tune", SimpleNamespace(report=told.append))
    tries = iter([OSError("away"), OSError("still away"), None])

    def train(config: Any, sids: str, *, name: str, callbacks: Any) -> StageReport:
        now[0] += 10
        error = next(tries)
        if error is not None:
            raise error
        for callback in callbacks:
            callback.after_report(None, [{"global_step": 10, METRIC: 0.5}], None)
        return StageReport(metrics={"global_step": 10}, artifacts={"model": "model/x"})

    seconds = {"fit": 1.0}
    stages: Any = SimpleNamespace(train=train)
    tokenized = StageReport(artifacts={"sids": "sids/x"})
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            trial._train(PARAMS, tokenized, seconds, stages=stages, rules=RULES)
    trial._train(PARAMS, tokenized, seconds, stages=stages, rules=RULES)
    assert seconds == {"fit": 1.0, "train": 30.0}
    assert [row["seconds"]["train"] for row in told] == [30.0]
