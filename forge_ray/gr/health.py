"""When a training run should end before its last step: a loss that leaves, a metric that stands.

Pure functions of what was measured, so every worker and every resumed run comes to the same answer.
Knows losses and rows of validation. Knows nothing about models, files or workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge_ray.errors import ConfigError

SELECTION_METRIC = "ItemNDCG@10"
"""Validation metric that picks the best checkpoint; larger is better."""
VALIDATION_ERROR = "validation_error"
"""Of a row whose validation failed: why. Its `SELECTION_METRIC` is None, other figures are not
there."""
VALIDATION_WARNING = "validation_warning"
"""Of what a validation gives: what is odd about its figures. No row keeps it."""
MAX_FAILED_VALIDATIONS = 3
"""Failed validations in a row that end training: nobody could choose among its weights."""
_MEMORY = 0.95
"""Weight of the past in the smoothed loss: about the last twenty steps count."""


@dataclass(kw_only=True)
class StopConfig:
    """When a run ends before `max_steps`."""

    patience: int = 0
    """Validations in a row without a new best ItemNDCG@10 after which training ends; 0 never."""
    loss_factor: float = 2.0
    """A smoothed loss above this many times its best so far counts as diverging; a best below 1 nat
    counts as 1, so that a model that has learnt its data by heart is left alone."""
    loss_steps: int = 200
    """Steps in a row that must be diverging before the run stops; a loss that is not finite stops
    it at once."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.patience < 0:
            raise ConfigError(
                f"stop.patience must be >= 0, got {self.patience}. Use 0 to train to the end."
            )
        if self.loss_factor <= 1:
            raise ConfigError(f"stop.loss_factor must be > 1, got {self.loss_factor}. Use e.g. 2.")
        if self.loss_steps < 1:
            raise ConfigError(f"stop.loss_steps must be >= 1, got {self.loss_steps}. Use e.g. 200.")


class LossWatch:
    """Follows the loss of every step and says when it has left for good.

    ::

        smoothed <- m * smoothed + (1 - m) * loss          (the first loss starts it)
        best     <- min(best, smoothed)
        diverging: smoothed > factor * max(best, 1)
    """

    def __init__(self, config: StopConfig) -> None:
        self._config = config
        self._smoothed: float | None = None
        self._best = math.inf
        self._num_bad = 0
        self._last_good = 0

    @property
    def is_bad(self) -> bool:
        """Whether the loss of the last step counted as diverging."""
        return self._num_bad > 0

    @property
    def last_good(self) -> int:
        """The last step whose loss did not count as diverging, 0 where there was none."""
        return self._last_good

    def follow(self, losses: Iterable[float], first_step: int) -> str:
        """Takes the next losses; the reason to stop, or an empty string.

        Args:
            losses: mean loss per target token of consecutive steps.
            first_step: step of the first of them.
        """
        config = self._config
        for step, loss in enumerate(losses, first_step):
            if not math.isfinite(loss):
                return f"a loss of {loss} at step {step}"
            past = self._smoothed
            self._smoothed = loss if past is None else _MEMORY * past + (1 - _MEMORY) * loss
            self._best = min(self._best, self._smoothed)
            is_bad = self._smoothed > config.loss_factor * max(self._best, 1.0)
            self._num_bad = self._num_bad + 1 if is_bad else 0
            self._last_good = self._last_good if is_bad else step
            if self._num_bad >= config.loss_steps:
                return (
                    f"a smoothed loss of {self._smoothed:.3f} at step {step}, more than "
                    f"stop.loss_factor={config.loss_factor:g} times its best ({self._best:.3f}) "
                    f"for {self._num_bad} steps"
                )
        return ""


def is_measured(row: Mapping[str, Any]) -> bool:
    """Whether the validation of a row came to its end."""
    return VALIDATION_ERROR not in row


def best_row(history: Sequence[Mapping[str, Any]]) -> int:
    """Index of the first row with the highest ItemNDCG@10, -1 where no row was measured."""
    measured = [at for at, row in enumerate(history) if is_measured(row)]
    # The first of equal ones.
    return max(measured, key=lambda at: float(history[at][SELECTION_METRIC]), default=-1)


def has_settled(history: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last `patience` validations brought no new best; never with a patience of 0.

    Those that failed say nothing and are not counted.
    """
    measured = [row for row in history if is_measured(row)]
    if not patience or not measured:
        return False
    return len(measured) - 1 - best_row(measured) >= patience
