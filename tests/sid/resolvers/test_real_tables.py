"""Published tables of real catalogues: how many items must move is a fact of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forge_ray.sid.quantizers.base import TrainingSet
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.resolvers import RandomCapConfig, SinkhornLastConfig, ZcrConfig, resolve

BEAUTY = "amazon-beauty/sid_indexes/"
# Items minus distinct SIDs: the fewest last codes that any unique table must change.
FEWEST = {
    BEAUTY + "letter_native.npz": 86,
    BEAUTY + "quasid_native.npz": 37,
    BEAUTY + "rkmeans_native.npz": 1574,
    BEAUTY + "rqvae_native.npz": 602,
    "sid-cell-47k/letter_native.npz": 938,
    "sid-cell-47k/rkmeans_native.npz": 8519,
    "sid-cell-47k/rqvae_native.npz": 3995,
}


@pytest.mark.parametrize("name", FEWEST)
def test_a_published_table_becomes_unique_with_the_fewest_changes(
    shared_data: Path, name: str
) -> None:
    with np.load(shared_data / name) as file:
        codes = file["codes"]
    distances = np.random.default_rng(0).random((len(codes), 256), dtype=np.float32)
    distances[np.arange(len(codes)), codes[:, -1]] = 0
    for config in (ZcrConfig(), RandomCapConfig(cap=1, candidates=255)):
        result = resolve(
            config,
            codes,
            (256,) * 4,
            item_ids=np.arange(len(codes)),
            distances=lambda rows: distances[rows],
        )
        assert result.report["moved"] == FEWEST[name]
        assert result.report["distinct_after"] == len(codes)
        assert np.array_equal(result.codes[:, :3], codes[:, :3])


def test_on_a_fit_of_beauty_every_sid_becomes_unique_and_balance_raises_entropy(
    shared_data: Path,
) -> None:
    with np.load(shared_data / "amazon-beauty/item_embeddings_minilm384.npz") as file:
        vectors, ids = file["embedding"].astype(np.float32), file["item_id"]
    quantizer = RqKmeansConfig(levels=3, codebook_size=256, iterations=5).build(384, seed=0)
    quantizer.fit(TrainingSet(vectors))
    codes = quantizer.encode(vectors)
    entropy = {"raw": last_entropy(codes)}
    for config in (ZcrConfig(), SinkhornLastConfig()):
        result = resolve(
            config,
            codes,
            (256,) * 3,
            item_ids=ids,
            distances=lambda rows: quantizer.last_level_distances(vectors[rows]),
        )
        assert result.report["distinct_after"] == len(codes) > result.report["distinct_before"]
        assert np.array_equal(result.codes[:, :2], codes[:, :2])
        entropy[config.kind] = last_entropy(result.codes)
    assert entropy["sinkhorn_last"] > entropy["raw"] + 0.2


def last_entropy(codes: np.ndarray) -> float:
    share = np.bincount(codes[:, -1], minlength=256) / len(codes)
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())
