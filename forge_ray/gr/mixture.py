"""The streams of a training: one for each task of its mixture, read side by side.

Every global batch has the same number of rows of each task (`TasksConfig.shares`), so what a step
sees depends on the configuration and the cursors alone, on any number of workers. Knows datasets,
query sets and texts; knows nothing about models or optimisers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from forge_ray.data.queries.query_set import QuerySet
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import Dataset, sequence_batch
from forge_ray.data.stream import Cursor, SequenceStream, StreamBatch, prefetched
from forge_ray.errors import DataError
from forge_ray.gr.config import GrConfig
from forge_ray.gr.scripts import TaskText, answer_sizes
from forge_ray.gr.tasks import ITEM_TASK, QUERY_TASKS, history_beside


@dataclass(frozen=True)
class TextData:
    """What the tasks with text read.

    Attributes:
        text: turns texts into scripts.
        queries: None where no task reads queries.
    """

    text: TaskText
    queries: QuerySet | None


@dataclass(frozen=True)
class QueryScripts:
    """Shards of a query set as scripts; a `forge_ray.data.stream.RowSource`."""

    text: TaskText
    max_history: int
    num_levels: int

    def read(self, files: Sequence[str], filesystem: pafs.FileSystem) -> Ragged:
        """One row per query; a history of 0 items asks the query alone."""
        parts = [sequence_batch(_table(path, filesystem, None)) for path in files]
        found = []
        for rows in parts:
            assert rows.targets is not None  # a query set has no other rows
            assert rows.queries is not None
            histories = rows.items.tail(self.max_history)
            found.append(self.text.searches(histories, rows.queries, rows.targets.values))
        return Ragged.concatenate(found)

    def sizes(self, rows: Ragged) -> NDArray[np.int64]:
        """Target tokens of each row."""
        return answer_sizes(rows, self.num_levels)


@dataclass(frozen=True)
class CatalogueScripts:
    """Shards of items as scripts, to SIDs or from them; a `forge_ray.data.stream.RowSource`."""

    text: TaskText
    task: str
    column: str
    num_levels: int

    def read(self, files: Sequence[str], filesystem: pafs.FileSystem) -> Ragged:
        """One row per item with a text."""
        table = pa.concat_tables(
            _table(path, filesystem, ["item_index", self.column]) for path in files
        )
        texts = table[self.column].cast(pa.string()).to_pylist()
        kept = [row for row, text in enumerate(texts) if text and text.strip()]
        items = table["item_index"].to_numpy()[kept]
        wanted = [texts[row] for row in kept]
        if self.task == "item_to_sid":
            return self.text.item_to_sid(items, wanted)
        return self.text.sid_to_text(items, wanted)

    def sizes(self, rows: Ragged) -> NDArray[np.int64]:
        """Target tokens of each row."""
        return answer_sizes(rows, self.num_levels)


def _table(path: str, filesystem: pafs.FileSystem, columns: list[str] | None) -> pa.Table:
    try:
        return pq.read_table(path, filesystem=filesystem, columns=columns).combine_chunks()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} must be a readable Parquet shard, got: {error}. Make its artifact again."
        ) from error


@dataclass(frozen=True)
class MixedBatch:
    """One rank's share of a step.

    Attributes:
        items: rows of histories; None where the mixture has none.
        scripts: rows of the other tasks.
        script_targets: target tokens of the scripts of the global batch.
        following: cursor of the batch after this one, by task.
    """

    items: StreamBatch | None
    scripts: Ragged | None
    script_targets: int
    following: dict[str, Cursor]


class Mixture:
    """All streams of one rank."""

    def __init__(
        self,
        config: GrConfig,
        dataset: Dataset,
        data: TextData | None,
        *,
        num_levels: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Plans the streams; nothing is read yet.

        Args:
            config: of the run.
            dataset: its train part and its items are read.
            data: what the tasks with text read; None for a training on histories alone.
            num_levels: tokens of an item.
            rank: of this worker.
            world_size: workers.
        """
        self._depth = config.data.prefetch_batches
        self._streams: dict[str, SequenceStream] = {}
        if ITEM_TASK in config.shares:
            self._streams[ITEM_TASK] = SequenceStream(
                dataset.sequence_files("train"),
                dataset.filesystem,
                config.data,
                plan=config.plan,
                rank=rank,
                world_size=world_size,
                is_local=config.in_process,
            )
        for task in config.tasks.text_tasks:
            assert data is not None  # the run made it
            files, filesystem, source = _source(task, config, dataset, data, num_levels)
            self._streams[task] = SequenceStream(
                files,
                filesystem,
                config.data,
                plan=config.script_plan(task),
                source=source,
                rank=rank,
                world_size=world_size,
                is_local=config.in_process,
            )

    @contextlib.contextmanager
    def batches(self, cursors: Mapping[str, Cursor]) -> Iterator[Iterator[MixedBatch]]:
        """Endless batches from these cursors on; the streams are read ahead inside the block."""
        with contextlib.ExitStack() as stack:
            opened = {
                task: stack.enter_context(
                    contextlib.closing(
                        prefetched(stream.batches(cursors.get(task, Cursor())), self._depth)
                    )
                )
                for task, stream in self._streams.items()
            }
            yield _side_by_side(opened)


def _side_by_side(
    streams: Mapping[str, Generator[StreamBatch, None, None]],
) -> Iterator[MixedBatch]:
    while True:
        found = {task: next(stream) for task, stream in streams.items()}
        texts = [one for task, one in found.items() if task != ITEM_TASK]
        yield MixedBatch(
            found.get(ITEM_TASK),
            Ragged.concatenate([one.rows for one in texts]) if texts else None,
            sum(int(one.global_lengths.sum()) for one in texts),
            {task: one.following for task, one in found.items()},
        )


def _source(
    task: str, config: GrConfig, dataset: Dataset, data: TextData, num_levels: int
) -> tuple[list[str], Any, QueryScripts | CatalogueScripts]:
    if task not in QUERY_TASKS:
        scripts = CatalogueScripts(data.text, task, config.tasks.column, num_levels)
        return dataset.artifact.files("items/"), dataset.filesystem, scripts
    assert data.queries is not None  # the configuration asked for them
    length = history_beside(task, config.max_history)
    files = data.queries.sequence_files("train")
    return files, data.queries.filesystem, QueryScripts(data.text, length, num_levels)
