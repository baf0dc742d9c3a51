"""OPQ decodes and codes like faiss with the same numbers; RQ-OPQ is residual levels plus OPQ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import pytest

from forge_ray.errors import ConfigError
from forge_ray.sid.quantizers.base import Quantizer, TrainingSet
from forge_ray.sid.quantizers.opq import Opq, OpqConfig, block_slices
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.quantizers.rq_opq import RqOpqConfig
from tests.contracts.quantizer_contract import ResidualContract, clustered_vectors


def error(quantizer: Quantizer, vectors: np.ndarray) -> float:
    decoded = quantizer.decode(quantizer.encode(vectors))
    return float(np.square(decoded - vectors).sum(axis=1).mean())


def correlated_vectors(num_items: int = 2000, dim: int = 16) -> np.ndarray:
    """Gaussian vectors of falling variance in directions that no axis follows, off the origin."""
    rng = np.random.default_rng(5)
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    scaled = rng.normal(size=(num_items, dim)) * np.geomspace(3, 0.1, dim)
    return (scaled @ rotation + 1.5).astype(np.float32)


class TestOpq(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> OpqConfig:
        return OpqConfig(levels=3, sizes=[16, 8, 4], iterations=10, rotations=5)

    def test_the_rotation_is_one(self, fitted: Opq) -> None:
        rotation = fitted.rotation.numpy()
        assert np.allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)

    @pytest.mark.parametrize(
        "change",
        [{"rotations": 0}, {"iterations": 1}, {"init": "k-means++"}, {"max_points_per_code": 5}],
        ids=str,
    )
    def test_every_field_changes_the_result(
        self, change: dict[str, Any], config: OpqConfig, fitted: Opq, vectors: np.ndarray
    ) -> None:
        changed = self.fit(replace(config, **change), vectors).state_dict()
        assert not np.array_equal(changed["codebook.0"], fitted.state_dict()["codebook.0"])


def test_codes_and_vectors_equal_those_of_faiss_with_the_same_numbers() -> None:
    vectors = correlated_vectors()
    quantizer = OpqConfig(levels=4, codebook_size=16, rotations=4).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors))
    assert isinstance(quantizer, Opq)
    rotate = faiss.LinearTransform(16, 16, True)
    faiss.copy_array_to_vector(quantizer.rotation.numpy().T.ravel(), rotate.A)
    shift = -quantizer.mean.numpy() @ quantizer.rotation.numpy()
    faiss.copy_array_to_vector(shift.astype(np.float32), rotate.b)
    rotate.is_trained = True
    product = faiss.ProductQuantizer(16, 4, 4)
    words = [
        book.numpy()[:, block]
        for book, block in zip(quantizer.codebooks, block_slices(16, 4), strict=True)
    ]
    faiss.copy_array_to_vector(np.stack(words).ravel().astype(np.float32), product.centroids)
    rotated = rotate.apply(vectors)
    packed = product.compute_codes(rotated)
    codes = quantizer.encode(vectors)
    assert np.array_equal(codes[:, 0::2] + 16 * codes[:, 1::2], packed)
    rotate.set_is_orthonormal()
    expected = rotate.reverse_transform(product.decode(packed))
    assert np.allclose(quantizer.decode(codes), expected, atol=1e-4)


def test_rotation_beats_plain_product_quantization_and_reaches_that_of_faiss() -> None:
    vectors = correlated_vectors()
    errors = {}
    for rotations in (0, 30):
        quantizer = OpqConfig(levels=4, codebook_size=16, rotations=rotations).build(16, seed=0)
        quantizer.fit(TrainingSet(vectors))
        errors[rotations] = error(quantizer, vectors)
    faiss.omp_set_num_threads(1)
    plain = faiss.ProductQuantizer(16, 4, 4)
    plain.train(vectors)
    unrotated = np.square(plain.decode(plain.compute_codes(vectors)) - vectors).sum(1).mean()
    matrix = faiss.OPQMatrix(16, 4)
    matrix.pq = faiss.ProductQuantizer(16, 4, 4)
    matrix.train(vectors)
    rotated = matrix.apply(vectors)
    product = faiss.ProductQuantizer(16, 4, 4)
    product.train(rotated)
    bare = np.square(product.decode(product.compute_codes(rotated)) - rotated).sum(1).mean()
    assert errors[30] <= 1.001 * errors[0]
    assert errors[30] < 0.8 * unrotated
    assert errors[30] < 1.05 * bare


def test_blocks_cover_every_column_once() -> None:
    widths = [one.stop - one.start for one in block_slices(17, 5)]
    assert widths == [4, 4, 3, 3, 3]
    with pytest.raises(ConfigError, match="blocks must be <= 4"):
        OpqConfig(levels=5).build(4, seed=0)
    with pytest.raises(ConfigError, match="rotations must be >= 0"):
        OpqConfig(rotations=-1)


class TestRqOpq(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> RqOpqConfig:
        return RqOpqConfig(levels=4, sizes=[16, 8, 8, 4], blocks=2, iterations=10, rotations=5)

    def test_first_levels_are_those_of_residual_kmeans(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        plain = self.fit(RqKmeansConfig(levels=2, sizes=[16, 8], iterations=10), vectors)
        assert np.array_equal(fitted.encode(vectors)[:, :2], plain.encode(vectors))

    def test_last_levels_are_opq_of_the_residual(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        codes = fitted.encode(vectors)
        residual = vectors
        for level in (0, 1):
            residual = residual - fitted.codebooks[level].numpy()[codes[:, level]]
        config = OpqConfig(levels=2, sizes=[8, 4], iterations=10, rotations=5)
        product = config.build(16, seed=2)
        product.fit(TrainingSet(residual))
        assert np.array_equal(product.encode(residual), codes[:, 2:])
        prefix = vectors - residual
        expected = prefix + product.decode(codes[:, 2:])
        assert np.allclose(fitted.decode(codes), expected, atol=1e-4)

    @pytest.mark.parametrize(
        "change",
        [
            {"rotations": 0},
            {"iterations": 1},
            {"init": "k-means++"},
            {"max_points_per_code": 10},
            {"blocks": 1},
        ],
        ids=str,
    )
    def test_every_field_changes_the_result(
        self, change: dict[str, Any], config: RqOpqConfig, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        changed = self.fit(replace(config, **change), vectors).state_dict()
        assert not np.array_equal(changed["codebook.3"], fitted.state_dict()["codebook.3"])

    def test_parts_must_both_have_levels(self) -> None:
        with pytest.raises(ConfigError, match="blocks must be in"):
            RqOpqConfig(levels=3, blocks=3)


def test_more_levels_explain_more() -> None:
    vectors = clustered_vectors(1000)
    coarse = RqKmeansConfig(levels=2, codebook_size=16).build(16, seed=0)
    fine = RqOpqConfig(levels=4, codebook_size=16, blocks=2).build(16, seed=0)
    for one in (coarse, fine):
        one.fit(TrainingSet(vectors))
    assert error(fine, vectors) < 0.7 * error(coarse, vectors)
