"""Checking raw files without writing anything: all problems at once, not only the first.

Runs the very checks of `prepare` with every kind of bad row passed over and counted. What cannot be
passed over (a missing column, a wrong type, a truncated file) ends the check of that input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from forge_ray.data import tasks
from forge_ray.data.catalogue import Catalogue, Inputs, check_vectors, index_items
from forge_ray.data.checks import SKIPPABLE
from forge_ray.data.log import (
    MIN_SHARDS,
    SKIPPED_WITH_ITEM,
    UNSORTED,
    find_inputs,
    order_events,
    pop_losses,
)
from forge_ray.data.schema import SPLITS, Dataset, Split
from forge_ray.data.sources import SourcesConfig, resolve
from forge_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of problem.

    Attributes:
        cause: its name; those in `checks.SKIPPABLE` may go to `skip`.
        rows: how many rows have it; 0 when a whole input has.
        example: the message an error would begin with, of the first such row.
        remedy: what makes `prepare` run.
    """

    cause: str
    rows: int
    example: str
    remedy: str


def validate(config: SourcesConfig) -> list[Finding]:
    """Check all raw inputs; Ray must be running.

    Args:
        config: sources; its own `skip` and `unsorted` settings count as agreed and are not
            reported.

    Returns:
        The findings; an empty list means that `prepare` can read every row. Whether the log is long
        enough for a split is only known once it is ordered, so only `prepare` says that.
    """
    agreed = {*config.skip, *([UNSORTED] if config.interactions.unsorted == "sort" else [])}
    try:
        resolved = resolve(config)
        inputs = find_inputs(resolved)
        # Items without a vector stay in the catalogue here, or their rows would not be checked.
        lenient = replace(
            resolved,
            skip=sorted(set(SKIPPABLE) - {"missing_vector", "null_vector"}),
            interactions=replace(resolved.interactions, unsorted="sort"),
        )
        catalogue = index_items(lenient, inputs)
    except DataError as error:
        return [_hard(error)]
    ledger = catalogue.ledger
    found: list[Finding] = []
    steps = [partial(_check_events, lenient, inputs, catalogue)]
    patient = replace(lenient, skip=sorted(SKIPPABLE))
    steps += [partial(check_vectors, s, patient, inputs, catalogue) for s in inputs.vectors]
    found += [hard for step in steps if (hard := _run(step, ledger))]
    found += [
        Finding(cause, count, ledger.examples[cause], _remedy(cause))
        for cause, count in sorted(ledger.counts.items())
        if cause not in agreed and cause != SKIPPED_WITH_ITEM
    ]
    return found


def validate_dataset(dataset: Dataset) -> list[Finding]:
    """Check a prepared dataset: indices in range, no user twice in a split, finite vectors.

    Streams the shards in this process. With `split.targets=each` users may have several rows.
    """
    checks: dict[str, Callable[[], bool]] = {
        "item_index": lambda: len(dataset.items(["item_index"])) != dataset.num_items,
        **{split: partial(_split_is_broken, dataset, split) for split in SPLITS},
        **{f"vectors.{one}": partial(_vectors_are_broken, dataset, one) for one in dataset.spaces},
    }
    return [
        Finding(name, 0, f"{dataset.artifact.uri} {name} must be consistent, got a broken part", "")
        for name, is_broken in checks.items()
        if is_broken()
    ]


def _split_is_broken(dataset: Dataset, split: Split) -> bool:
    users = np.zeros(dataset.num_users, dtype=np.int64)
    for batch in dataset.sequence_batches(split):
        parts = [batch.items, *([] if batch.targets is None else [batch.targets])]
        for part in parts:
            values = part.values
            if len(values) and not (values.min() >= 0 and values.max() < dataset.num_items):
                return True
        np.add.at(users, batch.user_index, 1)
    split_config = dataset.artifact.manifest.config["split"]
    may_repeat = split != "train" and split_config.get("targets") == "each"
    is_repeated = not may_repeat and bool((users > 1).any())
    return is_repeated or np.count_nonzero(users) != dataset.rows[f"{split}_users"]


def _vectors_are_broken(dataset: Dataset, space: str) -> bool:
    seen = np.zeros(dataset.num_items, dtype=np.int64)
    for batch in dataset.vector_batches(space=space):
        if not np.isfinite(batch.vectors).all():
            return True
        np.add.at(seen, batch.indices, 1)
    return bool((seen != 1).any())


def _check_events(config: SourcesConfig, inputs: Inputs, catalogue: Catalogue) -> tasks.Ledger:
    ledger = tasks.Ledger()
    stats = order_events(config, inputs, catalogue.shared, shards=MIN_SHARDS, output=None)
    tasks.split_ledger(stats, ledger)
    pop_losses(ledger)
    return ledger


def _run(step: Callable[[], tasks.Ledger], ledger: tasks.Ledger) -> Finding | None:
    try:
        ledger.update(step())
    except DataError as error:
        return _hard(error)
    return None


def _hard(error: DataError) -> Finding:
    return Finding("unreadable", 0, str(error), "see the message")


def _remedy(cause: str) -> str:
    if cause == UNSORTED:
        return "interactions.unsorted=sort"
    return f"skip=[{cause}]"
