"""Trainings that begin with a published model: on the same SIDs, and across a change of SIDs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.data.stream import StreamConfig
from forge_ray.errors import ConfigError
from forge_ray.gr import initial
from forge_ray.gr.config import GrConfig, InitialConfig
from forge_ray.gr.initial import (
    Speaker,
    initial_generator,
    resolved_initial,
    trained_counts,
    transplant,
)
from forge_ray.gr.models.decoder import DecoderConfig
from forge_ray.gr.models.rq_transformer import RqTransformerConfig
from forge_ray.gr.source import ModelSource
from forge_ray.gr.train import TrainResult, train_generator
from forge_ray.gr.vocab import Vocab
from forge_ray.sid.table import SidTable
from tests.gr.chains import chain_dataset, grid_table
from tests.gr.datasets import tiny_dataset
from tests.gr.test_scoring import publish_model, publish_table

SMALL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
OLD = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.uint16)


def speaker(codes: np.ndarray, sizes: tuple[int, ...], *, seed: int) -> Speaker:
    torch.manual_seed(seed)
    return Speaker(DecoderConfig(dropout=0.0, **SMALL).build(Vocab(sizes)).eval(), codes)


def test_a_new_code_is_the_weighted_mean_of_the_old_ones_of_its_items() -> None:
    # Three levels where there were two, one code more, items regrouped.
    codes = np.array([[0, 2, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1]], dtype=np.uint16)
    old, new = speaker(OLD, (2, 2), seed=0), speaker(codes, (3, 3, 2), seed=1)
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    found = transplant(old, new, is_mapped=True, weights=weights)["table.weight"]
    given, fresh = old.generator.state_dict()["table.weight"], new.generator.table.weight
    # Level 0, code 0: items 0, 1 (old code 0) and 2 (old code 1).
    expected = (3.0 * given[3 + 0] + 5.0 * given[3 + 1]) / 8.0
    assert torch.allclose(found[3 + 0], expected)
    # Level 1, code 2: item 0 alone, whose old second code is 0.
    assert torch.allclose(found[3 + 3 + 2], given[3 + 2 + 0])
    # The third level reads the last one that the old table has: items 0 (code 0) and 1 (code 1).
    expected = (1.0 * given[3 + 2 + 0] + 2.0 * given[3 + 2 + 1]) / 3.0
    assert torch.allclose(found[3 + 6 + 0], expected)
    # A code of no item, and one whose only item weighs nothing, stay fresh; special tokens do not.
    for row in (3 + 2, 3 + 1):
        assert torch.equal(found[row], fresh[row])
    assert torch.equal(found[:3], given[:3])


def test_fresh_codes_keep_everything_else() -> None:
    codes = OLD[::-1].copy()
    old, new = speaker(OLD, (2, 2), seed=0), speaker(codes, (2, 2), seed=1)
    before = {name: one.clone() for name, one in new.generator.state_dict().items()}
    found = transplant(old, new, is_mapped=False, weights=np.ones(4))
    given = old.generator.state_dict()
    for name, one in found.items():
        if name in new.generator.code_tables():
            assert torch.equal(one[-4:], before[name][-4:]), name
        else:
            assert torch.equal(one, given[name]), name


def test_another_architecture_is_refused() -> None:
    old = speaker(OLD, (2, 2), seed=0)
    torch.manual_seed(1)
    wider = DecoderConfig(dropout=0.0, **{**SMALL, "intermediate_size": 32}).build(Vocab((2, 2)))
    other = RqTransformerConfig(dropout=0.0, **SMALL).build(Vocab((2, 2)))
    for generator in (wider, other):
        with pytest.raises(ConfigError, match=r"initial\.model must have the settings of model"):
            transplant(old, Speaker(generator, OLD), is_mapped=True, weights=np.ones(4))
    with pytest.raises(ConfigError, match=r"initial\.codes must be one of keep, fresh, mapped"):
        InitialConfig(codes="keeps")


@pytest.mark.parametrize("codes", ["keep", "mapped", "fresh"])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_layers": 2}, "num_layers"),
        ({"num_heads": 1}, "num_heads"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"tie_embeddings": True}, "tie_embeddings"),
        ({"family": "llama"}, "family"),
        ({"temperature": 0.5}, "temperature"),
    ],
)
def test_a_model_of_another_build_is_refused_by_the_field(
    store: ArtifactStore, codes: str, changes: dict, field: str
) -> None:
    dataset, table = tiny_dataset(store), SidTable.open(publish_table(store))
    model = publish_model(store, dataset, table)
    given = InitialConfig(model=model.key, codes=codes)
    same = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    free = DecoderConfig(**same, dropout=0.4, label_smoothing=0.1, targets="last")
    assert resolved_initial(given, store, table, free).model == model.key
    with pytest.raises(ConfigError, match=f"model.{field} must be .* as that of initial.model"):
        resolved_initial(given, store, table, DecoderConfig(**{**same, **changes}))


def test_mapped_codes_are_weighted_by_the_old_models_events(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the dataset to be trained on lie in the future."""
    dataset, table = tiny_dataset(store), SidTable.open(publish_table(store))
    later = tiny_dataset(store, num_users=30)
    model = publish_model(store, dataset, table)
    other = SidTable.open(publish_table(store, seed=1))
    seen = {}
    counts = {dataset.key: 7, later.key: 1000}
    monkeypatch.setattr(
        Dataset, "train_counts", lambda self: np.full(self.num_items, counts[self.key])
    )
    monkeypatch.setattr(
        initial,
        "transplant",
        lambda old, new, **rest: seen.update(rest) or new.generator.state_dict(),
    )
    config = GrConfig(
        model=DecoderConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32),
        initial=InitialConfig(model=model.key, codes="mapped"),
    )
    initial_generator(config, store, later, other)
    assert set(seen["weights"]) == {8.0}


def test_events_that_no_row_of_the_old_model_held_weigh_nothing(store: ArtifactStore) -> None:
    """One row a sequence: its newest `max_history` items and the answer, where there is one."""
    dataset, table = tiny_dataset(store), SidTable.open(publish_table(store))
    model = DecoderConfig(
        hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, targets="last"
    )
    config = GrConfig(model=model, max_history=4, data=StreamConfig(targets="last"))
    published = publish_model(store, dataset, table, config)
    users = [row for batch in dataset.sequence_batches("train") for row in batch.items]
    expected = Counter(item for row in users if len(row) > 1 for item in row[-5:].tolist())
    counts = trained_counts(ModelSource.open(store, published.key))
    assert counts.tolist() == [expected[item] for item in range(dataset.num_items)]
    every = publish_model(store, dataset, table)
    assert (trained_counts(ModelSource.open(store, every.key)) == dataset.train_counts()).all()


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_goes_on_from_a_model_also_on_other_sids(
    ray_local: None, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "store")
    dataset = chain_dataset(store)
    shuffled = np.random.default_rng(0).permutation(dataset.num_items)
    tables = [stored(store, grid_table().codes[rows]) for rows in (slice(None), shuffled)]

    def train(name: str, table: SidTable, *overrides: str) -> TrainResult:
        return train_generator(
            load_config(GrConfig, overrides=[*SETTINGS, *overrides]),
            dataset,
            table,
            store=store,
            run_dir=str(tmp_path / "runs"),
            name=name,
        )

    first = train("first", tables[0], "max_steps=60")
    ref = first.artifact.manifest.ref
    kept = train("kept", tables[0], f"initial.model={ref}")
    # It begins where the other ended, not at the log of the codebook sizes.
    assert abs(kept.losses[0] - first.losses[-5:].mean()) < 0.15
    assert kept.losses[0] < first.losses[0] - 0.25
    assert kept.artifact.manifest.parents == (dataset.key, tables[0].key, first.artifact.key)
    with pytest.raises(ConfigError, match=r"initial\.codes must be fresh or mapped"):
        train("refused", tables[1], f"initial.model={ref}")
    begun = [f"initial.model={ref}", "initial.codes=mapped"]
    mapped = train("mapped", tables[1], *begun)
    assert np.isfinite(mapped.losses).all()
    assert mapped.artifact.manifest.config["gr"]["initial"] == {
        "model": first.artifact.key,
        "codes": "mapped",
    }


SETTINGS = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.intermediate_size=32",
    "model.dropout=0",
    "engine.global_batch=32",
    "engine.learning_rate=0.01",
    "engine.warmup_steps=1",
    "max_steps=10",
    "validation.every=60",
    "validation.users=20",
    "validation.ks=[10]",
    "validation.aside=false",
]


def stored(store: ArtifactStore, codes: np.ndarray) -> SidTable:
    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        SidTable.from_codes(codes, (10, 12)).save(writer)
        return ArtifactInfo()

    config = {"codes": codes.tolist()}
    return SidTable.open(store.build("sids", "grid", config, produce=produce))
