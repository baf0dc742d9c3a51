"""What a training tells a metrics server, through Ray: tokens, time, waiting, checkpoints.

Counters only. Ray exports a gauge for seconds after it was last set, which suits no training that
has other things to do; a counter's rate says as much, and what a worker did stays after its end.
Knows neither the loop nor its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAIN_COUNTERS: Mapping[str, str] = {
    "forge_train_tokens": "Target tokens trained on, over all workers of a run.",
    "forge_train_seconds": "Seconds spent in training steps and checkpoints, first worker's.",
    "forge_train_input_wait_seconds": "Of those, seconds that the first worker waited for input.",
    "forge_checkpoints": "Checkpoints written.",
    "forge_checkpoint_seconds": "Seconds that training stood still for checkpoints.",
}
"""Counters of a training, tag `sweep`; Ray exports them as `ray_<name>_total`."""


class TrainMeters:
    """The counters of one run; rank 0 has them.

    Args:
        sweep: Value of the tag `sweep`; empty for a training of its own.
    """

    def __init__(self, sweep: str) -> None:
        from ray.util.metrics import Counter

        self._counters: dict[str, Any] = {
            name: Counter(name, description=text, tag_keys=("sweep",)).set_default_tags(
                {"sweep": sweep}
            )
            for name, text in TRAIN_COUNTERS.items()
        }

    def __call__(self, amounts: Mapping[str, float]) -> None:
        """Adds to the counters; an amount of nothing is left out, as Ray takes none."""
        for name, amount in amounts.items():
            if amount > 0:
                self._counters[name].inc(amount)
