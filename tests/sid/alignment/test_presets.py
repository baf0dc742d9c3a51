"""The kinds are lists of terms: FORGE's numbers, the others' formulas, and what each asks for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from forge_ray.config import from_mapping, load_config, to_mapping, to_overrides
from forge_ray.embed.teachers.ppmi_svd import PpmiSvdConfig
from forge_ray.errors import ConfigError
from forge_ray.sid.alignment import (
    KINDS,
    AlignmentBatch,
    AlignmentConfig,
    AlignmentDims,
    CoOccurrenceConfig,
    DasConfig,
    ForgeI2iConfig,
    LetterCfConfig,
    NoAlignmentConfig,
    RlmRecConfig,
    TermConfig,
    TermsConfig,
)
from forge_ray.sid.alignment.module import Alignment
from forge_ray.sid.config import SidConfig
from tests.sid.alignment import references
from tests.sid.alignment.batches import (
    INPUTS,
    LATENTS,
    MIDDLE,
    TEACHER,
    USERS,
    random_batch,
)

DIMS = AlignmentDims(
    inputs=INPUTS, latents=LATENTS, middle=MIDDLE, teachers={"teacher": TEACHER}, users=USERS
)
FORGE = {"max_scale": None, "normalize_inputs": False, "mask_false_negatives": False}


def build(config: AlignmentConfig, seed: int = 0) -> Alignment:
    torch.manual_seed(seed)
    return config.build(DIMS).double()


def rows(tensor: torch.Tensor) -> list[np.ndarray]:
    return list(tensor.detach().numpy())


def units(tensor: torch.Tensor) -> list[np.ndarray]:
    return [references.unit(row) for row in rows(tensor)]


def published_i2i(batch: AlignmentBatch, scales: list[float]) -> dict[str, float]:
    """FORGE's three terms: quantised with quantised, with the partner's input, with its own."""
    u, v = units(batch.anchor.reconstruction), units(batch.positive.reconstruction)
    a, b = rows(batch.anchor.inputs), rows(batch.positive.inputs)
    searches = {"self": ((u, v), (v, u)), "ori": ((u, b), (v, a)), "cl": ((u, a), (v, b))}
    return {
        name: sum(references.info_nce(*ends, scale=scale) for ends in both) / 2
        for (name, both), scale in zip(searches.items(), scales, strict=True)
    }


def test_forge_i2i_equals_the_published_formula() -> None:
    batch = random_batch("co_occurrence", 8)
    module = build(ForgeI2iConfig(**FORGE))
    scales = [math.exp(x) for x in (0.3, 1.0, 2.0)]
    with torch.no_grad():
        for (_, term), scale in zip(module.named_terms(), scales, strict=True):
            term.log_scale.copy_(torch.tensor(scale, dtype=torch.float64).log())
    losses = module(batch)
    expected = published_i2i(batch, scales)
    assert {name: 3 * loss.item() for name, loss in losses.items()} == pytest.approx(expected)


def test_forge_i2i_starts_at_its_temperature_and_learns_three() -> None:
    module = build(ForgeI2iConfig(temperature=0.05, **FORGE))
    batch = random_batch("co_occurrence", 8)
    expected = published_i2i(batch, [20.0] * 3)
    losses = module(batch)
    assert {n: 3 * loss.item() for n, loss in losses.items()} == pytest.approx(expected, rel=1e-6)
    torch.autograd.backward(torch.stack(list(losses.values())).sum())
    gradients = [p.grad for p in module.parameters()]
    assert len(gradients) == 3
    assert all(g is not None and g != 0 for g in gradients)


@pytest.mark.parametrize(
    "change",
    [
        {"max_scale": 2.0},
        {"normalize_inputs": True},
        {"mask_false_negatives": True},
        {"weight": 0.5},
        {"temperature": 0.5},
    ],
)
def test_every_field_of_forge_i2i_changes_the_loss(change: dict[str, float]) -> None:
    batch = random_batch("co_occurrence", 8)
    plain, other = (
        sum(loss.item() for loss in build(ForgeI2iConfig(**{**FORGE, **fields}))(batch).values())
        for fields in ({}, change)
    )
    assert abs(plain - other) > 1e-3


def test_letter_cf_is_a_softmax_of_dot_products() -> None:
    batch = random_batch("identity", 8)
    batch = replace(batch, teachers={"teacher": batch.teachers["teacher"].abs() + 0.1})
    loss = build(LetterCfConfig())(batch)["cf"].item()
    ends = rows(batch.anchor.quantized), rows(batch.teachers["teacher"])
    assert loss == pytest.approx(0.02 * references.info_nce(*ends, scale=1.0))


def test_letter_cf_needs_a_teacher_as_wide_as_the_latents() -> None:
    wide = replace(DIMS, teachers={"teacher": TEACHER + 1})
    with pytest.raises(ConfigError, match="one width"):
        LetterCfConfig().build(wide)
    LetterCfConfig(projector="linear").build(wide)


@pytest.mark.parametrize("attach", ["z", "z_q"])
def test_co_occurrence_compares_both_sides(attach: str) -> None:
    batch = random_batch("swing", 8)
    config = CoOccurrenceConfig(
        source="swing", attach=attach, mask="none", temperature=0.5, weight=2.0
    )
    name = "latents" if attach == "z" else "quantized"
    a, b = (units(getattr(view, name)) for view in (batch.anchor, batch.positive))
    both = references.info_nce(a, b, scale=2.0) + references.info_nce(b, a, scale=2.0)
    assert build(config)(batch)["pairs"].item() == pytest.approx(both)


def test_rlmrec_maps_the_codes_to_the_teacher() -> None:
    batch = random_batch("identity", 8)
    batch = replace(batch, teachers={"teacher": batch.teachers["teacher"].abs() + 0.1})
    module = build(RlmRecConfig())
    ((_, term),) = module.named_terms()
    mapped = units(term.projector(batch.anchor.quantized))
    expected = 0.01 * references.info_nce(mapped, units(batch.teachers["teacher"]), scale=5.0)
    assert module(batch)["con"].item() == pytest.approx(expected)


def test_das_compares_six_views_and_trains_the_user_side() -> None:
    batch = random_batch("interactions", 12)
    teachers = {"teacher": batch.teachers["teacher"].abs() + 0.1}
    batch = replace(batch, teachers=teachers)
    config = DasConfig(mask_false_negatives=False)
    config.users.latent_dim, config.users.codebook_size = LATENTS, 8
    module = build(config)
    losses = module(batch)
    assert module.users is not None
    both = torch.cat([batch.user.inputs, batch.user_positive.inputs])
    coded = module.users(both, gather=lambda rows: rows)
    z_u, other_u = coded.quantized.chunk(2)
    i_pro, u_int = teachers["teacher"], batch.user.teachers["teacher"]
    z_i, other_i = batch.anchor.quantized, batch.positive.quantized
    ends = {1: (z_u, i_pro), 2: (z_i, u_int), 3: (z_u, u_int), 4: (z_i, i_pro)}
    expected = {
        f"view_{view}": 0.5 * references.info_nce(units(a), units(b), scale=1 / 0.07)
        for view, (a, b) in ends.items()
    }
    for view, (a, b) in {5: (z_u, other_u), 6: (z_i, other_i)}.items():
        searches = [(units(a), units(b)), (units(b), units(a))]
        found = [references.info_nce(*search, scale=1 / 0.07) for search in searches]
        expected[f"view_{view}"] = 0.5 * sum(found) / 2
    expected["users"] = coded.loss.item()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)
    torch.autograd.backward(torch.stack(list(losses.values())).sum())
    silent = {name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()}
    # Codebooks follow running means instead.
    assert silent == {f"users.codebooks.{level}" for level in range(config.users.levels)}
    assert module.coded_users is not None
    assert torch.equal(module.coded_users.quantized, coded.quantized)


def test_das_without_user_codes_has_no_user_side() -> None:
    config = DasConfig(views=[2, 4, 6])
    assert build(config).users is None
    assert set(build(config)(random_batch("interactions", 6))) == {"view_2", "view_4", "view_6"}
    assert DasConfig(views=[5, 6]).teachers == {}
    with pytest.raises(ConfigError, match="some of 1 to 6"):
        DasConfig(views=[0])


def test_none_has_no_loss_and_asks_for_nothing() -> None:
    config = NoAlignmentConfig()
    assert (config.sources, config.teachers) == ({}, {})
    assert build(config)(random_batch("co_occurrence", 4)) == {}


def test_sources_and_teachers_are_what_the_terms_read() -> None:
    assert ForgeI2iConfig(source="swing").sources == {"swing": 1.0}
    assert LetterCfConfig().sources == {}
    assert DasConfig().sources == {"interactions": 1.0}
    assert isinstance(RlmRecConfig().teachers["teacher"], PpmiSvdConfig)
    terms = TermsConfig(
        terms={"a": TermConfig(), "b": TermConfig(source="swing"), "c": TermConfig(source="i2i")},
        shares={"swing": 3.0, "i2i": 0.0},
    )
    assert terms.sources == {"co_occurrence": 0.25, "swing": 0.75}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["kind=co_occurrence", "source=swng"], "one of identity, interactions, .* got 'swng'"),
        (["kind=co_occurrence", "source=identity"], "source identity must have pairing own"),
        (["kind=co_occurrence", "temperature=0"], "temperature must be > 0, got 0.0"),
        (["kind=letter_cf", "weight=-1"], "weights must be >= 0, got -1.0"),
        (["kind=das", "weight=-1"], "weights must be >= 0, got -1.0"),
        (["kind=das", "views=[]"], "views must be some of 1 to 6"),
        (["kind=terms", "shares.swing=2"], "shares must name sources of the terms, got 'swing'"),
        (["kind=terms", "terms.a.source=swng"], "got 'swng'"),
    ],
)
def test_mistakes_are_named_before_anything_is_fitted(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SidConfig, overrides=_of_alignment(given))


def _of_alignment(given: list[str]) -> list[str]:
    return ["quantizer.kind=rq_vae", *(f"quantizer.alignment.{one}" for one in given)]


def test_free_terms_name_their_teachers() -> None:
    term = TermConfig(positive="teacher", pairing="own", teacher="cf")
    with pytest.raises(ConfigError, match="must name cf"):
        TermsConfig(terms={"a": term})
    config = TermsConfig(terms={"a": term}, teacher={"cf": PpmiSvdConfig(dim=4)})
    assert config.teachers["cf"].dim == 4


@pytest.mark.parametrize("kind", [kind.kind for kind in KINDS])
def test_every_kind_survives_its_configuration(kind: str) -> None:
    config = AlignmentConfig.choices()[kind]()
    assert from_mapping(type(config), to_mapping(config)) == config


def test_no_terms_are_no_alignment() -> None:
    with pytest.raises(ConfigError, match="must hold a term, got none"):
        build(TermsConfig())


def test_terms_are_configured_by_name() -> None:
    config = load_config(
        TermsConfig,
        overrides=[
            "terms.near.anchor=z",
            "terms.cf={positive: teacher, pairing: own, teacher: sequence}",
            "teacher.sequence.kind=ppmi_svd",
            "teacher.sequence.dim=5",
            "terms.near.weight=0.5",
        ],
    )
    assert config.terms["near"] == TermConfig(anchor="z", weight=0.5)
    assert config.teacher == {"sequence": PpmiSvdConfig(dim=5)}
    assert load_config(TermsConfig, overrides=to_overrides(config)) == config
