"""Random batches in float64, and how several workers would see them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from forge_ray.sid.alignment import AlignmentBatch, KnownPairs, UserView, View
from forge_ray.sid.alignment.batch import Gather

INPUTS, LATENTS, MIDDLE, USERS, TEACHER = 6, 4, 5, 7, 4
NUM_ITEMS, NUM_USERS = 9, 5


def random_batch(source: str, rows: int, *, seed: int = 0) -> AlignmentBatch:
    """A batch in which items, users and teachers that know nothing occur more than once."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    def view() -> View:
        return View(
            items=torch.randint(NUM_ITEMS, (rows,), generator=generator),
            inputs=numbers(INPUTS),
            latents=numbers(LATENTS),
            quantized=numbers(LATENTS),
            reconstruction=numbers(INPUTS),
            middle=numbers(MIDDLE),
            codes=torch.randint(2, (rows, 3), generator=generator),
        )

    def user() -> UserView:
        users = torch.randint(NUM_USERS, (rows,), generator=generator)
        return UserView(users, numbers(USERS), {"teacher": numbers(TEACHER)})

    anchor = view()
    teacher = numbers(TEACHER)
    teacher[1::4] = 0
    ends = torch.randint(NUM_ITEMS, (2, 6), generator=generator)
    with_users = source == "interactions"
    return AlignmentBatch(
        source,
        anchor,
        anchor if source == "identity" else view(),
        teachers={"teacher": teacher},
        user=user() if with_users else None,
        user_positive=user() if with_users else None,
        known=KnownPairs.of(ends[0], ends[1], num_items=NUM_ITEMS),
    )


def share_of(batch: AlignmentBatch, rank: int, size: int) -> AlignmentBatch:
    """The rows of one worker; `gather` is left to the caller."""
    each = len(batch.anchor.items) // size
    rows = slice(rank * each, (rank + 1) * each)

    def view(whole: View) -> View:
        return View(*(getattr(whole, name)[rows] for name in View.__dataclass_fields__))

    def user(whole: UserView | None) -> UserView | None:
        if whole is None:
            return None
        teachers = {name: value[rows] for name, value in whole.teachers.items()}
        return UserView(whole.users[rows], whole.inputs[rows], teachers)

    return replace(
        batch,
        anchor=view(batch.anchor),
        positive=view(batch.positive),
        teachers={name: value[rows] for name, value in batch.teachers.items()},
        user=user(batch.user),
        user_positive=user(batch.user_positive),
        rank=rank,
    )


def run_workers(size: int, work: Callable[[int, Gather], torch.Tensor]) -> list[torch.Tensor]:
    """Run `work(rank, gather)` for every rank, each in a thread, with a gather that meets.

    Gradients flow through the gathered rows into every worker's graph and add up there, as the sum
    that a gather across processes sends back.
    """
    barrier = threading.Barrier(size, timeout=30)
    slots: list[torch.Tensor] = [torch.empty(0)] * size

    def gather_of(rank: int) -> Gather:
        def gather(rows: torch.Tensor) -> torch.Tensor:
            slots[rank] = rows
            barrier.wait()
            gathered = torch.cat(slots)
            barrier.wait()
            return gathered

        return gather

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(rank, gather_of(rank)), range(size)))
