"""The debiased teacher of DAS: what a user wants and what an item is, apart from popularity.

A click model of two towers: user = MLP(interest ⊕ conformity), item = MLP(property ⊕ popularity).
Conformity and popularity must foretell how often the user or item occurs and stand at right angles
to interest and property; only interest and property leave this module.

Source: DAS (arXiv 2508.10584), sections on the debiased model; no code is public. Certain are the
four vectors, the two towers and that the halves are orthogonal. Ours: the form of the constraint
(squared cosine), the regression on log-degree, and the softmax over in-batch items, corrected by
how often an item is drawn so that the score keeps its popularity.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from forge_ray.embed.teachers.base import (
    FloatArray,
    Int64Array,
    TeacherConfig,
    TeacherReport,
    TeacherVectors,
    TrainLog,
    ignore_report,
    require_at_least,
    unseen_to_zero,
)
from forge_ray.errors import ConfigError, TrainingError


@dataclass(kw_only=True)
class TwoTowerConfig(TeacherConfig):
    """Debiased two-tower click model; `dim` is the width of each of its four vectors."""

    kind: Literal["two_tower"] = "two_tower"
    hidden: int = 128
    """Width of the towers' hidden layer."""
    temperature: float = 0.1
    """Divides the cosine of user and item; no value is published."""
    orthogonality: float = 1.0
    """Weight of the squared cosines of interest with conformity and property with popularity."""
    popularity: float = 1.0
    """Weight of the regression of conformity and popularity on log-degree."""
    epochs: int = 50
    """Most passes over the events."""
    patience: int = 3
    """Epochs without a lower loss on the events set aside before training stops."""
    holdout_share: float = 0.05
    """Share of the train events set aside to choose the epoch; 0 trains `epochs` on all."""
    batch_events: int = 1024
    """Events per step; the others of a batch are an event's negatives."""
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        counts = {name: getattr(self, name) for name in ("hidden", "epochs", "patience")}
        require_at_least({**counts, "batch_events": self.batch_events}, 1)
        require_at_least(
            {name: getattr(self, name) for name in ("orthogonality", "popularity", "seed")}, 0
        )
        for name in ("temperature", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"teacher.{name} must be > 0, got {getattr(self, name)}.")
        if not 0 <= self.holdout_share < 1:
            raise ConfigError(
                f"teacher.holdout_share must be in [0, 1), got {self.holdout_share}. Use a share."
            )

    def fit(self, log: TrainLog, *, report: TeacherReport = ignore_report) -> TeacherVectors:
        """Train on the log's events; the epoch is chosen on some of them that are set aside.

        Args:
            log: train histories.
            report: called after every epoch.

        Raises:
            TrainingError: the loss is not finite.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        events = Events.of(log, device)
        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = TwoTower(len(log), log.num_items, self).to(device)
            figures = _train(model, self, events, rng, report)
        counts = log.item_counts()
        return TeacherVectors(
            items=unseen_to_zero(_array(model.property), counts),
            users=_array(model.interest),
            metrics={**figures, **_debias_figures(model, counts)},
        )


class TwoTower(nn.Module):
    """Four tables of vectors and two towers over them."""

    interest: nn.Embedding
    conformity: nn.Embedding
    property: nn.Embedding
    popularity: nn.Embedding

    def __init__(self, num_users: int, num_items: int, config: TwoTowerConfig) -> None:
        """Make a model with random weights, drawn from torch's generator.

        Args:
            num_users: users of the log, U.
            num_items: catalogue size N.
            config: `dim` and `hidden` are read.
        """
        super().__init__()
        # Sparse gradients: a step touches the rows of its batch, whatever U and N.
        tables = [
            nn.Embedding(rows, config.dim, sparse=True)
            for rows in (num_users, num_users, num_items, num_items)
        ]
        self.interest, self.conformity, self.property, self.popularity = tables
        for table in tables:
            # Small: a row that few events touch must not keep the direction it was drawn with.
            nn.init.normal_(table.weight, std=0.01)
        self.user_tower, self.item_tower = (
            nn.Sequential(
                nn.Linear(2 * config.dim, config.hidden),
                nn.ReLU(),
                nn.Linear(config.hidden, config.dim),
            )
            for _ in range(2)
        )
        self.user_degree, self.item_degree = (nn.Linear(config.dim, 1) for _ in range(2))

    def clicks(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Cosines of every user with every item, float [B, C].

        Args:
            users: int64 [B] rows of the log.
            items: int64 [C].
        """
        user = self.user_tower(torch.cat([self.interest(users), self.conformity(users)], dim=1))
        item = self.item_tower(torch.cat([self.property(items), self.popularity(items)], dim=1))
        return functional.normalize(user, dim=1) @ functional.normalize(item, dim=1).T

    def overlap(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Mean squared cosine of the two halves of users, plus that of items; scalar."""
        user = functional.cosine_similarity(self.interest(users), self.conformity(users))
        item = functional.cosine_similarity(self.property(items), self.popularity(items))
        return user.square().mean() + item.square().mean()

    def degree_error(
        self, users: torch.Tensor, items: torch.Tensor, degrees: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Mean squared error of the degrees that conformity and popularity foretell; scalar."""
        user = self.user_degree(self.conformity(users))[:, 0]
        item = self.item_degree(self.popularity(items))[:, 0]
        return functional.mse_loss(user, degrees[0]) + functional.mse_loss(item, degrees[1])


@dataclass(frozen=True, eq=False)
class Events:
    """Every (user, item) of a log, and how often either occurs."""

    users: torch.Tensor
    """int64 [E] rows of the log."""
    items: torch.Tensor
    """int64 [E]."""
    user_degree: torch.Tensor
    """Standardised log(1 + degree), float32 [U]."""
    item_degree: torch.Tensor
    """Standardised log(1 + degree), float32 [N]."""
    log_share: torch.Tensor
    """Logarithm of each item's share of the events, float32 [N]; of one event where none."""

    @classmethod
    def of(cls, log: TrainLog, device: torch.device) -> Events:
        """Lay out the events of a log."""
        counts = log.item_counts()
        share = np.log(np.maximum(counts, 1) / counts.sum())
        arrays = (
            log.items.row_ids,
            log.items.values.astype(np.int64),
            _standard_log(log.items.lengths),
            _standard_log(counts),
            share.astype(np.float32),
        )
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def loss(
        self, model: TwoTower, config: TwoTowerConfig, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The three parts of one batch's loss, unweighted."""
        users, items = self.users[rows], self.items[rows]
        logits = model.clicks(users, items) / config.temperature - self.log_share[items]
        twice = (items[:, None] == items).fill_diagonal_(False)
        labels = torch.arange(len(rows), device=rows.device)
        degrees = self.user_degree[users], self.item_degree[items]
        return {
            "click": functional.cross_entropy(logits.masked_fill(twice, -torch.inf), labels),
            "overlap": model.overlap(users, items),
            "degree": model.degree_error(users, items, degrees),
        }


def _train(
    model: TwoTower,
    config: TwoTowerConfig,
    events: Events,
    rng: np.random.Generator,
    report: TeacherReport,
) -> dict[str, float]:
    order = rng.permutation(len(events.users))
    num_aside = min(int(np.ceil(config.holdout_share * len(order))), len(order) - 1)
    aside, train = order[:num_aside], order[num_aside:]
    optimizers = _optimizers(model, config.learning_rate)
    best, best_epoch, epoch = np.inf, 0, 0
    best_state = None
    for epoch in range(config.epochs):
        figures = {"loss": _one_epoch(model, config, events, rng.permutation(train), optimizers)}
        if num_aside:
            figures["click_held_out"] = _click_loss(model, config, events, aside)
            if figures["click_held_out"] < best:
                best, best_epoch = figures["click_held_out"], epoch
                best_state = copy.deepcopy(model.state_dict())
        report(epoch, figures)
        if num_aside and epoch - best_epoch >= config.patience:
            break
    if best_state is None:
        return {"epochs": epoch + 1}
    model.load_state_dict(best_state)
    return {"epochs": epoch + 1, "click_held_out": best}


def _one_epoch(
    model: TwoTower,
    config: TwoTowerConfig,
    events: Events,
    order: Int64Array,
    optimizers: list[torch.optim.Optimizer],
) -> float:
    total = 0.0
    for rows in _batches(order, config.batch_events, events.users.device):
        parts = events.loss(model, config, rows)
        loss = parts["click"] + config.orthogonality * parts["overlap"]
        loss = loss + config.popularity * parts["degree"]
        if not torch.isfinite(loss):
            raise TrainingError(
                f"two_tower loss must be finite, got {loss.item()}. Lower teacher.learning_rate."
            )
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        total += loss.item() * len(rows)
    return total / len(order)


@torch.no_grad()
def _click_loss(
    model: TwoTower, config: TwoTowerConfig, events: Events, order: Int64Array
) -> float:
    total = 0.0
    for rows in _batches(order, config.batch_events, events.users.device):
        total += events.loss(model, config, rows)["click"].item() * len(rows)
    return total / len(order)


def _batches(order: Int64Array, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    return iter(torch.split(torch.from_numpy(order).to(device), size))


def _optimizers(model: TwoTower, learning_rate: float) -> list[torch.optim.Optimizer]:
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    sparse = [table.weight for table in tables]
    dense = [p for p in model.parameters() if all(p is not one for one in sparse)]
    return [
        torch.optim.SparseAdam(sparse, lr=learning_rate),
        torch.optim.Adam(dense, lr=learning_rate),
    ]


def _debias_figures(model: TwoTower, counts: Int64Array) -> dict[str, float]:
    """How far popularity was kept out: overlap, and what a line through either half explains.

    Of the property only the direction is measured: losses compare by cosine, and rows grow with
    the number of their events.
    """
    seen = counts > 0
    halves = {
        "property": _array(model.property)[seen],
        "popularity": _array(model.popularity)[seen],
    }
    degree = _standard_log(counts[seen])
    return {
        "users_overlap": _mean_squared_cosine(_array(model.interest), _array(model.conformity)),
        "items_overlap": _mean_squared_cosine(halves["property"], halves["popularity"]),
        "log_degree_r2_of_property": _r2(_unit(halves["property"]), degree),
        "log_degree_r2_of_popularity": _r2(halves["popularity"], degree),
    }


def _r2(rows: FloatArray, target: FloatArray) -> float:
    """Share of the target's variance that the best linear map of the rows explains."""
    design = np.column_stack([rows, np.ones(len(rows), dtype=np.float32)]).astype(np.float64)
    weights = np.linalg.lstsq(design, target, rcond=None)[0]
    return float(
        1 - np.square(target - design @ weights).sum() / max(np.square(target).sum(), 1e-12)
    )


def _mean_squared_cosine(first: FloatArray, second: FloatArray) -> float:
    return float(np.square((_unit(first) * _unit(second)).sum(axis=1)).mean())


def _unit(rows: FloatArray) -> FloatArray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, np.float32(1e-12)), dtype=np.float32)


def _standard_log(counts: Int64Array) -> FloatArray:
    logs = np.log1p(counts)
    return ((logs - logs.mean()) / max(logs.std(), 1e-12)).astype(np.float32)


def _array(table: nn.Embedding) -> FloatArray:
    return table.weight.detach().cpu().numpy()
