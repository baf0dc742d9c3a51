"""Lists of item ids, and decoding inside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, DataError
from forge_ray.gr.buckets import ItemBuckets
from forge_ray.gr.decoding import SidDecoder
from forge_ray.gr.filters import allowed_items
from forge_ray.sid.table import SidTable
from tests.gr.generators import HashGenerator, random_codes

IDS = pa.array(["a", "b", "c", "d"])


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_lists_combine_and_deny_wins(tmp_path: Path) -> None:
    allow = write(tmp_path / "allow.txt", "a\n\n c \nd\n")
    deny = write(tmp_path / "deny.txt", "c")
    assert allowed_items(IDS, allow=None, deny=None) is None
    both = allowed_items(IDS, allow=allow, deny=deny)
    assert both is not None
    assert both.tolist() == [True, False, False, True]
    denied = allowed_items(IDS, allow=None, deny=deny)
    assert denied is not None
    assert denied.tolist() == [True, True, False, True]


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    strange = write(tmp_path / "strange.txt", "a\nx\ny\n")
    with pytest.raises(DataError, match=r"deny must hold item ids .* got 2 unknown .* e.g. 'x'"):
        allowed_items(IDS, allow=None, deny=strange)
    with pytest.raises(DataError, match="allow must be a readable text file"):
        allowed_items(IDS, allow=str(tmp_path / "absent.txt"), deny=None)
    whole = write(tmp_path / "whole.txt", "a\nb\nc\nd")
    with pytest.raises(ConfigError, match="must leave at least one of 4 items"):
        allowed_items(IDS, allow=None, deny=whole)


def test_decoding_inside_a_list_is_the_whole_ranking_filtered() -> None:
    """At full width, a denied item costs no place, and nothing else moves."""
    sizes = (6, 5, 4)
    table = SidTable.from_codes(random_codes(60, sizes), sizes)
    rng = np.random.default_rng(1)
    histories = Ragged.from_lists([rng.integers(0, 60, 4) for _ in range(5)], np.int64)
    allowed = rng.random(60) < 0.4
    lists = {}
    for name, mask in {"all": None, "some": allowed}.items():
        decoder = SidDecoder(
            HashGenerator(sizes), table, widths=(6, 30, 60), max_history=4, allowed=mask
        )
        buckets = ItemBuckets.build(
            decoder.item_rank(),
            num_sids=decoder.index.num_sids,
            train_counts=np.zeros(60, np.int64),
        )
        decoded = decoder.decode(histories)
        assert decoded.num_invalid == 0
        lists[name] = buckets.expand(decoded.sid_rank, decoded.scores, k=60)
    for user in range(5):
        whole = lists["all"].items[user]
        kept = lists["some"].items[user]
        assert kept[kept >= 0].tolist() == whole[allowed[whole]].tolist()
        assert (kept >= 0).sum() == allowed.sum()
