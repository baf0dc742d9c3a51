"""Chains of items with titles that spell their SIDs, and queries for them, made without Ray."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.data.queries.query_set import QUERIES_KIND, QuerySet
from forge_ray.data.queries.rows import asked_of
from forge_ray.data.schema import Dataset, sequence_batch
from tests.gr.chains import chain_dataset

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
