"""Two sweeps at once, on one store and one Optuna storage, two trials at a time in each."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from forge_ray.artifacts import ArtifactStore
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.study import open_storage
from tests.e2e.faults import TinySweep
from tests.tiny_sweep import with_sections

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SHARED = """
space:
  gr.engine.learning_rate: {choice: [0.001, 0.002]}
points: []
sid: {quantizer: {levels: 2, codebook_size: 32}}
gate: {mode: "off"}
max_concurrent: 2
order: planned
"""


def test_a_tokenizer_is_fitted_once_for_all_trials_of_all_sweeps(tmp_path: Path) -> None:
    sweep = TinySweep.make(tmp_path, with_sections(SHARED))
    storage = f"storage=sqlite:///{tmp_path / 'optuna.db'}"
    # The second generates the same data again: both prepare, and ask for, the same dataset.
    drivers = [sweep.start(f"name={name}", storage) for name in ("one", "two")]
    for driver in drivers:
        sweep.finish(driver)
    store = ArtifactStore(tmp_path / "store")
    assert [len(store.manifests(kind)) for kind in ("dataset", "quantizer", "sids")] == [1, 1, 1]
    found = [Ledger(tmp_path / "store" / "sweeps" / name).read() for name in ("one", "two")]
    trials = [one for records in found for one in records.trials.values()]
    assert [one.state for one in trials] == ["complete"] * 4
    # One of the four fitted it; two of them trained each of the two models.
    assert sum("fit" not in one.cached for one in trials) == 1
    assert len(store.manifests("model")) == 2
    assert sum("train" not in one.cached for one in trials) == 2
    opened = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}", tmp_path)
    studies = [
        optuna.load_study(study_name=name, storage=opened)
        for name in optuna.get_all_study_names(opened)
    ]
    assert sorted(one.study_name.partition("-")[0] for one in studies) == ["one", "two"]
    for study in studies:
        assert [one.state for one in study.trials] == [TrialState.COMPLETE] * 2
