"""What a sweep asks of its Optuna storage, on any storage: the subclass says which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from forge_ray.errors import ConfigError
from forge_ray.sweep.ledger import Ledger
from forge_ray.sweep.prices import Prices
from forge_ray.sweep.searcher import PrunedAwareOptunaSearch, TrialSource
from forge_ray.sweep.space import parse_space
from forge_ray.sweep.study import (
    KEY,
    Owner,
    adopt_studies,
    check_owner,
    close_unfinished,
    make_sampler,
    open_storage,
    study_name,
)
from tests.sweep.stubs import stub_resolve

METRIC = "ItemNDCG@10"
SPACE = {
    "q": {
        "component": {
            "a": {
                "sizes": {"schedule": {"levels": [2, 3], "first": [64, 16], "ratio": [0.5, 1]}},
                "quality": {"float": [0, 1]},
            },
            "b": {"levels": {"int": [2, 4]}, "quality": {"float": [0, 1]}},
        }
    }
}


class StorageContract:
    """Tests of a storage; the subclass gives the fixture `url`."""

    def test_trials_survive_the_driver(self, url: str, tmp_path: Path) -> None:
        search = make("s", url, tmp_path)
        keys = [search.suggest(f"t{index}")["key"] for index in range(4)]
        finish(search, 0, value=0.5)
        row = {"stage": "gr", "global_step": 10, METRIC: 0.1}
        search.on_trial_complete("t1", {**row, "decision/pruned_by": "asha"})
        assert len(set(keys)) == 4
        # Another driver, another connection.
        storage = open_storage(url, tmp_path)
        assert close_unfinished(storage, "s", {}) == 2
        trials = admitted(load("s", url, tmp_path))
        assert [one.state.name for one in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
        assert (trials[0].value, trials[1].intermediate_values) == (0.5, {10: 0.1})
        assert [one.user_attrs["trial_key"] for one in trials] == keys
        again = make("s", url, tmp_path / "again")
        assert again.suggest("t9") is not None
        assert len(admitted(again.study)) == 5

    def test_sweeps_that_run_together_leave_each_other_alone(
        self, url: str, tmp_path: Path
    ) -> None:
        names = ["a", "a-b", "a-0123abcd"]
        dead = {name: make(name, url, tmp_path / name).suggest("dead")["key"] for name in names}
        start = Barrier(len(names))

        def sweep(name: str) -> list[str]:
            start.wait(timeout=300)
            search = make(name, url, tmp_path / name, num_trials=4)
            keys: list[str] = []
            for index in range(4):
                # Each closes its own leftovers, once, while the others have a trial running.
                closes = names[index : index + 1] == [name]
                if not closes:
                    keys.append(search.suggest(f"t{index}")["key"])
                start.wait(timeout=300)
                if closes:
                    assert close_unfinished(open_storage(url, tmp_path), name, {}) == 1
                start.wait(timeout=300)
                if closes:
                    keys.append(search.suggest(f"t{index}")["key"])
                finish(search, index, value=index / 4)
            return keys

        with ThreadPoolExecutor(len(names)) as pool:
            keys = dict(zip(names, pool.map(sweep, names), strict=True))
        for name in names:
            trials = admitted(load(name, url, tmp_path))
            states = [one.state for one in trials]
            assert states == [TrialState.FAIL, *[TrialState.COMPLETE] * 4]
            assert [one.user_attrs["trial_key"] for one in trials] == [dead[name], *keys[name]]
            assert [one.value for one in trials[1:]] == [index / 4 for index in range(4)]

    def test_only_the_sweep_s_own_leftovers_are_closed(self, url: str, tmp_path: Path) -> None:
        searches = {name: make(name, url, tmp_path / name) for name in ("a", "a-b")}
        for search in searches.values():
            search.suggest("t0")
        assert close_unfinished(open_storage(url, tmp_path), "a", {}) == 1
        states = {name: admitted(load(name, url, tmp_path))[0].state for name in searches}
        assert states == {"a": TrialState.FAIL, "a-b": TrialState.RUNNING}

    def test_two_sweeps_of_one_name_are_told_apart(self, url: str, tmp_path: Path) -> None:
        mine = Owner(id="1", folder="/mine", host="here")
        other = Owner(id="2", folder="/other", host="there")
        storage = open_storage(url, tmp_path)
        make("a", url, tmp_path / "a")
        check_owner(storage, "a", other)  # made by a version that noted none
        adopt_studies(storage, "a", mine)
        adopt_studies(storage, "a", other)
        check_owner(storage, "a", mine)
        check_owner(storage, "a-b", other)
        with pytest.raises(ConfigError, match=r"from /mine on here beside this one, /other\. Set"):
            check_owner(storage, "a", other)

    @pytest.mark.parametrize(
        ("kind", "num_trials", "last", "learns"),
        [
            ("tpe", 24, 10, True),  # the first ten are random
            ("gp", 16, 4, True),  # the first ten are random
            ("nsga2", 48, 16, True),  # generations of 16, of which the first is random
            ("quasi_random", 24, 10, False),  # draws at random here: not everything passes
        ],
    )
    def test_samplers_learn_from_it(
        self, kind: str, num_trials: int, last: int, learns: bool, url: str, tmp_path: Path
    ) -> None:
        """Their last trials are nearer to the optimum than chance, which is .29 away."""
        space = {name: {"float": [0, 1]} for name in "wxyz"}
        search = make(f"s-{kind}", url, tmp_path, kind=kind, num_trials=num_trials, space=space)
        away = []
        for index in range(num_trials):
            params = search.suggest(f"t{index}")
            assert isinstance(params, dict)
            point = json.loads(params["point"])
            away.append(sum(abs(value - 0.3) for value in point.values()) / len(point))
            finish(search, index, value=-away[-1])
        assert len(admitted(search.study)) == num_trials
        assert (sum(away[-last:]) / last < 0.21) is learns


def make(
    name: str,
    url: str,
    folder: Path,
    *,
    kind: str = "tpe",
    num_trials: int = 20,
    space: Mapping[str, Any] = SPACE,
) -> PrunedAwareOptunaSearch:
    """A sweep's searcher on a storage of its own opening."""
    return PrunedAwareOptunaSearch(
        space=parse_space(space),
        source=TrialSource(
            records={},
            planned=(),
            num_trials=num_trials,
            resolve=stub_resolve,
            space=parse_space(space),
        ),
        ledger=Ledger(folder),
        objectives=[METRIC],
        sampler=make_sampler(kind, seed=0),
        study_name=study_name(name, space),
        storage=open_storage(url, folder),
        next_place=lambda waiting: 0,
        admits=lambda spec: True,
        prices=Prices(),
    )


def finish(search: PrunedAwareOptunaSearch, index: int, *, value: float) -> None:
    """Ends a trial as complete."""
    search.on_trial_complete(f"t{index}", {"stage": "final", "global_step": 20, METRIC: value})


def admitted(study: optuna.Study) -> list[FrozenTrial]:
    """The study's trials that became trials of the sweep; repeated draws did not."""
    return [one for one in study.get_trials() if KEY in one.user_attrs]


def load(name: str, url: str, folder: Path) -> optuna.Study:
    """The study as another process would see it."""
    storage = open_storage(url, folder)
    return optuna.load_study(study_name=study_name(name, SPACE), storage=storage)
