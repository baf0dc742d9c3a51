"""The parallel probe: a small sequence model with one head per level, exact over the catalogue.

An item's probability is the product of its codes' probabilities, each predicted from the history
alone. Needs no order of the codes, so it also suits product-quantized ones; needs no beam search,
so its item-level ranking is exact. Sees users' histories, unlike any symbol statistic; costs a
training of minutes.

Shapes: B users, T places, L levels, K codes of a level, S distinct SIDs, D width.

Source: parallel heads of RPG (arXiv 2506.05781): item = mean of its token vectors (here their
scaled sum), causal transformer, zero-initialised residual head per level, cosine over temperature,
score = sum of log probabilities. Where we differ: narrower, less dropout, a bias per code for
popularity, and no graph search: every item is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError
from forge_ray.sid.metrics.config import ParallelConfig
from forge_ray.sid.metrics.parallel_data import ParallelData
from forge_ray.sid.metrics.parallel_ranking import Catalogue, Ranks, rank_targets

_USERS = 64
"""Held-out users ranked at a time."""


@dataclass(frozen=True)
class ParallelReport:
    """Result of the probe on one table."""

    bits: float
    """Mean −log2 P(target | history), normalised over the catalogue, shared evenly in a bucket."""
    item_hit: float
    """ItemHit@k, history items left out, ties in expectation."""
    item_hit_se: float
    """Of `item_hit`, over targets."""
    item_ndcg: float
    """ItemNDCG@k of each target, averaged."""
    num_targets: int
    """Targets ranked."""
    loss: float
    """Mean train cross-entropy per level in the last tenth of the steps, nats."""


class ParallelHeads(nn.Module):
    """History of items → a distribution over the codes of every level."""

    def __init__(self, codebook_sizes: Sequence[int], config: ParallelConfig) -> None:
        super().__init__()
        width = config.width
        self.sizes = [int(size) for size in codebook_sizes]
        self.temperature = config.temperature
        self.num_heads = config.heads
        # Items enter as loud as the layers answer: at the size of their initial weights they would
        # drown in the residual stream (seen on Amazon Beauty together with the two other changes).
        self.scale = width**0.5
        self.tokens = nn.Embedding(sum(self.sizes), width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.places = nn.Parameter(torch.zeros(config.history, width))
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            width, config.heads, 2 * width, config.dropout, "gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in self.sizes)
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in self.sizes)
        for head in self.outer:
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, tokens_BTL: torch.Tensor) -> torch.Tensor:
        """Read histories.

        Args:
            tokens_BTL: int64 global tokens, padded on the left with −1.

        Returns:
            float32 [B, T, D], what each place says about the next item.
        """
        is_item = tokens_BTL[..., 0] >= 0
        length = tokens_BTL.shape[1]
        items = self.tokens(tokens_BTL.clamp(min=0)).sum(dim=2) * self.scale * is_item[..., None]
        # Padding stands on the left, so counting places from the right aligns the newest items.
        hidden = self.dropout(items + self.places[-length:])
        # Padding is masked as a key; a padded place sees itself, so that no softmax is empty.
        later = torch.ones(length, length, dtype=torch.bool, device=items.device).triu(1)
        itself = torch.eye(length, dtype=torch.bool, device=items.device)
        blocked = (later | ~is_item[:, None, :]) & ~itself
        mask = blocked.repeat_interleave(self.num_heads, dim=0)
        out: torch.Tensor = self.norm(self.layers(hidden, mask=mask))
        return out

    def log_probabilities(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Distributions over the codes of each level.

        Args:
            states: float32 [n, D].

        Returns:
            L tensors float32 [n, K_l].
        """
        tables = torch.split(self.tokens.weight, self.sizes)
        biases = torch.split(self.bias, self.sizes)
        found = []
        parts = zip(self.inner, self.outer, tables, biases, strict=True)
        for inner, outer, table, bias in parts:
            head = F.normalize(states + outer(F.gelu(inner(states))), dim=1)
            cosines = head @ F.normalize(table, dim=1).T
            found.append(F.log_softmax(cosines / self.temperature + bias, dim=1))
        return found


def parallel_probe(
    codes: npt.NDArray[np.integer[Any]],
    codebook_sizes: Sequence[int],
    data: ParallelData,
    config: ParallelConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> ParallelReport:
    """Train the probe on the train part and rank the whole catalogue for the held-out users.

    Nothing is fitted or chosen on held-out events. The global random state stays as it was.

    Args:
        codes: integer codes [N, L].
        codebook_sizes: codes per level, length L.
        data: train histories and held-out users.
        config: model, training and cutoff; `steps` must be positive.
        seed: fixes weights, batches and dropout.
        device: where to train and rank.

    Raises:
        ConfigError: when no train history has two items.
    """
    sizes = [int(size) for size in codebook_sizes]
    offsets = np.cumsum([0, *sizes[:-1]])
    tokens = torch.from_numpy(np.asarray(codes, dtype=np.int64) + offsets).to(device)
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = ParallelHeads(sizes, config).to(device)
        loss = _train(model, tokens, data.train, config, np.random.default_rng(seed))
    model.eval()
    catalogue = Catalogue.of(codes, sizes, device)
    ranks = [
        _rank(model, tokens, catalogue, data, slice(start, start + _USERS))
        for start in range(0, len(data.targets), _USERS)
    ]
    return _report(ranks, data.targets, config.k, loss)


def _report(ranks: list[Ranks], targets: Ragged, k: int, loss: float) -> ParallelReport:
    weight = 1.0 / np.repeat(targets.lengths, targets.lengths)
    hit = np.concatenate([one.item_hit(k) for one in ranks])
    mean = float(np.average(hit, weights=weight))
    squares = np.square(weight * (hit - mean)).sum()
    bits = np.concatenate([one.bits for one in ranks])
    ndcg = np.concatenate([one.item_ndcg(k) for one in ranks])
    return ParallelReport(
        bits=float(np.average(bits, weights=weight)),
        item_hit=mean,
        item_hit_se=float(np.sqrt(squares) / weight.sum()),
        item_ndcg=float(np.average(ndcg, weights=weight)),
        num_targets=len(hit),
        loss=loss,
    )


@torch.no_grad()
def _rank(
    model: ParallelHeads,
    tokens: torch.Tensor,
    catalogue: Catalogue,
    data: ParallelData,
    users: slice,
) -> Ranks:
    chosen = np.arange(len(data.targets))[users]
    histories = data.histories.take(chosen)
    states = model(_item_tokens(tokens, histories.padded(len(model.places), fill=-1)))[:, -1]
    scores = model.log_probabilities(states)
    return rank_targets(scores, catalogue, histories, data.targets.take(chosen))


def _train(
    model: ParallelHeads,
    tokens: torch.Tensor,
    histories: Ragged,
    config: ParallelConfig,
    rng: np.random.Generator,
) -> float:
    """Predict every next item of the train histories; returns the loss of the last tenth."""
    usable = histories.take(histories.lengths >= 2)
    if len(usable) == 0:
        raise ConfigError(
            "score.parallel needs train histories of at least two items, got none. "
            "Set score.parallel.steps to 0."
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    losses = []
    for step in range(config.steps):
        rate = min(10 * (step + 1) / config.steps, (config.steps - step) / config.steps, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        rows = usable.take(rng.integers(0, len(usable), config.batch_users))
        # As wide as the batch needs: places count from the right, so the width changes nothing.
        items = rows.padded(min(config.history + 1, int(rows.lengths.max())), fill=-1)
        loss = _loss(model, _item_tokens(tokens, items))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, config.steps // 10) :]).mean())


def _loss(model: ParallelHeads, tokens: torch.Tensor) -> torch.Tensor:
    before, after = tokens[:, :-1], tokens[:, 1:]
    is_step = (before[..., 0] >= 0) & (after[..., 0] >= 0)
    states = model(before)[is_step]
    wanted = after[is_step]
    start = 0
    total = states.new_zeros(())
    for level, scores in enumerate(model.log_probabilities(states)):
        total = total + F.nll_loss(scores, wanted[:, level] - start)
        start += model.sizes[level]
    return total / len(model.sizes)


def _item_tokens(tokens: torch.Tensor, items: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
    """Global tokens of padded items, int64 [B, T, L]; −1 for padding."""
    index = torch.from_numpy(items.astype(np.int64)).to(tokens.device)
    return torch.where(index[..., None] >= 0, tokens[index.clamp(min=0)], -1)
