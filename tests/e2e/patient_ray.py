"""Ray's command line, less its limit of 30 seconds for a node to start: machines may be busy.

Usage: python -m tests.e2e.patient_ray start …
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ray._private import services
from ray._private.services import get_node
from ray.scripts.scripts import main

START_S = 300


def patient_get_node(address: str, node_id: str) -> Any:
    """What Ray knows of a node that starts."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            return get_node(address, node_id)
        time.sleep(0.5)
    return get_node(address, node_id)


def be_patient() -> None:
    """For the Ray that this process starts."""
    services.get_node = patient_get_node


if __name__ == "__main__":
    be_patient()
    main()
