"""An RQ-VAE trains with every kind of alignment, and with the losses beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forge_ray.config import load_config
from forge_ray.sid.quantizers.base import TrainingPairs, TrainingSet
from forge_ray.sid.quantizers.rq_vae import RqVaeConfig

NUM_ITEMS, NUM_USERS, WIDTH, LATENTS = 96, 40, 10, 8


def training_set() -> TrainingSet:
    """Items in clusters; pairs, users and teachers follow them."""
    rng = np.random.default_rng(0)
    cluster = np.arange(NUM_ITEMS) % 6
    centres, taste = rng.normal(size=(6, WIDTH)), rng.normal(size=(6, LATENTS))
    liking = np.arange(NUM_USERS) % 6
    anchor = rng.permutation(np.repeat(np.arange(NUM_ITEMS), 3))
    positive = (anchor + 6 * rng.integers(1, 10, len(anchor))) % NUM_ITEMS
    user = rng.permutation(np.arange(NUM_USERS))[
        cluster[anchor] + 6 * rng.integers(0, 6, len(anchor))
    ]
    noise = rng.normal(size=(NUM_ITEMS, WIDTH))
    return TrainingSet(
        (centres[cluster] + 0.3 * noise).astype(np.float32),
        pairs={
            "co_occurrence": TrainingPairs(anchor, positive),
            "interactions": TrainingPairs(
                anchor, positive, user=user, user_positive=(user + 6) % NUM_USERS
            ),
        },
        teachers={"teacher": taste[cluster].astype(np.float32)},
        users=centres[liking].astype(np.float32),
        user_teachers={"teacher": taste[liking].astype(np.float32)},
    )


CASES: dict[str, tuple[list[str], set[str]]] = {
    "none": (["alignment.kind=none"], set()),
    "forge_i2i": (["alignment.kind=forge_i2i"], {"self", "ori", "cl"}),
    "letter_cf": (["alignment.kind=letter_cf"], {"cf"}),
    "co_occurrence": (["alignment.kind=co_occurrence", "alignment.mask=known"], {"pairs"}),
    "rlmrec": (["alignment.kind=rlmrec"], {"con"}),
    "das": (
        ["alignment.kind=das", f"alignment.users.latent_dim={LATENTS}"],
        {"users", *(f"view_{view}" for view in range(1, 7))},
    ),
    "terms": (
        [
            "alignment.kind=terms",
            "alignment.teacher.teacher.kind=ppmi_svd",
            "alignment.terms.near={anchor: z, positive: z, weight: 0.1, temperature: 0.1}",
            "alignment.terms.cf={positive: teacher, pairing: own, source: identity}",
        ],
        {"near", "cf"},
    ),
    "diversity": (
        ["alignment.kind=none", "ema=false", "diversity.weight=0.01", "diversity.groups=4"],
        {"diversity"},
    ),
    "hamr": (["alignment.kind=forge_i2i", "hamr.weight=1"], {"hamr", "self"}),
    "contrastive": (["alignment.kind=none", "reconstruction=contrastive"], {"reconstruction"}),
}


@pytest.mark.parametrize(("kind", "teachers"), [("das", set()), ("letter_cf", {"teacher"})])
def test_without_pair_steps_only_teachers_of_single_items_are_read(
    kind: str, teachers: set[str]
) -> None:
    sizes = ["codebook_size=8", f"latent_dim={LATENTS}", "hidden=[12]", "max_steps=3"]
    config = load_config(RqVaeConfig, overrides=[*sizes, f"alignment.kind={kind}", "pair_share=0"])
    assert set(config.teachers) == teachers
    data, seen = training_set(), dict[str, Any]()
    items = TrainingSet(data.vectors, teachers={name: data.teachers[name] for name in teachers})
    config.build(WIDTH, seed=0).fit(items, report=lambda step, metrics: seen.update(metrics))
    assert ("cf" in seen) == bool(teachers)
    assert not {"users", "view_6"} & set(seen)


@pytest.mark.parametrize("mixing", ["alternate", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_every_alignment_trains(case: str, mixing: str) -> None:
    overrides, names = CASES[case]
    sizes = ["codebook_size=8", f"latent_dim={LATENTS}", "hidden=[12]", "max_steps=12"]
    batches = ["batch_size=32", "pair_batch_size=16", "pair_share=0.5", f"mixing={mixing}"]
    config = load_config(RqVaeConfig, overrides=[*sizes, *batches, *overrides])
    data, seen = training_set(), dict[str, Any]()
    quantizer = config.build(WIDTH, seed=0)
    quantizer.fit(data, report=lambda step, metrics: seen.update(metrics))
    assert names <= set(seen)
    assert all(np.isfinite(value) for value in seen.values())
    assert quantizer.encode(data.vectors).shape == (NUM_ITEMS, 3)
