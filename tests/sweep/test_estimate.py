from __future__ import annotations

from pathlib import Path

import pytest

from forge_ray.sweep.estimate import (
    OTHERS,
    OWN,
    UNKNOWN,
    StageTimes,
    TrialEstimate,
    estimate_lines,
    measure,
    measure_siblings,
)
from forge_ray.sweep.ledger import Ledger, write_json
from forge_ray.sweep.prices import NodePrice, Prices
from forge_ray.sweep.trial import StageReport
from tests.sweep.records import trial

MEANING = {"dataset": "d", "score": {"k": 1}, "evaluation": {"users": 5}}
HELD = StageReport(cpus={"fit": 1.0, "train": 2.0}, gpus={"train": 1.0})
PRICES = Prices(cpu_hour=3600.0, gpu_hour=36000.0)


def config_of(kind: str, *, max_steps: int = 20, width: int = 8) -> dict:
    return {
        "sid": {"quantizer": {"kind": kind}},
        "gr": {"max_steps": max_steps, "model": {"hidden_size": width}},
    }


def record_of(number: int, kind: str, *, fit: float, train: float = 30.0, **fields):
    attempts = [{"fit": fit, "score": 1.0, "train": train, "evaluate": 4.0}]
    return trial(number, value=0.1, config=config_of(kind), attempts=attempts, **fields)


def times(*own, others=()) -> StageTimes:
    measured = measure(own, meaning=MEANING)
    elsewhere = measure(others, meaning=MEANING)
    return StageTimes(measured, elsewhere, meaning=MEANING, max_steps=20)


def by_stage(estimate: TrialEstimate, field: str) -> dict[str, object]:
    return {one.stage: getattr(one, field) for one in estimate.stages}


def test_medians_by_quantizer_and_training_by_the_step() -> None:
    known = times(
        *(record_of(index, "rq_vae", fit=fit) for index, fit in enumerate((10.0, 90.0, 20.0))),
        record_of(3, "fsq", fit=1.0),
    )
    ahead = known.trial(config_of("rq_vae", max_steps=40), held=HELD, prices=PRICES)
    assert by_stage(ahead, "seconds") == {"fit": 20.0, "score": 1.0, "train": 60.0, "evaluate": 4.0}
    assert by_stage(ahead, "cost_usd")["train"] == pytest.approx(60 * (2 + 10))
    assert by_stage(ahead, "num") == {"fit": 3, "score": 4, "train": 4, "evaluate": 4}
    assert ahead.is_known
    assert ahead.whole_usd(36.0) == pytest.approx(ahead.cost_usd + ahead.seconds / 100)
    other = known.trial(config_of("opq"), held=HELD, prices=PRICES)
    assert by_stage(other, "source")["fit"] == "this sweep, other designs"


def test_nothing_measured_stays_unknown() -> None:
    ahead = times().trial(config_of("fsq"), held=HELD, prices=PRICES)
    assert by_stage(ahead, "seconds") == dict.fromkeys(("fit", "score", "train", "evaluate"))
    assert set(by_stage(ahead, "source").values()) == {UNKNOWN}
    assert (ahead.is_known, ahead.seconds, ahead.cost_usd) == (False, 0.0, 0.0)
    assert estimate_lines([ahead]) == [
        "no measured time of fit, score, train, evaluate yet: the first trials will tell"
    ]
    assert estimate_lines([]) == []


def test_other_sweeps_count_for_the_same_work_only() -> None:
    known = times(others=[record_of(0, "fsq", fit=7.0)])
    ahead = known.trial(config_of("fsq", width=16), held=HELD, prices=PRICES)
    assert by_stage(ahead, "source") == {
        "fit": OTHERS,
        "score": OTHERS,
        "train": UNKNOWN,
        "evaluate": UNKNOWN,
    }
    same = times(record_of(0, "fsq", fit=2.0), others=[record_of(0, "fsq", fit=7.0)])
    ahead = same.trial(config_of("fsq"), held=HELD, prices=PRICES)
    assert by_stage(ahead, "source")["fit"] == OWN
    assert by_stage(ahead, "seconds")["fit"] == 2.0


def test_what_the_store_answered_measures_nothing() -> None:
    reused = record_of(0, "fsq", fit=0.1, cached=["fit"])
    cut = trial(1, state="running", history=[], proxies={}, attempts=[{"fit": 3.0}])
    assert {one.stage for one in measure([reused, cut], meaning=MEANING)} == {
        "score",
        "train",
        "evaluate",
    }


def test_a_fit_before_the_start_is_measured_where_it_ran() -> None:
    spot = {"zone": "spot"}
    record = record_of(0, "fsq", fit=0.2, prior={"fit": 60.0}, prior_places={"fit": spot})
    (found,) = [one for one in measure([record], meaning=MEANING) if one.stage == "fit"]
    assert (found.seconds, found.labels) == (60.2, spot)


def test_a_resumed_trial_has_less_ahead() -> None:
    whole = record_of(0, "fsq", fit=2.0)
    half = record_of(1, "fsq", fit=2.0, state="running", history=[{"global_step": 15}])
    ahead = times(whole).trial(config_of("fsq"), held=HELD, prices=PRICES, record=half)
    assert by_stage(ahead, "seconds") == {"train": 7.5, "evaluate": 4.0}


def test_the_price_is_that_of_where_it_ran() -> None:
    labels = {"zone": "spot"}
    prices = Prices(cpu_hour=3600.0, nodes={"s": NodePrice(hour=360.0, cpus=1, labels=labels)})
    known = times(record_of(0, "fsq", fit=10.0, places=[{"fit": labels}]))
    ahead = known.trial(config_of("fsq"), held=HELD, prices=prices)
    assert by_stage(ahead, "cost_usd")["fit"] == pytest.approx(1.0)


def test_siblings_on_the_same_dataset_are_read(tmp_path: Path) -> None:
    for name, dataset in (("own", "d"), ("same", "d"), ("other", "e")):
        write_json(tmp_path / name / "identity.json", {**MEANING, "dataset": dataset})
        ledger = Ledger(tmp_path / name)
        ledger.append("start", key="k", number=0, point={}, config=config_of("fsq"))
        row = {"key": "k", "stage": "proxy", "metrics": {"gini": 0.1}, "seconds": {"fit": 5.0}}
        ledger.append("row", **row)
    found = measure_siblings(tmp_path / "own", dataset_key="d", identity_file="identity.json")
    assert [(one.stage, one.group, one.seconds) for one in found] == [("fit", "fsq", 5.0)]
