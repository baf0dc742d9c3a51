"""markov_backoff: scores equal the probe's probabilities, item by item."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset
from forge_ray.errors import ConfigError
from forge_ray.gr import markov
from forge_ray.gr.markov import MarkovBackoff, MarkovConfig, fit_markov
from forge_ray.sid.metrics.backoff import Transitions, count_transitions, probe_rows
from forge_ray.sid.table import SidTable
from tests.evaluate.datasets import topic_dataset
from tests.gr.datasets import tiny_dataset


def topic_table(num_items: int) -> SidTable:
    """The first code is the topic; the rest is drawn, so that some items share a SID."""
    rng = np.random.default_rng(0)
    rest = rng.integers(0, (5, 4), size=(num_items, 2))
    codes = np.column_stack([np.arange(num_items) % 10, rest])
    return SidTable.from_codes(codes, (10, 5, 4))


@pytest.fixture
def dataset(store: ArtifactStore) -> Dataset:
    return topic_dataset(store, num_items=120, num_users=300)


def fitted(dataset: Dataset, top_k: int = 120, **settings: float) -> MarkovBackoff:
    table = topic_table(dataset.num_items)
    return fit_markov(dataset, table, MarkovConfig(**settings), top_k=top_k)


def test_scores_are_the_probabilities_of_the_probe(dataset: Dataset) -> None:
    search = fitted(dataset)
    rows = [[3, 13, 20], [7], [], [1, 2, 3, 4, 5, 6, 7, 8]]
    decoded = search.decode(Ragged.from_lists(rows, dtype=np.int32))
    everything = Ragged.from_lists([np.arange(120)], dtype=np.int32)
    for user, history in enumerate(rows):
        one = probe_rows(Ragged.from_lists([history], dtype=np.int32), everything)
        wanted = search.model.factors(one) @ search.mixture
        ranks = decoded.sid_rank[user]
        assert sorted(ranks) == list(range(search.model.prefixes.counts[-1]))
        by_sid = np.empty(len(ranks))
        by_sid[ranks] = np.exp(decoded.scores[user])
        assert by_sid[search.item_rank()] == pytest.approx(wanted, rel=1e-4)
        assert (np.diff(decoded.scores[user]) <= 0).all()
    assert decoded.num_invalid == 0


def test_short_rankings_are_the_head_of_long_ones(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = Ragged.from_lists([[3, 13], [7, 8]], dtype=np.int32)
    whole = fitted(dataset).decode(histories)
    monkeypatch.setattr(markov, "_BLOCK_CELLS", 1)
    short = fitted(dataset, top_k=5).decode(histories)
    # Two more than asked for: as many as a history may take out.
    assert short.sid_rank.shape == (2, 7)
    np.testing.assert_array_equal(short.sid_rank, whole.sid_rank[:, :7])
    np.testing.assert_allclose(short.scores, whole.scores[:, :7], rtol=1e-6)


@pytest.mark.parametrize(
    "change", [{"window": 1}, {"decay": 0.1}, {"history": 1}, {"em_steps": 1}, {"fit_users": 20}]
)
def test_every_setting_matters(dataset: Dataset, change: dict) -> None:
    histories = Ragged.from_lists([[3, 13, 20], [7, 8, 9]], dtype=np.int32)
    base, other = fitted(dataset).decode(histories), fitted(dataset, **change).decode(histories)
    assert not np.allclose(base.scores, other.scores)


def test_transitions_are_merged_as_they_are_read(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: weakref.WeakSet = weakref.WeakSet()
    most = []

    def counted(*args: Any, **settings: Any) -> Transitions:
        part = count_transitions(*args, **settings)
        held.add(part)
        most.append(len(held))
        return part

    monkeypatch.setattr(Transitions, "__hash__", object.__hash__)
    monkeypatch.setattr(Transitions, "__eq__", object.__eq__)
    monkeypatch.setattr(markov, "count_transitions", counted)
    fit_markov(tiny_dataset(store, num_shards=6), topic_table(200), MarkovConfig(), top_k=5)
    assert len(most) == 6
    # The one that is being added, and the one that is being read.
    assert max(most) <= 2


@pytest.mark.parametrize("change", [{"window": 0}, {"decay": 0.0}, {"fit_users": 0}])
def test_bad_settings_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=r"markov_backoff\."):
        MarkovConfig(**change)
