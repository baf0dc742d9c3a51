"""The debiased teacher: its loss is that of plain loops, and popularity moves to its own half."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from forge_ray.data.ragged import Ragged
from forge_ray.embed.teachers.base import TrainLog
from forge_ray.embed.teachers.two_tower import Events, TwoTower, TwoTowerConfig
from forge_ray.errors import ConfigError

CONFIG = TwoTowerConfig(
    dim=8, hidden=16, epochs=12, batch_events=64, learning_rate=0.03, holdout_share=0.1
)
NUM_ITEMS = 40


def skewed_log(num_users: int = 150) -> TrainLog:
    """Two groups of users and items; inside a group items are chosen by a power law."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 21) ** 1.2
    rows = [
        rng.choice(20, size=rng.integers(2, 9), p=weights / weights.sum()) + 20 * (user % 2)
        for user in range(num_users)
    ]
    users = np.arange(num_users, dtype=np.int64)
    return TrainLog(users, Ragged.from_lists(rows, dtype=np.int32), NUM_ITEMS)


def test_the_loss_is_that_of_plain_loops() -> None:
    log = skewed_log(30)
    torch.manual_seed(0)
    model = TwoTower(len(log), log.num_items, CONFIG).double()
    events = Events.of(log, torch.device("cpu"))
    rows = torch.arange(12)
    got = {name: value.item() for name, value in events.loss(model, CONFIG, rows).items()}

    users, items = log.items.row_ids[:12], log.items.values[:12]
    share = log.item_counts() / log.item_counts().sum()
    cosines = model.clicks(events.users[rows], events.items[rows]).detach().numpy()
    click = 0.0
    for row in range(12):
        scores = {}
        for column in range(12):
            if column == row or items[column] != items[row]:
                scores[column] = cosines[row, column] / CONFIG.temperature - np.log(
                    share[items[column]]
                )
        click -= scores[row] - np.log(sum(np.exp(score) for score in scores.values()))
    assert got["click"] == pytest.approx(click / 12, rel=1e-6)

    table = {name: rows.detach().numpy() for name, rows in model.named_parameters()}
    overlap = 0.0
    for user, item in zip(users, items, strict=True):
        for one, other, at in (
            ("interest", "conformity", user),
            ("property", "popularity", item),
        ):
            a, b = table[f"{one}.weight"][at], table[f"{other}.weight"][at]
            overlap += (a @ b) ** 2 / ((a @ a) * (b @ b))
    assert got["overlap"] == pytest.approx(overlap / 12, rel=1e-6)

    degree = np.log1p(log.item_counts())
    wanted = (degree - degree.mean()) / degree.std()
    foretold = table["popularity.weight"] @ table["item_degree.weight"][0]
    foretold += table["item_degree.bias"]
    lengths = np.log1p(log.items.lengths)
    wanted_user = (lengths - lengths.mean()) / lengths.std()
    foretold_user = table["conformity.weight"] @ table["user_degree.weight"][0]
    foretold_user += table["user_degree.bias"]
    error = np.mean((foretold - wanted)[items] ** 2)
    error += np.mean((foretold_user - wanted_user)[users] ** 2)
    assert got["degree"] == pytest.approx(error, rel=1e-5)


def test_items_of_one_group_come_close() -> None:
    found = CONFIG.fit(skewed_log())
    unit = found.items / np.linalg.norm(found.items, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[:20, :20].mean() > cosine[:20, 20:].mean() + 0.2
    assert found.metrics["click_held_out"] < 3.5


def test_popularity_moves_out_of_the_property() -> None:
    log = skewed_log()
    biased = dataclasses.replace(CONFIG, orthogonality=0.0, popularity=0.0).fit(log).metrics
    debiased = dataclasses.replace(CONFIG, orthogonality=3.0).fit(log).metrics
    assert debiased["items_overlap"] < 0.5 * biased["items_overlap"]
    assert debiased["users_overlap"] < 0.5 * biased["users_overlap"]
    assert debiased["log_degree_r2_of_popularity"] > biased["log_degree_r2_of_popularity"]
    assert debiased["log_degree_r2_of_popularity"] > 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 4),
        ("hidden", 8),
        ("temperature", 0.5),
        ("orthogonality", 0.0),
        ("popularity", 0.0),
        ("epochs", 1),
        ("patience", 1),
        ("holdout_share", 0.0),
        ("batch_events", 50),
        ("learning_rate", 0.01),
        ("seed", 1),
    ],
)
def test_every_field_changes_the_vectors(field: str, value: float) -> None:
    # The loss of the events set aside first rises here, then falls below its start.
    base = dataclasses.replace(CONFIG, learning_rate=0.05, patience=6)
    log = skewed_log(40)
    one, other = base.fit(log), dataclasses.replace(base, **{field: value}).fit(log)
    assert not np.array_equal(one.items, other.items)


def test_bad_fields_are_named() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.temperature must be > 0, got 0"):
        dataclasses.replace(CONFIG, temperature=0.0)
    with pytest.raises(ConfigError, match=r"teacher\.orthogonality must be >= 0, got -1"):
        dataclasses.replace(CONFIG, orthogonality=-1.0)
