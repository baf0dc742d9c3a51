"""Finite scalar quantization: grids against a plain loop, and what each variant promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from forge_ray.config import load_config
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.quality import symbol_quality
from forge_ray.sid.quantizers.base import Quantizer, TrainingSet
from forge_ray.sid.quantizers.fsq import FsqConfig, grid_for
from forge_ray.sid.quantizers.fsq_network import Grid
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from tests.contracts.quantizer_contract import (
    QuantizerContract,
    ResidualContract,
    clustered_vectors,
)

SIZES = [16, 8, 4]


class TestChunked(QuantizerContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> FsqConfig:
        return FsqConfig(levels=3, sizes=SIZES, max_steps=120)

    def test_own_code_is_the_first_candidate(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        ranked = fitted.last_level_candidates(vectors, 3)
        assert np.array_equal(ranked[:, 0], fitted.encode(vectors)[:, -1])

    def test_a_level_sees_its_chunk_alone(self, fitted: Quantizer, vectors: np.ndarray) -> None:
        moved = vectors.copy()
        moved[:, 5:10] += 1.5  # the second of three chunks of 16 columns
        before, after = fitted.encode(vectors), fitted.encode(moved)
        assert np.array_equal(before[:, [0, 2]], after[:, [0, 2]])
        assert not np.array_equal(before[:, 1], after[:, 1])


class TestResidual(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> FsqConfig:
        return FsqConfig(variant="residual", levels=3, sizes=SIZES, max_steps=120)

    def test_every_level_brings_the_vector_closer(
        self, fitted: Quantizer, vectors: np.ndarray
    ) -> None:
        codes = fitted.encode(vectors)
        errors = [np.square(fitted.decode(codes[:, :n]) - vectors).mean() for n in range(4)]
        assert errors == sorted(errors, reverse=True)
        assert errors[3] < 0.7 * errors[0]


class TestRqLast(ResidualContract):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> FsqConfig:
        return FsqConfig(variant="rq_last", levels=3, sizes=SIZES, max_steps=120)

    def test_first_levels_are_residual_k_means(self, vectors: np.ndarray) -> None:
        # Standardised vectors of mean 0 and size 1, up to rounding, stay what they are.
        points = vectors - vectors.mean(axis=0)
        points /= np.sqrt(np.square(points).mean())
        ours = self.fit(FsqConfig(variant="rq_last", levels=3, sizes=SIZES), points)
        theirs = self.fit(RqKmeansConfig(levels=3, sizes=SIZES), points)
        assert np.array_equal(ours.encode(points)[:, :2], theirs.encode(points)[:, :2])
        assert ours.codebook_sizes == (16, 8, 4)


@pytest.mark.parametrize("scalars", [(2,), (3, 2), (8, 8, 4), (8, 6, 5), (7, 5, 5)])
def test_a_grid_is_what_a_plain_loop_makes_of_it(scalars: tuple[int, ...]) -> None:
    grid = Grid(scalars)
    rng = np.random.default_rng(0)
    raw = rng.normal(scale=3.0, size=(500, len(scalars))).astype(np.float32)
    values = grid.values(torch.from_numpy(raw)).numpy()
    codes = grid.codes(torch.from_numpy(raw)).numpy()
    for row in range(len(raw)):
        code, basis = 0, 1
        for place, size in enumerate(scalars):
            half = (size - 1) * 1.001 / 2
            offset = 0.5 if size % 2 == 0 else 0.0
            bounded = math.tanh(raw[row, place] + math.atanh(offset / half)) * half - offset
            digit = round(bounded)
            assert values[row, place] == pytest.approx(digit / (size // 2), abs=1e-6)
            code += (digit + size // 2) * basis
            basis *= size
        assert codes[row] == code
    assert len(grid.points()) == math.prod(scalars)
    assert np.allclose(grid.points().numpy()[codes], values, atol=1e-6)


def test_every_value_is_reachable_and_zero_stays_zero() -> None:
    for size in range(2, 9):
        grid = Grid((size,))
        ramp = torch.linspace(-20, 20, 20001)[:, None]
        assert grid.codes(ramp).unique().tolist() == list(range(size))
        assert grid.values(torch.zeros(1, 1)).item() == pytest.approx(0.0, abs=1e-6)


def test_rounding_lets_the_gradient_of_the_bound_through() -> None:
    grid = Grid((8, 5))
    raw = torch.randn(20, 2, requires_grad=True)
    (rounded,) = torch.autograd.grad(grid.values(raw).sum(), raw)
    (bounded,) = torch.autograd.grad((grid.bound(raw) / grid.unit).sum(), raw)
    assert torch.allclose(rounded, bounded)
    assert rounded.abs().sum() > 0


@pytest.mark.parametrize("size", [9, 16, 31, 64, 100, 256, 500, 1024])
def test_a_chosen_grid_is_the_largest_that_fits(size: int) -> None:
    grid = grid_for(size)
    best = max(
        math.prod(one)
        for one in itertools.product(range(3, 9), repeat=len(grid))
        if math.prod(one) <= size
    )
    assert math.prod(grid) == best
    assert 8 ** (len(grid) - 1) < size
    assert all(3 <= scalar <= 8 for scalar in grid)


def test_published_sizes() -> None:
    assert [grid_for(size) for size in (2, 5, 256, 1024, 8192)] == [
        (2,),
        (5,),
        (8, 8, 4),
        (8, 8, 4, 4),
        (8, 8, 8, 4, 4),
    ]
    assert FsqConfig(scalars=[8, 8, 8, 6, 5]).codebook_sizes == (15_360,) * 3
    mixed = FsqConfig(variant="rq_last", scalars=[8, 6, 5], sizes=[32, 16, 99])
    assert mixed.codebook_sizes == (32, 16, 240)


@pytest.mark.parametrize("variant", ["chunked", "residual"])
def test_no_level_collapses(variant: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(6000, 48)).astype(np.float32)
    # Inputs of any size and offset: the grid is used whole.
    vectors = vectors * 0.01 + 3
    config = load_config(
        FsqConfig, values={"variant": variant, "codebook_size": 64, "max_steps": 300}
    )
    quantizer = config.build(48, seed=0)
    quantizer.fit(TrainingSet(vectors))
    report = symbol_quality(quantizer.encode(vectors), quantizer.codebook_sizes)
    assert min(level.used for level in report.levels) > 0.9


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["scalars=[8,1]"], "scalars must be"),
        (["scalars=[8,8]", "sizes=[8,8,8]"], "sizes must be null"),
        (["hidden=[0]"], "hidden must be"),
        (["lr=0"], "lr must be"),
        (["epochs=0"], "epochs must be"),
        (["variant=chunky"], "variant must"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_config(FsqConfig, overrides=overrides)


def test_more_chunks_than_columns_are_refused() -> None:
    with pytest.raises(ConfigError, match="width of the vectors"):
        FsqConfig(levels=5, codebook_size=4).build(4, seed=0)


def test_equal_vectors_do_not_break_fitting() -> None:
    vectors = np.repeat(clustered_vectors(1), 40, axis=0)
    quantizer = FsqConfig(codebook_size=8).build(16, seed=0)
    quantizer.fit(TrainingSet(vectors))
    codes = quantizer.encode(vectors)
    assert len(np.unique(codes, axis=0)) == 1
    assert np.isfinite(quantizer.decode(codes)).all()
