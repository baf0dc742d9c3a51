"""The tree is every prefix with its items; a cut-down listing keeps counts, order and its limit."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.sid.prefix_tree import TOP_FACTOR, list_nodes, prefix_tree, typical_words


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    num_items, levels, size = (draw(st.integers(1, top)) for top in (60, 4, 5))
    codes = rng.integers(0, size, size=(num_items, levels)).astype(np.uint16)
    return codes, rng.integers(0, 4, size=num_items)


@given(tables())
def test_layers_count_prefixes_as_a_plain_loop_does(table: tuple[np.ndarray, np.ndarray]) -> None:
    codes, priority = table
    tree = prefix_tree(codes, priority)
    assert sorted(tree.order.tolist()) == list(range(len(codes)))
    parents = [()]
    for depth, layer in enumerate(tree.layers, start=1):
        counted = Counter(tuple(row) for row in codes[:, :depth].tolist())
        prefixes = sorted(counted)
        assert layer.codes.tolist() == [prefix[-1] for prefix in prefixes]
        assert layer.counts.tolist() == [counted[prefix] for prefix in prefixes]
        assert [parents[place] for place in layer.parents] == [one[:-1] for one in prefixes]
        for node, prefix in enumerate(prefixes):
            start = layer.starts[node]
            inside = tree.order[start : start + layer.counts[node]]
            assert (codes[inside, :depth] == prefix).all()
            siblings = [one for one in prefixes if one[:-1] == prefix[:-1]]
            ranked = sorted(siblings, key=lambda one: (-counted[one], one))
            assert ranked.index(prefix) == layer.ranks[node]
            if depth == codes.shape[1]:
                assert (np.diff(priority[inside]) <= 0).all()
        parents = prefixes


@given(tables(), st.integers(4, 70))
def test_a_listing_keeps_its_limit_and_its_ancestors(
    table: tuple[np.ndarray, np.ndarray], limit: int
) -> None:
    codes, priority = table
    tree = prefix_tree(codes, priority)
    listing = list_nodes(tree, limit)
    assert len(listing.items) <= limit
    assert len(set(listing.items.tolist())) == len(listing.items)
    if len(codes) <= limit:
        assert len(listing.items) == len(codes)
    leaves = tree.layers[-1]
    place = 0
    for node in listing.nodes[-1]:
        start = leaves.starts[node]
        shown = tree.order[start : start + min(leaves.counts[node], listing.items_per_sid)]
        assert listing.items[place : place + len(shown)].tolist() == shown.tolist()
        place += len(shown)
    assert place == len(listing.items)
    for above, below, layer in zip(listing.nodes, listing.nodes[1:], tree.layers[1:], strict=False):
        assert set(layer.parents[below]) == set(above)
        assert np.unique(layer.parents[below], return_counts=True)[1].max() <= max(
            listing.children_per_node, 1
        )


def test_a_large_table_lists_as_much_as_it_may_and_the_fullest_first() -> None:
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.02, size=(50_000, 3)), 256) - 1
    tree = prefix_tree(codes, np.zeros(len(codes), dtype=np.int64))
    listing = list_nodes(tree, 2_000)
    assert 1_000 < len(listing.items) <= 2_000
    first = tree.layers[0]
    shown = first.counts[listing.nodes[0]]
    assert len(shown) == TOP_FACTOR * listing.children_per_node
    rest = np.delete(first.counts, listing.nodes[0])
    assert shown.min() >= rest.max()


def test_typical_words_are_those_of_the_largest_divergence() -> None:
    titles = ["Red shampoo", "blue SHAMPOO!", "shampoo, red", "red lipstick", "lipstick x 12"]
    groups = np.array([0, 0, 0, 1, 1])
    words = typical_words(titles, groups)
    assert words == {0: ["shampoo", "red"], 1: ["lipstick"]}
    share = {"shampoo": (3, 3 / 3, 3 / 5), "red": (2, 2 / 3, 3 / 5)}
    weights = [n * math.log(inside / overall) for n, inside, overall in share.values()]
    assert weights[0] > weights[1] > 0
    assert typical_words(titles, groups, count=1) == {0: ["shampoo"], 1: ["lipstick"]}


@pytest.mark.parametrize("titles", [["12", "--"], ["", "a b"]])
def test_titles_without_words_have_none(titles: list[str]) -> None:
    assert typical_words(titles, np.zeros(2, dtype=np.int64)) == {}


def test_titles_outside_the_groups_count_overall_only() -> None:
    titles = ["soap bar", "soap dish", "soap", "soap"]
    inside = typical_words(titles, np.array([0, 0, -1, -1]))
    # Every title has "soap": it sets nothing apart. "bar" and "dish" have one title each.
    assert inside == {}
