from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.config import from_mapping
from forge_ray.errors import ConfigError
from forge_ray.sweep.config import ConstraintConfig, SweepConfig
from forge_ray.sweep.halving import AshaConfig
from forge_ray.sweep.resolve import TrialConfig, check_rungs, resolve_point
from forge_ray.sweep.searcher import Resolved
from forge_ray.sweep.sweep import run_sweep

CONFIG = SweepConfig(
    name="x",
    space={"sid.quantizer.kind": {"choice": ["rq_kmeans", "rq_vae"]}},
    sid={"quantizer": {"levels": 2, "codebook_size": 64}},
    gr={"max_steps": 50},
)
DATASET: Any = SimpleNamespace(key="d" * 64, num_items=1000)


def resolve(
    point: dict[str, Any], config: SweepConfig = CONFIG, dataset: Any = DATASET
) -> Resolved:
    return resolve_point(config, point, dataset=dataset)


def test_a_kind_keeps_the_shared_settings() -> None:
    resolved = resolve({"sid.quantizer.kind": "rq_vae"})
    quantizer = resolved.config["sid"]["quantizer"]
    assert (quantizer["kind"], quantizer["levels"], quantizer["codebook_size"]) == ("rq_vae", 2, 64)
    assert resolved.config["gr"]["max_steps"] == 50
    # The stored configuration is complete and re-runnable.
    assert from_mapping(TrialConfig, resolved.config).sid.quantizer.levels == 2


def test_the_key_is_what_is_computed_and_not_where() -> None:
    base = resolve({})
    assert resolve({"gr.cpus_per_worker": 4.0}).key == base.key
    assert resolve({"sid.encode.max_actors": 3}).key == base.key
    assert resolve({"sid.quantizer.kind": "rq_kmeans"}).key == base.key
    assert resolve({"gr.max_steps": 51}).key != base.key
    assert resolve({"sid.seed": 1}).key != base.key
    other = SimpleNamespace(key="e" * 64, num_items=1000)
    assert resolve({}, dataset=other).key != base.key


def test_facts_of_a_design_are_known_before_any_work() -> None:
    assert resolve({}).facts == {"sid_bits": 12.0, "tokens_per_item": 2}
    appended = resolve({"sid.resolver.kind": "extra_token", "sid.quantizer.sizes": [64, 16]})
    assert appended.facts == {"sid_bits": 10.0, "tokens_per_item": 3}
    config = dataclasses.replace(CONFIG, objectives=["ItemNDCG@10", "ItemHit@50/tail"])
    with pytest.raises(ConfigError, match=r"Add 50 to evaluation\.ks"):
        resolve({}, config)


def test_constraints_reject_what_is_searched() -> None:
    config = dataclasses.replace(CONFIG, constraints=ConstraintConfig(max_sid_bits=12))
    assert resolve({}, config).rejected is None
    rejected = resolve({"sid.quantizer.levels": 3}, config).rejected
    assert rejected is not None
    assert (rejected.rule, rejected.reason) == (
        "max_sid_bits",
        "18 bits > constraints.max_sid_bits 12",
    )
    config = dataclasses.replace(CONFIG, constraints=ConstraintConfig(min_sid_bits=12.5))
    rejected = resolve({}, config).rejected
    assert rejected is not None
    assert rejected.rule == "min_sid_bits"
    small = resolve({"sid.quantizer.codebook_size": 16})
    assert small.rejected is not None
    assert (small.rejected.rule, small.rejected.reason) == ("capacity", small.infeasible)
    # Without limits such a design is trained.
    off = dataclasses.replace(CONFIG, gate=dataclasses.replace(CONFIG.gate, mode="off"))
    assert resolve({"sid.quantizer.codebook_size": 16}, off).rejected is None
    with pytest.raises(ConfigError, match="min_sid_bits <= max_sid_bits"):
        ConstraintConfig(min_sid_bits=20, max_sid_bits=10)


def test_too_few_sids_are_known_before_any_work() -> None:
    assert resolve({}).infeasible == ""
    small = resolve({"sid.quantizer.codebook_size": 16})
    assert small.infeasible.startswith("capacity 16 x 16 = 256 SIDs < 1 x 1,000 items")
    relaxed = dataclasses.replace(CONFIG, gate=dataclasses.replace(CONFIG.gate, min_capacity=0.1))
    assert resolve({"sid.quantizer.codebook_size": 16}, relaxed).infeasible == ""


@pytest.mark.parametrize("metric", ["ItemNDCG@50", "ndcg@10"])
def test_a_metric_that_no_row_holds_is_refused(metric: str) -> None:
    with pytest.raises(ConfigError, match=r"metric must be among .*gr\.validation\.ks"):
        resolve({}, dataclasses.replace(CONFIG, metric=metric))
    final = dataclasses.replace(CONFIG.evaluation, ks=[5])
    with pytest.raises(ConfigError, match=r"evaluation\.ks"):
        resolve({}, dataclasses.replace(CONFIG, evaluation=final))


@pytest.mark.parametrize(
    "point",
    [
        {"sid.quantizer.kind": "rq_magic"},
        {"sid.quantizer.epochs": 3},  # not a setting of the default kind
        {"sid.quantizer.levels": "many"},
        {"gr.max_steps": 0},
        {"gr.max_workers": 4},
        {"gr.in_process": True},
        {"gr.validation.exclude_seen": False},  # unlike what ranks the trials in the end
    ],
)
def test_mistakes_are_refused(point: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        resolve(point)


def test_a_history_longer_than_the_places_is_refused() -> None:
    point = {"gr.model.kind": "rq_transformer", "gr.max_history": 64}
    with pytest.raises(ConfigError, match=r"model\.places must be > max_history=64"):
        resolve(point)
    resolve({**point, "gr.model.places": 65})


def test_designs_that_learn_no_next_item_are_refused() -> None:
    point = {"gr.model.kind": "pretrained_decoder", "gr.tasks.item_to_sid": 1}
    resolve(point)
    with pytest.raises(ConfigError, match=r"gr\.tasks\.next_item must be > 0"):
        resolve({**point, "gr.tasks.next_item": 0})


@pytest.mark.parametrize("name", ["gr.max_steps", "gr.validation.every", "gr.validation"])
def test_steps_that_rungs_are_made_of_are_not_searched(name: str) -> None:
    searched = dataclasses.replace(CONFIG, space={name: {"choice": [1, 2]}})
    with pytest.raises(ConfigError, match=f"space must not vary .*got {name}"):
        check_rungs(searched)
    with pytest.raises(ConfigError, match=r"points\[1\] must not vary"):
        check_rungs(dataclasses.replace(CONFIG, points=[{}, {name: 1}]))
    check_rungs(dataclasses.replace(searched, asha=AshaConfig(enabled=False)))
    check_rungs(dataclasses.replace(CONFIG, points=[{"gr.max_history": 5}]))


@pytest.mark.parametrize(("grace", "warns"), [(0, False), (16, True), (17, False), (40, False)])
def test_a_first_rung_before_a_third_is_warned_of(
    grace: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    early = dataclasses.replace(CONFIG, asha=AshaConfig(grace_steps=grace))  # of 50 steps
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        check_rungs(early)
    assert ("a third of gr.max_steps (17), got 16" in caplog.text) is warns
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="forge_ray"):
        check_rungs(dataclasses.replace(CONFIG, asha=AshaConfig(grace_steps=grace, enabled=False)))
    assert not caplog.text


def test_such_a_sweep_ends_before_any_work(tmp_path: Path) -> None:
    searched = dataclasses.replace(CONFIG, space={"gr.max_steps": {"choice": [1, 2]}})
    with pytest.raises(ConfigError, match="once under gr"):
        run_sweep(searched, ArtifactStore(str(tmp_path)))
    assert not list(tmp_path.glob("sweeps/*"))
