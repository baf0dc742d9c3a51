"""The page of a SID table: what it says is what the table holds, whatever the catalogue's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli import sid_page
from forge_ray.cli.sid import app
from forge_ray.errors import ArtifactError
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig
from forge_ray.sid.resolvers import ExtraTokenConfig
from forge_ray.sid.storage import SidArtifact
from tests.evaluate.datasets import topic_dataset

TOPICS = ("soap", "brush", "cream", "mask", "razor", "comb", "scarf", "towel", "scent", "polish")
EVIL = "</script><b>&"


def titles(num_items: int = 300) -> list[str]:
    return [f"{TOPICS[item % 10]} number {item} {EVIL}" for item in range(num_items)]


def fitted(store: ArtifactStore, *, with_titles: bool = True, **changes: Any) -> SidArtifact:
    dataset = topic_dataset(store, columns={"title": titles()} if with_titles else None)
    config = SidConfig(quantizer=RqKmeansConfig(levels=2, codebook_size=10), **changes)
    return fit_sids(config, dataset, store)


def tree_of(page: str) -> dict[str, Any]:
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


def leaves(nodes: list[Any], levels: int, prefix: tuple[int, ...] = ()) -> Any:
    for node in nodes:
        path = (*prefix, node[0])
        if len(path) == levels:
            yield path, node
        else:
            assert node[1] >= sum(child[1] for child in node[3])
            assert node[2] >= len(node[3])
            yield from leaves(node[3], levels, path)


def test_the_tree_is_the_table(store: ArtifactStore) -> None:
    sids = fitted(store)
    data = tree_of(sid_page.render_page(sids, store))
    seen = 0
    for path, (_, count, first, shown) in leaves(data["nodes"], 2):
        assert count == shown
        for place in range(first, first + shown):
            item = int(data["ids"][place][1:])
            assert tuple(sids.table.codes[item].tolist()) == path
            assert data["titles"][place] == titles()[item]
            seen += 1
    assert seen == 300
    assert len(data["nodes"]) == data["total"]
    for code, count, _, _, words, cosine in data["nodes"]:
        topics = np.flatnonzero(np.asarray(sids.table.codes)[:, 0] == code) % 10
        assert len(topics) == count
        # A code's words are its topics, and the items of one topic are alike.
        shares = np.bincount(topics, minlength=10)
        assert words.split()[0] == TOPICS[shares.argmax()]
        assert set(words.split()) <= {TOPICS[one] for one in topics}
        if shares.max() == count:
            assert cosine > 0.9


def test_a_large_catalogue_is_cut_down_and_the_page_says_so(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sids = fitted(store)
    whole = sid_page.render_page(sids, store)
    monkeypatch.setattr(sid_page, "PAGE_ITEMS", 60)
    monkeypatch.setattr(sid_page, "SAMPLE_ITEMS", 50)
    monkeypatch.setattr(sid_page, "WORD_TITLES", 100)
    page = sid_page.render_page(sids, store)
    data = tree_of(page)
    assert 20 <= len(data["ids"]) <= 60
    assert data["total"] == 10
    assert sum(node[1] for node in data["nodes"]) <= 300
    flat = " ".join(page.split())
    assert f"This page lists {len(data['ids'])} of 300 items" in flat
    assert "On 50 randomly drawn items" in flat
    assert len(page) < len(whole)


def test_data_cannot_leave_its_place(store: ArtifactStore) -> None:
    page = sid_page.render_page(fitted(store), store)
    assert "<b>&" not in page
    assert page.count("</script>") == 2
    assert "http" not in page.replace("http-equiv", "")


def test_without_titles_ids_stand_for_items(store: ArtifactStore) -> None:
    page = sid_page.render_page(fitted(store, with_titles=False), store)
    data = tree_of(page)
    assert data["titles"] == []
    assert "i0000" in data["ids"]
    assert "words that set" not in page


def test_a_resolvers_level_is_part_of_the_tree(store: ArtifactStore) -> None:
    sids = fitted(store, resolver=ExtraTokenConfig())
    page = sid_page.render_page(sids, store)
    data = tree_of(page)
    assert data["levels"] == 3
    assert all(node[1] == 1 for _, node in leaves(data["nodes"], 3))
    # Usage and reconstruction are the quantizer's two levels.
    assert page.count('aria-label="Level ') == 2
    assert "first 2" in page
    assert "first 3" not in page


def test_bars_are_means_of_the_sorted_counts() -> None:
    counts = np.array([0, 4, 8, 2, 0, 0])
    assert sid_page.usage_bars(counts, bins=3) == [6.0, 1.0, 0.0]
    assert sid_page.usage_bars(counts) == [8.0, 4.0, 2.0, 0.0, 0.0, 0.0]


def test_the_command_writes_the_page(store: ArtifactStore, tmp_path: Path) -> None:
    sids = fitted(store)
    path = tmp_path / "new" / "page.html"
    words = ["show", sids.key[:12], "--html", str(path), "--json", "--store", store.uri]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["items"] == 300
    assert path.read_text().startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def test_the_dataset_must_be_there(store: ArtifactStore, tmp_path: Path) -> None:
    sids = fitted(store)
    with pytest.raises(ArtifactError, match="must hold the dataset"):
        sid_page.write_page(tmp_path / "page.html", sids, ArtifactStore(tmp_path / "other"))
