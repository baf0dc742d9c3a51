from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from forge_ray.data import stream as stream_module
from forge_ray.data.examples import BatchPlan
from forge_ray.data.ragged import Ragged
from forge_ray.data.stream import (
    Cursor,
    SegmentReader,
    SequenceStream,
    StreamBatch,
    StreamConfig,
    epoch_segments,
    prefetched,
)
from forge_ray.errors import DataError

PLAN = BatchPlan(batch_rows=8, max_items=6, mode="window", window_batches=3, seed=5)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Five files of users; every item index occurs once, so that a multiset tells everything."""
    rng = np.random.default_rng(0)
    counter = itertools.count()
    files = []
    for number in range(5):
        rows = [[next(counter) for _ in range(rng.integers(1, 15))] for _ in range(20)]
        path = tmp_path / f"part-{number:05d}.parquet"
        pq.write_table(pa.table({"items": pa.array(rows, pa.list_(pa.int32()))}), path)
        files.append(str(path))
    return files


def all_items(files: list[str]) -> list[int]:
    tables = [pq.read_table(path).column("items") for path in files]
    return sorted(np.concatenate([Ragged.from_arrow(one).values for one in tables]).tolist())


def stream(files: list[str], rank: int = 0, world_size: int = 1, **changes: int) -> SequenceStream:
    config = StreamConfig(segment_files=2, segments_per_execution=4)
    plan = BatchPlan(**{**PLAN.__dict__, **changes})
    return SequenceStream(
        files, pafs.LocalFileSystem(), config, plan=plan, rank=rank, world_size=world_size
    )


def take_epochs(batches: itertools.chain[StreamBatch], count: int) -> list[StreamBatch]:
    return list(itertools.takewhile(lambda one: one.following.epoch < count, batches))


def rows_of(batches: list[StreamBatch]) -> list[list[int]]:
    return [row.tolist() for one in batches for row in one.rows]


def test_epochs_hold_every_file_once_in_different_orders():
    first, second = (epoch_segments(40, 7, seed=3, epoch=epoch) for epoch in (0, 1))
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(40))
    assert first != second
    assert first == epoch_segments(40, 7, seed=3, epoch=0)


def test_reader_names_a_broken_shard(tmp_path):
    broken = tmp_path / "part-00000.parquet"
    broken.write_bytes(b"PAR1 not really")
    reader = SegmentReader(pafs.LocalFileSystem(), PLAN, rank=0, world_size=1)
    work = {"epoch": [0], "segment": [0], "skip": [0], "files": [[str(broken)]]}
    with pytest.raises(DataError, match=r"part-00000\.parquet must be a readable Parquet shard"):
        next(reader(pa.table(work)))


@pytest.mark.parametrize("mode", ["prefix", "window", "whole"])
def test_rows_are_cut_out_a_few_at_a_time_and_come_to_the_same_batches(shards, monkeypatch, mode):
    plan = dataclasses.replace(PLAN, mode=mode)
    reader = SegmentReader(pafs.LocalFileSystem(), plan, rank=1, world_size=3)
    work = pa.Table.from_pylist([{"epoch": 0, "segment": 0, "skip": 2, "files": shards}])
    (at_once,) = reader(work)
    monkeypatch.setattr(stream_module, "_VALUES_AT_ONCE", 130)
    tables = list(reader(work))
    assert pa.concat_tables(tables).to_pylist() == at_once.to_pylist()
    sizes = [table["global_lengths"].combine_chunks().flatten() for table in tables]
    assert len(sizes) > 3
    assert max(pc.sum(one).as_py() for one in sizes) <= 130


def test_no_shards_is_an_error():
    with pytest.raises(DataError, match="at least one shard"):
        stream([])


def test_prefetch_keeps_order_and_raises_errors_of_its_thread():
    empty = StreamBatch(Ragged.from_lists([]), np.zeros(0, dtype=np.int64), Cursor())

    def source():
        yield empty
        raise DataError("shard gone")

    ready = prefetched(source(), depth=2)
    assert next(ready) is empty
    with pytest.raises(DataError, match="shard gone"):
        next(ready)


@pytest.mark.parametrize("mode", ["prefix", "last", "window"])
def test_every_cursor_resumes_exactly_on_another_number_of_workers(shards, mode):
    config = StreamConfig(segment_files=2, segments_per_execution=4)

    def batches(cursor: Cursor, rank: int = 0, world_size: int = 1) -> list[StreamBatch]:
        plan = dataclasses.replace(PLAN, mode=mode)
        made = SequenceStream(
            shards, pafs.LocalFileSystem(), config, plan=plan, rank=rank, world_size=world_size,
            is_local=True,
        )  # fmt: skip
        return take_epochs(made.batches(cursor), 1)

    whole = batches(Cursor())
    for step in range(1, len(whole) - 1):
        cursor = whole[step - 1].following
        ranks = [batches(cursor, rank, 2) for rank in range(2)]
        for expected, *parts in zip(whole[step:], *ranks, strict=True):
            assert sorted(rows_of(parts)) == sorted(rows_of([expected]))
            assert all(part.following == expected.following for part in parts)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
class TestWithRay:
    def test_every_item_once_an_epoch_at_any_world_size(self, shards):
        alone = take_epochs(stream(shards).batches(Cursor()), 2)
        epochs = [[one for one in alone if one.following.epoch == epoch] for epoch in (0, 1)]
        for epoch in epochs:
            seen = sorted(np.concatenate([one.rows.values for one in epoch]).tolist())
            assert seen == all_items(shards)
        assert rows_of(epochs[0]) != rows_of(epochs[1])
        ranks = [take_epochs(stream(shards, rank, 3).batches(Cursor()), 2) for rank in range(3)]
        assert {len(one) for one in ranks} == {len(alone)}
        for whole, *parts in zip(alone, *ranks, strict=True):
            together = sorted(rows_of(parts))
            assert together == sorted(rows_of([whole]))
            assert all((one.global_lengths == whole.global_lengths).all() for one in parts)

    def test_any_cursor_resumes_exactly(self, shards):
        whole = take_epochs(stream(shards).batches(Cursor()), 2)
        for step in (1, 9, len(whole) // 2):
            rest = take_epochs(stream(shards).batches(whole[step - 1].following), 2)
            assert rows_of(rest) == rows_of(whole[step:])

    def test_small_blocks_come_in_order(self, shards, monkeypatch):
        whole = take_epochs(stream(shards).batches(Cursor()), 1)
        monkeypatch.setattr(stream_module, "_BLOCK_BYTES", 500)
        assert rows_of(take_epochs(stream(shards).batches(Cursor()), 1)) == rows_of(whole)

    def test_the_end_of_the_only_segment_resumes(self, shards):
        def batches(cursor: Cursor) -> Iterator[StreamBatch]:
            config = StreamConfig(segment_files=16, segments_per_execution=1)
            return SequenceStream(
                shards, pafs.LocalFileSystem(), config, plan=PLAN, rank=0, world_size=1
            ).batches(cursor)

        whole = take_epochs(batches(Cursor()), 2)
        last = max(n for n, one in enumerate(whole) if one.following.epoch == 0)
        rest = take_epochs(batches(whole[last].following), 2)
        assert rows_of(rest) == rows_of(whole[last + 1 :])

    def test_prefix_mode_makes_every_item_but_the_first_a_target(self, shards):
        batches = take_epochs(stream(shards, mode="prefix").batches(Cursor()), 1)
        targets = sorted(row[-1] for row in rows_of(batches))
        tables = [Ragged.from_arrow(pq.read_table(path).column("items")) for path in shards]
        firsts = {int(row[0]) for table in tables for row in table}
        assert targets == [item for item in all_items(shards) if item not in firsts]

    @pytest.mark.parametrize("mode", ["prefix", "last"])
    def test_shards_without_examples_are_an_error(self, tmp_path, mode):
        path = tmp_path / "part-00000.parquet"
        pq.write_table(pa.table({"items": pa.array([[1], [2]], pa.list_(pa.int32()))}), path)
        with pytest.raises(DataError, match="got no training"):
            next(stream([str(path)], mode=mode).batches(Cursor()))
