"""The contract of every quantizer; a new kind inherits this class and names its configuration."""

from __future__ import annotations

import numpy as np
import pytest

from forge_ray.config import from_mapping, to_mapping
from forge_ray.errors import ConfigError, DataError, TrainingError
from forge_ray.sid.quantizers.base import (
    CHUNK_ROWS,
    Quantizer,
    QuantizerConfig,
    TrainingPairs,
    TrainingSet,
)


def clustered_vectors(num_items: int = 400, dim: int = 16, *, seed: int = 0) -> np.ndarray:
    """Vectors around 20 centres, so that codes have something to find."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, dim))
    noise = rng.normal(scale=0.3, size=(num_items, dim))
    return (centres[np.arange(num_items) % 20] + noise).astype(np.float32)


def neighbour_pairs(num_items: int = 400) -> TrainingPairs:
    """Pairs of items of the same centre."""
    anchor = np.arange(num_items - 20)
    return TrainingPairs(anchor, anchor + 20)


def training_set(vectors: np.ndarray) -> TrainingSet:
    """Vectors with their neighbours as co-occurrence pairs."""
    return TrainingSet(vectors, pairs={"co_occurrence": neighbour_pairs(len(vectors))})


class QuantizerContract:
    """What every quantizer promises."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> QuantizerConfig:
        """A configuration that fits in about a second; subclasses override it."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def vectors(cls) -> np.ndarray:
        return clustered_vectors()

    @pytest.fixture(scope="class")
    @classmethod
    def fitted(cls, config: QuantizerConfig, vectors: np.ndarray) -> Quantizer:
        return cls.fit(config, vectors)

    @classmethod
    def fit(cls, config: QuantizerConfig, vectors: np.ndarray, *, seed: int = 0) -> Quantizer:
        quantizer = config.build(vectors.shape[1], seed=seed)
        quantizer.fit(training_set(vectors))
        return quantizer

    def test_shapes_and_ranges(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        codes = fitted.encode(vectors)
        assert codes.shape == (len(vectors), fitted.num_levels)
        assert codes.dtype == np.int64
        assert (codes >= 0).all()
        assert (codes < np.array(fitted.codebook_sizes)).all()
        assert fitted.decode(codes).shape == vectors.shape
        assert fitted.decode(codes).dtype == np.float32
        assert len(fitted.codeword_sum(codes)) == len(vectors)
        assert fitted.encode(vectors[:0]).shape == (0, fitted.num_levels)
        assert fitted.decode(codes[:0]).shape == (0, vectors.shape[1])

    def test_a_seed_fixes_every_code(self, config: QuantizerConfig, vectors: np.ndarray) -> None:
        first, second = self.fit(config, vectors), self.fit(config, vectors)
        for name, value in first.state_dict().items():
            assert np.array_equal(value, second.state_dict()[name]), name
        assert np.array_equal(first.encode(vectors), second.encode(vectors))
        other = self.fit(config, vectors, seed=1)
        assert not np.array_equal(first.encode(vectors), other.encode(vectors))

    def test_saved_state_restores_the_quantizer(
        self, config: QuantizerConfig, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        again = from_mapping(type(config), to_mapping(config))
        loaded = again.build(vectors.shape[1], seed=0)
        loaded.load_state_dict(fitted.state_dict())
        codes = fitted.encode(vectors)
        assert np.array_equal(loaded.encode(vectors), codes)
        assert np.array_equal(loaded.decode(codes), fitted.decode(codes))

    def test_unseen_vectors_get_codes(self, fitted: Quantizer) -> None:
        unseen = clustered_vectors(50, seed=9)
        codes = fitted.encode(unseen)
        assert codes.shape == (50, fitted.num_levels)
        assert np.array_equal(codes, fitted.encode(unseen))

    def test_a_code_depends_on_its_row_alone(self, fitted: Quantizer) -> None:
        vectors = clustered_vectors(CHUNK_ROWS + 100, seed=2)
        whole = fitted.encode(vectors)
        order = np.random.default_rng(0).permutation(len(vectors))
        assert np.array_equal(fitted.encode(vectors[order]), whole[order])
        assert np.array_equal(fitted.encode(vectors[5:9]), whole[5:9])

    def test_prefixes_decode(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        codes = fitted.encode(vectors)
        assert fitted.decode(codes[:, :1]).shape == vectors.shape
        words = fitted.codeword_sum(codes) - fitted.codeword_sum(codes[:, :-1])
        last = fitted.codebooks[-1].numpy()[codes[:, -1]]
        assert np.allclose(words, last, atol=1e-4)

    def test_candidates_are_distinct_last_codes(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        size = fitted.codebook_sizes[-1]
        ranked = fitted.last_level_candidates(vectors[:30], 5)
        assert ranked.shape == (30, min(5, size))
        everything = fitted.last_level_candidates(vectors[:30], 10 * size)
        assert np.array_equal(np.sort(everything, axis=1), np.tile(np.arange(size), (30, 1)))

    def test_distances_rank_the_candidates(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        size = fitted.codebook_sizes[-1]
        distances = fitted.last_level_distances(vectors[:30])
        assert distances.shape == (30, size)
        assert distances.dtype == np.float32
        assert fitted.last_level_distances(vectors[:0]).shape == (0, size)
        ranked = fitted.last_level_candidates(vectors[:30], size)
        assert np.array_equal(np.argsort(distances, axis=1, kind="stable"), ranked)
        alone = fitted.last_level_distances(vectors[7:8])
        assert np.array_equal(alone[0], distances[7])

    def test_vectors_that_must_not_be_written_are_coded(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        frozen = np.tile(vectors, (4, 1))
        before = frozen.copy()
        frozen.flags.writeable = False
        assert np.array_equal(fitted.encode(frozen), fitted.encode(before))
        assert np.array_equal(frozen, before)

    def test_bad_input_is_refused(self, config: QuantizerConfig, fitted: Quantizer) -> None:
        with pytest.raises(DataError, match="vectors must have shape"):
            fitted.encode(np.zeros((3, 5), dtype=np.float32))
        with pytest.raises(ConfigError, match="training vectors"):
            self.fit(config, clustered_vectors(5))
        broken = clustered_vectors()
        broken[3, 2] = np.nan
        with pytest.raises(DataError, match=r"1 rows with NaN or infinity \(first: 3\)"):
            self.fit(config, broken)
        with pytest.raises(TrainingError, match="must be fitted"):
            config.build(16, seed=0).encode(clustered_vectors(5))


class ResidualContract(QuantizerContract):
    """What quantizers that choose the nearest codeword promise on top."""

    def test_own_code_is_the_nearest_candidate(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        ranked = fitted.last_level_candidates(vectors, 3)
        assert np.array_equal(ranked[:, 0], fitted.encode(vectors)[:, -1])

    def test_related_items_share_first_codes(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        first = fitted.encode(vectors)[:, 0]
        related = (first[20:] == first[:-20]).mean()
        unrelated = (first[7:] == first[:-7]).mean()
        assert related > unrelated + 0.2
