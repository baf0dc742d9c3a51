"""Item-to-item pairs by the name of their source: what a quantizer's alignment pulls together.

Knows datasets and artifacts. Sources from behaviour read the train part only; the one from vectors
reads no behaviour.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from forge_ray.artifacts import ArtifactInfo, ArtifactStore, ArtifactWriter
from forge_ray.config import to_mapping
from forge_ray.data.schema import PAIRS_SCHEMA, Dataset, Pairs
from forge_ray.embed.counts import SwingCountsConfig
from forge_ray.embed.graph_smooth import nearest, strongest
from forge_ray.embed.vectors import VectorSet, train_counts
from forge_ray.errors import ConfigError, DataError

KIND = "pairs"
SOURCES = ("co_occurrence", "i2i", "swing", "semantic_knn")
"""`co_occurrence`: counted in a window when the dataset was prepared; `i2i`: FORGE's name for it;
`swing`: Swing scores of the train part; `semantic_knn`: nearest vectors by cosine."""


def load_pairs(
    source: str,
    dataset: Dataset,
    store: ArtifactStore,
    *,
    vectors: VectorSet,
    top_k: int = 20,
    swing: SwingCountsConfig | None = None,
) -> Pairs:
    """Load the pairs of a source; Swing and nearest vectors are computed once and kept.

    Args:
        source: one of `SOURCES`.
        dataset: the prepared dataset.
        store: where computed pairs are kept as an artifact of kind `pairs`.
        vectors: what `semantic_knn` compares.
        top_k: positives kept for each anchor, of the computed sources; 20 as in `pairs.top_k`.
        swing: limits of Swing.

    Returns:
        By anchor, then by falling weight: the count over the root of both items' popularity
        (`co_occurrence`), the Swing score, or the cosine. 12 bytes a pair; computing Swing takes
        what `swing_scores` states, and nearest vectors what `nearest` states.

    Raises:
        ConfigError: when no source has this name.
        DataError: when the dataset was prepared without pairs.
    """
    if source not in SOURCES:
        raise ConfigError(
            f"pair source must be one of {', '.join(SOURCES)}, got {source!r}. Choose one of them."
        )
    if source in ("co_occurrence", "i2i"):
        return _prepared(source, dataset)
    limits = SwingCountsConfig() if swing is None else swing
    identity = {"source": source, "top_k": top_k}
    if source == "swing":
        identity["swing"] = to_mapping(limits)
    parents = (dataset.key,) if source == "swing" else (dataset.key, vectors.key)

    def produce(writer: ArtifactWriter) -> ArtifactInfo:
        if source == "swing":
            graph = strongest(train_counts(limits, dataset), top_k)
        else:
            graph = nearest(vectors.take(np.arange(vectors.num_items)), top_k)
        table = _table(graph)
        with writer.open("pairs", "part-00000.parquet") as stream:
            pq.write_table(table, stream)
        return ArtifactInfo(rows={"pairs": table.num_rows})

    artifact = store.build(
        KIND, f"{dataset.name}-{source}", identity, parents=tuple(dict.fromkeys(parents)),
        produce=produce,
    )  # fmt: skip
    with artifact.filesystem.open_input_file(artifact.files("pairs")[0]) as handle:
        table = pq.read_table(handle)
    return Pairs(*(table[name].to_numpy() for name in PAIRS_SCHEMA.names))


def _prepared(source: str, dataset: Dataset) -> Pairs:
    if not dataset.artifact.exists("pairs"):
        raise DataError(
            f"pair source {source!r} must find pairs in dataset {dataset.name!r}, got none. "
            "Prepare it with pairs.window >= 1, or align without pairs."
        )
    return dataset.pairs()


def _table(graph: sp.csr_array) -> pa.Table:
    """The edges of a graph as pairs, strongest first for each anchor."""
    anchor = np.repeat(np.arange(graph.shape[0], dtype=np.int32), np.diff(graph.indptr))
    order = np.lexsort((graph.indices, -graph.data, anchor))
    columns = [anchor, graph.indices[order].astype(np.int32), graph.data[order].astype(np.float32)]
    return pa.table(columns, schema=PAIRS_SCHEMA)
