"""Diversity, Hamming margins and reconstruction equal plain loops; equal groups are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment.batch import KnownPairs
from forge_ray.sid.alignment.diversity import CodeDiversity, DiversityConfig
from forge_ray.sid.alignment.equal_groups import equal_assignment, equal_groups
from forge_ray.sid.alignment.hamr import HamrConfig, hamming_margin
from forge_ray.sid.alignment.recon import reconstruction_loss
from tests.sid.alignment import references
from tests.sid.alignment.batches import run_workers

PAPER = HamrConfig(weight=1.0)


def colliding(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(rows, 3, generator=generator, dtype=torch.float64) + 1.0,
        "codes": torch.randint(2, (rows, 3), generator=generator),
        "items": torch.randint(8, (rows,), generator=generator),
    }


def hamr(config: HamrConfig, batch: dict[str, torch.Tensor], **extra: Any) -> torch.Tensor:
    return hamming_margin(config, batch["latents"], batch["codes"], batch["items"], **extra)


@pytest.mark.parametrize("seed", [0, 1])
def test_hamming_margins_equal_a_plain_loop(seed: int) -> None:
    batch = colliding(14, seed)
    known = KnownPairs.of(torch.tensor([0, 5, 2]), torch.tensor([1, 3, 7]), num_items=8)
    expected = references.hamr(
        list(batch["latents"].numpy()),
        batch["codes"].tolist(),
        batch["items"].tolist(),
        {(0, 1), (3, 5), (2, 7)},
    )
    assert expected > 0
    assert hamr(PAPER, batch, known=known).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 2.0},
        {"full_weight": 0.5},
        {"part_weight": 0.5},
        {"full_margin": 0.3},
        {"part_margin": 1.5},
        {"part_distance": 2},
    ],
)
def test_every_field_of_the_margins_changes_the_loss(change: dict[str, float]) -> None:
    batch = colliding(14)
    other = hamr(replace(PAPER, **change), batch)
    assert abs(hamr(PAPER, batch).item() - other.item()) > 1e-4


def test_margins_push_colliding_items_apart_and_leave_related_ones() -> None:
    batch = {
        "latents": torch.tensor([[1.0, 0.1], [1.0, -0.1]], requires_grad=True),
        "codes": torch.zeros(2, 3, dtype=torch.int64),
        "items": torch.tensor([0, 1]),
    }
    torch.autograd.backward(hamr(PAPER, batch))
    step = batch["latents"].detach() - 0.5 * batch["latents"].grad
    before = torch.cosine_similarity(*batch["latents"].detach(), dim=0)
    assert torch.cosine_similarity(*step, dim=0) < before
    known = KnownPairs.of(torch.tensor([1]), torch.tensor([0]), num_items=2)
    assert hamr(PAPER, batch, known=known) == 0
    assert hamr(PAPER, {**batch, "items": torch.tensor([1, 1])}) == 0


@pytest.mark.parametrize("size", [2, 3])
def test_margins_of_workers_together_equal_one_process(size: int) -> None:
    whole, copy = colliding(12), colliding(12)
    for batch in (whole, copy):
        batch["latents"].requires_grad_(True)
    torch.autograd.backward(hamr(PAPER, whole))
    parts = [{name: rows.chunk(size)[rank] for name, rows in copy.items()} for rank in range(size)]
    losses = run_workers(size, lambda rank, gather: hamr(PAPER, parts[rank], gather=gather))
    torch.autograd.backward(torch.stack(losses).mean())
    assert torch.stack(losses).mean().item() == pytest.approx(hamr(PAPER, whole).item())
    assert torch.allclose(copy["latents"].grad, whole["latents"].grad, atol=1e-12)


def random_books(sizes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in sizes]


def test_diversity_equals_a_plain_loop() -> None:
    sizes = (12, 7)
    books = random_books(sizes)
    codes = [torch.randint(size, (20,)) for size in sizes]
    diversity = CodeDiversity(DiversityConfig(weight=0.5, groups=4), sizes)
    diversity.regroup(books, seed=3)
    expected = [
        references.diversity(
            code.tolist(), book.numpy(), diversity.get_buffer(f"group_{i}").tolist()
        )
        for i, (code, book) in enumerate(zip(codes, books, strict=True))
    ]
    assert diversity(codes, books).item() == pytest.approx(0.5 * sum(expected) / 2, abs=1e-10)
    warm = CodeDiversity(DiversityConfig(weight=0.5, groups=4, temperature=2.0), sizes)
    warm.load_state_dict(diversity.state_dict())
    assert warm(codes, books).item() != pytest.approx(diversity(codes, books).item())


def test_groups_of_one_attract_nobody() -> None:
    books = random_books((3,))
    diversity = CodeDiversity(DiversityConfig(weight=1.0, groups=3), (3,))
    diversity.regroup(books, seed=0)
    assert diversity([torch.tensor([0, 1, 2])], books) == 0


def test_diversity_spreads_a_collapsed_codebook() -> None:
    """Rows that all chose one code: others of its group come closer, so they get rows too."""
    # Short codewords: all are about equally likely at first.
    book = (0.1 * random_books((8,))[0]).requires_grad_(True)
    diversity = CodeDiversity(DiversityConfig(weight=1.0, groups=2), (8,))
    diversity.regroup([book], seed=0)
    code = torch.zeros(16, dtype=torch.int64)
    group = diversity.get_buffer("group_0")
    torch.autograd.backward(diversity([code], [book]))
    moved = book.detach() - 0.1 * book.grad
    partners = (group == group[0]) & (torch.arange(8) > 0)
    before, after = ((rows[partners] @ rows[0]).mean() for rows in (book.detach(), moved))
    others = group != group[0]
    away_before, away_after = ((rows[others] @ rows[0]).mean() for rows in (book.detach(), moved))
    assert after > before
    assert away_after < away_before


@pytest.mark.parametrize(("num_points", "num_groups"), [(40, 10), (37, 5), (5, 10), (256, 10)])
def test_groups_have_equal_sizes_and_nearly_the_least_cost(
    num_points: int, num_groups: int
) -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(num_points, 6)) * rng.gamma(1.0, 1.0, size=(num_points, 1))
    groups = equal_groups(points, num_groups, seed=0)
    sizes = np.bincount(groups, minlength=min(num_groups, num_points))
    assert sizes.sum() == num_points
    assert np.ptp(sizes) <= 1
    assert np.array_equal(groups, equal_groups(points, num_groups, seed=0))
    centres = points[: min(num_groups, num_points)]
    costs = np.square(points[:, None] - centres).sum(axis=2)
    found = equal_assignment(costs)
    room = np.bincount(found, minlength=len(centres))
    seats = np.repeat(np.arange(len(centres)), room)
    rows, best = linear_sum_assignment(costs[:, seats])
    least = costs[rows, seats[best]].sum()
    assert costs[np.arange(num_points), found].sum() <= 1.05 * least + 1e-9


def test_equal_groups_find_clusters_that_are_there() -> None:
    rng = np.random.default_rng(1)
    centres = 20 * rng.normal(size=(4, 3))
    truth = np.repeat(np.arange(4), 16)
    groups = equal_groups(centres[truth] + rng.normal(size=(64, 3)), 4, seed=2)
    assert len({(a, b) for a, b in zip(truth.tolist(), groups.tolist(), strict=True)}) == 4


def test_reconstruction_measures_equal_their_formulas() -> None:
    rng = np.random.default_rng(0)
    outputs, inputs = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    ends = torch.from_numpy(outputs), torch.from_numpy(inputs)
    u, x = ([references.unit(row) for row in rows] for rows in (outputs, inputs))
    cosines = [1 - float(a @ b) for a, b in zip(u, x, strict=True)]
    expected = {
        "mse": float(np.mean((outputs - inputs) ** 2)),
        "cosine": sum(cosines) / len(cosines),
        "contrastive": (
            references.info_nce(u, x, scale=10.0) + references.info_nce(x, u, scale=10.0)
        )
        / 2,
    }
    found = {kind: reconstruction_loss(kind, *ends).item() for kind in expected}
    assert found == pytest.approx(expected)
    warm = reconstruction_loss("contrastive", *ends, temperature=1.0)
    assert warm.item() != pytest.approx(expected["contrastive"])


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (HamrConfig, {"full_margin": -1.0}, r"hamr\.full_margin must be >= 0"),
        (HamrConfig, {"part_distance": 0}, r"hamr\.part_distance must be >= 1"),
        (DiversityConfig, {"weight": -1.0}, r"diversity\.weight must be >= 0"),
        (DiversityConfig, {"temperature": 0.0}, r"diversity\.temperature > 0"),
        (DiversityConfig, {"groups": 1}, r"diversity\.groups must be >= 2"),
    ],
)
def test_values_out_of_range_are_refused(
    config: type, fields: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**fields)
