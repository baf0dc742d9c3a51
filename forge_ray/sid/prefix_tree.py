"""The prefix tree of a SID table, cut down to what a page can hold, and words that describe nodes.

Knows codes, an order of items and titles; nothing about files or pages. Counts are of all items;
only which nodes and items are listed is limited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int64Array: TypeAlias = npt.NDArray[np.int64]

TOP_FACTOR = 4
"""The first level lists this many times more nodes than deeper ones: it is where reading starts."""
_NO_LIMIT = 2**62


@dataclass(frozen=True, eq=False)
class Layer:
    """All nodes of one depth, in lexicographic order of their prefixes; M nodes."""

    starts: Int64Array
    """int64 [M]: position of the node's first item in `PrefixTree.order`."""
    counts: Int64Array
    """int64 [M]: items under the node."""
    codes: Int64Array
    """int64 [M]: last code of the prefix."""
    parents: Int64Array
    """int64 [M]: node of the layer above; 0 on the first."""
    ranks: Int64Array
    """int64 [M]: 0 for the fullest of its siblings."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Every prefix of a table as nodes by depth. 40 bytes a node, 8 bytes an item."""

    order: Int64Array
    """int64 [N]: items so that those of a node are neighbours; in a SID, highest priority first."""
    layers: tuple[Layer, ...]
    """One per level."""

    @property
    def num_items(self) -> int:
        """Items N."""
        return len(self.order)


def prefix_tree(
    codes: npt.NDArray[np.integer[Any]], priority: npt.NDArray[np.integer[Any]]
) -> PrefixTree:
    """Sort the table once and number its prefixes.

    Args:
        codes: integer codes [N, L], N >= 1.
        priority: integers [N]; items of one SID are listed by descending priority.
    """
    order = np.lexsort((-priority, *codes.T[::-1]))
    is_first = np.zeros(len(order), dtype=bool)
    is_first[0] = True
    above = np.zeros(len(order), dtype=np.int64)
    layers = []
    for level in range(codes.shape[1]):
        column = codes[order, level]
        is_first[1:] |= column[1:] != column[:-1]
        starts = np.flatnonzero(is_first)
        counts = np.diff(starts, append=len(order))
        parents = above[starts]
        layers.append(
            Layer(
                starts,
                counts,
                column[starts].astype(np.int64),
                parents,
                _sibling_ranks(parents, counts),
            )
        )
        above = np.cumsum(is_first, dtype=np.int64) - 1
    return PrefixTree(order, tuple(layers))


@dataclass(frozen=True, eq=False)
class Listing:
    """Which nodes and items are listed."""

    nodes: tuple[Int64Array, ...]
    """For each depth, int64 nodes of that layer, ascending; all ancestors are listed too."""
    items_per_sid: int
    """Most items listed of one SID."""
    items: Int64Array
    """int64 [m]: items under the listed SIDs, SID by SID."""
    children_per_node: int
    """Most nodes listed under one node; `TOP_FACTOR` times as many on the first level."""


def list_nodes(tree: PrefixTree, max_items: int) -> Listing:
    """Choose the fullest nodes so that at most `max_items` items are listed.

    The whole tree when the catalogue is no larger than that. Otherwise every node lists its f
    fullest children and every SID its f first items (the root `TOP_FACTOR`·f), with the largest f
    that keeps the limit.

    Args:
        tree: all prefixes.
        max_items: most items to list, >= 4.
    """
    if tree.num_items <= max_items:
        return _listing(tree, _NO_LIMIT)
    low, high = 1, max_items
    while low < high:
        middle = (low + high + 1) // 2
        nodes = _nodes_within(tree, middle)
        leaves = tree.layers[-1].counts[nodes[-1]]
        if np.minimum(leaves, middle).sum() <= max_items:
            low = middle
        else:
            high = middle - 1
    return _listing(tree, low)


def _listing(tree: PrefixTree, fan: int) -> Listing:
    nodes = _nodes_within(tree, fan)
    leaves = tree.layers[-1]
    shown = np.minimum(leaves.counts[nodes[-1]], fan)
    starts = np.repeat(leaves.starts[nodes[-1]], shown)
    places = np.arange(int(shown.sum())) - np.repeat(np.cumsum(shown) - shown, shown)
    return Listing(nodes, fan, tree.order[starts + places], fan)


def _nodes_within(tree: PrefixTree, fan: int) -> tuple[Int64Array, ...]:
    kept = tree.layers[0].ranks < fan * TOP_FACTOR
    found = [np.flatnonzero(kept)]
    for layer in tree.layers[1:]:
        kept = kept[layer.parents] & (layer.ranks < fan)
        found.append(np.flatnonzero(kept))
    return tuple(found)


def _sibling_ranks(parents: Int64Array, counts: Int64Array) -> Int64Array:
    """Rank of each node among its siblings, fullest first; equal counts by code."""
    order = np.lexsort((-counts, parents))
    first = np.searchsorted(parents, parents)
    ranks = np.empty(len(parents), dtype=np.int64)
    ranks[order] = np.arange(len(parents)) - first[order]
    return ranks


def typical_words(
    titles: Sequence[str], groups: Int64Array, *, count: int = 4
) -> dict[int, list[str]]:
    """Find the words that set the titles of each group apart from all titles.

    A word's weight in a group is `n·log(share in the group / share overall)`, its part of the
    divergence of the two, where n is the number of the group's titles with the word.

    Args:
        titles: n texts.
        groups: int64 [n], the group of each title; negative for none (it still counts overall).
        count: most words per group.

    Returns:
        group → words, weightiest first; groups without a word of at least two titles are missing.
    """
    text = pc.utf8_lower(pa.array(titles, pa.string()))
    text = pc.replace_substring_regex(text, r"[^\p{L}\p{N}]+", " ")
    words = pc.split_pattern(text, " ")
    title = pc.list_parent_indices(words).to_numpy()
    flat = pc.list_flatten(words)
    is_word = pc.match_substring_regex(flat, r"^\p{L}[\p{L}\p{N}]{2,}$").to_numpy(False)
    coded = flat.filter(pa.array(is_word)).dictionary_encode()
    vocabulary = coded.dictionary
    if not len(vocabulary):
        return {}
    pairs = np.unique(np.stack([title[is_word], coded.indices.to_numpy()], axis=1), axis=0)
    overall = np.bincount(pairs[:, 1], minlength=len(vocabulary)) / len(titles)
    pairs[:, 0] = groups[pairs[:, 0]]
    inside = pairs[pairs[:, 0] >= 0]
    found, hits = np.unique(inside, axis=0, return_counts=True)
    sizes = np.bincount(groups[groups >= 0])
    weight = hits * np.log(hits / sizes[found[:, 0]] / overall[found[:, 1]])
    chosen = np.flatnonzero((hits > 1) & (weight > 0))
    chosen = chosen[np.lexsort((-weight[chosen], found[chosen, 0]))]
    group = found[chosen, 0]
    chosen = chosen[np.arange(len(group)) - np.searchsorted(group, group) < count]
    result: dict[int, list[str]] = {}
    names = vocabulary.take(pa.array(found[chosen, 1])).to_pylist()
    for key, name in zip(found[chosen, 0].tolist(), names, strict=True):
        result.setdefault(key, []).append(name)
    return result
