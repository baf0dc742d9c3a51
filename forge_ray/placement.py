"""On which nodes a process lets the Ray tasks it starts run: Ray hands no labels on by itself."""

from __future__ import annotations

from collections.abc import Mapping

_LABELS: dict[str, str] = {}


def stay_on(labels: Mapping[str, str]) -> None:
    """Keeps tasks and actors that this process starts, those of Ray Data among them, on some nodes.

    Args:
        labels: selector of Ray node labels; empty allows every node, also where an earlier task of
            this process did not.
    """
    # Imported here: a process that starts nothing on Ray should stay light.
    import ray.data

    _LABELS.clear()
    _LABELS.update(labels)
    ray.data.DataContext.get_current().execution_options.label_selector = dict(labels) or None


def label_selector() -> dict[str, str]:
    """The selector of `stay_on`, for the options of a Ray task."""
    return dict(_LABELS)
