"""What the parallel probe trains on and is judged on; apart from the probe, which needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from forge_ray.data.ragged import Ragged


@dataclass(frozen=True, eq=False)
class ParallelData:
    """Train histories and held-out users; disjoint events."""

    train: Ragged
    """Newest train items of each user, in time order."""
    histories: Ragged
    """Items before the targets of each held-out user, in time order."""
    targets: Ragged
    """Held-out items, as many rows as `histories`."""
