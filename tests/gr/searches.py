"""Chains of items with titles that spell their SIDs, and queries for them, made without Ray."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifacts import Artifact, ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.queries.query_set import QUERIES_KIND, QuerySet
from forge_ray.data.queries.rows import asked_of
from forge_ray.data.schema import Dataset, sequence_batch
from forge_ray.gr.checkpoint import MODEL_KIND, TASK_TEXT_FILE, WEIGHTS_FILE, save_weights
from forge_ray.gr.config import GrConfig
from forge_ray.gr.models.pretrained_decoder import PretrainedDecoderConfig
from forge_ray.gr.source import ModelSource
from forge_ray.gr.tasks import TasksConfig
from forge_ray.gr.vocab import vocab_of
from forge_ray.sid.table import SidTable
from tests.gr.chains import chain_dataset, grid_table

ROWS = "abcdefghij"
COLUMNS = "klmnopqrstuv"


def title(item: int) -> str:
    """Two words, one for each code of `grid_table`."""
    return f"{ROWS[item // 12] * 3} {COLUMNS[item % 12] * 3}"


def titled_dataset(store: ArtifactStore, **sizes: int) -> Dataset:
    """`chain_dataset` with titles, under a key of its own."""
    chains = chain_dataset(store, **sizes)

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        for name in chains.artifact.manifest.files:
            table = pq.read_table(chains.artifact.path(name))
            if name.startswith("items/"):
                titles = [title(item) for item in table["item_index"].to_pylist()]
                table = table.append_column("title", pa.array(titles))
            pq.write_table(table, writer.path(*name.split("/")))
        return ArtifactInfo(rows=chains.rows)

    return Dataset(store.build("dataset", "titled", {"of": chains.key}, produce=produce))


def whole_titles(store: ArtifactStore, dataset: Dataset) -> QuerySet:
    """Every interaction asks for the whole title, so that the query tells the item."""
    titles = dataset.items(["title"])["title"].to_pylist()

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        counts = {}
        for split in ("train", "validation"):
            counts[split] = 0
            for path in dataset.sequence_files(split):
                users = sequence_batch(pq.read_table(path).combine_chunks())
                asked = asked_of(users, split, max_history=20)
                texts = [titles[item] for item in asked.targets.tolist()]
                target = writer.path("sequences", split, path.rsplit("/", 1)[-1])
                pq.write_table(asked.table(texts), target)
                counts[split] += len(asked)
        return ArtifactInfo(rows=counts, metrics={"synthetic": True, "examples": {}})

    artifact = store.build(
        QUERIES_KIND, "titles", {"whole": True}, parents=[dataset.key], produce=produce
    )
    return QuerySet(artifact, dataset)


def publish_searcher(
    store: ArtifactStore, queries: QuerySet, checkpoint: str, tasks: TasksConfig
) -> ModelSource:
    """An untrained model of a mixture in the form that training publishes."""
    dataset = queries.dataset
    table: Artifact = store.build("sids", "grid", {}, parents=["", dataset.key],
                                  produce=grid_table().save)  # fmt: skip
    key = SidTable.open(table).key
    model = PretrainedDecoderConfig(pretrained=checkpoint).resolved()
    config = GrConfig(model=model, tasks=tasks, max_history=4)

    def produce(writer: ArtifactWriter) -> None:
        generator = model.start(vocab_of(grid_table().codebook_sizes))
        with writer.local_path(WEIGHTS_FILE) as path:
            save_weights(path, generator.state_dict())
        if tasks.text_tasks:
            with writer.open(TASK_TEXT_FILE) as sink:
                sink.write(model.task_text(tasks).to_json().encode())

    content = {"gr": config.identity(), "table_key": key}
    artifact = store.build(
        MODEL_KIND, "searcher", content, parents=[dataset.key, key], produce=produce
    )
    return ModelSource(artifact, table, dataset)
