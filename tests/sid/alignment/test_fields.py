"""Every field of every alignment changes what a few training steps arrive at."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch

from forge_ray.config import Component
from forge_ray.embed.teachers.ppmi_svd import PpmiSvdConfig
from forge_ray.sid.alignment import (
    KINDS,
    AlignmentConfig,
    AlignmentDims,
    CoOccurrenceConfig,
    DasConfig,
    ForgeI2iConfig,
    LetterCfConfig,
    RlmRecConfig,
    TermConfig,
    TermsConfig,
)
from forge_ray.sid.alignment.users import UserTokenizerConfig
from forge_ray.sid.quantizers.rq_vae_codebooks import RunningMeans
from forge_ray.sid.quantizers.workers import Workers
from tests.sid.alignment.batches import (
    INPUTS,
    LATENTS,
    MIDDLE,
    TEACHER,
    USERS,
    random_batch,
)

SOURCES = ("identity", "co_occurrence", "swing", "interactions")
USER_SIDE = UserTokenizerConfig(levels=2, codebook_size=4, latent_dim=LATENTS, hidden=[5])
TEACHERS = {"teacher": PpmiSvdConfig(), "other": PpmiSvdConfig(dim=9)}


def trained(config: AlignmentConfig) -> list[float]:
    """Losses of three steps on one batch of every source, weighted as the sources are drawn."""
    torch.manual_seed(0)
    widths = dict.fromkeys(TEACHERS, TEACHER)
    dims = AlignmentDims(
        inputs=INPUTS, latents=LATENTS, middle=MIDDLE, teachers=widths, users=USERS
    )
    module = config.build(dims).double()
    batches = [random_batch(source, 12, seed=i) for i, source in enumerate(SOURCES)]
    free = [view for batch in batches for view in (batch.anchor, batch.positive)]
    tensors = [view.quantized.requires_grad_(True) for view in {id(v): v for v in free}.values()]
    optimizer = torch.optim.SGD([*tensors, *module.parameters()], lr=0.5)
    means = None
    if module.users is not None:
        decay = module.users.config.ema_decay
        means = RunningMeans(list(module.users.codebooks), decay, Workers())
    shares = {"identity": 1.0, **config.sources}
    curve = []
    for progress in (0.0, 0.3, 0.9):
        losses = [torch.zeros((), dtype=torch.float64)]
        for batch in batches:
            teachers = {
                "teacher": batch.teachers["teacher"],
                "other": batch.teachers["teacher"].flip(1),
            }
            found = module(replace(batch, progress=progress, teachers=teachers))
            losses += [shares.get(batch.source, 0.0) * loss for loss in found.values()]
        total = torch.stack(losses).sum()
        optimizer.zero_grad()
        if total.requires_grad:
            torch.autograd.backward(total)
            optimizer.step()
        if means is not None and module.coded_users is not None:
            means.update(module.coded_users)
        curve.append(total.item())
    return curve


def terms(**fields: Any) -> TermsConfig:
    return TermsConfig(terms={"a": TermConfig(**fields)}, teacher=TEACHERS)


LEARNED = {"learn_temperature": True}
TEACHING = {"positive": "teacher", "pairing": "own"}
TERM_CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "anchor": ({}, {"anchor": "z"}),
    "positive": ({}, {"positive": "z"}),
    "source": ({}, {"source": "swing"}),
    "teacher": (TEACHING, {"teacher": "other"}),
    "pairing": ({"anchor": "z"}, {"pairing": "own"}),
    "ends": ({}, {"ends": "both"}),
    "symmetric": ({}, {"symmetric": True}),
    "similarity": ({}, {"similarity": "half_cos"}),
    "temperature": ({}, {"temperature": 0.5}),
    "learn_temperature": ({}, LEARNED),
    "max_scale": (LEARNED, {"max_scale": 2.0}),
    "mask": ({}, {"mask": "known"}),
    "projector": ({}, {"projector": "linear"}),
    "weight": ({}, {"weight": 0.5}),
    "final_weight": ({}, {"final_weight": 0.5}),
    "start": ({}, {"start": 0.5}),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TermConfig)])
def test_every_field_of_a_term_changes_the_training(field: str) -> None:
    base, change = TERM_CHANGES[field]
    assert trained(terms(**base)) != pytest.approx(trained(terms(**{**base, **change})), rel=1e-6)


FREE = TermsConfig(
    terms={
        "a": TermConfig(anchor="user_z_q", positive="user_z_q", source="interactions"),
        "b": TermConfig(source="swing"),
    },
    users=USER_SIDE,
)
BASES: dict[str, AlignmentConfig] = {
    "terms": FREE,
    "forge_i2i": ForgeI2iConfig(),
    "letter_cf": LetterCfConfig(),
    "co_occurrence": CoOccurrenceConfig(),
    "das": DasConfig(users=USER_SIDE),
    "rlmrec": RlmRecConfig(),
}
CHANGES: dict[str, dict[str, Any]] = {
    "terms": {
        "terms": {"b": TermConfig(source="swing")},
        "shares": {"swing": 3.0},
        "users": replace(USER_SIDE, commitment=1.0),
    },
    "forge_i2i": {
        "source": "swing",
        "weight": 0.5,
        "temperature": 0.5,
        "max_scale": 2.0,
        "normalize_inputs": False,
        "mask_false_negatives": False,
    },
    "letter_cf": {"weight": 0.5, "projector": "linear"},
    "co_occurrence": {
        "source": "swing",
        "attach": "z",
        "weight": 0.5,
        "temperature": 0.5,
        "learn_temperature": True,
        "mask": "known",
    },
    "das": {
        "users": replace(USER_SIDE, levels=1),
        "views": [1, 2],
        "weight": 0.1,
        "temperature": 0.5,
        "attach": "z",
        "projector": "mlp",
        "mask_false_negatives": False,
    },
    "rlmrec": {"weight": 0.5, "temperature": 0.5, "projector": "linear"},
}


def fields_of(kind: type[Component]) -> list[tuple[str, str]]:
    # A teacher is fitted before: what it changes is which vectors the batches hold.
    names = [f.name for f in dataclasses.fields(kind) if f.name not in ("kind", "teacher")]
    return [(kind.kind, name) for name in names]


@pytest.mark.parametrize(("kind", "field"), [pair for kind in KINDS for pair in fields_of(kind)])
def test_every_field_of_a_kind_changes_the_training(kind: str, field: str) -> None:
    base = BASES[kind]
    changed = replace(base, **{field: CHANGES[kind][field]})
    assert trained(base) != pytest.approx(trained(changed), rel=1e-6)


USER_CHANGES: dict[str, Any] = {
    "levels": 1,
    "codebook_size": 8,
    "latent_dim": LATENTS + 1,
    "hidden": [6],
    "commitment": 1.0,
    "ema_decay": 0.5,
    "weight": 0.5,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(UserTokenizerConfig)])
def test_every_field_of_the_user_side_changes_the_training(field: str) -> None:
    base = DasConfig(users=USER_SIDE, projector="linear")
    changed = replace(base, users=replace(USER_SIDE, **{field: USER_CHANGES[field]}))
    assert trained(base) != pytest.approx(trained(changed), rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(kind(), "teacher")])
def test_a_kind_asks_for_the_teacher_it_is_given(kind: type[AlignmentConfig]) -> None:
    given = PpmiSvdConfig(dim=7)
    teacher = {"teacher": given} if kind is TermsConfig else given
    assert list(kind(teacher=teacher).teachers.values()) == [given]
