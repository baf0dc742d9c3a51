"""Fitting residual k-means beside faiss.ResidualQuantizer: seconds and reconstruction error.

Both sides get the same vectors, levels and codes, over three seeds. Ours chooses codes greedily,
so the fair opponent is a beam of 1; the default beam of 5 is listed with the error of its own beam
search and with that of greedy codes. Ours has its defaults but for the start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from forge_ray.sid.quantizers.base import TrainingSet
from forge_ray.sid.quantizers.rq_kmeans import RqKmeansConfig

LEVELS, BITS, ROWS, DIM, SEEDS = 3, 8, 65_536, 64, 3
OURS = {
    "rq_kmeans sample": RqKmeansConfig(codebook_size=2**BITS),
    "rq_kmeans k-means++": RqKmeansConfig(codebook_size=2**BITS, init="k-means++"),
    "rq_kmeans progressive": RqKmeansConfig(codebook_size=2**BITS, init="progressive"),
}


def run(scale: float) -> dict[str, Any]:
    """Mean seconds and errors by vectors and side; errors over the variance of the vectors."""
    rows = max(4 * 2**BITS, int(ROWS * scale))
    data = {"gaussian": gaussian(rows), "clustered": clustered(rows)}
    beauty = beauty_vectors()
    if beauty is not None:
        data["amazon-beauty MiniLM"] = beauty
    return {f"{name} {list(x.shape)}": compare(x) for name, x in data.items()}


def compare(vectors: np.ndarray) -> dict[str, Any]:
    """All sides on one set of vectors, seed by seed in turns."""
    sides: dict[str, Callable[[int], dict[str, float]]] = {
        "faiss beam 1": lambda seed: fit_faiss(vectors, 1, seed),
        "faiss beam 5": lambda seed: fit_faiss(vectors, 5, seed),
    }
    for name, config in OURS.items():
        sides[name] = lambda seed, config=config: fit_ours(vectors, config, seed)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for seed in range(SEEDS):
        for name, fit in sides.items():
            runs[name].append(fit(seed))
    return {
        name: {key: round(float(np.mean([one[key] for one in some])), 5) for key in some[0]}
        for name, some in runs.items()
    }


def fit_ours(vectors: np.ndarray, config: RqKmeansConfig, seed: int) -> dict[str, float]:
    """Fit one of our configurations."""
    quantizer = config.build(vectors.shape[1], seed=10 * seed)
    spent = seconds_of(lambda: quantizer.fit(TrainingSet(vectors)))
    return {**spent, "error": share(vectors, quantizer.decode(quantizer.encode(vectors)))}


def fit_faiss(vectors: np.ndarray, beam: int, seed: int) -> dict[str, float]:
    """Fit faiss's quantizer with its other settings as they come."""
    dim = vectors.shape[1]
    quantizer = faiss.ResidualQuantizer(dim, LEVELS, BITS)
    quantizer.max_beam_size = beam
    quantizer.cp.seed = 1234 + seed
    # Changes no result: fewer warnings.
    quantizer.cp.min_points_per_centroid = 1
    spent = seconds_of(lambda: quantizer.train(vectors))
    own = share(vectors, quantizer.decode(quantizer.compute_codes(vectors)))
    quantizer.max_beam_size = 1
    greedy = share(vectors, quantizer.decode(quantizer.compute_codes(vectors)))
    return {**spent, "error": own, "error_greedy": greedy}


def seconds_of(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by the clock, and of all CPUs, which a busy machine stretches less."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }


def share(vectors: np.ndarray, decoded: np.ndarray) -> float:
    """Squared error over the variance of the vectors."""
    variance = np.square(vectors - vectors.mean(axis=0)).sum(dtype=np.float64)
    return float(np.square(vectors - decoded).sum(dtype=np.float64) / variance)


def gaussian(rows: int) -> np.ndarray:
    """Independent columns of falling variance."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((rows, DIM)) * np.linspace(1.5, 0.2, DIM)).astype(np.float32)


def clustered(rows: int) -> np.ndarray:
    """200 themes, 2,000 variants and noise."""
    rng = np.random.default_rng(1)
    themes, variants = rng.standard_normal((200, DIM)), rng.standard_normal((2000, DIM)) / 2
    noise = rng.standard_normal((rows, DIM)) / 2
    chosen = themes[rng.integers(200, size=rows)] + variants[rng.integers(2000, size=rows)]
    return (chosen + noise).astype(np.float32)


def beauty_vectors() -> np.ndarray | None:
    """Title vectors of amazon-beauty, where the data lies."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("FORGE_RAY_DATA", root.parent / "shared" / "data"))
    path = folder / "amazon-beauty" / "item_embeddings_minilm384.npz"
    return np.load(path)["embedding"].astype(np.float32) if path.is_file() else None
