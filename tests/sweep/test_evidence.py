"""Evidence from trial records: groups, seeds, rankings, costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from forge_ray.errors import DataError
from forge_ray.sweep.evidence import designs_of, evidence_of, rank_proxies, seed_spread
from forge_ray.sweep.ledger import TrialRecord
from tests.sweep.records import METRIC, trial


def design(number: int, value: float, *, kind: str = "rq_kmeans", **fields: object) -> TrialRecord:
    point = {"sid.quantizer.kind": kind, "sid.quantizer.levels": number}
    return trial(number, value=value, **{"point": point, **fields})  # type: ignore[arg-type]


def test_second_seeds_are_no_designs() -> None:
    first = design(0, 0.05)
    again = design(1, 0.04, point={**first.point, "sid.seed": 1, "gr.seed": 1})
    other = design(2, 0.03)
    assert designs_of([other, again, first]) == [first, other]
    spread = seed_spread([other, again, first])
    assert spread.values == ((0.05, 0.04),)
    # Half the variance of a difference is the variance of one training.
    assert spread.deviation == pytest.approx(0.01 / math.sqrt(2))
    assert math.isnan(seed_spread([first, other]).deviation)


def test_all_seeds_of_a_design_count() -> None:
    """Three trainings with deviation .01 have two degrees of freedom, the pair one."""
    first = design(0, 0.05)
    more = [
        design(number, value, point={**first.point, "gr.seed": number})
        for number, value in ((1, 0.04), (2, 0.06))
    ]
    pair = [design(3, 0.02), design(4, 0.02, point={**design(3, 0.02).point, "sid.seed": 1})]
    spread = seed_spread([first, *more, *pair])
    assert spread.values == ((0.05, 0.04, 0.06), (0.02, 0.02))
    assert spread.deviation == pytest.approx(math.sqrt(2 * 0.01**2 / 3))


def test_values_that_a_label_shows_alike_are_two_designs() -> None:
    near = [design(number, 0.05, point={"lr": lr}) for number, lr in enumerate((0.12341, 0.12342))]
    assert designs_of(near) == near
    assert math.isnan(seed_spread(near).deviation)


def test_evidence_with_gaps_is_refused() -> None:
    with pytest.raises(DataError, match=r"got 1 others: \[2\]"):
        designs_of([design(0, 0.05), trial(1, state="pruned", pruned_by="gate")])


def test_proxies_are_ranked_within_groups() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.02, 0.06, 12)
    records = [design(number, float(value)) for number, value in enumerate(values)]
    for one in records:
        one.proxies |= {"backoff_bits": 12 - float(one.value or 0), "gini": float(rng.uniform())}
    poor = design(12, 0.001, kind="random")
    poor.proxies |= {"backoff_bits": 20.0, "gini": 0.0}
    found = {(one.group, one.proxy): one for one in rank_proxies([*records, poor])}
    bits = found["without controls", "backoff_bits"]
    assert bits.num_designs == 12
    assert bits.correlation.spearman.value == pytest.approx(1.0)
    assert bits.regret == 0
    # Smaller Gini is better; the control has the best one and the worst value.
    gini = found["all", "gini"]
    expected = spearmanr([-one.proxies["gini"] for one in (*records, poor)], [*values, 0.001])
    assert gini.correlation.spearman.value == pytest.approx(expected.statistic)
    assert gini.regret == pytest.approx(values.max() - 0.001)
    # `uniqueness` is .9 everywhere: nobody has a SID of its own.
    assert not any(one.group.startswith("one item a SID") for one in found.values())
    assert math.isnan(found["all", "uniqueness"].correlation.spearman.value)


def test_costs_are_full_trainings() -> None:
    evidence = evidence_of([design(0, 0.05), design(1, 0.03)], metric=METRIC, max_steps=20)
    one = evidence.designs[0]
    assert one.train_cost == {10: 0.5, 20: 1.0}
    assert evidence.full_cost == 2.0
    assert one.proxy_cost == pytest.approx(3.0 / 34.0)
    assert (one.final, one.error) == (0.05, 0.001)
    assert one.curve == {10: 0.025, 20: 0.05}


def test_a_row_without_a_number_is_no_point_of_the_curve() -> None:
    history = [{"global_step": 10, METRIC: None}, {"global_step": 20, METRIC: 0.05}]
    evidence = evidence_of([design(0, 0.05, history=history)], metric=METRIC, max_steps=20)
    assert evidence.designs[0].curve == {20: 0.05}
