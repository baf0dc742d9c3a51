"""One self-contained HTML file about a SID table: do its codes mean something?

Its size is bounded whatever the catalogue: at most `PAGE_ITEMS` items are listed, counts are of all
items, and what needs vectors is measured on a sample that the page names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.dataset as pads
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from forge_ray.artifacts import ArtifactStore
from forge_ray.data.schema import Dataset
from forge_ray.embed.vectors import open_vectors
from forge_ray.errors import ArtifactError
from forge_ray.sid.levels import PrefixFigures, group_cosine, nearest_rows, prefix_figures
from forge_ray.sid.metrics.quality import symbol_quality
from forge_ray.sid.prefix_tree import Listing, PrefixTree, list_nodes, prefix_tree, typical_words
from forge_ray.sid.storage import SidArtifact
from forge_ray.sweep.ledger import now

Int64Array: TypeAlias = npt.NDArray[np.int64]

PAGE_ITEMS = 20_000
"""Most items listed in the tree; about 130 bytes of page for each."""
SAMPLE_ITEMS = 20_000
"""Most items whose vectors are read."""
WORD_TITLES = 200_000
"""Most titles read to find typical words."""
TITLE_LENGTH = 120
"""Characters of a title that are kept."""
_BINS = 96
_EXAMPLES = 8
_BUCKETS = 12
_BUCKET_TITLES = 5


def write_page(path: Path, sids: SidArtifact, store: ArtifactStore) -> None:
    """Writes the page atomically.

    Args:
        path: Target file.
        sids: The table.
        store: Where its dataset lies; titles, words and reconstruction need it.

    Raises:
        ArtifactError: When the dataset of the table is not in the store.
    """
    text = render_page(sids, store)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def render_page(sids: SidArtifact, store: ArtifactStore) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    environment = Environment(
        loader=PackageLoader("forge_ray", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    environment.filters["thousands"] = lambda value: f"{value:,}"
    return environment.get_template("cli/sid_page.html.j2").render(**page_content(sids, store))


def page_content(sids: SidArtifact, store: ArtifactStore) -> dict[str, Any]:
    """What the template is given; numbers and text only, but for the tree's JSON."""
    found = store.find("dataset", sids.dataset_key)
    if found is None:
        raise ArtifactError(
            f"{store.uri} must hold the dataset {sids.dataset_key[:12]} of "
            f"{sids.artifact.manifest.ref}, got none. Name its store with --store."
        )
    dataset = Dataset(found)
    codes = np.asarray(sids.table.codes)
    tree = prefix_tree(codes, dataset.train_counts())
    listing = list_nodes(tree, PAGE_ITEMS)
    sample = _sample(sids, dataset, store)
    texts = _texts(dataset, _wanted(tree, listing, sample.rows))
    quality = symbol_quality(codes, sids.table.codebook_sizes)
    return {
        "name": sids.artifact.manifest.ref,
        "dataset": dataset.name,
        "written": now(),
        "facts": _facts(sids),
        "command": sids.artifact.manifest.command,
        "quality": quality,
        "r2": sample.figures[-1].r2,
        "levels": _levels(sids, tree),
        "buckets": _buckets(tree),
        "fullest": _fullest(tree, sids, texts),
        "figures": sample.figures,
        "examples": _examples(sids, sample, texts),
        "sample_items": len(sample.rows),
        "listed_items": len(listing.items),
        "listed_nodes": [len(nodes) for nodes in listing.nodes],
        "is_whole": len(listing.items) == tree.num_items,
        "fan": listing.children_per_node,
        "has_titles": texts.has_titles,
        "tree": Markup(_json(_tree_data(tree, listing, texts, sample))),
    }


@dataclass(frozen=True, eq=False)
class _Sample:
    rows: Int64Array
    vectors: npt.NDArray[np.float32]
    decoded: list[npt.NDArray[np.float32]]
    """Of the example items, by depth 1..L."""
    examples: Int64Array
    """Positions of the example items in `rows`."""
    figures: list[PrefixFigures]
    first_code_cosine: dict[int, float]
    """Mean cosine of two sampled items by first code."""


@dataclass(frozen=True, eq=False)
class _Texts:
    """Ids and titles of the items that the page needs, by item index."""

    items: Int64Array
    ids: list[str]
    titles: list[str]
    has_titles: bool

    def label(self, item: int) -> str:
        place = int(np.searchsorted(self.items, item))
        return self.titles[place] or self.ids[place]


def _sample(sids: SidArtifact, dataset: Dataset, store: ArtifactStore) -> _Sample:
    source = open_vectors(sids.config.vectors, dataset, store)
    rng = np.random.default_rng(0)
    count = min(SAMPLE_ITEMS, source.num_items)
    rows = np.sort(rng.choice(source.num_items, size=count, replace=False)).astype(np.int64)
    vectors = source.take(rows)
    codes = np.asarray(sids.table.codes[rows])
    quantizer = sids.load_quantizer()
    popular = np.argsort(-dataset.train_counts()[rows], kind="stable")[: 4 * _EXAMPLES]
    examples = np.sort(rng.permutation(popular)[:_EXAMPLES])
    first = codes[:, 0].astype(np.int64)
    cosine = group_cosine(vectors, first)
    return _Sample(
        rows,
        vectors,
        [quantizer.decode(codes[examples, :depth]) for depth in _depths(quantizer.num_levels)],
        examples,
        prefix_figures(vectors, codes, quantizer),
        {code: float(cosine[code]) for code in np.flatnonzero(~np.isnan(cosine)).tolist()},
    )


def _depths(levels: int) -> range:
    return range(1, levels + 1)


def _wanted(tree: PrefixTree, listing: Listing, sampled: Int64Array) -> npt.NDArray[np.bool_]:
    """Items whose titles are read, bool [N]: the listed, the sampled, and more for the words."""
    wanted = np.zeros(tree.num_items, dtype=bool)
    rest = max(0, WORD_TITLES - len(sampled))
    wanted[np.random.default_rng(1).integers(0, tree.num_items, size=rest)] = True
    if tree.num_items <= WORD_TITLES:
        wanted[:] = True
    wanted[listing.items] = True
    wanted[sampled] = True
    leaves = tree.layers[-1]
    for node in np.argsort(-leaves.counts, kind="stable")[:_BUCKETS].tolist():
        wanted[tree.order[leaves.starts[node] :][:_BUCKET_TITLES]] = True
    return wanted


def _texts(dataset: Dataset, wanted: npt.NDArray[np.bool_]) -> _Texts:
    """Read ids and titles of some items by one pass over the items' shards."""
    files = pads.dataset(
        dataset.artifact.files("items/"), filesystem=dataset.filesystem, format="parquet"
    )
    has_titles = "title" in files.schema.names
    columns = ["item_index", "item_id", *(["title"] if has_titles else [])]
    items, ids, titles = [], [], []
    for batch in files.to_batches(columns=columns):
        index = batch.column("item_index").to_numpy()
        kept = batch.filter(wanted[index])
        items.append(kept.column("item_index").to_numpy().astype(np.int64))
        ids += pc.cast(kept.column("item_id"), "string").to_pylist()
        if has_titles:
            cut = pc.utf8_slice_codeunits(kept.column("title"), 0, TITLE_LENGTH)
            titles += pc.fill_null(cut, "").to_pylist()
    place = np.concatenate(items)
    order = np.argsort(place, kind="stable").tolist()
    titles = titles if has_titles else [""] * len(ids)
    return _Texts(
        place[order], [ids[one] for one in order], [titles[one] for one in order], has_titles
    )


def _facts(sids: SidArtifact) -> list[tuple[str, str]]:
    config = sids.config
    return [
        ("quantizer", config.quantizer.kind),
        ("codebooks", " × ".join(str(size) for size in sids.table.codebook_sizes)),
        ("resolver", sids.table.resolver),
        ("vectors", config.vectors.space),
        ("seed", str(config.seed)),
    ]


def _levels(sids: SidArtifact, tree: PrefixTree) -> list[dict[str, Any]]:
    """Usage of every level as the quantizer gave it, with bars for its histogram."""
    raw = np.asarray(sids.raw.codes)
    quality = symbol_quality(raw, sids.raw.codebook_sizes)
    rows = []
    for level, (usage, size) in enumerate(
        zip(quality.levels, sids.raw.codebook_sizes, strict=True)
    ):
        counts = np.bincount(raw[:, level], minlength=size)
        resolved = tree.layers[level]
        rows.append(
            {
                "level": level + 1,
                "size": size,
                "usage": usage,
                "bars": usage_bars(counts),
                "even": len(raw) / size,
                "top": int(counts.max()),
                "prefixes_after": len(resolved.counts),
                "largest": int(resolved.counts.max()),
            }
        )
    return rows


def usage_bars(counts: npt.NDArray[np.integer[Any]], bins: int = _BINS) -> list[float]:
    """Mean items per code over equal ranges of the codes sorted by descending use.

    Args:
        counts: items per code [K].
        bins: most bars; fewer codes get one bar each.
    """
    ranked = np.sort(counts)[::-1]
    parts = np.array_split(ranked, min(bins, len(ranked)))
    return [float(part.mean()) for part in parts]


def _buckets(tree: PrefixTree) -> list[dict[str, Any]]:
    edges = (1, 2, 3, 4, 5, 10, 20, 50, 100, 1000)
    counts = tree.layers[-1].counts
    rows = []
    for low, high in zip(edges, (*edges[1:], 2**62), strict=True):
        inside = counts[(counts >= low) & (counts < high)]
        if len(inside):
            label = f"{low}" if high == low + 1 else f"{low} to {min(high - 1, int(counts.max()))}"
            rows.append({"label": label, "sids": len(inside), "items": int(inside.sum())})
    return rows


def _fullest(tree: PrefixTree, sids: SidArtifact, texts: _Texts) -> list[dict[str, Any]]:
    leaves = tree.layers[-1]
    rows = []
    for node in np.argsort(-leaves.counts, kind="stable")[:_BUCKETS].tolist():
        if leaves.counts[node] == 1:
            break
        start, count = int(leaves.starts[node]), int(leaves.counts[node])
        items = tree.order[start : start + min(count, _BUCKET_TITLES)].tolist()
        rows.append(
            {
                "sid": "·".join(str(code) for code in sids.table.codes[items[0]].tolist()),
                "count": count,
                "titles": [texts.label(item) for item in items],
                "more": count - len(items),
            }
        )
    return rows


def _examples(sids: SidArtifact, sample: _Sample, texts: _Texts) -> list[dict[str, Any]]:
    """For some items: the sampled item nearest to what each prefix decodes to."""
    near = [sample.rows[nearest_rows(one, sample.vectors)] for one in sample.decoded]
    rows = []
    for place, item in enumerate(sample.rows[sample.examples].tolist()):
        steps = [int(found[place]) for found in near]
        rows.append(
            {
                "title": texts.label(item),
                "codes": sids.table.codes[item].tolist(),
                "steps": [{"title": texts.label(one), "is_self": one == item} for one in steps],
            }
        )
    return rows


def _tree_data(
    tree: PrefixTree, listing: Listing, texts: _Texts, sample: _Sample
) -> dict[str, Any]:
    """Nested lists for the browser: `[code, items, children in all, children, words, cosine]`.

    The last level holds `[code, items, first, listed]` instead, a range of the list of items.
    """
    words = [
        _words(tree, layer, texts) if layer < len(tree.layers) - 1 else {} for layer in range(2)
    ]
    cosine = sample.first_code_cosine
    leaves = tree.layers[-1]
    nodes = listing.nodes[-1]
    shown = np.minimum(leaves.counts[nodes], listing.items_per_sid)
    firsts = np.cumsum(shown) - shown
    rows: list[Any] = [
        list(row)
        for row in zip(
            leaves.codes[nodes].tolist(),
            leaves.counts[nodes].tolist(),
            firsts.tolist(),
            shown.tolist(),
            strict=True,
        )
    ]
    for depth in range(len(tree.layers) - 2, -1, -1):
        layer, above = tree.layers[depth], listing.nodes[depth]
        rows = _parents(tree, depth, above, listing.nodes[depth + 1], rows)
        for node, row in zip(above.tolist(), rows, strict=True):
            known = words[depth].get(node, []) if depth < len(words) else []
            near = cosine.get(int(layer.codes[node])) if depth == 0 else None
            row += [" ".join(known), None if near is None else round(near, 3)]
    places = np.searchsorted(texts.items, listing.items).tolist()
    return {
        "levels": len(tree.layers),
        "total": len(tree.layers[0].counts),
        "nodes": sorted(rows, key=lambda row: -row[1]),
        "ids": [texts.ids[place] for place in places],
        "titles": [texts.titles[place] for place in places] if texts.has_titles else [],
    }


def _parents(
    tree: PrefixTree, depth: int, above: Int64Array, below: Int64Array, rows: Sequence[list[Any]]
) -> list[Any]:
    """Wrap the rows of one depth into their parents, fullest first."""
    layer, under = tree.layers[depth], tree.layers[depth + 1]
    children = np.bincount(under.parents, minlength=len(layer.counts))[above]
    first = np.searchsorted(under.parents[below], above)
    last = np.searchsorted(under.parents[below], above, side="right")
    made = []
    for code, count, number, start, end in zip(
        layer.codes[above].tolist(),
        layer.counts[above].tolist(),
        children.tolist(),
        first.tolist(),
        last.tolist(),
        strict=True,
    ):
        inside = sorted(rows[start:end], key=lambda row: -row[1])
        made.append([code, count, number, inside])
    return made


def _words(tree: PrefixTree, depth: int, texts: _Texts) -> dict[int, list[str]]:
    if not texts.has_titles:
        return {}
    layer = tree.layers[depth]
    node = np.empty(tree.num_items, dtype=np.int64)
    node[tree.order] = np.repeat(np.arange(len(layer.counts)), layer.counts)
    return typical_words(texts.titles, node[texts.items])


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _figure(value: float | None, digits: int = 3) -> str:
    """A number for a cell; a dash for nothing."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}"
