"""What single choices do to semantic IDs: designs, their controls, and paired differences.

Usage: python scripts/record.py sid_effects -- python scripts/sid_effects.py DATA [--seeds 3]

Every design is fitted and scored on validation through the library, once per seed; what the store
holds is reused. Prints JSON: the scores by design and seed, and for each effect the paired
differences, and whether their mean reaches what is claimed while every seed has its sign.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from forge_ray.artifacts import ArtifactStore
from forge_ray.cli.inputs import open_data
from forge_ray.config import load_config
from forge_ray.data.schema import Dataset
from forge_ray.sid.config import SidConfig
from forge_ray.sid.fit import fit_sids
from forge_ray.sid.metrics.quality import symbol_quality
from forge_ray.sid.metrics.similarity import common_prefix
from forge_ray.sid.score import score_sids
from forge_ray.sid.storage import SidArtifact

KMEANS = ["quantizer.kind=rq_kmeans", "quantizer.levels=3"]
VAE = ["quantizer.kind=rq_vae", "quantizer.levels=3"]
# Nothing but the losses may fill the codebooks here. The weights are ten and a hundred times those
# of LETTER, whose own show no effect on usage in so few steps.
PLAIN = [
    *VAE,
    "quantizer.ema=false",
    "quantizer.assignment.kind=nearest",
    "quantizer.dead_code_restart=false",
    "quantizer.hidden=[128]",
    "quantizer.batch_size=512",
    "quantizer.max_steps=250",
]
CF = [
    *PLAIN,
    "quantizer.alignment.kind=letter_cf",
    "quantizer.alignment.weight=0.2",
    "quantizer.alignment.teacher.kind=ppmi_svd",
    "quantizer.alignment.teacher.dim=64",
]
DESIGNS: dict[str, list[str]] = {
    "kmeans": KMEANS,
    "kmeans+behaviour": [*KMEANS, "vectors.behaviour.alpha=0.5"],
    "kmeans4": ["quantizer.levels=4"],
    "kmeans4+behaviour": ["quantizer.levels=4", "vectors.behaviour.alpha=0.5"],
    "kmeans+sinkhorn_last": [*KMEANS, "resolver.kind=sinkhorn_last"],
    "kmeans+zcr": [*KMEANS, "resolver.kind=zcr"],
    "kmeans shuffled": ["quantizer.kind=shuffled", "quantizer.levels=3"],
    "random": ["quantizer.kind=random", "quantizer.levels=3"],
    "vae": [*VAE, "quantizer.alignment.kind=none"],
    "vae+i2i": [*VAE, "quantizer.alignment.kind=forge_i2i"],
    "vae plain": [*PLAIN, "quantizer.alignment.kind=none"],
    "vae+letter_cf": CF,
    "vae+letter_cf+diversity": [*CF, "quantizer.diversity.weight=1e-2"],
}


@dataclass(frozen=True)
class Effect:
    """A difference of two designs that share the seed."""

    claim: str
    design: str
    against: str
    metric: str
    at_least: float | None = None
    """Least change upwards; negative values with `at_most` for changes downwards."""
    at_most: float | None = None

    def holds(self, changes: list[float]) -> bool:
        """Whether the mean is large enough and every seed has its sign."""
        mean = float(np.mean(changes))
        low = self.at_least is None or (mean >= self.at_least and min(changes) >= 0)
        return low and (self.at_most is None or (mean <= self.at_most and max(changes) <= 0))


SMALL = 1e-9
EFFECTS = [
    Effect("behaviour fusion lowers bits, 4 x 256", "kmeans4+behaviour", "kmeans4",
           "backoff_bits", at_most=-0.1),
    Effect("… 3 x 256", "kmeans+behaviour", "kmeans", "backoff_bits", at_most=-0.1),
    Effect("CF alone empties level 1", "vae+letter_cf", "vae plain", "usage_level_1",
           at_most=-SMALL),
    Effect("diversity refills level 1", "vae+letter_cf+diversity", "vae+letter_cf",
           "usage_level_1", at_least=SMALL),
    Effect("Sinkhorn evens out the last level", "kmeans+sinkhorn_last", "kmeans",
           "last_entropy", at_least=SMALL),
    Effect("… and keeps the upper levels", "kmeans+sinkhorn_last", "kmeans", "upper_moved",
           at_least=0, at_most=0),
    Effect("zcr makes every SID unique", "kmeans+zcr", "kmeans", "not_unique",
           at_most=-SMALL),
    Effect("… and keeps the upper levels", "kmeans+zcr", "kmeans", "upper_moved",
           at_least=0, at_most=0),
    Effect("i2i brings held-out neighbours together", "vae+i2i", "vae", "lcp_held_out",
           at_least=SMALL),
    Effect("… beyond chance", "vae+i2i", "vae", "lcp_ratio", at_least=SMALL),
    Effect("shuffling destroys bits", "kmeans shuffled", "kmeans", "backoff_bits", at_least=0.1),
    *(
        Effect("… and moves no symbol statistic", "kmeans shuffled", "kmeans", metric,
               at_least=0, at_most=0)
        for metric in ("uniqueness", "gini", "colliding_items", "usage_level_1", "entropy_level_2",
                       "prefixes_2", "max_bucket")
    ),
]  # fmt: skip


def main() -> None:
    """Fits, scores and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store", default="./forge-store")
    options = parser.parse_args()
    store = ArtifactStore(options.store)
    dataset = open_data(options.data, store, verbose=False)
    seeds = range(options.seeds)
    rows = {
        (design, seed): row(design, seed, dataset, store) for design in DESIGNS for seed in seeds
    }
    found = [{**asdict(effect), **compare(effect, rows, len(seeds))} for effect in EFFECTS]
    scores = [{"design": design, "seed": seed, **one} for (design, seed), one in rows.items()]
    print(json.dumps({"designs": DESIGNS, "effects": found, "scores": scores}, allow_nan=False))


def row(design: str, seed: int, dataset: Dataset, store: ArtifactStore) -> dict[str, Any]:
    """Scores of one design, and what the table shows beside its raw codes."""
    print(f"{design}, seed {seed}", file=sys.stderr)
    config = load_config(SidConfig, overrides=[*DESIGNS[design], f"seed={seed}"])
    sids = fit_sids(config, dataset, store)
    scores = dict(score_sids(sids, dataset, store).manifest.metrics)
    return scores | resolved(sids) | train_agreement(sids, dataset)


def resolved(sids: SidArtifact) -> dict[str, float]:
    """The last level after resolution, and how many items another level moved of."""
    codes, upper = sids.table.codes, sids.raw.num_levels - 1
    quality = symbol_quality(codes, sids.table.codebook_sizes)
    return {
        "last_entropy": quality.levels[-1].entropy,
        "not_unique": 1 - quality.uniqueness,
        "upper_moved": float((codes[:, :upper] != sids.raw.codes[:, :upper]).any(axis=1).sum()),
    }


def train_agreement(sids: SidArtifact, dataset: Dataset) -> dict[str, float]:
    """Mean common prefix of train pairs: what alignment was trained on, beside `lcp_held_out`."""
    pairs = dataset.pairs()
    shared = common_prefix(sids.table.codes[pairs.anchor], sids.table.codes[pairs.positive])
    return {"lcp_train_pairs": float(np.average(shared, weights=pairs.weight))}


def compare(
    effect: Effect, rows: dict[tuple[str, int], dict[str, Any]], seeds: int
) -> dict[str, Any]:
    """Paired differences over seeds."""
    changes = [
        float(rows[effect.design, seed][effect.metric] - rows[effect.against, seed][effect.metric])
        for seed in range(seeds)
    ]
    spread = float(np.std(changes, ddof=1)) if seeds > 1 else 0.0
    mean = float(np.mean(changes))
    return {"changes": changes, "mean": mean, "sd": spread, "holds": effect.holds(changes)}


if __name__ == "__main__":
    main()
