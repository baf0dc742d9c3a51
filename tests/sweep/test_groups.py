from __future__ import annotations

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from forge_ray.sweep.groups import GRACE_S, StoppedGroups, remove_group


def test_groups_are_freed_once_after_their_grace() -> None:
    removed: list[str] = []
    now = [0.0]
    groups = StoppedGroups(removed.append, lambda: now[0])
    groups.add("a")
    now[0] = GRACE_S / 2
    groups.add("b")
    groups.free_due()
    assert removed == []
    now[0] = GRACE_S
    groups.free_due()
    groups.free_due()
    assert removed == ["a"]
    now[0] = 2 * GRACE_S
    groups.free_all()
    assert removed == ["a", "b"]


@pytest.mark.ray
def test_a_group_is_removed_by_its_id(ray_local) -> None:
    group = placement_group([{"CPU": 0.1}])
    ray.get(group.ready())
    remove_group(group.id.hex())
    assert placement_group_table(group)["state"] == "REMOVED"
    remove_group(group.id.hex())
