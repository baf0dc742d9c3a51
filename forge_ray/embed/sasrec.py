"""SASRec with cross-entropy over the whole catalogue: a sequential recommender in one file.

Serves as a teacher of item vectors and as a baseline. Histories in, scores of every item out; knows
neither datasets nor files, so what it may not see is the caller's to leave out.

Shapes: B users, T places of a history, D width, N items, R places that have a next item.

Source: SASRec (arXiv 1808.09781) with the loss of COSETTE's baseline (arXiv 2508.14910). Where we
differ: softmax over all items instead of one sampled negative, pre-norm blocks with GELU, items
normalised before places are added (its length serves the scores; without, learning was measured to
take about twice the epochs), histories start at place 0 so that training and scoring
see equal places, long ones are cropped at random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from forge_ray.data.ragged import Ragged
from forge_ray.errors import ConfigError, TrainingError

SCORES_AT_ONCE = 2**20
"""Scores held at a time on a CPU: 4 MB stay in its cache, twice as fast as all at once."""
_SCORES_ON_GPU = 2**26
_LEAST_ROWS = 16
"""Rows scored together even where the catalogue is larger: each pass reads all N·D weights."""
_WINDOW_BATCHES = 32
"""Users of this many batches are sorted by length together: less padding, order still random."""


@dataclass(kw_only=True)
class SasRecConfig:
    """Model and training of SASRec."""

    dim: int = 64
    """Width D of items and hidden states; 32 for LETTER's teacher."""
    layers: int = 2
    """Transformer blocks; 2 in the source."""
    heads: int = 2
    """Attention heads; must divide `dim`."""
    dropout: float = 0.4
    """Share of embeddings and block outputs dropped; 0.5 in the source for sparse data."""
    max_length: int = 50
    """Newest items of a history that are read; 50 in the source."""
    epochs: int = 200
    """Most passes over the users."""
    patience: int = 10
    """Epochs without a better figure before training stops."""
    holdout_share: float = 0.05
    """Share of the users set aside to choose the epoch; 0 trains on all of them, `epochs` epochs or
    as long as the caller's own judge sees progress.
    """
    batch_users: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    negatives: int = 0
    """Items drawn at random for each batch instead of the whole catalogue; 0 for all. Beyond a
    million items the whole catalogue costs hours.
    """
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        positive = ("dim", "layers", "heads", "max_length", "epochs", "patience", "batch_users")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"sasrec.{name} must be >= 1, got {getattr(self, name)}.")
        for name in ("dropout", "holdout_share"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise ConfigError(f"sasrec.{name} must be in [0, 1), got {value}. Use a share.")
        if self.learning_rate <= 0 or min(self.negatives, self.weight_decay, self.seed) < 0:
            raise ConfigError(
                "sasrec.learning_rate must be > 0 and negatives, weight_decay and seed >= 0, got "
                f"{self.learning_rate}, {self.negatives}, {self.weight_decay} and {self.seed}."
            )
        if self.dim % self.heads:
            raise ConfigError(
                f"sasrec.heads must divide sasrec.dim, got {self.heads} and {self.dim}."
            )


class SasRec(nn.Module):
    """Causal transformer over item embeddings, which also score the next item."""

    items: nn.Embedding
    places: nn.Embedding
    max_length: int

    def __init__(self, num_items: int, config: SasRecConfig) -> None:
        """Make a model with random weights, drawn from torch's generator.

        Args:
            num_items: catalogue size N.
            config: width, depth, heads, dropout and history length are read.
        """
        super().__init__()
        self.max_length = config.max_length
        self.items = nn.Embedding(num_items, config.dim)
        self.places = nn.Embedding(config.max_length, config.dim)
        self.input_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(config.dim, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, items_BT: torch.Tensor) -> torch.Tensor:
        """Read histories.

        Args:
            items_BT: int64 [B, T], T <= `max_length`, filled on the right with −1.

        Returns:
            float [B, T, D]: what to expect after each place; meaningless on filled places.
        """
        # Attention is causal and the filling stands last, so no true place ever sees it.
        places = torch.arange(items_BT.shape[1], device=items_BT.device)
        read_BTD = self.input_norm(self.items(items_BT.clamp(min=0)))
        x_BTD = self.dropout(read_BTD + self.places(places))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)

    @torch.no_grad()
    def user_vectors(self, histories: Ragged, *, block_users: int = 1024) -> npt.NDArray[Any]:
        """Summarise each user for the next item.

        Args:
            histories: U rows of item indices, oldest first.
            block_users: users read at a time.

        Returns:
            float32 [U, D]; zero rows for empty histories.
        """
        self.eval()
        device = self.items.weight.device
        out = np.zeros((len(histories), self.items.embedding_dim), dtype=np.float32)
        filled = np.flatnonzero(histories.lengths)
        for start in range(0, len(filled), block_users):
            rows = filled[start : start + block_users]
            recent = histories.take(rows).tail(self.max_length)
            hidden_BTD = self(_tensor(recent.padded(side="right"), device))
            last = torch.from_numpy(recent.lengths - 1).to(device)
            picked = hidden_BTD[torch.arange(len(rows), device=device), last]
            out[rows] = picked.cpu().numpy()
        return out

    @torch.no_grad()
    def score_all_items(self, histories: Ragged) -> npt.NDArray[Any]:
        """Score every item as the next one of each user; pass users in blocks.

        Args:
            histories: U rows of item indices, oldest first.

        Returns:
            float32 [U, N], takes 4·U·N bytes; larger is more likely, seen items are not left out.
        """
        users = torch.from_numpy(self.user_vectors(histories))
        return (users @ self.items.weight.detach().cpu().T).numpy()


class CausalBlock(nn.Module):
    """Pre-norm causal self-attention and a feed-forward layer, dropout behind both."""

    def __init__(self, dim: int, heads: int, dropout: float, *, feed: int | None = None) -> None:
        """Make a block with random weights.

        Args:
            dim: width D.
            heads: attention heads; must divide `dim`.
            dropout: share of either output dropped while training.
            feed: inner width of the feed-forward layer; by default 4·D.
        """
        super().__init__()
        inner = feed or 4 * dim
        self.heads = heads
        self.dropout = dropout
        self.attend_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] before and after; no place sees a later one."""
        x_BTD = x_BTD + self._drop(self._attend(self.attend_norm(x_BTD)))
        return x_BTD + self._drop(self.feed(self.feed_norm(x_BTD)))

    def _attend(self, x_BTD: torch.Tensor) -> torch.Tensor:
        split = (*x_BTD.shape[:2], 3, self.heads, -1)
        query, key, value = self.qkv(x_BTD).view(split).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _drop(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x_BTD, self.dropout, self.training)


def fit_sasrec(
    config: SasRecConfig,
    histories: Ragged,
    num_items: int,
    *,
    report: Callable[[int, Mapping[str, float]], None] | None = None,
    judge: Callable[[SasRec], float] | None = None,
    start: npt.NDArray[np.float32] | None = None,
) -> SasRec:
    """Train on next items and keep the best epoch.

    Best is the one that ranks the next items of the users set aside best, or, where none are, the
    one of the largest figure by `judge`.

    Memory: weights with Adam's state and gradients take 20·N·D bytes.

    Args:
        config: model and training.
        histories: U rows of item indices, oldest first; every place but the first is a target.
        num_items: catalogue size N.
        report: called after every epoch with `loss` and `mrr` of the users set aside, or `figure`.
        judge: what a model is worth, larger is better; asked only with `holdout_share` 0.
        start: float32 [N, D], added to the random item embeddings before the first step.

    Raises:
        TrainingError: the loss is not finite, or no history has two items.
    """
    usable = histories.take(histories.lengths > 1)
    if not len(usable):
        raise TrainingError(
            "sasrec must read histories of two items, got none. Use longer histories."
        )
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(usable))
    # One user always stays to train on.
    num_aside = min(math.ceil(config.holdout_share * len(usable)), len(usable) - 1)
    aside, train = usable.take(order[:num_aside]), usable.take(order[num_aside:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = SasRec(num_items, config).to(device)
        if start is not None:
            with torch.no_grad():
                model.items.weight += torch.from_numpy(start).to(device)
        name, measure = "figure", judge
        if len(aside):
            name, measure = "mrr", lambda one: mean_reciprocal_rank(one, aside)
        return _train(model, config, train, rng, report, name=name, measure=measure)


def _train(
    model: SasRec,
    config: SasRecConfig,
    train: Ragged,
    rng: np.random.Generator,
    report: Callable[[int, Mapping[str, float]], None] | None,
    *,
    name: str,
    measure: Callable[[SasRec], float] | None,
) -> SasRec:
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    best, best_epoch, best_state = -1.0, 0, None
    for epoch in range(config.epochs):
        figures = {"loss": _one_epoch(model, optimizer, config, train, rng)}
        if measure is not None:
            figures[name] = measure(model)
            if figures[name] > best:
                best, best_epoch = figures[name], epoch
                best_state = copy.deepcopy(model.state_dict())
        if report is not None:
            report(epoch, figures)
        if measure is not None and epoch - best_epoch >= config.patience:
            break
    if best_state is not None:
        model.load_state_dict(best_state)
    return model.eval()


def _one_epoch(
    model: SasRec,
    optimizer: torch.optim.Optimizer,
    config: SasRecConfig,
    train: Ragged,
    rng: np.random.Generator,
) -> float:
    model.train()
    total, count = 0.0, 0
    windows = _crop(train, config.max_length + 1, rng)
    for rows in _batches(windows.lengths, config.batch_users, rng):
        hidden_RD, targets_R = _next_items(model, windows.take(rows))
        negatives = _draw(config.negatives, model.items.num_embeddings, rng)
        negatives = None if negatives is None else negatives.to(hidden_RD.device)
        loss = cross_entropy(hidden_RD, model.items.weight, targets_R, negatives=negatives)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"sasrec loss must be finite, got {loss.item()}. Lower sasrec.learning_rate."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total, count = total + loss.item() * len(targets_R), count + len(targets_R)
    return total / count


def cross_entropy(
    hidden_RD: torch.Tensor,
    items_ND: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    negatives: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of −log softmax over the items at the target.

    Args:
        hidden_RD: float [R, D].
        items_ND: float [N, D]; scores are dot products.
        targets_R: int64 [R].
        negatives: int64 [n] items to use instead of all N, each weighted N/n in the denominator
            beside the target, so that in expectation it is that of all items.

    Returns:
        Scalar. Over all items a block of scores is held at a time, over n of them R·n scores.
    """
    if negatives is None:
        return _FullCrossEntropy.apply(hidden_RD, items_ND, targets_R)  # type: ignore[no-untyped-call]
    positive_R = (hidden_RD * items_ND[targets_R]).sum(dim=1)
    others_RK = hidden_RD @ items_ND[negatives].T
    others_RK = others_RK + math.log(len(items_ND) / len(negatives))
    others_RK = others_RK.masked_fill(targets_R[:, None] == negatives, -torch.inf)
    everything = torch.cat([positive_R[:, None], others_RK], dim=1)
    return (everything.logsumexp(dim=1) - positive_R).mean()


class _FullCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of scores that stay in the cache.

    A scalar loss has the same gradient up to a factor whatever follows it, so the forward pass can
    take it at once and no score outlives its block.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: torch.Tensor, items_ND: torch.Tensor, targets_R: torch.Tensor
    ) -> torch.Tensor:
        hidden_grad, items_grad = torch.empty_like(hidden_RD), torch.zeros_like(items_ND)
        total = hidden_RD.new_zeros(())
        rows = _rows_at_once(items_ND)
        for start in range(0, len(targets_R), rows):
            hidden, target = hidden_RD[start : start + rows], targets_R[start : start + rows, None]
            scores = hidden @ items_ND.T
            normaliser = scores.logsumexp(dim=1, keepdim=True)
            total += (normaliser - scores.gather(1, target)).sum()
            share = scores.sub_(normaliser).exp_()
            share.scatter_add_(1, target, share.new_full(target.shape, -1.0))
            hidden_grad[start : start + rows] = share @ items_ND
            items_grad.addmm_(share.T, hidden)
        ctx.save_for_backward(hidden_grad, items_grad)
        ctx.num_rows = len(targets_R)
        return total / ctx.num_rows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_grad, items_grad = ctx.saved_tensors
        scale = grad / ctx.num_rows
        return hidden_grad * scale, items_grad * scale, None


@torch.no_grad()
def mean_reciprocal_rank(model: SasRec, histories: Ragged, *, block_users: int = 256) -> float:
    """Rank every next item of the histories among all items.

    Args:
        model: put into evaluation mode.
        histories: rows of at least two items; the newest `max_length` + 1 are read.
        block_users: users read at a time.

    Returns:
        Mean of 1 / rank over all places, in (0, 1]; ties count against the target.
    """
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(histories), block_users):
        rows = np.arange(start, min(start + block_users, len(histories)))
        recent = histories.take(rows).tail(model.max_length + 1)
        hidden_RD, targets_R = _next_items(model, recent)
        step = _rows_at_once(model.items.weight)
        for hidden, targets in zip(
            torch.split(hidden_RD, step), torch.split(targets_R, step), strict=True
        ):
            scores = hidden @ model.items.weight.T
            own = scores.gather(1, targets[:, None])
            total += float((1 / (scores >= own).sum(dim=1)).sum())
        count += len(targets_R)
    return total / count


def _next_items(model: SasRec, windows: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [R, D] of all places that have a next item, and that item [R]."""
    table = _tensor(windows.padded(side="right"), model.items.weight.device)
    inputs_BT, targets_BT = table[:, :-1], table[:, 1:]
    is_true = targets_BT >= 0
    return model(inputs_BT)[is_true], targets_BT[is_true]


def _crop(histories: Ragged, length: int, rng: np.random.Generator) -> Ragged:
    """A random window of at most `length` items of each history."""
    lengths = np.minimum(histories.lengths, length)
    slack = histories.lengths - lengths
    return histories.slices(histories.offsets[:-1] + rng.integers(0, slack + 1), lengths)


def _batches(
    lengths: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in random batches of about equal length."""
    order = rng.permutation(len(lengths))
    window = np.arange(len(order)) // (size * _WINDOW_BATCHES)
    order = order[np.lexsort((lengths[order], window))]
    starts = np.arange(0, len(order), size)
    for start in rng.permutation(starts):
        yield order[start : start + size]


def _draw(count: int, num_items: int, rng: np.random.Generator) -> torch.Tensor | None:
    if not 0 < count < num_items:
        return None
    return torch.from_numpy(rng.choice(num_items, size=count, replace=False))


def _rows_at_once(items_ND: torch.Tensor) -> int:
    scores = _SCORES_ON_GPU if items_ND.is_cuda else SCORES_AT_ONCE
    return max(_LEAST_ROWS, scores // len(items_ND))


def _tensor(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
