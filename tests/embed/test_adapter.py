"""The adapter: untrained it is the identity, trained it brings pairs together; side columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch

from forge_ray.embed import side as side_module
from forge_ray.embed.adapter import (
    Adapter,
    AdapterConfig,
    PairSampler,
    pair_loss,
    train_adapter,
)
from forge_ray.embed.side import SideColumn, encode_column
from forge_ray.errors import ConfigError, DataError, TrainingError

SHORT = AdapterConfig(rank=4, steps=60, batch_size=64, learning_rate=1e-2)


def categories(num_items: int = 80, num_values: int = 4) -> SideColumn:
    return encode_column("kind", pa.chunked_array([pa.array(np.arange(num_items) % num_values)]))


def catalogue(num_items: int = 80, num_groups: int = 4) -> tuple[np.ndarray, sp.csr_array]:
    """Vectors that hardly show the groups in which items are bought together."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(num_items, 16)).astype(np.float32)
    group = np.arange(num_items) % num_groups
    vectors[:, :num_groups] += np.eye(num_groups, dtype=np.float32)[group]
    counts = (group[:, None] == group[None]) * (rng.random((num_items, num_items)) < 0.5)
    counts = np.triu(counts, 1)
    return vectors, sp.csr_array((counts + counts.T).astype(np.float64))


def gap(vectors: np.ndarray, num_groups: int = 4) -> float:
    """Mean cosine inside a group minus across groups."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    group = np.arange(len(vectors)) % num_groups
    same = group[:, None] == group[None]
    np.fill_diagonal(same, False)
    return float(similarity[same].mean() - similarity[group[:, None] != group[None]].mean())


def test_before_its_first_step_it_changes_nothing() -> None:
    vectors, _ = catalogue()
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(16, rank=4, side=[categories()], generator=generator)
    assert adapter.apply_to(vectors).tobytes() == vectors.tobytes()
    nothing = sp.csr_array((80, 80), dtype=np.float64)
    untrained = train_adapter(vectors, nothing, SHORT)
    assert untrained.apply_to(vectors).tobytes() == vectors.tobytes()


def test_training_brings_pairs_together_and_repeats() -> None:
    vectors, counts = catalogue()
    losses: list[float] = []
    config = replace(SHORT, rank=16, steps=100, temperature=0.5)

    def report(step: int, metrics: object) -> None:
        losses.append(dict(metrics)["loss"])  # type: ignore[call-overload]

    first = train_adapter(vectors, counts, config, report=report).apply_to(vectors)
    second = train_adapter(vectors, counts, config).apply_to(vectors)
    assert first.tobytes() == second.tobytes()
    assert gap(first) > gap(vectors) + 0.1
    assert losses[-1] < losses[0]
    other = train_adapter(vectors, counts, replace(config, seed=1)).apply_to(vectors)
    assert not np.array_equal(first, other)


def test_a_correction_has_the_asked_rank() -> None:
    vectors, counts = catalogue()
    changed = train_adapter(vectors, counts, replace(SHORT, rank=2)).apply_to(vectors)
    strength = np.linalg.svd(changed - vectors, compute_uv=False)
    assert strength[1] > 1e-3
    assert strength[2] < 1e-4 * strength[0]


def test_side_values_alone_tell_the_groups() -> None:
    vectors, counts = catalogue()
    config = replace(SHORT, rank=0, steps=100)
    adapted = train_adapter(vectors, counts, config, side=[categories()]).apply_to(vectors)
    moved = adapted - vectors
    np.testing.assert_allclose(moved[0], moved[4], atol=1e-5)
    assert np.linalg.norm(moved[0] - moved[1]) > 0.1
    assert gap(adapted) > gap(vectors) + 0.2


def test_several_values_are_averaged_and_none_changes_nothing() -> None:
    lists = pa.chunked_array([pa.array([["a", "b"], ["b"], [], None, ["c"]])])
    column = encode_column("genres", lists)
    assert column.num_values == 3
    assert [row.tolist() for row in column.codes] == [[0, 1], [1], [], [], [2]]
    adapter = Adapter(2, rank=0, side=[column], generator=torch.Generator())
    with torch.no_grad():
        adapter.tables[0].copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0], [1.0, 1.0]]))
    moved = adapter.apply_to(np.zeros((5, 2), dtype=np.float32))
    assert moved.tolist() == [[1, 2], [0, 4], [0, 0], [0, 0], [1, 1]]


def test_missing_values_have_no_code() -> None:
    column = encode_column("brand", pa.chunked_array([["x", None], ["a", "x"]]))
    assert [row.tolist() for row in column.codes] == [[1], [], [0], [1]]
    booleans = encode_column("adult", pa.chunked_array([[True, False, None]]))
    assert [row.tolist() for row in booleans.codes] == [[1], [0], []]


def test_columns_that_are_no_categories_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'price' must hold strings, integers or booleans"):
        encode_column("price", pa.chunked_array([[1.5, 2.5]]))
    monkeypatch.setattr(side_module, "MAX_VALUES", 2)
    with pytest.raises(ConfigError, match="at most 2 distinct values, got 3"):
        encode_column("seller", pa.chunked_array([[1, 2, 3]]))


def test_loss_equals_a_loop() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, 7, 3))
    anchors, positives = np.array([0, 1, 2, 3, 0, 5, 6]), np.array([1, 2, 3, 0, 9, 9, 5])

    def side(own: np.ndarray, other: np.ndarray, query: np.ndarray, key: np.ndarray) -> float:
        total = 0.0
        for i in range(7):
            scores = {}
            for j in range(7):
                if j == i or (key[j] != key[i] and key[j] != query[i]):
                    cosine = own[i] @ other[j] / np.linalg.norm(own[i]) / np.linalg.norm(other[j])
                    scores[j] = cosine / 0.2
            total += np.log(sum(np.exp(s) for s in scores.values())) - scores[i]
        return total / 7

    expected = side(first, second, anchors, positives) + side(second, first, positives, anchors)
    got = pair_loss(
        torch.from_numpy(first), torch.from_numpy(second), anchors, positives, temperature=0.2
    )
    assert float(got) == pytest.approx(expected / 2, abs=1e-12)


def test_pairs_are_drawn_by_their_weight() -> None:
    dense = np.array([[0, 3, 0], [3, 0, 1], [0, 1, 0]], dtype=np.float64)
    anchors, positives = PairSampler.of(sp.csr_array(dense)).draw(20_000, np.random.default_rng(0))
    drawn = np.zeros((3, 3))
    np.add.at(drawn, (anchors, positives), 1 / 20_000)
    np.testing.assert_allclose(drawn, dense / dense.sum(), atol=0.02)


def test_divergence_is_an_error() -> None:
    vectors, counts = catalogue()
    vectors[3] = np.nan
    with pytest.raises(TrainingError, match="loss must be finite"):
        train_adapter(vectors, counts, SHORT)


@pytest.mark.parametrize("change", [{"rank": -1}, {"steps": 0}, {"temperature": 0.0}])
def test_ranges_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"vectors\.adapter\.{next(iter(change))} must be"):
        AdapterConfig(**change)  # type: ignore[arg-type]
