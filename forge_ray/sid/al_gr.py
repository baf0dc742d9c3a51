"""A dataset of ours, with a SID table or without, as the files that FORGE's own code reads.

One task per shard; a file that is complete stays, so the same call goes on after an interruption.
Knows datasets, tables and AL-GR's layouts, which `data/al_gr` writes. Ray must be running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from forge_ray.config import to_mapping
from forge_ray.data import tasks
from forge_ray.data.al_gr.layouts import Layout
from forge_ray.data.al_gr.npz import Header, write_archive
from forge_ray.data.al_gr.rows import Reading, code_columns, encode
from forge_ray.data.al_gr.sid_text import SidFormat
from forge_ray.data.al_gr.target import Target
from forge_ray.data.al_gr.text_files import header_line, joined, spell_lines
from forge_ray.data.ragged import Ragged
from forge_ray.data.schema import SPLITS, Dataset, SequenceBatch, Split, VectorBatch
from forge_ray.errors import ConfigError, DataError
from forge_ray.sid.table import SidTable

PARTS = ("gr", "item_sid", "sequences", "item_emb", "contrastive", "reconstruction", "queries")
_NEED_SIDS = ("gr", "item_sid")
_NEED_VECTORS = ("item_emb", "contrastive", "reconstruction")
_WORDS = "一二三四五六七八九"
_ROWS_AT_ONCE = 4096
_DONE = pa.schema({"file": pa.string(), "rows": pa.int64()})
_LAYOUTS = {
    "gr": Layout(kind="gr", columns=("system", "user", "answer")),
    "sequences": Layout(kind="sequences", columns=("user_history", "target_item")),
    "item_emb": Layout(kind="item_emb", columns=("item_id", "feature")),
    "queries": Layout(kind="queries", columns=(), delimiter="\x01"),
}


@dataclass(kw_only=True)
class AlGrExportConfig:
    """Which files to write, and how."""

    parts: list[str] = field(default_factory=list)
    """Files to write, among `PARTS`; by default all that the dataset and the table allow."""
    targets: Literal["all", "last"] = "all"
    """Rows of a train user: one for every item after the first, or for the last one only."""
    max_history: int = 100
    """Newest items of a history; FORGE's limit."""
    level_stride: int = 0
    """Tokens from one level to the next. 0: as many as the level has codes. 8192 for FORGE's own
    scorer, which knows no other number."""
    space: str = "default"
    """Vector space of the vector files."""
    max_queries: int = 5000
    """Lists in the embedding-hitrate file; FORGE has about 5,000."""
    system: str = (
        "你是一个推荐系统，根据用户的历史行为，预测用户在电商场景的下一步行为。"
        "我会给你一串连续行为的语义编码，按照用户点击的时间顺序排列，每个行为用{levels}个词表示。"
    )
    """System text; `{levels}` becomes the number of levels in Chinese."""
    before: str = "当前用户的历史行为如下："
    """User text before the history."""
    after: str = "，请预测用户在电商推荐场景后续行为的语义编码"
    """User text after the history."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(
                    f"parts must be among {list(PARTS)}, got {part!r}. Correct the name."
                )
        for name in ("max_history", "max_queries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")


@dataclass(frozen=True, slots=True)
class DatasetExport:
    """What an export wrote.

    Attributes:
        directory: the folder.
        rows: rows by file; for files that were complete before, the bytes are in `kept`.
        kept: bytes of files that were there.
    """

    directory: str
    rows: dict[str, int]
    kept: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Job:
    """What every task needs: the inputs, and where ids and codes lie in the object store."""

    dataset: Dataset
    config: AlGrExportConfig
    reading: Reading
    target: Target
    files: list[_File]
    ids: ray.ObjectRef[pa.Array]
    codes: ray.ObjectRef[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _File:
    """One file to write: its name, its part, and the shard that it is made from, if it is one."""

    name: str
    part: str
    of: str = ""
    split: Split = "train"


def export_dataset(
    dataset: Dataset, table: SidTable | None, output: str, config: AlGrExportConfig
) -> DatasetExport:
    """Write AL-GR files.

    Args:
        dataset: prepared.
        table: SIDs of its items; None writes the files that hold none.
        output: folder to write to: new, or one that the same export began.
        config: which files, and how.

    Raises:
        ConfigError: a part needs SIDs or vectors that are not given, or `gr` is among the parts
            and the table has more tokens than FORGE's vocabulary.
        DataError: the output holds files of another export, or ids do not go into lists.
    """
    files = _files(dataset, table, config)
    reading = _reading(files, table, config)
    ids = dataset.items(["item_id"])["item_id"].combine_chunks()
    if any(one.part in _LIST_IDS for one in files):
        _check_ids(ids)
    target = Target.at(output)
    target.claim(_identity(dataset, table, config))
    kept = {one.name: size for one in files if (size := target.size(one.name)) is not None}
    job = _Job(
        dataset=dataset,
        config=config,
        reading=reading,
        target=target,
        files=[one for one in files if one.name not in kept],
        ids=ray.put(ids),
        codes=ray.put(np.asarray(table.codes) if table else np.empty(0)),
    )
    done = tasks.results(tasks.for_each(range(len(job.files)), _write, job=job))
    rows = dict(zip(*(done[name].to_pylist() for name in _DONE.names), strict=True)) if done else {}
    return DatasetExport(output, dict(sorted(rows.items())), kept)


def _reading(files: Sequence[_File], table: SidTable | None, config: AlGrExportConfig) -> Reading:
    """How rows are spelled; only those of `gr` have SIDs as tokens, which a vocabulary holds."""
    if table is None or all(one.part != "gr" for one in files):
        return Reading(SidFormat((1,)))
    try:
        return Reading(SidFormat(table.codebook_sizes, config.level_stride))
    except ConfigError as error:
        raise ConfigError(f"{error} Or leave gr out: parts=[item_sid,sequences].") from error


def _identity(dataset: Dataset, table: SidTable | None, config: AlGrExportConfig) -> dict[str, Any]:
    settings = to_mapping(config)
    settings.pop("parts")
    sids = None if table is None else [table.key, table.resolver, list(table.codebook_sizes)]
    version = {"al_gr_version": dataset.al_gr_version} if dataset.al_gr_version else {}
    return {"dataset": dataset.key, **version, "sids": sids, "settings": settings}


def _files(dataset: Dataset, table: SidTable | None, config: AlGrExportConfig) -> list[_File]:
    has_vectors = config.space in dataset.spaces
    has_pairs = bool(dataset.artifact.files("pairs/"))
    for part in config.parts:
        if part in _NEED_SIDS and table is None:
            raise ConfigError(f"parts must have a SID table for {part!r}, got none. Add --sids.")
        if part in _NEED_VECTORS and not has_vectors:
            dataset.vector_files(config.space)
        if part == "contrastive" and not has_pairs:
            raise ConfigError(
                "parts must have pairs for 'contrastive', got a dataset without any. "
                "Prepare it with pairs.window > 0."
            )
    lacking = {
        *(() if table else _NEED_SIDS),
        *(() if has_vectors else _NEED_VECTORS),
        *(() if has_pairs else ("contrastive",)),
    }
    parts = config.parts or [part for part in PARTS if part not in lacking]
    found: list[_File] = []
    for part in parts:
        if part in ("gr", "sequences"):
            for split in SPLITS:
                paths = dataset.sequence_files(split)
                found += _numbered(f"{part}/{split}", part, paths, split)
        elif part == "item_emb":
            found += _numbered("item_emb", part, dataset.vector_files(config.space))
        else:
            found.append(_File(_NAMES[part], part))
    return found


_LIST_IDS = ("gr", "sequences", "queries")
_NAMES = {
    "item_sid": "item_sid.csv",
    "contrastive": "contrastive_data_mask.npz",
    "reconstruction": "reconstruct_data_mask.npz",
    "queries": "queries.txt",
}


def _numbered(folder: str, part: str, paths: Sequence[str], split: Split = "train") -> list[_File]:
    return [
        _File(f"{folder}/part_{number:05d}.csv", part, path, split)
        for number, path in enumerate(paths, start=1)
    ]


def _write(number: int, *, job: _Job) -> Iterator[pa.Table]:
    file = job.files[number]
    path = job.target.path(file.name)
    with job.target.filesystem.open_output_stream(f"{path}.partial") as stream:
        rows = _WRITE[file.part](stream, job, file)
    job.target.filesystem.move(f"{path}.partial", path)
    yield pa.table({"file": [file.name], "rows": [rows]}, schema=_DONE)


def _write_lines(stream: Any, layout: Layout, reading: Reading, tables: Iterator[pa.Table]) -> int:
    rows = 0
    stream.write(header_line(layout))
    for table in tables:
        if table.num_rows:
            stream.write(joined(spell_lines(encode(layout, table, reading), layout), layout))
            rows += table.num_rows
    return rows


# ---- sequences ----


@dataclass(frozen=True, slots=True)
class _Examples:
    """Histories of item indices, newest `max_history` of each, and the items that follow."""

    history: Ragged
    targets: Ragged


def _examples(job: _Job, batch: SequenceBatch) -> Iterator[_Examples]:
    """A row per held-out user, or per target of a train user, some thousands at a time."""
    items, longest = batch.items, job.config.max_history
    if batch.targets is not None:
        yield _Examples(items.tail(longest), batch.targets)
        return
    ends = np.flatnonzero(items.positions > 0)
    if job.config.targets == "last":
        ends = items.offsets[1:][items.lengths > 1] - 1
    for start in range(0, len(ends), _ROWS_AT_ONCE):
        some = ends[start : start + _ROWS_AT_ONCE]
        lengths = np.minimum(items.positions[some], longest)
        one = np.ones(len(some), dtype=np.int64)
        yield _Examples(items.slices(some - lengths, lengths), items.slices(some, one))


def _examples_of(job: _Job, file: _File) -> Iterator[_Examples]:
    batches = job.dataset.sequence_batches(file.split, batch_rows=_ROWS_AT_ONCE, files=[file.of])
    for batch in batches:
        yield from _examples(job, batch)


def _write_gr(stream: Any, job: _Job, file: _File) -> int:
    codes, ids = ray.get(job.codes), ray.get(job.ids)
    is_train = file.split == "train"
    layout = replace(_LAYOUTS["gr"], answers="sids" if is_train else "items")
    system = job.config.system.replace("{levels}", _WORDS[codes.shape[1] - 1])

    def tables() -> Iterator[pa.Table]:
        for one in _examples_of(job, file):
            rows = len(one.history)
            columns = {
                "system": pa.repeat(system, rows),
                "before": pa.repeat(job.config.before, rows),
                "history": _codes_of(one.history, codes).to_arrow(),
                "after": pa.repeat(job.config.after, rows),
            }
            if is_train:
                columns["answer"] = _codes_of(one.targets, codes).to_arrow()
            else:
                columns["answer_items"] = _ids_of(one.targets, ids)
            yield pa.table(columns)

    return _write_lines(stream, layout, job.reading, tables())


def _codes_of(items: Ragged, codes: NDArray[Any]) -> Ragged:
    flat = codes[items.values].astype(np.int32).reshape(-1)
    return Ragged(flat, items.offsets * codes.shape[1])


def _check_ids(ids: pa.Array) -> None:
    """Ids must come back from lists that FORGE's files join by `;` and `,`."""
    bad = pc.match_substring_regex(ids.cast(pa.string()), r"[;,]|\|\|")
    if pc.any(bad).as_py():
        raise DataError(
            "item ids must hold no ';', ',' or '||' where lists of them are written, got "
            f"{ids.filter(bad)[0].as_py()!r}. Rename such items, or export parts=[item_sid]."
        )


def _ids_of(items: Ragged, ids: pa.Array) -> pa.ListArray:
    texts = ids.take(pa.array(items.values)).cast(pa.string())
    return pa.ListArray.from_arrays(pa.array(items.offsets.astype(np.int32)), texts)


def _write_sequences(stream: Any, job: _Job, file: _File) -> int:
    ids = ray.get(job.ids)
    tables = (
        pa.table({"history": _ids_of(one.history, ids), "targets": _ids_of(one.targets, ids)})
        for one in _examples_of(job, file)
    )
    return _write_lines(stream, _LAYOUTS["sequences"], job.reading, tables)


def _write_queries(stream: Any, job: _Job, file: _File) -> int:
    """Lists of the embedding hitrate, from validation: test is for the last look alone."""
    ids = ray.get(job.ids)

    def tables() -> Iterator[pa.Table]:
        for batch in job.dataset.sequence_batches("validation", limit=job.config.max_queries):
            assert batch.targets is not None
            first = batch.targets.head(1)
            yield pa.table(
                {
                    "list_id": pa.array(batch.user_index).cast(pa.string()),
                    "label": pa.repeat(True, len(batch)),
                    "target": _ids_of(first, ids).flatten(),
                    "clicked": _ids_of(batch.items.tail(job.config.max_history), ids),
                }
            )

    return _write_lines(stream, _LAYOUTS["queries"], job.reading, tables())


# ---- items ----


def _write_item_sid(stream: Any, job: _Job, file: _File) -> int:
    codes, ids = ray.get(job.codes), ray.get(job.ids)
    names = code_columns(codes.shape[1])
    layout = Layout(kind="item_sid", columns=("item_id", *names))
    tables = (
        pa.table(
            {
                "item_id": ids.slice(start, _ROWS_AT_ONCE).cast(pa.string()),
                **{
                    name: pa.array(codes[start : start + _ROWS_AT_ONCE, level].astype(np.int32))
                    for level, name in enumerate(names)
                },
            }
        )
        for start in range(0, len(ids), _ROWS_AT_ONCE)
    )
    return _write_lines(stream, layout, job.reading, tables)


def _write_item_emb(stream: Any, job: _Job, file: _File) -> int:
    ids = ray.get(job.ids)
    tables = (
        pa.table(
            {
                "item_id": ids.take(pa.array(one.indices)).cast(pa.string()),
                "embedding": pa.FixedSizeListArray.from_arrays(
                    pa.array(one.vectors.reshape(-1)), one.vectors.shape[1]
                ),
            }
        )
        for one in _vectors_of(job, [file.of])
    )
    return _write_lines(stream, _LAYOUTS["item_emb"], job.reading, tables)


def _vectors_of(job: _Job, files: Sequence[str] | None = None) -> Iterator[VectorBatch]:
    return job.dataset.vector_batches(_ROWS_AT_ONCE, space=job.config.space, files=files)


def _write_reconstruction(stream: Any, job: _Job, file: _File) -> int:
    ids, shape = ray.get(job.ids), _shape(job)
    typed = np.asarray(ids.slice(0, 0).to_numpy(zero_copy_only=False)).dtype
    if typed.kind == "O":
        longest = max(1, pc.max(pc.utf8_length(ids)).as_py() or 1)
        typed = np.dtype(f"<U{longest}")
    names = (
        ids.take(pa.array(one.indices)).to_numpy(zero_copy_only=False).astype(typed)
        for one in _vectors_of(job)
    )
    vectors = (one.vectors for one in _vectors_of(job))
    arrays = {"ids": (Header((shape[0],), typed), names), "embeds": (_float(shape), vectors)}
    write_archive(stream, arrays)
    return shape[0]


def _write_contrastive(stream: Any, job: _Job, file: _File) -> int:
    """Vectors in shard order, the dictionary from ids to their rows, and the pairs by row."""
    ids, shape = ray.get(job.ids), _shape(job)
    order = np.concatenate([one.indices for one in _vectors_of(job)])
    rows = np.empty(len(ids), dtype=np.int64)
    rows[order] = np.arange(len(order))
    pairs = job.dataset.pairs()
    both = np.stack([rows[pairs.anchor], rows[pairs.positive]], axis=1)
    mapping = dict(zip(ids.take(pa.array(order)).to_pylist(), range(len(order)), strict=True))
    arrays = {
        "itemEncID": (Header((), np.dtype(object)), iter([mapping])),
        "pairs": (Header(both.shape, np.dtype(np.int64)), iter([both])),
        "embeds": (_float(shape), (one.vectors for one in _vectors_of(job))),
    }
    write_archive(stream, arrays)
    return len(both)


def _shape(job: _Job) -> tuple[int, int]:
    return job.dataset.num_items, job.dataset.vector_dim(job.config.space)


def _float(shape: tuple[int, int]) -> Header:
    return Header(shape, np.dtype(np.float32))


_WRITE: dict[str, Callable[[Any, _Job, _File], int]] = {
    "gr": _write_gr,
    "item_sid": _write_item_sid,
    "sequences": _write_sequences,
    "item_emb": _write_item_emb,
    "contrastive": _write_contrastive,
    "reconstruction": _write_reconstruction,
    "queries": _write_queries,
}
