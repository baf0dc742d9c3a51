"""Every term equals a plain loop in float64, on one worker and on several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from forge_ray.errors import ConfigError
from forge_ray.sid.alignment import AlignmentBatch, AlignmentDims, KnownPairs, TermConfig
from forge_ray.sid.alignment.batch import Gather
from forge_ray.sid.alignment.module import Alignment
from forge_ray.sid.alignment.users import UserTokenizerConfig
from tests.sid.alignment import references
from tests.sid.alignment.batches import (
    INPUTS,
    LATENTS,
    MIDDLE,
    TEACHER,
    USERS,
    random_batch,
    run_workers,
    share_of,
)

DIMS = AlignmentDims(
    inputs=INPUTS, latents=LATENTS, middle=MIDDLE, teachers={"teacher": TEACHER}, users=USERS
)
SIDE_USERS = UserTokenizerConfig(levels=2, codebook_size=3, latent_dim=LATENTS, hidden=[6])
FIELDS = {
    "x": "inputs",
    "z": "latents",
    "z_q": "quantized",
    "x_hat": "reconstruction",
    "middle": "middle",
}


def build(*terms: TermConfig, seed: int = 0) -> Alignment:
    torch.manual_seed(seed)
    named = {f"term_{i}": term for i, term in enumerate(terms)}
    return Alignment(named, DIMS, sources={}, users=SIDE_USERS).double()


def tensor_of(batch: AlignmentBatch, name: str, side: int) -> np.ndarray:
    if name == "teacher":
        return batch.teachers["teacher"].numpy()
    if name == "user_teacher":
        assert batch.user is not None
        return batch.user.teachers["teacher"].numpy()
    view = (batch.anchor, batch.positive)[side]
    return getattr(view, FIELDS[name]).detach().numpy()


def decide_negatives(
    term: TermConfig, batch: AlignmentBatch, rows: int, columns: int
) -> references.IsNegative:
    items = [batch.anchor.items.tolist(), batch.positive.items.tolist()]
    users = None
    if batch.user is not None and batch.user_positive is not None:
        users = [batch.user.users.tolist(), batch.user_positive.users.tolist()]

    def decide(i: int, j: int) -> bool:
        if term.mask == "none":
            return True
        if references.shares_an_end(*items, i, j):
            return False
        if users is not None and references.shares_an_end(*users, i, j):
            return False
        low, high = sorted((items[rows][i], items[columns][j]))
        assert batch.known is not None
        return not (term.mask == "known" and low * 9 + high in batch.known.keys.tolist())

    return decide


def directed(term: TermConfig, batch: AlignmentBatch, first: int, second: int) -> float:
    second = first if term.pairing == "own" else second
    ends = [
        list(tensor_of(batch, term.anchor, first)),
        list(tensor_of(batch, term.positive, second)),
    ]
    counts = [
        all(
            end[i].any() or "teacher" not in name
            for end, name in zip(ends, term.tensors, strict=True)
        )
        for i in range(len(ends[0]))
    ]
    for end, is_unit in ((0, term.similarity != "dot"), (1, term.similarity == "cos")):
        if is_unit:
            ends[end] = [references.unit(row) if row.any() else row for row in ends[end]]
    places, losses = [first, second], []
    for start, goal in ((0, 1), (1, 0))[: 1 + term.symmetric]:
        is_negative = decide_negatives(term, batch, places[start], places[goal])
        losses.append(
            references.info_nce(
                ends[start],
                ends[goal],
                scale=1 / term.temperature,
                is_negative=is_negative,
                counts=counts,
            )
        )
    return sum(losses) / len(losses)


def reference(term: TermConfig, batch: AlignmentBatch) -> float:
    """A term without a projector, by loops."""
    if term.ends == "one":
        return directed(term, batch, 0, 1)
    return (directed(term, batch, 0, 1) + directed(term, batch, 1, 0)) / 2


TERMS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "both ends": {"ends": "both", "temperature": 0.5},
    "symmetric": {"anchor": "z", "positive": "z_q", "symmetric": True, "temperature": 0.2},
    "unmasked": {"mask": "none"},
    "known": {"mask": "known", "symmetric": True, "ends": "both", "anchor": "z", "positive": "z_q"},
    "own": {"anchor": "x_hat", "positive": "x", "pairing": "own", "ends": "both"},
    "half cos": {"anchor": "x_hat", "positive": "x", "similarity": "half_cos", "ends": "both"},
    "dot": {"anchor": "z", "positive": "z", "similarity": "dot", "temperature": 1.0},
    "middle": {"anchor": "middle", "positive": "middle", "temperature": 2.0},
    "teacher": {
        "positive": "teacher",
        "source": "identity",
        "pairing": "own",
        "similarity": "dot",
        "temperature": 1.0,
    },
    "teacher, symmetric": {"positive": "teacher", "pairing": "own", "symmetric": True},
    "teacher as anchor": {"anchor": "teacher", "positive": "z", "pairing": "own"},
    "learned": {"learn_temperature": True, "max_scale": 100.0, "temperature": 1.0},
    "user's teacher": {"positive": "user_teacher", "source": "interactions", "pairing": "own"},
    "items of users": {"source": "interactions", "ends": "both"},
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_term_equals_a_plain_loop(name: str, seed: int) -> None:
    term = TermConfig(**TERMS[name])
    batch = random_batch(term.source, 12, seed=seed)
    loss = build(term)(batch)["term_0"]
    assert loss.item() == pytest.approx(reference(term, batch), abs=1e-10)


@pytest.mark.parametrize("name", [*TERMS, "user codes", "projected"])
@pytest.mark.parametrize("size", [2, 3])
def test_workers_together_equal_one_process(name: str, size: int) -> None:
    """Value and every gradient; the average over workers is what they minimise."""
    own = {
        "user codes": TermConfig(
            anchor="user_z_q", positive="user_z_q", source="interactions", ends="both"
        ),
        "projected": TermConfig(
            anchor="z_q",
            positive="teacher",
            source="identity",
            pairing="own",
            projector="mlp",
            learn_temperature=True,
        ),
    }
    term = own.get(name) or TermConfig(**TERMS[name])
    whole = with_gradients(random_batch(term.source, 12))
    alone, modules = build(term), [build(term) for _ in range(size)]
    torch.autograd.backward(torch.stack(list(alone(whole).values())).sum())

    copy = with_gradients(random_batch(term.source, 12))

    def total(rank: int, gather: Gather) -> torch.Tensor:
        part = replace(share_of(copy, rank, size), gather=gather)
        return torch.stack(list(modules[rank](part).values())).sum()

    losses = run_workers(size, total)
    torch.autograd.backward(torch.stack(losses).mean())
    expected = gradients(whole, [alone])
    found = gradients(copy, modules)
    assert expected.keys() == found.keys()
    assert any(value.abs().max() > 1e-6 for value in expected.values())
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-10), key


def with_gradients(batch: AlignmentBatch) -> AlignmentBatch:
    for view in {id(batch.anchor): batch.anchor, id(batch.positive): batch.positive}.values():
        for name in FIELDS.values():
            getattr(view, name).requires_grad_(True)
    return batch


def gradients(batch: AlignmentBatch, modules: list[Alignment]) -> dict[str, torch.Tensor]:
    """Of the tensors of a batch, and of parameters as the sum over workers."""
    found: dict[str, torch.Tensor] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros(())) + parameter.grad
    for side, view in (("a", batch.anchor), ("b", batch.positive)):
        sent = {f"{side} {name}": getattr(view, name).grad for name in FIELDS.values()}
        found |= {name: value for name, value in sent.items() if value is not None}
    return found


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"anchor": "zq"}, "anchor must be one of"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"max_scale": 0.0}, "max_scale must be > 0"),
        ({"start": 1.0}, "start must be in"),
        ({"weight": -1.0}, "weights must be >= 0"),
        ({"anchor": "user_z"}, "source to interactions"),
        ({"positive": "teacher"}, "pairing own and ends one"),
        ({"pairing": "own"}, "two tensors"),
        ({"source": "identity", "positive": "x_hat"}, "source identity must have pairing own"),
        (
            {"anchor": "user_z", "source": "interactions", "mask": "known"},
            "mask must be none or same",
        ),
    ],
)
def test_a_term_that_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TermConfig(**fields)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (TermConfig(anchor="z_q", positive="x"), "tensors of one width"),
        (TermConfig(positive="teacher", teacher="no", pairing="own"), "one of teacher, got 'no'"),
    ],
)
def test_a_term_that_does_not_fit_the_batches_is_refused(term: TermConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(term)


def test_a_term_of_users_needs_users() -> None:
    term = TermConfig(anchor="user_z", positive="user_z", source="interactions")
    with pytest.raises(ConfigError, match="user vectors"):
        Alignment({"a": term}, replace(DIMS, users=0), sources={}, users=SIDE_USERS)


def test_known_negatives_must_be_given() -> None:
    batch = replace(random_batch("co_occurrence", 4), known=None)
    with pytest.raises(ValueError, match=r"batch\.known must be given"):
        build(TermConfig(mask="known"))(batch)


def test_a_weight_follows_its_schedule() -> None:
    term = TermConfig(weight=1.0, final_weight=0.2, start=0.5)
    weights = [term.weight_at(progress) for progress in (0.0, 0.49, 0.5, 0.75, 1.0)]
    assert weights == pytest.approx([0.0, 0.0, 1.0, 0.6, 0.2])
    batch = random_batch("co_occurrence", 6)
    full = build(TermConfig())(batch)["term_0"]
    part = build(term)(replace(batch, progress=0.75))["term_0"]
    assert part.item() == pytest.approx(0.6 * full.item())


def test_a_learned_temperature_is_bounded() -> None:
    batch = random_batch("co_occurrence", 6)
    bounded = TermConfig(learn_temperature=True, max_scale=2.0)
    expected = reference(TermConfig(temperature=0.5), batch)
    module = build(bounded)
    assert module(batch)["term_0"].item() == pytest.approx(expected, abs=1e-10)
    assert module.scales() == {"scale_term_0": 2.0}


def test_a_projector_serves_both_ends_of_one_tensor() -> None:
    module = build(TermConfig(projector="linear", temperature=1.0, mask="none"))
    batch = random_batch("co_occurrence", 5)
    (layer,) = (term.projector for _, term in module.named_terms())
    assert isinstance(layer, torch.nn.Linear)
    ends = [
        [references.unit(row) for row in layer(view.quantized).detach().numpy()]
        for view in (batch.anchor, batch.positive)
    ]
    expected = references.info_nce(ends[0], ends[1], scale=1.0)
    assert module(batch)["term_0"].item() == pytest.approx(expected, abs=1e-10)


def test_a_batch_reaches_the_terms_of_its_source_only() -> None:
    module = build(
        TermConfig(), TermConfig(source="swing"), TermConfig(source="swing", ends="both")
    )
    assert list(module(random_batch("co_occurrence", 4))) == ["term_0"]
    assert list(module(random_batch("swing", 4))) == ["term_1", "term_2"]
    assert module(random_batch("other", 4)) == {}


def test_half_precision_batches_are_compared_in_full() -> None:
    batch = random_batch("co_occurrence", 8)
    half = replace(
        batch,
        anchor=replace(batch.anchor, quantized=batch.anchor.quantized.bfloat16()),
        positive=replace(batch.positive, quantized=batch.positive.quantized.bfloat16()),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build(TermConfig()).float()(half)["term_0"]
    assert loss.dtype == torch.float32
    rounded = replace(
        half,
        anchor=replace(half.anchor, quantized=half.anchor.quantized.double()),
        positive=replace(half.positive, quantized=half.positive.quantized.double()),
    )
    assert loss.item() == pytest.approx(reference(TermConfig(), rounded), rel=1e-5)


def test_known_pairs_are_found_in_either_order() -> None:
    known = KnownPairs.of(torch.tensor([3, 1, 1]), torch.tensor([0, 2, 2]), num_items=5)
    items = torch.arange(5)
    marked = {tuple(pair) for pair in known.between(items, items).nonzero().tolist()}
    assert marked == {(0, 3), (3, 0), (1, 2), (2, 1)}
    none = KnownPairs.of(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), num_items=5
    )
    assert not none.between(items, items).any()
