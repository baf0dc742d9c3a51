"""Beam search against brute-force scoring of every SID."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forge_ray.errors import ConfigError, TrainingError
from forge_ray.gr.beam import Beams, beam_search, default_widths
from forge_ray.gr.prefix_index import PrefixIndex
from tests.gr.generators import HashGenerator, random_codes, random_histories


def full_widths(index: PrefixIndex) -> list[int]:
    return [level.num_prefixes for level in index.levels]


def brute_force(
    generator: HashGenerator, tokens: Tensor, mask: Tensor, index: PrefixIndex
) -> tuple[Tensor, Tensor]:
    """All SIDs by (score descending, SID ascending): ranks and scores [B, S]."""
    scores = generator.score(tokens, mask, index.sids())
    order = scores.sort(dim=1, descending=True, stable=True)
    return order.indices, order.values


def assert_consistent(beams: Beams, index: PrefixIndex) -> None:
    """Codes, ranks and scores tell the same story, best first, nothing twice."""
    assert torch.equal(index.find(beams.codes), beams.sid_rank)
    assert (beams.sid_rank[beams.is_live] >= 0).all()
    assert (beams.codes[~beams.is_live] == -1).all()
    assert (beams.scores[:, 1:] <= beams.scores[:, :-1]).all()
    for rank, live in zip(beams.sid_rank, beams.is_live, strict=True):
        assert rank[live].unique().numel() == int(live.sum())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    num_items=st.integers(1, 120),
    seed=st.integers(0, 10_000),
)
def test_full_width_equals_brute_force(sizes: list[int], num_items: int, seed: int) -> None:
    index = PrefixIndex.build(random_codes(num_items, sizes, seed=seed), sizes)
    generator = HashGenerator(sizes, seed=seed)
    tokens, mask = random_histories(3, 5, seed=seed)
    beams = beam_search(generator, tokens, mask, index, full_widths(index))
    _, scores = brute_force(generator, tokens, mask, index)
    assert_consistent(beams, index)
    torch.testing.assert_close(beams.scores, scores)
    exact = generator.score(tokens, mask, index.sids()).gather(1, beams.sid_rank)
    torch.testing.assert_close(beams.scores, exact, rtol=0, atol=0)


def test_top_20_of_500_items_is_identical_to_brute_force() -> None:
    sizes = (16, 16, 16)
    index = PrefixIndex.build(random_codes(500, sizes), sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(8, 6)
    beams = beam_search(generator, tokens, mask, index, full_widths(index))
    ranks, _ = brute_force(generator, tokens, mask, index)
    assert torch.equal(beams.sid_rank[:, :20], ranks[:, :20])


def test_narrow_beams_are_exact_prefixwise() -> None:
    """Three prefixes kept, then full width: brute force over the SIDs below those three."""
    sizes = (8, 8, 8)
    index = PrefixIndex.build(random_codes(300, sizes), sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(4, 6)
    kept = beam_search(generator, tokens, mask, _first_level(index), [3])
    beams = beam_search(generator, tokens, mask, index, [3, 64, 300])
    ranks, scores = brute_force(generator, tokens, mask, index)
    sids = index.sids()
    for user in range(4):
        inside = torch.isin(sids[ranks[user], 0], kept.codes[user, :, 0])
        expected = ranks[user][inside]
        assert beams.sid_rank[user][: len(expected)].tolist() == expected.tolist()
        assert not beams.is_live[user, len(expected) :].any()
        torch.testing.assert_close(beams.scores[user][: len(expected)], scores[user][inside])


def test_the_published_widths_of_forge_emit_1200_distinct_sids() -> None:
    """200 beams, then 400, then 1,200 SIDs: those of a wide search below the same prefixes."""
    sizes = (256, 16, 64)
    index = PrefixIndex.build(random_codes(20_000, sizes), sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(3, 6)
    beams = beam_search(generator, tokens, mask, index, [200, 400, 1200])
    assert beams.codes.shape == (3, 1200, 3)
    assert beams.is_live.all()
    assert_consistent(beams, index)
    for user in range(3):
        prefixes = beams.codes[user, :, :2].unique(dim=0)
        assert len(prefixes) <= 400
        assert len(prefixes[:, 0].unique()) <= 200
    narrow = beam_search(generator, tokens, mask, index, [200, 400, 100])
    assert torch.equal(narrow.sid_rank, beams.sid_rank[:, :100])


def _first_level(index: PrefixIndex) -> PrefixIndex:
    return PrefixIndex(index.levels[:1])


def test_equal_scores_are_ordered_by_sid() -> None:
    sizes = (4, 4)
    index = PrefixIndex.build(random_codes(100, sizes), sizes)
    generator = HashGenerator(sizes)
    generator.logits = [torch.zeros_like(table) for table in generator.logits]
    tokens, mask = random_histories(2, 3)
    beams = beam_search(generator, tokens, mask, index, [4, 10])
    assert beams.sid_rank.tolist() == [list(range(10))] * 2


def test_widths_beyond_the_catalogue_leave_short_beams() -> None:
    sizes = (4, 4)
    codes = np.array([[0, 0], [0, 1], [3, 2]])
    index = PrefixIndex.build(codes, sizes)
    tokens, mask = random_histories(5, 3)
    beams = beam_search(HashGenerator(sizes), tokens, mask, index, [50, 10])
    assert beams.codes.shape == (5, 10, 2)
    assert beams.is_live.sum(dim=1).tolist() == [3] * 5
    assert (beams.sid_rank[:, 3:] == -1).all()
    assert_consistent(beams, index)


def test_a_prefix_with_few_children_gives_a_short_beam_for_that_user_only() -> None:
    """With one prefix kept, the user whose best prefix is narrow has fewer beams than the other."""
    sizes = (2, 8)
    index = PrefixIndex.build(np.array([[0, 1]] + [[1, code] for code in range(8)]), sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(40, 4)
    beams = beam_search(generator, tokens, mask, index, [1, 8])
    first = beams.codes[:, 0, 0]
    assert set(first.tolist()) == {0, 1}
    assert torch.equal(beams.is_live.sum(dim=1), torch.where(first == 0, 1, 8))


def test_results_do_not_depend_on_the_batch() -> None:
    sizes = (16, 8, 16)
    index = PrefixIndex.build(random_codes(400, sizes), sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(6, 5)
    together = beam_search(generator, tokens, mask, index, [10, 10, 20])
    for user in range(6):
        row = slice(user, user + 1)
        alone = beam_search(generator, tokens[row], mask[row], index, [10, 10, 20])
        assert torch.equal(alone.sid_rank, together.sid_rank[row])
        assert torch.equal(alone.scores, together.scores[row])


def test_unconstrained_search_filtered_equals_constrained_at_full_width() -> None:
    sizes = (6, 5, 4)
    index = PrefixIndex.build(random_codes(40, sizes), sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(3, 5)
    free = beam_search(generator, tokens, mask, index, [6, 30, 120], constrained=False)
    bound = beam_search(generator, tokens, mask, index, full_widths(index))
    assert free.is_live.all()
    is_owned = free.sid_rank >= 0
    assert (is_owned.sum(dim=1) == index.num_sids).all()
    for user in range(3):
        valid = free.sid_rank[user][is_owned[user]]
        assert torch.equal(valid, bound.sid_rank[user])


def test_scores_are_not_renormalised_over_the_catalogue() -> None:
    sizes = (5, 5)
    codes = random_codes(25, sizes)
    generator = HashGenerator(sizes)
    tokens, mask = random_histories(1, 4)
    whole = PrefixIndex.build(codes, sizes)
    part = PrefixIndex.build(codes[:8], sizes)
    scores = {
        tuple(sid): score
        for sid, score in zip(
            *_listed(beam_search(generator, tokens, mask, whole, [5, 25])), strict=True
        )
    }
    for sid, score in zip(
        *_listed(beam_search(generator, tokens, mask, part, [5, 8])), strict=True
    ):
        assert scores[tuple(sid)] == score


def _listed(beams: Beams) -> tuple[list[list[int]], list[float]]:
    return beams.codes[beams.is_live].tolist(), beams.scores[beams.is_live].tolist()


def test_one_step_per_level_after_the_first() -> None:
    sizes = (4, 4, 4, 4)
    generator = HashGenerator(sizes)
    index = PrefixIndex.build(random_codes(50, sizes), sizes)
    beam_search(generator, *random_histories(2, 3), index, [8] * 4)
    assert generator.num_steps == 3


@pytest.mark.parametrize("widths", [[], [4], [4, 0], [4, 4, 4]])
def test_widths_must_fit_the_levels(widths: list[int]) -> None:
    sizes = (4, 4)
    index = PrefixIndex.build(random_codes(10, sizes), sizes)
    with pytest.raises(ConfigError, match="widths must be 2 integers >= 1"):
        beam_search(HashGenerator(sizes), *random_histories(1, 2), index, widths)


def test_nan_logits_are_an_error_and_not_a_ranking() -> None:
    sizes = (4, 4)
    generator = HashGenerator(sizes)
    generator.logits[1][:] = torch.nan
    index = PrefixIndex.build(random_codes(10, sizes), sizes)
    with pytest.raises(TrainingError, match="logits of level 1 must be finite, got NaN"):
        beam_search(generator, *random_histories(1, 2), index, [4, 4])


def test_default_widths_cover_the_longest_list() -> None:
    assert default_widths(3, max_k=10) == (50, 50, 100)
    assert default_widths(4, max_k=100) == (100, 100, 100, 200)
    assert default_widths(1, max_k=20) == (100,)
